"""The rows that some examples store."""

from django.db import models


class Task(models.Model):
    """A task of the example about cursors."""

    text = models.CharField(max_length=200)

    def __str__(self) -> str:
        return self.text


class Payment(models.Model):
    """A payment of the example about transactions."""

    amount = models.PositiveIntegerField()

    def __str__(self) -> str:
        return str(self.amount)


class Choice(models.Model):
    """A choice of the poll, with its votes."""

    name = models.CharField(max_length=50, unique=True)
    votes = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    """An order of the example about model changes."""

    item = models.CharField(max_length=50)
    pieces = models.PositiveIntegerField(default=1)
    ready = models.BooleanField(default=False)

    def __str__(self) -> str:
        return f"{self.pieces} {self.item}"

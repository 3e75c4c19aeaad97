"""The model of the example."""

from django.db import models


class Order(models.Model):
    """An order, which is open until it is done."""

    text = models.CharField(max_length=200)
    done = models.BooleanField(default=False)

    def __str__(self) -> str:
        return self.text

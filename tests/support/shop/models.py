"""Models of every kind: a child, a grandchild, a proxy, an abstract base, and a cascade."""

from __future__ import annotations

import uuid

from django.db import models


class Order(models.Model):
    """An order of a customer."""

    customer = models.IntegerField()
    status = models.CharField(max_length=20, default="new")
    count = models.IntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.status} {self.count}"


class OrderProxy(Order):
    """The same rows."""

    class Meta:
        proxy = True


class RushOrder(Order):
    """An order with a second row."""

    hours = models.IntegerField(default=1)


class RushOrderProxy(RushOrder):
    """The rows of the child."""

    class Meta:
        proxy = True


class Courier(RushOrder):
    """An order with a third row."""

    name = models.CharField(max_length=20)


class Numbered(models.Model):
    """A base without a table."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)

    class Meta:
        abstract = True


class Line(Numbered):
    """A line of an order, which is deleted with it. The ordering is an outer join."""

    order = models.ForeignKey(Order, models.CASCADE)
    gift = models.ForeignKey(Order, models.SET_NULL, null=True, related_name="+")

    class Meta:
        ordering = ["gift__status"]

    def __str__(self) -> str:
        return str(self.pk)

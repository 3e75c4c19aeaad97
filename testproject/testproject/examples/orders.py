"""Orders: each change of the model is an event, and an order moves from one list to another."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.template.loader import render_to_string
from django.views.decorators.cache import never_cache

from django_eventsource import get_cursor, publish_changes
from testproject.models import Order

TOKENS = {False: "demo:orders:kitchen", True: "demo:orders:counter"}


def publish_orders() -> None:
    """Publish the changes of all orders as HTML. ``DemoConfig.ready()`` calls this function."""
    publish_changes(
        Order,
        token=lambda order: TOKENS[order.ready],
        serialize=as_html,
        # htmx 4 swaps events of the action "message".
        actions=dict.fromkeys(("created", "updated", "deleted"), "message"),
    )


def as_html(order: Order, change: str) -> str:
    return render_to_string("testproject/order.html", {"order": order, "change": change})


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        change(request.POST)
        return HttpResponse(status=204)
    lists = [
        {
            "title": "Counter" if ready else "Kitchen",
            "token": token,
            "cursor": get_cursor(token),  # first the cursor, then the data
            "orders": Order.objects.filter(ready=ready).order_by("pk"),
        }
        for ready, token in TOKENS.items()
    ]
    return render(request, "testproject/orders.html", {"lists": lists})


@transaction.atomic
def change(data: dict[str, str]) -> None:
    if data["do"] == "add":
        Order.objects.create(item=data["item"][:50])
        return
    order = get_object_or_404(Order.objects.select_for_update(), pk=data["order"])
    match data["do"]:
        case "more":
            order.pieces += 1
            order.save()
        case "move":
            order.ready = not order.ready
            order.save()
        case "delete":
            order.delete()

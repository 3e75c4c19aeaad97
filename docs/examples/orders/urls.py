"""The page, its list, and what the buttons change."""

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.urls import include, path
from django.views.decorators.http import require_POST
from orders.models import Order

from django_eventsource import get_cursor


def page(request: HttpRequest) -> HttpResponse:
    """Show the page, and create the order of its form."""
    if request.method == "POST":
        with transaction.atomic():
            Order.objects.create(text=request.POST["text"])
        return HttpResponse(status=204)
    context = {"cursor": get_cursor("orders"), "orders": open_orders()}
    return render(request, "orders/page.html", context)


def items(request: HttpRequest) -> HttpResponse:
    """Show the list alone, with what this user may see."""
    return render(request, "orders/items.html", {"orders": open_orders()})


@require_POST
@transaction.atomic
def done(request: HttpRequest, pk: int) -> HttpResponse:
    """Mark an order as done."""
    order = get_object_or_404(Order, pk=pk)
    order.done = True
    order.save(update_fields=["done"])
    return HttpResponse(status=204)


def open_orders() -> list[Order]:
    """Return the orders of the list."""
    return list(Order.objects.filter(done=False).order_by("pk"))


urlpatterns = [
    path("", page),
    path("items/", items, name="items"),
    path("<int:pk>/done/", done, name="done"),
    path("events/", include("django_eventsource.urls")),
]

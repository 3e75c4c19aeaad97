"""Transactions: an event is published if and only if its transaction commits."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import publish
from django_eventsource.events import JSONIdEvent
from testproject.models import Payment

TOKEN = "demo:payments"


class PaymentEvent(JSONIdEvent):
    """A payment. Its value is the id and the amount."""

    ACTIONS = ["payment"]


class Refused(Exception):
    """The payment is refused after its event was published."""


@never_cache
def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        amount = int(request.POST["amount"])
        try:
            pay(amount, refuse=request.POST["end"] == "rollback")
            end = "committed"
        except Refused:
            end = "rolled back"
        text = f"Stored {amount}, published it, {end}."
        return JsonResponse({"text": text, "rows": Payment.objects.count()})
    context = {"token": TOKEN, "rows": Payment.objects.count()}
    return render(request, "testproject/transactions.html", context)


@transaction.atomic
def pay(amount: int, *, refuse: bool) -> None:
    payment = Payment.objects.create(amount=amount)
    publish(TOKEN, "payment", {"id": payment.pk, "amount": amount}, PaymentEvent)
    if refuse:
        raise Refused

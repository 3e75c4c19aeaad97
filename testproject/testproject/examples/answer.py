"""An answer that cannot be lost: it is published word by word, while it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache

from django_eventsource import astart_production, astop_production
from django_eventsource.exceptions import ProductionRunning

TOKEN = "demo:answer"
TEXT = (
    "You asked: {question}\n\n"
    "No language model is here. This text is yielded word by word, by a generator of the server. "
    "Each word is stored before it is sent. So you may reload the page, open it in a second "
    "window, or lose the network for a while: the text continues, in every window.\n\n"
    "The Stop button works in every window too. If the server is killed in the middle, the next "
    "one reports that the answer is incomplete. At the end the whole text is one event, and a "
    "page that opens later receives only that."
)


@never_cache
async def page(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        if request.POST["do"] == "stop":
            await astop_production(TOKEN)
        else:
            with suppress(ProductionRunning):  # another window has asked just before
                await astart_production(TOKEN, answer(request.POST["question"][:200]))
        return HttpResponse(status=204)
    await request.auser()  # the template's URL of the stream is bound to the session
    return render(request, "testproject/answer.html", {"token": TOKEN})


async def answer(question: str) -> AsyncIterator[str]:
    """Yield an answer word by word, as a language model does."""
    for word in TEXT.format(question=question).split(" "):
        await asyncio.sleep(0.08)
        yield f"{word} "

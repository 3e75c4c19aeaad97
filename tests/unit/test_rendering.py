"""``publish_template()`` and ``apublish_template()``."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction
from django.template import TemplateDoesNotExist
from django.test import RequestFactory

from django_eventsource import apublish_template, publish, publish_template
from django_eventsource.events import JSONIdEvent, StringEvent
from django_eventsource.exceptions import EventTooLarge, InvalidEvent, UnknownAction
from django_eventsource.history import History
from tests.support.events import texts

LOCMEM = "django.template.loaders.locmem.Loader"
TEMPLATES = {
    "item.html": "<li>{{ name }}</li>\n",
    "of.html": "{{ request.path }}",
    "call.html": "{{ note }}",
    "data.json": '{"name": "{{ name }}"}',
    "both.html": "first",
}


def engine(name: str, templates: dict[str, str]) -> dict[str, Any]:
    """Return the settings of a template engine."""
    return {
        "NAME": name,
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "loaders": [(LOCMEM, templates)],
            "context_processors": ["django.template.context_processors.request"],
        },
    }


@pytest.fixture(autouse=True)
def engines(settings: Any) -> None:
    """Use two template engines."""
    settings.TEMPLATES = [engine("first", TEMPLATES), engine("second", {"both.html": "second"})]


@pytest.fixture(autouse=True)
def stored(memory_history: History) -> Callable[[], list[str]]:
    """Return a function for the values of the events of the token ``t``."""
    floor = memory_history.newest("t")[0]
    return lambda: texts(memory_history.read("t", floor).entries)


Stored = Callable[[], list[str]]


def test_the_text_of_a_template_is_published_unchanged(stored: Stored) -> None:
    """Variables are escaped, and the line end at the end is a part of the value."""
    event = publish_template("t", "ping", "item.html", {"name": "Tea & cake"})
    assert (event.token, event.action) == ("t", "ping")
    assert event.value == ["<li>Tea &amp; cake</li>", ""]
    assert stored() == ["<li>Tea &amp; cake</li>\n"]
    assert event.id is not None


def test_a_template_is_rendered_with_the_request_and_the_engine(stored: Stored) -> None:
    publish_template("t", "ping", "of.html", request=RequestFactory().get("/news/"))
    publish_template("t", "ping", "both.html")
    publish_template("t", "ping", "both.html", using="second")
    publish_template("t", "ping", ["nowhere.html", "item.html", "both.html"], {"name": "x"})
    assert stored() == ["/news/", "first", "second", "<li>x</li>\n"]


def test_the_event_class_may_be_passed(stored: Stored) -> None:
    event = publish_template("t", "ping", "both.html", event_class=StringEvent)
    assert type(event) is StringEvent
    assert stored() == []


def test_a_json_class_refuses_html(stored: Stored) -> None:
    """The error contains the text and the classes that accept it. JSON is accepted."""
    with pytest.raises(InvalidEvent) as caught:
        publish_template("t", "ping", "item.html", {"name": "x"}, event_class=JSONIdEvent)
    assert "The string '<li>x</li>\\n' was passed, and a string must be JSON" in str(caught.value)
    assert "StringEvent and StringIdEvent accept any text." in str(caught.value)
    assert stored() == []
    publish_template("t", "ping", "data.json", {"name": "x"}, event_class=JSONIdEvent)
    assert stored() == ['{"name":"x"}']


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("t", "ping", "nowhere.html"), TemplateDoesNotExist),
        (("t", "pong", "item.html"), UnknownAction),
        (("", "ping", "item.html"), ValueError),
        (("t", "ping", "item.html", {"name": "x" * 1000}), EventTooLarge),
    ],
)
def test_an_error_is_raised_at_the_call(
    settings: Any, stored: Stored, arguments: Any, error: type[Exception]
) -> None:
    """No event is published."""
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 1000
    with pytest.raises(error):
        publish_template(*arguments)
    assert stored() == []


@pytest.mark.django_db(transaction=True)
def test_a_template_is_rendered_at_the_call_and_published_at_the_commit(stored: Stored) -> None:
    """A later change of the context does not change the event."""
    context = {"name": "early"}
    with transaction.atomic():
        publish_template("t", "ping", "item.html", context)
        context["name"] = "late"
        publish("t", "ping", "next")
        assert stored() == []
    assert stored() == ["<li>early</li>\n", "next"]


@pytest.mark.django_db(transaction=True)
def test_a_template_is_not_published_after_a_rollback(stored: Stored) -> None:
    with pytest.raises(LookupError), transaction.atomic():
        publish_template("t", "ping", "item.html")
        raise LookupError
    assert stored() == []


def test_a_template_with_a_key_is_published_once(stored: Stored) -> None:
    for name in ("one", "two"):
        publish_template("t", "ping", "item.html", {"name": name}, key="k")
    assert stored() == ["<li>one</li>\n"]


async def test_apublish_template_passes_the_same_arguments(stored: Stored) -> None:
    """A template with a key is published once, and the request and the engine are used."""
    request = RequestFactory().get("/news/")
    for _ in range(2):
        event = await apublish_template("t", "ping", "of.html", request=request, key="k")
    await apublish_template("t", "ping", "both.html", using="second")
    live = await apublish_template(
        "t", "ping", "item.html", {"name": "x"}, event_class=StringEvent
    )
    assert stored() == ["/news/", "second"]
    assert event.id is not None
    assert (type(live), live.value) == (StringEvent, ["<li>x</li>", ""])
    assert inspect.signature(apublish_template) == inspect.signature(publish_template)


async def test_apublish_template_renders_off_the_event_loop(stored: Stored) -> None:
    threads = []

    def note() -> str:
        threads.append(threading.get_ident())
        return "noted"

    await apublish_template("t", "ping", "call.html", {"note": note})
    assert stored() == ["noted"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_publish_template_refuses_to_block_an_event_loop() -> None:
    """The template is not rendered, and the error names the function to call."""
    with pytest.raises(SynchronousOnlyOperation, match=r"await apublish_template\(\.\.\.\)"):
        publish_template("t", "ping", "call.html", {"note": lambda: pytest.fail("rendered")})

"""The console of the admin: its pages, its forms, its permissions, and its log."""

from __future__ import annotations

import datetime
import json
import re
import time
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import DatabaseError, transaction
from django.test import AsyncClient, AsyncRequestFactory, Client
from django.urls import reverse
from django.utils.html import escape

from django_eventsource import console, publish, publish_many, publishing
from django_eventsource.console import find_events, newest_page, policy_of
from django_eventsource.delivery.layer import get_layer
from django_eventsource.events import StringEvent, StringIdEvent
from django_eventsource.history import get_history
from django_eventsource.history.base import READ_BYTES
from django_eventsource.protocol.field_rules import WRITE_DETAILS
from django_eventsource.protocol.tokens import CONTROL_TOKEN, DETAILS_TOKEN
from django_eventsource.reading import read_history
from tests.support.control import close_requests

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("memory_history", "published_at_once"),
]

TOKEN = 'a/b?c=1&d "é" <script>alert(1)</script>'
LINES = "a\nb\r\nc\rd"
"""A token that browsers change in hidden fields and attributes."""
HTML_TOKEN = "a/b?c=1&amp;d &quot;é&quot; &lt;script&gt;alert(1)&lt;/script&gt;"
ALL = ("view_console", "view_tokenpresence", "view_storedevent")
ALL += ("listen_event", "send_event", "close_streams")


class AnyAction(StringIdEvent):
    """Events of every action."""

    ACTIONS = ["*"]


class LiveOnly(StringEvent):
    """Events that are not stored."""


@pytest.fixture
def published_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish in the transaction that is around each of these tests, which never commits."""
    monkeypatch.setattr(publishing, "_in_transaction", lambda using: False)


def url(name: str, **query: str) -> str:
    """Return the URL of a page of the console."""
    return reverse(f"admin:django_eventsource_console_{name}", query=query)


def staff(*permissions: str, **fields: Any) -> User:
    """Return a user of the admin who has only some permissions."""
    user = User.objects.create_user("staff", **{"is_staff": True, **fields})
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    return user


def client_of(*permissions: str) -> Client:
    """Return a client that is logged in with only some permissions."""
    client = Client()
    client.force_login(staff(*permissions))
    return client


def page_of(client: Client, name: str, **query: str) -> str:
    """Return the text of a page."""
    response = client.get(url(name, **query))
    assert response.status_code == 200
    return response.content.decode()


async def get(user: User, name: str, **query: str) -> Any:
    """Get a page through ASGI."""
    client = AsyncClient()
    await client.aforce_login(user)
    return await client.get(url(name, **query))


def log() -> list[tuple[str, str, str]]:
    """Return the entries of the log of the admin: the user, the object and the message."""
    rows = LogEntry.objects.order_by("pk").values_list(
        "user__username", "object_repr", "change_message"
    )
    return list(rows)


def warnings(response: Any) -> list[str]:
    """Return the messages that the next page shows."""
    return [str(one) for one in response.wsgi_request._messages]


def posted(client: Client, action: str, value: str) -> Any:
    """Publish with the form."""
    return client.post(url("token", token=TOKEN), {"action": action, "value": value})


# Who sees what


@pytest.mark.parametrize("name", ["changelist", "token", "details", "close", "tail"])
def test_a_page_needs_staff_with_the_permission(name: str) -> None:
    client = client_of(*ALL[1:])
    address = url(name, token="t")
    post = name == "close"
    for _n in range(2):
        response = client.post(address) if post else client.get(address)
        assert response.status_code == (403 if not _n else 401 if name == "tail" else 302)
        client.logout()


def test_a_user_who_may_only_view_the_console_sees_no_data_and_no_form() -> None:
    publish(TOKEN, "ping", "a value")
    client = client_of("view_console")
    page = page_of(client, "token", token=TOKEN)
    assert f'href="{url("changelist")}">All processes<' in page
    for text in ('id="listeners"', "a value", 'id="tail"', 'name="value"', 'name="user"'):
        assert text not in page
    assert 'id="busiest"' not in page_of(client, "changelist")
    assert posted(client, "ping", "x").status_code == 403
    assert client.post(url("close"), {"token": TOKEN}).status_code == 403
    assert [one.value for one in find_events(TOKEN).events] == ["a value"]
    assert (close_requests(), log()) == ([], [])


@pytest.mark.parametrize(
    ("permission", "text"),
    [
        ("view_tokenpresence", 'id="listeners"'),
        ("view_storedevent", "a value"),
        ("listen_event", 'id="tail"'),
        ("send_event", 'name="value"'),
        ("close_streams", 'name="user"'),
    ],
)
def test_each_part_of_a_page_has_its_permission(permission: str, text: str) -> None:
    publish(TOKEN, "ping", "a value")
    assert text in page_of(client_of("view_console", permission), "token", token=TOKEN)


def test_the_index_of_the_admin_links_to_the_console(admin_client) -> None:
    page = admin_client.get(reverse("admin:index")).content.decode()
    assert f'href="{url("changelist")}"' in page
    assert f"{url('changelist')}add/" not in page
    assert "console" not in Client().get(reverse("admin:login")).content.decode()


@pytest.mark.parametrize("name", ["token", "close"])
def test_a_post_without_a_csrf_token_is_refused(name: str) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(staff(*ALL))
    fields = {"action": "ping", "value": "x", "token": "t"}
    assert client.post(url(name, token="t"), fields).status_code == 403
    assert not find_events("t").events
    assert not close_requests()


# The overview


def test_the_overview_names_the_history_and_the_layer(admin_client, settings) -> None:
    page = page_of(admin_client, "changelist")
    assert "<dd>MemoryHistory</dd>" in page
    assert "<dd>none</dd>" in page
    assert "MemoryHistory belongs to one process" in page
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}
    page = page_of(admin_client, "changelist")
    assert "<dd>FaultySharedLayer</dd>" in page
    assert "data-shared" in page


def test_a_page_through_wsgi_states_that_the_tail_needs_asgi(admin_client) -> None:
    for name in ("changelist", "token"):
        assert "The live tail needs an ASGI server" in page_of(admin_client, name, token="t")


def test_a_page_through_asgi_has_the_tail(admin_user) -> None:
    page = async_to_sync(get)(admin_user, "token", token="t").content.decode()
    assert "ASGI" not in page
    assert ">Listen</button>" in page


@pytest.mark.parametrize("token", ["", "\0", "a" * 256, "\ufffdcontrol"])
def test_an_invalid_token_is_an_error_of_the_form(admin_client, token: str) -> None:
    page = page_of(admin_client, "token", token=token)
    assert "errorlist" in page
    assert 'id="listeners"' not in page


def test_scripts_and_styles_have_the_nonce_of_the_content_security_policy(
    admin_client, settings
) -> None:
    """Django 6.0 and newer set the variable."""
    options = settings.TEMPLATES[0]["OPTIONS"]
    processors = [*options["context_processors"], f"{__name__}.nonce"]
    settings.TEMPLATES = [{**settings.TEMPLATES[0], "OPTIONS": {"context_processors": processors}}]
    page = page_of(admin_client, "changelist")
    for name in ("console.js", "console.css"):
        assert f'eventsource/{name}" nonce="once">' in page


def nonce(request: Any) -> dict[str, str]:
    """Set the variable as Django's context processor does it."""
    return {"csp_nonce": "once"}


def test_the_console_is_in_english_where_the_admin_is_translated(admin_client, settings) -> None:
    """Only some of its words have a translation in Django."""
    settings.LANGUAGE_CODE = "de"
    page = page_of(admin_client, "token", token="t")
    assert "Abmelden" in page
    assert ">Search</button>" in page
    assert ">Close streams</h2>" in page
    assert ">Data</th>" in page


# The details


def test_the_details_are_those_of_the_processes(admin_client) -> None:
    """Only the listeners of the token of the page are sent."""
    details = {"process": "p", "host": "h", "pid": "1", "slow": [1], "busiest": [2]}
    text = json.dumps({**details, "tokens": {TOKEN: [3], "other": [4]}})
    get_history().announce("p", {DETAILS_TOKEN: [text]}, 60)
    answer = admin_client.get(url("details", token=TOKEN)).json()
    assert answer["processes"] == [{**details, "tokens": {TOKEN: [3]}}]
    assert abs(answer["time"] - time.time()) < 60
    assert answer["history"]["seconds"] >= 0
    assert admin_client.get(url("details")).json()["processes"] == [{**details, "tokens": {}}]
    hidden = client_of("view_console").get(url("details", token=TOKEN)).json()
    assert hidden["processes"] == [{**details, "slow": [], "busiest": [], "tokens": {}}]


def test_details_are_requested_only_if_the_page_asks_for_them(admin_client) -> None:
    before = get_history().newest(CONTROL_TOKEN)[0]
    admin_client.get(url("details", token=TOKEN))
    assert get_history().newest(CONTROL_TOKEN)[0] == before
    admin_client.get(url("details", token=TOKEN, request=""))
    (entry,) = get_history().read(CONTROL_TOKEN, before).entries
    assert (entry.draft.action, json.loads(entry.draft.data)) == (WRITE_DETAILS, TOKEN)


def test_details_that_cannot_be_read_are_an_error(admin_client, monkeypatch) -> None:
    refused = admin_client.get(url("details", token="\ufffdcontrol", request=""))
    assert refused.status_code == 400
    assert "not valid UTF-8" in refused.json()["error"]
    fail_with(monkeypatch, "present")
    failed = admin_client.get(url("details"))
    assert failed.status_code == 503
    assert failed.json() == {"error": "The history's store failed: ConnectionError('away')"}


def fail_with(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a method of the history fail."""

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(get_history(), name, fail)
    monkeypatch.setattr(get_history(), "storage_errors", (ConnectionError,))


# The history


def values(page: Any) -> list[str]:
    return [one.value for one in page.events]


def test_a_page_starts_with_the_newest_events(admin_client) -> None:
    publish_many([(TOKEN, "ping", f"value {n}") for n in range(120)])
    response = admin_client.get(url("token", token=TOKEN))
    assert values(response.context["found"]) == [f"value {n}" for n in range(70, 120)]
    assert response.context["found"].cursor in response.content.decode()
    oldest = admin_client.get(response.context["oldest_url"])
    assert values(oldest.context["found"]) == [f"value {n}" for n in range(50)]
    following = admin_client.get(oldest.context["next_url"])
    assert values(following.context["found"]) == [f"value {n}" for n in range(50, 100)]
    last = admin_client.get(following.context["next_url"])
    assert values(last.context["found"]) == [f"value {n}" for n in range(100, 120)]
    assert 'rel="next"' in following.content.decode()
    assert 'rel="next"' not in last.content.decode()


@pytest.mark.parametrize("use_tz", [True, False])
def test_times_are_in_utc_and_their_title_states_it(admin_client, settings, use_tz: bool) -> None:
    settings.USE_TZ = use_tz
    settings.TIME_ZONE = "Asia/Tokyo"
    publish("t", "ping", "x")
    (event,) = find_events("t").events
    page = page_of(admin_client, "token", token="t")
    assert f'<td data-label="Stored (UTC)">{event.time:%Y-%m-%d %H:%M:%S}</td>' in page
    assert event.time.utcoffset() == datetime.timedelta()
    assert '<th scope="col">Stored (UTC)</th>' in page
    assert '<th scope="col">Received (UTC)</th>' in page  # the tail has no other time


def test_values_of_the_history_are_escaped(admin_client) -> None:
    publish(TOKEN, "ping", "<b>bold</b>\n" + "x" * 3000)
    page = page_of(admin_client, "token", token=TOKEN)
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert HTML_TOKEN in page
    assert "<b>bold" not in page
    assert "<script>alert" not in page
    assert "x" * 3000 not in page


def test_a_search_finds_texts_and_actions(admin_client, settings) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.AnyAction"
    publish_many([("t", "paid" if n % 2 else "sent", f"Order {n}") for n in range(30)])
    page = admin_client.get(url("token", token="t", text="ORDER 1", action="paid"))
    assert values(page.context["found"]) == [f"Order {n}" for n in (1, 11, 13, 15, 17, 19)]
    by_id = find_events("t", text=page.context["found"].events[0].id)
    assert values(by_id) == ["Order 1"]
    nothing = page_of(admin_client, "token", token="t", text="nothing")
    assert "No event." in nothing


def test_a_search_keeps_the_line_ends_of_the_token(admin_client) -> None:
    publish(LINES, "ping", "x")
    page = page_of(admin_client, "token", token=LINES)
    (field,) = re.findall(r'name="quoted_token" value="(.*?)"', page)
    found = admin_client.get(url("token", quoted_token=field, text="x"))
    assert found.context["token"] == LINES
    assert values(found.context["found"]) == ["x"]
    assert re.findall(r'<script id="console-token" .*?>(.*?)</script>', page) == [
        json.dumps(LINES)
    ]


def test_a_search_reads_a_bounded_number_of_events_and_continues(
    admin_client, monkeypatch
) -> None:
    monkeypatch.setattr(console, "SEARCH_READS", 2)
    publish_many([("t", "ping", str(n)) for n in range(250)] + [("t", "ping", "found")])
    first = admin_client.get(url("token", token="t", text="found"))
    assert values(first.context["found"]) == []
    assert "continues the search" in first.content.decode()
    second = admin_client.get(first.context["next_url"])
    assert values(second.context["found"]) == []
    third = admin_client.get(second.context["next_url"])
    assert values(third.context["found"]) == ["found"]


def test_a_page_states_that_older_events_were_dropped(admin_client, settings) -> None:
    settings.EVENTSOURCE_HISTORY = {**settings.EVENTSOURCE_HISTORY, "OPTIONS": {"MAX_EVENTS": 2}}
    cursor = publish("t", "ping", "dropped").id
    publish_many([("t", "ping", str(n)) for n in range(3)])
    assert "has dropped older events" in page_of(admin_client, "token", token="t", after=cursor)
    assert "has dropped" not in page_of(admin_client, "token", token="t")


def test_a_page_after_an_unknown_event_starts_with_the_oldest_and_states_it(admin_client) -> None:
    publish("t", "ping", "oldest")
    response = admin_client.get(url("token", token="t", after="zzz"))
    assert values(response.context["found"]) == ["oldest"]
    page = response.content.decode()
    assert "does not contain the event after which" in page
    assert "has dropped" not in page


def test_a_page_ends_with_the_newest_events_if_their_values_are_large(
    admin_client, monkeypatch
) -> None:
    """Each read returns one of them. The tail continues after the page, whatever follows it."""
    publish_many([("t", "ping", f"{n} " + "x" * READ_BYTES) for n in range(60)])
    response = admin_client.get(url("token", token="t"))
    found = response.context["found"]
    assert [value.split()[0] for value in values(found)] == [str(n) for n in range(10, 60)]
    assert f'data-cursor="{found.cursor}"' in response.content.decode()
    assert find_events("t", after=found.cursor).events == []

    def publish_later(*args: Any, **options: Any) -> Any:
        publish("t", "ping", "later")
        return read_history(*args, **options)

    monkeypatch.setattr(console, "read_history", publish_later)
    response = admin_client.get(url("token", token="t"))
    found = response.context["found"]
    assert found.more
    assert f'data-cursor="{found.cursor}"' in response.content.decode()


@pytest.mark.parametrize(
    ("query", "error"),
    [({"after": "~x"}, "after must be a cursor"), ({"action": "x" * 256}, "at most 255")],
    ids=["cursor", "action"],
)
def test_a_search_that_is_not_valid_is_an_error(admin_client, query, error: str) -> None:
    assert error in page_of(admin_client, "token", token="t", **query)


def test_a_history_that_cannot_be_read_is_an_error_of_its_part(admin_client, monkeypatch) -> None:
    fail_with(monkeypatch, "locate")
    page = page_of(admin_client, "token", token="t")
    assert "The history&#x27;s store failed" in page
    assert 'name="value"' in page


def test_the_newest_page_of_a_token_without_events_is_empty() -> None:
    found = find_events("t", after=newest_page("t"))
    assert (values(found), found.more, found.missing) == ([], False, None)


# Publishing


def test_the_form_publishes_and_writes_the_log() -> None:
    client = client_of(*ALL)
    response = posted(client, "ping", "  two\r\nlines")
    assert (response.status_code, response["Location"]) == (302, url("token", token=TOKEN))
    assert values(find_events(TOKEN)) == ["  two\nlines"]
    assert log() == [("staff", f"token {TOKEN!r}", f"Published ping to token {TOKEN!r}.")]
    page = page_of(client, "token", token=TOKEN)
    assert escape(f"Published ping to token {TOKEN!r}.") in page
    index = client.get(reverse("admin:index")).content.decode()
    assert HTML_TOKEN in index  # in the recent actions


def test_the_form_offers_the_actions_of_the_event_class(admin_client, settings) -> None:
    page = page_of(admin_client, "token", token="t")
    assert [f'<option value="{one}">' in page for one in ("ping", "retry", "close")] == [True] * 3
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.AnyAction"
    page = page_of(admin_client, "token", token="t")
    assert "<option" not in page
    assert "An event of the class AnyAction." in page
    assert posted(admin_client, "any thing", "x").status_code == 302


@pytest.mark.parametrize(
    ("event_class", "action", "value", "error"),
    [
        ("StringIdEvent", "other", "x", "not one of the available choices"),
        ("StringIdEvent", "retry", "soon", "must be ASCII digits"),
        ("StringIdEvent", "retry", "1", "EVENTSOURCE_RETRY_RANGE_MS"),
        ("StringIdEvent", "ping", "x" * 101, "EVENTSOURCE_MAX_EVENT_BYTES"),
        ("JSONIdEvent", "ping", "{&", "The value is not JSON"),
    ],
    ids=["action", "retry", "range", "size", "json"],
)
def test_the_form_refuses_what_the_view_refuses(
    settings, event_class: str, action: str, value: str, error: str
) -> None:
    """The text is kept, so that it can be corrected."""
    settings.EVENTSOURCE_EVENT_CLASS = f"django_eventsource.events.{event_class}"
    settings.EVENTSOURCE_MAX_EVENT_BYTES = 100
    response = posted(client_of(*ALL), action, value)
    assert response.status_code == 200
    page = response.content.decode()
    assert error in page
    assert value.replace("&", "&amp;") in page
    assert not find_events(TOKEN).events
    assert log() == []


def test_a_store_that_fails_is_an_error_of_the_form(admin_client, monkeypatch) -> None:
    fail_with(monkeypatch, "append")
    page = posted(admin_client, "ping", "kept").content.decode()
    assert "The history&#x27;s store failed" in page
    assert "kept</textarea>" in page
    assert log() == []


def test_a_layer_that_fails_is_an_error_of_the_form(admin_client, settings) -> None:
    settings.EVENTSOURCE_EVENT_CLASS = f"{__name__}.LiveOnly"
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "tests.support.layers.FaultySharedLayer"}}
    get_layer().failing.add("group_send")
    page = posted(admin_client, "ping", "x").content.decode()
    assert "did not reach the channel layer" in page


# Closing


@pytest.mark.parametrize(
    ("fields", "selection", "what"),
    [
        ({"token": TOKEN}, {"token": TOKEN, "user": None}, f"token {TOKEN!r}"),
        ({"token": "user 7"}, {"token": "user 7", "user": None}, "token 'user 7'"),
        ({"user": "7"}, {"token": None, "user": "7"}, "user '7'"),
        ({"token": "t", "user": "7"}, {"token": "t", "user": "7"}, "token 't' and user '7'"),
    ],
    ids=["token", "token-like-user", "user", "both"],
)
def test_the_form_closes_streams_and_writes_the_log(fields, selection, what: str) -> None:
    response = client_of(*ALL).post(url("close"), fields)
    assert (response.status_code, response["Location"]) == (302, url("changelist"))
    assert close_requests() == [selection]
    done = f"Requested to close the streams of {what}."
    assert log() == [("staff", what, done)]
    assert warnings(response) == [done]


@pytest.mark.parametrize("token", [TOKEN, LINES], ids=["text", "lines"])
def test_the_form_of_a_token_closes_it_and_returns_to_its_page(admin_client, token: str) -> None:
    page = page_of(admin_client, "token", token=token)
    address = url("close", token=token)
    assert f'action="{escape(address)}"' in page
    assert 'name="token"' not in page
    response = admin_client.post(address, {"user": "7"})
    assert response["Location"] == url("token", token=token)
    assert close_requests() == [{"token": token, "user": "7"}]


@pytest.mark.parametrize(
    ("fields", "error"),
    [({}, "Enter a token, a user id, or both."), ({"token": "\ufffdx"}, "not valid UTF-8")],
    ids=["empty", "token"],
)
def test_a_choice_that_is_not_valid_closes_nothing(admin_client, fields, error: str) -> None:
    response = admin_client.post(url("close"), fields)
    assert error in warnings(response)[0]
    assert (close_requests(), log()) == ([], [])


def test_a_close_that_fails_is_shown_and_not_logged(admin_client, monkeypatch) -> None:
    fail_with(monkeypatch, "append")
    response = admin_client.post(url("close"), {"token": "t"})
    assert warnings(response) == ["The history's store failed: ConnectionError('away')"]
    assert log() == []


@pytest.mark.parametrize("name", ["token", "close"])
def test_an_action_that_cannot_be_logged_is_not_done(admin_client, monkeypatch, name: str) -> None:
    def fail(**fields: Any) -> None:
        raise DatabaseError("away")

    monkeypatch.setattr(LogEntry.objects, "create", fail)
    with pytest.raises(DatabaseError):
        admin_client.post(url(name, token="t"), {"action": "ping", "value": "x"})
    assert not find_events("t").events
    assert not close_requests()


@pytest.mark.parametrize("name", ["token", "close"])
def test_a_transaction_that_the_store_breaks_does_not_hide_its_error(
    admin_client, monkeypatch, name: str
) -> None:
    """With ``ATOMIC_REQUESTS`` the whole request is rolled back, with the entry of the log."""

    def fail(entry: LogEntry) -> None:
        raise transaction.TransactionManagementError("broken")

    fail_with(monkeypatch, "append")
    monkeypatch.setattr(LogEntry, "delete", fail)
    fields = {"action": "ping", "value": "x"}
    response = admin_client.post(url(name, token="t"), fields, follow=True)
    assert "The history&#x27;s store failed" in response.content.decode()


def test_the_url_that_closes_supports_post_only(admin_client) -> None:
    assert admin_client.get(url("close")).status_code == 405


# The tail


def test_the_tail_is_a_stream_of_the_token(settings) -> None:
    """The policy and the URLs of the project do not matter."""
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.Policy"
    user = staff("view_console", "listen_event")

    async def listen() -> bytes:
        response = await get(user, "tail", token=TOKEN)
        assert response["Content-Type"] == "text/event-stream"
        stream = response._stream
        chunk = await anext(stream)
        await stream.aclose()
        return chunk

    assert b"id: " in async_to_sync(listen)()


@pytest.mark.parametrize("missing", ["is_staff", "is_active", "view_console", "listen_event"])
def test_only_staff_with_both_permissions_receives_the_tail(missing: str) -> None:
    """The policy is asked again while the stream is open."""
    user = staff(
        *{"view_console", "listen_event"} - {missing},
        is_staff=missing != "is_staff",
        is_active=missing != "is_active",
    )
    assert not allows(admin.site, user)
    # The session of an inactive user is not valid.
    status = 401 if missing == "is_active" else 403
    assert async_to_sync(get)(user, "tail", token="t").status_code == status


def allows(site: admin.AdminSite, user: User) -> bool:
    """Return whether the policy of a site allows a user."""
    request = AsyncRequestFactory().get("/")
    request.user = user
    return async_to_sync(policy_of(site)().can_listen)(request, "t")


def test_the_admin_site_decides_on_the_tail() -> None:
    class Everybody(admin.AdminSite):
        """A site for users who are not staff."""

        def has_permission(self, request: Any) -> bool:
            return request.user.is_active

    user = staff("view_console", "listen_event", is_staff=False)
    assert allows(Everybody(), user)
    assert not allows(admin.site, user)


def test_a_recheck_of_the_tail_asks_the_site_about_the_user_as_it_is_then() -> None:
    user = staff("view_console", "listen_event")

    async def listen() -> list[bool]:
        stream = (await get(user, "tail", token="t"))._stream
        answers = [await stream.recheck()]
        await User.objects.filter(pk=user.pk).aupdate(is_staff=False)
        answers.append(await stream.recheck())
        await stream.aclose()
        return answers

    assert async_to_sync(listen)() == [True, False]


def test_the_tail_needs_a_token_and_publishes_nothing(admin_client) -> None:
    assert admin_client.get(url("tail")).status_code == 400
    assert admin_client.post(url("tail", token="t"), {}).status_code in (401, 403)
    assert not find_events("t").events

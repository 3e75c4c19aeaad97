"""Tests of the URLs."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from django.test import AsyncClient
from django.urls import include, path, resolve, reverse

from django_eventsource import urls
from django_eventsource.views import EventSourceView

urlpatterns = [
    path("<slug:room>/stream/", include("django_eventsource.urls")),
    path("own/<action>/<token>", EventSourceView.as_view(keepalive_seconds=50)),
]

PATHS = [
    ("poll", "42:42:42:42:42:42", "/events/poll/42:42:42:42:42:42"),
    ("ping", "a/b//c", "/events/ping/a/b//c"),
    ("close", "/", "/events/close//"),
    ("ping", "ü?#%2F &", "/events/ping/%C3%BC%3F%23%252F%20&"),
    ("my action", "x", "/events/my%20action/x"),
    ("ping", "a\nb\r", "/events/ping/a%0Ab%0D"),
]


@pytest.fixture
def client(memory_history, settings):
    settings.EVENTSOURCE_POLICY = "django_eventsource.policies.AllowAny"
    return AsyncClient()


def test_the_urls_have_the_namespace_eventsource():
    """The include needs no namespace."""
    assert urls.app_name == "eventsource"
    assert [pattern.name for pattern in urls.urlpatterns] == ["event", None]


@pytest.mark.parametrize(("action", "token", "url"), PATHS, ids=[url for *_, url in PATHS])
def test_an_action_and_any_token_are_reversed_and_resolved(action, token, url):
    kwargs = {"action": action, "token": token}
    assert reverse("eventsource:event", kwargs=kwargs) == url
    match = resolve(f"/events/{action}/{token}")
    assert (match.kwargs, match.view_name) == (kwargs, "eventsource:event")
    assert match.func.view_class is EventSourceView


@pytest.mark.parametrize("token", ["a/b", "/x", "a\nb\n", "%2F", "a?b#c", " ", "a&b=c+d"])
async def test_a_quoted_token_is_unquoted_before_it_is_published(client, memory_history, token):
    response = await client.post(
        f"/events/ping/{quote(token)}", data="42", content_type="text/plain"
    )
    assert response.status_code == 200
    assert memory_history.newest(token)[0] == int(response.json()["id"])


@pytest.mark.parametrize("method", ["get", "head", "post"])
async def test_a_url_without_a_token_is_responded_with_400(client, method):
    action = "ping" if method == "post" else "poll"
    response = await getattr(client, method)(f"/events/{action}/")
    assert response.status_code == 400
    assert method == "head" or response.content.startswith(b"The token is empty")


@pytest.mark.parametrize("url", ["/events/", "/events/poll", "/events//token"])
async def test_urls_without_an_action_and_a_token_are_not_matched(client, url):
    """Django responds with 404 or a redirect."""
    assert (await client.get(url)).status_code in (301, 404)


async def test_the_urls_can_be_included_below_a_prefix_with_parameters(client, settings):
    settings.ROOT_URLCONF = __name__
    for url in ("/blue/stream/ping/42", "/own/ping/42"):
        response = await client.post(url, data="42", content_type="text/plain")
        assert response.status_code == 200
    kwargs = {"room": "blue", "action": "poll", "token": "42"}
    assert reverse("eventsource:event", kwargs=kwargs) == "/blue/stream/poll/42"

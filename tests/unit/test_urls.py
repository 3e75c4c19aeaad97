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


def test_namespace():
    """The URLs are known as `eventsource:event` without a namespace in the include."""
    assert urls.app_name == "eventsource"
    assert [pattern.name for pattern in urls.urlpatterns] == ["event", None]


@pytest.mark.parametrize(("action", "token", "url"), PATHS, ids=[url for *_, url in PATHS])
def test_reverse_and_resolve(action, token, url):
    """An action and any token make a URL, which leads back to them."""
    kwargs = {"action": action, "token": token}
    assert reverse("eventsource:event", kwargs=kwargs) == url
    match = resolve(f"/events/{action}/{token}")
    assert (match.kwargs, match.view_name) == (kwargs, "eventsource:event")
    assert match.func.view_class is EventSourceView


@pytest.mark.parametrize("token", ["a/b", "/x", "a\nb\n", "%2F", "a?b#c", " ", "a&b=c+d"])
async def test_token_reaches_the_view(client, memory_history, token):
    """A quoted token reaches the history as it was before it was quoted."""
    response = await client.post(
        f"/events/ping/{quote(token)}", data="42", content_type="text/plain"
    )
    assert response.status_code == 200
    assert memory_history.newest(token)[0] == int(response.json()["id"])


@pytest.mark.parametrize("method", ["get", "head", "post"])
async def test_empty_token(client, method):
    """A URL that ends before its token is answered with what is missing."""
    action = "ping" if method == "post" else "poll"
    response = await getattr(client, method)(f"/events/{action}/")
    assert response.status_code == 400
    assert method == "head" or response.content.startswith(b"The token is empty")


@pytest.mark.parametrize("url", ["/events/", "/events/poll", "/events//token"])
async def test_other_urls_are_not_ours(client, url):
    """What has no action and token at all is Django's own 404 or redirect."""
    assert (await client.get(url)).status_code in (301, 404)


async def test_urls_may_be_mounted_anywhere(client, settings):
    """The prefix may have parameters of its own, which the view leaves alone."""
    settings.ROOT_URLCONF = __name__
    for url in ("/blue/stream/ping/42", "/own/ping/42"):
        response = await client.post(url, data="42", content_type="text/plain")
        assert response.status_code == 200
    kwargs = {"room": "blue", "action": "poll", "token": "42"}
    assert reverse("eventsource:event", kwargs=kwargs) == "/blue/stream/poll/42"

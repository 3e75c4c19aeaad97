"""Tests that run the recipes of the how-to pages with the packages that they are about."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import django
import pytest
import yaml
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import AnonymousUser, User
from django.core.asgi import get_asgi_application
from django.test import AsyncClient, Client, RequestFactory
from django.urls import path
from rest_framework.test import APIRequestFactory, force_authenticate

from django_eventsource import apublish
from django_eventsource.asgi import Handover
from django_eventsource.conf import PROPERTIES, conf
from django_eventsource.grants import make_grant, read_grant
from django_eventsource.history import History
from django_eventsource.monitoring.metrics import render
from django_eventsource.testing import capture_events, listen
from tests.support.pages import PAGES, ROOT, block_of, blocks, tables

OWN = "mysite", "news"
"""The packages of the projects in which the recipes stand."""


def run(source: str, name: str = "recipe", **names: Any) -> ModuleType:
    """Execute a block as a module, in which some names are defined before."""
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), vars(module))
    return module


@pytest.fixture(autouse=True)
def own_modules() -> Iterator[None]:
    """Remove the modules of the recipes."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in {*OWN, "recipe"}]:
        del sys.modules[name]


# Settings


SETTINGS_BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
    if block.lstrip().startswith(("EVENTSOURCE_", "CHANNEL_LAYERS"))
]


@pytest.mark.parametrize("block", SETTINGS_BLOCKS)
def test_the_settings_of_every_example_are_valid(
    settings: Any, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some name a class of the examples."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs/examples")])
    run(block_of("docs/howto/custom-policy.rst", "mysite/policies.py"), "mysite.policies")
    names = vars(run(block, SECRET_KEY="secret", INSTALLED_APPS=[]))
    for name in [name for name in names if name.startswith(("EVENTSOURCE_", "CHANNEL_"))]:
        setattr(settings, name, names[name])
    for name in PROPERTIES:
        getattr(conf, name)


# Numbers


@pytest.mark.django_db(transaction=True)
def test_the_view_of_listeners_names_the_users_that_listen(
    memory_history: History,
) -> None:
    view = run(block_of("docs/howto/presence.rst", "news/views.py")).present
    ada, grace = map(User.objects.create_user, ["ada", "grace"])
    memory_history.announce("process", {"news": [str(grace.pk), "", str(ada.pk)]}, 60)
    request = RequestFactory().get("/present/")
    request.user = ada
    assert json.loads(view(request).content) == {"streams": 3, "users": ["ada", "grace"]}


def test_the_table_of_metrics_is_complete() -> None:
    (table,) = tables("docs/howto/monitoring.rst")
    listed = {name for row in table[1:] for name in re.findall(r"eventsource_\w+", row[0])}
    page = render()[0].decode()
    assert listed == set(re.findall(r"^# TYPE (eventsource_\w+)", page, re.M))


def test_prometheus_scrapes_the_url_of_the_page_with_the_token_of_the_settings() -> None:
    (config,) = blocks("docs/howto/monitoring.rst", "yaml")
    (job,) = yaml.safe_load(config)["scrape_configs"]
    block = block_of("docs/howto/monitoring.rst", "mysite/urls.py")
    (url,) = run(block, urlpatterns=[]).urlpatterns
    assert job["metrics_path"] == f"/{url.pattern}"
    assert list(job["authorization"]) == ["credentials"]


# Grants


def test_the_grants_of_the_example_allow_what_the_page_says() -> None:
    source = blocks("docs/howto/authorize.rst", "python")[0]
    listen, send, close = map(read_grant, run(source).grants_for("news"))
    assert (listen.listen, listen.send) == (True, False)
    assert (send.listen, send.send, send.actions) == (False, True, None)
    assert close.actions == ("close",)


def test_the_bound_grants_of_the_example_are_for_a_session_and_a_user() -> None:
    source = blocks("docs/howto/authorize.rst", "python")[1]
    request = RequestFactory().get("/")
    request.session = SimpleNamespace(session_key="key")  # type: ignore[assignment]
    request.user = User(pk=7)
    session, user = map(read_grant, run(source).bound_grants(request, "news"))
    assert (bool(session.session), session.user) == (True, "")
    assert (user.session, user.user) == ("", "7")


def test_the_view_that_renews_a_grant_returns_a_url_with_a_bound_grant() -> None:
    """It redirects a client that is not logged in."""
    view = run(block_of("docs/howto/renew-a-grant.rst", "news/views.py")).stream_url
    request = RequestFactory().get("/stream-url/")
    request.session = SimpleNamespace(session_key="key")  # type: ignore[assignment]
    request.user = AnonymousUser()
    assert view(request).status_code == 302
    request.user = User(pk=7)
    path, _, grant = json.loads(view(request).content)["url"].partition("?grant=")
    assert path == "/events/poll/news"
    assert read_grant(grant.replace("%3A", ":")).session


def test_a_grant_may_name_several_tokens() -> None:
    grant = run(blocks("docs/howto/several-tokens.rst", "python")[0]).grant
    assert read_grant(grant).tokens == ("news", "weather")


# Views


async def test_the_stream_of_the_example_begins_with_a_state(
    settings: Any, memory_history: History
) -> None:
    """Its URL is that of the page."""
    page = "docs/howto/initial-state.rst"
    run(block_of(page, "news/views.py"), "news.views")
    run(block_of(page, "mysite/urls.py"), "mysite.urls", path=path, urlpatterns=[])
    settings.ROOT_URLCONF = "mysite.urls"
    grant = make_grant("paris", listen=True)
    response = await AsyncClient().get("/weather/poll/paris", {"grant": grant})
    assert b"data: the state of paris\n" in await anext(aiter(response))
    response.close()


# Frameworks


def test_the_rest_framework_view_returns_a_grant_and_publishes(memory_history: History) -> None:
    module = run(block_of("docs/howto/rest-frameworks.rst", "news/api.py"), "news.api")
    view = module.NewsView.as_view()
    request = APIRequestFactory().post("/news", {"text": "Hello"}, format="json")
    assert view(request).status_code == 403
    force_authenticate(request, User(pk=7))
    with capture_events() as events:
        assert view(request).status_code == 201
    assert events == [("news", "ping", {"text": "Hello"})]
    request = APIRequestFactory().get("/news")
    force_authenticate(request, User(pk=7))
    assert read_grant(view(request).data["grant"]).tokens == ("news",)


@pytest.mark.django_db(transaction=True)
def test_the_ninja_operation_publishes(settings: Any, memory_history: History) -> None:
    module = run(block_of("docs/howto/rest-frameworks.rst", "news/ninja_api.py"), "news.ninja_api")
    module.urlpatterns = [path("api/", module.api.urls)]  # type: ignore[attr-defined]
    settings.ROOT_URLCONF = "news.ninja_api"
    client = Client()
    post = {"path": "/api/news", "data": {"text": "Hello"}, "content_type": "application/json"}
    assert client.post(**post).status_code == 401
    client.force_login(User.objects.create_user("ada"))
    with capture_events() as events:
        assert client.post(**post).status_code == 200
    assert events == [("news", "ping", {"text": "Hello"})]


PROGRESS = [("report:7", "ping", text) for text in ("0", "50", "100")] + [
    ("report:7", "close", "")
]


def test_the_celery_task_publishes_its_progress(settings: Any, memory_history: History) -> None:
    """It runs in the page's Celery application, with the broker of the page's settings."""
    page = "docs/howto/task-queues.rst"
    broker = run(block_of(page, "mysite/settings.py")).CELERY_BROKER_URL
    settings.CELERY_BROKER_URL = broker
    app = run(block_of(page, "mysite/celery.py"), "mysite.celery").app
    module = run(block_of(page, "news/tasks.py"), "news.tasks")
    with capture_events() as events:
        module.render_report.apply(args=[7], throw=True)
    assert module.render_report.app is app
    assert app.conf.broker_url == broker
    assert events == PROGRESS


@pytest.mark.skipif(django.VERSION < (6,), reason="django.tasks is new in Django 6.0")
@pytest.mark.django_db(transaction=True)
def test_the_task_of_django_publishes_its_progress(memory_history: History) -> None:
    source = block_of("docs/howto/task-queues.rst", "news/background.py")
    with capture_events() as events:
        run(source, "news.background").render_report.enqueue(7)
    assert events == PROGRESS


# Other origins


async def test_a_page_of_another_origin_may_listen_and_reconnect(
    settings: Any, memory_history: History
) -> None:
    """The preflight allows the header that a client sends when it reconnects."""
    names = vars(
        run(
            block_of("docs/howto/cors.rst", "mysite/settings.py"),
            INSTALLED_APPS=settings.INSTALLED_APPS,
            MIDDLEWARE=settings.MIDDLEWARE,
        )
    )
    for name in ("MIDDLEWARE", "CORS_ALLOWED_ORIGINS", "CORS_ALLOW_HEADERS"):
        setattr(settings, name, names[name])
    client, url = AsyncClient(), "/events/poll/news"
    origin = {"Origin": "https://app.example.com"}
    preflight = await client.options(
        url, headers={**origin, "Access-Control-Request-Method": "GET"}
    )
    assert "last-event-id" in preflight["Access-Control-Allow-Headers"]
    options = {"grant": make_grant("news", listen=True), "headers": origin}
    application = Handover(get_asgi_application())  # with the middleware of the example
    async with listen("news", **options, application=application) as stream:
        assert stream.status == 200
        assert stream.headers["access-control-allow-origin"] == "https://app.example.com"


# Channels


@pytest.mark.django_db(transaction=True)
async def test_the_protocol_router_serves_web_sockets_and_streams(memory_history: History) -> None:
    source = block_of("docs/howto/channels-routing.rst", "mysite/asgi.py")
    application = run(source, "mysite.asgi").application
    socket = WebsocketCommunicator(application, "/echo/")
    await socket.connect()
    await socket.send_to("Hello")
    assert await socket.receive_from() == "Hello"
    await socket.disconnect()
    grant = make_grant("news", listen=True)
    async with listen("news", grant=grant, application=application) as stream:
        await apublish("news", "ping", "Hello")
        assert (await stream.next("ping")).data == "Hello"

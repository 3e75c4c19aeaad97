"""Snapshots of requests, for rechecks."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf.urls.i18n import i18n_patterns
from django.contrib.auth import alogin, login
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.contrib.sessions.backends.db import SessionStore
from django.http import HttpRequest
from django.test import AsyncRequestFactory
from django.urls import include, path, resolve
from django.utils import translation
from django.utils.functional import SimpleLazyObject

from django_eventsource.access.addresses import address_of
from django_eventsource.policies import credentials_of, session_user
from django_eventsource.streaming.request_snapshot import Snapshot
from django_eventsource.streaming.response import Slot

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    *i18n_patterns(path("listen/<token>", lambda request, token: None, name="listen")),  # type: ignore[arg-type, return-value]
]


def snapshot_of(request: Any) -> Snapshot:
    return async_to_sync(Snapshot.of)(request)


def restore(snapshot: Snapshot, opened: float = 1.0, basic_user: Any = None) -> Any:
    return async_to_sync(snapshot.restore)(opened, basic_user)


def again(request: Any, opened: float = 1.0) -> Any:
    return restore(snapshot_of(request), opened)


def made(path: str = "/", **options: Any) -> Any:
    """Return an anonymous request, as Django's middleware makes it."""
    request: Any = AsyncRequestFactory().get(path, **options)
    request.session = SessionStore()
    AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
    return request


def logged_in(user: User, path: str = "/") -> Any:
    """Return a request with a user, as Django's middleware makes it."""
    request: Any = AsyncRequestFactory().get(path)
    request.session = SessionStore()
    request.session["_auth_user_id"] = str(user.pk)
    request.session["_auth_user_backend"] = "django.contrib.auth.backends.ModelBackend"
    request.session["_auth_user_hash"] = user.get_session_auth_hash()
    request.session.save()
    AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
    return request


def user_of(request: HttpRequest) -> Any:
    return async_to_sync(session_user)(request)


@pytest.mark.django_db
def test_the_user_of_a_recheck_is_loaded_again() -> None:
    """An inactive or logged-out user is not returned."""
    user = User.objects.create_user("ada")
    request = logged_in(user)
    assert user_of(request) == user
    assert request.user == user
    snapshot = snapshot_of(request)
    User.objects.update(first_name="Ada")
    opened = time.time() - 100
    restored: Any = restore(snapshot, opened)
    assert credentials_of(restored).opened == opened
    assert user_of(restored).first_name == restored.user.first_name == "Ada"
    User.objects.update(is_active=False)
    assert user_of(restored) == user, "it is not asked for at every look"
    assert user_of(restore(snapshot, opened)) is None
    User.objects.update(is_active=True)
    assert user_of(restore(snapshot, opened)) == user
    request.session.delete()
    restored = restore(snapshot, opened)
    assert user_of(restored) is None
    assert restored.user == AnonymousUser()


@pytest.mark.django_db
def test_a_request_without_auth_middleware_is_restored_without_a_user() -> None:
    request: Any = AsyncRequestFactory().get("/")
    restored: Any = again(request, 5.0)
    assert credentials_of(restored).opened == 5.0
    assert not hasattr(restored, "user")
    assert not hasattr(restored, "session")
    request.session = SessionStore("a-session-key")
    restored = again(request, 6.0)
    assert not hasattr(restored, "user")
    assert restored.session is not request.session
    assert restored.session.session_key == "a-session-key"


def test_an_empty_session_is_restored() -> None:
    """Newer versions of Django treat an empty session as false."""
    request: Any = AsyncRequestFactory().get("/")
    request.session = SessionStore()
    snapshot = snapshot_of(request)
    assert snapshot._session == (SessionStore, None), "it is not held itself"
    restored = restore(snapshot)
    assert type(restored.session) is SessionStore
    assert restored.session.session_key is None


def test_a_restored_request_has_the_scope_and_the_changes_of_middleware() -> None:
    request: Any = AsyncRequestFactory().get(
        "/events/poll/t?token=u&grant=g",
        headers={"Authorization": "Bearer x", "Accept-Encoding": "gzip"},
    )
    request.META["REMOTE_ADDR"] = "192.0.2.1"
    request.META["HTTP_ACCEPT_ENCODING"] = "identity"
    request.tenant = "north"
    request.path_info = "/poll/t"
    request.urlconf = "django_eventsource.urls"
    assert request.GET["grant"] == "g"
    restored: Any = again(request, 1.0)
    assert restored is not request
    assert restored.headers["Authorization"] == "Bearer x"
    assert restored.GET.getlist("token") == ["u"]
    assert restored.get_full_path() == request.get_full_path()
    assert address_of(restored) == "192.0.2.1"
    assert (restored.tenant, restored.path_info) == ("north", "/poll/t")
    assert restored.resolver_match.kwargs == {"action": "poll", "token": "t"}
    assert restored.META["HTTP_ACCEPT_ENCODING"] == "identity"


def test_a_path_without_a_url_has_no_resolver_match() -> None:
    restored = again(AsyncRequestFactory().get("/nowhere"), 1.0)
    assert restored.resolver_match is None


def test_a_snapshot_keeps_neither_the_request_nor_its_stream() -> None:
    request: Any = AsyncRequestFactory().get("/?a=b")
    server: dict[str, Any] = request.scope
    slot = Slot(server)
    request.scope = {**server, Slot.KEY: slot}
    request.session = SessionStore("a-session-key")
    AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
    request.META["CSRF_COOKIE"] = "secret"
    assert request.GET
    assert not request.headers.get("x")
    snapshot = snapshot_of(request)
    assert snapshot._scope is server
    assert (snapshot._attributes, snapshot._meta) == (None, None)
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None


# Changes of other middleware


def test_a_header_that_middleware_removed_stays_removed() -> None:
    request = made(headers={"X-Forwarded-User": "root", "X-Other": "1"})
    del request.META["HTTP_X_FORWARDED_USER"]
    restored = again(request)
    assert "HTTP_X_FORWARDED_USER" not in restored.META
    assert "X-Forwarded-User" not in restored.headers
    assert restored.headers["X-Other"] == "1"


def test_changed_queries_and_cookies_are_kept() -> None:
    """Unchanged ones are parsed again."""
    request = made("/?x=1&y=2", headers={"Cookie": "c=1"})
    request.GET = request.GET.copy()
    request.GET["x"] = "changed"
    request.COOKIES["c"] = "decoded"
    restored = again(request)
    assert restored.GET.dict() == {"x": "changed", "y": "2"}
    assert restored.COOKIES["c"] == "decoded"
    request = made("/?x=1", headers={"Cookie": "c=1"})
    assert request.GET
    assert request.COOKIES
    snapshot = snapshot_of(request)
    assert snapshot._attributes is None, "what has not changed is read again"
    restored = restore(snapshot)
    assert (restored.GET, restored.COOKIES) == (request.GET, request.COOKIES)


@pytest.mark.parametrize("language", ["en", "de"])
def test_the_url_is_resolved_in_the_language_of_the_request(settings, language: str) -> None:
    settings.ROOT_URLCONF = __name__
    request = made(f"/{language}/listen/abc")
    request.LANGUAGE_CODE = language
    with translation.override(language):
        request.resolver_match = resolve(request.path_info)
    assert again(request).resolver_match.kwargs == {"token": "abc"}


def test_attributes_that_the_policy_sets_are_not_kept() -> None:
    request = made()
    snapshot = snapshot_of(request)
    request.rights = {"t"}
    assert not hasattr(restore(snapshot), "rights")


def test_the_user_of_http_basic_is_kept() -> None:
    request = made()
    snapshot = snapshot_of(request)
    assert credentials_of(restore(snapshot)).user is None
    ada = User(username="ada")
    assert credentials_of(restore(snapshot, basic_user=ada)).user is ada


# Sessions of other kinds


def test_a_session_without_a_key_is_kept_itself() -> None:
    request: Any = AsyncRequestFactory().get("/")
    request.session = {"a": 1}
    assert again(request).session is request.session


@pytest.mark.django_db
def test_a_lazy_session_is_loaded_by_its_key() -> None:
    real = SessionStore()
    real["a"] = 1
    real.save()
    request = made()
    request.session = SimpleLazyObject(lambda: real)
    restored = again(request)
    assert type(restored.session) is SessionStore
    assert restored.session["a"] == 1


@pytest.mark.django_db
def test_a_session_that_began_in_the_request_is_loaded_by_its_later_key() -> None:
    request = made()
    request.session["guest"] = 1
    snapshot = snapshot_of(request)
    request.session.save()
    assert restore(snapshot).session["guest"] == 1
    request.session.delete()
    assert "guest" not in restore(snapshot).session


# Users of custom middleware


def bring(request: Any, user: Any, how: str) -> None:
    """Set a user, as middleware does that finds users without a session."""

    async def auser() -> Any:
        return user

    if how != "auser":
        request.user = user
    if how != "user":
        request.auser = auser


async def may_listen(request: Any, how: str) -> bool:
    """Return what a policy returns for the user."""
    user = request.user if how == "user" else await request.auser()
    return await user.ahas_perm("django_eventsource.listen_event")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["user", "auser", "both"])
async def test_a_user_of_custom_middleware_is_loaded_again(how: str) -> None:
    """Its permissions are those at the time of the recheck."""
    user = await User.objects.acreate(username="ada")
    permission = await Permission.objects.aget(codename="listen_event")
    await user.user_permissions.aadd(permission)
    request = made()
    bring(request, user, how)
    snapshot = await Snapshot.of(request)
    assert await may_listen(request, how)
    assert await may_listen(await snapshot.restore(1.0), how)
    await user.user_permissions.aclear()
    assert not await may_listen(await snapshot.restore(1.0), how)
    await user.user_permissions.aadd(permission)
    assert await may_listen(await snapshot.restore(1.0), how)
    await User.objects.aupdate(is_active=False)
    restored: Any = await snapshot.restore(1.0)
    assert (restored.user if how == "user" else await restored.auser()) == AnonymousUser()
    await user.adelete()
    assert not await may_listen(await snapshot.restore(1.0), how)
    assert (await session_user(restored)) is None


@pytest.mark.parametrize("user", [None, AnonymousUser(), "a device", User(username="unsaved")])
async def test_a_user_of_custom_middleware_without_a_table_is_kept_itself(user: Any) -> None:
    request = made()
    bring(request, user, "both")
    restored: Any = await (await Snapshot.of(request)).restore(1.0)
    assert restored.user is user
    assert await restored.auser() is user


@pytest.mark.django_db
def test_a_user_of_custom_middleware_needs_no_session() -> None:
    user = User.objects.create(username="ada")
    request: Any = AsyncRequestFactory().get("/")
    request.user = user
    restored = again(request)
    assert restored.user == user
    assert restored.user is not user
    assert not hasattr(restored, "auser")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", [login, alogin])
async def test_a_user_who_logs_in_during_the_request_is_the_user_of_the_session(
    how: Callable[..., Any],
) -> None:
    user = await User.objects.acreate(username="ada")
    request = made()
    backend = "django.contrib.auth.backends.ModelBackend"
    if how is alogin:
        await alogin(request, user, backend=backend)
    else:
        await sync_to_async(login)(request, user, backend=backend)
    snapshot = await Snapshot.of(request)
    await request.session.asave()
    assert await (await snapshot.restore(1.0)).auser() == user  # type: ignore[attr-defined]
    await request.session.adelete()
    restored: Any = await snapshot.restore(1.0)
    assert await restored.auser() == AnonymousUser()
    assert await sync_to_async(lambda: restored.user.is_authenticated)() is False


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["user", "both"])
async def test_a_user_that_replaces_the_session_user_is_restored(how: str) -> None:
    """An administrator views a site as another user, for example."""
    admin = await User.objects.acreate(username="admin")
    ada = await User.objects.acreate(username="ada")
    request = made()
    await alogin(request, admin, backend="django.contrib.auth.backends.ModelBackend")
    await request.session.asave()
    bring(request, ada, how)
    restored: Any = await (await Snapshot.of(request)).restore(1.0)
    assert restored.user == ada
    assert await restored.auser() == (admin if how == "user" else ada)

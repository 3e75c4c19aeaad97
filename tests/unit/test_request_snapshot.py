"""Snapshots: the request of an open stream, to be looked at with the rights of later."""

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

from django_eventsource.addresses import address_of
from django_eventsource.policies import credentials_of, session_user
from django_eventsource.responses import Slot
from django_eventsource.snapshots import Snapshot

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    *i18n_patterns(path("listen/<token>", lambda request, token: None, name="listen")),  # type: ignore[arg-type, return-value]
]


def snapshot_of(request: Any) -> Snapshot:
    return async_to_sync(Snapshot.of)(request)


def restore(snapshot: Snapshot, opened: float = 1.0) -> Any:
    return async_to_sync(snapshot.restore)(opened)


def again(request: Any, opened: float = 1.0) -> Any:
    return restore(snapshot_of(request), opened)


def made(path: str = "/", **options: Any) -> Any:
    """A request of nobody, as Django's middleware makes it."""
    request: Any = AsyncRequestFactory().get(path, **options)
    request.session = SessionStore()
    AuthenticationMiddleware(lambda request: None).process_request(request)  # type: ignore[arg-type]
    return request


def logged_in(user: User, path: str = "/") -> Any:
    """A request as the middleware makes it."""
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
def test_the_user_of_later() -> None:
    """Who is no longer active, or has logged out, is seen as that."""
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
def test_a_request_without_users() -> None:
    """Without the middleware there is nobody to look up."""
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


def test_a_session_that_is_empty() -> None:
    """It is one all the same, though newer Djangos hold it for false."""
    request: Any = AsyncRequestFactory().get("/")
    request.session = SessionStore()
    snapshot = snapshot_of(request)
    assert snapshot._session == (SessionStore, None), "it is not held itself"
    restored = restore(snapshot)
    assert type(restored.session) is SessionStore
    assert restored.session.session_key is None


def test_the_request_of_later() -> None:
    """It has what the server said, and what middleware made of it."""
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


def test_a_path_that_no_url_has() -> None:
    """As where a view is called by hand."""
    restored = again(AsyncRequestFactory().get("/nowhere"), 1.0)
    assert restored.resolver_match is None


def test_a_snapshot_keeps_little() -> None:
    """Neither the request, nor what Django made of it, nor the stream that it led to."""
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


# What other middleware has made of it


def test_meta_that_was_removed() -> None:
    """A header that no client may send does not come back."""
    request = made(headers={"X-Forwarded-User": "root", "X-Other": "1"})
    del request.META["HTTP_X_FORWARDED_USER"]
    restored = again(request)
    assert "HTTP_X_FORWARDED_USER" not in restored.META
    assert "X-Forwarded-User" not in restored.headers
    assert restored.headers["X-Other"] == "1"


def test_a_query_and_cookies_that_were_changed() -> None:
    """They are what the policy saw."""
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
def test_urls_of_a_language(settings, language: str) -> None:
    """They are resolved in the language that the request was in."""
    settings.ROOT_URLCONF = __name__
    request = made(f"/{language}/listen/abc")
    request.LANGUAGE_CODE = language
    with translation.override(language):
        request.resolver_match = resolve(request.path_info)
    assert again(request).resolver_match.kwargs == {"token": "abc"}


def test_what_a_policy_has_noted_is_forgotten() -> None:
    """What is taken before it is asked does not hold it."""
    request = made()
    snapshot = snapshot_of(request)
    request.rights = {"t"}
    assert not hasattr(restore(snapshot), "rights")


def test_who_gave_a_password() -> None:
    """That was checked; who it was is remembered."""
    request = made()
    snapshot = snapshot_of(request)
    assert credentials_of(restore(snapshot)).user is None
    ada = User(username="ada")
    credentials_of(request).user = ada
    snapshot.remember(request)
    assert credentials_of(restore(snapshot)).user is ada


# Sessions of other kinds


def test_a_session_of_another_kind() -> None:
    """What has no key is kept as it is."""
    request: Any = AsyncRequestFactory().get("/")
    request.session = {"a": 1}
    assert again(request).session is request.session


@pytest.mark.django_db
def test_a_lazy_session() -> None:
    """It is looked up by its key, as any other."""
    real = SessionStore()
    real["a"] = 1
    real.save()
    request = made()
    request.session = SimpleLazyObject(lambda: real)
    restored = again(request)
    assert type(restored.session) is SessionStore
    assert restored.session["a"] == 1


@pytest.mark.django_db
def test_a_session_that_began_in_this_request() -> None:
    """It gets its key with the response."""
    request = made()
    request.session["guest"] = 1
    snapshot = snapshot_of(request)
    request.session.save()
    assert restore(snapshot).session["guest"] == 1
    request.session.delete()
    assert "guest" not in restore(snapshot).session


# Users whom other middleware brought


def bring(request: Any, user: Any, how: str) -> None:
    """What middleware does that knows users by something else than a session."""

    async def auser() -> Any:
        return user

    if how != "auser":
        request.user = user
    if how != "user":
        request.auser = auser


async def may_listen(request: Any, how: str) -> bool:
    """What a policy does with it."""
    user = request.user if how == "user" else await request.auser()
    return await user.ahas_perm("django_eventsource.listen_event")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["user", "auser", "both"])
async def test_a_user_whom_other_middleware_brought(how: str) -> None:
    """It is looked up again: its rights are those of then."""
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
async def test_a_user_who_is_in_no_table(user: Any) -> None:
    """It stays what it was, whatever the session says."""
    request = made()
    bring(request, user, "both")
    restored: Any = await (await Snapshot.of(request)).restore(1.0)
    assert restored.user is user
    assert await restored.auser() is user


@pytest.mark.django_db
def test_a_user_without_a_session() -> None:
    """Where Django's middleware is not there."""
    user = User.objects.create(username="ada")
    request: Any = AsyncRequestFactory().get("/")
    request.user = user
    restored = again(request)
    assert restored.user == user
    assert restored.user is not user
    assert not hasattr(restored, "auser")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", [login, alogin])
async def test_who_logs_in_with_this_request(how: Callable[..., Any]) -> None:
    """As with a certificate: it is the session's user from then on."""
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
async def test_a_user_in_place_of_the_sessions(how: str) -> None:
    """As where somebody who may looks at a site with another one's eyes."""
    admin = await User.objects.acreate(username="admin")
    ada = await User.objects.acreate(username="ada")
    request = made()
    await alogin(request, admin, backend="django.contrib.auth.backends.ModelBackend")
    await request.session.asave()
    bring(request, ada, how)
    restored: Any = await (await Snapshot.of(request)).restore(1.0)
    assert restored.user == ada
    assert await restored.auser() == (admin if how == "user" else ada)

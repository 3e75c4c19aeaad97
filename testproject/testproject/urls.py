"""The demo site's URLs."""

from django.contrib import admin
from django.urls import include, path

from .examples import (
    answer,
    chat,
    close,
    cursor,
    fragments,
    history,
    live,
    orders,
    presence,
    progress,
    room,
    transactions,
)
from .views import index

urlpatterns = [
    path("", index, name="index"),
    path("live/", live.page, name="live"),
    path("chat/", chat.page, name="chat"),
    path("cursor/", cursor.page, name="cursor"),
    path("transactions/", transactions.page, name="transactions"),
    path("presence/", presence.page, name="presence"),
    path("presence/count/", presence.count, name="presence-count"),
    path("close/", close.page, name="close"),
    path("history/", history.page, name="history"),
    path("fragments/", fragments.page, name="fragments"),
    path("progress/", progress.page, name="progress"),
    path("orders/", orders.page, name="orders"),
    path("room/", room.page, name="room"),
    path("room/people/", room.people, name="room-people"),
    path("room/<action>/<token>", room.stream, name="room-stream"),
    path("answer/", answer.page, name="answer"),
    path("admin/", admin.site.urls),
    path("events/", include("django_eventsource.urls")),
]

"""The URLs: ``<action>/<token>``. Include them where you like."""

from django.urls import path

from .views import EventSourceView

app_name = "eventsource"

view = EventSourceView.as_view()

urlpatterns = [
    path("<str:action>/<path:token>", view, name="event"),
    # An empty token deserves its own answer.
    path("<str:action>/", view),
]

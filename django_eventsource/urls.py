"""The URLs: ``<action>/<token>``. Include them where you like."""

from django.urls import path, register_converter

from .views import EventSourceView

app_name = "eventsource"


class TokenConverter:
    """Any text at all: slashes and line ends too."""

    regex = "(?s:.+)"

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(TokenConverter, "eventsource_token")

view = EventSourceView.as_view()

urlpatterns = [
    path("<str:action>/<eventsource_token:token>", view, name="event"),
    # An empty token deserves its own answer.
    path("<str:action>/", view),
]

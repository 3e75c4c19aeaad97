"""The URLs ``<action>/<token>``. Include this module in the URLs of the project."""

from django.urls import path, register_converter

from .views import EventSourceView

__all__ = ["app_name", "urlpatterns"]

app_name = "eventsource"


class _TokenConverter:
    """Matches any text, with slashes and line ends."""

    regex = "(?s:.+)"

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(_TokenConverter, "eventsource_token")

_view = EventSourceView.as_view()

urlpatterns = [
    path("<str:action>/<eventsource_token:token>", _view, name="event"),
    # Without this pattern the response to an empty token would be 404, not 400.
    path("<str:action>/", _view),
]

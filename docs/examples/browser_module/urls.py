"""The page, which also publishes, the login, the view that renews grants, and the URLs."""

from django.contrib.auth import get_user_model, login, logout
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import include, path

from django_eventsource import publish, read_history
from django_eventsource.policies import Policy, session_user
from django_eventsource.views import RenewGrantView

CSP = "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src data:"
NEWS = "news"


class Members(Policy):
    """Every user who is logged in may listen to the news."""

    async def can_listen(self, request: HttpRequest, token: str) -> bool:
        """Return whether the token is that of the news, and a user is logged in."""
        return token == NEWS and await session_user(request) is not None


@login_required
def news(request: HttpRequest) -> HttpResponse:
    """Show the page with the stored events, and publish the text of its form."""
    if request.method == "POST":
        publish(NEWS, "ping", request.POST["text"])
        return HttpResponse(status=204)
    history = read_history(NEWS, limit=500, action="ping")
    response = render(request, "browser_module/page.html", {"history": history})
    response["Content-Security-Policy"] = CSP
    return response


def log_in(request: HttpRequest) -> HttpResponse:
    """Log the user ``reader`` in, without a password."""
    reader, _ = get_user_model().objects.get_or_create(username="reader")
    login(request, reader, "django.contrib.auth.backends.ModelBackend")
    return redirect("news")


def log_out(request: HttpRequest) -> HttpResponse:
    """End the session."""
    logout(request)
    return HttpResponse("You are logged out.")


urlpatterns = [
    path("", news, name="news"),
    path("login/", log_in, name="login"),
    path("logout/", log_out, name="logout"),
    path("renew/<path:token>", RenewGrantView.as_view(policy=Members), name="renew"),
    path("events/", include("django_eventsource.urls")),
]

"""The URLs of a site that is monitored."""

from django.urls import include, path

from django_eventsource.monitoring import views

urlpatterns = [
    path("events/", include("django_eventsource.urls")),
    path("-/metrics", views.metrics),
    path("-/ready", views.ready),
    path("-/ready-without-layer", views.ready, {"check_layer": False}),
    path("-/live", views.live),
]

"""The configuration of the demo's app."""

from django.apps import AppConfig


class DemoConfig(AppConfig):
    """Publishes the changes of the orders."""

    name = "testproject"

    def ready(self) -> None:
        from .examples.orders import publish_orders  # the models are loaded now

        publish_orders()

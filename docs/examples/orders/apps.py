"""The app, which publishes the changes of its model."""

from django.apps import AppConfig

from django_eventsource import publish_changes


class OrdersConfig(AppConfig):
    """Publishes the primary keys of the orders that are created, updated and deleted."""

    name = "orders"

    def ready(self) -> None:
        """Connect to the signals of the model."""
        publish_changes(self.get_model("Order"), token=lambda order: "orders")

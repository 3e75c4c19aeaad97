"""An app without migrations, whose models the tests change."""

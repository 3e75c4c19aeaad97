"""``manage.py prune_events``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ...endpoints import expected, sentence
from ...history import get_history


class Command(BaseCommand):
    """Remove events that are over the history's bounds."""

    help = (
        "Remove the events that are over MAX_EVENTS, MAX_BYTES or MAX_AGE. Servers with open "
        "streams do it themselves; run this from cron where there are none."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        """Prune, and tell how much.

        :raises CommandError: when the history's store fails or its options are wrong.
        """
        try:
            removed = get_history().prune()
        except expected() as error:
            raise CommandError(sentence(error)) from error
        self.stdout.write(f"Removed {removed} event{'' if removed == 1 else 's'}.")

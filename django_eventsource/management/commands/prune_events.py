"""``manage.py prune_events``."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ...history import get_history
from ..cli import error_message, reportable_errors


class Command(BaseCommand):
    """Remove the events beyond the history's bounds."""

    help = (
        "Removes the events that exceed MAX_EVENTS, MAX_BYTES or MAX_AGE. Server processes with "
        "open streams do this themselves. Without such a process, run this command from cron."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        """Remove the events and print their number.

        :raises CommandError: if the history's store fails or its options are wrong.
        """
        try:
            removed = get_history().prune()
        except reportable_errors() as error:
            raise CommandError(error_message(error)) from error
        self.stdout.write(f"Removed {removed} event{'' if removed == 1 else 's'}.")

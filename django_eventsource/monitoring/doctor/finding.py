"""A finding: a message of Django's check framework with a page of the documentation."""

from __future__ import annotations

from django.core.checks import ERROR, INFO, WARNING, CheckMessage

__all__ = ["ERROR", "INFO", "WARNING", "Finding", "page_of"]

CHECKS = "docs/reference/checks.rst"
DATABASES = "docs/howto/databases.rst"
DEPLOY = "docs/howto/deploy.rst"
DOCTOR = "docs/howto/doctor.rst"
MACHINES = "docs/howto/several-machines.rst"
NGINX = "docs/howto/nginx.rst"
SETTINGS = "docs/reference/settings.rst"
TROUBLESHOOTING = "docs/help/troubleshooting.rst"
"""The pages that the findings name."""


class Finding(CheckMessage):
    """A mistake of the deployment.

    :param level: a level of ``django.core.checks``.
    :param msg: what was found.
    :param remedy: what to do.
    :param number: the number in the id, which never changes.
    :param page: the page of the documentation about it.
    """

    def __init__(self, level: int, msg: str, remedy: str, *, number: int, page: str) -> None:
        super().__init__(level, msg, hint=remedy, id=f"eventsource.D{number:03}")
        self.page = page


def page_of(message: CheckMessage) -> str:
    """Return the page about a finding or about a message of the system checks."""
    return message.page if isinstance(message, Finding) else CHECKS

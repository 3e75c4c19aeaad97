"""The examples of the demo: a module and a template for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1]
"""The directory of the app, which contains all source files."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source file of an example."""

    path: str
    """The path in the directory of the app."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An example: its card on the start page, and the files that its page shows."""

    name: str
    """The name of its URL, its module and its template."""
    title: str
    summary: str
    uses: str
    """The part of the package that it shows."""
    more_files: tuple[str, ...] = ()
    """Paths of files beside the module and the template."""

    def sources(self) -> list[Source]:
        """Read the files of the example."""
        own = (f"examples/{self.name}.py", f"templates/testproject/{self.name}.html")
        return [Source(path, (DIRECTORY / path).read_text()) for path in (*own, *self.more_files)]


EXAMPLES = [
    Example(
        name="live",
        title="Live ping",
        summary="A chart of this machine, and the events of a token as they arrive.",
        uses="publish()",
        more_files=("machine.py", "static/testproject/live.js"),
    ),
    Example(
        name="chat",
        title="Chat with rewind",
        summary="A page that opens later receives the last messages first, and then new ones.",
        uses="rewind",
    ),
    Example(
        name="cursor",
        title="Data, then events",
        summary="The page has its data, and listens later. It misses no change in between.",
        uses="get_cursor()",
        more_files=("models.py",),
    ),
    Example(
        name="transactions",
        title="Transactions",
        summary="An event is published if its transaction commits, and only then.",
        uses="atomic()",
        more_files=("models.py",),
    ),
    Example(
        name="presence",
        title="Presence",
        summary="The number of open streams of a token, in all server processes.",
        uses="listeners()",
    ),
    Example(
        name="close",
        title="Close and reopen",
        summary="The server ends streams. Browsers reconnect, or stop if the token is closed.",
        uses="close_streams()",
    ),
    Example(
        name="history",
        title="History as JSON",
        summary="The URL of a stream also returns the stored events, page by page.",
        uses="application/json",
    ),
    Example(
        name="fragments",
        title="Fragments of HTML",
        summary="The server renders a template once, and every page replaces a part with it.",
        uses="publish_template()",
        more_files=("templates/testproject/bar.html", "models.py"),
    ),
    Example(
        name="progress",
        title="Progress",
        summary="A bar that continues after a reload of the page, and a restart of the server.",
        uses="track()",
    ),
    Example(
        name="orders",
        title="Orders",
        summary="Two lists that follow a model: what is created, changed, moved and deleted.",
        uses="publish_changes()",
        more_files=("templates/testproject/order.html", "models.py", "apps.py"),
    ),
    Example(
        name="room",
        title="Chat room",
        summary="A room with its last messages, and the names of the people in it.",
        uses="Policy.identify()",
        more_files=("urls.py",),
    ),
    Example(
        name="answer",
        title="An answer that is not lost",
        summary="Text appears while it is made, in every window, and after every reload.",
        uses="astart_production()",
    ),
]
"""All examples, in the order of the start page."""

"""Tests of the README and the other pages: what they say is true of the code."""

from __future__ import annotations

import ast
import inspect
import json
import random
import re
import shlex
from configparser import ConfigParser
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import PermissionDenied
from django.core.management import get_commands, load_command_class
from django.http import HttpRequest
from django.test import RequestFactory
from django.urls import resolve
from django.utils.module_loading import import_string
from docutils import nodes

import django_eventsource
from django_eventsource import events, signals
from django_eventsource.client import AsyncEventSourceClient, EventSourceClient
from django_eventsource.conf import DEFAULT_HISTORY, PROPERTIES, conf
from django_eventsource.exceptions import NotAuthenticated
from django_eventsource.history.base import Draft, History
from django_eventsource.history.database import DatabaseHistory
from django_eventsource.history.redis import RedisHistory
from django_eventsource.listeners import Listener
from django_eventsource.policies import AllowAny
from django_eventsource.streams import Reason
from django_eventsource.tokens import CONTROL_TOKEN
from tests.pages import ROOT, blocks, literals, read_page, section, tables

PAGES = ["README.rst", "CHANGELOG.rst"]
PAGES += ["docs/architecture.rst", "docs/guarantees.rst", "docs/performance.rst"]
COMMANDS = ["send_event", "listen_events", "create_grant", "prune_events"]
CLASSIC = {
    "eventsource-server": "HPdjkiKC",
    "eventsource-client": "HPSVdrkaxup",
    "eventsource-request": "HPj",
}


# Reading


def run_block(title: str, number: int = 0) -> dict[str, object]:
    """Execute a Python block of a section and give its names."""
    names: dict[str, object] = {"__name__": "readme", "__file__": str(ROOT / "x" / "y.py")}
    exec(blocks("python", section(title))[number], names)
    return names


# The pages


@pytest.mark.parametrize("name", PAGES)
def test_page_renders(name):
    """docutils, without Sphinx, has nothing to say about any page."""
    assert read_page(name)[1] == ""


def test_all_pages_are_looked_at():
    """The pages that are tested here are all there are."""
    assert {name for name in PAGES if "/" in name} == {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.rst")
    }


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_files_that_exist(name):
    """A file of the project that a page names is there."""
    for text in literals(read_page(name)[0]):
        if re.fullmatch(r"(docs|tests|testproject|django_eventsource)/[\w/]+\.\w+", text):
            assert (ROOT / text).is_file(), text


def test_order_of_sections():
    """The README's sections come in their order."""
    tree = read_page("README.rst")[0]
    titles = [
        node.next_node(nodes.title).astext()
        for node in tree.children
        if isinstance(node, nodes.section)
    ]
    assert titles == [
        "The two commands",
        "First use in an existing project",
        "Settings",
        "Event classes",
        "Publishing",
        "Streams",
        "The commands",
        "Python client",
        "Security",
        "Deployment",
        "Testing your project",
        "Coming from the classic eventsource",
        "Further reading",
    ]


def test_versions_agree():
    """setup.cfg, the package, and the top of the changelog say the same version."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    top = re.search(r"^(\d\S*) \(.+\)\n-+$", (ROOT / "CHANGELOG.rst").read_text(), re.M)
    assert top is not None
    assert config["metadata"]["version"] == django_eventsource.__version__ == top[1]


# Settings


def documented_settings() -> dict[str, object]:
    """Give each setting of the README with its default."""
    rows = tables("Settings")[0][1:]
    return {name: ast.literal_eval(default) for name, _, default, _ in rows}


def test_settings_table_is_whole():
    """The table names every setting there is, and no other."""
    assert list(documented_settings()) == [f"EVENTSOURCE_{name.upper()}" for name in PROPERTIES]


@pytest.mark.parametrize("name", PROPERTIES)
def test_setting_default(name, settings):
    """A setting that is not there has the default of the table."""
    setting = f"EVENTSOURCE_{name.upper()}"
    if hasattr(django_settings, setting):
        delattr(settings, setting)
    default = documented_settings()[setting]
    value = getattr(conf, name)
    if isinstance(value, type):
        value = f"{value.__module__}.{value.__qualname__}"
    elif name == "history":
        value = {"BACKEND": value[0], "OPTIONS": value[1]}
    assert value == default
    assert type(value) is type(default)


def test_history_options():
    """The table of the history's options has those that the code takes, and their defaults."""
    documented = {name: ast.literal_eval(text) for name, _, text, _ in tables("Settings")[1][1:]}
    redis = defaults(RedisHistory)
    redis["HOSTS"] = list(redis["HOSTS"])
    assert documented == defaults(History) | defaults(DatabaseHistory) | redis
    assert DEFAULT_HISTORY in literals(section("Settings"))


def test_settings_example(settings):
    """The settings of the example are acceptable and mean what they say."""
    for name, value in run_block("Settings").items():
        if name.isupper():
            setattr(settings, name, value)
    assert conf.event_class is events.JSONIdEvent
    assert conf.history == (DEFAULT_HISTORY, {"MAX_EVENTS": 1_000, "MAX_AGE": 3_600})
    assert conf.keepalive_seconds == 50


def defaults(function: object) -> dict[str, object]:
    """Give the parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {item.name: item.default for item in parameters if item.default is not item.empty}


# Event classes


def test_table_of_classes():
    """The table of classes has the six, with their actions and their guarantee."""
    rows = tables("Event classes")[0][1:]
    for name, _, actions, guarantee in rows:
        event_class = getattr(events, name)
        assert actions.split(", ") == event_class.ACTIONS
        assert guarantee == ("durable" if events.is_durable(event_class) else "live only")
    assert [name for name, *_ in rows] == [
        "Event",
        "StringEvent",
        "JSONEvent",
        "EventId",
        "StringIdEvent",
        "JSONIdEvent",
    ]


def test_subclass_examples():
    """The classes of the example join lines; two of them are durable, one by an id of its own."""
    names = run_block("Your own classes")
    plain, numbered, stamped = (
        names[f"OneLine{part}Event"]("token", "ping", "a\nb\r\nc")  # type: ignore[operator]
        for part in ("", "Id", "Timestamp")
    )
    for event in (plain, numbered, stamped):
        assert event.value == ["a;b;c"]
        assert event.ACTIONS == ["ping", "close"]
        assert Draft.of(event).data == b"a;b;c"
    assert plain.id is None
    assert [events.is_durable(type(event)) for event in (plain, numbered, stamped)] == [
        False,
        True,
        True,
    ]
    assert numbered.id is None  # until it is in the history
    assert re.fullmatch(r"\d+\.\d{6}", stamped.id)
    assert stamped.id == stamped.id  # computed once


def test_mixin_may_stand_last():
    """The other order of bases that the text names gives a durable class as well."""
    one_line = run_block("Your own classes")["OneLineEvent"]
    assert events.is_durable(type("OneLineIdEvent", (one_line, events.EventId), {}))


def test_url_example():
    """The URL of the example has a class, a keepalive and a policy of its own."""
    names = run_block("Your own classes", 1)
    module = ModuleType("readme_urls")
    module.urlpatterns = names["urlpatterns"]
    view = resolve("/open/poll/a/b", urlconf=module).func
    assert view.view_initkwargs == {
        "event_class": events.JSONEvent,
        "keepalive_seconds": 50,
        "policy": AllowAny,
    }


# Publishing


@pytest.mark.django_db(transaction=True)
def test_publish_example(capsys):
    """Publishing as in the example prints an id."""
    run_block("Publishing")
    assert re.fullmatch(r"\d{16}\n", capsys.readouterr().out)


@pytest.mark.usefixtures("memory_history")
def test_publish_many_example(capsys):
    """Publishing many as in the example prints their ids: those of a token are consecutive."""
    run_block("Publishing", 1)
    first, second, _ = ast.literal_eval(capsys.readouterr().out)
    assert int(second) == int(first) + 1


@pytest.mark.django_db(transaction=True)
def test_transaction_example():
    """Two events of one transaction have no id in it, and consecutive ones after it."""
    first, second = run_block("Transactions")["tell_twice"]("token")  # type: ignore[operator]
    assert int(second) == int(first) + 1


@pytest.mark.usefixtures("memory_history")
async def test_apublish_example():
    """Awaiting apublish() as in the example gives an id."""
    tell = run_block("Publishing", 2)["tell"]
    assert (await tell("Hello")).isdigit()  # type: ignore[operator]


# The commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name):
    """The README's commands section names every option of a command, short and long."""
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", " ".join(documented_options())))
    assert options(name) - options("prune_events") <= known


def test_documented_options_exist():
    """The README's lists of options name none that no command has."""
    known = set().union(*(options(name) for name in COMMANDS))
    assert set(documented_options()) <= known


def documented_options() -> list[str]:
    """Give the options in the lists of the commands section."""
    found = []
    for table in section("The commands").findall(nodes.table):
        for row in table.findall(nodes.row):
            found += [text for text in literals(row.children[0]) if text.startswith("-")]
    return found


def options(name: str) -> set[str]:
    """Give all options of a command."""
    return {text for action in parser(name)._actions for text in action.option_strings}


def parser(name: str) -> object:
    """Give the parser of a management command."""
    return load_command_class(get_commands()[name], name).create_parser("manage.py", name)


def command_lines() -> list[str]:
    """Give everything in the README that looks like a management command line."""
    lines = literals(read_page("README.rst")[0])
    found = [re.search(r"manage\.py (\w+[^|#]*)", line) for line in lines]
    return sorted({match[1].strip() for match in found if match})


@pytest.mark.parametrize("line", command_lines())
def test_command_line_parses(line):
    """A command line of the README is one that the command takes."""
    name, *arguments = shlex.split(line)
    parsed = parser(name).parse_args(arguments)
    assert name not in COMMANDS[:3] or vars(parsed).get("token") or parsed.tokens


def test_nginx_replaces_the_address_that_the_client_sent():
    """Without the line nginx passes the client's own header through."""
    (block,) = blocks("nginx")
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in block


# Python


@pytest.mark.parametrize("source", blocks("python"))
def test_python_block_compiles(source):
    """A Python example is Python."""
    compile(source, "README.rst", "exec")


@pytest.mark.parametrize("client", [EventSourceClient, AsyncEventSourceClient])
def test_client_arguments(client):
    """The table of the clients' arguments has those that they take, and their defaults."""
    documented = {}
    for text, _ in tables("Python client")[0]:
        name, _, default = text.partition("=")
        if default:
            documented[name] = eval(default, {"random": random})
    assert documented == defaults(client)


async def test_policy_example():
    """The policy of the example lets users listen to their own token, and is closed else."""
    policy = run_block("Your own policy")["OwnTokenPolicy"]()  # type: ignore[operator]

    async def ahas_perm(permission: str) -> bool:
        return False

    def request(user: object) -> HttpRequest:
        async def auser() -> object:
            return user

        request = RequestFactory().get("/")
        request.auser = auser
        return request

    user = SimpleNamespace(pk=42, is_authenticated=True, ahas_perm=ahas_perm)
    assert await policy.can_listen(request(user), "user:42")
    with pytest.raises(PermissionDenied):
        await policy.can_listen(request(user), "user:43")
    with pytest.raises(PermissionDenied):
        await policy.can_send(request(user), "user:42", "ping")
    with pytest.raises(NotAuthenticated):
        await policy.can_listen(request(AnonymousUser()), "user:None")


async def test_state_example():
    """The view of the example begins its streams with a state."""
    view = run_block("A stream that begins with a state")["WeatherView"]()  # type: ignore[operator]
    assert await view.initial_state(None, "x") == [("ping", "the state of x")]


def test_options_example():
    """The URL of the example has both options."""
    (pattern,) = run_block("One listener, or at least one")["urlpatterns"]  # type: ignore[misc]
    assert pattern.callback.view_initkwargs == {"exclusive": True, "require_listener": True}


def test_listeners_example(memory_history, capsys):
    """Nobody listens in a test."""
    run_block("Who listens")
    assert capsys.readouterr().out == "0 ()\n"


def test_ending_example(memory_history):
    """What the example ends, every process is told."""
    run_block("Ending streams")
    entries = memory_history.read(CONTROL_TOKEN, memory_history.oldest(CONTROL_TOKEN)).entries
    told = [json.loads(entry.draft.data) for entry in entries]
    assert told == [{"token": "news", "user": None}, {"token": None, "user": "42"}]


async def test_signals_example(memory_history, capsys):
    """Each receiver of the example takes what its signal sends."""
    names = run_block("Signals")
    try:
        who = Listener(tokens=("t",), user="7")
        await signals.stream_opened.asend(None, listener=who, request=None)
        await signals.stream_closed.asend(None, listener=who, reason=Reason.LEFT, seconds=2)
        event = events.StringEvent("t", "ping")
        await signals.event_published.asend(None, event=event)
    finally:
        for name, signal in (
            ("on_opened", signals.stream_opened),
            ("on_closed", signals.stream_closed),
            ("on_published", signals.event_published),
        ):
            signal.disconnect(names[name])
    assert capsys.readouterr().out == (
        "7 listens to ('t',)\n7 listened for 2 seconds: left\nt ping None\n"
    )


# The classic library


@pytest.mark.parametrize("command", CLASSIC)
def test_classic_options(command):
    """The table says what takes the place of every option of the classic commands."""
    title = "Coming from the classic eventsource"
    left = [" ".join(row[0].split()) for row in tables(title)[0][1:]]
    mine = " ".join(text for text in left if text.startswith(command))
    assert set(re.findall(r"(?<!\w)-(\w)\b", mine)) == set(CLASSIC[command])


@pytest.mark.parametrize(
    "name",
    [
        "EventSourceHandler",
        "EventSourceClient",
        "Event.target",
        "listener.Event",
        "EventId.get_id",
        "buffer_event",
        "is_connected",
        "423",
        "404",
    ],
)
def test_classic_names(name):
    """The table says what takes the place of the classic library's names."""
    left = [row[0] for row in tables("Coming from the classic eventsource")[0][1:]]
    assert any(name in text for text in left)


def test_places_of_classic_names():
    """What the table names of this package is there."""
    found = {
        match[0]
        for text in literals(section("Coming from the classic eventsource"))
        for match in re.finditer(r"django_eventsource(\.\w+)+", text)
    }
    assert found
    for path in found:
        try:
            import_module(path)
        except ModuleNotFoundError:
            import_string(path)

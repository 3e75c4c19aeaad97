"""Tests that the README and the pages of the documentation agree with the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from configparser import ConfigParser
from importlib import import_module
from textwrap import dedent
from types import ModuleType, SimpleNamespace

import django
import pytest
from django.apps import apps
from django.conf import settings as django_settings
from django.contrib.auth import get_permission_codename
from django.contrib.auth.models import AnonymousUser
from django.contrib.sessions.backends.base import SessionBase
from django.core.exceptions import PermissionDenied
from django.core.management import get_commands, load_command_class
from django.http import HttpRequest
from django.template import engines
from django.test import RequestFactory
from django.urls import resolve
from django.utils.module_loading import import_string
from docutils import nodes

import django_eventsource
from django_eventsource import events, signals
from django_eventsource._logging import UNMIGRATED_TEXT
from django_eventsource.checks import ASGI_LINES, SETTING_IDS
from django_eventsource.conf import DEFAULT_HISTORY, PROPERTIES, conf
from django_eventsource.exceptions import NotAuthenticated
from django_eventsource.history.base import History
from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.records import Draft
from django_eventsource.history.redis.backend import RedisHistory
from django_eventsource.monitoring.doctor import finding
from django_eventsource.policies import AllowAny
from django_eventsource.protocol.tokens import CONTROL_TOKEN
from django_eventsource.signals import Listener, Reason
from tests.support import pages
from tests.support.histories import before_oldest
from tests.support.pages import (
    DOCS_PAGES,
    PAGES,
    README,
    ROOT,
    block_of,
    blocks,
    described,
    excerpt,
    literals,
    read_page,
    sequence,
    tables,
)

HOWTO, REFERENCE = "docs/howto", "docs/reference"
SETTINGS = f"{REFERENCE}/settings.rst"
CLASSIC_PAGE = f"{HOWTO}/from-eventsource.rst"
COMMANDS = [
    *("send_event", "listen_events", "create_grant", "prune_events"),
    *("eventsource_doctor", "eventsource_drain"),
]
CLASSIC = {
    "eventsource-server": "HPdjkiKC",
    "eventsource-client": "HPSVdrkaxup",
    "eventsource-request": "HPj",
}


OWN_MODULES = {"mysite", "news", "notifications"}
"""The modules of the projects in which the examples stand."""
NEW_MODULES = {"django.tasks": (6, 0)}
"""The modules that an older Django does not have."""
PYTHON_BLOCKS = [
    pytest.param(name, text, id=f"{name}-{number}")
    for name in PAGES
    for number, text in enumerate(blocks(name, "python"))
]


# Reading


def run_block(name: str, number: int = 0) -> dict[str, object]:
    """Execute a Python block of a how-to page and return its names."""
    names: dict[str, object] = {"__name__": "pages", "__file__": str(ROOT / "x" / "y.py")}
    names["urlpatterns"] = []  # of the file that the block is added to
    source = blocks(f"{HOWTO}/{name}.rst", "python")[number]
    # Without the __future__ imports of this module.
    exec(compile(source, name, "exec", dont_inherit=True), names)
    return names


# Included files


MODULE = """\
import a

def f():
    return 1

@decorated
class C:
    x = 1
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, MODULE.rstrip("\n")),
        ({"pyobject": "f"}, "def f():\n    return 1"),
        ({"pyobject": "C"}, "@decorated\nclass C:\n    x = 1"),
        ({"start-at": "@"}, "@decorated\nclass C:\n    x = 1"),
        ({"start-after": "@"}, "class C:\n    x = 1"),
        ({"end-at": "def"}, "import a\n\ndef f():"),
        ({"end-before": "def"}, "import a"),
        ({"start-at": "def", "end-before": "c"}, "def f():\n    return 1"),
        ({"start-at": "return", "end-at": "return", "dedent": 4}, "return 1"),
        ({"start-at": "return", "end-at": "return", "dedent": 4, "prepend": "#"}, "#\nreturn 1"),
        ({"lines": "1, 3-4, 8-"}, "import a\ndef f():\n    return 1\n    x = 1"),
        ({"lines": "-1"}, "import a"),
    ],
)
def test_an_included_file_has_the_part_that_the_options_select(options, expected):
    assert excerpt(MODULE, options) == expected


@pytest.mark.parametrize(
    "options",
    [
        *({name: "absent"} for name in ("start-at", "start-after", "end-at", "end-before")),
        {"end-before": "import"},  # Sphinx does not look at the first line.
        {"pyobject": "x"},
        *({"lines": spec} for spec in ("0", "9", "8-9", "3-2")),
    ],
)
def test_an_option_that_selects_nothing_is_an_error(options):
    with pytest.raises(ValueError, match=r"There (is|are) no|No line contains"):
        excerpt(MODULE, options)


@pytest.mark.parametrize(
    ("file", "option", "warning"),
    [
        ("absent.py", "", "No such file"),
        ("module.py", ":start-at: absent", "No line contains 'absent'"),
        ("module.py", ":start-at: import", None),
    ],
)
def test_a_page_with_an_invalid_include_has_a_warning(
    tmp_path, monkeypatch, file, option, warning
):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "DOCS_PAGES", ["page.rst"])
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "page.rst").write_text(f".. literalinclude:: {file}\n   {option}\n")
    warnings = read_page.__wrapped__("page.rst")[1]
    assert warning in warnings if warning else not warnings


# The pages


@pytest.mark.parametrize("name", PAGES)
def test_docutils_renders_every_page_without_warnings(name):
    """The pages outside of docs/ do not need Sphinx. `make docs` checks the others with Sphinx."""
    assert read_page(name)[1] == ""


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_pages_name_exist(name):
    for text in literals(read_page(name)[0]):
        if re.fullmatch(r"(docs|tests|testproject|django_eventsource)/[\w/-]+\.\w+", text):
            assert (ROOT / text).is_file(), text


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_pages_link_to_exist(name):
    for link in read_page(name)[0].findall(nodes.reference):
        uri = link.get("refuri", "")
        assert not uri or "://" in uri or ((ROOT / name).parent / uri).is_file(), uri


@pytest.mark.parametrize("name", [name for name in DOCS_PAGES if name.endswith("/index.rst")])
def test_an_index_page_links_to_each_of_its_pages(name):
    """A web site without Sphinx shows the links, and no table of contents."""
    tree = read_page(name)[0]
    folder = (ROOT / name).parent
    pages = {
        str(page.relative_to(folder))
        for node in tree.findall(nodes.comment)
        for entry in node.get("toctree", ())
        for page in folder.glob(f"{entry}.rst")
    }
    assert pages <= {link.get("refuri") for link in tree.findall(nodes.reference)}


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / README).read_text().splitlines()) <= 150


def test_the_figures_of_the_readme_are_those_of_the_performance_page():
    measured = {row[0]: row for row in tables("docs/explanation/performance.rst")[1]}
    header, *rows = tables(README)[1]
    columns = [measured["Server"].index(title) for title in header]
    assert rows == [[measured[row[0]][column] for column in columns] for row in rows]


def test_setup_cfg_the_package_and_the_changelog_have_the_same_version():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    top = re.search(r"^(\d\S*) \(.+\)\n-+$", (ROOT / "CHANGELOG.rst").read_text(), re.M)
    assert top is not None
    assert config["metadata"]["version"] == django_eventsource.__version__ == top[1]


# Settings


def documented_settings() -> dict[str, object]:
    """Return each setting of the reference with its default."""
    return {
        name: ast.literal_eval(options["default"].strip("`"))
        for name, options in described(SETTINGS).items()
        if name.startswith("EVENTSOURCE_")
    }


def test_the_reference_describes_every_setting_and_no_other():
    assert set(documented_settings()) == {f"EVENTSOURCE_{name.upper()}" for name in PROPERTIES}


def test_every_setting_has_a_type():
    assert all(options.get("type") for options in described(SETTINGS).values())


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_missing_setting_has_the_default_of_the_reference(name, settings):
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


def test_the_reference_has_the_history_options_and_defaults_of_the_code():
    documented = {
        name: ast.literal_eval(options["default"].strip("`"))
        for name, options in described(SETTINGS).items()
        if not name.startswith("EVENTSOURCE_")
    }
    redis = defaults(RedisHistory)
    redis["HOSTS"] = list(redis["HOSTS"])
    assert documented == defaults(History) | defaults(DatabaseHistory) | redis
    assert DEFAULT_HISTORY in literals(read_page(SETTINGS)[0])


def test_the_settings_of_the_example_are_accepted(settings):
    names: dict[str, object] = {}
    exec(blocks(SETTINGS, "python")[0], names)
    for name, value in names.items():
        if name.isupper():
            setattr(settings, name, value)
    assert conf.event_class is events.JSONIdEvent
    assert conf.history == (DEFAULT_HISTORY, {"MAX_EVENTS": 1_000, "MAX_AGE": 3_600})
    assert conf.keepalive_seconds == 50


def defaults(function: object) -> dict[str, object]:
    """Return the parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {item.name: item.default for item in parameters if item.default is not item.empty}


# Event classes


def test_the_table_of_classes_has_the_actions_and_guarantees_of_the_code():
    rows = tables(f"{REFERENCE}/event-classes.rst")[0][1:]
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


def test_the_classes_of_the_example_join_lines():
    """Two of them are durable, one by an id of its own."""
    names = run_block("event-classes")
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


def test_a_class_with_the_mixin_last_is_durable():
    one_line = run_block("event-classes")["OneLineEvent"]
    assert events.is_durable(type("OneLineIdEvent", (one_line, events.EventId), {}))


def test_the_url_of_the_example_has_a_class_a_keepalive_and_a_policy():
    names = run_block("event-classes", 4)
    module = ModuleType("readme_urls")
    module.urlpatterns = names["urlpatterns"]
    view = resolve("/open/poll/a/b", urlconf=module).func
    assert view.view_initkwargs == {
        "event_class": events.JSONEvent,
        "keepalive_seconds": 50,
        "policy": AllowAny,
    }


@pytest.mark.usefixtures("memory_history")
def test_the_example_of_json_values_sends_the_documented_text():
    event = run_block("event-classes", 2)["publish_prices"]("token")  # type: ignore[operator]
    assert event.value == ['{"tea":{"amount":"2.50","since":"2026-02-01"}}']
    assert event.value[0] in literals(read_page(f"{HOWTO}/event-classes.rst")[0])


@pytest.mark.usefixtures("memory_history")
def test_the_class_of_the_example_allows_any_action():
    event = run_block("event-classes", 1)["publish_price"]("token", 5)  # type: ignore[operator]
    assert (event.action, json.loads(event.value[0])) == ("price", {"price": 5})


# Publishing


@pytest.mark.django_db(transaction=True)
def test_the_example_of_publish_prints_an_id(capsys):
    run_block("publish")
    assert re.fullmatch(r"\d{16}\n", capsys.readouterr().out)


@pytest.mark.usefixtures("memory_history")
def test_the_example_of_publish_many_prints_consecutive_ids(capsys):
    run_block("publish-many")
    first, second, _ = ast.literal_eval(capsys.readouterr().out)
    assert int(second) == int(first) + 1


@pytest.mark.django_db(transaction=True)
def test_the_example_of_a_transaction_publishes_after_the_commit():
    """The two events have consecutive ids then."""
    first, second = run_block("publish", 2)["publish_twice"]("token")  # type: ignore[operator]
    assert int(second) == int(first) + 1


@pytest.mark.usefixtures("memory_history")
async def test_the_example_of_apublish_returns_an_id():
    send_news = run_block("publish", 1)["send_news"]
    assert (await send_news("Hello")).isdigit()  # type: ignore[operator]


@pytest.mark.usefixtures("memory_history")
def test_the_example_of_a_template_publishes_its_text(settings):
    page = f"{HOWTO}/publish-template.rst"
    settings.TEMPLATES = [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "OPTIONS": {
                "loaders": [
                    (
                        "django.template.loaders.locmem.Loader",
                        {"news/comment.html": block_of(page, "news/templates/news/comment.html")},
                    )
                ]
            },
        }
    ]
    event = run_block("publish-template")["publish_comment"](7, "Tea & cake")  # type: ignore[operator]
    assert (event.token, event.value) == ("article:7", ["<p>Tea &amp; cake</p>"])


@pytest.mark.usefixtures("memory_history")
def test_the_example_of_a_key_publishes_once():
    order_shipped = run_block("publish-once")["order_shipped"]
    assert order_shipped(7) == order_shipped(7) != order_shipped(8)  # type: ignore[operator]


# The commands


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_names_every_option_of_every_command(name):
    """Both the short and the long form."""
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", " ".join(documented_options())))
    assert options(name) - options("prune_events") <= known


def test_every_option_that_the_reference_names_exists():
    known = set().union(*(options(name) for name in COMMANDS))
    assert set(documented_options()) <= known


def documented_options() -> list[str]:
    """Return the options in the tables of the commands."""
    found = []
    for table in read_page(f"{REFERENCE}/commands.rst")[0].findall(nodes.table):
        for row in table.findall(nodes.row):
            found += [text for text in literals(row.children[0]) if text.startswith("-")]
    return found


def options(name: str) -> set[str]:
    """Return all options of a command."""
    return {text for action in parser(name)._actions for text in action.option_strings}


def parser(name: str) -> object:
    """Return the parser of a management command."""
    return load_command_class(get_commands()[name], name).create_parser("manage.py", name)


def command_lines() -> list[str]:
    """Return every management command line of every page."""
    lines = [line for name in PAGES for line in literals(read_page(name)[0])]
    found = [re.search(r"manage\.py (\w+[^|#)`]*)", line) for line in lines]
    shell = re.compile(r"shell -c|migrations")
    return sorted({match[1].strip() for match in found if match and not shell.search(match[1])})


@pytest.mark.parametrize("line", command_lines())
def test_the_commands_accept_the_command_lines_of_the_pages(line):
    name, *arguments = shlex.split(line)
    parsed = parser(name).parse_args(arguments)
    assert name not in COMMANDS[:3] or vars(parsed).get("token") or parsed.tokens


# The reference


PUBLIC_MODULES = [
    "django_eventsource",
    "django_eventsource.asgi",
    "django_eventsource.client",
    "django_eventsource.events",
    "django_eventsource.exceptions",
    "django_eventsource.grants",
    "django_eventsource.policies",
    "django_eventsource.signals",
    "django_eventsource.views",
]


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_the_reference_describes_every_public_name(module):
    names = {name for page in DOCS_PAGES if page.startswith(REFERENCE) for name in described(page)}
    assert {f"{module}.{name}" for name in import_module(module).__all__} <= names


def test_the_pages_and_the_check_print_the_same_asgi_file():
    lines = {
        tuple(line for line in block.text.replace("mysite", "<project>").splitlines() if line)
        for page in ("docs/tutorial/first-page.rst", f"{HOWTO}/existing-project.rst")
        for block in sequence(page)
        if block.file == "mysite/asgi.py" and block.whole
    }
    assert lines == {tuple(dedent(ASGI_LINES).strip().splitlines())}


def test_the_reference_lists_every_system_check():
    source = (ROOT / "django_eventsource/checks.py").read_text()
    warnings, errors = tables(f"{REFERENCE}/checks.rst")
    ids = [row[0] for row in (*warnings[1:], *errors[1:])]
    assert sorted(ids) == sorted(re.findall(r"eventsource\.[EW]\d{3}", source))
    assert {i: f"EVENTSOURCE_{name.upper()}" for name, i in SETTING_IDS.items()} == dict(
        errors[1:]
    )


def doctor_findings() -> list[tuple[str, str, str]]:
    """Return the id, the level and the page of each finding of the doctor."""
    found = []
    for path in (ROOT / "django_eventsource/monitoring/doctor").glob("*.py"):
        pages = {name: value for name, value in vars(finding).items() if name.isupper()}
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name("Finding"), args=[ast.Name(level), *_]):
                    number, page = (keyword.value for keyword in node.keywords)
                    assert isinstance(number, ast.Constant)
                    names = [one.id for one in ast.walk(page) if isinstance(one, ast.Name)]
                    found += [
                        (f"eventsource.D{number.value:03}", level, pages[name])
                        for name in names
                        if name in pages
                    ]
    return found


def test_the_reference_lists_every_finding_of_the_doctor():
    """Each id has one finding, the ids have no gap, and the pages of the findings exist."""
    rows = {
        (row[0], row[1])
        for table in tables(f"{REFERENCE}/commands.rst")
        for row in table
        if row[0].startswith("eventsource.D")
    }
    found = doctor_findings()
    assert {(one, level) for one, level, _ in found} == rows
    assert sorted(one for one, _ in rows) == [
        f"eventsource.D{number:03}" for number in range(1, len(rows) + 1)
    ]
    assert all((ROOT / page).is_file() for _, _, page in found)


def log_messages() -> set[str]:
    """Return the texts that the package logs."""
    found = set()
    for path in (ROOT / "django_eventsource").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=logger, attr=level), args=[*arguments]) if (
                    level in {"debug", "info", "warning", "error", "exception", "log"}
                    and re.search("logg|throttled", ast.unparse(logger), re.I)
                ):
                    found |= {
                        argument.value
                        for argument in arguments
                        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                    }
    return {*found, UNMIGRATED_TEXT} - {" (%r)"}


def test_the_reference_lists_every_log_message():
    listed = {
        row[1]
        for table in tables(f"{REFERENCE}/logging.rst")
        for row in table
        if row[0] != "Level"
    }
    assert listed == {" ".join(text.split()) for text in log_messages()}


def test_the_reference_lists_every_permission():
    permissions = {
        f"{model._meta.app_label}.{codename}"
        for model in apps.get_app_config("django_eventsource").get_models()
        for codename in (
            get_permission_codename("view", model._meta),
            *(codename for codename, _ in model._meta.permissions),
        )
    }
    (table,) = tables(f"{REFERENCE}/permissions.rst")
    assert {row[0] for row in table[1:]} == permissions


def test_the_reference_lists_the_reasons_of_reset_and_of_the_end_of_a_stream():
    (table,) = tables(f"{REFERENCE}/wire-format.rst")
    (reasons,) = [row[1] for row in table if row[0] == "reason"]
    assert set(re.findall(r"(\w+):", reasons)) == {"expired", "unknown", "overflow"}


# Code


@pytest.mark.parametrize(("name", "source"), PYTHON_BLOCKS)
def test_every_python_example_compiles_and_its_imports_resolve(name, source):
    tree = ast.parse(source, name)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    import_module(alias.name)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                if module.partition(".")[0] in OWN_MODULES:
                    continue
                if NEW_MODULES.get(module, (0,)) > django.VERSION:
                    continue
                for alias in names:
                    imported = import_module(module)
                    assert hasattr(imported, alias.name), f"{module}.{alias.name}"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(name, text, id=f"{name}-{number}")
        for name in PAGES
        for number, text in enumerate(blocks(name, "html+django"))
    ],
)
def test_every_template_compiles(name, source):
    engines["django"].from_string(source)


# The examples


async def test_the_policy_of_the_example_lets_users_listen_to_their_own_token():
    """It is closed otherwise."""
    policy = run_block("custom-policy")["OwnTokenPolicy"]()  # type: ignore[operator]

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


def test_the_url_of_the_example_has_both_options():
    (pattern,) = run_block("devices")["urlpatterns"]  # type: ignore[misc]
    assert pattern.callback.view_initkwargs == {"exclusive": True, "require_listener": True}


def test_the_example_of_listeners_runs(memory_history, capsys):
    """A test has no listeners."""
    run_block("presence")
    assert capsys.readouterr().out == "0 ()\n"


async def test_the_room_of_the_example_is_open_to_sessions_with_a_name():
    """The name is the id of the client."""
    policy = run_block("presence", 3)["RoomPolicy"]()  # type: ignore[operator]

    def request(**data: str) -> HttpRequest:
        request = RequestFactory().get("/")
        request.session = SessionBase()
        request.session._session_cache = data
        return request

    assert await policy.can_listen(request(name="Ada"), "room")
    assert await policy.identify(request(name="Ada")) == "Ada"
    assert not await policy.can_listen(request(name="Ada"), "other")
    assert not await policy.can_listen(request(), "room")


def test_the_example_of_closing_streams_reaches_every_process(memory_history):
    run_block("close-streams")
    entries = memory_history.read(
        CONTROL_TOKEN, before_oldest(memory_history, CONTROL_TOKEN)
    ).entries
    told = [json.loads(entry.draft.data) for entry in entries]
    assert told == [{"token": "news", "user": None}, {"token": None, "user": "42"}]


async def test_the_receivers_of_the_example_accept_their_signals(memory_history, capsys):
    names = run_block("signals")
    try:
        who = Listener(tokens=("t",), user="7")
        await signals.stream_opened.asend(None, listener=who, request=None)
        await signals.stream_closed.asend(
            None, listener=who, reason=Reason.CLIENT_DISCONNECTED, seconds=2
        )
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
        "7 listens to ('t',)\n7 listened for 2 seconds: client_disconnected\nt ping None\n"
    )


# The classic library


@pytest.mark.parametrize("command", CLASSIC)
def test_the_table_of_classic_options_is_complete(command):
    """It names what replaces each option of the classic commands."""
    left = [" ".join(row[0].split()) for row in tables(CLASSIC_PAGE)[0][1:]]
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
def test_the_table_of_classic_names_is_complete(name):
    """It names what replaces each name of the classic library."""
    left = [row[0] for row in tables(CLASSIC_PAGE)[0][1:]]
    assert any(name in text for text in left)


def test_the_replacements_of_classic_names_exist():
    found = {
        match[0]
        for text in literals(read_page(CLASSIC_PAGE)[0])
        for match in re.finditer(r"django_eventsource(\.\w+)+", text)
    }
    assert found
    for path in found:
        try:
            import_module(path)
        except ModuleNotFoundError:
            import_string(path)

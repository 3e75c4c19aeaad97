"""Tests of the structure of the package: which room may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import django_eventsource

NAME = "django_eventsource"
ROOT = Path(django_eventsource.__file__).parent

RULES = {
    "exceptions": [],
    "_logging": ["_runtime"],
    "_runtime": [],
    "_timing": [],
    "_statistics": [],
    "signals": [],
    "protocol": ["exceptions", "_runtime", "_timing"],
    "events": ["protocol"],
    "conf": ["events"],
    "models": ["conf"],
    "grants": ["conf"],
    "access": ["conf"],
    "history": ["models", "_logging"],
    "policies": ["grants", "access"],
    "delivery": ["history", "_statistics"],
    "publishing": ["delivery", "signals"],
    "reading": ["history"],
    "rendering": ["publishing"],
    "progress": ["publishing"],
    "model_changes": ["publishing"],
    "streaming": ["delivery", "policies", "signals"],
    "operations": ["streaming", "publishing"],
    "asgi": ["operations"],
    "producers": ["operations"],
    "monitoring": ["operations"],
    "__init__": ["producers", "reading", "rendering", "progress", "model_changes"],
    "client": ["protocol"],
    "testing": ["asgi"],
}
"""The rooms: packages and modules of the top level. Each may import the rooms that are listed
behind it, and what those may import."""

TOP = {"admin", "apps", "checks", "console", "management", "templatetags", "urls", "views"}
"""The rooms that Django finds by name, and the parts of the admin's console: they may import every
room. No other room imports them."""

STANDARD_LIBRARY_ONLY = {"exceptions", "_runtime", "_statistics", "_timing", "protocol"}
CLIENT_PARTIES = {"httpx2"}
"""The distributions that a client may import besides the standard library."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "migrations" not in path.parts and path.stat().st_size
}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def allowed(room: str) -> set[str]:
    """Return the rooms that a room may import."""
    found: set[str] = set()
    queue = list(RULES[room])
    while queue:
        other = queue.pop()
        if other not in found:
            found.add(other)
            queue += RULES[other]
    return found


def problems(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return what is wrong with the imports of a module, one line for each."""
    room = room_of(module)
    if room not in RULES and room not in TOP:
        return [f"{module}: unknown room; add it to RULES of {Path(__file__).name}"]
    tree = ast.parse(source)
    found = [
        f"{module}:{line} imports {target}: not allowed"
        for line, target in own_imports(module, tree, is_package)
        if not may_import(module, target)
    ]
    found += [
        f"{module}:{line} imports {party}: not allowed"
        for line, party in parties(module, tree, is_package)
        if not may_use(module, party)
    ]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [
                f"{module}:{line} imports {target} inside a function"
                for line, target in own_imports(module, function, is_package)
            ]
    return found


def may_import(module: str, target: str) -> bool:
    """Return whether a module may import another module of the project."""
    room, other = room_of(module), room_of(target)
    if room == other:
        # The package's __init__ exports what its modules define: they do not import it.
        return target != room and module != target
    if other not in RULES:
        return room in TOP and other in TOP
    if other == "client":
        return room == "management" or module.startswith("monitoring.doctor.")
    if other == "testing":
        return False
    return room in TOP or other in allowed(room)


def may_use(module: str, party: str) -> bool:
    """Return whether a module may import a distribution that is not this one."""
    room = room_of(module)
    if party == "pytest":
        return module == "testing.fixtures"
    if party in sys.stdlib_module_names:
        return True
    if room == "client":
        return party in CLIENT_PARTIES
    return room not in STANDARD_LIBRARY_ONLY


def own_imports(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the module of each import from this package."""
    for line, name, attributes in absolute_imports(module, tree, is_package):
        if name.partition(".")[0] == NAME:
            name = name.removeprefix(NAME).removeprefix(".")
            for attribute in attributes or [""]:
                submodule = f"{name}.{attribute}".strip(".")
                yield line, submodule if submodule in MODULES else name or "__init__"


def parties(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the top-level package of each import from another distribution."""
    for line, name, _ in absolute_imports(module, tree, is_package):
        if name.partition(".")[0] != NAME:
            yield line, name.partition(".")[0]


def absolute_imports(
    module: str, tree: ast.AST, is_package: bool
) -> Iterator[tuple[int, str, list[str]]]:
    """Yield each import's line, absolute module name, and imported names."""
    package = [NAME, *module.split(".")]
    if not is_package or module == "__init__":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, name, [alias.name for alias in node.names]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may_import(module):
    """Imports between rooms have one direction, and none is inside a function."""
    path = MODULES[module]
    assert problems(module, path.read_text(), path.name == "__init__.py") == []


def test_every_module_of_the_package_is_checked():
    """The checks find modules, subpackages and commands."""
    assert {"__init__", "events", "history", "history.base", "templatetags.eventsource"} <= set(
        MODULES
    )
    assert "management.commands.prune_events" in MODULES
    assert not [module for module in MODULES if "migrations" in module]


def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    """Imports inside a room have one direction too."""
    graph = {
        module: {
            target
            for _, target in own_imports(
                module, ast.parse(path.read_text()), path.name == "__init__.py"
            )
        }
        for module, path in MODULES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("protocol.frames", "from ..views import x", "protocol.frames:1 imports views"),
        ("events", "\nimport django_eventsource.conf", "events:2 imports conf"),
        ("events", "from . import conf, exceptions", "events:1 imports conf"),
        ("events", "from . import publish", "events:1 imports __init__"),
        ("events", "from .nowhere import x", "events:1 imports nowhere"),
        ("protocol.frames", "import django", "protocol.frames:1 imports django"),
        ("grants", "from .grants import x", "grants:1 imports grants"),
        ("history.base", "from . import get_history", "history.base:1 imports history"),
        ("history.base", "from ..delivery.hub import x", "imports delivery.hub"),
        ("delivery.hub", "from ..streaming.stream import x", "imports streaming.stream"),
        ("streaming.stream", "from ..publishing import x", "imports publishing"),
        ("delivery.hub", "from ..client import x", "delivery.hub:1 imports client"),
        ("views", "from .client import x", "views:1 imports client"),
        ("monitoring.x", "from ..client import x", "monitoring.x:1 imports client"),
        ("__init__", "from .views import x", "__init__:1 imports views"),
        ("client.sender", "from ..conf import conf", "client.sender:1 imports conf"),
        ("client.sender", "from django.conf import settings", "imports django: not allowed"),
        ("client.sender", "import requests", "client.sender:1 imports requests: not allowed"),
        ("views", "from .testing import x", "views:1 imports testing: not allowed"),
        ("testing.faults", "from ..views import x", "testing.faults:1 imports views: not allowed"),
        ("testing.faults", "import pytest", "testing.faults:1 imports pytest: not allowed"),
        ("conf", "if x:\n  from .views import y", "conf:2 imports views"),
        ("views", "def f():\n  from .conf import x", "views:2 imports conf inside a function"),
        ("views", "async def f():\n  from . import conf", "views:2 imports conf inside a func"),
        (
            "views",
            "class A:\n  def f(self):\n    import django_eventsource.events",
            "views:3 imports events inside a function",
        ),
        ("novel", "", "novel: unknown room; add it to RULES of test_architecture"),
        ("novel.part", "", "novel.part: unknown room; add it to RULES of test_architecture"),
    ],
)
def test_a_forbidden_import_is_reported(module, source, problem):
    """The checker reports each kind of violation with its module and line."""
    (found,) = problems(module, source)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("events", "from .exceptions import InvalidEvent", False),
        ("history", "from .base import History\nfrom ..conf import conf", True),
        ("history.redis.backend", "from ...models import x\nfrom .. import base", False),
        ("history.redis.backend", "import redis", False),
        ("__init__", "from .publishing import publish", True),
        ("client.client", "import httpx2, json\nfrom ..protocol.frames import x", False),
        ("management.commands.listen_events", "from ...client import x", False),
        ("monitoring.doctor.canary", "from ...client import x", False),
        ("urls", "from .views import x\nfrom django_eventsource.history import base", False),
        ("conf", "def f():\n  import redis", False),
        ("testing.fixtures", "import pytest\nfrom .. import _runtime", False),
        ("testing.faults", "from ..asgi import x\nfrom django.test import TestCase", False),
    ],
)
def test_an_allowed_import_is_not_reported(module, source, is_package):
    """The checker accepts what the rules allow."""
    assert problems(module, source, is_package) == []


def exports(path: Path) -> set[str]:
    """Return the names in a module's ``__all__``."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))
    return set()


PUBLIC_MODULES = {
    *["__init__", "asgi", "client", "events", "exceptions", "grants", "history"],
    *["history.database", "history.memory", "history.redis", "policies", "signals", "testing"],
    "views",
}
"""The modules from which users import."""


@pytest.mark.parametrize("module", sorted(PUBLIC_MODULES))
def test_a_public_module_lists_its_public_names(module):
    names = exports(MODULES[module])
    assert names
    assert not {name for name in names if name.startswith("_") and name != "__version__"}

"""Tests of the package's own shape: which module may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_eventsource

NAME = "django_eventsource"
ROOT = Path(django_eventsource.__file__).parent

LAYERS = [
    # 0: the standard library only
    ["exceptions", "batches", "inbox"],
    ["frames"],
    ["buffers"],
    ["events"],
    ["resets"],
    # 1
    ["conf", "tokens", "signals", "troubles", "addresses"],
    ["pacing"],
    ["grants", "rates"],
    # 2
    ["models", "history.base", "history.redis_scripts"],
    ["history.redis_hosts", "history.redis_entries"],
    ["history.transactions"],
    ["history.outbox"],
    ["history.presence"],
    ["history.memory", "history.database", "history.redis"],
    ["history", "logins"],
    ["policies"],
    # 3
    ["layers"],
    ["cursors", "background"],
    ["subscribers"],
    ["feeds"],
    ["membership", "reads"],
    ["hub"],
    ["publishing", "streams"],
    ["listeners", "backpressure", "responses"],
    ["presence"],
    ["control", "shutdown"],
    ["watch", "asgi"],
    ["__init__"],
    # 4
    ["requests", "snapshots"],
    ["views", "checks", "admin", "templatetags.eventsource"],
    ["urls", "apps", "endpoints"],
    ["management.commands.create_grant", "management.commands.prune_events"],
    ["management.commands.listen_events", "management.commands.send_event"],
]
"""The modules, lowest first. Each may import those in the rows above its own."""

RANKS = {module: rank for rank, row in enumerate(LAYERS) for module in row}
STANDARD_LIBRARY_ONLY = {"exceptions", "frames", "batches", "buffers", "inbox", "events", "resets"}

ASIDE = [["connection"], ["client", "sender"]]
"""The clients: each may import the rows above its own, ``ASIDE_MAY``, and httpx. No Django."""

ASIDE_RANKS = {module: rank for rank, row in enumerate(ASIDE) for module in row}
ASIDE_MAY = {"exceptions", "events", "frames"}
ASIDE_PARTIES = {"httpx"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "migrations" not in path.parts and path.stat().st_size
}


def problems(module: str, source: str, is_package: bool = False) -> list[str]:
    """Give what is wrong with the imports of a module, one line for each."""
    if module not in RANKS and module not in ASIDE_RANKS:
        return [f"{module}: unknown module; give it its place in LAYERS of {Path(__file__).name}"]
    tree = ast.parse(source)
    found = [
        f"{module}:{line} imports {target}: not below it"
        for line, target in own_imports(module, tree, is_package)
        if not may_import(module, target)
    ]
    found += [
        f"{module}:{line} imports {party}: not allowed here"
        for line, party in parties(tree)
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
    if module in ASIDE_RANKS:
        return target in ASIDE_MAY or ASIDE_RANKS.get(target, 99) < ASIDE_RANKS[module]
    if target in ASIDE_RANKS:
        return RANKS[module] > RANKS["__init__"]
    return RANKS.get(target, 99) < RANKS[module]


def may_use(module: str, party: str) -> bool:
    if party in sys.stdlib_module_names:
        return True
    if module in ASIDE_RANKS:
        return party in ASIDE_PARTIES
    return module not in STANDARD_LIBRARY_ONLY


def own_imports(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """Give the line and the module of each import of the project's own."""
    for line, name, attributes in absolute_imports(module, tree, is_package):
        if name.partition(".")[0] == NAME:
            name = name.removeprefix(NAME).removeprefix(".")
            for attribute in attributes or [""]:
                submodule = f"{name}.{attribute}".strip(".")
                yield line, submodule if submodule in RANKS | ASIDE_RANKS else name or "__init__"


def parties(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Give the line and the package of each import of others."""
    for line, name, _ in absolute_imports("", tree, False):
        if name.partition(".")[0] != NAME:
            yield line, name.partition(".")[0]


def absolute_imports(
    module: str, tree: ast.AST, is_package: bool
) -> Iterator[tuple[int, str, list[str]]]:
    """Give each import's line, absolute module name, and the names taken from it."""
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
def test_imports_go_downward(module):
    """Every module imports only modules below it, and none inside a function."""
    path = MODULES[module]
    assert problems(module, path.read_text(), path.name == "__init__.py") == []


def test_all_modules_are_looked_at():
    """The tests above see the package: modules, subpackages, commands."""
    assert {"__init__", "events", "history", "history.base", "templatetags.eventsource"} <= set(
        MODULES
    )
    assert "management.commands.prune_events" in MODULES
    assert not [module for module in MODULES if "migrations" in module]


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("frames", "from .views import x", "frames:1 imports views: not below it"),
        ("events", "\nimport django_eventsource.conf", "events:2 imports conf: not below it"),
        ("events", "from . import conf, frames", "events:1 imports conf: not below it"),
        ("events", "from . import publish", "events:1 imports __init__: not below it"),
        ("events", "from .nowhere import x", "events:1 imports nowhere: not below it"),
        ("events", "import django", "events:1 imports django: not allowed here"),
        ("grants", "from .grants import x", "grants:1 imports grants: not below it"),
        ("tokens", "from .conf import conf", "tokens:1 imports conf: not below it"),
        ("feeds", "from .hub import Hub", "feeds:1 imports hub: not below it"),
        ("streams", "from .publishing import x", "streams:1 imports publishing: not below it"),
        ("hub", "from .client import x", "hub:1 imports client: not below it"),
        ("__init__", "from .views import x", "__init__:1 imports views: not below it"),
        ("history.base", "from . import get_history", "imports history: not below it"),
        ("history.base", "from .memory import x", "imports history.memory: not below it"),
        ("history.base", "from ..hub import x", "history.base:1 imports hub: not below it"),
        ("client", "from .conf import conf", "client:1 imports conf: not below it"),
        ("client", "from .sender import x", "client:1 imports sender: not below it"),
        (
            "client",
            "from django.conf import settings",
            "client:1 imports django: not allowed here",
        ),
        ("client", "import requests", "client:1 imports requests: not allowed here"),
        ("hub", "if x:\n  from .views import y", "hub:2 imports views: not below it"),
        ("hub", "def f():\n  from .conf import x", "hub:2 imports conf inside a function"),
        ("hub", "async def f():\n  from . import conf", "hub:2 imports conf inside a function"),
        (
            "hub",
            "class A:\n  def f(self):\n    import django_eventsource.events",
            "hub:3 imports events inside a function",
        ),
        ("novel", "", "novel: unknown module; give it its place in LAYERS of test_architecture"),
        ("history.novel", "", "history.novel: unknown module; give it its place in LAYERS"),
    ],
)
def test_violation_is_found(module, source, problem):
    """The checker finds each kind of violation, and says which and where."""
    (found,) = problems(module, source)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("events", "from .exceptions import InvalidEvent", False),
        ("history", "from .base import History\nfrom ..conf import conf", True),
        ("history.redis", "from ..models import x\nfrom . import base\nimport redis", False),
        ("__init__", "from .publishing import publish", True),
        ("client", "import httpx, json\nfrom .frames import x\nfrom .connection import y", False),
        ("management.commands.listen_events", "from ...client import x", False),
        ("views", "from . import publish\nfrom django_eventsource.history import base", False),
        ("hub", "def f():\n  import redis", False),
    ],
)
def test_proper_imports_are_fine(module, source, is_package):
    """The checker does not complain of what is allowed."""
    assert problems(module, source, is_package) == []

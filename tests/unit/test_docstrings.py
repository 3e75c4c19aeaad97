"""Tests of the docstrings, as far as ruff's D rules do not check them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import django_eventsource

ROOT = Path(django_eventsource.__file__).parent
DOCS = "\n".join(path.read_text() for path in sorted((ROOT.parent / "docs").rglob("*.rst")))
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "migrations" not in path.parts]
FIRST_WORDS = {
    "Give",
    "Gives",
    "Tell",
    "Tells",
    "Say",
    "Says",
    "Know",
    "Hear",
    "Is",
    "Are",
    "Does",
}
"""Words that a docstring does not begin with: verbs for persons, and questions."""


def public_modules() -> list[str]:
    """Return the modules from which the examples of the documentation import."""
    return sorted(set(re.findall(r"^ +from (django_eventsource[\w.]*) import", DOCS, re.M)))


PUBLIC = public_modules()


def public_functions(module: str) -> Iterator[tuple[str, Any, set[str]]]:
    """Yield what a module exports: each function's name, itself, and its documented parameters.

    A class stands for its constructor. What an overridden method or the sync twin of an async
    function documents counts too. Methods that override a method of Django are left out.
    """
    exported = import_module(module)
    for name in exported.__all__:
        value = getattr(exported, name)
        if inspect.isfunction(value):
            yield name, value, documented(value, getattr(exported, name.removeprefix("a"), None))
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            # The attributes of a dataclass have docstrings.
            if "__init__" in vars(value) and not dataclasses.is_dataclass(value):
                yield name, value, documented(value)
            for attribute, method in vars(value).items():
                owners = [base for base in value.__mro__ if attribute in vars(base)]
                foreign = any(not base.__module__.startswith("django_event") for base in owners)
                if not inspect.isfunction(method) or attribute.startswith("_") or foreign:
                    continue
                twins = [
                    getattr(base, name, None)
                    for base in owners
                    for name in (attribute, attribute.removeprefix("a"))
                ]
                yield f"{name}.{attribute}", getattr(value, attribute), documented(*twins)


def documented(*objects: Any) -> set[str]:
    """Return the parameters that the docstrings of objects describe with ``:param name:``."""
    texts = [getattr(each, "__doc__", None) or "" for each in objects]
    return set(re.findall(r":param (\w+):", "\n".join(texts)))


def undocumented(function: Any, names: set[str]) -> list[str]:
    """Return the parameters of a function that are not among the documented names.

    A parameter that is named ``request`` is Django's request and needs no description.
    """
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in {"self", "request", *names}
        and not parameter.name.startswith("_")
        and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    ]


def problems(source: str) -> list[str]:
    """Return the docstrings of a source that begin with a forbidden word or are a question."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)
    ]
    # The string behind an assignment describes the attribute.
    texts += [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    first_lines = {text.split("\n", 1)[0] for text in texts if isinstance(text, str) and text}
    return sorted(
        line for line in first_lines if line.split()[0] in FIRST_WORDS or line.endswith("?")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_an_imperative_or_a_noun(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_function_has_a_docstring(module: str) -> None:
    """The docstring of an overridden method counts."""
    missing = [name for name, value, _ in public_functions(module) if not inspect.getdoc(value)]
    assert missing == []


@pytest.mark.parametrize("module", PUBLIC)
def test_every_parameter_of_a_public_function_is_documented(module: str) -> None:
    found = {name: undocumented(*rest) for name, *rest in public_functions(module)}
    assert {name: parameters for name, parameters in found.items() if parameters} == {}


def test_the_modules_of_the_examples_are_checked() -> None:
    assert {
        "django_eventsource",
        "django_eventsource.client",
        "django_eventsource.events",
        "django_eventsource.policies",
    } <= set(PUBLIC)


@pytest.mark.parametrize(
    "source",
    [
        '"""Give x."""',
        'def f():\n    """Is it x?"""',
        'x: int\n"""Does it?"""',
        'x = 1\n"""Which?"""',
    ],
)
def test_a_forbidden_first_word_is_reported(source: str) -> None:
    assert len(problems(source)) == 1


def test_a_parameter_without_a_description_is_reported() -> None:
    def function(one: int, two: int, **more: int) -> None:
        """Do nothing.

        :param one: a number.
        """

    assert undocumented(function, documented(function)) == ["two"]

"""Tests of the page with the threat model: each line names a test, and the test exists."""

from __future__ import annotations

import ast
from functools import cache

import pytest
from docutils import nodes

from tests.support.pages import ROOT, literals, read_page

PAGE = "docs/explanation/threat-model.rst"
ATTACKERS = [
    "A client without credentials",
    "A listener",
    "A publisher",
    "Another tenant of the broker",
    "A malicious server for the clients",
]
COLLECTED = ("tests/unit", "tests/integration")
"""The folders whose tests run before each merge, unlike the fault suite."""


def lines_by_attacker() -> dict[str, dict[str, list[str]]]:
    """Return the tests that each line of each section names."""
    return {
        section[0].astext(): {
            item[0].astext(): [text for text in literals(item) if "::" in text]
            for item in section.findall(nodes.definition_list_item)
        }
        for section in read_page(PAGE)[0].findall(nodes.section)
        if any(section.findall(nodes.definition_list_item))
    }


@cache
def functions_of(path: str) -> set[str]:
    """Return the names of the functions of a module whose tests pytest collects."""
    file = ROOT / path
    if not (path.startswith(COLLECTED) and file.name.startswith("test_") and file.is_file()):
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, functions)}


def is_collected(test: str) -> bool:
    """Return whether pytest collects a test: a function of a module with the right names."""
    path, _, name = test.partition("::")
    return name.startswith("test_") and name in functions_of(path)


def test_each_line_of_the_threat_model_names_tests_that_are_collected() -> None:
    sections = lines_by_attacker()
    assert list(sections) == ATTACKERS
    for lines in sections.values():
        assert lines
        for line, tests in lines.items():
            assert tests, f"{line!r} names no test"
            assert [test for test in tests if not is_collected(test)] == []


@pytest.mark.parametrize(
    "test",
    [
        "tests/unit/test_tokens.py::test_that_does_not_exist",
        "tests/unit/test_nothing.py::test_x",
        "tests/unit/test_grants.py::clock",
        "tests/faults/test_faults.py::test_a_killed_worker_loses_no_event",
        "tests/support/events.py::draft",
    ],
)
def test_another_name_is_not_a_test_that_is_collected(test: str) -> None:
    assert not is_collected(test)

"""The README and the other pages, as the tests read them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.core import publish_doctree

ROOT = Path(__file__).resolve().parent.parent


@cache
def read_page(name: str) -> tuple[nodes.document, str]:
    """Return a page as a tree, and the warnings of docutils about it."""
    warnings = io.StringIO()
    tree = publish_doctree(
        (ROOT / name).read_text(),
        source_path=name,
        settings_overrides={"report_level": 1, "halt_level": 5, "warning_stream": warnings},
    )
    return tree, warnings.getvalue()


def section(title: str) -> nodes.section:
    """Return the section of the README with a title."""
    for node in read_page("README.rst")[0].findall(nodes.section):
        if node.next_node(nodes.title).astext() == title:
            return node
    raise AssertionError(f"The README has no section {title!r}.")


def blocks(language: str, node: nodes.Element | None = None) -> list[str]:
    """Return the code blocks in a language."""
    node = read_page("README.rst")[0] if node is None else node
    return [
        block.astext()
        for block in node.findall(nodes.literal_block)
        if language in block["classes"]
    ]


def tables(title: str) -> list[list[list[str]]]:
    """Return the tables of a section, as rows of cells of text."""
    return [
        [[cell.astext() for cell in row.children] for row in table.findall(nodes.row)]
        for table in section(title).findall(nodes.table)
    ]


def literals(node: nodes.Element) -> list[str]:
    """Return the text that is set in code type, in text and in blocks."""
    found = [
        " ".join(item.astext().split())
        for item in node.findall(nodes.literal)
        if "code" not in item["classes"]
    ]
    for block in node.findall(nodes.literal_block):
        found += block.astext().splitlines()
    return found

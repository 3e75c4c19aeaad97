"""The README and the pages of the documentation, as the tests read them.

The pages are read with docutils alone, so that the tests do not need Sphinx: what Sphinx adds to
reStructuredText is replaced by the simplest markup that the tests can search.
"""

from __future__ import annotations

import ast
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import Directive, directives, roles

ROOT = Path(__file__).resolve().parents[2]

README = "README.rst"
PLAIN_PAGES = sorted(path.name for path in ROOT.glob("*.rst"))
"""The pages that a web site shows without Sphinx."""
DOCS_PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.rst")
    if not {"_build", "examples"} & set(path.relative_to(ROOT).parts)
)
"""The pages of the documentation site."""
PAGES = [*PLAIN_PAGES, *DOCS_PAGES]


@dataclass(frozen=True)
class Block:
    """A code block."""

    language: str
    file: str
    """The file that the block belongs to, or ``""``."""
    whole: bool
    """Whether the block is the whole file. Otherwise it belongs to the end of the file."""
    text: str


class _LiteralInclude(Directive):
    """Sphinx's directive that shows a file, or a part of it, as a code block."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(
            [
                *["language", "pyobject", "lines", "prepend"],
                *["start-at", "start-after", "end-at", "end-before"],
            ],
            directives.unchanged_required,
        ),
        "dedent": directives.nonnegative_int,
    }

    def run(self) -> list[nodes.Node]:
        path = Path(self.state.document["source"]).parent / self.arguments[0]
        try:
            text = excerpt(path.read_text(), self.options)
        except (OSError, ValueError) as error:
            raise self.error(f"{path.name}: {error}") from error
        classes = ["code", self.options.get("language", "")]
        return [nodes.literal_block(text, text, classes=classes)]


class _Described(Directive):
    """An object that Sphinx describes: a node that contains its name and its options."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("type", "default", "members", "no-value"), directives.unchanged
    )

    def run(self) -> list[nodes.Node]:
        return [nodes.comment("", "", described=self.arguments[0], **self.options)]


class _Toctree(Directive):
    """A table of contents: a node that contains the names of the pages."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("maxdepth", "glob", "hidden"), directives.unchanged
    )

    def run(self) -> list[nodes.Node]:
        return [nodes.comment("", "", toctree=list(self.content))]


def _reference(*args: Any, **kwargs: Any) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Return the text of a cross-reference, which Sphinx checks."""
    text = args[2]
    return [nodes.inline(args[1], text)], []


_DIRECTIVES = {
    "literalinclude": _LiteralInclude,
    "toctree": _Toctree,
    "confval": _Described,
    **{
        f"auto{kind}": _Described
        for kind in ("function", "class", "exception", "module", "data", "method")
    },
}
_ROLES = dict.fromkeys(("doc", "ref", "confval", "func", "class", "exc", "meth"), _reference)


@cache
def read_page(name: str) -> tuple[nodes.document, str]:
    """Return a page as a tree, and the warnings of docutils about it.

    Pages outside of ``docs/`` are read without Sphinx's markup, because web sites that show them
    do not have it.
    """
    added = name in DOCS_PAGES
    with (
        patch.dict(directives._directives, _DIRECTIVES if added else {}),
        patch.dict(roles._roles, _ROLES if added else {}),
    ):
        warnings = io.StringIO()
        tree = publish_doctree(
            (ROOT / name).read_text(),
            source_path=str(ROOT / name),
            settings_overrides={
                # Sphinx checks the targets of references.
                "report_level": 2 if added else 1,
                "syntax_highlight": "none",
                "halt_level": 5,
                "warning_stream": warnings,
            },
        )
    return tree, warnings.getvalue()


def excerpt(text: str, options: dict[str, Any]) -> str:
    """Return the part of a file that the options of ``literalinclude`` select.

    The options are applied in the order that Sphinx applies them in.

    :raises ValueError: an option selects something that the file does not have.
    """
    lines = text.splitlines()
    if "pyobject" in options:
        lines = _python_object(text, options["pyobject"])
    if "start-at" in options:
        lines = lines[_find(lines, options["start-at"]) :]
    if "start-after" in options:
        lines = lines[_find(lines, options["start-after"]) + 1 :]
    if "end-at" in options:
        lines = lines[: _find(lines, options["end-at"]) + 1]
    if "end-before" in options:
        lines = lines[: _find(lines, options["end-before"], first=1)]
    if "lines" in options:
        lines = _numbered(lines, options["lines"])
    lines = [line[options.get("dedent", 0) :] for line in lines]
    if "prepend" in options:
        lines.insert(0, options["prepend"])
    return "\n".join(lines).rstrip("\n")


def _find(lines: list[str], marker: str, first: int = 0) -> int:
    """Return the index of the first line that contains a marker."""
    for index, line in enumerate(lines[first:], first):
        if marker in line:
            return index
    raise ValueError(f"No line contains {marker!r}.")


def _python_object(text: str, name: str) -> list[str]:
    """Return the lines of a function or a class of a module, with its decorators."""
    for node in ast.parse(text).body:
        match node:
            case (
                ast.FunctionDef(name=found)
                | ast.AsyncFunctionDef(name=found)
                | ast.ClassDef(name=found)
            ) if found == name:
                first = min(one.lineno for one in [*node.decorator_list, node])
                return text.splitlines()[first - 1 : node.end_lineno]
    raise ValueError(f"There is no function and no class {name!r}.")


def _numbered(lines: list[str], spec: str) -> list[str]:
    """Return the lines of a list of numbers and ranges, such as ``1-3, 5, 8-``."""
    found = []
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        start = int(first or 1)
        end = int(last or len(lines)) if dash else start
        if not 1 <= start <= end <= len(lines):
            raise ValueError(f"There are no lines {part.strip()}, only 1-{len(lines)}.")
        found += lines[start - 1 : end]
    return found


def sequence(name: str) -> list[Block]:
    """Return the code blocks of a page in their order.

    A block belongs to a file if the paragraph before it ends with a colon, and its last literal is
    a path, as in "At the end of ``mysite/urls.py``:". If the paragraph contains the word *whole*,
    the block is the whole file.
    """
    found = []
    for block in read_page(name)[0].findall(nodes.literal_block):
        if block["classes"][:1] == ["code"]:
            sentence, file = _introduction(block)
            whole = bool(file) and "whole" in sentence.split()
            found.append(Block(block["classes"][1], file, whole, block.astext()))
    return found


def _introduction(block: nodes.literal_block) -> tuple[str, str]:
    """Return the text of the paragraph before a block, and the path that it ends with."""
    siblings = block.parent.children
    before = siblings[siblings.index(block) - 1]
    if not isinstance(before, nodes.paragraph) or not before.astext().endswith(":"):
        return "", ""
    path = ["", *(literal.astext() for literal in before.findall(nodes.literal))][-1]
    return before.astext(), path if re.fullmatch(r"[\w/-]*[./][\w./-]+", path) else ""


def blocks(name: str, language: str) -> list[str]:
    """Return the text of the code blocks of a page in a language."""
    return [block.text for block in sequence(name) if block.language == language]


def block_of(name: str, file: str) -> str:
    """Return the text of the only code block of a page that belongs to a file."""
    (text,) = [block.text for block in sequence(name) if block.file == file]
    return text


def described(name: str) -> dict[str, dict[str, str]]:
    """Return the objects that a page describes, each with the options of its directive."""
    return {
        node["described"]: {key: str(value) for key, value in node.attributes.items() if value}
        for node in read_page(name)[0].findall(nodes.comment)
        if "described" in node
    }


def tables(name: str) -> list[list[list[str]]]:
    """Return the tables of a page, as rows of cells of text."""
    return [
        [[cell.astext() for cell in row.children] for row in table.findall(nodes.row)]
        for table in read_page(name)[0].findall(nodes.table)
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

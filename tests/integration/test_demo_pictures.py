"""Tests of the drawn pictures of the documentation."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.demosite import ROOT

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))


def test_the_sequence_diagrams_are_present():
    assert [path.name for path in PICTURES] == [
        "disconnect-and-replay.svg",
        "publish-in-a-transaction.svg",
    ]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_drawing_has_a_title_and_a_description_for_screen_readers(path: Path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    texts = {
        node.get("id"): node.text for node in root if node.tag in (f"{SVG}title", f"{SVG}desc")
    }
    assert root.get("aria-labelledby") == " ".join(texts) == "title description"
    assert len(texts["title"]) > 10
    assert len(texts["description"]) > 100


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_drawing_has_colors_for_a_dark_page_and_loads_nothing(path: Path):
    text = path.read_text()
    assert "@media (prefers-color-scheme: dark)" in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") == 1

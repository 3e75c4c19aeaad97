"""Tests that Chromium compiles every script of the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.support.pages import PAGES, sequence


def scripts() -> Iterator[Any]:
    """Yield every script of every page, without its template tags."""
    for name in PAGES:
        for number, block in enumerate(sequence(name)):
            found = re.findall(r"<script>(.*?)</script>", block.text, re.S)
            for script in [block.text] if block.language == "js" else found:
                yield pytest.param(re.sub(r"{%.*?%}|{{.*?}}", "", script), id=f"{name}-{number}")


@pytest.mark.parametrize("script", list(scripts()))
def test_every_script_compiles_in_the_browser(page: Page, script: str) -> None:
    page.evaluate("script => { new Function(script); }", script)

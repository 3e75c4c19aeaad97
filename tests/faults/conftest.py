"""The results of the scenarios, printed when all have run."""

from __future__ import annotations

import pytest

from tests.faults.cluster import LINES

HEAD = ("missed", "duplicated", "out of order", "unreported gaps")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rst", action="store_true", help="print the results as an RST table")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not LINES:
        return
    terminalreporter.section("scenarios")
    for line in as_table() if config.getoption("--rst", default=False) else as_lines():
        terminalreporter.write_line(line)


def as_lines() -> list[str]:
    """Return one line for each scenario."""
    return [
        f"{line['scenario']}: "
        + ", ".join(f"{key} {value}" for key, value in line.items() if key != "scenario")
        for line in LINES
    ]


def as_table() -> list[str]:
    """Return an RST table."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for values in [list(LINES[0]), *(list(line.values()) for line in LINES)]:
        lines += [
            f"   {'*' if n == 0 else ' '} - {str(value).capitalize() if n == 0 else value}"
            for n, value in enumerate(values)
        ]
    return lines

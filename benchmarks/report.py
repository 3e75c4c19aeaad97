"""The report: tables in reStructuredText and plots, written into the performance page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs" / "explanation"
PAGE = DOCS / "performance.rst"
BEGIN, END = ".. figures begin", ".. figures end"
COLOURS = ("#0b6e99", "#c4552d", "#6a994e", "#7b5ea7", "#555555", "#d4a017", "#2a9d8f")


def table(header: Sequence[str], rows: Sequence[Sequence[object]], widths: str) -> str:
    """Return a table as text."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (header, *rows):
        for n, cell in enumerate(row):
            lines.append(f"   {'*' if n == 0 else ' '} - {cell}")
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    """Return a figure as text; ``n/a`` for a missing one."""
    return "n/a" if value is None else f"{value:,.{digits}f}"


def write(figures: str) -> None:
    """Write the figures into the page, between its marks."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}")


def plot(
    name: str,
    title: str,
    lines: Mapping[str, Mapping[int, float]],
    *,
    across: str,
    up: str,
    top: float | None = None,
) -> None:
    """Draw lines over a logarithmic axis, as PNG and SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "django-eventsource"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for colour, (label, points) in zip(COLOURS, lines.items(), strict=False):
        axes.plot(list(points), list(points.values()), "o-", label=label, color=colour)
    ticks = sorted({point for points in lines.values() for point in points})
    axes.set(xscale="log", xlabel=across, ylabel=up, title=title)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, top)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, name)


def bars(name: str, title: str, values: Mapping[str, float], *, across: str) -> None:
    """Draw bars, one for each contender, as PNG and SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "django-eventsource"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(values) + 1.2), dpi=120)
    labels = list(values)[::-1]
    ours = [COLOURS[0] if "eventsource" in label else "#aab4bb" for label in labels]
    drawn = axes.barh(labels, [values[label] for label in labels], color=ours)
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set(xlabel=across)
    figure.suptitle(title)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, name)


def _save(figure: Any, name: str) -> None:
    from matplotlib import pyplot

    directory = DOCS / "performance"
    directory.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(directory / f"{name}.png", metadata={"Software": None})
    figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)

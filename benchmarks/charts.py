"""Pictures for pages that benchmarks write, as SVG documents, and the writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe & Ito (https://jfly.uni-koeln.de/color/)


@dataclass(frozen=True)
class Point:
    """A prediction: what was published, what was predicted, of which series, and what to say of it."""

    published: float
    predicted: float
    series: str
    title: str


@dataclass(frozen=True)
class Bar:
    """A bar: its length, None where there is nothing to draw, the text at its end, and whether it stands out."""

    name: str
    value: float | None
    text: str
    strong: bool


@dataclass(frozen=True)
class Dot:
    """A form of something: where it lies, a short mark beside it, what to say of it, and whether it stands out."""

    x: float
    y: float
    mark: str
    title: str
    strong: bool


def scatter(title: str, points: Sequence[Point], limits: Mapping[str, float | None]) -> str:
    """Predicted over published values, both logarithmic, with a dashed band for each series that has a limit."""
    size, edge = 460, 50
    values = [value for point in points for value in (point.published, point.predicted)]
    low, high = 0.8 * min(values), 1.25 * max(values)
    at = _logarithmic(low, high, edge, size - edge)
    colours = dict(zip(limits, COLOURS, strict=False))

    def line(factor: float, style: str) -> str:
        ends = (at(low), size - at(low * factor), at(high), size - at(high * factor))
        return '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" '.format(*ends) + style + "/>"

    items = [line(1, 'stroke="#888"')]
    for series, limit in limits.items():
        if limit:
            style = f'stroke="{colours[series]}" stroke-dasharray="4 3" opacity="0.6"'
            items += [line(1 + limit, style), line(1 - limit, style)]
    for value in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low <= value <= high:
            items.append(f'<text x="{at(value):.1f}" y="{size - 30}" text-anchor="middle">{value}</text>')
            items.append(f'<text x="{edge - 8}" y="{size - at(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for point in points:
        items.append(
            f'<circle cx="{at(point.published):.1f}" cy="{size - at(point.predicted):.1f}" r="4" '
            f'fill="{colours[point.series]}" fill-opacity="0.7"><title>{escape(point.title)}</title></circle>'
        )
    for index, (series, limit) in enumerate(limits.items()):
        y = edge + 8 + 18 * index
        items.append(f'<circle cx="{edge + 16}" cy="{y}" r="4" fill="{colours[series]}"/>')
        label = f"{series}, dashed: {limit:.0%}" if limit else series
        items.append(f'<text x="{edge + 26}" y="{y + 4}">{escape(label)}</text>')
    items.append(f'<text x="{size / 2}" y="{size - 10}" text-anchor="middle">published</text>')
    return _document(size, size, title, items)


def intervals(
    title: str,
    groups: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    marks: Sequence[float],
    strong: Sequence[float],
) -> str:
    """Intervals with their middles, by group, row and series, on a logarithmic axis.

    Args:
        groups: low, middle and high by series, by row, by group.
        marks: values with a line, of which `strong` are darker.
    """
    width, left, step, y = 760, 190, 24, 64
    every = [v for rows in groups.values() for row in rows.values() for ends in row.values() for v in ends]
    at = _logarithmic(0.9 * min(*every, *marks), 1.1 * max(*every, *marks), left, width - 20)
    series = list(next(iter(next(iter(groups.values())).values())))
    items = []
    for group, rows in groups.items():
        items.append(f'<text x="10" y="{y + 4}" font-weight="600">{escape(group)}</text>')
        y += step
        for row, found in rows.items():
            items.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(row)}</text>')
            for index, (name, (low, middle, high)) in enumerate(found.items()):
                level = y - 4 + 8 * index
                items.append(
                    f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{level}" y2="{level}" '
                    f'stroke="{COLOURS[index]}" stroke-width="3"/>'
                    f'<circle cx="{at(middle):.1f}" cy="{level}" r="4" fill="{COLOURS[index]}">'
                    f"<title>{escape(row)} {escape(name)}: {middle:.2f} ({low:.2f}–{high:.2f})</title></circle>"
                )
            y += step
        y += 8
    behind = []
    for mark in marks:
        colour = "#888" if mark in strong else "#ddd"
        behind.append(f'<line x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="48" y2="{y}" stroke="{colour}"/>')
        behind.append(f'<text x="{at(mark):.1f}" y="{y + 16}" text-anchor="middle">{mark:g}x</text>')
    for index, name in enumerate(series):
        x = left + 10 + 130 * index
        behind.append(f'<circle cx="{x}" cy="36" r="4" fill="{COLOURS[index]}"/>')
        behind.append(f'<text x="{x + 10}" y="40">{escape(name)}</text>')
    return _document(width, y + 30, title, [*behind, *items])


def bars(title: str, rows: Mapping[str, Mapping[str, Sequence[Bar]]]) -> str:
    """Bars in panels side by side, in rows of panels; each panel has a scale of its own.

    Args:
        rows: bars by panel, by row; the panels of a row have the same names in the same order.
    """
    left, panel, gap, step, y = 190, 150, 60, 18, 48
    items, width = [], left
    for row, panels in rows.items():
        items.append(f'<text x="10" y="{y}" font-weight="600">{escape(row)}</text>')
        y += 22
        for column, (heading, found) in enumerate(panels.items()):
            x = left + column * (panel + gap)
            width = max(width, x + panel + gap)
            items.append(f'<text x="{x}" y="{y}" fill="#555">{escape(heading)}</text>')
            longest = max((bar.value for bar in found if bar.value is not None), default=1.0)
            for index, bar in enumerate(found):
                level = y + 8 + step * index
                if column == 0:
                    items.append(f'<text x="{left - 8}" y="{level + 11}" text-anchor="end">{escape(bar.name)}</text>')
                length = 0.0 if bar.value is None else panel * bar.value / longest
                colour = COLOURS[0] if bar.strong else "#bbb"
                items.append(
                    f'<rect x="{x}" y="{level}" width="{length:.1f}" height="{step - 4}" fill="{colour}"/>'
                    f'<text x="{x + length + 4:.1f}" y="{level + 11}">{escape(bar.text)}</text>'
                )
        y += 8 + step * max(len(found) for found in panels.values()) + 26
    return _document(width, y - 10, title, items)


def panels(title: str, found: Mapping[str, Sequence[Dot]], limit: float, label: str, legend: Sequence[str]) -> str:
    """Shares over something, both logarithmic, in panels side by side with a scale of their own.

    What is below a hundredth of `limit`, or negative, is drawn hollow at the bottom.

    Args:
        found: dots by panel.
        limit: a share with a dashed line in each panel.
        label: of the lower axis.
        legend: lines of text beneath.
    """
    panel, height, gap, top, floor = 250, 260, 60, 60, limit / 100
    items = []
    for column, (heading, dots) in enumerate(found.items()):
        left = 50 + column * (panel + gap)
        xs = [dot.x for dot in dots] or [1.0]
        across = _logarithmic(0.93 * min(xs), 1.12 * max(xs), left, left + panel)
        up = _logarithmic(floor, 2 * max([limit, *(dot.y for dot in dots)]), top + height, top)
        items.append(f'<text x="{left}" y="{top - 12}" font-weight="600">{escape(heading)}</text>')
        items.append(
            f'<path d="M{left},{top} V{top + height} H{left + panel}" fill="none" stroke="#888"/>'
            f'<line x1="{left}" x2="{left + panel}" y1="{up(limit):.1f}" y2="{up(limit):.1f}" stroke="{COLOURS[1]}" '
            'stroke-dasharray="4 3"/>'
        )
        for power in range(-6, 3):
            if floor * 0.999 <= 10.0**power and top <= up(10.0**power):
                at = up(10.0**power)
                items.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{100 * 10.0**power:g} %</text>')
        for value in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 32):
            if left <= across(value) <= left + panel:
                items.append(
                    f'<text x="{across(value):.1f}" y="{top + height + 16}" text-anchor="middle">{value}</text>'
                )
        items.append(
            f'<text x="{left + panel / 2}" y="{top + height + 34}" text-anchor="middle">{escape(label)}</text>'
        )
        placed: list[tuple[float, float, float]] = []  # of texts: left and right end, height
        for dot in sorted(dots, key=lambda dot: (dot.x, dot.y)):
            x, y, colour = across(dot.x), up(max(dot.y, floor)), COLOURS[0] if dot.strong else "#999"
            at, length = x + 7, 7 * len(dot.mark) + 4
            while beside := [
                end for start, end, level in placed if abs(y - level) < 11 and start < at + length and at < end
            ]:
                at = max(beside)
            placed.append((at, at + length, y))
            inside = colour if dot.y >= floor else "#fff"
            weight = ' font-weight="600"' if dot.strong else ""
            items.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{inside}" stroke="{colour}">'
                f"<title>{escape(dot.title)}</title></circle>"
                f'<text x="{at:.1f}" y="{y + 4:.1f}"{weight}>{escape(dot.mark)}</text>'
            )
    y = top + height + 60
    for index, text in enumerate(legend):
        items.append(f'<text x="50" y="{y + 17 * index}">{escape(text)}</text>')
    return _document(max(50 + len(found) * (panel + gap), 480), y + 17 * len(legend), title, items)


def write(page: Path, text: str, svg: str) -> None:
    """A page and the picture beside it, each whole or not at all."""
    for path, content in ((page, text), (page.with_suffix(".svg"), svg)):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(content, "utf-8")
        partial.replace(path)


def _logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)


def _document(width: int, height: int, title: str, items: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="10" y="20" font-size="14" font-weight="600">{escape(title)}</text>\n'
        + "\n".join(items)
        + "\n</svg>\n"
    )

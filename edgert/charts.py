"""Charts as SVG text: bars, and points on axes. Colours follow the reader's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/), readable for colour-blind people.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#999999"
STYLE = (
    ".paper{fill:#fff}.ink{fill:#1c1c1c}.faint{fill:#666}.line{stroke:#999}"
    "@media(prefers-color-scheme:dark){.paper{fill:#16181c}.ink{fill:#e6e6e6}.faint{fill:#a5a5a5}.line{stroke:#777}}"
)
WIDTH = 760
ROW, BAR = 22, 16  # of a chart of bars: from one to the next, and how thick they are


def palette(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; grey for those that there is none left for."""
    found = dict.fromkeys(names)
    return {name: _COLOURS[i] if i < len(_COLOURS) else GREY for i, name in enumerate(found)}


def bars_svg(bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], unit: str) -> str:
    """Horizontal bars made of parts, with a legend.

    Args:
        bars: by name of a bar, its parts, 0 or more each.
        colours: by name of a part.
        unit: of the parts, for the labels.
    """
    shown, y = legend(colours, 10, 8)
    longest = max([1e-30, *(sum(parts.values()) for parts in bars.values())])
    left, y = 250, y + 12
    for name, parts in bars.items():
        shown.append(text(left - 8, y + 12, short(name, 38), anchor="end"))
        at = float(left)
        for part, value in parts.items():
            wide = (WIDTH - left - 90) * value / longest
            shown.append(rect(at, y, wide, BAR, colours[part], f"{name}: {part} {value:.3g} {unit}"))
            at += wide
        shown.append(text(at + 6, y + 12, f"{sum(parts.values()):.3g} {unit}", kind="faint"))
        y += ROW
    return svg(shown, y + 6)


def tornado_svg(
    changes: Mapping[str, Sequence[float | None]], colours: tuple[str, str], labels: tuple[str, str]
) -> str:
    """Two bars a row to the left and right of zero: relative changes, e.g. 0.1 for a tenth more.

    Args:
        changes: by name of a row its two changes; None for one that is not known.
        colours, labels: of the first and of the second of them.
    """
    shown = []
    for i, (colour, label) in enumerate(zip(colours, labels, strict=True)):
        shown += [rect(10 + i * 240, 8, 12, 12, colour), text(27 + i * 240, 19, label)]
    largest = max([1e-9, *(abs(c) for pair in changes.values() for c in pair if c is not None)])
    middle, reach, y = 500.0, 180.0, 32.0
    for name, pair in changes.items():
        shown.append(text(250, y + 12, short(name, 38), anchor="end"))
        for i, change in enumerate(pair):
            if change is None:
                continue
            wide = reach * abs(change) / largest
            x = middle if change > 0 else middle - wide
            shown.append(rect(x, y + i * BAR / 2, wide, BAR / 2, colours[i], f"{name}, {labels[i]}: {change:+.1%}"))
        told = " / ".join("–" if change is None else f"{change:+.1%}" for change in pair)
        shown.append(text(middle + reach + 8, y + 12, told, kind="faint"))
        y += ROW
    shown.append(f'<path d="M{middle:g} 28V{y:g}" class="line"/>')
    return svg(shown, y + 6, WIDTH + 40)


@dataclass(frozen=True)
class Point:
    """A point of a chart.

    Attributes:
        name: for its label and its tooltip.
        x, y: finite.
        colour: of its mark.
        labelled: whether its name stands beside it.
        out: whether it is grey and on no front, because it cannot be chosen.
        error: half the length of its error bar along the second axis; 0 for none.
    """

    name: str
    x: float
    y: float
    colour: str
    labelled: bool
    out: bool = False
    error: float = 0.0


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
        title: what it shows, and in what unit.
        ticks: numbers that stand along it, ascending, at least two; the first and the last are its ends.
        log: whether it is logarithmic; its ticks are above 0 then.
    """

    title: str
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value is between the ends, from 0 to 1; at an end where it lies beyond."""
        low, high = self.ticks[0], self.ticks[-1]
        if not low < value < high:
            return float(value >= high)
        return math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)


def points_svg(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points with axes from zero, and the steps of their Pareto front, on which less is better on both axes.

    Args:
        points: at least one that can be chosen.
    """
    front: list[Point] = []
    for p in sorted((p for p in points if not p.out), key=lambda p: (p.x, p.y)):
        if not front or p.y < front[-1].y:
            front.append(p)
    steps = [(front[0].x, front[0].y)]
    for p in front[1:]:
        steps += [(p.x, steps[-1][1]), (p.x, p.y)]
    x, y = Axis(x_title, ticks(max(p.x for p in points))), Axis(y_title, ticks(max(p.y for p in points)))
    return chart_svg(points, x, y, curve=steps)


def chart_svg(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    curve: Sequence[tuple[float, float]] = (),
    levels: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Points on two axes; one that lies beyond an axis is drawn at its end.

    Args:
        curve: points that a dashed line goes through.
        levels: heights at which a line goes across, by what is written on it.
        colours: for a legend above.
    """
    left, right = 70.0, WIDTH - 30.0
    above, end = legend(colours or {}, left, 4)
    top = end + 18 if colours else 14.0
    bottom = top + 286

    def place(a: float, b: float) -> tuple[float, float]:
        return left + (right - left) * x.share(a), bottom - (bottom - top) * y.share(b)

    shown = [*above, f'<path d="M{left:g} {top:g}V{bottom:g}H{right:g}" class="line" fill="none"/>']
    for tick in x.ticks:
        shown.append(text(place(tick, 0)[0], bottom + 16, f"{tick:g}", anchor="middle", kind="faint"))
    for tick in y.ticks:
        shown.append(text(left - 6, place(0, tick)[1] + 4, f"{tick:g}", anchor="end", kind="faint"))
    shown.append(text((left + right) / 2, bottom + 34, x.title, anchor="middle"))
    shown.append(upright(16, (top + bottom) / 2, y.title, anchor="middle"))
    if curve:
        path = "L".join("{:.1f} {:.1f}".format(*place(*step)) for step in curve)
        shown.append(f'<path d="M{path}" class="line" fill="none" stroke-dasharray="4 3"/>')
    taken: list[tuple[float, float, float]] = []  # labels that stand: from, to, height
    for told, level in (levels or {}).items():
        height = place(0, level)[1]
        shown.append(f'<path d="M{left:g} {height:.1f}H{right:g}" stroke="#D55E00" stroke-dasharray="8 4"/>')
        shown.append(text(right, height - 4, told, anchor="end"))
        taken.append((right - 7.0 * len(told), right, height - 4))
    for p in points:
        shown += _mark(p, *place(p.x, p.y), [place(p.x, p.y + sign * p.error)[1] for sign in (-1, 1)])
    for p in points:
        if p.labelled:
            shown += _label(p.name, *place(p.x, p.y), (top, bottom), taken)
    return svg(shown, bottom + 44)


def _mark(p: Point, x: float, y: float, ends: Sequence[float]) -> list[str]:
    colour = GREY if p.out else p.colour
    about = f" ± {p.error:.2g}" if p.error else ""
    tip = f"<title>{escape(p.name)}: {p.x:.4g}, {p.y:.4g}{about}</title>"
    mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if p.labelled else 4}" fill="{colour}">{tip}</circle>'
    bar = f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>'
    return [bar, mark] if p.error else [mark]


def _label(
    name: str, x: float, y: float, within: tuple[float, float], taken: list[tuple[float, float, float]]
) -> list[str]:
    """A name beside its mark where there is room, with a line to the mark where that is further away."""
    name = short(name)
    wide = 7.0 * len(name)
    start = x + 14 if x + 14 + wide < WIDTH else x - 14 - wide
    for offset in (0, *(sign * 13 * i for i in range(1, 8) for sign in (-1, 1))):
        at = y + 4 + offset
        crowded = any(abs(at - height) < 12 and start < b and a < start + wide for a, b, height in taken)
        if within[0] < at < within[1] and not crowded:
            taken.append((start, start + wide, at))
            line = [f'<path d="M{x:.1f} {y:.1f}L{start - 2:.1f} {at - 4:.1f}" class="line"/>'] if offset else []
            return [*line, text(start, at, name)]
    return []


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, or to 1 where that is 0."""
    if not largest:
        return [0.0, 1.0]
    rough = largest / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * m for m in (1, 2, 5, 10) if scale * m >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high` for a logarithmic axis; both above 0, at least two."""
    decades = math.log10(high / low)
    digits = range(1, 10) if decades < 1 else (1, 2, 5) if decades < 4 else (1,)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    found = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
    start = max(i for i, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(found) if tick >= high * (1 - 1e-9))
    return found[start : max(end, start + 1) + 1]


def legend(colours: Mapping[str, str], x: float, y: float) -> tuple[list[str], float]:
    """Squares of colours with their names, in rows from a place on, and where the last row ends.

    Args:
        colours: by name.
    """
    shown, at = [], x
    for name, colour in colours.items():
        wide = 36 + 7.5 * len(name)
        if at > x and at + wide > WIDTH:
            at, y = x, y + 20
        shown += [rect(at, y, 12, 12, colour), text(at + 17, y + 11, name)]
        at += wide
    return shown, y + 12


def text(x: float, y: float, line: str, *, anchor: str = "start", kind: str = "ink") -> str:
    """A line of text; `kind` is a class of `STYLE`."""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{where}>{escape(line)}</text>'


def upright(x: float, y: float, line: str, *, anchor: str = "start", size: float = 12) -> str:
    """A line of text that reads upwards."""
    turned = f'text-anchor="{anchor}" font-size="{size:g}" transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
    return f'<text class="ink" {turned}>{escape(line)}</text>'


def rect(x: float, y: float, wide: float, high: float, colour: str, title: str = "") -> str:
    """A filled rectangle, with a tooltip."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.2f}" height="{high:g}" rx="2" fill="{colour}">{tip}</rect>'


def short(line: str, limit: int = 26) -> str:
    """A line of at most so many characters."""
    return line if len(line) <= limit else line[: limit - 1] + "…"


def svg(shown: Sequence[str], height: float, width: float = WIDTH) -> str:
    """A picture of its own."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<style>{STYLE}</style><rect width="100%" height="100%" class="paper"/>\n' + "\n".join(shown) + "\n</svg>\n"
    )

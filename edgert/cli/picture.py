"""Pictures as SVG text: a plan's blocks, bars and points. Colours follow the reader's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from edgert.cli.options import size
from edgert.graph import Block, BlockGraph
from edgert.placement import Plan

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/), readable for colour-blind people.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#999999"
STYLE = (
    ".paper{fill:#fff}.ink{fill:#1c1c1c}.faint{fill:#666}.line{stroke:#999}"
    "@media(prefers-color-scheme:dark){.paper{fill:#16181c}.ink{fill:#e6e6e6}.faint{fill:#a5a5a5}.line{stroke:#777}}"
)
_ROW, _BAR, _LEFT, _WIDTH = 22, 16, 190, 760
EACH = 40  # up to so many blocks each has a row of its own in the picture


def config_columns(plan: Plan) -> dict[str, list[str]]:
    """For each phase, or for both where they are the same, the configuration of every block."""
    columns = {
        f"{phase} on": [str(p.config) for p in placements for _ in range(p.first, p.last + 1)]
        for phase, placements in plan.phases.items()
    }
    return columns if plan.decode is not None else {"runs on": next(iter(columns.values()))}


def palette(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; grey for those that there is none left for."""
    found = dict.fromkeys(names)
    return {name: _COLOURS[i] if i < len(_COLOURS) else GREY for i, name in enumerate(found)}


@dataclass(frozen=True)
class Row:
    """Blocks of the same kind and sizes that run on the same configurations.

    Attributes:
        name: of the block, or of all of them, e.g. `attention.0–17`.
        blocks: at least one, in order.
        configs: one a phase, as in `config_columns`.
    """

    name: str
    blocks: tuple[Block, ...]
    configs: tuple[str, ...]

    @property
    def weights(self) -> str:
        """Their bytes for people, e.g. `18 × 3.4 MB`."""
        each = size(self.blocks[0].total_weight_bytes)
        return each if len(self.blocks) == 1 else f"{len(self.blocks)} × {each}"


def rows(graph: BlockGraph, plan: Plan, *, each: bool) -> list[Row]:
    """The blocks as rows of a table: one by one, or those that are alike together."""
    columns = list(config_columns(plan).values())
    alike: dict[tuple[object, ...], list[Block]] = {}
    for block in graph.blocks:
        configs = tuple(column[block.index] for column in columns)
        alike.setdefault((block.name if each else block.signature, configs), []).append(block)
    return [
        Row(together(blocks), tuple(blocks), tuple(column[blocks[0].index] for column in columns))
        for blocks in alike.values()
    ]


def together(blocks: Sequence[Block]) -> str:
    """One name for blocks such as `ffn.0`, `ffn.1`, `ffn.5`: `ffn.0–1, 5`."""
    stem, _, number = blocks[0].name.rpartition(".")
    if len(blocks) == 1 or not number.isdecimal():
        return blocks[0].name
    numbers = [int(block.name.rpartition(".")[2]) for block in blocks]
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ranges = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}–{run[-1][1]}" for run in runs]
    return f"{stem}.{', '.join(ranges)}"


def plan_svg(name: str, graph: BlockGraph, plan: Plan, colours: Mapping[str, str] | None = None) -> str:
    """A bar a block, as long as its weights, coloured by where it runs; the upper half for prefill where phases differ.

    Of a model of many blocks those that are alike share a bar, and a strip above shows all of them in order.

    Args:
        colours: by configuration; of its own where None.
    """
    colours = colours or palette([str(config) for config in plan.configs])
    each = len(graph.blocks) <= EACH
    columns = list(config_columns(plan).values())
    shown, x, y = [], 10.0, 50.0
    if plan.decode is not None:
        shown.append(_text(10, y + 11, "upper half: prefill, lower: decode"))
        x = 230
    for config in dict.fromkeys(str(config) for config in plan.configs):
        shown += [_rect(x, y, 12, 12, colours[config]), _text(x + 17, y + 11, config)]
        x += 40 + 8 * len(config)
    y += 26
    if not each:
        wide = (_WIDTH - 20) / len(graph.blocks)
        for b in graph.blocks:
            shown += _halves(
                10 + b.index * wide, y, max(0.5, wide - 0.6), [c[b.index] for c in columns], colours, b.name
            )
        y += _ROW + 4
    table = rows(graph, plan, each=each)
    cuts = {p.first for placements in plan.phases.values() for p in placements} - {0} if each else set()
    largest = max(1, *(_bytes(row) for row in table))
    for row in table:
        if row.blocks[0].index in cuts:
            shown.append(f'<path d="M8 {y - 3:g}H{_WIDTH - 8}" class="line" stroke-dasharray="4 3"/>')
        length = max(2.0, (_WIDTH - _LEFT - 190) * _bytes(row) / largest)
        label = row.weights
        if row.blocks[0].kv_bytes_per_token:
            label += f", KV {size(sum(b.kv_bytes_per_token for b in row.blocks))}/token"
        shown.append(_text(_LEFT - 8, y + 12, _short(row.name), anchor="end"))
        shown += _halves(_LEFT, y, length, row.configs, colours, row.name)
        shown.append(_text(_LEFT + length + 6, y + 12, label, kind="faint"))
        y += _ROW
    heading = f'<text x="10" y="20" class="ink" font-size="14" font-weight="600">{escape(_short(name, 90))}</text>'
    return _svg([heading, _text(10, 38, _short(plan.rationale, 120), kind="faint"), *shown], y + 10)


def _halves(
    x: float, y: float, wide: float, configs: Sequence[str], colours: Mapping[str, str], title: str
) -> list[str]:
    thick = _BAR / len(configs)
    return [
        _rect(x, y + i * thick, wide, thick, colours[config], f"{title}: {config}") for i, config in enumerate(configs)
    ]


def _bytes(row: Row) -> int:
    return sum(block.total_weight_bytes for block in row.blocks)


def bars_svg(bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], unit: str) -> str:
    """Horizontal bars made of parts, with a legend.

    Args:
        bars: by name of a bar, its parts, 0 or more each.
        colours: by name of a part.
        unit: of the parts, for the labels.
    """
    shown, x = [], 10.0
    for part, colour in colours.items():
        shown += [_rect(x, 8, 12, 12, colour), _text(x + 17, 19, part)]
        x += 36 + 7.5 * len(part)
    longest = max([1e-30, *(sum(parts.values()) for parts in bars.values())])
    left, y = 250, 32.0
    for name, parts in bars.items():
        shown.append(_text(left - 8, y + 12, _short(name, 38), anchor="end"))
        at = float(left)
        for part, value in parts.items():
            wide = (_WIDTH - left - 90) * value / longest
            shown.append(_rect(at, y, wide, _BAR, colours[part], f"{name}: {part} {value:.3g} {unit}"))
            at += wide
        shown.append(_text(at + 6, y + 12, f"{sum(parts.values()):.3g} {unit}", kind="faint"))
        y += _ROW
    return _svg(shown, y + 6, max(_WIDTH, x))


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
        shown += [_rect(10 + i * 240, 8, 12, 12, colour), _text(27 + i * 240, 19, label)]
    largest = max([1e-9, *(abs(c) for pair in changes.values() for c in pair if c is not None)])
    middle, reach, y = 500.0, 180.0, 32.0
    for name, pair in changes.items():
        shown.append(_text(250, y + 12, _short(name, 38), anchor="end"))
        for i, change in enumerate(pair):
            if change is None:
                continue
            wide = reach * abs(change) / largest
            x = middle if change > 0 else middle - wide
            shown.append(_rect(x, y + i * _BAR / 2, wide, _BAR / 2, colours[i], f"{name}, {labels[i]}: {change:+.1%}"))
        told = " / ".join("–" if change is None else f"{change:+.1%}" for change in pair)
        shown.append(_text(middle + reach + 8, y + 12, told, kind="faint"))
        y += _ROW
    shown.append(f'<path d="M{middle:g} 28V{y:g}" class="line"/>')
    return _svg(shown, y + 6, _WIDTH + 40)


@dataclass(frozen=True)
class Point:
    """A point of a chart.

    Attributes:
        name: for its label and its tooltip.
        x, y: finite.
        colour: of its mark.
        labelled: whether its name stands beside it.
        out: whether it is grey and on no front, because it cannot be chosen.
    """

    name: str
    x: float
    y: float
    colour: str
    labelled: bool
    out: bool = False


def points_svg(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points with axes from zero, and the steps of their Pareto front, on which less is better on both axes.

    Args:
        points: at least one that can be chosen.
    """
    left, right, top, bottom = 70.0, _WIDTH - 30.0, 14.0, 300.0
    x_ticks, y_ticks = ticks(max(p.x for p in points)), ticks(max(p.y for p in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_ticks[-1], bottom - (bottom - top) * y / y_ticks[-1]

    shown = [f'<path d="M{left:g} {top:g}V{bottom:g}H{right:g}" class="line" fill="none"/>']
    for tick in x_ticks:
        x, y = place(tick, 0)
        shown.append(_text(x, y + 16, f"{tick:g}", anchor="middle", kind="faint"))
    for tick in y_ticks:
        x, y = place(0, tick)
        shown.append(_text(x - 6, y + 4, f"{tick:g}", anchor="end", kind="faint"))
    shown.append(_text((left + right) / 2, bottom + 34, x_title, anchor="middle"))
    shown.append(
        f'<text class="ink" text-anchor="middle" transform="translate(16 {(top + bottom) / 2:g}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    front: list[Point] = []
    for p in sorted((p for p in points if not p.out), key=lambda p: (p.x, p.y)):
        if not front or p.y < front[-1].y:
            front.append(p)
    steps = [place(p.x, p.y) for p in front]
    path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
    shown.append(f'<path d="{path}" class="line" fill="none" stroke-dasharray="4 3"/>')
    taken: list[tuple[float, float, float]] = []  # labels that stand: from, to, height
    for p in points:
        x, y = place(p.x, p.y)
        tip = f"<title>{escape(p.name)}: {p.x:.4g}, {p.y:.4g}</title>"
        radius = 6 if p.labelled else 4
        colour = GREY if p.out else p.colour
        shown.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{tip}</circle>')
        if p.labelled:
            name = _short(p.name)
            wide = 7.0 * len(name)
            start = x + 14 if x + 14 + wide < _WIDTH else x - 14 - wide
            offsets = [0, *(sign * 13 * i for i in range(1, 8) for sign in (-1, 1))]
            free = [
                y + 4 + offset
                for offset in offsets
                if top < y + 4 + offset < bottom
                and not any(abs(y + 4 + offset - h) < 12 and start < b and a < start + wide for a, b, h in taken)
            ]
            if free:
                taken.append((start, start + wide, free[0]))
                if free[0] != y + 4:  # far enough away to need a line to its mark
                    shown.append(f'<path d="M{x:.1f} {y:.1f}L{start - 2:.1f} {free[0] - 4:.1f}" class="line"/>')
                shown.append(_text(start, free[0], name))
    return _svg(shown, bottom + 44)


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, or to 1 where that is 0."""
    if not largest:
        return [0.0, 1.0]
    rough = largest / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * m for m in (1, 2, 5, 10) if scale * m >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "ink") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{where}>{escape(text)}</text>'


def _rect(x: float, y: float, wide: float, high: float, colour: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.2f}" height="{high:g}" rx="2" fill="{colour}">{tip}</rect>'


def _short(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _svg(shown: Sequence[str], height: float, width: float = _WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<style>{STYLE}</style><rect width="100%" height="100%" class="paper"/>\n' + "\n".join(shown) + "\n</svg>\n"
    )

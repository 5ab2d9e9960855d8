"""What precisions cost, as pictures: the formats of all matrices, quality against size, predictions against the truth.

They are made of `quality.json`, whose fields `edgert.quality_page` describes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from edgert.charts import GREY, WIDTH, Axis, Point, chart_svg, legend, log_ticks, rect, short, svg, upright
from edgert.page import size
from edgert.placement import Plan

# From most to fewest bytes: warm ones for what is not INT4, blues with zero points, greens without; lighter is coarser.
FORMAT_COLOURS = {
    "f16": "#D55E00", "int8": "#E69F00",
    "int4-asym-g32": "#08519C", "int4-asym-g64": "#3182BD", "int4-asym-g128": "#6BAED6", "int4-asym-pc": "#BDD7E7",
    "int4-sym-g32": "#006D2C", "int4-sym-g64": "#31A354", "int4-sym-g128": "#74C476", "int4-sym-pc": "#BAE4B3",
}  # fmt: skip
_DEVICE_COLOURS = ("#CC79A7", "#F0E442", "#777777", "#8C564B", "#9467BD")
_KIND_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
CHOSEN = "chosen"
_CHOSEN_COLOUR = "#D55E00"
_UNITS = {
    "bytes": {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0},
    "us": {"s": 1e6, "ms": 1e3, "µs": 1.0},
    "uJ": {"J": 1e6, "mJ": 1e3, "µJ": 1.0},
}  # the units that values come in, and those that people read, by how many of the former they are
_STRIP = 60  # blocks side by side
_CELL = 16
_DEVICE = 7  # how high the strip of a phase's devices is


def percent(loss: float) -> float:
    """By how many percent perplexity rises with a rise of the loss in nats a token."""
    return 100 * math.expm1(min(loss, 700.0))  # e^700 is nearly the largest number there is


def kind_of(name: str) -> str:
    """What a measured mix is: its name without its number, `random` for `random 12`."""
    stem, _, number = name.rpartition(" ")
    return stem if stem and number.isdecimal() else name


def measured_points(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mixes that were measured, and the chosen one, which stands out."""
    return [*record["measured"], {**record["result"], "name": CHOSEN}]


def layers_svg(record: Mapping[str, Any]) -> str:
    """A column for each block with a cell for each of its matrices, coloured by format; below it what runs where."""
    layers = record["layers"]
    plan = plan_of(record)
    phases = plan.phases if plan else {}
    ends = [p.last for placements in phases.values() for p in placements]
    count = 1 + max([block for layer in layers for block in layer["blocks"]] + ends, default=-1)
    cells: list[list[Mapping[str, Any]]] = [[] for _ in range(count)]
    for layer in layers:
        for block in layer["blocks"]:
            cells[block].append(layer)
    used = {layer["format"] for layer in layers}
    colours = {name: colour for name, colour in FORMAT_COLOURS.items() if name in used}
    colours |= dict.fromkeys(sorted(used - set(colours)), GREY)
    devices = dict(zip(map(str, plan.configs if plan else ()), cycle(_DEVICE_COLOURS), strict=False))
    shown, y = legend(colours | devices, 10, 8)
    names = block_names(layers, count)
    longest = max((len(short(name, 18)) for name in names), default=0)
    wide = (WIDTH - 20) / min(max(count, 10), _STRIP)
    y += 14
    for first in range(0, count, _STRIP):
        strip = range(first, min(first + _STRIP, count))
        deepest = max(len(cells[block]) for block in strip)
        for block in strip:
            x = 10 + (block - first) * wide
            for row, layer in enumerate(cells[block]):
                top = y + (deepest - 1 - row) * _CELL  # the first matrix at the bottom, on a common line
                shown.append(rect(x, top, wide - 1, _CELL - 1, colours[layer["format"]], _told(layer)))
            for row, (phase, placements) in enumerate(phases.items()):
                config = next((str(p.config) for p in placements if p.first <= block <= p.last), None)
                if config is not None:
                    top, tip = y + deepest * _CELL + 3 + row * _DEVICE, f"{names[block]}: {phase} on {config}"
                    shown.append(rect(x, top, wide - 1, _DEVICE - 1, devices[config], tip))
            under = y + deepest * _CELL + 8 + len(phases) * _DEVICE
            shown.append(upright(x + wide / 2 + 3.5, under, short(names[block], 18), anchor="end", size=10))
        y += deepest * _CELL + 8 + len(phases) * _DEVICE + 6 * longest + 14
    return svg(shown, y)


def block_names(layers: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """What the blocks are called, by the names of the matrices that they are the first to read; their numbers else."""
    names = {}
    for layer in layers:
        stem, mark, _ = layer["name"].rpartition("/")
        for number, block in enumerate(layer["blocks"]):
            if mark and not number:
                names[block] = stem
            elif number:
                names.setdefault(block, layer["role"].rpartition("+")[2])
    return [names.get(block, str(block)) for block in range(count)]


def plan_of(record: Mapping[str, Any]) -> Plan | None:
    """Where the target's devices run the blocks; None where there is no target, or none that places them."""
    plan = (record.get("target") or {}).get("plan")
    return Plan.from_json(plan) if plan else None


def front_svg(record: Mapping[str, Any], what: str) -> str:
    """Measured mixes with their standard errors, the budget, and as a line the front that is predicted of the value.

    Args:
        what: the first axis: `bytes`, or `value`, which is the target's objective, or bytes too where there is none.
    """
    budget = 100 * record["budget"]
    found = [row for row in measured_points(record) if _finite(row.get(what), row["increase"]) and row[what] > 0]
    # A front of times goes back and forth in bytes.
    front = record["front"] if what == "value" or record["unit"] == "bytes" else []
    front = [row for row in front if _finite(row.get(what), row.get("predicted")) and row[what] > 0]
    if not found and not front:
        return ""
    scale, title = _scale([row[what] for row in (*found, *front)], record, what)
    curve = [(row[what] / scale, percent(row["predicted"])) for row in front]
    colours = kind_colours(row["name"] for row in found)
    points = [
        Point(row["name"], row[what] / scale, 100 * row["increase"], colours[kind_of(row["name"])],
              kind_of(row["name"]) == row["name"], error=_error(row))
        for row in found
    ]  # fmt: skip
    widths = [*(p.x for p in points), *(x for x, _ in curve)]
    heights = [*(p.y for p in points), *(p.y + p.error for p in points), *(y for _, y in curve), budget]
    return chart_svg(
        points,
        Axis(title, log_ticks(min(widths), max(widths)), log=True),
        _loss_axis("increase of perplexity, %", heights, budget),
        curve=curve,
        levels={f"at most {budget:g} %": budget} if budget > 0 else {},
        colours=colours,
    )


def proxy_svg(record: Mapping[str, Any], what: str) -> str:
    """What was measured over what was predicted, both logarithmic, and the line on which both are the same.

    Args:
        what: was measured: `increase`, or `kl`, which is less noisy and predicts the former.
    """
    found = [row for row in record["measured"] if _finite(row.get("predicted"), row.get(what)) and row["predicted"] > 0]
    if not found:
        return ""
    colours = kind_colours(row["name"] for row in found)
    points = []
    for row in found:
        height, error = (100 * row[what], _error(row)) if what == "increase" else (percent(row[what]), 0.0)
        colour = colours[kind_of(row["name"])]
        points.append(Point(row["name"], percent(row["predicted"]), height, colour, labelled=False, error=error))
    budget = 100 * record["budget"]
    values = [*(p.x for p in points), *(p.y for p in points)]
    measured = {"increase": "measured increase of perplexity, %", "kl": "what the measured KL divergence stands for, %"}
    x, y = (_loss_axis(t, values, budget) for t in ("predicted increase of perplexity, %", measured[what]))
    ends = (x.ticks[0], x.ticks[-1])
    return chart_svg(points, x, y, curve=[(end, end) for end in ends], colours=colours)


def kind_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each kind of measured mix: grey for random ones, which are many, and a bright one for the chosen."""
    fixed = {"random": GREY, CHOSEN: _CHOSEN_COLOUR}
    kinds = list(dict.fromkeys(map(kind_of, names)))
    free = dict(zip((kind for kind in kinds if kind not in fixed), _KIND_COLOURS, strict=False))
    return {kind: fixed.get(kind) or free.get(kind, GREY) for kind in kinds}


def _told(layer: Mapping[str, Any]) -> str:
    method = f" by {layer['method']}" if layer.get("method") else ""
    return (
        f"{layer['name']}: {layer['format']}{method}, {size(layer['bytes'])}, predicted +{percent(layer['loss']):.3g} %"
    )


def _loss_axis(title: str, values: Sequence[float], budget: float) -> Axis:
    """A logarithmic axis that holds the values, but none far below the budget: those are noise."""
    high = max([*values, budget, 1e-3])
    floor = budget / 50 if budget > 0 else high / 1e4
    low = max(min([value for value in values if value > 0], default=floor), floor)
    return Axis(title, log_ticks(min(low, high), high), log=True)


def _scale(values: Sequence[float], record: Mapping[str, Any], what: str) -> tuple[float, str]:
    """What to divide values by, and what the axis then shows."""
    unit = "bytes" if what == "bytes" else record["unit"]
    factors = _UNITS.get(unit, {unit: 1.0})
    name, factor = next((item for item in factors.items() if max(values) >= item[1]), list(factors.items())[-1])
    return factor, f"weights, {name}" if unit == "bytes" else f"{(record.get('target') or {}).get('objective')}, {name}"


def _error(row: Mapping[str, Any]) -> float:
    """The standard error of a measured increase in percent; 0 where it is not known."""
    error = row.get("standard_error", 0.0)
    return 100 * float(error) if _finite(error) else 0.0


def _finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)

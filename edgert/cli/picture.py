"""A plan's blocks as a picture, and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from edgert.charts import BAR, ROW, WIDTH, palette, rect, short, svg, text
from edgert.graph import Block, BlockGraph
from edgert.page import size
from edgert.placement import Plan

_LEFT = 190
EACH = 40  # up to so many blocks each has a row of its own in the picture


def config_columns(plan: Plan) -> dict[str, list[str]]:
    """For each phase, or for both where they are the same, the configuration of every block."""
    columns = {
        f"{phase} on": [str(p.config) for p in placements for _ in range(p.first, p.last + 1)]
        for phase, placements in plan.phases.items()
    }
    return columns if plan.decode is not None else {"runs on": next(iter(columns.values()))}


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
        shown.append(text(10, y + 11, "upper half: prefill, lower: decode"))
        x = 230
    for config in dict.fromkeys(str(config) for config in plan.configs):
        shown += [rect(x, y, 12, 12, colours[config]), text(x + 17, y + 11, config)]
        x += 40 + 8 * len(config)
    y += 26
    if not each:
        wide = (WIDTH - 20) / len(graph.blocks)
        for b in graph.blocks:
            shown += _halves(
                10 + b.index * wide, y, max(0.5, wide - 0.6), [c[b.index] for c in columns], colours, b.name
            )
        y += ROW + 4
    table = rows(graph, plan, each=each)
    cuts = {p.first for placements in plan.phases.values() for p in placements} - {0} if each else set()
    largest = max(1, *(_bytes(row) for row in table))
    for row in table:
        if row.blocks[0].index in cuts:
            shown.append(f'<path d="M8 {y - 3:g}H{WIDTH - 8}" class="line" stroke-dasharray="4 3"/>')
        length = max(2.0, (WIDTH - _LEFT - 190) * _bytes(row) / largest)
        label = row.weights
        if row.blocks[0].kv_bytes_per_token:
            label += f", KV {size(sum(b.kv_bytes_per_token for b in row.blocks))}/token"
        shown.append(text(_LEFT - 8, y + 12, short(row.name), anchor="end"))
        shown += _halves(_LEFT, y, length, row.configs, colours, row.name)
        shown.append(text(_LEFT + length + 6, y + 12, label, kind="faint"))
        y += ROW
    heading = f'<text x="10" y="20" class="ink" font-size="14" font-weight="600">{escape(short(name, 90))}</text>'
    return svg([heading, text(10, 38, short(plan.rationale, 120), kind="faint"), *shown], y + 10)


def _halves(
    x: float, y: float, wide: float, configs: Sequence[str], colours: Mapping[str, str], title: str
) -> list[str]:
    thick = BAR / len(configs)
    return [
        rect(x, y + i * thick, wide, thick, colours[config], f"{title}: {config}") for i, config in enumerate(configs)
    ]


def _bytes(row: Row) -> int:
    return sum(block.total_weight_bytes for block in row.blocks)

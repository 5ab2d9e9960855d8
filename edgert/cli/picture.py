"""A plan as a picture: one bar a block, as long as its weights, coloured by where it runs."""

from __future__ import annotations

from html import escape

from edgert.cli.options import size
from edgert.graph import BlockGraph
from edgert.placement import Plan

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/), readable for colour-blind people.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_ROW, _BAR, _LEFT, _WIDTH = 22, 16, 130, 760


def config_columns(plan: Plan) -> dict[str, list[str]]:
    """For each phase, or for both where they are the same, the configuration of every block."""
    columns = {
        f"{phase} on": [str(p.config) for p in placements for _ in range(p.first, p.last + 1)]
        for phase, placements in plan.phases.items()
    }
    return columns if plan.decode is not None else {"runs on": next(iter(columns.values()))}


def plan_svg(name: str, graph: BlockGraph, plan: Plan) -> str:
    """An SVG document. Where the phases differ a bar has two colours, the upper for prefill."""
    columns = list(config_columns(plan).values())
    colours = {str(config): _COLOURS[i % len(_COLOURS)] for i, config in enumerate(plan.configs)}
    largest = max(1, *(block.total_weight_bytes for block in graph.blocks))
    top = 58
    rows = []
    cuts = {p.first for placements in plan.phases.values() for p in placements} - {0}
    thick = _BAR / len(columns)
    for block in graph.blocks:
        y = top + block.index * _ROW
        if block.index in cuts:
            rows.append(
                f'<line x1="8" x2="{_WIDTH - 8}" y1="{y - 3}" y2="{y - 3}" stroke="#888" stroke-dasharray="4 3"/>'
            )
        length = max(2.0, (_WIDTH - _LEFT - 170) * block.total_weight_bytes / largest)
        label = size(block.total_weight_bytes)
        if block.kv_bytes_per_token:
            label += f", KV {size(block.kv_bytes_per_token)}/token"
        rows.append(
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(block.name)}</text>'
            + "".join(
                f'<rect x="{_LEFT}" y="{y + i * thick:g}" width="{length:.1f}" height="{thick:g}" rx="3" '
                f'fill="{colours[column[block.index]]}"><title>{escape(column[block.index])}</title></rect>'
                for i, column in enumerate(columns)
            )
            + f'<text x="{_LEFT + length + 6:.1f}" y="{y + 12}" fill="#555">{escape(label)}</text>'
        )
    legend, x = [], 10
    if plan.decode is not None:
        legend.append('<text x="10" y="43">upper half: prefill, lower: decode</text>')
        x = 230
    for config, colour in colours.items():
        legend.append(
            f'<rect x="{x}" y="32" width="12" height="12" rx="2" fill="{colour}"/>'
            f'<text x="{x + 17}" y="43">{escape(config)}</text>'
        )
        x += 40 + 8 * len(config)
    height = top + len(graph.blocks) * _ROW + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="10" y="20" font-size="14" font-weight="600">{escape(name)}: {escape(plan.rationale)}</text>\n'
        + "\n".join([*legend, *rows])
        + "\n</svg>\n"
    )


def plan_html(name: str, graph: BlockGraph, plan: Plan) -> str:
    """A page of its own with the picture and the table; it loads nothing from elsewhere."""
    columns = config_columns(plan)
    rows = "".join(
        f"<tr><td>{b.index}<td>{escape(b.name)}<td>{size(b.total_weight_bytes)}"
        f"<td>{escape(' '.join(b.weight_bytes))}<td>{b.flops_per_token / 1e6:.2f}"
        f"<td>{size(b.kv_bytes_per_token)}"
        + "".join(f"<td>{escape(column[b.index])}" for column in columns.values())
        + "</tr>\n"
        for b in graph.blocks
    )
    head = "".join(f"<th>{h}" for h in ("block", "name", "weights", "types", "MFLOP/token", "KV/token", *columns))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(name)}: plan</title>\n'
        "<style>body{font-family:system-ui,sans-serif;margin:2em;max-width:60em}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}</style>\n"
        f"{plan_svg(name, graph, plan)}<table><tr>{head}</tr>\n{rows}</table></html>\n"
    )

"""How long planning takes, by layers and configurations: a table, and a chart in docs/planning.svg.

    .venv/bin/python benchmarks/planning.py

Each time is the least of a few rounds, whose costs are new each time, as a plan is asked for once. It holds the search
for the best plan, every single configuration and every pair of them, the library and all runners-up.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgert import architecture
from edgert.cost import Costs
from edgert.graph import BlockGraph
from edgert.profile import Profile, shipped
from edgert.scheduler import schedule
from edgert.scheduler.candidates import Candidates
from edgert.scheduler.labels import WIDTH

LAYERS = (10, 20, 40, 80, 160)
CONFIGS = {3: "#0072B2", 10: "#E69F00", 30: "#D55E00"}  # Okabe and Ito's colours
CHART = Path(__file__).parents[1] / "docs" / "planning.svg"
WIDTH_PX, HEIGHT_PX, LEFT, BOTTOM, RIGHT, TOP = 560, 320, 60, 44, 110, 16


def model_of(layers: int) -> BlockGraph:
    """Llama-3.1-8B's shape with another number of layers."""
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": layers,
    }  # fmt: skip
    return architecture.from_config(config).graph


def machine_of(configs: int) -> Profile:
    """Lunar Lake's devices, over and over, each time a little faster or slower."""
    profile = shipped()["lunarlake"]
    models = []
    for number in range(configs):
        model = profile.devices[number % len(profile.devices)]
        speed = 1 + 0.2 * math.sin(number)
        name = f"{model.device.device}@made{number}{'+static' * model.device.static}"
        models.append(
            replace(
                model, name=f"made{number}", config=name, bandwidth_gbps=model.bandwidth_gbps * speed, ranges={},
                compute_gops=model.compute_gops * (2 - speed),
            )
        )  # fmt: skip
    return replace(profile, machine=f"{configs} made-up configurations", devices=tuple(models), measurements=())


def seconds(layers: int, configs: int, rounds: int) -> tuple[float, float]:
    """A whole schedule, and of it the search for the optimum."""
    graph, profile = model_of(layers), machine_of(configs)
    whole, search = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        schedule(Costs(graph, profile))
        whole.append(time.perf_counter() - start)
        task = Candidates(Costs(graph, profile), "tokens_per_joule", None, None, WIDTH)
        start = time.perf_counter()
        task.search(task.aim.weights, {}, WIDTH)
        search.append(time.perf_counter() - start)
    return min(whole), min(search)


def chart(times: dict[int, list[float]]) -> str:
    """Seconds over layers, both from 0, a line for each number of configurations."""
    most = max(max(values) for values in times.values()) * 1.1

    def place(layers: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH_PX - LEFT - RIGHT) * layers / LAYERS[-1]
        return x, HEIGHT_PX - BOTTOM - (HEIGHT_PX - BOTTOM - TOP) * value / most

    def text(x: float, y: float, words: str, anchor: str = "middle", fill: str = "#666") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{words}</text>'

    (x0, y0), (x1, _), (_, y1) = place(0, 0), place(LAYERS[-1], 0), place(0, most)
    parts = [f'<path d="M{x0} {y1:.1f}V{y0:.1f}H{x1:.1f}" stroke="#888" fill="none"/>']
    parts += [text(place(n, 0)[0], y0 + 16, str(n)) for n in LAYERS]
    parts += [text(x0 - 6, place(0, most * k / 4)[1] + 4, f"{most * k / 4:.2f}", "end") for k in range(5)]
    parts += [text((x0 + x1) / 2, y0 + 34, "layers"), text(x0 + 8, y1 + 8, "seconds", "start")]
    for configs, values in times.items():
        points = [place(n, value) for n, value in zip(LAYERS, values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{CONFIGS[configs]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{CONFIGS[configs]}"/>' for x, y in points]
        parts.append(text(points[-1][0] + 8, points[-1][1] + 4, f"{configs} configurations", "start", CONFIGS[configs]))
    style = f'font-family="sans-serif" font-size="12" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" width="{WIDTH_PX}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chart", type=Path, default=CHART)
    arguments = parser.parse_args()
    table = Table("layers", *(f"{configs} configurations" for configs in CONFIGS), title="seconds (of it the search)")
    times: dict[int, list[float]] = {configs: [] for configs in CONFIGS}
    for layers in LAYERS:
        cells = []
        for configs in CONFIGS:
            whole, search = seconds(layers, configs, arguments.rounds)
            times[configs].append(whole)
            cells.append(f"{whole:.2f} ({search:.3f})")
        table.add_row(str(layers), *cells)
    Console().print(table)
    partial = arguments.chart.with_name(f".{arguments.chart.name}.partial")
    partial.write_text(chart(times), "utf-8")
    partial.replace(arguments.chart)


if __name__ == "__main__":
    main()

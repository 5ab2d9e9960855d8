"""What a run of `peers.py` found: a table, the page docs/peers.md with its picture, and what was to be reached."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import Bar, bars, write
from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).parents[2] / "docs" / "peers.json"
OURS, GENAI, LLAMA = "edgert", "OpenVINO GenAI", "llama.cpp"
PICTURED = ("decode 512", "decode 8192", "prefill 512", "resident memory", "load")
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio that was to be reached.

    Attributes:
        cell: edgert's figure in it.
        against: the other.
        value: None where one of them is missing.
    """

    cell: str
    against: str
    value: float | None
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value is not None and (self.value <= self.limit if self.at_most else self.value >= self.limit)

    @property
    def asked(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}"

    @property
    def reached(self) -> str:
        return "not measured" if self.value is None else f"{self.value:.2f}"


def targets(result: Result) -> list[Target]:
    """edgert's first configuration against the others, in a run with all instruction sets or held to one."""
    medians = {r["name"]: {n: c["median"] for n, c in r["cells"].items()} for r in result["runtimes"]}
    ours = next((name for name in medians if name.startswith(OURS)), None)
    peers = [name for name in medians if not name.startswith(OURS)]
    bare = [name for name in peers if name.startswith("OpenVINO ") and name != GENAI]
    if ours is None:
        return []

    def ratio(cell: str, against: Sequence[str], limit: float, label: str = "", at_most: bool = False) -> Target:
        """How many times as fast; where the lower is the better one, how many times as much."""
        own = medians[ours].get(cell)
        known = [(found, name) for name in against if (found := medians.get(name, {}).get(cell)) is not None]
        best, name = min(known, default=(None, against[0] if len(against) == 1 else "none measured"))
        value = None if own is None or best is None else own / best if at_most else best / own
        return Target(cell, f"{label}: {name}" if label else name, value, limit, at_most)

    def limit_of_memory(context: int) -> Target:
        own, rates = medians[ours].get(f"decode {context}"), result["bandwidth_gbps"]
        read = None if own is None else result["weight_bytes_a_token"] / own / 1e6
        value = read / statistics.median(rates) if read is not None and rates else None
        return Target(f"decode {context}", "reading the weights at the measured bandwidth", value, 0.80)

    if result["isa"] != "all":
        found = [ratio("decode 512", peers, 1.4, "best of all"), ratio("prefill 512", peers, 1.5, "best of all")]
    else:
        found = [
            ratio("decode 512", [GENAI], 2.2),
            ratio("decode 512", bare, 1.6, "best bare OpenVINO"),
            ratio("decode 512", [LLAMA], 1.8),
            ratio("decode 8192", peers, 2.0, "best of all"),
            limit_of_memory(32),
            limit_of_memory(512),
            ratio("prefill 512", [GENAI], 2.0),
            ratio("prefill 512", [LLAMA], 4.0),
            ratio("resident memory", [GENAI], 0.6, at_most=True),
            ratio("load", [GENAI], 0.7, at_most=True),
        ]
    return [target for target in found if target.cell in medians[ours]]


def text(name: str, cell: Mapping[str, Any] | None) -> str:
    """A cell in its unit: milliseconds, seconds for load, MB for memory."""
    if cell is None:
        return "–"
    if cell["over_s"] is not None:
        return f"over {cell['over_s']:.0f} s"
    if cell["median"] is None:
        return "failed" if cell["error"] else "–"
    value, low, high = (_scaled(name, v) for v in (cell["median"], min(cell["values"]), max(cell["values"])))
    digits = 2 if name == "load" else 1 if name.startswith("decode") else 0
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _scaled(name: str, value: float) -> float:
    return value / 1e3 if name == "load" else value / 1e6 if unit(name) == "MB" else value


def unit(name: str) -> str:
    if name == "load":
        return "s"
    return "ms/token" if name.startswith("decode") else "ms" if name.startswith("prefill") else "MB"


def _columns(result: Result) -> list[str]:
    found = dict.fromkeys(name for r in result["runtimes"] for name in r["cells"])
    order = ("decode", "prefill", "load", "resident", "anonymous", "peak")

    def key(name: str) -> tuple[int, int]:
        kind, _, number = name.partition(" ")
        return order.index(kind), int(number) if number.isdigit() else 0

    return sorted(found, key=key)


def _bandwidth(result: Result) -> str:
    rates = result["bandwidth_gbps"]
    if not rates:
        return "bandwidth not measured (no C++ compiler)"
    return f"{statistics.median(rates):.1f} GB/s read ({min(rates):.1f}–{max(rates):.1f})"


def title(result: Result) -> str:
    held = "all instruction sets" if result["isa"] == "all" else f"held to {result['isa'].upper()}"
    return f"{result['model'].partition(',')[0]}, {held}"


def terminal(result: Result, reached: Iterable[Target]) -> None:
    console, found = Console(), result["runtimes"]
    console.print(f"{result['machine']['cpu']}, {result['threads']} threads, {_bandwidth(result)}, {result['date']}")
    table = Table(title(result), *(runtime["name"] for runtime in found))
    for name in _columns(result):
        medians = (text(name, runtime["cells"].get(name)).partition(" (")[0] for runtime in found)
        table.add_row(f"{name}, {unit(name)}", *medians)
    console.print(table)
    asked = Table("edgert", "against", "ratio", "asked", "")
    for target in reached:
        mark = "[green]met[/]" if target.met else "[red]missed[/]"
        asked.add_row(target.cell, target.against, target.reached, target.asked, mark)
    console.print(asked)
    for line in (*_errors(result), *result["notes"]):
        console.print(line, markup=False)


def _errors(result: Result) -> list[str]:
    """What runtimes said, each word once."""
    found = {
        (runtime["name"], cell["error"]): name
        for runtime in result["runtimes"]
        for name, cell in reversed(runtime["cells"].items())
        if cell["error"]
    }
    return [f"{runtime}, {cell}: {error}" for (runtime, error), cell in found.items()]


def keep(result: Result) -> None:
    """Put a result into docs/peers.json, in place of one of the same model and instruction set, and write the page."""
    results: list[Result] = json.loads(DOCUMENT.read_text("utf-8")) if DOCUMENT.exists() else []
    results = [old for old in results if (old["model"], old["isa"]) != (result["model"], result["isa"])] + [result]
    # Qwen3's first, as the targets are of it, and what is held after what is not.
    results.sort(key=lambda r: (not r["model"].startswith("Qwen3"), r["isa"] != "all", r["isa"]))
    DOCUMENT.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    write(DOCUMENT.with_suffix(".md"), *page(results))


def page(results: Sequence[Result]) -> tuple[str, str]:
    """docs/peers.md and its picture."""
    return HEAD + "".join(map(_section, results)), picture(results)


def _section(result: Result) -> str:
    columns, where = _columns(result), result["machine"]
    lines = [
        f"\n## {title(result)}\n",
        f"{where['cpu']}, {where['cores']} cores ({' '.join(where['isa'])}), {where['memory_bytes'] / 2**30:.0f} GiB, "
        f"{where['system']}; {result['threads']} threads; {_bandwidth(result)}; {result['date']}; "
        f"rounds: {result['rounds']}. {result['model']}; {result['provenance']}.\n",
        *(f"{note}\n" for note in result["notes"]),
        f"| | {' | '.join(f'{name}, {unit(name)}' for name in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for runtime in result["runtimes"]:
        cells = (text(name, runtime["cells"].get(name)) for name in columns)
        lines.append(f"| {runtime['name']} | {' | '.join(cells)} |")
    if reached := targets(result):
        lines += ["\n| edgert | against | ratio | asked | |", "|---|---|---|---|---|"]
        for t in reached:
            lines.append(f"| {t.cell} | {t.against} | {t.reached} | {t.asked} | {'met' if t.met else '**missed**'} |")
    lines += ["\n| | version | body | head | activations | cache |", "|---|---|---|---|---|---|"]
    for runtime in result["runtimes"]:
        versions = ", ".join(f"{name} {version}" for name, version in runtime["versions"].items())
        precision = (runtime["precision"][part] for part in ("body", "head", "activations", "cache"))
        lines.append(f"| {runtime['name']} | {versions or '–'} | {' | '.join(precision)} |")
    lines += [f"\n{line}" for line in _errors(result)]
    return "\n".join(lines) + "\n"


def picture(results: Sequence[Result]) -> str:
    rows: dict[str, dict[str, list[Bar]]] = {}
    for result in results:
        panels = rows.setdefault(title(result), {})
        for name in PICTURED:
            panels[f"{name}, {unit(name)}"] = [
                Bar(r["name"], None if cell is None or cell["median"] is None else _scaled(name, cell["median"]),
                    text(name, cell).partition(" (")[0], r["name"].startswith(OURS))
                for r in result["runtimes"]
                for cell in [r["cells"].get(name)]
            ]  # fmt: skip
    counts = " and ".join(str(n) for n in sorted({result["threads"] for result in results}))
    return str(bars(f"{counts} threads of a CPU: less is better", rows))


HEAD = """# Against other runtimes

<!-- Written by benchmarks/peers.py; the text is in benchmarks/runtimes/report.py. -->

![Bars for each runtime](peers.svg)

Every runtime has the same random weights, in the nearest form that it has (the last table of each run), a process of
its own and the same number of threads. Cells are medians of the rounds, in brackets the lowest and the highest; in a
round the runtimes take turns, each round begins with another one, and a first round is not counted.

* **decode N**: milliseconds a token after a prompt of N tokens, the median of 16 steps of a turn; a turn's first step
  is not counted. From 4096 on the prompt is prefilled once and each turn goes on where the one before ended.
* **prefill N**: milliseconds from the call to the first token, with nothing of the prompt in a cache.
* **load**: from the start of the process to the first token of a prompt of 32, the files being in the page cache.
* **resident, anonymous, peak**: memory of that process after 512 tokens, Python and its libraries included. What is
  resident and not anonymous is pages of files, which the system can drop.
* **over N s**: a request that took longer was ended; so were the figures that depend on it.

The bandwidth is what the same number of threads read of 512 MiB, between the rounds (`benchmarks/bandwidth.cpp`).
"""

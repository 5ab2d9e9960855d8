"""What a run of `quality.py` found: a table, the page docs/quality_table.md with its picture, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import Dot, panels, write
from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).parents[2] / "docs" / "quality_table.json"
EXACT_GGUF, EXACT_LIMIT = "llama-f32", 1e-3  # more would mean that the file for llama.cpp is another model
INT4 = ("nncf-int4", "nncf-int4-sym", "nncf-int4-0.8", "optimum-int4")
Row = Mapping[str, Any]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Something that was to hold; `met` is None where it was not measured."""

    name: str
    met: bool | None
    detail: str

    @property
    def word(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


def within(row: Row, budget: float) -> bool:
    """Whether a form was measured and keeps the budget; its standard error is shown, not added."""
    return bool(row["error"] is None and row["increase"] <= budget)


def verdicts(result: Result) -> list[Verdict]:
    """What was to be reached with a model."""
    budget, rows = result["budget"], result["rows"]
    ours = next((row for row in rows if row["role"] == "ours"), None)
    baselines = [row for row in rows if row["role"] == "baseline"]
    tried = [row for row in baselines if row["key"] in INT4]
    kept, small = (
        [row["name"] for row in tried if within(row, budget)],
        [row for row in baselines if within(row, budget)],
    )
    measured = ours if ours is not None and ours["error"] is None else None
    own = within(ours, budget) if ours is not None else None
    smaller = None if measured is None else all(measured["bytes"] < row["bytes"] for row in small)
    found = [
        Verdict(f"edgert within {budget:.0%}", own, "–" if measured is None else increase(measured)),
        Verdict(
            "the INT4 baselines (a)–(c) are not", False if kept else _all_ran(tried) or None,
            f"within: {', '.join(kept)}" if kept else "none of them is within",
        ),
        Verdict(
            "smaller than every baseline that is", smaller and (_all_ran(baselines) or None),
            "; ".join(f"{row['name']}: {_times(measured, row)}" for row in small) or "none is within",
        ),
    ]  # fmt: skip
    others = [verdict.met for verdict in found[1:]]
    either = True if True in others else None if None in others else False
    found.append(Verdict("the first, and one of the others", own and either, "what was asked for"))
    exact = next((row for row in rows if row["key"] == EXACT_GGUF and row["error"] is None), None)
    if exact is not None:
        right = abs(exact["increase"]) <= EXACT_LIMIT
        found.append(Verdict("llama.cpp with weights in f32 is the reference", right, increase(exact)))
    return found


def _all_ran(rows: Sequence[Row]) -> bool:
    """A tool that failed missed nothing."""
    return bool(rows) and all(row["error"] is None for row in rows)


def _times(ours: Row | None, row: Row) -> str:
    return _size(row) if ours is None else f"{ours['bytes'] / row['bytes']:.3f} of its {_size(row)}"


def increase(row: Row) -> str:
    """With its standard error."""
    error = row["standard_error"]
    return f"{row['increase']:+.2%} ± {'–' if error is None else f'{100 * error:.2f}'}"


def _size(row: Row) -> str:
    return f"{row['bytes'] / 1e3:,.0f} kB"


def _formats(row: Row) -> str:
    """Shares of the weights by type, the largest first."""
    total = sum(row["formats"].values())
    shares = sorted(row["formats"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count / total:.0%}" for name, count in shares)


COLUMNS = ("increase, %", "KL, nats", "top-1", "diverges", "bits/weight", "weights", "types", "within")


def cells(row: Row, budget: float) -> list[str]:
    """A row of the table, as `COLUMNS`."""
    if row["error"] is not None:
        return ["failed", *["–"] * (len(COLUMNS) - 1)]
    away = row["divergence"]
    return [
        increase(row).replace("%", ""),
        f"{row['kl']:.5f}",
        f"{row['agreement']:.1%}",
        "–" if away is None else f"{away['median']:g} of {away['tokens']}",
        f"{row['bits']:.2f}",
        _size(row),
        _formats(row),
        "yes" if within(row, budget) else "no",
    ]


def terminal(result: Result) -> None:
    console = Console()
    shown = [index for index, name in enumerate(COLUMNS) if name not in ("top-1", "diverges", "types")]
    table = Table("", *(COLUMNS[index] for index in shown), title=_about(result))
    for row in result["rows"]:
        style = "bold" if row["role"] == "ours" else "dim" if row["role"] == "other" else None
        texts = cells(row, result["budget"])
        table.add_row(row["name"].replace("`", ""), *(texts[index] for index in shown), style=style)
    console.print(table)
    for verdict in verdicts(result):
        console.print(f"{verdict.name}: {verdict.word} ({verdict.detail})".replace("**", ""), markup=False)
    for line in _remarks(result):
        console.print(line, style="dim", markup=False)


def _remarks(result: Result) -> list[str]:
    """What is to be said of rows, each word once."""
    found: dict[str, list[str]] = {}
    for row in result["rows"]:
        if text := row["error"] or row["remark"]:
            found.setdefault(text, []).append(row["name"])
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def _about(result: Result) -> str:
    return f"{result['model']}, {result['weights'] / 1e6:.2f} M weights"


def keep(results: Sequence[Result]) -> None:
    """Put results into docs/quality_table.json, in place of those of the same models, and write the page."""
    kept: dict[str, Result] = {}
    for result in (*(json.loads(DOCUMENT.read_text("utf-8")) if DOCUMENT.exists() else ()), *results):
        kept[result["model"]] = result
    found = sorted(kept.values(), key=lambda result: (-result["weights"], result["model"]))
    partial = DOCUMENT.with_name(f".{DOCUMENT.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    partial.replace(DOCUMENT)
    write(DOCUMENT.with_suffix(".md"), *page(found))


def page(results: Sequence[Result]) -> tuple[str, str]:
    """docs/quality_table.md and its picture."""
    return HEAD + "".join(map(_section, results)), picture(results)


def _section(result: Result) -> str:
    ruler, where = result["protocol"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    bos = "no bos" if ruler["bos"] is None else f"bos {ruler['bos']}"
    lines = [
        f"\n## {_about(result)}\n",
        f"Perplexity of the reference {result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits per byte, on "
        f"{result['tokens']:,} tokens ({result['bytes']:,} bytes) of {result['text']}: {ruler['documents']} document"
        f"{'' if ruler['documents'] == 1 else 's'} in {ruler['windows']} windows of {ruler['window']} tokens, stride "
        f"{ruler['stride']}, {bos}, sha256 `{ruler['sha256'][:16]}…`. {where['cpu']}, {result['date']}; {versions}; "
        f"{result['provenance']}.\n",
        f"| | | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for row in result["rows"]:
        name = f"**{row['name']}**" if row["role"] == "ours" else row["name"]
        lines.append(f"| {row['mark']} | {name} | {' | '.join(cells(row, result['budget']))} |")
    lines += ["\n| asked | | found |", "|---|---|---|"]
    lines += [f"| {verdict.name} | {verdict.word} | {verdict.detail} |" for verdict in verdicts(result)]
    lines += [f"\n{line}" for line in _remarks(result)]
    return "\n".join(lines) + "\n"


def picture(results: Sequence[Result]) -> str:
    found = {
        _about(result): [
            Dot(row["bits"], row["increase"], row["mark"], f"{row['name']}: {increase(row)} at {row['bits']:.2f} bits",
                row["role"] == "ours")
            for row in result["rows"]
            if row["error"] is None and row["role"] != "other"
        ]
        for result in results
    }  # fmt: skip
    names = {row["mark"]: row["name"] for result in results for row in result["rows"]}
    drawn = dict.fromkeys(dot.mark for dots in found.values() for dot in dots)
    return str(
        panels(
            "Increase of perplexity over bits per weight: lower left is better", found, _budget(results),
            "bits per weight", [f"{mark}: {names[mark].replace('`', '')}" for mark in drawn],
        )
    )  # fmt: skip


def _budget(results: Sequence[Result]) -> float:
    """The strictest of the budgets, which is the one that is drawn."""
    return float(min((result["budget"] for result in results), default=0.01))


HEAD = """# Quality against size

<!-- Written by benchmarks/quality.py; the text is in benchmarks/quality_runs/report.py. -->

![Increase of perplexity over bits per weight, a panel for each model](quality_table.svg)

Each form of a model predicts the same tokens in the same windows as the model with its weights in f32, its reference
([the protocol](quality.md)). The text is in two parts that share no document: forms that are fitted to a text get the
first, all are judged by the second.

* **increase**: of perplexity over the reference's, in percent, with its standard error. **within**: whether the
  increase is at most the budget. **KL**: from the reference's distributions, nats a token. **top-1**: how often both
  hold the same token for the likeliest. **diverges**: after how many tokens a greedy continuation is another one, the
  median of up to 8 documents.
* **bits/weight, weights**: matrices and tables with their scales and zero points, tied ones once, without norms.
  **types**: shares of the weights.
* edgert, NNCF and optimum-intel are judged in f32 arithmetic with a cache in f32 (`CPU@f32`), so what is compared is
  weights; llama.cpp in its own arithmetic, with its own cache (f16). NNCF compresses the f16 model without data, in
  groups of 128; optimum-intel's command line runs as it comes; llama.cpp quantizes from f32 without an importance
  matrix.
* In the picture a hollow dot at the bottom is an increase of less than a hundredth of the budget, or none.
* The models are small, and small models are more sensitive to INT4 than those of half a billion weights and more.
"""

"""What the service costs, carries and survives: `make bench-service` (Linux).

make bench-service                                   # all, half an hour: docs/service_measured.json and .md
make bench-service ARGS="--parts rest overhead"      # some, into the same files
make bench-service ARGS="--minutes 1 --faults 20"    # shorter

throughput   8 clients at once beside one after the other, in turns
overhead     time from token to token and to the first one, over HTTP and in this process, in turns
rest         memory of an unloaded service, CPU time of a loaded one that nobody asks
load         64 clients of all manners: is every answer the one it would be alone, does memory grow
faults       workers killed, hanging and computing NaN while they answer: is every answer whole
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from peers import machine
from rich.console import Console
from rich.progress import Progress
from service_runs import cost, faults, load
from service_runs.host import Host
from shapes import BUILD, ROOT

import edgert

DOCUMENT = ROOT / "docs" / "service_measured.json"
DEVICE = "CPU@kernels"
PARTS = ("throughput", "overhead", "rest", "load", "faults")
CLIENTS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUILD.parent / "demo.edge")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    measured = json.loads(DOCUMENT.read_text("utf-8")) if DOCUMENT.exists() else {}
    with Progress(console=Console(stderr=True)) as progress:
        for part in options.parts:
            task = progress.add_task(part, total=1.0)
            found = asyncio.run(_run(part, options, lambda share, task=task: progress.update(task, completed=share)))
            progress.update(task, completed=1.0)
            measured[part] = {"measured": datetime.date.today().isoformat(), "version": edgert.__version__, **found}
            measured["machine"] = machine()
            _write(DOCUMENT, json.dumps(measured, indent=1) + "\n")
            _write(DOCUMENT.with_suffix(".md"), report(measured))
    Console(markup=False).print(report(measured))
    return 0


async def _run(part: str, options: argparse.Namespace, progress: Callable[[float], None]) -> dict[str, Any]:
    flags = [*{"faults": faults.FLAGS, "load": ("--queue", str(CLIENTS))}.get(part, ())]
    with Host(options.bundle, *flags, faulty=part == "faults") as host:
        doing: Coroutine[Any, Any, Any]
        if part == "load":
            doing = load.run(host, clients=CLIENTS, seconds=60 * options.minutes, seed=options.seed, progress=progress)
        elif part == "faults":
            doing = faults.run(host, count=options.faults, seed=options.seed, progress=progress)
        elif part == "rest":
            doing = cost.rest(host, seconds=60.0)
        elif part == "overhead":
            doing = cost.overhead(host, options.bundle, DEVICE, rounds=options.rounds, seed=options.seed)
        else:
            doing = cost.throughput(host, rounds=options.rounds, seed=options.seed)
        found = await doing
    return found if isinstance(found, dict) else found.to_json()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def report(measured: dict[str, Any]) -> str:
    """A table for people."""
    rows: list[tuple[str, str]] = []
    if part := measured.get("throughput"):
        rows.append((
            f"{part['clients']} clients at once, tokens/s beside one after the other",
            f"{part['together_tokens_per_second']:.0f} / {part['serial_tokens_per_second']:.0f} = {part['ratio']:.2f}x",
        ))  # fmt: skip
    if part := measured.get("overhead"):
        rows.append((
            "a token over HTTP, in the process, more",
            f"{part['http_ms']:.2f} ms, {part['in_process_ms']:.2f} ms, {part['overhead_ms']:.2f} ms",
        ))  # fmt: skip
        rows.append(("of a token over HTTP, inside the devices", f"{part['device_ms']:.2f} ms"))
        rows.append(("first byte after queue and prefill", f"{part['first_byte_ms']:.1f} ms"))
    if part := measured.get("rest"):
        rows.append(("CPU time of a loaded service at rest", f"{part['cpu_share_of_a_core']:.3%} of a core"))
        rows.append((
            "memory of the server: while its model is being loaded, after it was unloaded",
            f"{part['fresh_mb']:.1f} MB, {part['unloaded_mb']:.1f} MB",
        ))  # fmt: skip
    if part := measured.get("load"):
        requests = part["requests"]
        wrong, failed = requests.get("wrong text", 0), requests.get("failed", 0)
        total = sum(requests.values()) - wrong - failed
        rows.append((
            f"{part['clients']} clients, {part['seconds'] / 60:.0f} minutes: requests, wrong answers, failed",
            f"{total}, {wrong}, {failed}",
        ))  # fmt: skip
        rows.append(("growth of memory", f"{part['memory_growth']:+.1%}"))
        queue = part["queue_ms"]
        rows.append((
            "admission, median / p99 / worst",
            f"{queue['median']:.0f} / {queue['p99']:.0f} / {queue['worst']:.0f} ms",
        ))  # fmt: skip
    if part := measured.get("faults"):
        rows.append(("faults, answers, wrong ones", f"{part['faults']}, {part['answers']}, {part['wrong']}"))
        for kind, times in part["recovery_s"].items():
            rows.append((
                f"next token after a fault ({kind}, {times['count']}), median / worst",
                f"{times['median']:.2f} / {times['worst']:.2f} s",
            ))  # fmt: skip
    cpu = measured["machine"]
    lines = [
        f"{cpu['cpu']}, {cpu['cores']} cores; the demo model on {DEVICE}. `make bench-service` makes this page.",
        "",
    ]
    lines += ["| | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

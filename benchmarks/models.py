"""Every family of tests/tiny_models.py through every part of edgert: `make models`.

make models                             # all, hours: docs/models_measured.json and docs/models.md
make models ARGS="llama4 gemma4_moe"    # some, into the same files
make models ARGS="--steps export fit"   # some of what is tried; `--steps page` only writes the page anew
make models ARGS="gemma3 --steps media" # one of those with images or sound

export        the general route, and where the model can be cut
parity        logits against transformers in f32: a prompt longer than any window, at once and in pieces, 64 tokens more
fp16          `edgert compile` with its gate and every cut, and what the bundle writes, twice
int8, int4    the same, compressed
placements    logits of plans against those of the uncut model
fit           weights, caches and operations by the configuration alone, against the compiled model
npu_recipe    what `edgert.npu.recipe` finds
npu_compile   Intel's NPU compiler for every block, where it is set up (edgert doctor --setup npu-compiler)
optimum       the export of optimum-intel, with the same gate
media         instead of all that, those of tests/tiny_multimodal.py: whole models with images and sound
diffusion     those of tests/tiny_diffusion.py: the transformers of pipelines

Each family runs in a process of its own; what it has found is kept as it goes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models_runs import page
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "models_measured.json"
PAGE = ROOT / "docs" / "models.md"
CHILD = Path(__file__).parent / "models_runs" / "steps.py"
STEPS = (
    "export", "parity", "fp16", "int8", "int4", "placements", "fit", "npu_recipe", "npu_compile", "optimum",
)  # fmt: skip

sys.path.insert(0, str(ROOT / "tests"))
from tiny_diffusion import FAMILIES as DIFFUSION  # noqa: E402 - the tests' folder is not on the path before
from tiny_models import TABLE  # noqa: E402
from tiny_multimodal import TABLE as MEDIA  # noqa: E402

WHOLE: dict[str, Collection[str]] = {"media": MEDIA, "diffusion": DIFFUSION}  # tables of their own, with a step each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--steps", nargs="+", choices=[*STEPS, *WHOLE, "page"], default=[*STEPS])
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of a family")
    options = parser.parse_args()
    whole = {kind: table for kind, table in WHOLE.items() if options.steps == [kind]}
    tables: dict[str, Collection[str]] = whole or {"families": TABLE}
    if not options.families and set(options.steps) == set(STEPS):
        tables |= WHOLE
    unknown = [name for name in options.families if not any(name in table for table in tables.values())]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(n for t in tables.values() for n in t)}")
    jobs = [(kind, n) for kind, table in tables.items() for n in table if not options.families or n in options.families]
    measured: dict[str, Any] = json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {}
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("families", total=len(jobs))
        for kind, name in jobs if options.steps != ["page"] else []:
            progress.update(task, description=name)
            asked = [kind] if kind in WHOLE else options.steps
            found = _family(name, asked, options.timeout)
            rows = measured.setdefault(kind, {})
            known = rows.get(name, {}).get("steps", {})
            rows[name] = _row({**{step: known[step] for step in known if step not in asked}, **found})
            measured["provenance"] = "checked: tiny models with random weights; no speeds"
            measured[kind] = {family: rows[family] for family in tables[kind] if family in rows}
            _write(MEASURED, json.dumps(measured, indent=1) + "\n")
            _write(PAGE, page.page(measured, TABLE))
            failed = [f"{step}: {result['error']}" for step, result in found.items() if "error" in result]
            console.print(f"{name}: {'; '.join(failed) or 'all passed'}", markup=False, highlight=False)
            progress.advance(task)
    _write(PAGE, page.page(measured, TABLE))
    return 0


def _row(steps: dict[str, Any]) -> dict[str, Any]:
    """What the file keeps of a family."""
    return {
        "checked": datetime.date.today().isoformat(),
        **{package: version(package) for package in ("transformers", "openvino", "edgert")},
        "steps": {step: steps[step] for step in (*STEPS, *WHOLE) if step in steps},
    }


def _family(name: str, steps: list[str], timeout: float) -> dict[str, Any]:
    """The outcomes of a family's steps; a step that never ends, or takes the process with it, has an error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        command = [sys.executable, str(CHILD), name, str(out), *steps]
        code, out_of_time = 0, False
        try:
            ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout)
            code = ended.returncode
            lines = ended.stderr.decode(errors="replace").strip().splitlines()
            why = f"the process ended with {code}: {lines[-1][:300] if lines else ''}"
        except subprocess.TimeoutExpired:
            out_of_time, why = True, f"not done after {timeout:g} s"
        found: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    missing = next((step for step in (*STEPS, *WHOLE) if step in steps and step not in found), None)
    ended_early = out_of_time or code != 0
    if missing is not None and ended_early:
        found[missing] = {"error": why}
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())

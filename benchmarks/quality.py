"""How much quality each way to compress a model costs, on the same tokens: edgert, NNCF, optimum-intel, llama.cpp.

    make bench-quality ARGS="--shared ../shared --keep"
    make bench-quality ARGS="--models FOLDER… --text FILE --entries nncf-int4 llama-q4-k-m"

Text is cut in two: forms are fitted to the first part where they are fitted at all, and judged by the second. What was
made and measured stays in build/bench-quality and is not done again while nothing of it changed. llama.cpp comes from
build/peers, which `make bench-quality` sets up.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peers import machine
from quality_runs.entries import ENTRIES
from quality_runs.judge import Judge, Settings
from quality_runs.report import DOCUMENT, keep, terminal
from rich.console import Console
from shapes import ROOT

BUILD = ROOT / "build" / "bench-quality"
BOOKWORM = ROOT / "examples" / "models" / "bookworm"
# In a folder that --shared names: models, and what each of them was trained to read.
SHARED = {"stories-3m": "tinystories-400.txt", "stories-260k": "tinystories-400.txt", "bookworm": "books-heldout.txt"}


def chosen(models: list[Path], text: Path | None, shared: Path | None) -> list[tuple[Path, Path]]:
    """Models with their texts.

    Raises:
        ValueError: a model has no text.
    """
    found = [*models] or [BOOKWORM]
    if shared is not None and not models:
        found += [path for name in SHARED if (path := shared / "models" / name).is_dir()]
    pairs = []
    for model in found:
        file = text or (shared / "corpora" / SHARED[model.name] if shared and model.name in SHARED else None)
        if file is None or not file.is_file():
            raise ValueError(f"{model}: no text to judge it by{f': {file} is no file' if file else ''}")
        pairs.append((model.resolve(), file))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [entry.key for entry in ENTRIES]
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="as transformers writes them")
    parser.add_argument("--text", type=Path, help="a UTF-8 file, for all of --models")
    parser.add_argument("--shared", type=Path, help="a folder with more models and with texts for them")
    parser.add_argument("--entries", nargs="+", choices=keys, default=keys)
    parser.add_argument("--anew", nargs="*", choices=keys, help="make and judge these again; without names all")
    parser.add_argument("--budget", type=float, default=0.01, help="allowed rise of perplexity, 0.01 is one percent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=240_000, help="of a text, that are used at most")
    parser.add_argument("--window", type=int, default=512, help="tokens, at most the model's context")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--keep", action="store_true", help=f"put them into {DOCUMENT.relative_to(ROOT)} and its page")
    options = parser.parse_args()
    try:
        pairs = chosen(options.models, options.text, options.shared)
    except ValueError as error:
        parser.error(str(error))
    anew = frozenset(() if options.anew is None else options.anew or keys)
    settings = Settings(options.budget, options.seed, options.characters, options.window, BUILD, anew)
    progress, where, results = Console(stderr=True), machine(), []
    for model, text in pairs:
        judge = Judge(model, text, settings, progress)
        result = judge.result(entry for entry in ENTRIES if entry.key in options.entries)
        results.append({**result, "machine": where})
        terminal(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if options.keep:
        keep(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

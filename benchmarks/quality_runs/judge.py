"""One model and one text: its forms are made, judged beside the reference, and remembered."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quality_runs import entries, gguf_file, texts, weights
from quality_runs.entries import Entry, Source
from quality_runs.llama import Llama
from rich.console import Console
from runtimes import gguf_writer
from runtimes.install import LLAMA

import edgert
from edgert.bundle import Bundle
from edgert.evaluation import Evaluation, Logits, Scorer, evaluate, read_documents
from edgert.scorers import bundle_scorer, exact_plan, folder_scorer
from edgert.text import Tokenizer

PARTS, EDGERT, CONVERTERS = Path(__file__).parent, Path(edgert.__file__).parent, Path(entries.compress.__file__).parent
# What decides a figure beside model, text and the versions of packages.
RULER = (*(EDGERT / f"{name}.py" for name in ("likelihood", "evaluation", "scorers")), PARTS / "weights.py")
MAKERS = (
    *(PARTS / f"{name}.py" for name in ("entries", "llama", "llama_worker")),
    Path(gguf_writer.__file__),
)
ROW, BASIS = "row.json", "basis.json"
ROOM = 1 << 30  # bytes of logits


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        budget: the increase of perplexity that is allowed.
        seed: of edgert's search.
        characters: of the text, that are used at most.
        window: tokens at most.
        folder: where forms and figures stay.
        anew: keys of entries that are made again even if they are there.
    """

    budget: float
    seed: int
    characters: int
    window: int
    folder: Path
    anew: frozenset[str] = frozenset()


class Remembering(Scorer):
    """What another one predicted, kept as far as there is room: one reference is read for all forms."""

    def __init__(self, scorer: Scorer, room: int = ROOM) -> None:
        self.name, self.vocab_size = scorer.name, scorer.vocab_size
        self._scorer, self._room = scorer, room
        self._logits: dict[tuple[int, ...], Logits] = {}
        self._greedy: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def logits(self, tokens: Sequence[int]) -> Logits:
        key = tuple(tokens)
        found = self._logits.get(key)
        if found is None:
            found = self._scorer.logits(tokens)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._logits[key] = found
        return found.copy()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        key = tuple(prompt), count
        if key not in self._greedy:
            self._greedy[key] = self._scorer.greedy(prompt, count)
        return [*self._greedy[key]]


class Judge:
    """Makes and judges forms of a model.

    Args:
        model: a folder as transformers writes it.
        text: a UTF-8 file.
    """

    def __init__(self, model: Path, text: Path, settings: Settings, progress: Console) -> None:
        self._model, self._text, self._settings, self._progress = model, text, settings, progress
        self._folder = settings.folder / model.name
        self._folder.mkdir(parents=True, exist_ok=True)
        calibration, judged = texts.write_halves(text, self._folder, settings.characters)
        self._documents, self._tokenizer = read_documents(judged), Tokenizer.open(model)
        config = json.loads((model / "config.json").read_text("utf-8"))
        self._window = min(config["max_position_embeddings"], settings.window)
        trained = _digest([model / "config.json", *sorted(model.glob("*.safetensors"))])
        self._basis = [trained, _digest([judged, *RULER, *MAKERS]), str(self._window)]
        exact = self._once("exact", [trained, versions(["openvino"])], lambda to: entries.exact(model, to))
        self._source = Source(model, calibration, exact, settings.budget, settings.seed)
        self._reference: Scorer | None = None

    def result(self, chosen: Iterable[Entry]) -> dict[str, Any]:
        """All that is known of the model: `report` says how it reads.

        Raises:
            RuntimeError: nothing could be measured.
        """
        rows = [self._row(entry) for entry in chosen]
        first = next((row for row in rows if row["error"] is None), None)
        if first is None:
            raise RuntimeError(f"{self._model}: nothing could be measured: {rows[0]['error'] if rows else 'no entry'}")
        common = ("reference_perplexity", "tokens", "bytes", "protocol")
        perplexity, tokens, size, protocol = (first["evaluation"][name] for name in common)
        return {
            "model": self._model.name,
            "weights": weights.of_ir(self._source.exact / entries.IR).count,
            "date": datetime.date.today().isoformat(),
            "provenance": "measured",
            "budget": self._settings.budget,
            "text": f"{self._text.name}, the second part",
            "tokens": tokens,
            "bytes": size,
            "perplexity": perplexity,
            "bits_per_byte": math.log2(perplexity) * tokens / size,
            "protocol": protocol,
            "versions": {**versions(["edgert", "openvino", "nncf", "optimum-intel"]), **_llama_version()},
            "rows": [_flat(row) for row in rows],
        }

    def _row(self, entry: Entry) -> dict[str, Any]:
        about = {"key": entry.key, "mark": entry.mark, "name": entry.name, "role": entry.role}
        folder, basis = self._folder / entry.key, [*self._basis, versions(entry.packages)]
        if entry.kind == "gguf":
            basis.append(_llama_version())
        if entry.kind == "bundle":
            basis.append(_digest(sorted([*EDGERT.rglob("*.py"), *CONVERTERS.rglob("*.py")])))
        if entry.budgeted:
            basis += [_digest([self._source.calibration]), self._source.budget, self._source.seed]
        known = folder / ROW
        if entry.key not in self._settings.anew and known.exists():
            found: dict[str, Any] = json.loads(known.read_text("utf-8"))
            if found.pop("basis") == basis:
                self._say(entry, "as it was")
                return {**about, **found}
        self._say(entry, "make")
        start = time.perf_counter()
        log = self._folder / f"{entry.key}.log"
        log.unlink(missing_ok=True)
        try:
            remark = ""

            def make(to: Path) -> None:
                nonlocal remark
                remark = entry.make(self._source, to, log)

            self._fresh(folder, make)
            took = time.perf_counter() - start
            self._say(entry, "judge")
            evaluation, size = self._judge(entry, folder, log)
        except Exception as error:  # of whatever tool: the others go on
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._say(entry, text)
            return {**about, "error": text, "remark": ""}
        found = {
            "error": None, "remark": remark, "seconds": took, "weights": size.count, "size": size.bytes,
            "bits": size.bits, "formats": size.formats,
            "evaluation": json.loads(json.dumps(evaluation.to_json())),  # as it will be read again
        }  # fmt: skip
        _write(known, {**found, "basis": basis})
        return {**about, **found}

    def _judge(self, entry: Entry, folder: Path, log: Path) -> tuple[Evaluation, weights.Weights]:
        if entry.kind == "gguf":
            with log.open("ab") as stream, Llama(stream) as llama:
                llama.load(folder / entries.GGUF, self._window, os.cpu_count() or 1)
                return self._evaluate(llama), gguf_file.weights(folder / entries.GGUF)
        if entry.kind == "ir":
            return self._evaluate(folder_scorer(folder)), weights.of_ir(folder / entries.IR)
        bundle = Bundle.open(folder / entries.BUNDLE)
        return self._evaluate(bundle_scorer(bundle, exact_plan(bundle))), weights.of_ir(bundle.path / "model.xml")

    def _evaluate(self, scorer: Scorer) -> Evaluation:
        if self._reference is None:
            self._reference = Remembering(folder_scorer(self._source.exact))
        return evaluate(
            scorer, self._reference, self._documents, self._tokenizer.encode_with_ends,
            window=self._window, stride=self._window // 2, bos=self._tokenizer.prefix(),
        )  # fmt: skip

    def _once(self, name: str, basis: Sequence[Any], make: Callable[[Path], object]) -> Path:
        folder = self._folder / name
        known = folder / BASIS
        if not known.exists() or json.loads(known.read_text("utf-8")) != basis:
            self._fresh(folder, make)
            _write(known, basis)
        return folder

    def _fresh(self, folder: Path, make: Callable[[Path], object]) -> None:
        """A folder that is there only if it is whole."""
        partial = folder.with_name(f"partial-{folder.name}")
        for old in (partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        make(partial)
        partial.rename(folder)

    def _say(self, entry: Entry, text: str) -> None:
        self._progress.print(f"{self._model.name}, {entry.key}: {text}", style="dim", markup=False)


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def _llama_version() -> dict[str, str]:
    name, _, version = LLAMA.partition("==")
    return {name: version}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is kept: of the evaluation what differs from row to row."""
    found = {name: value for name, value in row.items() if name not in ("evaluation", "size")}
    if row["error"] is not None:
        return found
    names = ("perplexity", "increase", "standard_error", "kl", "agreement", "divergence")
    return {**found, "bytes": row["size"], **{name: row["evaluation"][name] for name in names}}


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    partial.replace(path)

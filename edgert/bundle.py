"""The bundle: one folder that holds a compiled model, and the only contract between build machine and device.

`docs/bundle.md` describes the format. A bundle is written under a temporary name and renamed when it is whole; what is
read from one is checked before it is believed: no path may leave the folder, no link is followed, sizes must agree, and
`verify()` compares every hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from edgert.errors import BundleError, BundleVersionError, UsageError
from edgert.fields import build, check_rows
from edgert.graph import BlockGraph

if TYPE_CHECKING:
    from edgert.media.spec import MediaSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPH = "graph.json"
TOKENIZER = "tokenizer"
MEDIA = "media.json"
TOWERS = "towers"
DENOISER = "denoiser.json"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
MAX_NAME = 255
PRECISION_COLUMNS = {"role": str, "precision": str, "tensors": int, "elements": int, "bytes": int}
CHECK_COLUMNS = {"check": str, "relative_error": float, "limit": float, "against": str}
QUALITY_COLUMNS = {
    "budget": float, "met": bool, "increase": float, "standard_error": float, "bound": float, "perplexity": float,
    "reference": float, "text": str, "sha256": str, "tokens": int, "config": str,
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know of a model and cannot see in its graph.

    Attributes:
        name: a name for people; never a path.
        task: `decoder` (text generation), `encoder` (embeddings) or `denoiser` (a diffusion transformer).
        format: `openvino` (model.xml, model.bin) or `onnx` (model.onnx).
        architecture: the source's model type, e.g. `qwen3`.
        vocab_size: rows of the embedding table; 0 for a denoiser.
        hidden_size: width of the residual stream.
        context_length: the largest number of tokens, prompt and answer together; 0 for a denoiser.
        num_layers: layers of the model.
        eos_token_ids: tokens that end a generation.
        bos_token_id: token that some tokenizers put first; None where there is none.
        weights: what was asked for, `fp16`, `int8` or `int4`, or `source` where the source was kept as it was.
        parameters: number of weights.
        pooling: for an encoder, how token vectors become one: `mean` or `cls`; None for any other task.
    """

    name: str
    task: Literal["decoder", "encoder", "denoiser"]
    format: Literal["openvino", "onnx"]
    architecture: str
    vocab_size: int
    hidden_size: int
    context_length: int
    num_layers: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    weights: str
    parameters: int
    pooling: Literal["mean", "cls"] | None = None


@dataclass(frozen=True)
class Report:
    """What the build machine did and found out, for people and for later stations.

    Attributes:
        source: kind of source and its name, e.g. `huggingface: Qwen3-0.6B`.
        tools: package versions, e.g. `{"openvino": "2026.4.1", "nncf": "3.4.0"}`.
        precisions: what became which precision: rows with `PRECISION_COLUMNS`.
        checks: gates passed: rows with `CHECK_COLUMNS`.
        quality: what the precisions cost, where they were chosen for a budget: with `QUALITY_COLUMNS`. `budget`,
            `increase`, its `standard_error` and `bound` (what it is below, with 95 % confidence) are relative, 0.01 for
            1 %, of `perplexity` above `reference`, the source's; `sha256` is of the tokens of `text`, `tokens` of
            which were judged, on `config`. The file quality.json has the rest.
    """

    source: str
    tools: dict[str, str]
    precisions: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `Bundle.open` is the way to get one."""

    path: Path
    facts: ModelFacts
    report: Report
    graph: BlockGraph | None
    files: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Bundle:
        """Open a bundle and check its structure; `verify=True` also compares every file with its hash.

        Raises:
            BundleError: the folder or a file is missing, truncated, linked, or outside of what the format allows.
            BundleVersionError: the format is newer than this edgert.
        """
        root = Path(path)
        try:
            found = root.is_dir()
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise BundleError(f"bundle {root}: {error.strerror}") from error
        if not found:
            raise BundleError(f"bundle {root}: no such folder")
        manifest = read_json(root, MANIFEST)
        version = manifest.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"bundle {root}: format_version is {version!r}, expected an integer from 1")
        if version > FORMAT_VERSION:
            raise BundleVersionError(
                f"bundle {root}: format version {version} is newer than {FORMAT_VERSION}, the newest this edgert reads"
            )
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise BundleError(f"bundle {root}: the manifest lists no files")
        for name, entry in files.items():
            _check_file(root, name, entry)
        _check_nothing_else(root, set(files))
        try:
            facts = _facts(manifest.get("model"))
            report = build(Report, manifest.get("report"), "report")
            check_rows(report.precisions, PRECISION_COLUMNS, "report.precisions")
            check_rows(report.checks, CHECK_COLUMNS, "report.checks")
            _check_quality(report.quality)
        except ValueError as error:
            raise BundleError(f"bundle {root}: manifest: {error}") from error
        main = "model.xml" if facts.format == "openvino" else "model.onnx"
        for needed in (
            main,
            *(["model.bin"] if facts.format == "openvino" else []),
            *([DENOISER] if facts.task == "denoiser" else []),
        ):
            if needed not in files:
                raise BundleError(f"bundle {root}: the manifest lists no {needed}")
        graph = BlockGraph.from_json(read_json(root, GRAPH)) if GRAPH in files else None
        bundle = cls(root, facts, report, graph, files)
        if verify:
            bundle.verify()
        return bundle

    @property
    def model_path(self) -> Path:
        return self.path / ("model.xml" if self.facts.format == "openvino" else "model.onnx")

    @property
    def fingerprint(self) -> str:
        """What tells this model, down to its weights, from any other: 16 hexadecimal digits."""
        own = ("model.", MEDIA, f"{TOWERS}/")  # an image's keys and values are those of its tower, too
        hashes = [entry["sha256"] for name, entry in sorted(self.files.items()) if name.startswith(own)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    def require_text(self) -> None:
        """Raise `UsageError` where the model neither takes nor makes text: a denoiser."""
        if self.facts.task == "denoiser":
            raise UsageError(f"bundle {self.path}: a denoiser makes no text; edgert.load_denoiser opens it")

    @cached_property
    def media(self) -> MediaSpec | None:
        """What it takes beside text; None where that is all.

        Raises:
            BundleError: media.json is damaged, or names a tower or a token that is not there.
        """
        if MEDIA not in self.files:
            return None
        from edgert.media.spec import read  # which a model of text need not wait for

        spec = read(self.path / MEDIA)
        for part in (spec.image, spec.audio):
            for name in (f"{TOWERS}/{part.tower}/model.{ending}" for ending in ("xml", "bin")) if part else ():
                if name not in self.files:
                    raise BundleError(f"bundle {self.path}: the manifest lists no {name}, which {MEDIA} needs")
            size = self.facts.vocab_size  # the placeholder may lie behind it: it is never run
            if part is not None and (wrong := next((token for token in part.own if token >= size), None)) is not None:
                raise BundleError(f"bundle {self.path}: {MEDIA}: token {wrong} is outside the vocabulary of {size}")
        return spec

    def tower_path(self, name: str) -> Path:
        """The model of a tower that `media` names."""
        return self.path / TOWERS / name / "model.xml"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def verify(self, progress: Callable[[str], None] | None = None) -> None:
        """Compare every file with its hash; `progress` is told each name first.

        Raises:
            BundleError: a hash differs; the message names the file.
        """
        for name, entry in self.files.items():
            if progress:
                progress(name)
            found = sha256(self.path / name)
            if found != entry["sha256"]:
                raise BundleError(
                    f"bundle {self.path}: {name} has hash {found[:12]}…, expected {entry['sha256'][:12]}…"
                )


@contextmanager
def create(out: str | Path, *, overwrite: bool = False) -> Iterator[Draft]:
    """Write a bundle: fill the draft's folder, call `finish`, and it appears at `out` when the block ends.

    Anything that goes wrong inside, Ctrl-C and a full disk included, removes the draft and leaves `out` as it was.

    Raises:
        UsageError: `out` exists and `overwrite` is false, or it exists and is no bundle.
        BundleError: the disk did not take it.
    """
    out = Path(out)
    if out.is_symlink():
        raise UsageError(f"output {out} is a symbolic link; give the place itself")
    if out.exists():
        if not overwrite:
            raise UsageError(f"output {out} exists already; pass --force to replace it")
        if not (out / MANIFEST).is_file():
            raise UsageError(f"output {out} exists and is no bundle; edgert will not replace it")
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        draft = Draft(folder)
        yield draft
        if not draft.finished:
            raise BundleError(f"bundle {out}: left unfinished")
        folder.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            aside = folder.with_suffix(".old")
            out.rename(aside)
            try:
                folder.rename(out)
            except BaseException:
                aside.rename(out)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            folder.rename(out)
    except OSError as error:
        raise BundleError(f"bundle {out}: cannot be written: {error}") from error
    finally:
        if folder is not None:  # nothing there once it has its own name
            shutil.rmtree(folder, ignore_errors=True)


class Draft:
    """A bundle in the making. Put files under `path`, then call `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished = False

    def finish(self, facts: ModelFacts, report: Report, graph: BlockGraph | None) -> None:
        """Write block graph and manifest; `graph` is None for a model that is run whole (ONNX)."""
        if graph is not None:
            (self.path / GRAPH).write_text(json.dumps(graph.to_json(), indent=1) + "\n", "utf-8")
        files = {}
        for file in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = file.relative_to(self.path).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
            with file.open("rb+") as stream:  # on the disk before the rename is
                os.fsync(stream.fileno())
        manifest = {
            "format_version": FORMAT_VERSION,
            "model": asdict(facts),
            "report": asdict(report),
            "files": files,
        }
        target = self.path / MANIFEST
        with target.open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.finished = True


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _facts(data: Any) -> ModelFacts:
    facts = build(ModelFacts, data, "model")
    for name in ("vocab_size", "hidden_size", "context_length"):
        value, tokens = getattr(facts, name), facts.task != "denoiser" or name == "hidden_size"
        if not tokens and value:
            raise ValueError(f"model: {name} is {value}, expected 0 for a denoiser, which knows no tokens")
        if tokens and not 0 < value < 2**31:
            raise ValueError(f"model: {name} is {value}, expected 1 to 2^31 - 1")
    if (facts.pooling is None) != (facts.task != "encoder"):
        raise ValueError(f"model: pooling is {facts.pooling!r} for task {facts.task!r}")
    return facts


def _check_quality(quality: dict[str, Any] | None) -> None:
    if quality is not None:
        check_rows([quality], QUALITY_COLUMNS, "report.quality")
        for name, kind in QUALITY_COLUMNS.items():
            if kind is float and not math.isfinite(quality[name]):
                raise ValueError(f"report.quality: {name} is {quality[name]}, expected a finite number")


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a bundle; raises `BundleError` where it is missing, too large or holds none."""
    path = root / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"bundle {root}: {name} is missing or no plain file")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"bundle {root}: {name} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} allowed"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"bundle {root}: {name} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"bundle {root}: {name} holds a {type(data).__name__}, expected an object")
    return data


def _check_file(root: Path, name: str, entry: Any) -> None:
    if len(name) > MAX_NAME:
        raise BundleError(f"bundle {root}: a file name has {len(name)} characters, at most {MAX_NAME} allowed")
    parts = PurePosixPath(name).parts
    escapes = not parts or name.startswith("/") or "\\" in name or ":" in name or any(p in {"..", "."} for p in parts)
    if escapes:
        raise BundleError(f"bundle {root}: file name {name!r} points outside the folder")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("bytes"), int)
        or not isinstance(entry.get("sha256"), str)
    ):
        raise BundleError(f"bundle {root}: entry of {name} needs bytes and sha256")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"bundle {root}: {name} is a symbolic link, which bundles may not hold")
    if not path.is_file():
        raise BundleError(f"bundle {root}: {name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BundleError(f"bundle {root}: {name} has {size} bytes, expected {entry['bytes']}")


def _check_nothing_else(root: Path, listed: set[str]) -> None:
    """What the manifest does not list has no hash, so it must not be there to be picked up."""
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            raise BundleError(f"bundle {root}: {name} is a symbolic link, which bundles may not hold")
        if not path.is_dir() and name not in listed and name != MANIFEST:
            raise BundleError(f"bundle {root}: {name} is not listed in the manifest")

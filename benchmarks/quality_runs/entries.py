"""What is compared: how each compressed form of a model is made, and what can be read from it."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openvino as ov
from edgert.converters import compress, pretrained
from quality_runs.llama import Llama
from runtimes import gguf_writer

import edgert

IR = "openvino_model.xml"
BUNDLE = "model.edge"
GGUF = "model.gguf"
GROUP = 128  # of the baselines: NNCF's and optimum-intel's default

Kind = Literal["ir", "bundle", "gguf"]


@dataclass(frozen=True)
class Source:
    """A trained model and where its forms go.

    Attributes:
        model: a folder as transformers writes it.
        calibration: text that forms may be fitted to.
        exact: the model exported with weights in f32, an IR folder.
        budget: the increase of perplexity that is allowed.
        seed: of the search.
    """

    model: Path
    calibration: Path
    exact: Path
    budget: float
    seed: int = 0


Make = Callable[[Source, Path, Path], str]
"""Makes a form of a source in a folder that is there and empty, writing what tools say to a log; returns a remark."""


@dataclass(frozen=True)
class Entry:
    """A form of a model.

    Attributes:
        key: on the command line and in files.
        mark: a few characters, in the picture.
        name: in tables.
        kind: what lies in its folder: an OpenVINO IR, a bundle, or a GGUF file.
        make: see `Make`.
        role: ours, a baseline that ours is compared with, or something to compare by.
        packages: whose versions decide what comes out.
        budgeted: made for the budget, so that its own code and the text decide too.
    """

    key: str
    mark: str
    name: str
    kind: Kind
    make: Make
    role: Literal["ours", "baseline", "other"]
    packages: tuple[str, ...] = ("openvino",)
    budgeted: bool = False


def exact(model: Path, folder: Path) -> None:
    """Export a model with its weights in f32."""
    with pretrained.quiet():
        exported, _, _ = pretrained.convert(model, "general", lambda stage: None)
    ov.save_model(exported, folder / IR, compress_to_fp16=False)
    shutil.copyfile(model / "config.json", folder / "config.json")


def _f16(source: Source) -> ov.Model:
    # Not memory-mapped: weights are replaced in place.
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})
    model = core.read_model(source.exact / IR)
    compress.to_fp16(model)
    return model


def _save(source: Source, model: ov.Model, folder: Path) -> None:
    ov.save_model(model, folder / IR, compress_to_fp16=False)
    shutil.copyfile(source.model / "config.json", folder / "config.json")


def _half(source: Source, folder: Path, log: Path) -> str:
    _save(source, _f16(source), folder)
    return ""


def _nncf(source: Source, folder: Path, log: Path, *, mode: str, **options: Any) -> str:
    """NNCF on the f16 model, without data. Where it refuses a group size, once more with one that fits each matrix."""
    import nncf
    import rich

    logging.getLogger("nncf").setLevel(logging.ERROR)
    call = functools.partial(nncf.compress_weights, mode=nncf.CompressWeightsMode[mode], **options)
    console, remark = rich.get_console(), ""
    quiet, console.quiet = console.quiet, True  # its bars
    try:
        try:
            model = call(_f16(source))
        except nncf.InvalidGroupSizeError:
            adjust = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
            model, remark = call(_f16(source), advanced_parameters=adjust), ADJUSTED
    finally:
        console.quiet = quiet
    _save(source, model, folder)
    return remark


def _optimum(source: Source, folder: Path, log: Path) -> str:
    """`optimum-cli export openvino --weight-format int4`; where it refuses the group size, with one that fits."""
    command = [
        sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "export", "openvino",
        "--model", str(source.model), "--task", "text-generation-with-past", "--weight-format", "int4",
    ]  # fmt: skip
    for more, remark in ((), ""), (("--group-size-fallback", "adjust"), ADJUSTED):
        with log.open("wb") as stream, tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run([*command, *more, scratch], stdout=stream, stderr=subprocess.STDOUT)
            if not done.returncode:
                for file in Path(scratch).glob("*"):
                    file.rename(folder / file.name)
                return remark
        if b"InvalidGroupSizeError" not in log.read_bytes():
            break
    raise RuntimeError(f"optimum-cli ended with {done.returncode}; see {log}")


def _llama(source: Source, folder: Path, log: Path) -> str:
    exact_file = folder / "f32.gguf"
    gguf_writer.write(source.model, exact_file)
    with log.open("ab") as stream, Llama(stream) as llama:
        llama.quantize(exact_file, folder / GGUF)
    exact_file.unlink()
    return ""


def _llama_exact(source: Source, folder: Path, log: Path) -> str:
    gguf_writer.write(source.model, folder / GGUF)
    return ""


def _to(log: Path) -> Callable[[str], None]:
    def say(line: str) -> None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    return say


def _budget(source: Source, folder: Path, log: Path) -> str:
    """The best that is found, even where that misses the budget. A search that was interrupted goes on."""
    out = log.with_suffix(".edge")  # not in the folder, which begins empty: beside it is what a search has found so far
    edgert.compile(
        source.model, out, max_ppl_increase=source.budget, calibration=source.calibration, seed=source.seed,
        kernels=False, force=True, progress=_to(log),
    )  # fmt: skip
    out.rename(folder / BUNDLE)
    found = json.loads((folder / BUNDLE / "quality.json").read_text("utf-8"))
    missed = "" if found["met"] else "; by its own account it misses the budget"
    return f"{found['result']['increase']:+.2%} on the text it was fitted to{missed}"


def _int4(source: Source, folder: Path, log: Path) -> str:
    edgert.compile(source.model, folder / BUNDLE, weights="int4", kernels=False, progress=_to(log))
    return ""


ADJUSTED = f"group {GROUP} is refused for some matrices, which get the largest that fits, or INT8"
_NNCF = ("nncf", "openvino")
_INT4: dict[str, Any] = {"group_size": GROUP, "ratio": 1.0}

ENTRIES: tuple[Entry, ...] = (
    Entry("edgert", "edgert", "edgert, within the budget", "bundle", _budget, "ours", _NNCF, budgeted=True),
    Entry("edgert-int4", "int4", "edgert `--weights int4`", "bundle", _int4, "other", _NNCF),
    Entry("nncf-int4", "a", "NNCF INT4 asymmetric, ratio 1.0", "ir",
          functools.partial(_nncf, mode="INT4_ASYM", **_INT4), "baseline", _NNCF),
    Entry("nncf-int4-sym", "a′", "NNCF INT4 symmetric, ratio 1.0", "ir",
          functools.partial(_nncf, mode="INT4_SYM", **_INT4), "baseline", _NNCF),
    Entry("nncf-int4-0.8", "b", "NNCF INT4 asymmetric, ratio 0.8", "ir",
          functools.partial(_nncf, mode="INT4_ASYM", **{**_INT4, "ratio": 0.8}), "baseline", _NNCF),
    Entry("optimum-int4", "c", "optimum-intel `--weight-format int4`", "ir", _optimum, "baseline",
          ("optimum-intel", *_NNCF)),
    Entry("nncf-int8", "d", "NNCF INT8 asymmetric", "ir",
          functools.partial(_nncf, mode="INT8_ASYM"), "baseline", _NNCF),
    Entry("f16", "e", "f16", "ir", _half, "other"),
    Entry("llama-q4-k-m", "f", "llama.cpp Q4_K_M", "gguf", _llama, "baseline", ()),
    Entry("llama-f32", "g", "llama.cpp, weights in f32", "gguf", _llama_exact, "other", ()),
)  # fmt: skip

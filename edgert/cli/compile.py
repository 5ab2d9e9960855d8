"""`edgert compile`: a model becomes a bundle."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from edgert.bundle import Bundle
from edgert.cli.options import Subparsers, add_objective, console, share
from edgert.errors import UsageError
from edgert.page import size
from edgert.quality_page import QUALITY, QUALITY_PAGE, quality_lines

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
SRC is one of
  a Hugging Face folder or hub id     config.json, *.safetensors, tokenizer.json
  an ONNX file or folder              decoder with past, or encoder; config.json and tokenizer.json beside it
  an OpenVINO IR folder               as optimum-intel and OpenVINO GenAI write it
  a GGUF file                         read by OpenVINO's own frontend, weights as they are
  a diffusers pipeline's folder       LTX-Video, LTX-2: its transformer alone, for edgert.load_denoiser

examples
  edgert compile ./Qwen3-0.6B -o qwen3.edge
  edgert compile ./Qwen3-0.6B -o qwen3.edge --weights int4 --group-size 64 --awq --dataset texts.txt
  edgert compile ./Qwen3-VL-2B -o qwen3-vl.edge --image-size 448x672
  edgert compile model.gguf -o model.edge
  edgert compile ./Qwen3-0.6B -o qwen3.edge --max-ppl-increase 1% --calibration texts.txt
  edgert compile ./Qwen3-0.6B -o qwen3.edge --max-ppl-increase 1% --target lunarlake
  edgert compile ./Qwen3-0.6B -o qwen3.edge --npu 4000,5010

Every export is checked against its source before it is compressed; a wrong one is refused.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("compile", help="turn a model into a bundle", epilog=EPILOG)
    parser.add_argument("src", metavar="SRC", help="the model: see below")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.edge", help="the bundle to write")
    parser.add_argument("--weights", choices=("fp16", "int8", "int4"), help="default: int4")
    parser.add_argument(
        "--group-size", type=int, help="INT4 group size; -1 is per channel (default: 128, with --npu -1)"
    )
    parser.add_argument(
        "--sym", action="store_true", default=None, help="symmetric INT4 (default: asymmetric, with --npu symmetric)"
    )
    parser.add_argument("--awq", action="store_true", help="activation-aware scaling (AWQ)")
    parser.add_argument("--dataset", metavar="FILE", help="text file for data-aware compression")
    parser.add_argument(
        "--exporter", choices=("general", "optimum"), default="general",
        help="how a Hugging Face model is exported (default: general)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("openvino", "onnx"), default="openvino",
        help="onnx makes a bundle that onnxruntime runs whole (default: openvino)",
    )  # fmt: skip
    mixed = parser.add_argument_group(
        "precision by budget",
        "The best mix of INT4, INT8 and f16 whose measured perplexity stays within a limit; instead of --weights.",
    )
    mixed.add_argument("--max-ppl-increase", type=share, metavar="X%", help="over the f16 model's, e.g. 1%% or 0.01")
    mixed.add_argument(
        "--calibration", metavar="FILE", help="UTF-8 text, or a folder of *.txt (default: the model writes one)"
    )
    mixed.add_argument("--target", metavar="PROFILE", help="machine to be best on: a profile's name or file")
    mixed.add_argument("--target-devices", type=_words, metavar="DEVICE[,…]", help="that may run blocks (default: all)")
    mixed.add_argument("--seed", type=int, default=0, help="default: 0")
    add_objective(mixed, "what is best on the target (default: tokens_per_joule)")
    npu = parser.add_argument_group(
        "NPU", "Submodels compiled ahead of time, which needs no NPU; see edgert doctor for the compiler."
    )
    npu.add_argument("--npu", type=_words, default=(), metavar="PLATFORM[,…]", help="e.g. 4000,5010 (default: none)")
    npu.add_argument("--npu-chunks", type=_numbers, metavar="N[,…]", help="tokens of a prefill call (default: 256)")
    npu.add_argument(
        "--npu-buckets", type=_numbers, metavar="N[,…]",
        help="tokens that caches have room for; the last is the limit of a sequence (default: 1024,4096)",
    )  # fmt: skip
    npu.add_argument("--npu-split", action="store_true", help="a submodel for each block, to place any of them alone")
    parser.add_argument(
        "--kernels", action=argparse.BooleanOptionalAction,
        help="weights packed for edgert's CPU kernels, another copy (default: where the kernels load)",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=_size, metavar="HEIGHTxWIDTH",
        help="pixels that the vision tower is made for (default: the model's own, or up to 256 tokens)",
    )  # fmt: skip
    parser.add_argument("--text-only", action="store_true", help="leave out the towers for images and sound")
    parser.add_argument("--name", help="the model's name for people (default: from SRC)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.max_ppl_increase is not None and options.weights is not None:
        raise UsageError(f"--max-ppl-increase chooses precisions, --weights {options.weights} gives one: leave one out")
    from edgert.converters import compile  # brings torch and nncf
    from edgert.converters.npu import DEFAULT_SHAPES
    from edgert.shapes import StaticShapes

    shapes = None
    if options.npu_chunks or options.npu_buckets:
        shapes = StaticShapes(
            options.npu_chunks or DEFAULT_SHAPES.chunks, options.npu_buckets or DEFAULT_SHAPES.buckets
        )
    out = console()
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TextColumn("{task.fields[share]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out) as bars:
        current: list[Any] = []

        def progress(stage: str) -> None:
            if current:
                bars.update(current[-1], total=1, completed=1, share="")
            current.append(bars.add_task(stage, total=None, share=""))

        def advance(done: float) -> None:
            bars.update(current[-1], share=f"{done:.0%}")

        bundle = compile(
            options.src,
            options.output,
            weights=options.weights or "int4",
            group_size=options.group_size,
            sym=options.sym,
            awq=options.awq,
            dataset=options.dataset,
            exporter=options.exporter,
            format=options.format,
            name=options.name,
            force=options.force,
            npu=options.npu,
            npu_shapes=shapes,
            npu_split=options.npu_split,
            kernels=options.kernels,
            max_ppl_increase=options.max_ppl_increase,
            calibration=options.calibration,
            target=options.target,
            target_devices=options.target_devices,
            objective=options.objective,
            seed=options.seed,
            image_size=options.image_size,
            text_only=options.text_only,
            progress=progress,
            advance=advance,
        )
        bars.update(current[-1], total=1, completed=1, share="")
    print_report(out, bundle)
    if bundle.report.quality is not None:
        _print_quality(out, bundle)
    out.print(f"wrote {bundle.path}", soft_wrap=True)
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width or height)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


def _print_quality(out: Console, bundle: Bundle) -> None:
    """What the precisions cost, and what they were chosen from."""
    record = json.loads((bundle.path / QUALITY).read_text("utf-8"))
    table = Table("quality", Column("", overflow="fold"))
    for name, value in quality_lines(record):
        table.add_row(name, value)
    out.print(table)
    out.print(f"every layer, the front and the protocol: {bundle.path / QUALITY_PAGE}", soft_wrap=True)


def print_report(out: Console, bundle: Bundle) -> None:
    """What became which precision, and which checks were passed."""
    table = Table("role", "precision", "tensors", "weights", "size", title="precision")
    for row in bundle.report.precisions:
        group = row.get("group_size")
        scales = "" if group is None else " per channel" if group == -1 else f" groups of {group}"
        cells = (row["role"], row["precision"] + scales, row["tensors"], row["elements"], size(row["bytes"]))
        table.add_row(*map(str, cells))
    out.print(table)
    for check in bundle.report.checks:
        out.print(
            f"check {check['check']}: relative error {check['relative_error']:.1e} "
            f"against {check['against']} (limit {check['limit']:.0e})"
        )

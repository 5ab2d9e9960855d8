"""The way of `edgert.compile`: source -> checked `ov.Model` -> compressed -> bundle."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import openvino as ov
from edgert.converters import quality
from edgert.converters.canonical import DECODER_OUTPUT, canonical_decoder, canonical_encoder
from edgert.converters.compress import Weights, compress, precision_table, read_samples, to_fp16
from edgert.converters.kernels import add_kernels
from edgert.converters.media.bundling import tower_blocks, write_media
from edgert.converters.mixed.bundled import BundledMix
from edgert.converters.mixed.mixing import MixedOptions, save_f16
from edgert.converters.npu import NpuOptions, add_blobs, require_compiler
from edgert.converters.sources import (
    Source,
    Task,
    copy_tokenizer,
    detect,
    encoder_facts,
    facts,
    special_ids,
)
from tokenizers import Tokenizer

import edgert
from edgert.bundle import Bundle, Draft, ModelFacts, Report, create
from edgert.errors import (
    BundleError,
    ConversionError,
    MissingDependencyError,
    ParityError,
    PlanError,
    UsageError,
    cause,
)
from edgert.features import Taken
from edgert.graph import BlockGraph
from edgert.irgraph import make_names_unique
from edgert.partition import annotate, whole

if TYPE_CHECKING:  # which brings torch and transformers
    from edgert.converters.media.compiling import Media

log = logging.getLogger("edgert")

Progress = Callable[[str], None]
Rows = list[dict[str, Any]]
_TOOLS = {
    "huggingface": ("openvino", "nncf", "torch", "transformers"),
    "onnx": ("openvino", "nncf", "onnx", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "gguf": ("openvino", "gguf"),
    "diffusers": ("openvino", "nncf", "torch", "diffusers"),
}


@dataclass(frozen=True)
class Options:
    """The arguments of `edgert.converters.compile`, checked."""

    weights: Weights
    group_size: int
    sym: bool
    awq: bool
    dataset: Path | None
    exporter: Literal["general", "optimum"]
    format: Literal["openvino", "onnx"]
    name: str | None
    force: bool
    npu: NpuOptions | None = None
    kernels: bool = False
    mixed: MixedOptions | None = None
    image_size: tuple[int, int] | None = None
    text_only: bool = False


def build(src: str | Path, out: Path, options: Options, progress: Progress, advance: Callable[[float], None]) -> Bundle:
    """See `edgert.converters.compile`."""
    with ExitStack() as after, create(out, overwrite=options.force) as draft:
        progress("load")
        source, mix = detect(src), None
        graph: BlockGraph | None
        if options.npu is not None:
            require_compiler()  # now, and not after the export
        floats = source.kind in {"huggingface", "diffusers", "onnx"}
        if options.weights != "fp16" and floats and find_spec("nncf") is None:
            raise ModuleNotFoundError("nncf", name="nncf")  # now, and not after the export
        if source.kind == "diffusers":
            _check_torchvision()
            from edgert.converters.diffusion.build import build_denoiser
            from edgert.converters.pretrained import quiet

            with quiet():
                facts_, report, graph = build_denoiser(source, draft, options, progress)
        elif options.format == "onnx":
            if source.kind != "huggingface":
                raise UsageError(f"format 'onnx' needs a Hugging Face model, {source.path} is {source.kind}")
            _check_torchvision()
            from edgert.converters.onnx_bundle import build_onnx

            facts_, report, graph = build_onnx(source, draft, options, progress)
        elif source.kind == "gguf":
            if options.mixed is not None:
                raise UsageError(f"max_ppl_increase needs float weights; those of {source.path} are kept as they are")
            facts_, report, graph = _build_gguf(source, draft, options, progress)
        else:
            if options.mixed is not None:
                mix = BundledMix(after, out, options.mixed, kernels=options.kernels, force=options.force)
            facts_, report, graph = _build_openvino(source, draft, options, progress, advance, mix)
        if options.npu is not None:
            unfinished = Bundle(draft.path, facts_, report, graph, {})
            placed = None if mix is None else mix.on_npu
            if placed == []:
                log.warning("the plan for %s has nothing on an NPU: nothing is compiled for one", out.name)
            else:
                report.checks.append(add_blobs(unfinished, options.npu, progress, placed))
        gc.collect()  # Windows renames no folder with a file that is still memory-mapped
        draft.finish(facts_, report, graph)
    return Bundle.open(out)


def _build_openvino(
    source: Source,
    draft: Draft,
    options: Options,
    progress: Progress,
    advance: Callable[[float], None],
    mix: BundledMix | None,
) -> tuple[ModelFacts, Report, BlockGraph]:
    tokenizer = copy_tokenizer(source.folder, draft.path / "tokenizer")
    config = source.config()
    model, task, checks, media = _convert(source, options, tokenizer, progress)
    gc.collect()
    vocab_size = _vocab_size(model, config, task)
    compressed = _is_compressed(model)
    weights = "source" if compressed else "mixed" if mix else options.weights
    if mix is not None and (compressed or task != "decoder" or media is not None):
        what = "its weights are compressed already" if compressed else f"it is an {task}"
        what = "it sees or hears; text_only compiles its language model alone" if media else what
        raise UsageError(f"max_ppl_increase is for decoders with float weights; {source.name}: {what}")
    if not compressed:
        to_fp16(model)
        gc.collect()
    parameters = sum(row["elements"] for row in precision_table(model))
    described = describe(source, config, options, task, "openvino", vocab_size, tokenizer, draft, weights, parameters)
    if mix is not None:
        path = save_f16(model, draft.path / "f16")
        del model  # the search reads the file, a block at a time
        gc.collect()
        model = mix.compress(path, draft, described, progress, advance)
    elif not compressed:
        progress(f"compress to {options.weights}")
        if options.weights != "fp16":
            model = compress(
                model,
                options.weights,
                group_size=options.group_size,
                sym=options.sym,
                awq=options.awq,
                samples=samples(options, tokenizer, vocab_size, Taken.of(model)) if options.dataset else None,
            )
    progress("write")
    rows, graph = save(model, draft, checks, partial(quality.check_cut, task=task, vocab_size=vocab_size))
    del model
    if media is not None:
        rows += write_media(media, draft.path, options.weights)
        graph = replace(graph, towers=tower_blocks(media, draft.path))
    if options.kernels:
        progress("pack for the CPU kernels")
        checks += add_kernels(draft.path, vocab_size=vocab_size, window=quality.attention_window(config))
    found = report(source, options, rows, checks)
    return described, found if mix is None else replace(found, quality=mix.summary), graph


def describe(
    source: Source,
    config: dict[str, Any],
    options: Options,
    task: Task,
    format: Literal["openvino", "onnx"],
    vocab_size: int,
    tokenizer: Tokenizer,
    draft: Draft,
    weights: str,
    parameters: int,
) -> ModelFacts:
    """The facts of a model that has a config.json and whose tokenizer is in `draft`.

    Raises:
        ConversionError: the configuration lacks a number that the runtime needs.
    """
    folder = draft.path / "tokenizer"
    eos, bos = special_ids(source, tokenizer, folder)
    pooling, longest = encoder_facts(source.folder, folder) if task == "encoder" else (None, None)
    return facts(
        config,
        name=options.name or source.name,
        task=task,
        format=format,
        vocab_size=vocab_size,
        eos_token_ids=eos,
        bos_token_id=bos,
        weights=weights,
        parameters=parameters,
        pooling=pooling,
        max_tokens=longest,
    )


def _convert(
    source: Source, options: Options, tokenizer: Tokenizer, progress: Progress
) -> tuple[ov.Model, Task, Rows, Media | None]:
    if source.kind == "huggingface":
        _check_torchvision()
        from edgert.converters import pretrained

        wanted = None if options.text_only else pretrained.Wanted(tokenizer, options.image_size)
        with pretrained.quiet():
            return pretrained.convert_whole(source.folder, options.exporter, progress, wanted)
    if options.image_size is not None:
        raise UsageError(f"image_size needs a Hugging Face model, {source.path} is {source.kind}")
    if source.kind == "onnx":
        from edgert.converters import onnx_source

        return *onnx_source.convert(source.path, progress), None
    return *_convert_ir(source.path, progress), None


def _convert_ir(path: Path, progress: Progress) -> tuple[ov.Model, Task, Rows]:
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise ConversionError(f"{path}: OpenVINO cannot read it: {cause(error)}") from error
    progress("check")
    if any(DECODER_OUTPUT in port.get_names() for port in model.outputs):
        canonical_decoder(model)
        vocab_size = _vocab_size(model, {}, "decoder")
        row = quality.check_states(lambda: quality.openvino_decoder(model), vocab_size=vocab_size)
        return model, "decoder", [row]
    canonical_encoder(model)
    return model, "encoder", []


def _build_gguf(
    source: Source, draft: Draft, options: Options, progress: Progress
) -> tuple[ModelFacts, Report, BlockGraph]:
    from edgert.converters import gguf_source
    from edgert.converters.gguf_tokenizer import end_tokens, write_tokenizer

    metadata = gguf_source.read_metadata(source.path)
    write_tokenizer(metadata.fields, draft.path / "tokenizer")
    config = metadata.config()
    model, checks = gguf_source.convert(metadata, progress)
    progress("write")
    vocab_size = _vocab_size(model, config, "decoder")
    rows, graph = save(model, draft, checks, partial(quality.check_cut, task="decoder", vocab_size=vocab_size))
    if options.kernels:
        progress("pack for the CPU kernels")
        checks += add_kernels(draft.path, vocab_size=vocab_size, window=quality.attention_window(config))
    described = facts(
        config,
        name=options.name or source.name,
        task="decoder",
        format="openvino",
        vocab_size=vocab_size,
        eos_token_ids=end_tokens(metadata.fields),
        bos_token_id=metadata.fields.get("tokenizer.ggml.bos_token_id"),
        weights="source",
        parameters=sum(row["elements"] for row in rows),
    )
    return described, report(source, options, rows, checks), graph


def save(
    model: ov.Model, draft: Draft, checks: Rows, check_cut: Callable[[Path, BlockGraph], dict[str, Any]]
) -> tuple[Rows, BlockGraph]:
    """Write the model; its precision table and block graph are those of the file as it is read back.

    The row of `check_cut` is added to `checks`. A model that says something else when it is cut stays whole.

    Raises:
        BundleError: the disk did not take it.
    """
    path = draft.path / "model.xml"
    make_names_unique(model)
    try:
        ov.save_model(model, path, compress_to_fp16=False)
        written = ov.Core().read_model(path)
    except RuntimeError as error:
        raise BundleError(f"model.xml and model.bin: cannot be written: {cause(error)}") from error
    graph = annotate(written)
    if len(graph.blocks) > 1:
        try:
            checks.append(check_cut(path, graph))
        except (ParityError, PlanError, RuntimeError) as error:
            graph = whole(written, f"it cannot be cut: {cause(error)}")
    return precision_table(written), graph


def report(source: Source, options: Options, precisions: Rows, checks: Rows) -> Report:
    """The bundle's report."""
    packages = [*_TOOLS[source.kind]]
    if source.kind in {"huggingface", "diffusers"} and options.exporter == "optimum":
        packages.append("optimum-intel")
    if options.format == "onnx":
        packages += ["onnx", "onnxruntime", "onnxscript"]
    tools = {"edgert": edgert.__version__, **{name: version(name) for name in packages}}
    return Report(f"{source.kind}: {source.name}", tools, precisions, checks)


def samples(
    options: Options, tokenizer: Tokenizer, vocab_size: int, taken: Taken | None = None
) -> list[dict[str, np.ndarray]]:
    """Inputs of a canonical decoder that takes `taken`, from the dataset; raises `UsageError` as `read_samples`."""

    def encode(text: str) -> list[int]:
        return [token for token in tokenizer.encode(text, add_special_tokens=False).ids if token < vocab_size]

    assert options.dataset is not None
    kinds = {"input_ids": np.int64, "attention_mask": np.int64, "position_ids": np.int64, "beam_idx": np.int32}
    found = read_samples(options.dataset, encode, {name: np.dtype(kind) for name, kind in kinds.items()})
    if taken is None:
        return found
    for sample in found:
        sample |= quality.decoder_inputs(sample["input_ids"], 0, taken)
    return found


def _vocab_size(model: ov.Model, config: dict[str, Any], task: Task) -> int:
    width = model.outputs[0].get_partial_shape()[-1]
    if task == "decoder" and width.is_static:
        return int(width.get_length())
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ConversionError(f"vocab_size is {size!r} in config.json, expected a positive number")
    return size


def _is_compressed(model: ov.Model) -> bool:
    return any(row["precision"] not in {"f32", "f16", "bf16"} for row in precision_table(model))


def _check_torchvision() -> None:
    """transformers imports torchvision where there is one, and fails in a misleading way if that does not load."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # RuntimeError: operator torchvision::nms does not exist
        raise MissingDependencyError(
            f"torchvision does not load beside this torch ({cause(error)}); edgert does not need it: "
            "pip uninstall torchvision"
        ) from error

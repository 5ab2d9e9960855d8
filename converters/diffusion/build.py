"""A bundle of a diffusion transformer: export, gate, compression, block graph."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import openvino as ov
from edgert.converters.build import Options, Rows, report, save
from edgert.converters.compress import compress, to_fp16
from edgert.converters.diffusion import transformer
from edgert.converters.diffusion.families import FAMILIES
from edgert.converters.quality import CUT_LIMIT, chained, compared
from edgert.converters.sources import Source

from edgert.bundle import DENOISER, Draft, ModelFacts, Report
from edgert.cutting import cut
from edgert.diffusion import Port, Signature
from edgert.errors import UsageError
from edgert.graph import BlockGraph


def build_denoiser(
    source: Source, draft: Draft, options: Options, progress: Callable[[str], None]
) -> tuple[ModelFacts, Report, BlockGraph]:
    """Fill a draft with the transformer of a diffusers folder.

    Raises:
        UsageError: an option that is for decoders.
        ConversionError, ParityError, MissingDependencyError: see `transformer`.
        BundleError: the disk did not take it.
    """
    given = {
        "npu": options.npu, "awq": options.awq, "dataset": options.dataset, "max_ppl_increase": options.mixed,
        "format 'onnx'": options.format == "onnx",
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is for decoders; {source.name} is a diffusion transformer")
    model = transformer.load(source.folder)
    progress("export")
    exported = transformer.export(model, options.exporter)
    progress("check")
    checks: Rows = [transformer.check(exported, model)]
    inputs = {name: tensor.numpy() for name, tensor in transformer.example(model, transformer.SIZES[1]).items()}
    _write_signature(exported, model, draft.path / DENOISER)
    described = _facts(source, model, options)
    del model
    progress(f"compress to {options.weights}")
    to_fp16(exported)
    gc.collect()
    if options.weights != "fp16":
        exported = compress(exported, options.weights, group_size=options.group_size, sym=options.sym)
    progress("write")
    rows, graph = save(exported, draft, checks, lambda path, graph: check_cut(path, graph, inputs))
    return described, report(source, options, rows, checks), graph


def check_cut(path: Path, graph: BlockGraph, inputs: transformer.Arrays) -> dict[str, Any]:
    """Compare a transformer cut at every boundary of its block graph with the uncut one; a row of a report.

    Raises:
        ParityError, PlanError: it cannot be cut there without changing what it says.
    """
    core = ov.Core()
    expected, found = dict(inputs), dict(inputs)
    uncut = core.read_model(path)
    names = [port.get_any_name() for port in uncut.outputs]
    chained([uncut])(expected)
    chained(cut(core.read_model(path), graph, [(block.index, block.index) for block in graph.blocks]))(found)
    against = "the uncut model"
    return transformer.worst(
        [compared("cut at every boundary", found[name], expected[name], against, CUT_LIMIT) for name in names]
    )


def _write_signature(exported: ov.Model, model: Any, path: Path) -> None:
    family = FAMILIES[type(model).__name__]
    dims = family.inputs(model)
    ports = {}
    for port in exported.inputs:
        name = port.get_any_name()
        kind: Literal["f32", "i64"] = "i64" if port.get_element_type() == ov.Type.i64 else "f32"
        ports[name] = Port(tuple(map(str, dims[name])), kind)
    path.write_text(json.dumps(asdict(Signature(ports, family.outputs)), indent=1) + "\n", "utf-8")


def _facts(source: Source, model: Any, options: Options) -> ModelFacts:
    config = model.config
    return ModelFacts(
        name=options.name or source.name,
        task="denoiser",
        format="openvino",
        architecture=type(model).__name__,
        vocab_size=0,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        context_length=0,
        num_layers=config.num_layers,
        eos_token_ids=(),
        bos_token_id=None,
        weights=options.weights,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )

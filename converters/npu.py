"""Compile a bundle's submodels for NPUs, ahead of time and without one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openvino as ov
from edgert.converters.quality import check_static

from edgert.bundle import Bundle
from edgert.cutting import cut
from edgert.errors import ConversionError, DeviceFailedError, UsageError
from edgert.experts import without_grouped_products
from edgert.graph import BlockGraph, BlockKind
from edgert.lowering import keep_last_logits
from edgert.npu import compiler, recipe
from edgert.npu.blobs import BlobStore
from edgert.npu.library import make
from edgert.shapes import TOTAL, Axes, StaticShape, StaticShapes
from edgert.static import caches, lower, shared_axes

# Compiling takes six to nine times a submodel's INT4 weights in memory (seen by others with NPU drivers), and a device
# loads what it runs in one piece.
MAX_SUBMODEL_BYTES = 512 * 1024**2
DEFAULT_SHAPES = StaticShapes(chunks=(256,), buckets=(1024, 4096))


@dataclass(frozen=True)
class NpuOptions:
    """What to compile for.

    Attributes:
        platforms: of `edgert.npu.compiler.PLATFORMS`.
        shapes: chunks and buckets, each of which costs a copy of the weights.
        split: a submodel for each block, so that any of them can be placed alone; otherwise as few as possible.
        limits: of each run of the compiler.
    """

    platforms: tuple[str, ...]
    shapes: StaticShapes = DEFAULT_SHAPES
    split: bool = False
    limits: compiler.Limits = field(default_factory=compiler.Limits)

    def __post_init__(self) -> None:
        for platform in self.platforms:
            if platform not in compiler.PLATFORMS:
                raise UsageError(f"NPU platform {platform!r}: expected one of {', '.join(compiler.PLATFORMS)}")


def require_compiler() -> compiler.Compiler:
    """The compiler; raises `ConversionError` with what to do where none is here."""
    found = compiler.find()
    if found is None:
        looked = "; ".join(f"{c.name}: {c.detail}" for c in compiler.find_all())
        raise ConversionError(f"NPU compiler: none is here ({looked}); on Linux: edgert doctor --setup npu-compiler")
    return found


def groups(graph: BlockGraph, split: bool, on_npu: Collection[int]) -> list[tuple[int, int]]:
    """First and last block of each submodel: all but the embedding, the head by itself, none partly on an NPU."""
    found: list[tuple[int, int]] = []
    room = 0
    for block in graph.blocks[1:]:
        room -= block.total_weight_bytes
        changes = (block.index in on_npu) != (block.index - 1 in on_npu)
        if not found or split or changes or block.kind is BlockKind.HEAD or room < 0:
            found.append((block.index, block.index))
            room = MAX_SUBMODEL_BYTES - block.total_weight_bytes
        else:
            found[-1] = (found[-1][0], block.index)
    return found


def add_blobs(
    bundle: Bundle,
    options: NpuOptions,
    progress: Callable[[str], None],
    placed: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Compile the model of a bundle in the making; blobs and their index go to its folder `npu`.

    Args:
        bundle: unfinished: its model is in place, its manifest is not.
        placed: first and last blocks of what will run on an NPU; None for all but the embedding. Only that is compiled.

    Returns:
        The row of the check that the static submodels compute what the model does.

    Raises:
        ConversionError: the recipe, or the compiler, rejects a block; the message names block, property and remedy.
        ParityError: the static submodels compute something else.
    """
    graph = bundle.graph
    if graph is None or bundle.facts.task != "decoder":
        raise ConversionError("NPU: only decoders that are cut into blocks are compiled for it")
    model = ov.Core().read_model(bundle.model_path)
    on_npu = {
        b.index for b in graph.blocks[1:] if placed is None or any(first <= b.index <= last for first, last in placed)
    }
    if findings := recipe.check(model, graph, blocks=on_npu):
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise ConversionError(f"NPU: {findings[0]}{more}")
    progress("check static shapes")
    row = check_static(bundle)
    with_npu = require_compiler()
    keep_last_logits(model, graph)
    ranges = groups(graph, options.split, on_npu)
    submodels = cut(model, graph, [(0, 0), *ranges], range(1, len(ranges) + 1))
    axes = shared_axes(submodels)
    store = BlobStore(bundle.path)
    jobs = [
        (number, shape, platform)
        for number, (first, _) in enumerate(ranges)
        if first in on_npu
        for shape in _shapes(submodels[number + 1], axes, options.shapes.within(bundle.facts.context_length))
        for platform in options.platforms
    ]
    for done, (number, shape, platform) in enumerate(jobs):
        first, last = ranges[number]
        progress(f"NPU {platform}, {done + 1} of {len(jobs)}: blocks {first}-{last} at {shape}")
        names = {name for port in submodels[number + 1].inputs for name in port.get_names()}
        own = {name: dims for name, dims in axes.items() if name in names}
        lowered = lower(without_grouped_products(submodels[number + 1]), shape, own, half=True)
        try:
            make(store, lowered, (first, last), shape, platform, with_npu, options.limits)
        except DeviceFailedError as error:
            raise ConversionError(f"{error} ({graph.blocks[first].name} to {graph.blocks[last].name})") from error
    return row


def _shapes(submodel: ov.Model, axes: Mapping[str, Axes], shapes: StaticShapes) -> Sequence[StaticShape]:
    names = {name for port in submodel.inputs for name in port.get_names()}
    queries = [1] if "logits_to_keep" in names else [1, *shapes.chunks]  # the head takes one row at a time
    grows = caches(submodel) or any(TOTAL in dims for name, dims in axes.items() if name in names)
    buckets = shapes.buckets if grows else (0,)
    return [StaticShape(query, past) for query in queries for past in buckets]

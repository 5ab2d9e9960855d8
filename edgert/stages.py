"""From a plan to compiled submodels: one chain of stages for each phase, what both have in common compiled once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from edgert.backends import info_of, require
from edgert.backends.base import Backend, BindingCompiled, Compiled, Runner, TensorCompiled, TensorRunner
from edgert.bucketed import StaticCompiled
from edgert.bundle import Bundle
from edgert.device import DeviceKind
from edgert.errors import BundleError, DeviceFailedError, PlanError, cause
from edgert.features import Taken
from edgert.graph import BOUNDARY, Block, BlockGraph
from edgert.guard import guarded
from edgert.inplace import KernelCompiled
from edgert.placement import Placement, Plan
from edgert.shapes import KEEP, PAST, Axes, StaticShape, StaticShapes

if TYPE_CHECKING:
    from pathlib import Path

    import openvino as ov

    from edgert.backends.openvino import OpenVinoBackend
    from edgert.npu.library import Library

log = logging.getLogger("edgert")


@dataclass(frozen=True)
class Stage:
    """A placement, compiled.

    Attributes:
        states: ids of the keys and values, and other states, in it; None without a block graph, where nobody knows.
    """

    placement: Placement
    compiled: Compiled
    states: tuple[str, ...] | None = None


Chains = tuple[tuple[Stage, ...], ...]


def build(
    bundle: Bundle,
    graph: BlockGraph,
    plan: Plan,
    shapes: StaticShapes | None,
    available: Collection[str],
    timeout_s: float,
    library: Library | None = None,
    blocks: Collection[int] | None = None,
) -> tuple[Chains, Taken]:
    """Compile a plan; also tells what the model takes beside tokens.

    Args:
        shapes: for static stages; None where there are none.
        available: inputs that a sequence can give.
        timeout_s: how long a device may take for a call; see `edgert.guard`.
        library: the compiled submodels of an NPU; None where the plan has none.
        blocks: compile only the submodels that hold one of these, and those that give them masks and tables; the
            chains skip the others. None for all.

    Raises:
        BundleError: the model file is damaged, or wants an input that is not available.
        DeviceError, PlanError: see `edgert.executor.Executor`.
    """
    from edgert.backends.openvino import core
    from edgert.lowering import keep_last_logits

    backends = {config: require(config) for config in plan.configs}  # before minutes go into compiling for another
    _check_memory(graph, plan, bundle.facts.context_length if shapes is None else shapes.buckets[-1])
    path = bundle.model_path
    try:
        model = core().read_model(path)  # weights stay memory-mapped
        _check_recipe(model, graph, plan)
        taken = _taken(model, bundle)
        keep_last_logits(model, graph)
        phases = [
            (placements, _cut(model, graph, placements))
            for placements in plan.submodels(graph, library.starts if library else ())
        ]
        if blocks is not None:
            phases = [_only(placements, cut, blocks) for placements, cut in phases]
        needed = {
            name for _, cut in phases for submodel in cut for port in submodel.inputs for name in port.get_names()
        }
        needed -= {
            name for _, cut in phases for submodel in cut for port in submodel.outputs for name in port.get_names()
        }
    except RuntimeError as error:  # OpenVINO's only class of errors
        raise BundleError(f"bundle {bundle.path}: {path.name} cannot be read: {cause(error)}") from error
    if unknown := sorted(needed - set(available)):
        raise BundleError(f"bundle {bundle.path}: {path.name} wants an input {unknown[0]!r}, which nothing gives")
    kernels = _Kernels(bundle) if any(config.kernels for config in plan.configs) else None
    made: dict[tuple[object, ...], Stage] = {}
    chains = []
    for placements, submodels in phases:
        axes = _axes(submodels, placements)
        keys = [_key(p, submodel) for p, submodel in zip(placements, submodels, strict=True)]
        for p, submodel, key in zip(placements, submodels, keys, strict=True):
            if key in made:
                continue
            own = graph.blocks[p.first : p.last + 1]
            if p.config.kernels and kernels is not None:
                shared = len(phases) > 1 and submodel is model  # the uncut model may be the other phase's, too
                ours = submodel.clone() if shared else submodel
                compiled = kernels.compile(backends[p.config], ours, p, own)
            else:
                compiled = _compile(backends[p.config], submodel, p, own, axes, shapes, timeout_s, library)
            made[key] = Stage(p, compiled, tuple(state for block in own for state in block.states))
        chains.append(tuple(made[key] for key in keys))
    if kernels is not None:
        kernels.warn()
    for phase, chain in (("prefill", chains[0]), ("decode", chains[-1])):
        for stage in chain:
            if isinstance(stage.compiled, StaticCompiled):
                stage.compiled.prepare(prefill=phase == "prefill")
    return tuple(chains), taken


def _taken(model: ov.Model, bundle: Bundle) -> Taken:
    image = bundle.media.image if bundle.media is not None else None
    return Taken.of(model, bundle.facts.vocab_size, image.grid if image is not None else None)


def _only(
    placements: Sequence[Placement], submodels: Sequence[ov.Model], blocks: Collection[int]
) -> tuple[tuple[Placement, ...], list[ov.Model]]:
    """The submodels that hold some blocks, and those that compute what these need beside the residual stream."""
    kept = {n for n, p in enumerate(placements) if any(p.first <= i <= p.last for i in blocks)}
    given = {
        name: n
        for n, submodel in enumerate(submodels)
        for port in submodel.outputs
        for name in port.get_names() - {BOUNDARY}
    }
    while True:  # what gives a tensor may take another one itself
        needed = {name for n in kept for port in submodels[n].inputs for name in port.get_names()}
        more = {n for name, n in given.items() if name in needed} - kept
        if not more:
            break
        kept |= more
    return tuple(placements[n] for n in sorted(kept)), [submodels[n] for n in sorted(kept)]


def _check_memory(graph: BlockGraph, plan: Plan, context: int) -> None:
    """Raise `PlanError` where weights and one full cache go beyond a device's own memory."""
    needed: dict[str, int] = {}
    limits = {config.device: info_of(config).memory_bytes for config in plan.configs}
    for held in plan.weights(graph):
        blocks = {
            i for ps in plan.phases.values() for p in ps if p.config == held.config for i in range(p.first, p.last + 1)
        }
        kv_bytes = sum(graph.blocks[i].kv_bytes_per_token for i in blocks) * context // (2 if held.config.half else 1)
        needed[held.config.device] = needed.get(held.config.device, 0) + held.bytes * held.count + kv_bytes
    for device, count in needed.items():
        limit = limits[device]
        if limit is not None and count > limit:
            raise PlanError(
                f"plan: {device} would hold {count / 1e9:.1f} GB of weights, keys and values (for {context} tokens), "
                f"it has {limit / 1e9:.1f} GB; place fewer blocks on it"
            )


def _check_recipe(model: ov.Model, graph: BlockGraph, plan: Plan) -> None:
    """Raise `PlanError` for what an NPU's compiler would reject, before it is asked."""
    every = dict.fromkeys(p for placements in plan.phases.values() for p in placements)
    for p in (p for p in every if p.config.kind is DeviceKind.NPU):
        from edgert.npu.recipe import check

        if found := check(model, graph, blocks=range(p.first, p.last + 1)):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise PlanError(f"plan: {p.config}: {found[0]}{more}")


def _cut(model: ov.Model, graph: BlockGraph, placements: Sequence[Placement]) -> list[ov.Model]:
    from edgert.cutting import cut

    static = [number for number, p in enumerate(placements) if p.config.static]
    return cut(model, graph, [(p.first, p.last) for p in placements], static)


def _axes(submodels: Sequence[ov.Model], placements: Sequence[Placement]) -> dict[str, Axes]:
    from edgert.static import shared_axes

    return shared_axes(submodels) if any(p.config.static for p in placements) else {}


def _key(p: Placement, submodel: ov.Model) -> tuple[object, ...]:
    """What tells compiled submodels apart: the same blocks may share other tensors when they are cut in another way."""
    ports = [sorted(port.get_any_name() for port in ports) for ports in (submodel.inputs, submodel.outputs)]
    return (p, *map(tuple, ports))


class _Kernels:
    """Compiles submodels with edgert's own kernels; the bundle's packed weights are opened once for all of them."""

    def __init__(self, bundle: Bundle) -> None:
        from edgert.kernelfile import PackedWeights

        self._bundle = bundle
        self._weights = PackedWeights.open(bundle.path)
        self._packed_bytes = 0

    def compile(self, backend: Backend, submodel: ov.Model, p: Placement, blocks: Sequence[Block]) -> Compiled:
        """Compile a submodel, which is changed in place."""
        from edgert import native
        from edgert.kernel_lowering import lower

        config = p.config
        assert config.kernels is not None
        lowered = lower(submodel, self._weights, native.factory(), precision=config.kernels, batched=True)
        self._packed_bytes += lowered.packed_bytes
        counts = ", ".join(f"{count} {name}" for name, count in lowered.replaced.items() if count)
        log.info("%s: blocks %d-%d: %s", config, p.first, p.last, counts or "nothing for the kernels")
        for name, reason in lowered.left.items():
            log.info("%s leaves %s to OpenVINO: %s", config, name, reason)
        if lowered.unbatched is not None:
            log.info("%s: blocks %d-%d take one sequence at a time: %s", config, p.first, p.last, lowered.unbatched)
        compiled = cast("BindingCompiled", backend.compile(lowered.model, config, blocks))
        context = self._bundle.facts.context_length
        return KernelCompiled(compiled, lowered.caches, context, config, lowered.arrays)

    def warn(self) -> None:
        """Say so where weights had to be packed now: that takes time, and memory that the file would not take."""
        if self._packed_bytes:
            log.warning(
                "bundle %s has no weights packed for the CPU kernels: %.1f MB were packed now, into memory of their "
                "own; `edgert compile` the model again, without --no-kernels",
                self._bundle.path,
                self._packed_bytes / 1e6,
            )


def _compile(
    backend: Backend,
    submodel: ov.Model,
    placement: Placement,
    blocks: Sequence[Block],
    axes: Mapping[str, Axes],
    shapes: StaticShapes | None,
    timeout_s: float,
    library: Library | None,
) -> Compiled:
    from edgert import experts, lowering

    config = placement.config
    if config.kind in {DeviceKind.GPU, DeviceKind.NPU}:
        submodel = experts.without_grouped_products(submodel)
    if not config.static or shapes is None:
        if config.half:
            lowering.halve(submodel, lambda name: name == BOUNDARY)
        return backend.compile(submodel, config, blocks)
    from edgert import static

    names = {name for port in submodel.inputs for name in port.get_names()}
    own = {name: dims for name, dims in axes.items() if name in names}
    given = {name: axes[name] for port in submodel.outputs for name in port.get_names() & axes.keys()}

    def lower(shape: StaticShape) -> ov.Model:
        return static.lower(submodel, shape, own, half=config.half)

    def build_shape(shape: StaticShape) -> TensorCompiled:
        if library is None or config.kind is not DeviceKind.NPU:
            return cast("TensorCompiled", backend.compile(lower(shape), config, blocks))

        def load(blob: Path) -> TensorCompiled:
            loaded = cast("OpenVinoBackend", backend).load_blob(blob, config)
            if loaded.inputs != expected:
                raise DeviceFailedError(f"{config}: {blob.name} takes {len(loaded.inputs)} other inputs")
            return cast("TensorCompiled", loaded)

        try:
            return library.get((placement.first, placement.last), shape, load, lambda: lower(shape))
        except DeviceFailedError as error:
            error.unit = config.unit
            raise

    def guard(runner: TensorRunner) -> Runner:
        return guarded(runner, config, timeout_s)

    caches, fixed, head = static.caches(submodel), static.fixed_states(submodel), KEEP in names
    expected = {BOUNDARY, *own, *(f"{PAST}{state}" for state in (*caches, *fixed))}
    compiled = StaticCompiled(build_shape, guard, own, caches, shapes, head=head, fixed=fixed, given=given)
    if library is not None and config.kind is DeviceKind.NPU:
        for shape in compiled.every_shape:  # now, or a bucket may be missing in the middle of an answer
            library.require((placement.first, placement.last), shape, lambda shape=shape: lower(shape))  # type: ignore[misc]
    return compiled

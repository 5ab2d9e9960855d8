"""Put edgert's CPU kernels into a submodel: which operations they replace, found by pattern, and what they take.

    view.py         the model as plain objects          patterns.py     RMSNorm, RoPE, slices
    weights.py      compressed weights                  linears.py      products with bias, norm, gate, residual
    attention.py    attention over a cache              projections.py  its queries, keys and values
    masks.py        masks that need not be made         rewrite.py      the new operations
    sequences.py    several sequences in one call

What fits no pattern stays with OpenVINO, and `LoweredModel.left` says why. `packables` gives what `edgert compile`
packs; it follows from the same patterns, so a submodel finds its weights by their names however the model is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import openvino as ov
import openvino.opset13 as ops

from edgert.errors import PlanError, cause
from edgert.kernel_lowering.attention import SDPA, Attention, State, match, states
from edgert.kernel_lowering.linears import Linears, find, finish
from edgert.kernel_lowering.masks import Masks
from edgert.kernel_lowering.projections import Projections, projections
from edgert.kernel_lowering.rewrite import Factory, Rewriter
from edgert.kernel_lowering.sequences import take_sequences
from edgert.kernel_lowering.view import Item, View
from edgert.kernel_lowering.weights import Packable, Unsuitable, Weights
from edgert.kernelfile import PackedWeights
from edgert.kvlayout import CACHE, PAST, SEQUENCES, KvLayout, Precision
from edgert.packing import Array

__all__ = ["CACHE", "PAST", "SEQUENCES", "LoweredCache", "LoweredModel", "Packables", "lower", "packables"]

_MAX_SEARCH = 200  # operations behind a state that are looked at for the reason why it stays


@dataclass(frozen=True)
class LoweredCache:
    """What an input `cache.N` stands for.

    Attributes:
        key_state, value_state: ids of the states that it replaces.
        layout: how they lie in it.
    """

    key_state: str
    value_state: str
    layout: KvLayout


@dataclass(frozen=True)
class LoweredModel:
    """A model with kernels in it.

    Attributes:
        model: takes `cache.N` u8 `[blocks, heads, block_bytes]` for each of `caches`, and `past` i64 `[1]` if there
            are any, beside those of its former inputs that it still needs; outputs are as before. One that takes
            several sequences has `sequences` i64 `[lanes, 3]` instead of `past`: of each in turn how many rows of
            the other inputs are its own, how many tokens are in its part of the caches, and the first block of that.
        caches: by the number of their input.
        replaced: how many operations of each kernel it has.
        left: what stays with OpenVINO, by name, and why.
        unbatched: why it takes one sequence at a time; None where it takes several.
        packed_bytes: of weights that were packed into memory of their own, as they were in no file.
        arrays: the memory of the weights. It must live as long as the model and what is compiled of it.
    """

    model: ov.Model
    caches: tuple[LoweredCache, ...]
    replaced: Mapping[str, int]
    left: Mapping[str, str]
    unbatched: str | None
    packed_bytes: int
    arrays: tuple[Array, ...] = field(repr=False)


@dataclass(frozen=True)
class Packables:
    """What of a model's weights is packed.

    Attributes:
        packed: in the order in which the model needs them.
        refused: constants whose numbers do not fit, by name, and why.
    """

    packed: tuple[Packable, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class _Found:
    linears: Linears
    attentions: list[tuple[Attention, Projections]]
    left: dict[str, str]


def packables(model: ov.Model) -> Packables:
    """What to pack of a whole model. Its weights are looked at, nothing is changed."""
    view = View(model)
    refused: dict[str, str] = {}
    found = _search_until(view, refused, _fault)
    packed = {packable.key: packable for packable in found.linears.packables}
    return Packables(tuple(packed.values()), refused)


def lower(
    model: ov.Model,
    packed: PackedWeights | None,
    factory: Factory,
    *,
    precision: Precision = "i8",
    batched: bool = False,
) -> LoweredModel:
    """Put kernels into a submodel, which is changed in place.

    The batch is 1, and `attention_mask` all ones.

    Args:
        model: the whole model or a submodel of `edgert.cutting.cut`, not one with static shapes.
        packed: its bundle's weights; None packs them now, into memory.
        factory: with the extension's operations.
        precision: of keys and values.
        batched: let it take several sequences, one after the other in the rows of its inputs, where it can.

    Raises:
        BundleError: the packed weights are of another model.
        PlanError: the kernels refuse it, or must not run it: what they gave when it was compiled was wrong.
    """
    if packed is not None and packed.unusable is not None:
        raise PlanError(f"bundle {packed.path}: the CPU kernels must not run it: {packed.unusable}")
    try:
        return _lower(model, packed, factory, precision, batched)
    except RuntimeError as error:  # OpenVINO's only class of errors: the kernels refuse a shape or a number
        raise PlanError(f"the CPU kernels do not take the model: {cause(error)}") from error


def _lower(
    model: ov.Model, packed: PackedWeights | None, factory: Factory, precision: Precision, batched: bool
) -> LoweredModel:
    names = [port.get_names() for port in model.outputs]
    view = View(model)
    made: dict[Hashable, Array] = {}

    def content(packable: Packable) -> Array:
        if packed is not None:
            array = packed.get(packable.key, packable.shape)
            assert array is not None  # or it would have been refused
            return array
        if packable.content not in made:
            made[packable.content] = packable.pack()
        return made[packable.content]

    def missing(packable: Packable) -> dict[str, str]:
        assert packed is not None
        there = packed.get(packable.key, packable.shape) is not None
        return {} if there else {part.weight.codes.name: "it is not packed in the bundle" for part in packable.parts}

    refused = {} if packed is None else dict(packed.refused)
    found = _search_until(view, refused, _fault if packed is None else missing)
    rewriter = Rewriter(view, factory, content)
    caches = _rewrite(rewriter, found, precision)
    model.add_parameters(rewriter.parameters)
    replaced = {
        "QuantizedLinear": len(found.linears.all),
        "EmbeddingLookup": len(found.linears.lookups),
        "CachedAttention": len(found.attentions),
    }
    arrays, left = tuple(rewriter.arrays), {**found.linears.left, **found.left}
    del rewriter, found
    view.close()
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():  # beam_idx, and what gave empty states their batch
            model.remove_parameter(parameter)
    unbatched = take_sequences(model, factory) if batched else "nobody asked for it"
    model.validate_nodes_and_infer_types()
    _keep_batch(model)
    for port, own in zip(model.outputs, names, strict=True):
        port.set_names(own)
    packed_bytes = sum(array.nbytes for array in made.values())
    return LoweredModel(model, caches, replaced, left, unbatched, packed_bytes, arrays)


def _keep_batch(model: ov.Model) -> None:
    """Let what is written into a state that stays (a recurrence's) have as many rows as the state: any number.

    Behind the kernels the batch is known to be 1. OpenVINO's CPU plugin (2026.4.1) cannot write that into a state whose
    batch is not known: "Can't reorder data with dynamic shapes". Rows taken by `beam_idx` are the same rows.
    """
    readers = {node.get_variable_id(): node for node in model.get_ops() if node.get_type_name() == "ReadValue"}
    for sink in model.get_sinks():
        reader, new = readers.get(sink.get_variable_id()), sink.input_value(0)
        if reader is None or reader.get_output_partial_shape(0)[0].is_static or new.get_partial_shape()[0].is_dynamic:
            continue
        users = [port.get_node() for port in reader.output(0).get_target_inputs()]
        order = next((user.input_value(1) for user in users if user.get_type_name() == "Gather"), None)
        if order is not None:
            sink.input(0).replace_source_output(ops.gather(new, order, ops.constant(0)).output(0))
    model.validate_nodes_and_infer_types()


def _search_until(view: View, refused: dict[str, str], fault: Callable[[Packable], Mapping[str, str]]) -> _Found:
    """Everything that the kernels can take.

    Args:
        refused: constants that cannot be packed, by name, and why; `fault` adds those that it finds.
        fault: which of some weights cannot be packed, and why. What was joined with one of them is then looked for
            again, as it may be lowered without.
    """
    while True:
        found = _search(view, refused)
        faults = {name: why for packable in found.linears.packables for name, why in fault(packable).items()}
        if not faults:
            return found
        refused |= faults


def _fault(packable: Packable) -> dict[str, str]:
    faults = {}
    for part in packable.parts:
        try:
            _ = part.weight.scaling
        except Unsuitable as reason:
            faults[part.weight.codes.name] = str(reason)
    return faults


def _search(view: View, refused: Mapping[str, str]) -> _Found:
    linears, caches = find(view, Weights(), refused), states(view)
    masks = Masks(caches)
    attentions, left = [], {}
    failed: dict[Item, str] = {}
    for core in view.of_type(SDPA, "Softmax"):
        try:
            attention = match(core, caches)
            if attention.mask is not None and masks.is_causal(attention.mask):
                attention = replace(attention, mask=None, causal=True)
            attentions.append((attention, projections(attention, linears)))
        except Unsuitable as reason:
            failed[core] = str(reason)
            if core.type == SDPA:
                left[core.name] = str(reason)
    lowered = {expanded.state.id for found, _ in attentions for expanded in (found.key, found.value)}
    known = {state.id: state for state in caches.values()}
    for assign in view.of_type("Assign"):
        identity = str(assign.attribute("variable_id"))
        if identity not in lowered:
            state = known.get(identity)
            left[identity] = "it is no cache that new rows join" if state is None else _why(state, failed)
    finish(linears)
    return _Found(linears, attentions, left)


def _why(state: State, failed: Mapping[Item, str]) -> str:
    """Why the attention that takes a state is not lowered."""
    open_items = [state.concat]
    for item in open_items:
        if item in failed:
            return failed[item]
        if len(open_items) > _MAX_SEARCH:
            break
        open_items += [user for user in item.all_users if user not in open_items]
    return "no attention that the kernels know takes it"


def _rewrite(rewriter: Rewriter, found: _Found, precision: Precision) -> tuple[LoweredCache, ...]:
    """Replace in topological order, so that what is made finds what it takes in its final form."""
    steps: list[tuple[int, Callable[[], object]]] = []
    steps += [(lookup.end[0].number, partial(rewriter.lookup, lookup)) for lookup in found.linears.lookups]
    steps += [(end[0].number, partial(rewriter.linear, one)) for end, one in found.linears.by_end.items()]
    caches = []
    for number, (attention, taken) in enumerate(found.attentions):
        layout = KvLayout(precision, attention.kv_heads, attention.head_dim, attention.value_dim)
        caches.append(LoweredCache(attention.key.state.id, attention.value.state.id, layout))
        steps.append((attention.result[0].number, partial(rewriter.attention, attention, taken, layout, number)))
    for _, step in sorted(steps, key=lambda numbered: numbered[0]):
        step()
    for attention, _ in found.attentions:
        for expanded in (attention.key, attention.value):
            rewriter.forget(expanded.state, expanded.on_the_way[1:])
    for linear in found.linears.all:
        rewriter.answer_shapes(linear)
    return tuple(caches)

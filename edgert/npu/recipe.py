"""What of a model the NPU compiler will not take, found in its graph before anything is compiled: `check`.

Each rule below rests on what the compiler of OpenVINO 2026.4.1 did with a small model of just that property
(docs/npu.md), or on what static shapes need. The model is looked at as it is in a bundle, with dynamic shapes; weights
are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import openvino as ov

from edgert.errors import PlanError
from edgert.graph import Block, BlockGraph
from edgert.irgraph import IrGraph, Node
from edgert.residual import ResidualStream, Uncuttable

GROUP_SIZES = (-1, 128)
_WEIGHTS = "compile with --weights int4 --sym --group-size -1"
_ELSEWHERE = "place the block on CPU or GPU@f16"

# Rejected whatever their attributes (Bucketize: unless it gives i32, which exporters do not ask for), each on at least
# one platform: docs/npu.md says which were tried where. NonZero is rejected with what follows it, as its result has no
# size before it has run.
_REJECTED = frozenset({
    "Bucketize", "EmbeddingBagOffsets", "Multinomial", "NonZero", "SearchSorted", "SegmentMax", "SliceScatter",
    "Unique",
})  # fmt: skip
# nf4 and u2 are rejected for 3720 only; edgert makes none of these.
_REJECTED_TYPES = frozenset({"bf16", "i16", "u16", "u1", "u2", "u3", "u6", "nf4", "f4e2m1"})
_INT4 = frozenset({"u4", "i4"})
# Inputs that say how large a result is.
_SIZE_PORTS = {
    "Reshape": (1,), "Broadcast": (1,), "Tile": (1,), "TopK": (1,), "OneHot": (1,), "Slice": (1, 2, 3),
    "StridedSlice": (1, 2, 3), "Range": (0, 1, 2), "VariadicSplit": (2,), "Pad": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that stands in the way.

    Attributes:
        block: name of the block, or `model`.
        property: what is wrong with it, e.g. `group size`.
        value: what it is.
        remedy: what to do about it.
    """

    block: str
    property: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.block}: {self.property}: {self.value}; {self.remedy}"


def check(
    model: ov.Model,
    graph: BlockGraph,
    *,
    blocks: Collection[int] | None = None,
    prompt_tokens: int | None = None,
    limit: int | None = None,
) -> list[Finding]:
    """Everything that is known to keep blocks from an NPU; empty where nothing is.

    Args:
        model: as it is in the bundle that `graph` belongs to.
        blocks: those that shall run on an NPU; None means all but the first, which always runs elsewhere.
        prompt_tokens: tokens that a sequence shall hold, prompt and answer.
        limit: tokens that the largest static cache holds.

    Raises:
        PlanError: `graph` belongs to another model.
    """
    found: list[Finding] = []
    if prompt_tokens is not None and limit is not None and prompt_tokens > limit:
        remedy = "shorten the prompt, compile with a larger bucket, or use CPU or GPU"
        found.append(Finding("model", "prompt limit", f"{prompt_tokens} tokens, static shapes hold {limit}", remedy))
    if len(graph.blocks) == 1:
        reason = graph.reason or "one block"
        found.append(Finding(graph.blocks[0].name, "one piece", reason, "run the model on CPU or GPU"))
        return found
    index = IrGraph(model)
    try:
        stream = ResidualStream.of(index, graph)
        owners = _owners(stream, graph)
    except Uncuttable as error:
        raise PlanError(f"recipe: the block graph does not belong to this model: {error}") from error
    for number in blocks if blocks is not None else range(1, len(graph.blocks)):
        block, nodes = graph.blocks[number], owners[number]
        problems = Counter([*_weights(index, nodes), *_operations(stream, nodes), *_states(index, block, nodes)])
        for (what, value, remedy), count in problems.items():
            found.append(Finding(block.name, what, value + (f" ({count} times)" if count > 1 else ""), remedy))
    return found


_Problem = tuple[str, str, str]  # property, value, remedy


def _owners(stream: ResidualStream, graph: BlockGraph) -> list[list[Node]]:
    """For each block the operations that would be in its submodel: its part of the stream, its states, its weights.

    What else depends on the model's inputs, masks and RoPE tables, is computed by the first submodel.
    """
    nobody: frozenset[int] = frozenset()
    alone = [frozenset({number}) for number in range(len(graph.blocks))]
    users = {name: alone[s] for name, s in stream.segment.items()}
    found: list[list[Node]] = [[] for _ in graph.blocks]
    constant_only = stream.graph.constant_only
    for node in reversed(stream.graph.nodes.values()):
        mine = users.get(node.name, nobody)
        if node.name in stream.segment or node.name in stream.live or node.name in constant_only:
            for number in mine:
                found[number].append(node)
        for source, _ in node.inputs:
            if source not in stream.segment:
                before = users.get(source, nobody)
                users[source] = before | mine if before else mine
    return found


def _weights(graph: IrGraph, nodes: list[Node]) -> Iterator[_Problem]:
    """4-bit weights that the compiler expands to f16, or that drivers have aborted on."""
    for node in nodes:
        if node.type != "Constant":
            continue
        kind = str(node.op.get_output_element_type(0).get_type_name())
        if kind in _REJECTED_TYPES:
            yield "weights", kind, _WEIGHTS
        elif kind in _INT4:
            scale, zero_point = _decompression(graph, node)
            if scale is None:  # a zero point, or no compressed matrix
                continue
            if zero_point is not None and not _in_the_middle(zero_point):
                yield "asymmetric INT4", f"{kind} with zero points", _WEIGHTS
            group = _group_size(node, scale)
            if group not in GROUP_SIZES:
                yield "group size", str(group), _WEIGHTS


def _decompression(graph: IrGraph, weight: Node) -> tuple[Node | None, Node | None]:
    """Scale and zero point that a weight is multiplied with and that are subtracted from it."""
    scale, zero_point, name = None, None, weight.name
    while True:
        consumers = [graph[i.get_node().get_friendly_name()] for i in graph[name].op.output(0).get_target_inputs()]
        user = next((c for c in consumers if c.type in {"Convert", "Subtract", "Multiply"}), None)
        if user is None or (user.type == "Subtract" and user.inputs[0][0] != name):
            return scale, zero_point
        if user.type == "Subtract":
            zero_point = graph[user.inputs[1][0]]
        elif user.type == "Multiply":
            other = next((source for source, _ in user.inputs if source != name), name)
            return graph[other], zero_point
        name = user.name


def _in_the_middle(zero_point: Node) -> bool:
    """Whether an unsigned weight is a signed one shifted by 8, one number for all: what the compiler makes i4 of."""
    source = zero_point.op
    while source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    one = source.get_type_name() == "Constant" and source.get_output_partial_shape(0).is_static
    return one and source.get_element_type() != ov.Type.u4 and source.data.size == 1 and float(source.data.item()) == 8


def _group_size(weight: Node, scale: Node) -> int:
    """Weights that share a scale; -1 where a whole row does."""
    dims, scales = (list(n.op.get_output_shape(0)) for n in (weight, scale))
    if len(scales) != len(dims):  # one scale for all
        return -1
    # `[rows, groups, size]` with scales `[rows, groups, 1]`; without groups each row has one scale. Experts are a
    # dimension before these, so that `[experts, rows, size]` looks like groups but for what joins them: a Reshape.
    grouped = sum(d > 1 for d in scales) > 1 and scales[-1] == 1 and len(dims) > 2 and _joined(weight)
    return int(dims[-1]) if grouped else -1


def _joined(weight: Node) -> bool:
    """Whether a Reshape takes a dimension from a weight when it has been decompressed."""
    op = weight.op
    while True:
        users = [port.get_node() for port in op.output(0).get_target_inputs()]
        user = next(
            (one for one in users if one.get_type_name() in {"Convert", "Subtract", "Multiply", "Reshape"}), None
        )
        if user is None:
            return False
        if user.get_type_name() == "Reshape":
            return len(user.get_output_partial_shape(0)) < len(op.get_output_partial_shape(0))
        op = user


def _operations(stream: ResidualStream, nodes: list[Node]) -> Iterator[_Problem]:
    for node in nodes:
        version = node.op.get_type_info().version_id
        if node.type in _REJECTED or not version.startswith("opset"):
            yield "operation", node.type if version.startswith("opset") else f"{node.type} of {version}", _ELSEWHERE
        if node.name not in stream.graph.constant_only:
            kind = str(node.op.get_output_element_type(0).get_type_name()) if node.op.get_output_size() else ""
            if kind in _REJECTED_TYPES:
                yield "element type", kind, _ELSEWHERE
        if any(node.inputs[p][0] in stream.live for p in _SIZE_PORTS.get(node.type, ()) if p < len(node.inputs)):
            yield "dynamic dimension", f"{node.type} whose size depends on data", _ELSEWHERE
        if node.type == "ScaledDotProductAttention" and (len(node.inputs) < 4 or node.op.get_attributes()["causal"]):
            yield "attention", "no mask input, so that padding would be attended to", _ELSEWHERE


def _states(graph: IrGraph, block: Block, nodes: list[Node]) -> Iterator[_Problem]:
    reads = {graph.variable_id(n): n for n in nodes if n.type == "ReadValue"}
    assigns = {graph.variable_id(n): n for n in graph.of_type("Assign")} if block.states else {}
    for state in block.states:
        shape = reads[state].op.get_output_partial_shape(0) if state in reads else ov.PartialShape.dynamic()
        if shape.rank.is_static and all(d.is_static for d in list(shape)[1:]):
            yield "state", "recurrent, so that padding would change it", _ELSEWHERE
        elif graph.cache_concat(assigns[state]) is None:
            yield "state", "no cache [batch, heads, tokens, head_dim] that new rows join", _ELSEWHERE

"""The recipe check: what NNCF makes of the demo model, and models with one thing wrong put into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from edgert.converters.compress import compress
from tiny_models import DECODERS, exported

from edgert.errors import PlanError
from edgert.irgraph import make_names_unique
from edgert.npu.recipe import Finding, check
from edgert.partition import annotate

REMEDY = "compile with --weights int4 --sym --group-size -1"


def tiny() -> ov.Model:
    model = exported("llama")[1]
    make_names_unique(model)
    return model


def found(model: ov.Model, **options: int) -> list[Finding]:
    return check(model, annotate(model), **options)


@pytest.mark.parametrize("family", DECODERS)
def test_families_in_fp16_are_fine(family: str) -> None:
    model = exported(family)[1]
    make_names_unique(model)
    assert found(model) == []


@pytest.mark.parametrize(
    ("sym", "group", "expected"),
    [
        (True, -1, []),
        (True, 128, []),
        (True, 64, [("group size", "64")]),
        (False, 128, [("asymmetric INT4", "u4 with zero points")]),
        (False, -1, [("asymmetric INT4", "u4 with zero points")]),
        (False, 64, [("asymmetric INT4", "u4 with zero points"), ("group size", "64")]),
    ],
)
def test_what_nncf_makes(demo_path: Path, sym: bool, group: int, expected: list[tuple[str, str]]) -> None:
    model = compress(ov.Core().read_model(demo_path / "model.xml"), "int4", sym=sym, group_size=group)
    make_names_unique(model)
    graph = annotate(model)
    blocks = [block.name for block in graph.blocks[1:-1]]  # embedding and head are INT8
    times = {name: 4 if name.startswith("attention") else 3 for name in blocks}
    assert check(model, graph) == [
        Finding(name, what, f"{value} ({times[name]} times)", REMEDY) for name in blocks for what, value in expected
    ]


@pytest.mark.parametrize(("group", "expected"), [(-1, []), (32, [("group size", "32 (3 times)")])])
def test_groups_of_experts(group: int, expected: list[tuple[str, str]]) -> None:
    model = compress(exported("qwen3_moe")[1], "int4", sym=True, group_size=group)
    make_names_unique(model)
    problems = [(one.property, one.value) for one in found(model) if one.block == "moe.0"]
    assert problems == expected


def test_int8_is_fine(demo_path: Path) -> None:
    model = compress(ov.Core().read_model(demo_path / "model.xml"), "int8")
    make_names_unique(model)
    assert found(model) == []


def with_zero_point(zero_point: ov.Node) -> ov.Model:
    """The tiny model with the first matrix of its last FFN as u4 and this zero point."""
    model = tiny()
    product = first_product(model, "ffn.1")
    rows, columns = product.input_value(1).get_shape()
    weight = ops.convert(ov.op.Constant(ov.Tensor(ov.Type.u4, ov.Shape([rows, columns]))), "f32")
    scaled = ops.multiply(ops.subtract(weight, zero_point), ops.constant(np.full((rows, 1), 0.1, np.float32)))
    product.input(1).replace_source_output(scaled.output(0))
    make_names_unique(model)
    return model


def test_unsigned_around_eight_is_symmetric() -> None:
    assert found(with_zero_point(ops.constant(np.float32(8)))) == []
    for other in (ops.constant(np.float32(7)), ops.constant(np.full((128, 1), 8, np.float32))):
        (finding,) = found(with_zero_point(other))
        assert (finding.block, finding.property) == ("ffn.1", "asymmetric INT4")


def first_product(model: ov.Model, block: str) -> ov.Node:
    """The first matrix product of a block."""
    graph = annotate(model)
    number = next(b.index for b in graph.blocks if b.name == block)
    order = [op.get_friendly_name() for op in model.get_ordered_ops()]
    start = order.index(str(graph.blocks[number].input).rpartition(":")[0])
    return next(op for op in model.get_ordered_ops()[start:] if op.get_type_name() == "MatMul")


def changed(model: ov.Model, block: str, change: Callable[[ov.Output], ov.Node]) -> ov.Model:
    """The model with `change` applied to what the first matrix product of a block takes."""
    product = first_product(model, block)
    product.input(0).replace_source_output(change(product.input_value(0)).output(0))
    make_names_unique(model)
    return model


def bucketize(x: ov.Output) -> ov.Node:
    return ops.convert(ops.bucketize(x, ops.constant(np.zeros(1, np.float32))), "f32")


def non_zero(x: ov.Output) -> ov.Node:
    return ops.add(x, ops.convert(ops.reduce_sum(ops.non_zero(x), ops.constant([0, 1])), "f32"))


def sized_by_data(x: ov.Output) -> ov.Node:
    largest = ops.convert(ops.reduce_max(x, ops.constant([0, 1, 2])), "i64")
    repeats = ops.concat([ops.constant([1, 1]), ops.reshape(largest, ops.constant([1]), False)], 0)
    return ops.add(x, ops.reduce_mean(ops.tile(x, repeats), ops.constant([2]), True))


def bfloat(x: ov.Output) -> ov.Node:
    return ops.convert(ops.convert(x, "bf16"), "f32")


@pytest.mark.parametrize(
    ("change", "what", "value"),
    [
        (bucketize, "operation", "Bucketize"),
        (non_zero, "operation", "NonZero"),
        (sized_by_data, "dynamic dimension", "Tile whose size depends on data"),
        (bfloat, "element type", "bf16"),
    ],
)
@pytest.mark.parametrize("block", ["attention.0", "ffn.1"])
def test_operations(change: Callable[[ov.Output], ov.Node], what: str, value: str, block: str) -> None:
    model = changed(tiny(), block, change)
    assert found(model) == [Finding(block, what, value, "place the block on CPU or GPU@f16")]
    graph = annotate(model)
    others = [b.index for b in graph.blocks if b.name != block]
    assert check(model, graph, blocks=range(others[0], others[0] + 1)) == []


def test_recurrent_state() -> None:
    model = tiny()
    states: list[ov.Node] = []

    def remember(x: ov.Output) -> ov.Node:
        past = ops.read_value(ops.constant(np.zeros((1, 1, 64), np.float32)), "scan")
        states.append(ops.assign(ops.add(past, ops.reduce_mean(x, ops.constant([1]), True)), "scan"))
        return ops.add(x, past)

    changed(model, "ffn.0", remember)
    model = ov.Model(model.get_results(), [*model.get_sinks(), *states], model.get_parameters())
    (finding,) = found(model)
    assert (finding.property, finding.value) == ("state", "recurrent, so that padding would change it")


def test_a_cache_that_forgets() -> None:
    """A window that drops old rows in the graph: with padded rows it would drop the wrong ones."""
    model = tiny()
    assign = next(sink for sink in model.get_sinks() if ".1." in sink.get_attributes()["variable_id"])
    stored = assign.input_value(0)
    window = ops.slice(stored, ops.constant([-8]), ops.constant([2**31]), ops.constant([1]), ops.constant([2]))
    assign.input(0).replace_source_output(window.output(0))
    make_names_unique(model)
    (finding,) = found(model)
    assert (finding.block, finding.property) == ("attention.1", "state")


def test_attention_without_a_mask() -> None:
    model = tiny()
    attention = next(op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention")
    bare = ops.scaled_dot_product_attention(*attention.input_values()[:3], causal=True)
    for consumer in attention.output(0).get_target_inputs():
        consumer.replace_source_output(bare.output(0))
    make_names_unique(model)
    assert [(f.block, f.property) for f in found(model)] == [("attention.0", "attention")]


def test_prompt_limit() -> None:
    model = tiny()
    assert found(model, prompt_tokens=512, limit=512) == []
    (finding,) = found(model, prompt_tokens=513, limit=512)
    assert str(finding) == (
        "model: prompt limit: 513 tokens, static shapes hold 512; "
        "shorten the prompt, compile with a larger bucket, or use CPU or GPU"
    )


def test_a_model_in_one_piece() -> None:
    x = ops.parameter([1, 4], np.float32, "x")
    model = ov.Model([ops.result(ops.relu(x))], [x])
    (finding,) = found(model)
    assert (finding.block, finding.property) == ("block.0", "one piece")


def test_graph_of_another_model() -> None:
    graph = annotate(tiny())
    other = exported("gpt2")[1]
    make_names_unique(other)
    with pytest.raises(PlanError, match="does not belong"):
        check(other, graph)

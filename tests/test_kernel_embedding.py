"""EmbeddingLookup: rows of packed tables to the last bit, and against OpenVINO's Gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ops import Array, Matrix, Operation, core, packed, same_bits, with_threads
from openvino import opset13 as ops

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

IDS = [np.int32, np.int64]


def table(random: np.random.Generator, rows: int, columns: int, bits: int, group: int, asymmetric: bool) -> Matrix:
    """Scales of all sizes that f16 has, zero among them."""
    shape = (rows, columns // group)
    sizes = 10.0 ** random.uniform(-7.5, 4.8, shape) * random.choice([-1.0, 0.0, 1.0], shape)
    return Matrix(
        random.integers(0, 1 << bits, (rows, columns), np.uint8),
        sizes.astype(np.float16),
        random.integers(0, 1 << bits, shape, np.uint8) if asymmetric else None,
        bits,
    )


def lookup(made: Matrix, ids: Any = (-1,), kind: Any = np.int64) -> Operation:
    return Operation("EmbeddingLookup", [(ids, kind), ([-1], np.uint8)], made.attributes())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 32, 64, 96, 128]),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(IDS),
    st.integers(0, 2**32 - 1),
)
def test_gives_the_rows(
    group: int, groups: int, odd: int, rows: int, bits: int, asymmetric: bool, shape: list[int], kind: Any, seed: int
) -> None:
    """Any shape of ids (none, one without dimensions), negative ones too; whatever the padding holds."""
    random = np.random.default_rng(seed)
    columns, group = (group * groups, group) if group else (odd, odd)
    made = table(random, rows, columns, bits, group, asymmetric)
    ids = random.integers(-rows, rows, shape).astype(kind)
    operation = lookup(made, [-1] * len(shape), kind)
    expected = made.weights(np.float32)[ids]
    for name, out in operation.on_all(ids, packed(made, filler=random)):
        assert same_bits(out, expected), name


def test_a_table_of_many_rows_with_any_number_of_threads() -> None:
    random = np.random.default_rng(0)
    made = table(random, 5003, 320, 4, 64, True)
    ids = random.permutation(5003)
    weights = packed(made)
    operation = lookup(made)
    for threads in (1, 2, 5):
        assert same_bits(with_threads(threads, lambda: operation(ids, weights)), made.weights(np.float32)[ids])


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_cpu_plugin_computes_the_same(threads: int, kind: Any) -> None:
    random = np.random.default_rng(1)
    made = table(random, 100, 96, 8, 96, False)
    compiled = lookup(made, (1, -1), kind).compiled(threads)
    for count in (1, 3, 40, 0):
        ids = random.integers(-100, 100, (1, count)).astype(kind)
        assert same_bits(compiled([ids, packed(made)])[0], made.weights(np.float32)[ids])


def test_agrees_with_openvinos_gather() -> None:
    random = np.random.default_rng(2)
    made = table(random, 50, 64, 8, 64, True)
    zeros = ops.convert(ops.constant(made.zero_points), "f32")
    scales = ops.convert(ops.constant(made.scales), "f32")
    rows = ops.multiply(ops.subtract(ops.convert(ops.constant(made.codes), "f32"), zeros), scales)
    ids = ops.parameter([-1], np.int64)
    model = ov.Model([ops.gather(rows, ids, np.int64(0))], [ids])
    gather = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    asked = np.int64([0, 49, -1, -50, 17, 17])
    assert same_bits(lookup(made)(asked, packed(made)), gather(asked)[0])


def test_the_table_of_a_tied_head_is_the_heads() -> None:
    """The same bytes, read by both operations: a row's product with itself is the sum of its squares."""
    random = np.random.default_rng(3)
    made = Matrix(
        random.integers(0, 256, (37, 128), np.uint8), random.uniform(0.001, 0.01, (37, 1)).astype(np.float16), None, 8
    )
    weights = packed(made)
    rows: Array = lookup(made)(np.arange(37), weights)
    plain = {"norm": "", "epsilon": 0.0, "gated": False, "activation": "", "bias": False, "residual": False}
    head = Operation("QuantizedLinear", [([-1, 128], np.float32), ([-1], np.uint8)], {**made.attributes(), **plain})
    np.testing.assert_allclose(np.diag(head(rows, weights)), (rows.astype(np.float64) ** 2).sum(axis=1), rtol=0.01)


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("bad", [10, -11, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_an_id_outside_of_the_table_is_named(bad: int, kind: Any) -> None:
    if not np.iinfo(kind).min <= bad <= np.iinfo(kind).max:
        pytest.skip(f"{bad} is no {np.dtype(kind)}")
    made = table(np.random.default_rng(4), 10, 32, 4, 32, False)
    ids = np.array([3, bad], kind)
    with pytest.raises(RuntimeError, match=f"id {bad} is outside of a table of 10 rows"):
        lookup(made, kind=kind)(ids, packed(made))
    if abs(bad) < 2**31:  # the plugin cuts ids to 32 bits before anyone sees them
        with pytest.raises(RuntimeError, match=f"id {bad} is outside of a table of 10 rows"):
            lookup(made, kind=kind).compiled()([ids, packed(made)])

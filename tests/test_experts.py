"""Grouped products as products of all experts: the same numbers."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from openvino.opset17 import grouped_matmul

from edgert.experts import without_grouped_products

EXPERTS, WIDTH, INNER = 4, 8, 16  # groups of 4 and 8: the CPU plugin (2026.4.1) errs where they are no powers of two
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def block(used: int, *, compressed: bool = False, plain: bool = False) -> ov.Model:
    """Two grouped products with a squared ReLU between, over tokens `hidden` and the `used` experts of each, `chosen`.

    Args:
        plain: rows are an input, in the order of experts, so that nothing tells how many tokens there are.
    """
    random = np.random.default_rng(0)

    def weights(rows: int, columns: int) -> ov.Output:
        if not compressed:
            return ops.constant(random.normal(size=(EXPERTS, rows, columns)).astype(np.float32)).output(0)
        codes = ops.constant(random.integers(-8, 8, (EXPERTS, rows, 2, columns // 2)).astype(np.int8))
        scales = ops.constant(random.uniform(0.1, 0.2, (EXPERTS, rows, 2, 1)).astype(np.float16))
        scaled = ops.multiply(ops.convert(codes, "f16"), scales)
        return ops.convert(ops.reshape(scaled, ops.constant([EXPERTS, rows, columns]), False), "f32").output(0)

    hidden = ops.parameter([-1, WIDTH], ov.Type.f32)
    chosen = ops.parameter([-1], ov.Type.i64)
    hidden.output(0).set_names({"hidden"})
    chosen.output(0).set_names({"chosen"})
    zero, one = (ops.constant(v, ov.Type.i64) for v in (0, 1))
    each = ops.equal(ops.unsqueeze(chosen, one), ops.constant(np.arange(EXPERTS)))
    ends = ops.cum_sum(ops.reduce_sum(ops.convert(each, "i32"), zero), zero)
    rows = hidden
    if not plain:
        size = ops.gather(ops.shape_of(chosen), zero, zero)
        order = ops.topk(chosen, size, 0, "min", "value", "i64", stable=True).output(1)
        rows = ops.gather(hidden, ops.divide(order, ops.constant(used, ov.Type.i64)), zero)
    inner = ops.power(ops.relu(grouped_matmul(rows, weights(INNER, WIDTH), ends)), ops.constant(np.float32(2)))
    return ov.Model([ops.result(grouped_matmul(inner, weights(WIDTH, INNER), ends))], [hidden, chosen], "experts")


def run(model: ov.Model, hidden: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    return np.array(compiled({"hidden": hidden, "chosen": chosen})[0])


def types(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("used", "chosen"),
    [
        (2, [[0, 3], [3, 1], [3, 0], [1, 3], [0, 1]]),  # nobody wants expert 2
        (1, [[2], [2], [2]]),
        (4, [[3, 2, 1, 0]]),
    ],
)
def test_all_experts_give_what_the_chosen_ones_do(compressed: bool, used: int, chosen: list[list[int]]) -> None:
    model = block(used, compressed=compressed)
    dense = without_grouped_products(model)
    assert types(model).count("GroupedMatMul") == 2
    assert "GroupedMatMul" not in types(dense)
    hidden = np.random.default_rng(1).normal(size=(len(chosen), WIDTH)).astype(np.float32)
    flat = np.array(chosen).reshape(-1)
    expected = run(model, hidden, flat)
    np.testing.assert_allclose(run(dense, hidden, flat), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).min(axis=1).all()  # every row has a product of its own


def test_an_expert_takes_as_many_rows_as_there_are_tokens() -> None:
    model = block(2)
    model.reshape({"hidden": [5, WIDTH], "chosen": [10]})
    found = [n.get_output_shape(0) for n in without_grouped_products(model).get_ops() if n.get_type_name() == "MatMul"]
    assert sorted(map(list, found)) == [[EXPERTS, 5, WIDTH], [EXPERTS, 5, INNER]]


def test_rows_of_unknown_origin() -> None:
    model = block(1, plain=True)
    hidden = np.random.default_rng(1).normal(size=(6, WIDTH)).astype(np.float32)
    chosen = np.array([0, 1, 1, 1, 3, 3])
    expected = run(model, hidden, chosen)
    dense = run(without_grouped_products(model), hidden, chosen)
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_other_models_are_left_as_they_are() -> None:
    hidden = ops.parameter([2, 3], ov.Type.f32)
    model = ov.Model([ops.result(ops.relu(hidden))], [hidden], "plain")
    assert without_grouped_products(model) is model

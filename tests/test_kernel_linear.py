"""QuantizedLinear: against its definition to the last bit, against exact arithmetic, and against OpenVINO's MatMul."""

from __future__ import annotations

import functools
import threading
from typing import Any

import linear_definition as definition
import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ops import Array, Matrix, Operation, core, factory, packed, same_bits, with_threads
from linear_definition import Linear
from openvino import opset13 as ops

from edgert import native, packing

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

F16 = np.finfo(np.float16)
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh")
MATRIX_SCALES = ("plain", "largest", "smallest", "subnormal", "any", "some rows zero")
DATA = ("plain", "some rows zero", "some steps zero", "large", "small", "denormal", "any", "one value")


def inputs_of(linear: Linear, residual: bool, data: Any = (-1,), weights: Any = (-1,)) -> list[tuple[Any, Any]]:
    """Partial shape and type of each input."""
    found: list[tuple[Any, Any]] = [([*data, linear.matrix.columns], np.float32), (weights, np.uint8)]
    if linear.norm is not None:
        found.append(([-1], np.float32))
    if linear.bias is not None:
        found.append(([-1], np.float32))
    if residual:
        found.append(([*data, linear.matrix.rows], np.float32))
    return found


def operation(linear: Linear, residual: bool = False, data: Any = (-1,)) -> Operation:
    return Operation("QuantizedLinear", inputs_of(linear, residual, data), linear.attributes(residual))


def tensors(linear: Linear, x: Array, residual: Array | None = None, filler: Any = None) -> list[Array]:
    optional = (linear.norm, linear.bias, residual)
    return [x, packed(linear.matrix, linear.up, filler), *(each for each in optional if each is not None)]


def matrix(
    random: np.random.Generator, rows: int, columns: int, bits: int, group: int, *, asymmetric: bool = False,
    scales: str = "plain",
) -> Matrix:  # fmt: skip
    shape = (rows, columns // group)
    signs = random.choice([-1.0, 1.0], shape)
    numbers = {
        "plain": random.uniform(0.001, 0.02, shape) * signs,
        "largest": np.full(shape, F16.max) * signs,
        "smallest": np.full(shape, F16.smallest_normal),
        "subnormal": np.full(shape, F16.smallest_subnormal) * random.integers(0, 4, shape),
        "any": 10.0 ** random.uniform(-7.5, 4.8, shape) * signs,
        "some rows zero": np.where(random.random((rows, 1)) < 0.5, 0.0, random.uniform(0.001, 0.02, shape)),
    }[scales]
    high = 1 << bits
    return Matrix(
        random.integers(0, high, (rows, columns), np.uint8),
        numbers.astype(np.float16),
        random.integers(0, high, shape, np.uint8) if asymmetric else None,
        bits,
    )


def activations(random: np.random.Generator, rows: int, columns: int, kind: str) -> Array:
    shape = (rows, columns)
    plain = random.standard_normal(shape)
    found = {
        "plain": plain,
        "some rows zero": plain * (random.random((rows, 1)) < 0.5),
        "some steps zero": plain * (random.random((rows, columns // 32 + 1)) < 0.5).repeat(32, axis=1)[:, :columns],
        "large": plain * 1e37,
        "small": plain * 1e-36,
        "denormal": plain * 1e-39,
        "any": 10.0 ** random.uniform(-38, 38, shape) * np.sign(plain),
        "one value": np.where(np.arange(columns) == random.integers(columns), plain, 0.0),
    }[kind]
    return found.astype(np.float32)


@st.composite
def groupings(draw: st.DrawFn) -> tuple[int, int]:
    """Columns and group: any number of columns for one scale a row, else multiples of 32."""
    group = draw(st.sampled_from([0, 32, 64, 96, 128, 160, 256]))
    if group == 0:
        columns = draw(st.one_of(st.integers(1, 70), st.integers(71, 600)))
        return columns, columns
    return group * draw(st.integers(1, max(1, 640 // group))), group


@st.composite
def linears(draw: st.DrawFn) -> tuple[Linear, np.random.Generator]:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns, group = draw(groupings())
    rows = draw(st.one_of(st.integers(1, 50), st.integers(51, 100)))
    bits = draw(st.sampled_from([4, 8]))
    asymmetric = draw(st.booleans())
    gated = draw(st.booleans())
    weights = [
        matrix(random, rows, columns, bits, group, asymmetric=asymmetric, scales=draw(st.sampled_from(MATRIX_SCALES)))
        for _ in range(2 if gated else 1)
    ]
    found = Linear(
        weights[0],
        weights[1] if gated else None,
        norm=random.standard_normal(columns).astype(np.float32) if draw(st.booleans()) else None,
        epsilon=draw(st.sampled_from([1e-6, 1e-5, 0.5])),
        activation=draw(st.sampled_from(ACTIVATIONS)) if gated else "",
        bias=random.standard_normal(rows).astype(np.float32) if not gated and draw(st.booleans()) else None,
    )
    return found, random


def check_definition(linear: Linear, x: Array, residual: Array | None, out: Array) -> None:
    """Bit for bit; what follows a gate's activation within the accuracy that the activations claim."""
    normed = linear.normed(x)
    first = definition.product(normed, linear.matrix)
    if linear.up is None:
        expected = linear.epilogue(first, residual)
        assert same_bits(out, expected), np.argwhere(out != expected)[:5]
        return
    second = definition.product(normed, linear.up)
    if not linear.activation:
        with np.errstate(over="ignore", invalid="ignore"):
            expected = linear.epilogue(first * second, residual)
        assert same_bits(out, expected), np.argwhere(out != expected)[:5]
        return
    gate, up = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        added = 0.0 if residual is None else residual.astype(np.float64)
        exact = definition.activation(linear.activation, gate) * up
        bound = definition.activation_bound(linear.activation, gate) * np.abs(up)
        bound += 3 * definition.EPS * (np.abs(exact) + np.abs(added)) + 1e-44
        # Beyond, x^3 or a product is no f32: what comes out then is infinite or no number.
        judged = (np.abs(gate) < 1e12) & (np.abs(exact) < 1e38)
        wrong = judged & ~(np.abs(out - (exact + added)) <= bound)
    assert not wrong.any(), (linear.activation, gate[wrong][:3], up[wrong][:3], out[wrong][:3], exact[wrong][:3])


@settings(max_examples=150, deadline=None)
@given(linears(), st.one_of(st.integers(1, 20), st.integers(21, 257)), st.sampled_from(DATA), st.booleans())
def test_is_its_definition_on_every_instruction_set(
    made: tuple[Linear, np.random.Generator], count: int, kind: str, add: bool
) -> None:
    linear, random = made
    x = activations(random, count, linear.matrix.columns, kind)
    residual = random.standard_normal((count, linear.matrix.rows)).astype(np.float32) if add else None
    given_tensors = tensors(linear, x, residual, filler=random)
    results = dict(operation(linear, add).on_all(*given_tensors))
    for name, out in results.items():
        assert same_bits(out, results["scalar"]), name
    check_definition(linear, x, residual, results["scalar"])


@settings(max_examples=60, deadline=None)
@given(linears(), st.integers(1, 17), st.sampled_from(DATA))
def test_is_the_product_but_for_the_quantization_of_activations(
    made: tuple[Linear, np.random.Generator], count: int, kind: str
) -> None:
    linear, random = made
    plain = Linear(linear.matrix)
    x = activations(random, count, linear.matrix.columns, kind)
    out = operation(plain)(*tensors(plain, x)).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = x.astype(np.float64) @ linear.matrix.weights().T
        bound = definition.product_bound(x, linear.matrix)
        wrong = definition.in_range(x, linear.matrix) & ~(np.abs(out - exact) <= bound)
    assert not wrong.any(), (np.argwhere(wrong)[:3], out[wrong][:3], exact[wrong][:3], bound[wrong][:3])


@settings(max_examples=25, deadline=None)
@given(groupings(), st.integers(1, 5), st.sampled_from([1e-4, 1.0, 1e6]), st.integers(0, 2**32 - 1))
def test_norm_is_that_of_the_definition(grouping: tuple[int, int], count: int, magnitude: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns, group = grouping
    x = (random.standard_normal((count, columns)) * magnitude).astype(np.float32)
    weight = random.standard_normal(columns).astype(np.float32)
    ours = definition.rms_norm(x, weight, 1e-6)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(ours, exact, rtol=(columns / 16 + 8) * definition.EPS)
    linear = Linear(matrix(random, 20, columns, 8, group), norm=weight)
    out = operation(linear)(*tensors(linear, x))
    bound = definition.product_bound(ours, linear.matrix)
    bound += (columns / 16 + 8) * definition.EPS * (np.abs(exact) @ np.abs(linear.matrix.weights()).T)
    assert (np.abs(out - exact @ linear.matrix.weights().T) <= bound).all()


LARGE = [
    # rows of data, columns of the product, columns of the matrix, bits, group, gated
    (257, 333, 1024, 4, 128, False),
    (128, 200, 1120, 4, 160, True),
    (65, 1000, 257, 8, 257, False),
    (17, 2051, 768, 8, 64, False),
    (1, 4099, 2048, 4, 2048, False),
    (2, 777, 4096, 4, 32, True),
]


def large(case: tuple[int, int, int, int, int, bool]) -> tuple[Linear, Array, Array]:
    count, rows, columns, bits, group, gated = case
    random = np.random.default_rng(count)
    gate, up = (matrix(random, rows, columns, bits, group, asymmetric=bool(count % 2)) for _ in range(2))
    norm = random.standard_normal(columns).astype(np.float32)
    linear = Linear(gate, up if gated else None, norm=norm, activation="silu" if gated else "")
    return (
        linear,
        random.standard_normal((count, columns)).astype(np.float32),
        random.standard_normal((count, rows)).astype(np.float32),
    )


@pytest.mark.parametrize("case", LARGE)
def test_large_ones_too_with_any_number_of_threads(case: tuple[int, int, int, int, int, bool]) -> None:
    linear, x, residual = large(case)
    made = operation(linear, residual=True)
    given_tensors = tensors(linear, x, residual)
    results = dict(made.on_all(*given_tensors))
    for name, out in results.items():
        assert same_bits(out, results["scalar"]), name
    check_definition(linear, x, residual, results["scalar"])
    for threads in (1, 2, 5):
        assert same_bits(with_threads(threads, lambda: made(*given_tensors)), results["scalar"]), threads


@pytest.mark.parametrize("case", LARGE[1:4])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_cpu_plugin_computes_the_same(case: tuple[int, int, int, int, int, bool], threads: int) -> None:
    linear, x, residual = large(case)
    made = operation(linear, residual=True)
    compiled = made.compiled(threads)
    for count in (1, 2, 7, 8, 9, 16, len(x)):
        given_tensors = tensors(linear, x[:count], residual[:count])
        assert same_bits(compiled(given_tensors)[0], made(*given_tensors)), count


def test_a_row_does_not_depend_on_the_others() -> None:
    random = np.random.default_rng(5)
    linear = Linear(matrix(random, 50, 320, 4, 64, asymmetric=True), norm=np.ones(320, np.float32))
    x = random.standard_normal((40, 320)).astype(np.float32)
    made = operation(linear)
    for name, together in made.on_all(*tensors(linear, x)):
        assert same_bits(np.concatenate([made(*tensors(linear, row[None])) for row in x]), together), name


def test_requests_at_the_same_time_do_not_disturb_each_other() -> None:
    linear, x, residual = large(LARGE[3])
    made = operation(linear, residual=True)
    pieces = [tensors(linear, x[i : i + 5], residual[i : i + 5]) for i in range(4)]
    expected = [made(*each) for each in pieces]
    compiled = made.compiled(2, NUM_STREAMS=2)
    found: list[list[Array]] = [[] for _ in pieces]

    def work(i: int) -> None:
        request = compiled.create_infer_request()
        for _ in range(20):
            found[i].append(np.array(request.infer(pieces[i])[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pieces))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, want in zip(found, expected, strict=True):
        assert len(outs) == 20
        assert all(same_bits(out, want) for out in outs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_nan(value: float, norm: bool, gated: bool) -> None:
    random = np.random.default_rng(0)
    gate, up = (matrix(random, 21, 288, 4, 96, asymmetric=True, scales="some rows zero") for _ in range(2))
    weight = np.ones(288, np.float32) if norm else None
    linear = Linear(gate, up if gated else None, norm=weight, activation="gelu" if gated else "")
    x = random.standard_normal((19, 288)).astype(np.float32)
    clean = operation(linear)(*tensors(linear, x))
    x[[2, 18], [287, 40]] = value
    for name, out in operation(linear).on_all(*tensors(linear, x)):
        assert np.isnan(out[[2, 18]]).all(), name
        rest = np.delete(np.arange(19), [2, 18])
        assert same_bits(out[rest], clean[rest]), name


@functools.cache
def sweep() -> Array:
    """Numbers of both signs and all sizes that a gate may have, more of them where activations bend."""
    sizes = np.concatenate([10.0 ** np.linspace(-30, 11, 400), np.linspace(0.0, 110, 1501)])
    return np.concatenate([sizes, -sizes]).astype(np.float32)[:, None]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations_are_accurate_everywhere(name: str) -> None:
    """One column, whose code is 127 or -127: what comes out is as good as any number."""
    one = Matrix(np.full((1, 1), 129, np.uint8), np.ones((1, 1), np.float16), None, 8)
    small = Matrix(one.codes, np.full((1, 1), 2.0**-20, np.float16), None, 8)
    linear = Linear(one, small, activation=name)
    for used, out in operation(linear).on_all(*tensors(linear, sweep())):
        gate = definition.product(sweep(), one).astype(np.float64)
        up = definition.product(sweep(), small).astype(np.float64)
        exact = definition.activation(name, gate) * up
        bound = definition.activation_bound(name, gate) * np.abs(up) + 1e-44
        assert (np.abs(out - exact) <= bound).all(), used


def constant(codes: Array, bits: int) -> ov.Node:
    """u4 or u8 `[rows, groups, group]`, as compressed models hold them."""
    if bits == 8:
        return ops.constant(codes)
    flat = codes.reshape(-1)
    flat = np.pad(flat, (0, flat.size % 2))
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(codes.shape))  # memory of its own: one made from an array would refer to it
    tensor.data.reshape(-1)[:] = flat[::2] | flat[1::2] << 4
    return ops.constant(tensor)


def openvino_product(weights: Matrix, threads: int = 2) -> ov.CompiledModel:
    """OpenVINO's MatMul with the same compressed weights, activations in f32."""
    grouped = (weights.rows, -1, weights.group)
    codes = ops.convert(constant(weights.codes.reshape(grouped), weights.bits), "f16")
    less = ops.subtract(codes, ops.convert(constant(weights.zeros[:, :, None], weights.bits), "f16"))
    scaled = ops.reshape(
        ops.multiply(less, ops.constant(weights.scales[:, :, None])), [weights.rows, weights.columns], False
    )
    x = ops.parameter([-1, weights.columns], np.float32)
    model = ov.Model([ops.matmul(x, ops.convert(scaled, "f32"), False, True)], [x])
    properties = {
        "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_NUM_THREADS": threads,
    }  # fmt: skip
    return core().compile_model(model, "CPU", properties)


@settings(max_examples=25, deadline=None)
@given(groupings(), st.integers(1, 90), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_agrees_with_openvinos_compressed_product(
    grouping: tuple[int, int], rows: int, count: int, four: bool, asymmetric: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    columns, group = grouping
    if four and columns % 2:  # OpenVINO misreads u4 rows that begin inside a byte
        columns, group = columns + 1, group + 1
    weights = matrix(random, rows, columns, 4 if four else 8, group, asymmetric=asymmetric)
    x = random.standard_normal((count, columns)).astype(np.float32)
    linear = Linear(weights)
    ours = operation(linear)(*tensors(linear, x))
    theirs = openvino_product(weights)(x)[0]
    summed = np.abs(x) @ np.abs(weights.weights(np.float32)).T
    bound = definition.product_bound(x, weights) + columns * definition.EPS * summed
    assert (np.abs(ours - theirs) <= bound).all()


@pytest.mark.parametrize("hint", ["f32", "bf16", "f16"])
def test_keeps_its_precision_inside_a_graph(hint: str) -> None:
    """Between operations that the plugin may run in 16 bits."""
    random = np.random.default_rng(1)
    linear = Linear(matrix(random, 48, 64, 8, 64))
    before = np.eye(64, dtype=np.float32)
    x = np.round(random.standard_normal((3, 64)) * 8).astype(np.float32)  # exact in bf16
    data = ops.parameter([-1, 64], np.float32)
    hidden = ops.matmul(data, ops.constant(before), False, False)
    inputs = [hidden, ops.constant(packed(linear.matrix))]
    middle = factory().create("QuantizedLinear", inputs, linear.attributes(residual=False))
    compiled = core().compile_model(ov.Model([middle], [data]), "CPU", {"INFERENCE_PRECISION_HINT": hint})
    assert same_bits(compiled(x)[0], operation(linear)(*tensors(linear, x)))


@settings(max_examples=40, deadline=None)
@given(groupings(), st.integers(1, 60), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_packing_makes_what_the_kernels_read(
    grouping: tuple[int, int], rows: int, four: bool, asymmetric: bool, gated: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    columns, group = grouping
    bits = 4 if four else 8
    if columns % (32 // bits):  # codes of a row end within a word: no model has that, and the packer refuses it
        return
    pair = [
        matrix(random, rows, columns, bits, group, asymmetric=asymmetric, scales="any")
        for _ in range(2 if gated else 1)
    ]
    given_matrices = [
        packing.Matrix(
            each.codes if bits == 8 else each.codes[:, ::2] | each.codes[:, 1::2] << 4,
            each.scales, each.zero_points, bits, signed=False,
        )
        for each in pair
    ]  # fmt: skip
    assert np.array_equal(packing.pack(given_matrices, gated=gated), packed(*pair))

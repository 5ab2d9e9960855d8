"""What the native products and lookups refuse: attributes, shapes and sizes, when a model is read and when it runs.

A refusal is an error that names what is wrong. Run with sanitizers (`make test-sanitized`), this also shows that
nothing is read or written that a tensor does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ops import Array, Operation, core, factory, instruction_set, instruction_sets
from openvino import opset13 as ops

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

TABLE = {"in_features": 64, "out_features": 20, "bits": 4, "group": 32, "asymmetric": False}
LINEAR = {
    **TABLE, "norm": "rms", "epsilon": 1e-6, "gated": False, "activation": "", "bias": True, "residual": True,
}  # fmt: skip
BYTES = 2 * 16 * 64 // 2 + 2 * 2 * 16 * 2
F32, U8 = np.float32, np.uint8
INPUTS: dict[str, tuple[Any, Any]] = {
    "data": ([3, 64], F32), "weights": ([BYTES], U8), "norm_weight": ([64], F32), "bias": ([20], F32),
    "residual": ([3, 20], F32),
}  # fmt: skip
LOOKUP: dict[str, tuple[Any, Any]] = {"ids": ([3], np.int64), "weights": ([BYTES], U8)}


def linear(changes: dict[str, tuple[Any, Any]] | None = None, **attributes: Any) -> Operation:
    return Operation("QuantizedLinear", list({**INPUTS, **(changes or {})}.values()), {**LINEAR, **attributes})


def lookup(changes: dict[str, tuple[Any, Any]] | None = None, **attributes: Any) -> Operation:
    return Operation("EmbeddingLookup", list({**LOOKUP, **(changes or {})}.values()), {**TABLE, **attributes})


def zeros(inputs: dict[str, tuple[Any, Any]]) -> list[Array]:
    return [np.zeros(shape, kind) for shape, kind in inputs.values()]


def test_what_fits_is_accepted() -> None:
    assert linear()(*zeros(INPUTS)).shape == (3, 20)
    assert lookup()(*zeros(LOOKUP)).shape == (3, 64)


SIZES = [
    ({"in_features": 0}, "in_features is 0, expected 1 to"),
    ({"in_features": -64}, "in_features is -64, expected 1 to"),
    ({"in_features": 2**31}, "in_features is 2147483648, expected 1 to"),
    ({"in_features": -(2**63)}, "in_features is -9223372036854775808, expected 1 to"),
    ({"out_features": 0}, "out_features is 0, expected 1 to"),
    ({"out_features": -1}, "out_features is -1, expected 1 to"),
    ({"out_features": 2**63 - 1}, "out_features is 9223372036854775807, expected 1 to"),
    ({"bits": 2}, "bits is 2, expected 4 or 8"),
    ({"bits": 16}, "bits is 16, expected 4 or 8"),
    ({"bits": -4}, "bits is -4, expected 4 or 8"),
    ({"group": 0}, "group is 0, expected in_features"),
    ({"group": -32}, "group is -32, expected in_features"),
    ({"group": 16}, "group is 16, expected in_features"),
    ({"group": 96}, "group is 96, expected in_features"),
    ({"group": 128}, "group is 128, expected in_features"),
    ({"asymmetric": True}, rf"weights must have shape \[{BYTES + 64}\], got \[{BYTES}\]"),
    ({"bits": 8}, rf"weights must have shape \[{BYTES + 1024}\], got \[{BYTES}\]"),
    ({"group": 64}, rf"weights must have shape \[{BYTES - 64}\], got \[{BYTES}\]"),
]


@pytest.mark.parametrize(("attributes", "message"), SIZES)
def test_sizes_that_fit_no_packed_weights_are_named(attributes: dict[str, Any], message: str) -> None:
    for make in (linear, lookup):
        with pytest.raises(RuntimeError, match=message):
            make(**attributes)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"norm": "layer"}, "norm is 'layer', expected '' or 'rms'"),
        ({"epsilon": -1e-6}, "epsilon must be finite and not negative, got -1e-06"),
        ({"epsilon": float("inf")}, "epsilon must be finite and not negative, got inf"),
        ({"epsilon": float("nan")}, "epsilon must be finite and not negative, got -?nan"),
        ({"activation": "silu"}, "activation is 'silu', expected '', or for a gated product"),
        ({"gated": True, "activation": "tanh"}, "activation is 'tanh', expected '', or for a gated product"),
        ({"gated": True}, "a gated product takes no bias"),
        ({"bias": False}, "takes 4 inputs, got 5"),
        ({"residual": False}, "takes 4 inputs, got 5"),
        ({"norm": ""}, "takes 4 inputs, got 5"),
        ({"out_features": 2**30}, "out_features is 1073741824, expected 1 to"),
    ],
)
def test_attributes_of_a_product_that_do_not_fit_are_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        linear(**attributes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ([3, 65], F32)}, r"last dimension of data \[3,65\] must be in_features \(64\)"),
        ({"data": ([], F32)}, "data must have rank 1 or more, got a scalar"),
        ({"data": ([3, 64], np.float16)}, "data must be f32, got f16"),
        ({"weights": ([BYTES], np.int8)}, "weights must be u8, got i8"),
        ({"weights": ([BYTES - 1], U8)}, rf"weights must have shape \[{BYTES}\], got \[{BYTES - 1}\]"),
        ({"weights": ([1, BYTES], U8)}, rf"weights must have shape \[{BYTES}\], got \[1,{BYTES}\]"),
        ({"norm_weight": ([1, 64], F32)}, r"norm_weight must have shape \[64\], got \[1,64\]"),
        ({"norm_weight": ([63], F32)}, r"norm_weight must have shape \[64\], got \[63\]"),
        ({"norm_weight": ([64], np.float16)}, "norm_weight must be f32, got f16"),
        ({"bias": ([21], F32)}, r"bias must have shape \[20\], got \[21\]"),
        ({"residual": ([2, 20], F32)}, r"residual must have shape \[3,20\], got \[2,20\]"),
        ({"residual": ([3, 20], np.int32)}, "residual must be f32, got i32"),
    ],
)
def test_inputs_of_a_product_that_do_not_fit_are_named(changes: dict[str, tuple[Any, Any]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        linear(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ([3], np.float32)}, "ids must be i32 or i64, got f32"),
        ({"weights": ([BYTES], np.float32)}, "weights must be u8, got f32"),
        ({"weights": ([BYTES + 1], U8)}, rf"weights must have shape \[{BYTES}\], got \[{BYTES + 1}\]"),
        ({"more": ([1], U8)}, r"takes 2 inputs \(ids, weights\), got 3"),
    ],
)
def test_inputs_of_a_lookup_that_do_not_fit_are_named(changes: dict[str, tuple[Any, Any]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        lookup(changes)


def unknown(inputs: dict[str, tuple[Any, Any]], ranks: bool = False) -> dict[str, tuple[Any, Any]]:
    """The same without shapes; the CPU plugin wants to know their ranks."""
    return {
        name: ([-1] * len(shape) if ranks else ov.PartialShape.dynamic(), kind)
        for name, (shape, kind) in inputs.items()
    }


LATE = [
    ({"data": ([3, 63], F32)}, r"data \[3,63\] must be in_features \(64\)"),
    ({"data": ([3, 65], F32)}, r"data \[3,65\] must be in_features \(64\)"),
    ({"data": ([], F32)}, r"data \[\] must be in_features \(64\)"),
    ({"weights": ([0], U8)}, f"weights have 0 bytes, expected {BYTES}"),
    ({"weights": ([BYTES - 1], U8)}, f"weights have {BYTES - 1} bytes, expected {BYTES}"),
    ({"norm_weight": ([63], F32)}, "input 2 has 63 elements, expected 64"),
    ({"bias": ([16], F32)}, "input 3 has 16 elements, expected 20"),
    ({"residual": ([3, 16], F32)}, "input 4 has 48 elements, expected 60"),
    ({"residual": ([2, 20], F32)}, "input 4 has 40 elements, expected 60"),
]


@pytest.mark.parametrize(("changes", "message"), LATE)
def test_tensors_of_a_product_that_turn_out_wrong_are_named(changes: dict[str, tuple[Any, Any]], message: str) -> None:
    """Shapes that nobody knew before; asked directly, as OpenVINO's plugin looks at some of them itself."""
    made = linear(unknown(INPUTS))
    assert made(*zeros(INPUTS)).shape == (3, 20)
    for name in instruction_sets():
        with instruction_set(name), pytest.raises(RuntimeError, match=message):
            made(*zeros({**INPUTS, **changes}))


@pytest.mark.parametrize("changes", [changes for changes, _ in LATE if changes.get("data") != ([], F32)])
def test_the_cpu_plugin_refuses_them_too(changes: dict[str, tuple[Any, Any]]) -> None:
    compiled = linear(unknown(INPUTS, ranks=True)).compiled(2)
    assert compiled(zeros(INPUTS))[0].shape == (3, 20)
    with pytest.raises(RuntimeError, match=r"QuantizedLinear|Can't set the input tensor"):
        compiled(zeros({**INPUTS, **changes}))
    assert compiled(zeros(INPUTS))[0].shape == (3, 20)


@pytest.mark.parametrize("size", [0, 1, BYTES - 1, BYTES + 1])
def test_tables_that_turn_out_wrong_are_named(size: int) -> None:
    made = lookup(unknown(LOOKUP))
    with pytest.raises(RuntimeError, match=f"weights have {size} bytes, expected {BYTES}"):
        made(np.zeros(3, np.int64), np.zeros(size, U8))
    with pytest.raises(RuntimeError, match="EmbeddingLookup"):
        lookup(unknown(LOOKUP, ranks=True)).compiled(2)([np.zeros(3, np.int64), np.zeros(size, U8)])


def test_weights_at_an_odd_address_are_refused() -> None:
    """Their scales could not be read as 16-bit numbers."""
    odd = np.zeros(BYTES + 1, U8)[1:]
    with pytest.raises(RuntimeError, match=r"QuantizedLinear .*weights begin at an odd address"):
        linear()(np.zeros((3, 64), F32), odd, *zeros(INPUTS)[2:])
    with pytest.raises(RuntimeError, match=r"EmbeddingLookup .*weights begin at an odd address"):
        lookup()(np.zeros(3, np.int64), odd)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    empty = {**INPUTS, "data": (shape, F32), "residual": ((*shape[:-1], 20), F32)}
    made = linear(unknown(empty, ranks=True))
    assert made(*zeros(empty)).shape == (*shape[:-1], 20)
    assert made.compiled(2)(zeros(empty))[0].shape == (*shape[:-1], 20)


def test_shapes_are_inferred() -> None:
    assert linear({"data": ([1, -1, 64], F32), "residual": ([1, -1, 20], F32)}).node.output(0).partial_shape == (
        ov.PartialShape([1, -1, 20])
    )
    assert linear(unknown(INPUTS)).node.output(0).partial_shape.rank.is_dynamic
    assert lookup({"ids": ([1, -1], np.int32)}).node.output(0).partial_shape == ov.PartialShape([1, -1, 64])


def test_survives_a_file(tmp_path: Path) -> None:
    """Attributes and packed constants: what a bundle's model holds."""
    table = ops.constant(np.arange(BYTES, dtype=np.uint8))
    ids = ops.parameter([-1], np.int64)
    rows = factory().create("EmbeddingLookup", [ids, table], TABLE)
    wide = {**LINEAR, "gated": True, "activation": "gelu", "norm": "", "bias": False, "residual": False}
    weights = ops.constant(np.zeros(2 * BYTES, np.uint8))
    model = ov.Model([factory().create("QuantizedLinear", [rows, weights], wide)], [ids])
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    with pytest.raises(RuntimeError, match=r"EmbeddingLookup|QuantizedLinear"):
        ov.Core().read_model(tmp_path / "model.xml")
    loaded = core().read_model(tmp_path / "model.xml")
    found = {op.get_type_name(): op.get_attributes() for op in loaded.get_ops()}
    assert found["QuantizedLinear"] == wide
    assert found["EmbeddingLookup"] == TABLE


@contextmanager
def suppress_errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if name not in str(error):
            raise


NUMBERS = st.sampled_from([-(2**63), -(2**31), -32, -1, 0, 1, 4, 8, 31, 32, 33, 64, 96, 2**30, 2**31 - 1, 2**31, 2**62])
NUMBERS |= st.integers(1, 130)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_model_says_it_is_refused_or_stays_in_bounds(data: st.DataObject) -> None:
    """Attributes and sizes at random; where they happen to fit, the result must be there, whole."""
    likely = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)), data.draw(st.sampled_from([4, 8]))
    attributes: dict[str, Any] = {
        "in_features": data.draw(st.just(likely[0]) | NUMBERS),
        "out_features": data.draw(st.just(likely[1]) | NUMBERS),
        "bits": data.draw(st.just(likely[2]) | NUMBERS),
        "group": data.draw(st.just(likely[0]) | NUMBERS),
        "asymmetric": data.draw(st.booleans()),
    }
    columns, rows, bits = likely
    is_linear = data.draw(st.booleans())
    gated = is_linear and data.draw(st.booleans())
    if is_linear:
        attributes |= {
            "norm": data.draw(st.sampled_from(["", "rms"])), "epsilon": 1e-6, "gated": gated,
            "activation": data.draw(st.sampled_from(["", "silu"])), "bias": data.draw(st.booleans()),
            "residual": data.draw(st.booleans()),
        }  # fmt: skip
    blocks = -(-rows // 16) * (2 if gated else 1)
    size = blocks * 16 * (-(-columns // 32) * 4 * bits + (3 if attributes["asymmetric"] else 2))
    size += data.draw(st.sampled_from([0, 0, 0, -1, 1, -size]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(0, 20))
    weights = random.integers(0, 256, size, np.uint8)  # as scales, some are infinite or NaN
    if is_linear:
        shapes = [(count, columns), (columns,), (rows,), (count, rows)]
        given_flags = (True, attributes["norm"] == "rms", attributes["bias"], attributes["residual"])
        tensors = [random.standard_normal(s).astype(F32) for s, flag in zip(shapes, given_flags, strict=True) if flag]
        tensors.insert(1, weights)
    else:
        tensors = [random.integers(-rows - 1, rows + 1, count), weights]
    name = "QuantizedLinear" if is_linear else "EmbeddingLookup"
    used = data.draw(st.sampled_from(instruction_sets()))
    shapes_unknown = [(ov.PartialShape.dynamic(), each.dtype) for each in tensors]
    out = None
    # What is refused must say who refuses: an error from deeper down means that a check is missing.
    with instruction_set(used), suppress_errors_of(name):
        out = Operation(name, shapes_unknown, attributes)(*tensors)
    assert out is None or out.shape == (count, attributes["out_features" if is_linear else "in_features"])

"""What CachedAttention refuses: attributes, shapes and sizes, when a model is read and when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from attention_definition import Attention
from attention_steps import operation, steps_of
from kernel_ops import Array, Operation, core, factory
from openvino import opset13 as ops

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

GOOD: dict[str, Any] = Attention(4, 2, 8, 12).attributes()
SHAPES: dict[str, Any] = {"qkv": [1, -1, 72], "cache": [-1, 2, 512], "past": [1]}
TYPES: dict[str, Any] = {"cache": np.uint8, "past": np.int64}


def create(attributes: dict[str, Any], shapes: dict[str, Any], types: dict[str, Any] | None = None) -> ov.Node:
    kinds = {**TYPES, **(types or {})}
    inputs = [ops.parameter(ov.PartialShape(shape), kinds.get(name, np.float32)) for name, shape in shapes.items()]
    return factory().create("CachedAttention", inputs, {**GOOD, **attributes})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kv_heads": 0}, "kv_heads must be 1 to 4096, got 0"),
        ({"heads": 5}, "heads must be 1 to 4096 and a multiple of kv_heads 2, got 5"),
        ({"heads": 2**40}, "heads must be 1 to 4096"),
        ({"head_dim": 6}, "head_dim must be 4 to 1024 and a multiple of 4, got 6"),
        ({"head_dim": 1028}, "head_dim must be 4 to 1024 and a multiple of 4, got 1028"),
        ({"value_dim": 0}, "value_dim must be 4 to 1024 and a multiple of 4, got 0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"scale": 1e39}, r"scale must be finite, got 1e\+39"),
        ({"softcap": -1.0}, "softcap must be finite and not negative, got -1"),
        ({"epsilon": float("nan")}, "epsilon must be finite and not negative, got -?nan"),
        ({"precision": "i4"}, "precision must be i8, f16 or bf16, got i4"),
        ({"rope": "full"}, "rope must be empty or half, got full"),
        ({"norm": "layer"}, "norm must be empty or rms, got layer"),
        ({"causal": True, "mask": True}, "causal must be false where there is a mask, got 1"),
        ({"mask": True}, "takes 4 inputs with these attributes, got 3"),
        ({"value_dim": 16}, r"qkv must have shape \[1,\?,80\], got \[1,\?,72\]"),
        ({"precision": "f16"}, r"cache must have shape \[\?,2,768\], got \[\?,2,512\]"),
    ],
)
def test_bad_attributes_are_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        create(attributes, SHAPES)


@pytest.mark.parametrize(
    ("attributes", "shapes", "message"),
    [
        ({}, {"qkv": [-1, 72]}, r"qkv must have rank 3, got shape \[\?,72\]"),
        ({}, {"qkv": [2, -1, 72]}, r"qkv must have shape \[1,\?,72\], got \[2,\?,72\]"),
        ({}, {"cache": [-1, 4, 512]}, r"cache must have shape \[\?,2,512\], got \[\?,4,512\]"),
        ({}, {"past": [2]}, r"past must have shape \[1\], got \[2\]"),
        ({"mask": True}, {"mask": [1, 3, -1, -1]}, r"mask must have shape \[1,4,\?,\?\], got \[1,3,\?,\?\]"),
        ({"mask": True}, {"mask": [-1, -1]}, r"mask must have shape .*, got \[\?,\?\]"),
        ({"rope": "half"}, {"cos": [1, -1, 3], "sin": [1, -1, 3]}, "cos must be even and at most head_dim 8, got 3"),
        ({"rope": "half"}, {"cos": [1, -1, 10], "sin": [1, -1, 10]}, "cos must be even and at most head_dim 8, got 10"),
        ({"rope": "half"}, {"cos": [1, -1, 8], "sin": [1, -1, 4]}, r"sin must have shape \[1,\?,8\], got \[1,\?,4\]"),
        ({"norm": "rms"}, {"q_norm": [8], "k_norm": [12]}, r"k_norm must have shape \[8\], got \[12\]"),
        ({"sinks": True}, {"sinks": [1, 3]}, r"sinks must have as many elements as heads, 4, got shape \[1,3\]"),
    ],
)  # fmt: skip
def test_bad_shapes_are_named(attributes: dict[str, Any], shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        create(attributes, {**SHAPES, **shapes})


@pytest.mark.parametrize(
    ("name", "kind"), [("qkv", np.float16), ("cache", np.int8), ("past", np.float32), ("mask", np.float16)]
)
def test_wrong_element_types_are_named(name: str, kind: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{name} cannot be {ov.Type(kind).to_string()}"):
        create({"mask": True}, {**SHAPES, "mask": [1, 1, -1, -1]}, {name: kind})


def test_shapes_are_inferred() -> None:
    assert create({}, SHAPES).output(0).partial_shape == ov.PartialShape([1, -1, 48])
    assert create({}, {**SHAPES, "qkv": [1, 5, 72]}).output(0).partial_shape == ov.PartialShape([1, 5, 48])
    anything = dict.fromkeys(SHAPES, ov.PartialShape.dynamic())
    assert create({}, anything).output(0).partial_shape == ov.PartialShape([1, -1, 48])


HOSTILE = Attention(4, 2, 8, 12, mask=True, rope_dims=4, norm=True, sinks=True)


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (2, np.array([-1], np.int64), "past -1 and 3 new tokens do not fit the cache of 32 tokens"),
        (2, np.array([30], np.int64), "past 30 and 3 new tokens do not fit the cache of 32 tokens"),
        (2, np.array([2**63 - 2], np.int64), "past 9223372036854775806 and 3 new tokens do not fit"),
        (2, np.array([2, 2], np.int64), "wrong number or rank of inputs"),
        (1, np.zeros((0, 2, 512), np.uint8), "past 2 and 3 new tokens do not fit the cache of 0 tokens"),
        (1, np.zeros((2, 2, 511), np.uint8), r"cache must have shape \[\?,2,512\], got \[2,2,511\]"),
        (1, np.zeros((2, 1, 512), np.uint8), r"cache must have shape \[\?,2,512\], got \[2,1,512\]"),
        (0, np.zeros((1, 3, 71), np.float32), r"qkv must have shape \[1,3,72\], got \[1,3,71\]"),
        (0, np.zeros((3, 72), np.float32), "wrong number or rank of inputs"),
        (3, np.zeros((1, 1, 3, 4), np.float32), r"mask must have shape \[1,1,3,5\], got \[1,1,3,4\]"),
        (3, np.zeros((1, 2, 3, 5), np.float32), r"mask must have shape \[1,4,3,5\], got \[1,2,3,5\]"),
        (3, np.zeros((1, 1, 2, 5), np.float32), r"mask must have shape \[1,1,3,5\], got \[1,1,2,5\]"),
        (4, np.zeros((1, 2, 4), np.float32), r"cos must have shape \[1,3,\?\], got \[1,2,4\]"),
        (4, np.zeros((1, 3, 12), np.float32), "last dimension of cos must be even and at most head_dim 8, got 12"),
        (5, np.zeros((1, 3, 6), np.float32), r"sin must have shape \[1,3,4\], got \[1,3,6\]"),
        (6, np.zeros(4, np.float32), r"q_norm must have shape \[8\], got \[4\]"),
        (8, np.zeros(3, np.float32), "sinks must have as many elements as heads, 4"),
    ],
)
def test_what_does_not_fit_at_run_time_is_refused(index: int, tensor: Array, message: str) -> None:
    (step,) = steps_of(np.random.default_rng(0), replace(HOSTILE, mask=False), [3], "none")
    tensors = replace(step, past=2, mask=np.zeros((1, 1, 3, 5), np.float32)).tensors(np.zeros((2, 2, 512), np.uint8))
    shapes = [ov.PartialShape.dynamic()] * len(tensors)
    kinds = [each.dtype for each in tensors]
    op = Operation("CachedAttention", list(zip(shapes, kinds, strict=True)), HOSTILE.attributes())
    assert np.isfinite(op(*tensors)).all()
    tensors[index] = tensor
    with pytest.raises(RuntimeError, match=message):
        op(*tensors)


def test_no_tokens_are_no_work() -> None:
    attention = Attention(4, 2, 8, 12)
    cache = np.full((1, 2, 512), 7, np.uint8)
    out = operation(attention)(np.zeros((1, 0, 72), np.float32), cache, np.array([16], np.int64))
    assert out.shape == (1, 0, 48)
    assert (cache == 7).all()


def test_survives_a_file(tmp_path: Path) -> None:
    attention = Attention(4, 2, 8, 12, 1 / 3, softcap=30.0, precision="bf16", rope_dims=4, norm=True, sinks=True)
    ov.save_model(operation(attention).model(), tmp_path / "model.xml", compress_to_fp16=False)
    loaded = core().read_model(tmp_path / "model.xml")
    (node,) = [op for op in loaded.get_ops() if op.get_type_name() == "CachedAttention"]
    assert node.get_attributes() == attention.attributes()

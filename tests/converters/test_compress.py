"""What NNCF makes of a model, and that the table says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from edgert.converters.compress import compress, precision_table, read_samples, routers, to_fp16
from tiny_models import exported

from edgert.errors import UsageError


def table(model: ov.Model, tmp_path: Path) -> list[dict[str, Any]]:
    """The table of a model as it is read back from disk; the file must be as large as the table says."""
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    rows = precision_table(ov.Core().read_model(tmp_path / "model.xml"))
    weights = sum(row["bytes"] for row in rows)
    assert weights <= (tmp_path / "model.bin").stat().st_size < weights + 4096
    return rows


def brief(rows: list[dict[str, Any]]) -> dict[str, tuple[str, int | None]]:
    return {row["role"]: (row["precision"], row["group_size"]) for row in rows}


def test_fp16_keeps_what_is_no_matrix(tmp_path: Path) -> None:
    _, model = exported("qwen3")
    to_fp16(model)
    rows = table(model, tmp_path)
    assert brief(rows) == {
        "embedding": ("f16", None), "linear": ("f16", None), "head": ("f16", None), "norms+other": ("f32", None),
    }  # fmt: skip
    assert {row["role"]: row["elements"] for row in rows}["linear"] == 98304  # 2 layers of 49152
    written = ov.Core().read_model(tmp_path / "model.xml")
    frequencies = [
        n for n in written.get_ops() if n.get_type_name() == "Constant" and n.get_output_shape(0) == [1, 16, 1]
    ]
    assert [n.get_output_element_type(0) for n in frequencies] == [ov.Type.f32]  # RoPE's


@pytest.mark.parametrize(
    ("options", "linear", "other"),
    [
        ({"weights": "int8"}, ("u8", -1), ("u8", -1)),
        ({"weights": "int4", "group_size": 32}, ("u4", 32), ("u8", -1)),
        ({"weights": "int4", "group_size": 32, "sym": True}, ("i4", 32), ("u8", -1)),
        ({"weights": "int4", "group_size": -1}, ("u4", -1), ("u8", -1)),
    ],
)
def test_compressed(options: dict[str, Any], linear: Any, other: Any, tmp_path: Path) -> None:
    _, model = exported("qwen3")
    to_fp16(model)
    found = brief(table(compress(model, **options), tmp_path))
    assert found == {"embedding": other, "linear": linear, "head": other, "norms+other": ("f32", None)}


def test_group_size_that_does_not_divide_falls_back(tmp_path: Path) -> None:
    _, model = exported("qwen3")  # 64 inputs in most matrices
    to_fp16(model)
    rows = table(compress(model, "int4", group_size=128), tmp_path)
    groups = {row["group_size"]: row["elements"] for row in rows if row["role"] == "linear"}
    assert groups == {64: 65536, 128: 32768}


def test_tied_embedding_counts_once(tmp_path: Path) -> None:
    source, model = exported("gpt2")
    to_fp16(model)
    rows = {row["role"]: row for row in table(compress(model, "int8"), tmp_path)}
    assert rows["embedding+head"]["tensors"] == 1
    matrices = sum(p.numel() for p in source.parameters() if p.ndim == 2)
    assert sum(row["elements"] for role, row in rows.items() if role != "norms+other") == matrices


def test_data_aware_methods_change_the_weights(text_file: Path, tmp_path: Path) -> None:
    kinds = {"input_ids": np.int64, "attention_mask": np.int64, "position_ids": np.int64, "beam_idx": np.int32}
    samples = read_samples(text_file, lambda text: list(text.encode()), {n: np.dtype(k) for n, k in kinds.items()})
    assert 1 < len(samples) <= 128
    assert samples[0]["input_ids"].shape == (1, 128)

    def weights(**options: Any) -> bytes:
        _, model = exported("llama")
        ov.save_model(compress(model, "int4", group_size=32, **options), tmp_path / "m.xml")
        return (tmp_path / "m.bin").read_bytes()

    assert len({weights(), weights(samples=samples[:2]), weights(samples=samples[:2], awq=True)}) == 3


def test_bad_datasets(tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short", "utf-8")
    binary.write_bytes(b"\xff\xfe\xff")
    for path, message in ((short, "at least 128"), (binary, "UTF-8"), (tmp_path / "none.txt", "cannot be read")):
        with pytest.raises(UsageError, match=message):
            read_samples(path, lambda text: list(text.encode()), {"input_ids": np.dtype(np.int64)})


def experts(*, grouped: bool) -> ov.Model:
    """A product, then a router with a bias and a sigmoid, and its choice; as INT4 needs them, 64 wide."""

    random = np.random.default_rng(0)

    def weights(rows: int) -> ov.Node:
        return ops.constant(random.normal(size=(rows, 64)).astype(np.float32))

    hidden = ops.parameter([-1, 64], ov.Type.f32)
    inner = ops.matmul(hidden, weights(64), False, True)
    inner.set_friendly_name("before")
    logits = ops.matmul(inner, weights(8), False, True)
    logits.set_friendly_name("router")
    scores = ops.add(ops.sigmoid(logits), ops.constant(np.ones((1, 8), np.float32)))
    choice = ops.topk(scores, ops.constant(2, ov.Type.i64), 1, "max", "value", "i64")
    shares = choice.output(0)
    if grouped:  # rows sorted by expert: a TopK of as many as there are
        flat = ops.reshape(choice.output(1), ops.constant([-1]), False)
        count = ops.gather(ops.shape_of(flat), ops.constant(0), ops.constant(0))
        shares = ops.convert(ops.topk(flat, count, 0, "min", "value", "i64", stable=True).output(1), "f32").output(0)
        shares = ops.reshape(shares, ops.constant([-1, 2]), False).output(0)
    share = ops.reduce_sum(shares, ops.constant([1]), True)
    last = ops.matmul(ops.multiply(inner, share), weights(64), False, True)
    last.set_friendly_name("after")
    other = ops.matmul(last, weights(64), False, True)  # NNCF leaves the last product at INT8
    return ov.Model([ops.result(other)], [hidden], "experts")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_routers_stay_as_they_are(grouped: bool, weights: Any, tmp_path: Path) -> None:
    model = experts(grouped=grouped)
    assert routers(model) == {"router"}
    to_fp16(model)
    rows = table(compress(model, weights, group_size=32), tmp_path)
    (router,) = (row for row in rows if row["role"] == "router")
    assert (router["precision"], router["tensors"], router["bytes"]) == ("f16", 1, 2 * 8 * 64)
    others = {row["precision"]: row["tensors"] for row in rows if row["role"] == "linear"}
    assert others == ({"u8": 3} if weights == "int8" else {"u4": 2, "u8": 1})


def test_groups_that_experts_cannot_have_are_refused() -> None:
    with pytest.raises(UsageError, match="group_size is 48, a model with experts needs a power of two, or -1"):
        compress(experts(grouped=False), "int4", group_size=48)


def test_products_of_activations_choose_no_experts() -> None:
    first, second = (ops.parameter([-1, 64], ov.Type.f32) for _ in range(2))
    scores = ops.matmul(first, second, False, True)
    best = ops.topk(scores, ops.constant(2, ov.Type.i64), 1, "max", "value", "i64")
    assert routers(ov.Model([ops.result(best.output(0))], [first, second], "scores")) == set()

"""The op extension: RMSNorm against numpy and against OpenVINO's own operations; edgert.native's findings."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

import edgert
from edgert import native

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")


@functools.cache
def factory() -> NodeFactory:
    nodes = NodeFactory()
    nodes.add_extension(str(native.library()))
    return nodes


def rms_norm_model(data: Any, weight: Any, epsilon: float = 1e-6) -> ov.Model:
    inputs = [ops.parameter(data, np.float32, name="data"), ops.parameter(weight, np.float32, name="weight")]
    return ov.Model([factory().create("RMSNorm", inputs, {"epsilon": epsilon})], inputs)


@functools.cache
def dynamic(rank: int) -> ov.CompiledModel:
    core = ov.Core()
    assert native.load(core).loads
    return core.compile_model(rms_norm_model([-1] * rank, [-1], 1e-5), "CPU")


def expected(data: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    wide = data.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + epsilon) * weight


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3).flatmap(
    lambda head: st.integers(1, 130).map(lambda width: (*head, width))
)


def test_kernels_are_built_where_they_must_be() -> None:
    if os.environ.get("EDGERT_REQUIRE_KERNELS") != "1":
        pytest.skip("EDGERT_REQUIRE_KERNELS is not 1: an installation without kernels is valid")
    status = native.status()
    assert status.loads, status.reason


@needs_kernels
@settings(max_examples=100, deadline=None)
@given(shapes, st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 2**32 - 1))
def test_agrees_with_numpy(shape: tuple[int, ...], magnitude: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = (random.standard_normal(shape) * magnitude).astype(np.float32)
    weight = random.standard_normal(shape[-1]).astype(np.float32)
    out = dynamic(len(shape))([data, weight])[0]
    assert out.shape == shape
    # Four roundings to f32 (scale, two products, the result's own): 4 * 2**-24.
    np.testing.assert_allclose(out, expected(data, weight, 1e-5), rtol=2.5e-7, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("hint", ["f32", "bf16"])
def test_agrees_with_openvino_operations_inside_a_graph(hint: str) -> None:
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(2))
    weight = random.standard_normal(64).astype(np.float32)

    def graph(native_op: bool) -> ov.Model:
        data = ops.parameter([-1, -1, 64], np.float32)
        hidden = ops.matmul(data, ops.constant(left), False, False)
        if native_op:
            norm = factory().create("RMSNorm", [hidden, ops.constant(weight)], {"epsilon": 1e-6})
        else:
            square = ops.reduce_mean(ops.power(hidden, np.float32(2)), np.int64([-1]), keep_dims=True)
            norm = ops.multiply(ops.divide(hidden, ops.sqrt(ops.add(square, np.float32(1e-6)))), weight)
        return ov.Model([ops.matmul(norm, ops.constant(right), False, False)], [data])

    core = ov.Core()
    assert native.load(core).loads
    x = random.standard_normal((2, 5, 64)).astype(np.float32)
    ours, theirs = (
        core.compile_model(graph(which), "CPU", {"INFERENCE_PRECISION_HINT": hint})(x)[0] for which in (True, False)
    )
    tolerance = {"f32": 1e-5, "bf16": 2e-2}[hint]  # of the largest value; bf16 has 8 bits
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@needs_kernels
def test_wide_rows_are_summed_without_losing_small_elements() -> None:
    data = np.ones((1, 2**16), np.float32)
    data[0, 0] = 4096.0  # its square is 2**24: adding 1 to that in f32 changes nothing
    out = dynamic(2)([data, np.ones(2**16, np.float32)])[0]
    np.testing.assert_allclose(out, expected(data, np.ones(2**16), 1e-5), rtol=2.5e-7)


@needs_kernels
def test_zero_row_stays_zero() -> None:
    assert not dynamic(2)([np.zeros((3, 8), np.float32), np.ones(8, np.float32)])[0].any()


@needs_kernels
def test_shapes_are_inferred() -> None:
    assert rms_norm_model([2, -1, 8], [8]).output(0).partial_shape == ov.PartialShape([2, -1, 8])
    assert rms_norm_model([2, -1], [8]).output(0).partial_shape == ov.PartialShape([2, 8])
    assert rms_norm_model(ov.PartialShape.dynamic(), [8]).output(0).partial_shape.rank.is_dynamic


@needs_kernels
@pytest.mark.parametrize(
    ("data", "weight", "epsilon", "message"),
    [
        ([2, 8], [7], 1e-6, r"last dimension of data \[2,8\] must equal the size of weight \[7\]"),
        ([2, 8], [1, 8], 1e-6, r"weight must have rank 1, got shape \[1,8\]"),
        ([], [8], 1e-6, "data must have rank 1 or more"),
        ([2, 8], [8], -1.0, "epsilon must be finite and not negative, got -1"),
        ([2, 8], [8], float("nan"), "epsilon must be finite and not negative, got -?nan"),
    ],
)
def test_bad_arguments_are_named(data: list[int], weight: list[int], epsilon: float, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        rms_norm_model(data, weight, epsilon)


@needs_kernels
def test_wrong_element_type_is_named() -> None:
    inputs = [ops.parameter([2, 8], np.float16), ops.parameter([8], np.float32)]
    with pytest.raises(RuntimeError, match="data must be f32, got f16"):
        factory().create("RMSNorm", inputs, {"epsilon": 1e-6})


@needs_kernels
def test_wrong_number_of_inputs_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"takes 2 inputs \(data, weight\), got 1"):
        factory().create("RMSNorm", [ops.parameter([2, 8], np.float32)], {"epsilon": 1e-6})


@needs_kernels
def test_wrong_shape_at_run_time_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"last dimension of data \S*\[2,3,9\]\S* must equal the size of weight"):
        dynamic(3)([np.zeros((2, 3, 9), np.float32), np.ones(8, np.float32)])


@needs_kernels
def test_survives_a_file(tmp_path: Path) -> None:
    ov.save_model(rms_norm_model([-1, 8], [8], 0.25), tmp_path / "model.xml", compress_to_fp16=False)
    core = ov.Core()
    with pytest.raises(RuntimeError, match="RMSNorm"):
        core.read_model(tmp_path / "model.xml")
    assert native.load(core).loads
    loaded = core.read_model(tmp_path / "model.xml")
    (node,) = [op for op in loaded.get_ops() if op.get_type_name() == "RMSNorm"]
    assert node.get_attributes() == {"epsilon": 0.25}


def test_missing_library_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    assert native.library() is None
    assert native.status() == native.KernelStatus(None, False, f"{native.LIBRARY} is not part of this installation")


@pytest.fixture
def other_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `_kernels` folder of its own, with what OpenVINO's release asks for and a library that is none."""
    folder = tmp_path / native.FOLDER
    folder.mkdir()
    (folder / native.VERSION_FILE).write_text(ov.get_version().partition("-")[0])
    (folder / native.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    return folder


def test_damaged_library_is_a_finding(other_installation: Path) -> None:
    status = native.status()
    assert status.path == other_installation / native.LIBRARY
    assert not status.loads
    assert status.reason is not None
    assert "Cannot add extension" in status.reason
    assert "\n" not in status.reason


def test_library_without_its_version_is_not_loaded(other_installation: Path) -> None:
    (other_installation / native.VERSION_FILE).unlink()
    status = native.status()
    assert not status.loads
    assert status.reason is not None
    assert f"{native.VERSION_FILE} beside the library cannot be read" in status.reason


@needs_kernels
def test_library_of_another_openvino_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library()
    assert path is not None
    shutil.copytree(path.parent, tmp_path / native.FOLDER)
    (tmp_path / native.FOLDER / native.VERSION_FILE).write_text("2025.0.0\n")
    monkeypatch.setattr(edgert, "__path__", [str(tmp_path)])
    installed = ov.get_version().partition("-")[0]
    assert native.status().reason == f"built against OpenVINO 2025.0.0, but {installed} is installed"
    core = ov.Core()
    assert not native.load(core).loads

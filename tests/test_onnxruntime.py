"""The onnxruntime backend on graphs of a few nodes, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgert.backends.onnxruntime import BACKEND
from edgert.device import DeviceConfig
from edgert.errors import DeviceFailedError

CPU = DeviceConfig("ORT", "CPU")
CACHE = [None, 1, None, 1]
IDS = ("input_ids", TensorProto.FLOAT, [1, 1, None, 1])
KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"


def save(path: Path, inputs: list[tuple], outputs: list[str], nodes: list[onnx.NodeProto]) -> Path:  # type: ignore[type-arg]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def decoder(path: Path, outputs: list[str], cache: list[int | None] = CACHE, kind: int = TensorProto.FLOAT) -> Path:
    """Keys are the inputs so far, values their negatives."""
    nodes = [
        helper.make_node("Identity", ["input_ids"], ["logits"]),
        helper.make_node("Neg", ["input_ids"], ["negative"]),
        helper.make_node("Concat", [KEY, "input_ids"], ["present.0.key"], axis=2),
        helper.make_node("Concat", [VALUE, "negative"], ["present.0.value"], axis=2),
    ]
    return save(path, [IDS, (KEY, kind, cache), (VALUE, kind, cache)], outputs, nodes)


def ids(*values: float) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(values, np.float32).reshape(1, 1, -1, 1)}


@pytest.mark.parametrize(
    "outputs",
    [["logits", "present.0.key", "present.0.value"], ["present.0.value", "negative", "present.0.key", "logits"]],
    ids=["as edgert writes them", "in another order, with one more"],
)
def test_caches_are_paired_by_name(tmp_path: Path, outputs: list[str]) -> None:
    compiled = BACKEND.compile(decoder(tmp_path / "m.onnx", outputs), CPU)
    assert compiled.inputs == {"input_ids"}
    runner = compiled.runner()
    runner.infer(ids(1, 2))
    outputs_now = runner.infer(ids(3))
    assert list(outputs_now) == [next(name for name in outputs if "present" not in name)]
    states = runner.read_states()
    assert states[KEY].ravel().tolist() == [1, 2, 3]
    assert states[VALUE].ravel().tolist() == [-1, -2, -3]
    runner.write_states({KEY: states[KEY][:, :, :1], VALUE: states[VALUE][:, :, :1]})
    runner.infer(ids(7))
    assert runner.read_states()[KEY].ravel().tolist() == [1, 7]
    runner.reset()
    assert runner.read_states()[KEY].size == 0


@pytest.mark.parametrize("outputs", [["logits", "present.0.key"], ["logits"]])
def test_an_unpaired_cache_is_named(tmp_path: Path, outputs: list[str]) -> None:
    with pytest.raises(DeviceFailedError, match=r"only one of past_key_values\.0\.\w+ and present\.0\.\w+"):
        BACKEND.compile(decoder(tmp_path / "m.onnx", outputs), CPU)


def test_a_present_without_past_is_named(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [IDS], ["logits", "present.3.key"],
        [helper.make_node("Identity", ["input_ids"], [name]) for name in ("logits", "present.3.key")],
    )  # fmt: skip
    with pytest.raises(DeviceFailedError, match=r"past_key_values\.3\.key"):
        BACKEND.compile(path, CPU)


def test_nothing_but_caches(tmp_path: Path) -> None:
    with pytest.raises(DeviceFailedError, match="no output beside"):
        BACKEND.compile(decoder(tmp_path / "m.onnx", ["present.0.key", "present.0.value"]), CPU)


@pytest.mark.parametrize("cache", [[1, 1, 5, 1], [1, 2**62, 2**62, None]], ids=["no open dimension", "beyond memory"])
def test_impossible_cache_shapes(tmp_path: Path, cache: list[int | None]) -> None:
    path = save(
        tmp_path / "m.onnx", [IDS, (KEY, TensorProto.FLOAT, cache)], ["logits", "present.0.key"],
        [helper.make_node("Identity", ["input_ids"], ["logits"]), helper.make_node("Neg", [KEY], ["present.0.key"])],
    )  # fmt: skip
    with pytest.raises(DeviceFailedError, match=KEY):
        BACKEND.compile(path, CPU).runner()


def test_cache_of_another_type(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [IDS, (KEY, TensorProto.DOUBLE, CACHE)], ["logits", "present.0.key"],
        [
            helper.make_node("Identity", ["input_ids"], ["logits"]),
            helper.make_node("Cast", [KEY], ["present.0.key"], to=TensorProto.FLOAT),
        ],
    )  # fmt: skip
    with pytest.raises(DeviceFailedError, match=r"key' is tensor\(double\)"):
        BACKEND.compile(path, CPU).runner()


def test_an_encoder_with_a_pooler(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [IDS], ["last_hidden_state", "pooler_output"],
        [
            helper.make_node("Identity", ["input_ids"], ["last_hidden_state"]),
            helper.make_node("Neg", ["input_ids"], ["pooler_output"]),
        ],
    )  # fmt: skip
    outputs = BACKEND.compile(path, CPU).runner().infer(ids(4, 5))
    assert {name: array.ravel().tolist() for name, array in outputs.items()} == {"last_hidden_state": [4, 5]}


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    path = decoder(tmp_path / "m.onnx", ["logits", "present.0.key", "present.0.value"])
    with pytest.raises(DeviceFailedError, match="'input_ids', which nothing gives"):
        BACKEND.compile(path, CPU).runner().infer({"token_type_ids": np.zeros(1)})


def test_an_input_of_the_wrong_shape(tmp_path: Path) -> None:
    path = decoder(tmp_path / "m.onnx", ["logits", "present.0.key", "present.0.value"])
    with pytest.raises(DeviceFailedError, match="ORT@CPU failed"):
        BACKEND.compile(path, CPU).runner().infer({"input_ids": np.zeros(3, np.float32)})


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(DeviceFailedError, match="ORT@CPU cannot load"):
        BACKEND.compile(tmp_path / "m.onnx", CPU)


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("variant", ["Azure", "None"])
def test_no_silent_fallback_to_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str], variant: str) -> None:
    config = DeviceConfig("ORT", variant)
    assert config not in BACKEND.devices()[0].configs
    path = decoder(tmp_path / "m.onnx", ["logits", "present.0.key", "present.0.value"])
    with pytest.raises(DeviceFailedError, match=f"ORT@{variant} cannot load"):
        BACKEND.compile(path, config)
    assert "alling back" not in capfd.readouterr().out

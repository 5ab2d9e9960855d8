"""`CPU@kernels`: where its weights are, what profiles and plans know of it, what is said where it does not load."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

import edgert
from edgert import native
from edgert.backends import info_of, openvino
from edgert.cli import devices as devices_verb
from edgert.conditions import conditions, path_of
from edgert.device import DeviceConfig
from edgert.errors import UnknownDeviceError
from edgert.grid import Grid
from edgert.kernel_lowering import packables
from edgert.kernelfile import DATA, PackedWriter
from edgert.placement import Plan
from edgert.profile import DeviceModel, Profile
from edgert.profiler import Profiler
from edgert.session import Model

INT8, F16, EXACT = "CPU@kernels", "CPU@kernels+f16", "CPU@f32"
PROMPT = "It was a dark night, and the old man"
SOURCE = Path(__file__).parents[1] / "examples" / "models" / "bookworm"
REASON = "the native kernels do not load: built against OpenVINO 2025.0.0, but another is installed"

needs_kernels = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if (record.name, record.levelname) == ("edgert", "WARNING")]


# Weights.


@needs_kernels
def test_weights_that_are_not_packed_are_packed_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packed_path: Path, book: list[int]
) -> None:
    bare = tmp_path / "bare.edge"
    edgert.compile(SOURCE, bare, weights="int8", kernels=False)
    caplog.clear()
    model = edgert.load(bare, device=INT8)
    (warning,) = warnings(caplog)
    assert f"bundle {bare} has no weights packed for the CPU kernels" in warning
    assert "`edgert compile` the model again" in warning
    caplog.clear()
    mapped = edgert.load(packed_path, device=INT8)
    assert not warnings(caplog)
    np.testing.assert_array_equal(model.score(book[:200]), mapped.score(book[:200]))


# In a process of its own: where others have been at work, what is freed there is taken for new memory here.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from edgert import native
from edgert.backends.openvino import BACKEND, core
from edgert.device import DeviceConfig
from edgert.kernel_lowering import lower
from edgert.kernelfile import DATA, PackedWeights

def memory(field, of=""):
    found, name = 0, ""
    for line in Path("/proc/self/smaps").read_text("ascii", "replace").splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            name = rest[4] if len(rest) > 4 else ""
        elif head == field + ":" and name.endswith(of):
            found += 1024 * int(rest[0])
    return found

folder = Path(sys.argv[1])
before = memory("Anonymous")
model = core().read_model(folder / "model.xml")
lowered = lower(model, PackedWeights.open(folder), native.factory())
runner = BACKEND.compile(model, DeviceConfig.parse("CPU@kernels")).runner()
for tokens in (1, 16):
    runner.infer({"input_ids": np.ones((1, tokens, int(sys.argv[2])), np.float32)})
print(json.dumps({
    "replaced": lowered.replaced["QuantizedLinear"], "anonymous": memory("Anonymous") - before,
    "packed": memory("Rss", DATA), "unpacked": memory("Rss", "model.bin"),
}))
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which memory is whose")
def test_weights_are_read_where_they_are_mapped(tmp_path: Path) -> None:
    """Not copied, and those that OpenVINO would read not touched."""
    rows, columns, layers = 4096, 2048, 4
    data = ops.parameter([1, -1, columns], np.float32)
    data.output(0).set_names({"input_ids"})
    node, random = data, np.random.default_rng(0)
    for number in range(layers):
        shape = (rows, columns) if number % 2 == 0 else (columns, rows)
        codes = ops.constant(random.integers(-127, 128, shape, np.int8))
        codes.set_friendly_name(f"weight.{number}")
        scales = ops.constant(np.full((shape[0], 1), 1e-3, np.float16))
        weight = ops.convert(ops.multiply(ops.convert(codes, "f16"), scales), "f32")
        node = ops.matmul(node, weight, False, True)
    ov.save_model(ov.Model([node], [data]), tmp_path / "model.xml", compress_to_fp16=False)
    weights = packables(ov.Core().read_model(tmp_path / "model.xml"))
    with PackedWriter(tmp_path, weights.refused) as writer:
        for packable in weights.packed:
            writer.add(packable.key, packable.shape, packable.content, packable.pack)
    size = (tmp_path / DATA).stat().st_size
    assert size > layers * rows * columns
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(columns)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["replaced"] == layers
    assert found["anonymous"] < size / 2  # a fourth: heap and stacks of OpenVINO
    assert found["packed"] > size * 0.9
    assert found["unpacked"] < size / 10


@needs_kernels
def test_a_second_configuration_holds_the_weights_again(demo: Model) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    own = sum(block.total_weight_bytes for block in graph.blocks)
    plan = Plan.explicit(graph, f"prefill:*=CPU@f32+dq,decode:*={INT8}")
    assert {str(copy.config): copy.bytes * copy.count for copy in plan.weights(graph)} == {"CPU@f32+dq": own, INT8: own}


@needs_kernels
def test_the_profile_knows_it(demo: Model) -> None:
    configs = [DeviceConfig.parse(name) for name in (F16, INT8)]
    grid = Grid(contexts=(8,), chunks=(8,), passes=1, steps=2, rounds=1)
    profile = Profiler(demo.bundle, configs, grid).measure()
    assert {device.config: device.kv_bits for device in profile.devices} == {F16: 16.0, INT8: 8.25}
    errors = [row.error for row in profile.measurements if row.config == F16 and row.error is not None]
    assert errors
    assert max(errors) < 5e-3


# Where the kernels do not load.


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reason = "built against OpenVINO 2025.0.0, but another is installed"
    monkeypatch.setattr(native, "status", lambda: native.KernelStatus(Path("x.so"), False, reason))
    openvino._info.cache_clear()
    yield
    openvino._info.cache_clear()


@pytest.mark.usefixtures("absent")
def test_asking_for_what_does_not_load_is_an_error_with_the_reason(demo_path: Path) -> None:
    assert not any(config.kernels for info in edgert.devices() for config in info.configs)
    for options in ({"device": INT8}, {"place": f"*=CPU,attention={F16}"}, {"fallback": INT8}):
        with pytest.raises(
            UnknownDeviceError, match=rf"CPU@kernels\S* is not available here: {REASON}; available: CPU"
        ):
            edgert.load(demo_path, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("absent")
def test_a_plan_that_wants_it_says_that_it_is_not_used(
    demo_path: Path, demo: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    plan = Plan.explicit(graph, f"prefill:*={EXACT},decode:*={INT8}")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()), "utf-8")
    warning = f"{INT8} is not used, CPU@f32+dq runs its blocks: {REASON}"
    for given in (plan, file):
        model = edgert.load(demo_path, plan=given)
        assert [str(config) for config in model.plan.configs] == [EXACT, "CPU@f32+dq"]
        assert model.plan.warnings == (warning,)
        assert warning in model.plan.explain()
    assert warnings(caplog) == [warning] * 2
    assert model.generate(PROMPT, max_tokens=4).timings.new_tokens == 4


@pytest.mark.usefixtures("absent")
def test_the_best_plan_does_without_it_and_says_so(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))
    rates = {INT8: 4.0, EXACT: 1.0}
    models = tuple(
        DeviceModel(
            name.replace("@", "-"), rate, 10 * rate, 20.0, 5.0, 10.0, 0.0, "f32", "measured", "made up", config=name
        )
        for name, rate in rates.items()
    )
    now = conditions()
    Profile(2, "here", models, base_w=1.0, conditions=now).write(path_of(now))
    plan = edgert.load(demo_path, objective="latency").plan
    assert [str(config) for config in plan.configs] == [EXACT]
    assert f"{INT8} is not used: {REASON}" in plan.warnings


@pytest.mark.usefixtures("absent")
def test_the_list_of_devices_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    devices_verb.add_parser(parser.add_subparsers())
    options = parser.parse_args(["devices"])
    assert options.run(options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not CPU@kernels:" in shown
    assert "2025.0.0" in shown


@needs_kernels
def test_it_is_offered_where_it_loads() -> None:
    info = info_of(DeviceConfig.parse(INT8))
    assert info.lacking == {}
    assert str(info.configs[0]) == "CPU@f32+dq"  # what a bare CPU means
    assert [DeviceConfig.parse(name).kernels for name in (INT8, F16, EXACT)] == ["i8", "f16", None]

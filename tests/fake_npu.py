"""An NPU that is not there: a compiler that puts the model into the blob, and a backend that runs it on the CPU."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

import edgert
from edgert.backends.openvino import BACKEND, OpenVinoCompiled
from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import DeviceFailedError
from edgert.graph import Block
from edgert.npu.compiler import Compiler

# Blobs are the size of the XML, the XML, the weights. Each call leaves its properties in a file beside the program.
GOOD = """
import sys
from pathlib import Path
model, blob, *properties = sys.argv[1:]
with open(sys.argv[0] + ".calls", "a") as calls:
    print(*properties, file=calls)
xml, weights = Path(model).read_bytes(), Path(model).with_suffix(".bin").read_bytes()
Path(blob).write_bytes(b"%d\\n" % len(xml) + xml + weights)
print("compile_s 0.25")
print("[INFO] 10:00:00.000 [NPU_VCL] Estimated inference latency: 12.50 us")
"""
# As 3720 does with some attention (docs/npu.md).
NEEDS_ONE_TILE = "import sys\nif 'NPU_TILES=1' not in sys.argv: sys.exit('[ERROR] 1:0 [x] UnrollPermuteDMA failed')\n"


def fake(folder: Path, program: str = GOOD) -> Compiler:
    """A compiler whose program is this one."""
    script = folder / "fake.py"
    script.write_text(program)
    return Compiler("fake", "fake-1", (sys.executable, str(script)), {"NPU_COMPILER_TYPE": "FAKE"})


def calls(compiler: Compiler) -> list[str]:
    """The properties of each call that `GOOD` got."""
    log = Path(f"{compiler.command[1]}.calls")
    return log.read_text().splitlines() if log.exists() else []


def product(name: str = "y", seed: int = 0, dtype: type = np.float16, width: int | ov.Dimension = 64) -> ov.Model:
    """A matrix product, all of what matters to the compiler's surroundings."""
    x = ops.parameter(ov.PartialShape([1, width, 64]), np.float16, "x")
    x.output(0).set_names({"x"})
    weight = np.random.default_rng(seed).normal(size=(32, 64)).astype(dtype)
    model = ov.Model([ops.result(ops.matmul(x, ops.convert(weight, "f16"), False, True))], [x])
    model.output(0).set_names({name})
    return model


def save(model: ov.Model, path: Path) -> Path:
    ov.save_model(model, path, compress_to_fp16=False)
    return path


class FakeNpu:
    """See `edgert.backends.base.Backend`; takes the blobs of `GOOD`, and of no other compiler.

    Attributes:
        loaded: blobs that were loaded.
        refused: folders whose blobs it does not take.
    """

    def __init__(self, platform: str) -> None:
        self._info = DeviceInfo("NPU", "an NPU that is not there", ("f16",), True, {"platform": platform})
        self.loaded: list[Path] = []
        self.refused: list[Path] = []

    def devices(self, kind: DeviceKind | None = None) -> list[DeviceInfo]:
        return [self._info]

    def compile(self, model: ov.Model | Path, config: DeviceConfig, blocks: Sequence[Block] = ()) -> OpenVinoCompiled:
        raise AssertionError("an NPU loads what was compiled elsewhere")

    def load_blob(self, blob: Path, config: DeviceConfig) -> OpenVinoCompiled:
        if any(folder in blob.parents for folder in self.refused):
            raise DeviceFailedError(f"{config} does not take {blob.name}: made for another driver")
        self.loaded.append(blob)
        size, _, rest = blob.read_bytes().partition(b"\n")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            xml = Path(folder) / "model.xml"
            xml.write_bytes(rest[: int(size)])
            xml.with_suffix(".bin").write_bytes(rest[int(size) :])
            return BACKEND.compile(xml, DeviceConfig("CPU", "f32+static"))


def plug_in(monkeypatch: pytest.MonkeyPatch, platform: str = "4000") -> FakeNpu:
    """Let this machine have an NPU."""
    load, npu = edgert.backends._load, FakeNpu(platform)
    monkeypatch.setitem(edgert.backends._MODULES, DeviceKind.NPU, "fake_npu")
    monkeypatch.setattr("edgert.backends._load", lambda module: npu if module == "fake_npu" else load(module))
    return npu

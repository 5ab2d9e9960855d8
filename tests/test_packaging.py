"""What the package promises by its shape: light imports, one name for the converters, pins that agree."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import edgert

ROOT = Path(__file__).parents[1]
BUILD_MACHINE_ONLY = {
    "gguf",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optimum",
    "safetensors",
    "torch",
    "transformers",
}


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def modules_after(code: str, cwd: Path) -> set[str]:
    """The top-level modules that are loaded after `code` has run in a Python of its own."""
    child = run_python(
        f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))", cwd
    )
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = modules_after("import edgert", tmp_path)
    assert "edgert" in loaded
    assert not loaded & (BUILD_MACHINE_ONLY | {"openvino", "numpy", "rich", "jinja2", "tokenizers"})


def test_no_runtime_module_needs_the_build_machine(tmp_path: Path) -> None:
    sources = [path.relative_to(ROOT) for path in (ROOT / "edgert").rglob("*.py") if path.name != "__main__.py"]
    names = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources)
    assert "edgert.native" in names
    names.remove("edgert.backends.onnxruntime")  # optional at run time: loaded for ONNX bundles only
    loaded = modules_after(f"import importlib\nfor name in {names}: importlib.import_module(name)", tmp_path)
    assert loaded & BUILD_MACHINE_ONLY == set()


def test_converters_have_one_name() -> None:
    spec = find_spec("edgert.converters")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).samefile(ROOT / "converters" / "__init__.py")
    child = run_python("import converters", ROOT)
    assert child.returncode != 0
    assert "ImportError" in child.stderr
    assert "edgert.converters" in child.stderr


def test_kernels_and_profiles_hold_no_python() -> None:
    assert [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "profiles").rglob("*.py")] == []


def test_version_has_one_source() -> None:
    assert metadata.version("edgert") == edgert.__version__


def test_kernels_are_built_against_the_openvino_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [
        [requirement for requirement in requirements if requirement.startswith("openvino==")]
        for requirements in (project["build-system"]["requires"], project["project"]["dependencies"])
    ]
    assert pins[0] == pins[1]
    assert pins[0] == [f"openvino=={metadata.version('openvino')}"]


def test_openvino_reports_nothing(tmp_path: Path) -> None:
    """With the reporter's name taken, OpenVINO imports its own stub; the reporter would fork and open a connection."""
    code = "import edgert, openvino\nfrom openvino.tools.ovc import telemetry\nprint(type(telemetry).__module__)"
    assert run_python(code, tmp_path).stdout.strip() == "openvino.tools.ovc.telemetry_stub"

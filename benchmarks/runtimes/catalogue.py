"""The runtimes that are compared: what each runs, at which precision, and what holds it to an instruction set."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shapes import ROOT, llama_bundle, qwen3_bundle

PEERS = ROOT / "build" / "peers"
OWN, THEIRS = Path(sys.executable), PEERS / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "qwen3": ("Qwen3-0.6B", qwen3_bundle),
    "llama": ("Llama-3.2-1B", llama_bundle),
}
HELD: dict[str, dict[str, str]] = {
    "all": {},
    "avx2-vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "EDGERT_KERNELS_MAX_ISA": "avx2-vnni"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "EDGERT_KERNELS_MAX_ISA": "avx2"},
}
ENGINES = ("edgert", "openvino-f32", "openvino-bf16", "genai", "llama", "ort", "transformers")

BUNDLE = {"body": "INT4 asymmetric, group 128", "head": "INT8 asymmetric, per row"}
INT8 = {**BUNDLE, "activations": "INT8, dynamic", "cache": "u8"}
BF16 = {**BUNDLE, "activations": "bf16", "cache": "u8"}
F32 = {**BUNDLE, "activations": "f32", "cache": "u8"}
# Of edgert's configurations where they differ from INT8 activations and OpenVINO's own cache.
EDGERT = {
    "CPU@kernels": {**INT8, "cache": "INT8, per token and head"},
    "CPU@kernels+f16": {**INT8, "cache": "f16"},
    "CPU@bf16": BF16,
    "CPU@f32": {**F32, "cache": "f32"},
}
Q4_0 = {"body": "Q4_0: INT4 symmetric, group 32", "head": "Q8_0", "activations": "Q8_0", "cache": "f16"}
ORT = {**BUNDLE, "head": "INT8 asymmetric, group 128", "activations": "INT8, dynamic", "cache": "f32"}
WIDE = dict.fromkeys(BF16, "bf16")


@dataclass(frozen=True)
class Runtime:
    """A runtime in a configuration.

    Attributes:
        name: as in tables.
        kind: its engine in `engines.py`.
        python, model: the interpreter that has it, and the model in its format.
        precision: of body, head, activations and cache.
        options: for the engine.
        environment: variables that hold it to an instruction set.
    """

    name: str
    kind: str
    python: Path
    model: Path
    precision: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def compared(model: str, isa: str, edgert_configs: Sequence[str], engines: Collection[str]) -> list[Runtime]:
    """The runtimes of a run, with their models made where they are not there yet.

    Args:
        engines: which of `ENGINES`; those that cannot be held to `isa` are left out all the same.
    """
    bundle = MODELS[model][1]()
    source, folder = bundle.with_suffix(""), bundle.with_suffix(".peers")
    subprocess.run([THEIRS, Path(__file__).with_name("models.py"), source, bundle, folder], check=True)
    llama = PEERS / json.loads((PEERS / "llama.json").read_text("utf-8"))[isa]["folder"]
    held = HELD[isa]
    flags = cpu()[1]
    # OpenVINO takes bf16 by default and INT8 activations at f32 where the CPU has what that needs. Held to less it does
    # so too, and then finds no primitive for them.
    bf16, int8 = not held and "avx512_bf16" in flags, not held or (isa == "avx2-vnni" and "avx_vnni" in flags)
    f32_hint, bf16_hint = ({"INFERENCE_PRECISION_HINT": p} for p in ("f32", "bf16"))
    if not int8:
        f32_hint["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    at_f32 = INT8 if int8 else F32

    found: dict[str, list[Runtime]] = {
        "edgert": [
            Runtime(f"edgert {name}", "edgert", OWN, bundle, EDGERT.get(name, INT8), {"device": name}, held)
            for name in edgert_configs
        ],
        "openvino-f32": [Runtime("OpenVINO f32", "openvino", OWN, bundle, at_f32, f32_hint, held)],
        "genai": [
            Runtime("OpenVINO GenAI", "openvino-genai", THEIRS, folder / "genai", BF16 if bf16 else at_f32,
                    f32_hint if held else {}, held)
        ],
        "llama": [
            Runtime("llama.cpp", "llama.cpp", THEIRS, folder / "model.gguf", Q4_0, {"folder": str(llama)}, held)
        ],
    }  # fmt: skip
    if bf16:
        found["openvino-bf16"] = [Runtime("OpenVINO bf16 (default)", "openvino", OWN, bundle, BF16, bf16_hint)]
    if not held:
        found["ort"] = [Runtime("onnxruntime-genai", "onnxruntime-genai", THEIRS, folder / "ort", ORT)]
        found["transformers"] = [Runtime("transformers", "transformers", THEIRS, folder / "bf16", WIDE)]
    return [runtime for engine in ENGINES if engine in engines for runtime in found.get(engine, ())]


def notes(isa: str) -> list[str]:
    """What the name of an instruction set does not say."""
    found = []
    if isa != "all":
        found += [
            "onnxruntime-genai and transformers are left out: neither can be held to an instruction set.",
            "OpenVINO is held by `ONEDNN_MAX_CPU_ISA`, as far as its kernels look there, at f32.",
        ]
    if isa == "avx2-vnni" and "avx_vnni" not in cpu()[1]:
        found.append(
            "This CPU has no AVX-VNNI: OpenVINO and llama.cpp have AVX2 alone, and edgert's kernels use the same "
            "instructions in the encoding of AVX-512, at 256 bits. `--isa avx2` has the same for all."
        )
    if isa == "avx2" or (isa != "all" and "avx_vnni" not in cpu()[1]):
        found.append(
            "OpenVINO runs without dynamic quantization (`DYNAMIC_QUANTIZATION_GROUP_SIZE=0`): with it, it finds no "
            "primitive where there is no VNNI."
        )
    return found


def cpu() -> tuple[str, set[str]]:
    """Name and flags of the CPU; no flags where the system does not list them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor(), set()
    pairs = [line.split(":", 1) for line in info.read_text("utf-8").splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in reversed(pairs)}  # of the first core
    name = fields.get("model name", platform.processor())
    if "cpu family" in fields:  # virtual machines keep the rest of the name to themselves
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name, set(fields.get("flags", "").split())

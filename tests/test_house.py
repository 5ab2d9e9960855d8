"""Rules of the house: the public names, and imports that go downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import edgert

PACKAGE = Path(edgert.__file__).parent
LAYERS = {
    "errors": -1, "asynchronous": -1, "fields": -1, "folders": -1, "device": 0, "graph": 0, "charts": 0, "irgraph": 0,
    "placement": 1, "memory": 1, "grid": 1, "page": 1, "regions": 1, "table": 1, "kvlayout": 1, "packing": 1,
    "chat_template": 1, "boundaries": 1, "shapes": 1, "profile": 1, "architecture": 1, "media": 1, "native": 2,
    "kernelfile": 2, "sampling": 2, "text": 2, "bundle": 2, "results": 2, "residual": 2, "cost": 2, "switching": 2,
    "likelihood": 2, "quality_charts": 2, "catalogue": 3, "prediction": 3, "energy": 3, "rates": 3, "backends": 3,
    "quality_page": 3, "evaluation": 3, "partition": 3, "cutting": 3, "lowering": 3, "experts": 3,
    "kernel_lowering": 4, "scheduler": 4, "samples": 4, "npu": 4, "kvcache": 4, "features": 4, "static": 4,
    "guard": 4, "pipeline": 4, "discovery": 4, "simulator": 5, "conditions": 5, "bucketed": 5, "inplace": 5,
    "chain": 5, "precision": 5, "stages": 6, "towers": 7, "executor": 7, "prompts": 8, "engine": 8, "profiler": 8,
    "choice": 8, "lanes": 8, "batch": 9, "diffusion": 9, "session": 9, "scorers": 9, "converters": 10, "subjects": 11,
    "service": 11, "cli": 12, "__main__": 13, "__init__": 13,
}  # fmt: skip
# Rooms that may touch OpenVINO; the rest must work where no device library is.
OPENVINO_ROOMS = {
    "irgraph", "boundaries", "residual", "partition", "cutting", "lowering", "experts", "static", "native",
    "backends", "npu", "converters", "cli", "kernel_lowering",
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if "converters" not in p.parts]


def imported(path: Path) -> set[str]:
    """Modules that are imported when `path` is, or later from inside its functions; types alone do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_public_names() -> None:
    assert edgert.__all__ == [
        "AsyncClient", "BlockGraph", "Bundle", "Client", "Denoiser", "DeviceConfig", "DeviceInfo", "EdgertError",
        "Evaluation", "Event", "KvCache", "Model", "Piece", "Plan", "Result", "SamplingParams", "StaticShapes",
        "compile", "devices", "evaluate", "load", "load_denoiser",
    ]  # fmt: skip
    for name in edgert.__all__:
        assert getattr(edgert, name).__doc__, name


def test_every_room_has_a_layer() -> None:
    assert {room(p) for p in modules()} <= set(LAYERS)


def test_imports_go_downwards() -> None:
    for path in modules():
        for name in imported(path):
            if name.startswith("edgert."):
                target = name.split(".")[1]
                assert target == room(path) or LAYERS[target] < LAYERS[room(path)], (
                    f"{path.name} (layer {LAYERS[room(path)]}) imports {name} (layer {LAYERS[target]})"
                )


def test_openvino_stays_in_its_rooms() -> None:
    for path in modules():
        if room(path) not in OPENVINO_ROOMS:
            assert not any(name.split(".")[0] == "openvino" for name in imported(path)), path.name

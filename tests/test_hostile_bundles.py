"""Bundles that lie: every one is a `BundleError` or `PlanError`, never a traceback, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.errors import EdgertError

CUT = "attention=CPU@f32,ffn=SIM@f32"


@pytest.fixture
def forge(demo_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the demo bundle whose block graph or IR is changed, sizes in the manifest made to agree."""

    def make(
        graph: Callable[[dict[str, Any]], None] | None = None, xml: Callable[[str], str] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        path = tmp_path / "forged.edge"
        shutil.copytree(demo_path, path)
        if graph:
            data = json.loads((path / "graph.json").read_text())
            graph(data)
            (path / "graph.json").write_text(json.dumps(data))
        if xml:
            (path / "model.xml").write_text(xml((path / "model.xml").read_text("utf-8")), "utf-8")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["model"].update(facts or {})
        for name, entry in manifest["files"].items():
            entry["bytes"] = (path / name).stat().st_size
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return make


def edit_block(index: int, /, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["blocks"][index].update(changes)


def rename_tensor(index: int, name: str) -> Callable[[dict[str, Any]], None]:
    """Change a boundary everywhere it stands, so that the chain still holds."""

    def change(graph: dict[str, Any]) -> None:
        graph["blocks"][index]["output"] = name
        graph["blocks"][index + 1]["input"] = name
        graph["edges"][index]["tensor"] = name

    return change


@pytest.mark.parametrize(
    "lie",
    [
        edit_block(9, input="nope:0"),
        edit_block(9, input=5),
        edit_block(2, output=5),
        edit_block(2, index=1.0),
        edit_block(2, index=7),
        edit_block(2, weight_bytes=[1]),
        edit_block(2, flops_per_token=10**400),
        edit_block(2, kind="poem"),
        rename_tensor(2, "nope:0"),
        rename_tensor(2, "no-port"),
        rename_tensor(2, "logits:99"),
        rename_tensor(8, "x:-1"),
        lambda graph: graph["blocks"].clear(),
        lambda graph: graph["edges"].pop(),
        lambda graph: graph.update(blocks=None),
        lambda graph: graph.update(surprise=1),
    ],
)
def test_lies_in_the_block_graph(forge: Callable[..., Path], lie: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(EdgertError):
        edgert.load(forge(graph=lie), place=CUT)


def test_states_are_those_of_the_model_not_of_the_file(forge: Callable[..., Path]) -> None:
    path = forge(graph=edit_block(1, states=["zzz", "zzz"]))
    assert edgert.load(path, place=CUT).generate("It was", max_tokens=2).tokens


def test_a_boundary_of_another_layer(forge: Callable[..., Path]) -> None:
    def swap(graph: dict[str, Any]) -> None:
        rename_tensor(2, graph["blocks"][5]["output"])(graph)

    with pytest.raises(EdgertError):
        edgert.load(forge(graph=swap), place=CUT)


@pytest.mark.parametrize(
    "damage",
    [
        lambda xml: xml[: len(xml) // 2],
        lambda xml: "",
        lambda xml: "<net/>",
        lambda xml: xml.replace('type="MatMul"', 'type="Frobnicate"'),
        lambda xml: xml.replace('shape="4096, 256"', 'shape="99999999999, 256"'),
        lambda xml: xml.replace('offset="', 'offset="9999999'),
        lambda xml: xml.replace("input_ids", "outlet_ids"),
        lambda xml: xml.replace('type="Result"', 'type="Sigmoid"'),
        lambda xml: xml.replace('layer id="7"', 'layer id="6"'),
    ],
)
@pytest.mark.parametrize("device", ["whole", "cut"])
def test_damaged_models(forge: Callable[..., Path], damage: Callable[[str], str], device: str) -> None:
    path = forge(xml=damage)
    with pytest.raises(EdgertError) as caught:
        edgert.load(path, **({"device": "CPU@f32"} if device == "whole" else {"place": CUT})).generate(
            "It was", max_tokens=2
        )
    assert not str(caught.value).rstrip().endswith("cannot be read:")


def test_an_absurd_context_costs_no_memory(forge: Callable[..., Path]) -> None:
    model = edgert.load(forge(facts={"context_length": 2**31 - 1}))
    assert len(model.generate("It was", max_tokens=2).tokens) == 2

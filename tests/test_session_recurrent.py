"""Models with states that do not grow (short convolutions), beside keys and values: they go on, and never go back."""

from __future__ import annotations

import shutil
from pathlib import Path

import openvino as ov
import pytest
from tiny_models import exported

import edgert
from edgert import backends
from edgert import bundle as bundles
from edgert.backends.simulated import Fault, SimulatedBackend
from edgert.batch import SerialLanes, open_lanes
from edgert.bundle import Bundle, ModelFacts, Report
from edgert.errors import PlanError, UsageError
from edgert.executor import Executor
from edgert.partition import annotate
from edgert.placement import Plan
from edgert.service.worker.prefixes import Prefixes

PROMPT = [7, 31, 200, 5, 90, 17, 44, 130, 9, 77, 12, 201, 63, 150, 33, 8, 21, 99]
CPU = "CPU@f32"
_load = backends._load


@pytest.fixture(scope="module")
def path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LFM2, with the demo's tokenizer, which none of these tests needs to be right."""
    _, model = exported("lfm2")
    out = tmp_path_factory.mktemp("recurrent") / "lfm2.edge"
    with bundles.create(out) as draft:
        ov.save_model(model, draft.path / "model.xml", compress_to_fp16=False)
        shutil.copytree(Bundle.open(demo_path).tokenizer_path, draft.path / "tokenizer")
        graph = annotate(ov.Core().read_model(draft.path / "model.xml"))
        facts = ModelFacts(
            "lfm2", "decoder", "openvino", "lfm2", 256, 64, 256, len(graph.blocks), (255,), None, "source", 1
        )
        draft.finish(facts, Report("test: lfm2", {}), graph)
    return out


@pytest.fixture(scope="module")
def expected(path: Path) -> tuple[int, ...]:
    return edgert.load(path, device=CPU).generate(PROMPT, max_tokens=8).tokens


def test_the_model_has_both_kinds_of_states(path: Path) -> None:
    graph = Bundle.open(path).graph
    assert graph is not None
    assert any(block.recurrent_bytes for block in graph.blocks)
    assert any(block.kv_bytes_per_token for block in graph.blocks)
    assert len(graph.blocks) > 2


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 5, "device": CPU},
        {"place": "*=SIM@f32,0-2=CPU@f32"},
        {"device": "CPU@f32+static", "prefill_chunk": 5},
        {"place": "prefill:*=CPU@f32,decode:*=SIM@f32"},  # states change hands between the phases
        {"place": "prefill:*=SIM@f32,decode:*=CPU@f32", "prefill_chunk": 4},
    ],
)  # fmt: skip
def test_placements_write_the_same_tokens(path: Path, expected: tuple[int, ...], options: dict) -> None:
    assert edgert.load(path, **options).generate(PROMPT, max_tokens=8).tokens == expected


def test_a_prompt_that_goes_on_is_not_prefilled_again(path: Path) -> None:
    model = edgert.load(path, device=CPU)
    first = model.generate(PROMPT, max_tokens=4)
    longer = [*PROMPT, *first.tokens, 3, 14, 15]
    second = model.generate(longer, max_tokens=4)
    assert second.timings.reused_tokens == len(PROMPT) + 3  # the last token was never run
    assert second.tokens == edgert.load(path, device=CPU).generate(longer, max_tokens=4).tokens
    back = model.generate(PROMPT[:-2], max_tokens=4)  # it cannot go back
    assert back.timings.reused_tokens == 0
    assert back.tokens == edgert.load(path, device=CPU).generate(PROMPT[:-2], max_tokens=4).tokens


def test_failover_prefills_again(path: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimulatedBackend(Fault(6))
    monkeypatch.setattr(backends, "_load", lambda module: broken if module == "simulated" else _load(module))
    result = edgert.load(path, device="SIM@f32", fallback=CPU, prefill_chunk=6).generate(PROMPT, max_tokens=8)
    assert result.tokens == expected
    assert ["prefilled again" in event.detail for event in result.events] == [True]


def test_kernels_take_the_attention_only(path: Path, expected: tuple[int, ...]) -> None:
    model = edgert.load(path, device="CPU@kernels+f16")
    assert model.generate(PROMPT, max_tokens=2).tokens == expected[:2]
    longer = [*PROMPT, expected[0], expected[1]]
    assert model.generate(longer, max_tokens=1).timings.reused_tokens == len(PROMPT) + 1


def test_what_cannot_work_is_refused_by_name(path: Path) -> None:
    graph = Bundle.open(path).graph
    assert graph is not None
    with pytest.raises(PlanError, match="NPU@f16 takes no block with a recurrent state"):
        Plan.single(graph, edgert.DeviceConfig.parse("NPU")).check(graph)
    with pytest.raises(UsageError, match="the model is recurrent"):
        edgert.load(path, device=CPU).export_cache(PROMPT)


@pytest.mark.parametrize("device", [CPU, "CPU@kernels"])
def test_lanes_take_turns_and_do_not_fork(path: Path, device: str) -> None:
    bundle = Bundle.open(path)
    assert bundle.graph is not None
    executor = Executor(bundle, Plan.single(bundle.graph, edgert.DeviceConfig.parse(device)))
    lanes = open_lanes(executor, kv_bytes=2**24)
    assert isinstance(lanes, SerialLanes)
    lane = lanes.open()
    lanes.step([(lane, PROMPT)])
    assert lane.fork() is None
    idle = Prefixes(4)
    assert idle.take([*PROMPT, 3], [lane]) is None  # a running one is not copied
    idle.put(lane)
    assert idle.take([*PROMPT, 3]) is lane
    assert len(lane.tokens) == len(PROMPT)
    idle.put(lane)
    assert idle.take([*PROMPT[:-1], 3, 4]) in (None, lane)
    assert lane.rewind(len(PROMPT) - 3) == 0

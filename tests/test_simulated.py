"""The simulated device takes the time that the cost model says, by a clock in which time passes when we say so."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray

from edgert.backends.base import Runner, as_array
from edgert.backends.openvino import BACKEND as OPENVINO
from edgert.backends.openvino import core
from edgert.backends.simulated import Clock, Fault, SimulatedBackend, SimulatedDevice, SimulatedRunner
from edgert.bundle import Bundle
from edgert.cost import Costs, Work, Workload, call_us, handover_us
from edgert.cutting import cut
from edgert.device import DeviceConfig
from edgert.errors import DeviceFailedError
from edgert.graph import BlockGraph
from edgert.lowering import keep_last_logits
from edgert.placement import Placement, Plan
from edgert.prediction import Prediction
from edgert.prediction import predict as predict_costs
from edgert.profile import DeviceModel, Profile, names

SLOW = DeviceModel("slow", 0.5, 10.0, 200.0, 0.25, 3.0, 0.5, "f32", "modelled", "made up")
HALF = replace(SLOW, name="half", precision="f16", compute_gops=20.0)
CONFIGS = {DeviceConfig("SIM", model.name): model for model in (SLOW, HALF)}
SIM_SLOW, SIM_HALF = CONFIGS
UNTIMED = DeviceConfig("SIM", "f32")
TOKENS = [5, 17, 3, 60, 41, 9, 30]


def predict(graph: BlockGraph, plan: Plan, models: object, **load: int) -> Prediction:
    assert models is CONFIGS
    profile = Profile(2, "test", tuple(CONFIGS.values()), base_w=0.0)
    return predict_costs(Costs(graph, profile), plan, Workload(**load))


def works(graph: BlockGraph) -> list[Work]:
    return [Work.of(block) for block in graph.blocks]


class FakeClock(Clock):
    """Starts at a second; waiting is what makes it go on."""

    def __init__(self) -> None:
        self.time_s = 1.0

    def now_s(self) -> float:
        return self.time_s

    def wait_until(self, deadline_s: float) -> None:
        self.time_s = max(self.time_s, deadline_s)

    @property
    def passed_us(self) -> float:
        return (self.time_s - 1.0) * 1e6


class Pieces:
    """The demo model's graph, and its submodels for a grouping of blocks."""

    def __init__(self, path: Path) -> None:
        bundle = Bundle.open(path)
        assert bundle.graph is not None
        self.graph: BlockGraph = bundle.graph
        self._path = bundle.model_path

    def cut(self, groups: list[tuple[int, int]]) -> list[ov.Model]:
        model = core().read_model(self._path)
        keep_last_logits(model, self.graph)
        return cut(model, self.graph, groups)

    def runners(self, backend: SimulatedBackend, *placements: Placement) -> list[SimulatedRunner]:
        models = self.cut([(p.first, p.last) for p in placements])
        return [
            backend.compile(model, p.config, self.graph.blocks[p.first : p.last + 1]).runner()
            for model, p in zip(models, placements, strict=True)
        ]


@pytest.fixture(scope="module")
def pieces(demo_path: Path) -> Pieces:
    return Pieces(demo_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def backend(clock: FakeClock) -> SimulatedBackend:
    return SimulatedBackend(models=(SLOW, HALF), clock=clock)


def forward(runners: Sequence[Runner], tokens: list[int], past: int) -> NDArray[np.float32]:
    total = past + len(tokens)
    inputs = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
        "logits_to_keep": np.array([1], np.int64),
    }
    for runner in runners:
        outputs = runner.infer(inputs)
        inputs.update(outputs)
    return np.array(as_array(next(iter(outputs.values()))))


def halves(graph: BlockGraph) -> tuple[int, int]:
    return len(graph.blocks) // 2, len(graph.blocks) - 1


def test_a_plan_takes_the_time_that_was_predicted(pieces: Pieces, backend: SimulatedBackend, clock: FakeClock) -> None:
    middle, last = halves(pieces.graph)
    plan = Plan((Placement(0, middle - 1, SIM_SLOW), Placement(middle, last, SIM_HALF)), "test")
    runners = pieces.runners(backend, *plan.placements)
    forward(runners, TOKENS, 0)
    expected = predict(pieces.graph, plan, CONFIGS, prompt_tokens=len(TOKENS), new_tokens=4, chunk=len(TOKENS))
    assert clock.passed_us == pytest.approx(expected.prefill_us, rel=1e-9)
    for past in range(len(TOKENS), len(TOKENS) + 3):
        forward(runners, [7], past)
    assert clock.passed_us == pytest.approx(expected.total_us, rel=1e-9)
    assert expected.decode_us > 0
    energy_uj = sum(runner.energy_uj or 0 for runner in runners)
    busy_us = sum(runner.busy_us for runner in runners)
    assert busy_us == pytest.approx(expected.total_us)  # one chunk: the devices work one after the other
    assert expected.energy_uj == pytest.approx(energy_uj + 0.5 * busy_us)


def test_states_change_hands_in_the_time_that_was_predicted(
    pieces: Pieces, backend: SimulatedBackend, clock: FakeClock
) -> None:
    middle, last = halves(pieces.graph)
    prefill = (Placement(0, middle - 1, SIM_SLOW), Placement(middle, last, SIM_HALF))
    decode = (Placement(0, middle - 1, SIM_HALF), Placement(middle, last, SIM_SLOW))
    given, taking = pieces.runners(backend, *prefill), pieces.runners(backend, *decode)
    expected = predict(
        pieces.graph, Plan(prefill, "test", decode=decode), CONFIGS, prompt_tokens=7, new_tokens=3, chunk=7
    )
    forward(given, TOKENS, 0)
    states = {name: array for source in given for name, array in source.read_states().items()}
    for target in taking:
        target.write_states(states)  # each takes its own
    assert clock.passed_us == pytest.approx(expected.prefill_us + expected.handover_us, rel=1e-9)
    assert expected.handover_us > 0
    found = [forward(taking, [7], past) for past in (7, 8)]
    assert clock.passed_us == pytest.approx(expected.total_us, rel=1e-9)
    alone = pieces.runners(backend, *prefill)
    forward(alone, TOKENS, 0)
    for past, logits in zip((7, 8), found, strict=True):
        np.testing.assert_allclose(logits, forward(alone, [7], past), atol=0.05)


def test_results_do_not_depend_on_the_model(pieces: Pieces, backend: SimulatedBackend) -> None:
    last = len(pieces.graph.blocks) - 1
    (slow,) = pieces.runners(backend, Placement(0, last, SIM_SLOW))
    (untimed,) = pieces.runners(backend, Placement(0, last, UNTIMED))
    np.testing.assert_array_equal(forward([slow], TOKENS, 0), forward([untimed], TOKENS, 0))
    assert untimed.busy_us == 0
    assert untimed.energy_uj is None


def test_reset_empties_the_cache_and_takes_no_time(pieces: Pieces, backend: SimulatedBackend, clock: FakeClock) -> None:
    last = len(pieces.graph.blocks) - 1
    (runner,) = pieces.runners(backend, Placement(0, last, SIM_SLOW))
    times = []
    for _ in range(2):
        before = runner.busy_us
        forward([runner], TOKENS, 0)
        forward([runner], [7], len(TOKENS))
        times.append(runner.busy_us - before)
        passed_us = clock.passed_us
        runner.reset()
        assert clock.passed_us == passed_us
    assert times[0] == pytest.approx(times[1], rel=1e-12)
    work = works(pieces.graph)
    assert times[0] == pytest.approx(call_us(SLOW, work, 7, 0) + call_us(SLOW, work, 1, 7))


def test_a_cache_that_is_cut_back_is_as_long_as_what_is_left(pieces: Pieces, backend: SimulatedBackend) -> None:
    last = len(pieces.graph.blocks) - 1
    (runner,) = pieces.runners(backend, Placement(0, last, SIM_SLOW))
    work = works(pieces.graph)
    forward([runner], TOKENS, 0)
    states = {name: np.ascontiguousarray(array[:, :, :3]) for name, array in runner.read_states().items()}
    runner.write_states(states)
    before = runner.busy_us
    runner.read_states()
    assert runner.busy_us - before == pytest.approx(handover_us(SLOW, sum(w.state_bytes(3) for w in work)))
    before = runner.busy_us
    forward([runner], [7], 3)
    assert runner.busy_us - before == pytest.approx(call_us(SLOW, work, 1, 3))


def test_a_device_serves_one_call_after_the_other(clock: FakeClock) -> None:
    def device() -> SimulatedDevice:
        return SimulatedDevice(SIM_SLOW, SLOW, clock, None, threading.Event())

    first, other = device(), device()
    with first.busy(30), other.busy(20):
        with first.busy(5):
            assert clock.passed_us == 0
        assert clock.passed_us == pytest.approx(35)  # behind the call that came before
    assert clock.passed_us == pytest.approx(35)  # the other device was free long ago
    with other.busy(10):
        pass
    assert clock.passed_us == pytest.approx(45)
    with first.busy(10):
        clock.time_s += 50e-6  # what the CPU takes longer than the model says
    assert clock.passed_us == pytest.approx(95)
    with first.busy(10):
        pass
    assert clock.passed_us == pytest.approx(105)


def test_threads_share_a_device(backend: SimulatedBackend, clock: FakeClock, pieces: Pieces) -> None:
    last = len(pieces.graph.blocks) - 1
    placement = Placement(0, last, SIM_SLOW)
    runners = [pieces.runners(backend, placement)[0] for _ in range(3)]
    threads = [threading.Thread(target=forward, args=([runner], TOKENS, 0)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.passed_us == pytest.approx(3 * call_us(SLOW, works(pieces.graph), 7, 0))


def test_the_real_clock_never_wakes_early() -> None:
    clock = Clock()
    deadline_s = clock.now_s() + 2e-3
    clock.wait_until(deadline_s)
    assert clock.now_s() >= deadline_s


def test_every_shipped_device_model_is_a_device() -> None:
    (info,) = SimulatedBackend().devices()
    assert info.variants == ("f32", "f16", "f32+static", *names())
    assert info.emulated


def test_blocks_must_be_known_where_time_is_told(pieces: Pieces, backend: SimulatedBackend) -> None:
    (model,) = pieces.cut([(0, len(pieces.graph.blocks) - 1)])
    with pytest.raises(DeviceFailedError, match="SIM@slow cannot tell the time"):
        backend.compile(model, SIM_SLOW)


@pytest.fixture
def hanging() -> Iterator[SimulatedBackend]:
    backend = SimulatedBackend(Fault(1, "hang"))
    yield backend
    backend.released.set()


def whole(pieces: Pieces, backend: SimulatedBackend) -> SimulatedRunner:
    return pieces.runners(backend, Placement(0, len(pieces.graph.blocks) - 1, UNTIMED))[0]


def test_a_lost_device_answers_nothing_any_more(pieces: Pieces) -> None:
    runner = whole(pieces, SimulatedBackend(Fault(1)))
    forward([runner], TOKENS, 0)
    for action in (
        lambda: forward([runner], [7], 7),
        runner.read_states,
        runner.reset,
        lambda: runner.write_states({}),
    ):
        with pytest.raises(DeviceFailedError, match="SIM@f32 failed: simulated device lost"):
            action()


def test_a_device_that_gives_nans_goes_on_to(pieces: Pieces) -> None:
    runner = whole(pieces, SimulatedBackend(Fault(1, "nan")))
    assert np.isfinite(forward([runner], TOKENS, 0)).all()
    for past in (7, 8):
        assert np.isnan(forward([runner], [7], past)).all()


def test_a_hanging_device_returns_when_it_is_released(pieces: Pieces, hanging: SimulatedBackend) -> None:
    runner = whole(pieces, hanging)
    forward([runner], TOKENS, 0)
    errors: list[str] = []

    def call() -> None:
        try:
            forward([runner], [7], 7)
        except DeviceFailedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert not hanging.released.is_set()
    assert not errors
    hanging.released.set()
    thread.join(10)
    assert errors == ["SIM@f32 failed: simulated device hung"]


def test_it_computes_what_the_reference_does(pieces: Pieces) -> None:
    (model,) = pieces.cut([(0, len(pieces.graph.blocks) - 1)])
    reference = OPENVINO.compile(model, DeviceConfig("CPU", "f32")).runner()
    found = forward([whole(pieces, SimulatedBackend())], TOKENS, 0)
    np.testing.assert_array_equal(found, forward([reference], TOKENS, 0))

"""What the profiler finds on simulated devices, whose rates are known, by a clock that goes when we say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from test_simulated import FakeClock

from edgert import backends, conditions, executor, memory, profiler
from edgert.backends.simulated import SimulatedBackend
from edgert.bundle import Bundle
from edgert.cost import Costs, Work, Workload, block_us
from edgert.device import DeviceConfig
from edgert.energy import Meters
from edgert.errors import BundleError, DeviceError, DeviceFailedError, UnknownDeviceError, UsageError
from edgert.graph import BlockGraph
from edgert.grid import Grid
from edgert.placement import Plan, own_blocks
from edgert.prediction import predict
from edgert.profile import DeviceModel, Measurement, Profile, Slowdown
from edgert.profiler import Profiler
from edgert.rates import fit, launch_us
from edgert.samples import Raw, summary
from edgert.shapes import StaticShapes

FAST = DeviceModel("fast", 2.0, 30.0, 150.0, 0.5, 6.0, 0.0, "f32", "modelled", "made up", kv_gbps=1.0, score_gops=20.0)
SLOW = replace(FAST, name="slow", bandwidth_gbps=0.7, compute_gops=11.0, launch_us=40.0)
A, B = DeviceConfig("SIM", "fast"), DeviceConfig("SIM", "slow")
GRID = Grid(contexts=(16, 64, 200), chunks=(8, 32, 64), passes=1, steps=2, rounds=2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    virtual = FakeClock()
    load, backend = backends._load, SimulatedBackend(models=(FAST, SLOW), clock=virtual)
    monkeypatch.setattr(backends, "_load", lambda module: backend if module == "simulated" else load(module))
    monkeypatch.setattr(executor, "time", SimpleNamespace(perf_counter_ns=lambda: round(virtual.time_s * 1e9)))
    monkeypatch.setattr(
        profiler,
        "time",
        SimpleNamespace(perf_counter=virtual.now_s, monotonic=time.monotonic, sleep=lambda _s: None),
    )
    monkeypatch.setattr(profiler, "eviction", lambda: lambda: None)
    monkeypatch.setattr(profiler, "bandwidth_gbps", lambda: 30.0)
    return virtual


@pytest.fixture
def bundle(demo_path: Path) -> Bundle:
    return Bundle.open(demo_path)


def graph_of(bundle: Bundle) -> BlockGraph:
    assert bundle.graph is not None
    return bundle.graph


def measure(bundle: Bundle, *configs: DeviceConfig, grid: Grid = GRID, **options: object) -> Profile:
    return Profiler(bundle, configs, grid, emulated=True, **options).measure()  # type: ignore[arg-type]


def test_what_was_measured_predicts_what_the_device_takes(bundle: Bundle, clock: FakeClock) -> None:
    graph = graph_of(bundle)
    found = measure(bundle, A, B)
    truth = Costs(graph, Profile(2, "truth", (FAST, SLOW), base_w=0.0))
    costs = Costs(graph, found)
    half = len(graph.blocks) // 2
    plans = [
        Plan.single(graph, A),
        Plan.single(graph, B),
        Plan.from_configs([A] * half + [B] * (len(graph.blocks) - half), "halves"),
        Plan.from_configs([A] * len(graph.blocks), "cut", merge=False),
    ]
    for plan in plans:
        for load in (Workload(64, 40, 64), Workload(48, 100, 32), Workload(100, 2, 64)):
            said, true = predict(costs, plan, load), predict(truth, plan, load)
            assert said.prefill_us == pytest.approx(true.prefill_us, rel=0.1), (plan, load)
            assert said.decode_us == pytest.approx(true.decode_us, rel=0.03), (plan, load)
            assert {entry.provenance for entry in said.entries} == {"modelled"}  # no real device was seen
    for config, model in ((A, FAST), (B, SLOW)):
        rates = found.model(config)
        assert rates is not None
        assert rates.launch_us == pytest.approx(model.launch_us, rel=0.12)  # and what crosses a boundary
        assert rates.transfer_gbps == pytest.approx(model.transfer_gbps, rel=0.02)
        assert rates.provenance == "modelled"
        assert rates.active_w is None
        assert rates.precision == "f32"


def test_identical_blocks_are_measured_once(bundle: Bundle, clock: FakeClock) -> None:
    graph = graph_of(bundle)
    calls: dict[str, int] = {}
    observe = executor.SequenceRun.observe

    def counting(self: executor.SequenceRun, *arguments: object) -> list[tuple[float, np.ndarray]]:
        for stage in self.executor.chains[0]:
            name = f"{stage.placement.first}-{stage.placement.last}"
            calls[name] = calls.get(name, 0) + 1
        return observe(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.SequenceRun, "observe", counting)
        found = measure(bundle, A, grid=replace(GRID, rounds=1))
    distinct = {block.signature for block in graph.blocks}
    assert len(calls) <= len(distinct) + 2  # one of each, the one that computes masks for it, the whole
    assert {m.block for m in found.measurements} == distinct | {graph.signature}
    assert found.covers(graph.blocks, A)
    assert not found.covers(graph.blocks, B)


def test_measuring_goes_on_where_it_was_interrupted(bundle: Bundle, clock: FakeClock, tmp_path: Path) -> None:
    partial = tmp_path / "profile.partial"

    def interrupted(text: str, _share: float) -> None:
        if text.startswith("SIM@slow, round 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(bundle, A, B, partial=partial, progress=interrupted)
    began: list[str] = []
    second = Profiler(bundle, (A, B), GRID, emulated=True, partial=partial, progress=lambda t, _: began.append(t))
    found = second.measure()
    assert "SIM@fast, round 1 of 2" not in began
    assert "SIM@slow, round 1 of 2" in began
    straight = measure(bundle, A, B)
    assert [(m.config, m.block, m.tokens, m.past, m.runs) for m in found.measurements] == [
        (m.config, m.block, m.tokens, m.past, m.runs) for m in straight.measurements
    ]
    second.discard()
    assert not partial.exists()
    partial.write_text("no JSON")
    assert measure(bundle, A, grid=replace(GRID, rounds=1), partial=partial).covers(graph_of(bundle).blocks, A)


def test_a_budget_that_is_used_up_ends_with_a_whole_profile(bundle: Bundle, clock: FakeClock) -> None:
    found = measure(bundle, A, grid=replace(GRID, passes=9, rounds=9), budget_s=1e-9)
    assert found.covers(graph_of(bundle).blocks, A)
    whole = graph_of(bundle).signature
    assert {m.runs for m in found.measurements if m.tokens > 1 and m.block == whole} == {1}


def test_watts_are_those_above_the_machine_at_rest(bundle: Bundle, clock: FakeClock) -> None:
    def asleep(seconds: float) -> None:
        clock.time_s += seconds

    resting = {"draw": True}

    class Meter:
        """Of a machine that draws 5 W, and 17 while it is measured."""

        domain, source, provenance, resolution_uj, max_interval_s = "psys", "made up", "measured", 1.0, None

        def __init__(self) -> None:
            self.spent_uj, self.last_s = 0.0, clock.time_s

        def read_uj(self) -> float:
            self.spent_uj += (5e6 if resting["draw"] else 17e6) * (clock.time_s - self.last_s)
            self.last_s = clock.time_s
            return self.spent_uj

    meter = Meter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiler.time, "sleep", asleep)
        meters = Meters([meter], [], clock=clock.now_s)  # type: ignore[list-item]
        found = Profiler(
            bundle, (A,), replace(GRID, rounds=1), emulated=True, meters=meters,
            progress=lambda text, _: resting.update(draw=text == "the machine at rest"),
        ).measure()  # fmt: skip
    assert found.base_w == pytest.approx(5)
    model = found.model(A)
    assert model is not None
    assert model.active_w == pytest.approx(12)
    said = predict(Costs(graph_of(bundle), found), Plan.single(graph_of(bundle), A), Workload(32, 8, 32))
    assert said.energy_uj == pytest.approx(17 * said.total_us, rel=1e-3)  # launches and cold caches are not in twice
    for m in found.measurements:
        if m.block == graph_of(bundle).signature:
            assert m.energy_uj == pytest.approx(12 * m.latency_us, rel=1e-6)


def test_static_shapes_are_measured_in_their_own_sizes(bundle: Bundle, clock: FakeClock) -> None:
    static, graph = DeviceConfig("CPU", "f32+static"), graph_of(bundle)
    grid = Grid(contexts=(16,), chunks=(8, 64), passes=1, steps=2, rounds=1)
    found = measure(bundle, static, grid=grid, shapes=StaticShapes((64,), (128, 256)))
    assert {(m.tokens, m.past) for m in found.measurements if m.block == graph.signature} == {(1, 128), (64, 128)}
    own = own_blocks(graph, static)
    assert len(own) == len(graph.blocks) - 1  # the lookup stays on the host
    assert found.covers(own, static)
    assert graph.blocks[0].signature not in {m.block for m in found.measurements}


def test_a_device_that_fails_costs_only_itself(bundle: Bundle, clock: FakeClock) -> None:
    round_of = Profiler._round

    def failing(self: Profiler, config: DeviceConfig, idle: object) -> None:
        if config == A:
            raise DeviceFailedError("SIM@fast failed: lost")
        round_of(self, config, idle)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiler, "_round", failing)
        found = measure(bundle, A, B, grid=replace(GRID, rounds=1))
        assert found.configs == (B,)
        assert "SIM@fast was not measured: SIM@fast failed: lost" in found.warnings
        with pytest.raises(DeviceFailedError, match="lost"):
            measure(bundle, A)


def test_declared_watts_are_estimates(bundle: Bundle, clock: FakeClock) -> None:
    found = measure(bundle, A, grid=replace(GRID, rounds=1)).declared({"SIM": 9.0, "base": 4.0})
    model = found.model(A)
    assert model is not None
    assert (model.active_w, model.provenance_of("active_w")) == (9.0, "estimated")
    assert (found.base_w, found.base_provenance) == (4.0, "estimated")
    said = predict(Costs(graph_of(bundle), found), Plan.single(graph_of(bundle), A), Workload(32, 8, 32))
    assert said.energy_uj == pytest.approx(13 * said.total_us, rel=1e-3)
    assert said.energy_provenance == "modelled"  # the times are of no real device


def test_an_error_of_a_block_is_its_own(bundle: Bundle, clock: FakeClock) -> None:
    graph = graph_of(bundle)
    found = measure(bundle, A, DeviceConfig("CPU", "bf16") if _has_bf16() else A, grid=replace(GRID, rounds=1))
    costs = Costs(graph, found)
    assert all(costs.error(i, A) == pytest.approx(0, abs=1e-6) for i in range(len(graph.blocks)))
    if _has_bf16():
        errors = [costs.error(i, DeviceConfig("CPU", "bf16")) for i in range(1, len(graph.blocks) - 1)]
        assert all(e is not None and 1e-5 < e < 0.05 for e in errors)


def _has_bf16() -> bool:
    return DeviceConfig("CPU", "bf16") in backends.devices_of(DeviceConfig("CPU", "f32").kind)[0].configs


class Run:
    """A sequence on a device that takes three times as long while the other one works."""

    working: ClassVar[set[str]] = set()
    began = threading.Event()

    def __init__(self, name: str) -> None:
        self.name, self.infer_us, self.past = name, 0.0, 0

    def forward(self, _tokens: object) -> None:
        background = threading.current_thread() is not threading.main_thread()
        if background:
            self.working.add(self.name)
            self.began.set()
        self.infer_us = 30.0 if self.working - {self.name} else 10.0


def test_devices_slow_each_other_down(bundle: Bundle, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def working(step: Callable[[], object]) -> Iterator[None]:
        Run.began.clear()
        with busy(step):
            assert Run.began.wait(60)
            yield
        Run.working.clear()

    busy = profiler._working
    monkeypatch.setattr(profiler, "_working", working)
    subject = Profiler(bundle, (A, B), GRID, emulated=True)
    for raw in subject._raw.values():
        raw.emulated = False
    monkeypatch.setattr(subject, "_chain", lambda config: SimpleNamespace(open=lambda: Run(str(config))))
    assert subject._slowdowns() == (Slowdown(str(B), str(A), 3.0), Slowdown(str(A), str(B), 3.0))


def test_emulated_devices_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="SIM@f32 is emulated"):
        Profiler(bundle, (DeviceConfig("SIM", "f32"),), GRID)
    with pytest.raises(UnknownDeviceError, match="CPU@f64 is not available"):
        Profiler(bundle, (DeviceConfig("CPU", "f64"),), GRID)


def test_a_bundle_without_blocks_is_refused(fake_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="no block graph"):
        Profiler(Bundle.open(fake_bundle()), (DeviceConfig("CPU", "f32"),), GRID)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"contexts": ()}, r"contexts are \[\]"),
        ({"contexts": (5, 5)}, r"contexts are \[5, 5\], expected ascending"),
        ({"chunks": (1, 8)}, "chunks are .* from 2"),
        ({"passes": 0}, "passes is 0, the least is 1"),
    ],
)
def test_grids_have_limits(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Grid(**values)  # type: ignore[arg-type]


def test_a_grid_fits_a_small_context() -> None:
    small = Grid().within(64)
    assert small.contexts == (32,)
    assert small.chunks == (16, 64)
    tiny = Grid().within(8)
    assert len(tiny.contexts) == 1
    assert tiny.chunks == (4,)


def test_rates_are_found_again(bundle: Bundle) -> None:
    graph = graph_of(bundle)
    model = replace(FAST, half_rate_tokens=24.0, compute_gops=90.0)
    samples = {}
    for block in graph.blocks:
        for tokens, pasts in ((1, (16, 200)), (16, (0, 160)), (64, (0, 640)), (256, (0, 512))):
            for past in pasts if block.states else (0,):
                us = float(block_us(model, Work.of(block), tokens, past))
                samples[block.signature, tokens, past] = max(us, 1e-3)
    found = fit(samples, graph, 1.0)
    assert found["bandwidth_gbps"] == pytest.approx(model.bandwidth_gbps, rel=0.25)  # keys and values are in it
    assert found["compute_gops"] == pytest.approx(model.compute_gops, rel=0.35)  # and so are scores
    assert found["kv_gbps"] == pytest.approx(1.0, rel=0.05)
    assert found["score_gops"] == pytest.approx(20.0, rel=0.05)


def test_the_launch_is_what_cutting_costs(bundle: Bundle) -> None:
    graph = graph_of(bundle)
    blocks = {(b.signature, 1, 16 if b.states else 0): 50.0 + 10 * (b.kind == "ffn") for b in graph.blocks}
    ffns = sum(b.kind == "ffn" for b in graph.blocks)
    whole = {(graph.signature, 1, 16): 50.0 * len(graph.blocks) + 10 * ffns - 30.0 * (len(graph.blocks) - 1)}
    assert launch_us(blocks, whole, graph.blocks, 1) == pytest.approx(30)
    assert launch_us({}, whole, graph.blocks, 1) == 0
    whole = dict.fromkeys(whole, 1.0)  # less than is possible: no more than what the fastest block takes
    assert launch_us(blocks, whole, graph.blocks, 1) == 50


def test_doubts_are_told(bundle: Bundle) -> None:
    raw = Raw(whole={("model", 1, 8): [1.0, 5.0, 9.0, 2.0]}, paces=[10.0, 11.0, 14.0])
    found = summary(A, raw, graph_of(bundle)).warnings
    assert "SIM@fast was 40% slower at the end than at the beginning" in found[0]
    assert "SIM@fast: 1 of 1 times are unsteady" in found[1]
    assert Raw.from_json(raw.to_json()) == raw


HERE = {"openvino": "2026.4.1", "power": "mains", "CPU": "a CPU"}


def test_a_profile_is_found_by_its_conditions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))
    with pytest.raises(DeviceError, match="has no profile yet: run `edgert profile BUNDLE`"):
        conditions.find_cached(HERE)
    rows = (Measurement("SIM@fast", "ffn-1", 1, 0, 5.0, 0.1, None, 3, "measured"),)
    profile = Profile(2, "here", (FAST,), measurements=rows, conditions=HERE)
    profile.write(conditions.path_of(HERE))
    assert conditions.find_cached(HERE) == profile
    (conditions.folder() / "old.json").write_text("{}")
    with pytest.raises(DeviceError, match=r"stale \(power was mains, is battery\)"):
        conditions.find_cached({**HERE, "power": "battery"})
    with pytest.raises(DeviceError, match=r"stale \(driver was absent, is 7\)"):
        conditions.find_cached({**HERE, "driver": "7"})


def test_this_machine_has_conditions(tmp_path: Path) -> None:
    found = conditions.conditions()
    assert {"openvino", "system", "CPU", "power", "governor"} <= set(found)
    assert found == conditions.conditions()
    governor = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.write_text("powersave\n")
    assert conditions.conditions(root=tmp_path)["governor"] == "powersave"
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    for number, size in enumerate(("48K", "2048K", "36M", "odd")):
        (cache / f"index{number}").mkdir(parents=True)
        (cache / f"index{number}" / "size").write_text(f"{size}\n")
    assert memory.last_level_cache(tmp_path) == 36 * 2**20
    assert memory.last_level_cache(tmp_path / "none") == 64 * 2**20


def test_what_two_profiles_of_a_machine_know(tmp_path: Path) -> None:
    def row(config: str, block: str, latency_us: float) -> Measurement:
        return Measurement(config, block, 1, 0, latency_us, 0.0, None, 1, "measured")

    warned = ("SIM@fast: odd", "SIM@slow: odd")
    before = (row("SIM@fast", "x", 1), row("SIM@slow", "x", 2))
    old = Profile(2, "m", (FAST, SLOW), base_w=4.0, measurements=before, warnings=warned, source="a")
    after = (row("SIM@fast", "x", 3), row("SIM@fast", "y", 4))
    new = Profile(2, "m", (replace(FAST, launch_us=9.0),), measurements=after, source="b")
    both = old.joined(new)
    assert [(m.config, m.block, m.latency_us) for m in both.measurements] == [
        ("SIM@slow", "x", 2), ("SIM@fast", "x", 3), ("SIM@fast", "y", 4),
    ]  # fmt: skip
    assert [d.launch_us for d in both.devices] == [9.0, 40.0]
    assert both.base_w == 4.0
    assert both.warnings == ("SIM@slow: odd",)
    assert both.joined(new).source == "a; b"
    small = replace(new, measurements=(row("SIM@fast", "z", 0.5),))
    assert [d.launch_us for d in both.joined(small).devices] == [9.0, 40.0]
    assert [d.launch_us for d in old.joined(small).devices] == [FAST.launch_us, 40.0]  # of the larger model
    both.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == both

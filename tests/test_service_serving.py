"""A worker's loop on a thread of this process: devices that fail, other plans, parked caches, little memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worker_client import Inside, load_of

import edgert
from edgert.backends.simulated import Fault, SimulatedBackend
from edgert.device import DeviceConfig
from edgert.kvcache import KvCache
from edgert.placement import Plan
from edgert.sampling import SamplingParams
from edgert.service.protocol import (
    Cancel,
    Drop,
    Dropped,
    Failed,
    Pace,
    Ping,
    PlanUsed,
    Pong,
    Ready,
    Start,
    UsePlan,
)
from edgert.service.worker import plans
from edgert.service.worker.serving import Built
from edgert.session import Model

PROMPT = "It was a dark night, and the old man"


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    backend, load = SimulatedBackend(), edgert.backends._load
    monkeypatch.setattr("edgert.backends._load", lambda module: backend if module == "simulated" else load(module))
    return backend


@pytest.mark.parametrize(("fault", "kind"), [("nan", "DeviceNonsenseError"), ("error", "DeviceFailedError")])
def test_a_device_that_fails_ends_the_worker(
    simulated: SimulatedBackend, demo_path: Path, demo: Model, fault: Any, kind: str
) -> None:
    client = Inside(load_of(demo_path, device="SIM@f32"))
    ready = client.wait_for(Ready)
    assert ready.emulated
    id = client.start(PROMPT, sampling={"max_tokens": 8})
    assert client.finish(id) == [demo.generate(PROMPT, max_tokens=8).text]
    assert (client.pieces[id][-1].joules, client.pieces[id][-1].joules_provenance) == (None, "emulated")
    for device in simulated._devices.values():
        device._fault = Fault(0, fault)
    client.start(PROMPT, sampling={"max_tokens": 8})
    failed = client.wait_for(Failed)
    assert (failed.kind, failed.unit) == (kind, "SIM@f32")
    client._thread.join(60)
    assert client.exit_code == 1


def test_nonsense_of_a_cpu_names_the_cpu(demo_path: Path) -> None:
    def spoil(serving: Any) -> None:
        lanes = serving._loop.lanes
        step = lanes.step
        lanes.step = lambda work: [np.full_like(row, np.nan) for row in step(work)]

    client = Inside(load_of(demo_path, device="CPU@f32"), spoil)
    client.start(PROMPT)
    failed = client.wait_for(Failed)
    assert (failed.kind, failed.unit) == ("DeviceFailedError", "CPU")


def test_an_error_of_ours_is_told_without_the_prompt(demo_path: Path) -> None:
    def spoil(serving: Any) -> None:
        def step(work: Any) -> Any:
            raise KeyError("secret")

        serving._loop.lanes.step = step

    client = Inside(load_of(demo_path, device="CPU@f32"), spoil)
    client.start(PROMPT)
    failed = client.wait_for(Failed)
    assert (failed.kind, failed.unit) == ("WorkerError", None)
    assert "secret" not in failed.message


def test_requests_go_on_on_another_plan(
    demo_path: Path, demo: Model, monkeypatch: pytest.MonkeyPatch, simulated: SimulatedBackend
) -> None:
    def offered(bundle: Any, forbidden: Any = ()) -> Any:
        found = []
        for name, config, us, uj in (("quick", "SIM@f32", 1.0, 9.0), ("frugal", "CPU@f32+dq", 9.0, 1.0)):
            prediction = SimpleNamespace(total_us=us, energy_uj=uj, watts=uj / us)
            plan = Plan.single(bundle.graph, DeviceConfig.parse(config))
            found.append(SimpleNamespace(name=name, plan=plan, prediction=prediction))
        return tuple(found)

    def change(serving: Any) -> None:
        """Let the other plan be compiled after five steps, however long it takes."""
        build, step = serving._build, serving._loop.step
        started, built = threading.Event(), threading.Event()
        steps = iter(range(1000))

        def after_five() -> Any:
            if next(steps) >= 5:
                started.set()
                built.wait(60)
            return step()

        serving._build = lambda name: (started.wait(60), build(name), built.set())
        serving._loop.step = after_five

    monkeypatch.setattr(plans, "library", offered)
    client = Inside(load_of(demo_path, device="CPU@f32"), change)
    ready = client.wait_for(Ready)
    assert [offer.name for offer in ready.plans] == ["single device CPU@f32", "quick", "frugal"]
    assert (ready.plans[1].latency_us, ready.plans[1].watts, ready.plans[0].latency_us) == (1.0, 9.0, None)
    client.send(UsePlan("nothing"))
    client.send(UsePlan("quick"))
    id = client.start(PROMPT, sampling={"max_tokens": 40})
    assert "is none of" in (client.wait_for(PlanUsed).error or "")
    used = client.wait_for(PlanUsed)
    assert (used.name, used.error) == ("quick", None)
    at = len(client.pieces[id])
    assert 5 <= at < 40
    assert client.finish(id) == [demo.generate(PROMPT, max_tokens=40).text]
    assert client.pieces[id][at].decode_us - client.pieces[id][at - 1].decode_us > 0
    assert client.pieces[id][-1].joules_provenance == "emulated"
    client.send(UsePlan("quick"))
    assert client.wait_for(PlanUsed).error is None
    assert client.end() == 0


def test_a_plan_that_fails_leaves_all_as_it_was(
    demo_path: Path, demo: Model, monkeypatch: pytest.MonkeyPatch, simulated: SimulatedBackend
) -> None:
    prediction = SimpleNamespace(total_us=1.0, energy_uj=None, watts=None)

    def offered(bundle: Any, forbidden: Any = ()) -> Any:
        plan = Plan.single(bundle.graph, DeviceConfig.parse("CPU@nothing"))
        return (SimpleNamespace(name="bad", plan=plan, prediction=prediction),)

    monkeypatch.setattr(plans, "library", offered)
    client = Inside(load_of(demo_path, device="CPU@f32"))
    client.send(UsePlan("bad"))
    assert "nothing" in (client.wait_for(PlanUsed).error or "")
    assert client.ask(PROMPT, sampling={"max_tokens": 5}) == demo.generate(PROMPT, max_tokens=5).text
    assert client.end() == 0


def test_caches_are_parked_and_taken_up(demo_path: Path, demo: Model, tmp_path: Path) -> None:
    park = tmp_path / "parked"
    first = Inside(load_of(demo_path, device="CPU@f32", park=str(park)))
    prompts = [PROMPT, "Chapter 3. The sea"]
    for prompt in prompts:
        first.ask(prompt, sampling={"max_tokens": 4})
    first.send(Drop(str(park)))
    dropped = first.wait_for(Dropped)
    assert dropped.parked == 2
    assert dropped.freed_bytes > 0
    first.end()
    KvCache("of-a-bundle-before", (1,), {}).save(park / "other.kv")
    damaged = park / f"{demo.bundle.fingerprint}-0.kv"
    damaged.write_bytes(b"x")
    second = Inside(load_of(demo_path, device="CPU@f32", park=str(park)))
    ids = [second.start(prompt, sampling={"max_tokens": 4}) for prompt in prompts]
    assert second.finish(*ids) == [demo.generate(prompt, max_tokens=4).text for prompt in prompts]
    assert all(second.started[id].cached_tokens == second.started[id].prompt_tokens - 1 for id in ids)
    assert not list(park.iterdir())
    second.end()


def test_hardware_in_quarantine_is_not_used(demo_path: Path, simulated: SimulatedBackend) -> None:
    client = Inside(load_of(demo_path, device="SIM@f32", avoid={"SIM@f32": "it hung", "CPU": "no matter"}))
    ready = client.wait_for(Ready)
    assert ready.plans[0].units == ["CPU"]
    assert any("it hung" in warning for warning in ready.warnings)
    client.end()


def test_the_pace_is_kept(demo_path: Path) -> None:
    client = Inside(load_of(demo_path, device="CPU@f32"))
    client.send(Pace(0.25))
    client.send(Ping(1))
    client.wait_for(Pong)
    begin_s = time.perf_counter()
    id = client.start(PROMPT, sampling={"max_tokens": 12})
    client.finish(id)
    took_us = (time.perf_counter() - begin_s) * 1e6
    before = client.pieces[id][-2]  # the last one is not paused after
    assert took_us >= 4 * (before.prefill_us + before.decode_us)
    client.end()


def test_a_little_memory_is_shared(demo_path: Path, demo: Model) -> None:
    """Three requests where there is room for one and a half: all get their text, one after the other where need be."""
    probe = Inside(load_of(demo_path, device="CPU@f32"))
    probe.ask(PROMPT, sampling={"max_tokens": 4})
    probe.send(Ping(1))
    tokens = len(demo.tokenizer.encode(PROMPT)) + 3
    per_token = probe.wait_for(Pong).kv_bytes // tokens
    probe.end()
    client = Inside(load_of(demo_path, device="CPU@f32", kv_bytes=per_token * 120))
    assert client.wait_for(Ready).context_length == 120
    ids = [client.start(f"{PROMPT} {n}", sampling={"max_tokens": 60}) for n in range(3)]
    expected = [demo.generate(f"{PROMPT} {n}", max_tokens=60).text for n in range(3)]
    assert client.finish(*ids) == expected
    client.end()


def test_a_start_that_was_cancelled_before_it_was_read(demo_path: Path) -> None:
    client = Inside(load_of(demo_path, device="CPU@f32"))
    client.send(Start(5, prompt=PROMPT, sampling=vars(SamplingParams(max_tokens=500, seed=1))))
    client.send(Cancel(5))
    client.finish(5)
    assert client.pieces[5][-1].finish_reason == "cancelled"
    client.end()


def test_background_work_alone_lets_others_first(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes: list[bool] = []
    monkeypatch.setattr("edgert.service.worker.scheduling.set_background", classes.append)
    client = Inside(load_of(demo_path, device="CPU@f32"))
    behind = client.start(PROMPT, sampling={"max_tokens": 900}, background=True)
    while len(client.pieces[behind]) < 2:
        client.read()
    assert classes == [True]
    before = client.start(PROMPT, sampling={"max_tokens": 4})
    client.finish(before)
    assert classes[:2] == [True, False]
    seen = len(client.pieces[behind])
    while len(client.pieces[behind]) < seen + 2:
        client.read()
    assert classes == [True, False, True]
    client.end()


def test_of_several_plans_the_last_wish_counts(demo_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def change(serving: Any) -> None:
        put = serving._inbox.put
        serving._offers = {**serving._offers, **dict.fromkeys("abc", next(iter(serving._offers.values())))}

        def build(name: str) -> None:
            begun.set()
            go_on.wait(60)
            put(Built(name, None, "not today"))

        serving._build = build

    client = Inside(load_of(demo_path, device="CPU@f32"), change)
    for name in "abc":
        client.send(UsePlan(name))
        assert begun.wait(60)
    replaced = client.wait_for(PlanUsed)
    assert (replaced.name, replaced.error) == ("b", "'c' was asked for after it")
    go_on.set()
    assert [client.wait_for(PlanUsed).name for _ in range(2)] == ["a", "c"]
    client.end()

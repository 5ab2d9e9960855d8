"""The pool with workers that write words: streams go on whatever happens to these, and everybody gets a fair share."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_worker import text, word

from edgert.errors import BundleError, BusyError, ContextOverflowError, UnknownModelError, UsageError, WorkerError
from edgert.service import protocol
from edgert.service.contract import Delta, Request, Usage
from edgert.service.pool import hosted as hosted_module
from edgert.service.pool import pool as pool_module
from edgert.service.pool.jobs import UNREAD
from edgert.service.pool.pool import Pool
from edgert.service.pool.recovery import Patience
from edgert.service.pool.steering import load_message
from edgert.service.power.machine import MachineState
from edgert.service.power.policy import Decision, Loaded, Policy
from edgert.service.settings import ModelSettings, Settings

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
AT_ONCE = Patience(backoff_s=0.0, stop_s=5.0)
LENGTH = 6


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """Instead of the machine's state."""

    def read(self, now_s: float) -> MachineState:
        return MachineState()


@dataclass
class Scene:
    """Models in a folder, and pools that serve them."""

    folder: Path
    clock: Clock = field(default_factory=Clock)

    def model(self, name: str = "m", **script: Any) -> Path:
        path = self.folder / f"{name}.edge"
        path.mkdir(exist_ok=True)
        (path / "fake.json").write_text(json.dumps(script), "utf-8")
        return path

    def log(self, name: str = "m") -> list[str]:
        return (self.folder / f"{name}.edge" / "log").read_text("utf-8").splitlines()

    def starts(self, name: str = "m") -> list[str]:
        return [line.split()[1] for line in self.log(name) if line.startswith("start")]

    @asynccontextmanager
    async def pool(self, *, policy: Any = None, **settings: Any) -> Any:
        pool = Pool(
            Settings(folders=(self.folder,), **{"memory_bytes": 2**40, **settings}),
            command=COMMAND,
            clock=self.clock,
            patience=AT_ONCE,
            reader=Machine(),  # type: ignore[arg-type]
            policy=policy,
        )
        try:
            yield pool
        finally:
            await pool.close(0.0)

    def later(self, pool: Pool, seconds: float) -> None:
        self.clock.now += seconds
        pool.tick()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something has happened; the test's own limit ends what never does."""
    while not condition():
        await asyncio.sleep(0.002)


def ask(prompt: str, length: int = LENGTH, **fields: Any) -> Request:
    return Request("m", prompt=prompt, sampling={"max_tokens": length}, **fields)


async def collect(pool: Pool, request: Request) -> list[Delta]:
    return [delta async for delta in pool.generate(request)]


def joined(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def usage_of(deltas: list[Delta]) -> Usage:
    assert deltas[-1].usage is not None
    return deltas[-1].usage


def kinds(pool: Pool) -> list[str]:
    return [event.kind for event in pool.status().events]


# --- streams


def test_a_stream(scene: Scene) -> None:
    scene.model(joules=0.5)

    async def scenario() -> None:
        async with scene.pool() as pool:
            assert pool.idle_since() == 1000.0
            deltas = await collect(pool, ask("hello"))
            assert joined(deltas) == text("hello", LENGTH)
            assert [delta.token for delta in deltas] == [word("hello", i)[0] for i in range(LENGTH)]
            assert [delta.finish_reason for delta in deltas] == [None] * (LENGTH - 1) + ["length"]
            assert usage_of(deltas) == Usage(5, 1, LENGTH, 0, 0.0, 10.0, LENGTH, "measured", 0.5 * LENGTH, "measured")
            assert pool.idle_since() is None
            [status] = pool.models()
            assert (status.name, status.state, status.running, status.waiting) == ("m", "idle", 0, 0)
            assert (status.plan, status.devices, status.task) == ("CPU", ("CPU@default",), "decoder")
            assert status.tokens_per_second == LENGTH
            assert (status.joules_per_token, status.energy_provenance) == (0.5, "measured")
            assert status.memory_bytes is not None
            assert status.memory_bytes > 2**20
            assert kinds(pool) == ["load"]

    run(scenario())


def test_seeds_are_set_once(scene: Scene) -> None:
    scene.model(faults=[[2, "exit"]])

    async def scenario() -> None:
        async with scene.pool() as pool:
            await collect(pool, ask("one"))
            await collect(pool, Request("m", prompt="two", sampling={"seed": 7}))

    run(scenario())
    first, again, given = (line for line in scene.log() if line.startswith("start"))
    assert first.split()[2:] == ["0", again.split()[3]]
    assert again.split()[2] == "2"
    assert 0 <= int(again.split("=")[1]) < 2**64
    assert given.endswith("seed=7")


@pytest.mark.parametrize("how", ["exit", "kill", "failed", "garbage", "half"])
def test_a_stream_goes_on_after_any_failure_at_any_token(scene: Scene, how: str) -> None:
    names = [f"m{k}" for k in range(LENGTH)]
    for k, name in enumerate(names):
        scene.model(name, faults=[[k, how]], units=["NPU"])

    async def scenario() -> None:
        async with scene.pool() as pool:

            async def one(k: int, name: str) -> None:
                deltas = await collect(pool, Request(name, prompt="tale", sampling={"max_tokens": LENGTH}))
                assert joined(deltas) == text("tale", LENGTH)
                assert usage_of(deltas).completion_tokens == LENGTH
                assert usage_of(deltas).prefill_us == (20.0 if k else 10.0)
                assert usage_of(deltas).decode_us == LENGTH
                noted = [number for number, delta in enumerate(deltas) if delta.notes]
                assert noted == [k]
                assert "goes on with plan" in deltas[k].notes[0]

            await asyncio.gather(*(one(k, name) for k, name in enumerate(names)))
            status = pool.status()
            assert [model.restarts for model in status.models] == [1] * LENGTH
            assert {event.kind for event in status.events} >= {"failure", "recovery"}
            assert ("NPU" in status.quarantined) is (how != "kill")

    run(scenario())


def test_a_stream_goes_on_after_a_worker_hangs_at_any_token(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "ANSWER_S", 0.05)
    names = [f"m{k}" for k in range(LENGTH)]
    for k, name in enumerate(names):
        scene.model(name, faults=[[k, "hang"]], units=["NPU"])

    async def scenario() -> None:
        async with scene.pool(step_timeout_s=60.0) as pool:
            got: Counter[str] = Counter()

            async def one(name: str) -> None:
                deltas = []
                async for delta in pool.generate(Request(name, prompt="tale", sampling={"max_tokens": LENGTH})):
                    deltas.append(delta)
                    got[name] += 1
                assert joined(deltas) == text("tale", LENGTH)

            tasks = [asyncio.create_task(one(name)) for name in names]
            await until(lambda: all(got[name] == k for k, name in enumerate(names)))
            await until(lambda: [model.running for model in pool.models()] == [1] * LENGTH)
            assert (await pool.health()).ready  # they worked a moment ago
            scene.clock.now += 11
            assert not (await pool.health()).ready
            scene.later(pool, 18)
            await asyncio.sleep(0)
            assert kinds(pool) == ["load"] * LENGTH
            scene.later(pool, 1)  # 30 s after they were asked first
            await asyncio.gather(*tasks)
            assert kinds(pool).count("failure") == LENGTH
            assert "hung" in next(event.detail for event in pool.status().events if event.kind == "failure")
            assert set(pool.status().quarantined) == {"NPU"}

    run(scenario())


def test_a_server_that_stood_still_blames_no_worker(scene: Scene) -> None:
    scene.model(delay_s=0.002)

    async def scenario() -> None:
        async with scene.pool() as pool:
            stream = pool.generate(ask("on and on", 10**6))
            await anext(stream)
            scene.later(pool, 3600)
            for _ in range(50):
                await anext(stream)
            scene.later(pool, 31)
            await anext(stream)
            for seconds in (31, 31, 3600):  # asked, and the answer not read
                scene.later(pool, seconds)
            await until(lambda: pool._hosted["m"].worker.heard_s == scene.clock.now)
            assert kinds(pool) == ["load"]
            await stream.aclose()

    run(scenario())


def test_nan_on_a_device_goes_on_without_it_and_comes_back_later(scene: Scene) -> None:
    scene.model(units=["NPU"])

    async def scenario() -> None:
        async with scene.pool(keep_alive_s=-1) as pool:
            deltas = await collect(pool, ask("nan"))
            assert joined(deltas) == text("nan", LENGTH)
            assert pool.models()[0].plan == "CPU"
            assert "NPU is avoided" in pool.models()[0].warnings[0]
            assert "NaN" in pool.status().quarantined["NPU"]
            scene.later(pool, 59)
            assert pool.status().quarantined
            assert pool.models()[0].state == "idle"
            scene.later(pool, 1)
            await until(lambda: pool.models()[0].plan == "NPU")
            assert not pool.status().quarantined

    run(scenario())
    assert [line for line in scene.log() if line.startswith("load")] == [
        "load any avoid=", "load any avoid=NPU", "load any avoid=",
    ]  # fmt: skip


def test_after_three_failures_the_most_careful_configuration_is_taken(scene: Scene) -> None:
    scene.model(faults=[[1, "exit"], ["load", "exit"], ["load", "exit"]])

    async def scenario() -> None:
        async with scene.pool(keep_alive_s=-1) as pool:
            deltas = await collect(pool, ask("tale"))
            assert joined(deltas) == text("tale", LENGTH)
            assert pool.models()[0].plan == "single device CPU@f32"
            assert "CPU@f32" in pool.models()[0].warnings[0]
            assert pool.models()[0].restarts == 3
            scene.later(pool, AT_ONCE.again_s)
            await until(lambda: pool.models()[0].plan == "CPU")

    run(scenario())


def test_the_most_careful_configuration_is_no_warning_where_it_was_asked_for(scene: Scene) -> None:
    scene.model(faults=[["load", "exit"]] * 3)

    async def scenario() -> None:
        async with scene.pool(keep_alive_s=-1, device="CPU@f32") as pool:
            await pool.load("m")
            assert (pool.models()[0].restarts, pool.models()[0].warnings) == (3, ())
            scene.later(pool, AT_ONCE.again_s)
            assert pool.models()[0].state == "idle"

    run(scenario())
    assert [line for line in scene.log() if line.startswith("load")] == ["load CPU@f32 avoid="] * 4


def test_what_models_name_themselves_goes_before_what_all_of_them_have(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    asked = {
        fields: (load.device, load.objective, load.plan)
        for fields in ("", "device", "objective", "plan")
        for load in [
            load_message(
                Settings(device="CPU@f32"),
                ModelSettings(tmp_path, "m", **({fields: plan if fields == "plan" else "x"} if fields else {})),
                {},
            )
        ]
    }
    assert asked == {
        "": ("CPU@f32", None, None), "device": ("x", None, None),
        "objective": (None, "x", None), "plan": (None, None, {}),
    }  # fmt: skip
    assert load_message(Settings(objective="latency"), ModelSettings(tmp_path, "m"), {}).objective == "latency"


def test_a_sandbox_that_cannot_be_had_is_a_warning(scene: Scene) -> None:
    scene.model(sandbox=["no new privileges", "without seccomp: no"])

    async def scenario() -> None:
        async with scene.pool() as pool:
            assert (await pool.load("m")).warnings == ("sandbox: without seccomp: no",)

    run(scenario())


def test_a_request_that_kills_workers_is_given_up_and_no_other_one(scene: Scene) -> None:
    scene.model(delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool() as pool:
            others = [asyncio.create_task(collect(pool, ask(f"good {n}", 60))) for n in range(4)]
            bad = asyncio.create_task(collect(pool, ask("poison")))
            with pytest.raises(WorkerError, match="3 workers in a row ended over this request"):
                await bad
            for number, task in enumerate(others):
                assert joined(await task) == text(f"good {number}", 60)
            with pytest.raises(WorkerError, match="3 workers"):
                await pool.embed("m", ["poison"])

    run(scenario())


def test_requests_that_are_suspected_join_again_one_by_one(scene: Scene) -> None:
    scene.model(faults=[[0, "kill"], [0, "kill"]], delay_s=0.002)

    async def scenario() -> None:
        async with scene.pool() as pool:
            streams = [pool.generate(ask(f"endless {n}", 10**6)) for n in range(3)]
            await asyncio.gather(*(anext(stream) for stream in streams))  # none waits for another one's end
            assert pool.models()[0].running == 3
            for stream in streams:
                await stream.aclose()

    run(scenario())


def test_workers_that_are_killed_from_outside_say_nothing_about_devices(scene: Scene) -> None:
    scene.model(faults=[["load", "kill"]] * 4, units=["NPU"])

    async def scenario() -> None:
        async with scene.pool() as pool:
            assert (await pool.load("m")).plan == "NPU"
            assert pool.models()[0].restarts == 4

    run(scenario())


def test_a_model_whose_workers_never_get_ready_is_given_up(scene: Scene) -> None:
    scene.model(faults=[["load", "exit"]] * 5)

    async def scenario() -> None:
        async with scene.pool() as pool:
            with pytest.raises(WorkerError, match=r"5 workers in a row failed.*exit code 3: the driver fell over"):
                await collect(pool, ask("tale"))
            assert pool.models()[0].state == "failed"
            assert "5 workers" in pool.models()[0].warnings[0]
            assert joined(await collect(pool, ask("tale"))) == text("tale", LENGTH)  # somebody asks again

    run(scenario())


def test_a_bundle_that_is_refused_is_not_tried_again(scene: Scene) -> None:
    scene.model(faults=[["load", "refuse"]])

    async def scenario() -> None:
        async with scene.pool() as pool:
            with pytest.raises(BundleError, match=r"model\.bin has hash"):
                await pool.load("m")
            assert pool.models()[0].state == "failed"

    run(scenario())
    assert len(scene.log()) == 1


def test_a_worker_that_never_gets_ready_is_replaced(scene: Scene) -> None:
    scene.model(faults=[["load", "never"]])

    async def scenario() -> None:
        async with scene.pool(device_timeout_s=60) as pool:
            loading = asyncio.create_task(pool.load("m"))
            await until(lambda: (scene.folder / "m.edge" / "log").exists())
            assert pool.models()[0].state == "loading"
            health = await pool.health()
            assert (health.ready, health.detail) == (False, "m is loading")
            scene.later(pool, 599)
            assert kinds(pool) == []
            scene.later(pool, 1)
            assert (await loading).state == "idle"
            assert "was not ready within 600 s" in pool.status().events[0].detail
            assert (await pool.health()).ready

    run(scenario())


def test_a_mistake_costs_one_model_its_requests_and_no_other(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.model()
    scene.model("n", delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool() as pool:
            other = asyncio.create_task(collect(pool, replace(ask("other", 100), model="n")))
            await until(lambda: len(pool.models()) == 2 and pool.models()[1].running)
            with monkeypatch.context() as patch:
                patch.setattr(pool._find("m"), "advance", lambda: 1 / 0)
                with pytest.raises(WorkerError, match="ZeroDivisionError in the service"):
                    await collect(pool, ask("tale"))
            assert joined(await collect(pool, ask("tale"))) == text("tale", LENGTH)
            assert joined(await other) == text("other", 100)

    run(scenario())


def test_models_whose_bundles_are_gone_are_forgotten(scene: Scene) -> None:
    for name in ("gone", "kept", "m"):
        scene.model(name)

    async def scenario() -> None:
        async with scene.pool() as pool:
            for name in ("gone", "kept"):
                await pool.load(name)
                await pool.unload(name)
            shutil.rmtree(scene.folder / "gone.edge")
            assert set(pool._hosted) == {"gone", "kept"}
            await pool.load("m")
            assert set(pool._hosted) == {"kept", "m"}
            with pytest.raises(UnknownModelError):
                await pool.load("gone")

    run(scenario())


def test_a_worker_that_cannot_be_told_what_to_load(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.model()

    def fail(message: Any) -> bytes:
        raise ValueError("nested too deeply")

    monkeypatch.setattr("edgert.service.pool.workers.encode", fail)

    async def scenario() -> None:
        async with scene.pool() as pool:
            with pytest.raises(WorkerError, match="could not be told what to load: nested too deeply"):
                await pool.load("m")

    run(scenario())


def test_a_command_that_cannot_be_started(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        settings = Settings(folders=(scene.folder,), memory_bytes=2**40)
        pool = Pool(settings, command=("no such program",), patience=AT_ONCE, reader=Machine())  # type: ignore[arg-type]
        with pytest.raises(WorkerError, match="could not be started"):
            await pool.load("m")
        await pool.close(0)

    run(scenario())


def test_an_idle_worker_that_dies_comes_back_when_it_is_needed(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool() as pool:

            async def die() -> None:
                hosted = pool._hosted["m"]
                worker = hosted.worker
                worker._transport.kill()
                await until(lambda: hosted.worker is not worker)

            await pool.load("m")
            await die()
            assert pool.models()[0].state == "unloaded"
            assert "SIGKILL" in pool.status().events[-1].detail
            await pool.load("m", pin=True)
            await die()
            await until(lambda: pool.models()[0].state == "idle")
            assert pool.models()[0].restarts == 1
            assert kinds(pool) == ["load", "failure", "recovery", "failure", "recovery"]

    run(scenario())


def test_a_worker_that_does_not_end_is_killed(scene: Scene) -> None:
    scene.model(faults=[["stop", "hang"]])

    async def scenario() -> None:
        async with scene.pool() as pool:
            await pool.load("m")
            unloading = asyncio.create_task(pool.unload("m"))
            await until(lambda: pool._hosted["m"].worker.stopping)
            scene.later(pool, AT_ONCE.stop_s)
            assert (await unloading).state == "unloaded"
            assert kinds(pool) == ["load", "unload"]

    run(scenario())


# --- requests


def test_a_request_that_no_worker_could_read_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too long for a line, or too deep to be written: the worker, and its other requests, live on."""
    monkeypatch.setattr(protocol, "MAX_LINE_BYTES", 2000)
    deep: Any = {}
    for _ in range(2000):
        deep = {"a": deep}

    async def scenario() -> None:
        scene.model()
        async with scene.pool() as pool:
            stream = pool.generate(ask("p"))
            first = await anext(stream)
            for refused, why in (
                (ask("x" * 2000), "2000 allowed"),
                (ask("p", template={"x": deep}), "nested too deeply"),
            ):
                with pytest.raises(UsageError, match=why):
                    await collect(pool, refused)
            rest = [delta async for delta in stream]
            assert joined([first, *rest]) == text("p", LENGTH)
            assert len(scene.starts()) == 1

    run(scenario())


def test_what_the_worker_refuses_is_raised(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool() as pool:
            with pytest.raises(ContextOverflowError) as caught:
                await collect(pool, ask("refuse"))
            assert (caught.value.tokens, caught.value.limit) == (5000, 4096)
            assert (await pool.embed("m", ["a", "b"])).vectors == ((1.0, 0.0), (1.0, 0.0))

    run(scenario())


@pytest.mark.parametrize("name", ["x", "../m", "m.edge", "/etc/passwd", "..\\m", "m\0", "", ".", "hidden/../m", "link"])
def test_names_are_no_paths(scene: Scene, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    scene.model()
    scene.model(".hidden")
    (scene.folder / "link.edge").symlink_to(tmp_path_factory.mktemp("elsewhere"), target_is_directory=True)

    async def scenario() -> None:
        async with scene.pool() as pool:
            assert [model.name for model in pool.models()] == ["m"]
            for attempt in (pool.load(name), pool.unload(name), pool.embed(name, ["a"]), collect(pool, Request(name))):
                with pytest.raises(UnknownModelError, match="known are: m"):
                    await attempt

    run(scenario())


def test_a_bundle_that_is_gone(scene: Scene) -> None:
    own = ModelSettings(scene.folder / "nowhere", "m")

    async def scenario() -> None:
        async with scene.pool(models={"m": own}) as pool:
            with pytest.raises(BundleError, match="no such folder"):
                await pool.load("m")

    run(scenario())


def test_closing_a_stream_frees_its_place(scene: Scene) -> None:
    scene.model(delay_s=0.002)

    async def scenario() -> None:
        async with scene.pool(max_sequences=1) as pool:
            endless = pool.generate(ask("endless", 10**6))
            await anext(endless)
            next_one = asyncio.create_task(collect(pool, ask("next")))
            await until(lambda: pool.models()[0].waiting == 1)
            await endless.aclose()
            assert joined(await next_one) == text("next", LENGTH)
            waiting = asyncio.create_task(collect(pool, ask("cancelled", 10**6)))
            await until(lambda: pool.models()[0].running == 1)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert pool.models()[0].running == 0
            await pool.embed("m", ["a"])  # by now the worker has heard of it
            assert scene.log().count("cancel") == 2

    run(scenario())


def test_a_full_queue_turns_requests_away(scene: Scene) -> None:
    scene.model(delay_s=0.002)

    async def scenario() -> None:
        async with scene.pool(max_sequences=1, queue=2) as pool:
            running = pool.generate(ask("endless", 10**6))
            await anext(running)
            waiting = [asyncio.create_task(collect(pool, ask("w", 1))) for _ in range(2)]
            await until(lambda: pool.models()[0].waiting == 2)
            for _ in range(3):
                with pytest.raises(BusyError, match=r"queue = 2") as caught:
                    await collect(pool, ask("w"))
                assert caught.value.retry_after_s == 15.0  # three are before it, and nobody knows better than 5 s
            assert pool.status().rejected == 3
            assert kinds(pool) == ["load", "reject"]
            scene.clock.now += 2.5
            await running.aclose()
            await asyncio.gather(*waiting)
            assert [usage_of(await task).queue_us for task in waiting] == [2.5e6, 2.5e6]

    run(scenario())


def test_clients_get_places_in_turn_and_interactive_requests_first(scene: Scene) -> None:
    scene.model(delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool(max_sequences=1) as pool:
            running = pool.generate(ask("endless", 10**6))
            await anext(running)
            tasks = []
            for prompt, client, priority in (
                ("later", "d", "background"), ("a0", "a", "interactive"), ("a1", "a", "interactive"),
                ("a2", "a", "interactive"), ("b0", "b", "interactive"), ("c0", "c", "interactive"),
            ):  # fmt: skip
                request = ask(prompt, 1, client=client, priority=priority)
                tasks.append(asyncio.create_task(collect(pool, request)))
            await until(lambda: pool.models()[0].waiting == 6)
            await running.aclose()
            await asyncio.gather(*tasks)

    run(scenario())
    assert scene.starts() == ["endless", "a0", "b0", "c0", "a1", "a2", "later"]


def test_a_background_request_makes_way_and_goes_on_later(scene: Scene) -> None:
    scene.model(delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool(max_sequences=1) as pool:
            got: list[Delta] = []

            async def work() -> None:
                async for delta in pool.generate(ask("work", 300, priority="background")):
                    got.append(delta)

            task = asyncio.create_task(work())
            await until(lambda: len(got) >= 3)
            assert joined(await collect(pool, ask("quick", 2))) == text("quick", 2)
            assert len(got) < 300
            await task
            assert joined(got) == text("work", 300)
            assert usage_of(got).completion_tokens == 300

            old = pool.generate(ask("old", 10**6, priority="background"))
            await anext(old)
            scene.clock.now += AT_ONCE.aging_s
            quick = asyncio.create_task(collect(pool, ask("quick", 1)))
            for _ in range(5):
                await anext(old)
            assert pool.models()[0].waiting == 1  # it has waited long enough to keep its place
            await old.aclose()
            await quick

    run(scenario())
    assert scene.starts() == ["work", "quick", "work", "old", "quick"]


def test_readers_that_do_not_read_give_their_places_to_others(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool(max_sequences=1, queue=2) as pool:
            slow, slower = pool.generate(ask("slow", 3 * UNREAD)), pool.generate(ask("slower", 3 * UNREAD))
            got = [await anext(slow)], [await anext(slower)]  # the second one runs once the first is set aside
            await until(lambda: pool.models()[0].running == 0)
            with pytest.raises(BusyError):  # they count, or such readers would fill the memory
                await collect(pool, ask("quick"))
            got[0].extend([delta async for delta in slow])
            assert joined(await collect(pool, ask("quick"))) == text("quick", LENGTH)
            got[1].extend([delta async for delta in slower])
            assert joined(got[0]) == text("slow", 3 * UNREAD)
            assert joined(got[1]) == text("slower", 3 * UNREAD)

    run(scenario())
    assert scene.starts()[:2] == ["slow", "slower"]


# --- models


def test_two_models_at_once(scene: Scene) -> None:
    scene.model("a", delay_s=0.001)
    scene.model("b", delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool() as pool:
            both = await asyncio.gather(
                *(collect(pool, Request(name, prompt=name, sampling={"max_tokens": 20})) for name in "ab")
            )
            assert [joined(deltas) for deltas in both] == [text("a", 20), text("b", 20)]
            assert [model.state for model in pool.models()] == ["idle", "idle"]

    run(scenario())


def test_idle_models_step_down(scene: Scene) -> None:
    scene.model(cached_bytes=10)

    async def scenario() -> None:
        async with scene.pool(keep_alive_s=300, drop_after_s=60) as pool:
            await collect(pool, ask("tale"))
            await until(lambda: pool.models()[0].idle_s is not None)
            scene.later(pool, 59)
            [status] = pool.models()
            assert (status.state, status.idle_s, status.unload_in_s) == ("idle", 59, 241)
            scene.later(pool, 1)
            await until(lambda: pool.models()[0].state == "parked")
            scene.later(pool, 239)
            assert pool.models()[0].state == "parked"
            assert pool.idle_since() is None
            scene.later(pool, 1)
            await until(lambda: pool.models()[0].state == "unloaded")
            assert pool.idle_since() == scene.clock.now
            scene.later(pool, 100)
            assert pool.idle_since() == scene.clock.now - 100
            assert kinds(pool) == ["load", "park", "unload"]
            assert joined(await collect(pool, ask("tale"))) == text("tale", LENGTH)

    run(scenario())
    assert scene.log().count("drop None") == 1


def test_parking(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(scene.folder / "cache"))
    scene.model()

    async def scenario() -> None:
        async with scene.pool(park=True) as pool:
            await pool.load("m")
            scene.later(pool, 60)
            await until(lambda: pool.models()[0].state == "parked")
            assert "1 caches parked" in pool.status().events[-1].detail

    run(scenario())
    [dropped] = {line for line in scene.log() if line.startswith("drop")}
    assert Path(dropped.removeprefix("drop ")).parent == scene.folder / "cache" / "parked"


@pytest.mark.parametrize("keep_alive_s", [0.0, -1.0])
def test_keep_alive_of_a_request(scene: Scene, keep_alive_s: float) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool(keep_alive_s=300, drop_after_s=None) as pool:
            await collect(pool, ask("tale", keep_alive_s=keep_alive_s))
            if keep_alive_s == 0:
                await until(lambda: pool.models()[0].state == "unloaded")
            else:
                await until(lambda: pool.models()[0].idle_s is not None)
                assert pool.models()[0].unload_in_s is None
                scene.later(pool, 1e6)
                assert pool.models()[0].state == "idle"

    run(scenario())


@pytest.fixture
def hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model needs 100 bytes before it is loaded, and holds 100 when it is."""
    monkeypatch.setattr(hosted_module, "bundle_bytes", lambda path: 0)
    monkeypatch.setattr(hosted_module, "resident_bytes", lambda pid: 100)


@pytest.mark.usefixtures("hundred")
def test_the_least_recently_used_model_makes_room(scene: Scene) -> None:
    for name in "abcd":
        scene.model(name)

    async def scenario() -> None:
        async with scene.pool(memory_bytes=250, kv_bytes=100) as pool:

            def loaded() -> str:
                return "".join(model.name for model in pool.models() if model.state == "idle")

            for name in "ab":
                scene.clock.now += 1
                await pool.load(name)
            scene.clock.now += 1
            await pool.load("a")  # used again
            await pool.load("c")
            assert loaded() == "ac"
            assert kinds(pool) == ["load", "load", "evict", "load"]
            await pool.load("a", pin=True)
            scene.clock.now += 1
            await pool.load("d")
            assert loaded() == "ad"  # the pinned one stays, though it was used before
            assert (pool.status().memory_bytes, pool.status().memory_limit_bytes) == (200, 250)
            await pool.load("d", pin=True)
            with pytest.raises(WorkerError, match=r"b: may need 100 .* hold 250 together .* pinned models hold 200"):
                await pool.load("b")
            await pool.unload("a")  # pinned ones too, when somebody says so
            await pool.load("b")
            assert loaded() == "bd"

    run(scenario())


@pytest.mark.usefixtures("hundred")
def test_what_never_fits_is_refused_with_its_bytes(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool(memory_bytes=99, kv_bytes=100) as pool:
            with pytest.raises(WorkerError, match=r"may need 100 bytes .* may hold 99 together"):
                await collect(pool, ask("tale"))

    run(scenario())


@pytest.mark.usefixtures("hundred")
def test_a_busy_model_hands_its_memory_over(scene: Scene) -> None:
    scene.model("m", delay_s=0.001)
    scene.model("other")

    async def scenario() -> None:
        async with scene.pool(memory_bytes=150, kv_bytes=100) as pool:
            first = pool.generate(ask("first", 10**6))
            await anext(first)
            other = asyncio.create_task(pool.load("other"))
            await until(lambda: pool.models()[1].state == "loading")
            scene.later(pool, AT_ONCE.handover_s)
            second = asyncio.create_task(collect(pool, ask("second", 1)))
            await until(lambda: pool.models()[0].waiting == 1)
            await anext(first)
            assert pool.models()[0].running == 1  # there are places, but it takes no more
            await first.aclose()
            assert (await other).state == "idle"
            assert joined(await second) == text("second", 1)  # in its turn
            assert kinds(pool) == ["load", "evict", "load", "evict", "load"]

    run(scenario())


def test_unloading_waits_for_those_that_run(scene: Scene) -> None:
    scene.model(delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool() as pool:
            got = asyncio.create_task(collect(pool, ask("long", 50)))
            await until(lambda: pool.models()[0].running == 1)
            status = await pool.unload("m")
            assert status.state == "unloaded"
            assert joined(await got) == text("long", 50)
            assert (await pool.unload("m")).state == "unloaded"

    run(scenario())


# --- the service


def test_health_of_what_should_be_loaded(scene: Scene) -> None:
    path = scene.model("p", faults=[["load", "refuse"]])

    async def scenario() -> None:
        async with scene.pool(models={"p": ModelSettings(path, "p", preload=True)}) as pool:
            assert (await pool.health()).detail == "p is not loaded yet"
            with pytest.raises(BundleError):
                await pool.load("p")
            assert (await pool.health()).detail == "p is failed"
            await pool.load("p")
            assert (await pool.health()).ready
            await pool.unload("p")  # somebody wanted that
            assert (await pool.health()).ready

    run(scenario())


def test_health_of_a_service_without_models(scene: Scene) -> None:
    async def scenario() -> None:
        async with scene.pool() as pool:
            assert (await pool.health()).ready

    run(scenario())


def test_closing_lets_requests_finish(scene: Scene) -> None:
    scene.model(delay_s=0.001, faults=[[20, "kill"]])

    async def scenario() -> None:
        async with scene.pool(max_sequences=1) as pool:
            listener = pool.events()
            tasks = [asyncio.create_task(collect(pool, ask(f"t{n}", 20))) for n in range(3)]
            await until(lambda: (pool.models()[0].running, pool.models()[0].waiting) == (1, 2))
            closing = asyncio.create_task(pool.close(30))
            await asyncio.sleep(0)
            for refused in (collect(pool, ask("late")), pool.load("m"), pool.embed("m", ["a"])):
                with pytest.raises(WorkerError, match="stopping"):
                    await refused
            assert not (await pool.health()).ready
            assert [joined(deltas) for deltas in await asyncio.gather(*tasks)] == [text(f"t{n}", 20) for n in range(3)]
            await closing
            assert [event.kind async for event in listener][-1] == "unload"

    run(scenario())


def test_closing_does_not_wait_for_ever(scene: Scene) -> None:
    scene.model(delay_s=0.001)

    async def scenario() -> None:
        async with scene.pool(max_sequences=1) as pool:
            running = pool.generate(ask("endless", 10**6))
            await anext(running)
            waiting = asyncio.create_task(collect(pool, ask("waiting")))
            await until(lambda: pool.models()[0].waiting == 1)
            await pool.close(0.0)
            with pytest.raises(WorkerError, match="stopping"):
                [delta async for delta in running]
            with pytest.raises(WorkerError, match="stopping"):
                await waiting

    run(scenario())
    assert "cancel" in scene.log()  # or a worker would finish it first


class Script(Policy):
    """Decides what the test says, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.decision = Decision("performance", {}, 1.0, True, "")
        self.told: list[tuple[dict[str, Loaded], float | None]] = []
        self.joules = 0.0

    def spend(self, joules: float, now_s: float) -> None:
        self.joules += joules

    def decide(self, machine: MachineState, models: Any, now_s: float, *, watts: float | None = None) -> Decision:
        self.told.append((dict(models), watts))
        return self.decision


def test_the_power_policy_steers_workers_and_holds_background_work_back(scene: Scene) -> None:
    scene.model(plans=["saver", "bad"], watts=12.5, joules=0.25)
    policy = Script()

    async def scenario() -> None:
        async with scene.pool(policy=policy, max_sequences=2) as pool:

            async def looked() -> None:
                seen = len(policy.told)
                scene.later(pool, 5)
                await until(lambda: len(policy.told) > seen)
                await pool.embed("m", ["by now it has read its commands"])

            await collect(pool, ask("tale"))
            assert policy.joules == 0.25 * LENGTH
            await looked()
            policy.decision = Decision("saver", {"m": "saver"}, 0.5, False, "the battery is low")
            await looked()
            models, watts = policy.told[-1]
            assert ([offer.name for offer in models["m"].offers], watts) == (["CPU", "saver", "bad"], 12.5)
            assert pool.models()[0].plan == "saver"
            assert pool.models()[0].watts == 12.5
            held = asyncio.create_task(collect(pool, ask("held", priority="background")))
            await until(lambda: pool.models()[0].waiting == 1)
            assert joined(await collect(pool, ask("now"))) == text("now", LENGTH)
            assert not held.done()
            policy.decision = Decision("balanced", {"m": "bad"}, 1.0, True, "mains")
            await looked()
            await held
            await looked()
            assert [offer.name for offer in policy.told[-1][0]["m"].offers] == ["CPU", "saver"]
            assert kinds(pool) == ["load", "power", "plan", "power", "plan"]

    run(scenario())
    steered = [line for line in scene.log() if line.startswith(("plan", "pace"))]
    assert steered == ["pace 0.5", "plan saver", "pace 1.0", "plan bad"]


def test_background_work_that_runs_is_taken_back_when_there_is_no_power_for_it(scene: Scene) -> None:
    scene.model(delay_s=0.001)
    policy = Script()

    async def scenario() -> None:
        async with scene.pool(policy=policy) as pool:
            work = asyncio.create_task(collect(pool, ask("work", 200, priority="background")))
            await until(lambda: pool.models()[0].running == 1)
            await until(lambda: pool.models()[0].tokens_per_second is not None)
            policy.decision = Decision("saver", {}, 1.0, False, "the hour's joules are spent")
            scene.later(pool, 5)
            await until(lambda: (pool.models()[0].running, pool.models()[0].waiting) == (0, 1))
            policy.decision = Decision("saver", {}, 1.0, True, "")
            scene.later(pool, 5)
            assert joined(await work) == text("work", 200)

    run(scenario())


def test_a_service_without_workers_sets_no_timer(scene: Scene) -> None:
    scene.model()

    async def scenario() -> None:
        async with scene.pool(drop_after_s=None) as pool:
            await pool.load("m")
            await until(lambda: pool._timer is not None)
            await pool.unload("m")
            await until(lambda: pool._timer is None and pool._looking is None)

    run(scenario())


def test_the_server_stays_small() -> None:
    code = (
        "import asyncio, sys; from edgert.service.pool.pool import Pool;"
        "print(*sorted({'numpy', 'openvino', 'tokenizers', 'psutil', 'rich', 'jinja2'} & set(sys.modules)))"
    )

    async def scenario() -> None:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        out, _ = await child.communicate()
        assert (child.returncode, out.strip()) == (0, b"")

    run(scenario())

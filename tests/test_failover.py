"""A device fails at any token, in any way: the text goes on elsewhere and is the same, and everyone is told."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import edgert
from edgert import guard
from edgert.backends.base import Array, Runner, Tensor
from edgert.backends.simulated import Fault, SimulatedBackend, SimulatedRunner
from edgert.device import DeviceConfig
from edgert.engine import Engine
from edgert.errors import DeviceFailedError, DeviceHungError, DeviceNonsenseError
from edgert.executor import Executor, SequenceRun
from edgert.guard import FIRST_CALL_FACTOR, GuardedRunner, guarded
from edgert.results import Event, Result
from edgert.session import Model
from edgert.shapes import StaticShapes

CHUNK, PROMPT_CALLS = 16, 3  # the prompt is three chunks, so the fourth call of a runner is the first decoded token
PROMPT_TOKENS = 40
NEW_TOKENS = 8
TIMEOUT_S = 1.0
SHAPES = StaticShapes((CHUNK,), (64, 128))

WHOLE = "*=SIM@f32"
ATTENTION = "*=CPU@f32,attention=SIM@f32"
FFN = "*=CPU@f32,ffn=SIM@f32"
STATIC = "*=SIM@f32+static"
PREFILL = "prefill:*=SIM@f32,decode:*=CPU@f32"
DECODE = "prefill:*=CPU@f32,decode:*=SIM@f32"
STATIC_DECODE = "prefill:*=CPU@f32,decode:*=SIM@f32+static"

MOVED, AGAIN = "keys and values were moved", "the tokens are prefilled again"

Break = Callable[..., SimulatedBackend]


@pytest.fixture(scope="module")
def backend() -> Iterator[SimulatedBackend]:
    """Stands for all simulated devices in this file."""
    backend, load = SimulatedBackend(), edgert.backends._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgert.backends._load", lambda module: backend if module == "simulated" else load(module))
        yield backend


@pytest.fixture
def breaking(backend: SimulatedBackend) -> Iterator[Break]:
    """Gives the simulated devices a fault; at the end they are well again, and what hangs is let go of."""

    def set_fault(fault: Fault | None) -> None:
        backend._fault = fault
        for device in backend._devices.values():
            device._fault = fault

    def make(after_calls: int, kind: Literal["error", "hang", "nan"] = "error") -> SimulatedBackend:
        set_fault(Fault(after_calls, kind))
        return backend

    backend.released.clear()
    yield make
    backend.released.set()
    set_fault(None)


@pytest.fixture(scope="module")
def prompt(demo: Model) -> list[int]:
    return demo.tokenizer.encode("It was a dark night, and the old man " * 8)[:PROMPT_TOKENS]


@pytest.fixture(scope="module")
def expected(demo: Model, prompt: list[int]) -> Result:
    """Without any fault, on the reference."""
    return demo.generate(prompt, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def loaded(demo_path: Path, backend: SimulatedBackend) -> Callable[..., Model]:
    """Models by placement. Those without options of their own are compiled once, and begin each time as they were."""
    made: dict[str, tuple[Model, Executor]] = {}

    def make(place: str, **options: Any) -> Model:
        if options or place not in made:
            settings: dict[str, Any] = {
                "prefill_chunk": CHUNK, "fallback": "CPU@f32", "static_shapes": SHAPES, "device_timeout_s": TIMEOUT_S,
            }  # fmt: skip
            model = edgert.load(demo_path, place=place, **{**settings, **options})
            if options:
                return model
            made[place] = model, model._engine.executor
        model, executor = made[place]
        model._engine.replace(executor)
        return model

    return make


def check(model: Model, found: Result, expected: Result, log: pytest.LogCaptureFixture) -> Event:
    """The same text, one event, in the result, the log and the plan; gives the event."""
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    (event,) = found.events
    assert event.kind == "failover"
    assert event.unit.startswith("SIM@f32")
    assert event.unit not in {config.unit for config in model.plan.configs}
    assert f"{event.unit} failed" in model.plan.explain()
    assert [record.getMessage() for record in log.records if record.levelno == logging.WARNING] == [
        f"failover at token {event.tokens}: {event.detail}"
    ]
    return event


@pytest.mark.parametrize(
    ("place", "after_calls", "tokens", "done"),
    [
        (WHOLE, 0, 0, AGAIN),
        (WHOLE, 1, 16, AGAIN),
        (WHOLE, 2, 32, AGAIN),
        (WHOLE, 3, 40, AGAIN),
        (WHOLE, 4, 41, AGAIN),
        (WHOLE, 9, 46, AGAIN),
        # How much of a pipelined prompt had come through, when a device in the middle failed, is a matter of time.
        (ATTENTION, 0, 0, AGAIN),
        (ATTENTION, 1, None, AGAIN),
        (ATTENTION, 2, None, AGAIN),
        (ATTENTION, 3, 40, AGAIN),
        (ATTENTION, 6, 43, AGAIN),
        # Keys and values are on a device that still lives.
        (FFN, 0, 0, AGAIN),
        (FFN, 2, None, None),
        (FFN, 3, 40, MOVED),
        (FFN, 7, 44, MOVED),
        # They are on the host.
        (STATIC, 0, 0, AGAIN),
        (STATIC, 1, 16, MOVED),
        (STATIC, 2, 32, MOVED),
        (STATIC, 3, 40, MOVED),
        (STATIC, 6, 43, MOVED),
        # Only in one phase. At 3 the device does not give its cache to the one that decodes.
        (PREFILL, 0, 0, AGAIN),
        (PREFILL, 1, 16, AGAIN),
        (PREFILL, 3, 40, AGAIN),
        # At 0 the device does not take the cache of the one that prefilled, which still has it.
        (DECODE, 0, 40, MOVED),
        (DECODE, 1, 41, AGAIN),
        (DECODE, 5, 45, AGAIN),
        (STATIC_DECODE, 0, 40, MOVED),
        (STATIC_DECODE, 3, 43, MOVED),
    ],
)
def test_errors(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result,
    caplog: pytest.LogCaptureFixture, place: str, after_calls: int, tokens: int | None, done: str | None,
) -> None:  # fmt: skip
    breaking(after_calls)
    model = loaded(place)
    event = check(model, model.generate(prompt, max_tokens=NEW_TOKENS), expected, caplog)
    assert event.tokens == tokens or (tokens is None and event.tokens in range(0, CHUNK * after_calls + 1, CHUNK))
    done = done or (MOVED if event.tokens else AGAIN)
    assert event.detail.endswith(f"simulated device lost; CPU@f32 goes on, {done}")


@pytest.mark.parametrize(
    ("place", "after_calls", "tokens"),
    [(WHOLE, 0, 0), (WHOLE, 1, 16), (WHOLE, 3, 40), (WHOLE, 8, 45), (ATTENTION, 1, None), (ATTENTION, 5, 42),
     (FFN, 4, 41), (STATIC, 0, 0), (STATIC, 1, 16), (STATIC, 4, 41), (PREFILL, 1, 16), (DECODE, 0, 40), (DECODE, 3, 43),
     (STATIC_DECODE, 2, 42)],
)  # fmt: skip
def test_nan(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result,
    caplog: pytest.LogCaptureFixture, place: str, after_calls: int, tokens: int | None,
) -> None:  # fmt: skip
    """Nothing that such a device computed before is believed, wherever it lies now."""
    breaking(after_calls, "nan")
    model = loaded(place)
    event = check(model, model.generate(prompt, max_tokens=NEW_TOKENS), expected, caplog)
    assert event.tokens == tokens or (tokens is None and event.tokens in range(0, CHUNK * after_calls + 1, CHUNK))
    assert "NaN in its output" in event.detail
    assert event.detail.endswith(AGAIN)


@pytest.mark.parametrize(
    ("place", "after_calls", "tokens", "done"),
    [
        (WHOLE, 0, 0, AGAIN),
        (ATTENTION, 1, None, AGAIN),
        (FFN, 5, 42, MOVED),
        (STATIC, 2, 32, MOVED),
        (DECODE, 2, 42, AGAIN),
    ],
)
def test_hangs(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    place: str, after_calls: int, tokens: int | None, done: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(guard, "FIRST_CALL_FACTOR", 1)  # no kernels are compiled here
    breaking(after_calls, "hang")
    model = loaded(place)
    event = check(model, model.generate(prompt, max_tokens=NEW_TOKENS), expected, caplog)
    assert event.tokens == tokens or (tokens is None and event.tokens in range(0, CHUNK * after_calls + 1, CHUNK))
    assert f"no answer within {TIMEOUT_S:g} s" in event.detail
    assert event.detail.endswith(done)


def test_a_hung_device_that_awakes_changes_nothing(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result
) -> None:
    backend = breaking(5, "hang")
    model = loaded(STATIC)
    pieces = model.stream(prompt, max_tokens=NEW_TOKENS)
    seen = []
    for piece in pieces:
        seen.append(piece.token)
        if piece.events:
            backend.released.set()
    assert tuple(seen) == expected.tokens


@pytest.mark.parametrize("place", [WHOLE, ATTENTION, DECODE])
def test_nothing_takes_over(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result, place: str
) -> None:
    breaking(0)
    with pytest.raises(DeviceFailedError, match="SIM@f32 failed: simulated device lost") as caught:
        loaded(place, fallback=None).generate(prompt, max_tokens=NEW_TOKENS)
    assert caught.value.unit == "SIM@f32"


@pytest.mark.parametrize("fallback", ["SIM@f32", "ORT@CPU"])
def test_what_cannot_take_over(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], fallback: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The same hardware, or one that runs other models: the failure is what is told."""
    breaking(4)
    model = loaded(WHOLE, fallback=fallback)
    with pytest.raises(DeviceFailedError, match="SIM@f32 failed: simulated device lost"):
        model.generate(prompt, max_tokens=NEW_TOKENS)
    assert not caplog.records
    assert len(model.generate(prompt, max_tokens=2).tokens) == 2  # a fresh sequence has its calls before it


def test_later_generations_leave_the_dead_device_alone(
    breaking: Break, loaded: Callable[..., Model], demo: Model, prompt: list[int], expected: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    breaking(4)
    model = loaded(ATTENTION)
    assert "SIM@f32" in model.plan.explain()
    assert len(model.generate(prompt, max_tokens=NEW_TOKENS).events) == 1
    calls: list[Runner] = []
    monkeypatch.setattr(SimulatedRunner, "infer", lambda self, inputs: calls.append(self))
    again = model.generate(prompt, max_tokens=NEW_TOKENS)
    assert (again.tokens, again.events, calls) == (expected.tokens, (), [])
    assert again.timings.reused_tokens == PROMPT_TOKENS - 1  # the sequence that failed over was kept
    assert again.timings.provenance == "measured"
    other = model.generate(prompt[:20], max_tokens=4)
    assert other.tokens == demo.generate(prompt[:20], max_tokens=4).tokens
    assert not calls
    assert "warning: SIM@f32 failed: simulated device lost" in model.plan.explain()


def test_idle_sequences_of_the_dead_device_are_dropped(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int]
) -> None:
    """Those that were idle when it failed, and those that were in use and have not met the failure."""
    breaking(9)
    model = loaded(WHOLE)
    model.generate(prompt[20:30], max_tokens=2)
    in_use = model.stream(prompt[10:30], max_tokens=2)
    next(in_use)
    assert model.generate(prompt, max_tokens=NEW_TOKENS).events
    assert len(list(in_use)) == 1
    (idle,) = model._engine._idle
    assert idle.executor is model._engine.executor


def test_a_failure_while_a_prefix_is_looked_at(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result
) -> None:
    """A device that does not give its cache away when it is to be cut back: the prompt runs on a fresh sequence."""
    breaking(PROMPT_CALLS + NEW_TOKENS - 1)
    model = loaded(WHOLE)
    assert model.generate(prompt, max_tokens=NEW_TOKENS).events == ()
    again = model.generate(prompt, max_tokens=NEW_TOKENS)
    assert (again.tokens, again.timings.reused_tokens) == (expected.tokens, 0)


def test_two_threads_compile_one_fallback(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(5)
    both = threading.Barrier(2, timeout=20)
    compiled = []
    fail_over, execute = Engine._fail_over, Engine._execute

    def together(self: Engine, run: SequenceRun, error: DeviceFailedError, clock: Any) -> SequenceRun:
        both.wait()  # the one has not replaced the device before the other has failed on it
        return fail_over(self, run, error, clock)

    def counted(self: Engine, plan: Any) -> Any:
        compiled.append(plan)
        return execute(self, plan)

    monkeypatch.setattr(Engine, "_fail_over", together)
    monkeypatch.setattr(Engine, "_execute", counted)
    model = loaded(WHOLE, prefill_chunk=CHUNK)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: model.generate(prompt, max_tokens=NEW_TOKENS), range(2)))
    assert [result.tokens for result in found] == [expected.tokens] * 2
    assert [len(result.events) for result in found] == [1, 1]
    assert len(compiled) == 2  # what was asked for, and its replacement
    assert len(model.plan.warnings) == 1


def test_two_devices_fail_one_after_the_other(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result
) -> None:
    breaking(3)
    model = loaded("*=SIM@f32,attention=SIM@f32+static")
    found = model.generate(prompt, max_tokens=NEW_TOKENS)
    assert found.tokens == expected.tokens
    assert [(event.unit, event.tokens) for event in found.events] == [("SIM@f32", 40), ("SIM@f32+static", 43)]
    assert [str(config) for config in model.plan.configs] == ["CPU@f32"]


@pytest.mark.parametrize(("after_calls", "piece"), [(0, 0), (2, 0), (3, 1), (4, 2), (9, 7)])
def test_a_stream_tells_it_with_the_token_it_delayed(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result, after_calls: int, piece: int
) -> None:
    breaking(after_calls)
    pieces = list(loaded(WHOLE).stream(prompt, max_tokens=NEW_TOKENS))
    assert tuple(p.token for p in pieces) == expected.tokens
    assert [number for number, p in enumerate(pieces) if p.events] == [piece]


def test_a_chat_goes_on_from_its_cache(breaking: Break, loaded: Callable[..., Model], demo: Model) -> None:
    breaking(6)
    model = loaded(STATIC)
    messages = [{"role": "user", "content": "Good evening, sir. Where have you been?"}]
    answer = model.chat(messages, max_tokens=12)
    assert len(answer.events) == 1
    assert answer.tokens == demo.chat(messages, max_tokens=12).tokens
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
    second = model.chat(messages, max_tokens=4)
    assert second.timings.reused_tokens >= 8
    assert (second.tokens, second.events) == (demo.chat(messages, max_tokens=4).tokens, ())


def test_sampled_text_goes_on_too(
    breaking: Break, loaded: Callable[..., Model], demo: Model, prompt: list[int]
) -> None:
    """The sampler's state outlives the device."""
    breaking(6)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": NEW_TOKENS}
    found = loaded(WHOLE).generate(prompt, **options)
    assert (len(found.events), found.tokens) == (1, demo.generate(prompt, **options).tokens)


def test_an_exported_cache_survives_too(
    breaking: Break, loaded: Callable[..., Model], demo: Model, prompt: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    breaking(1)
    cache = loaded(WHOLE).export_cache(prompt)
    assert len(caplog.records) == 1
    for name, rows in demo.export_cache(prompt).states.items():
        np.testing.assert_allclose(cache.states[name], rows, rtol=1e-3, atol=1e-3)


def test_a_cancelled_generation_tells_it_too(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device fails, and before the prompt has run again elsewhere the generation is cancelled."""
    breaking(1)
    cancel = threading.Event()
    fail_over = Engine._fail_over

    def cancelling(self: Engine, run: SequenceRun, error: DeviceFailedError, clock: Any) -> SequenceRun:
        cancel.set()
        return fail_over(self, run, error, clock)

    monkeypatch.setattr(Engine, "_fail_over", cancelling)
    found = loaded(WHOLE).generate(prompt, max_tokens=NEW_TOKENS, cancel=cancel)
    assert (found.finish_reason, found.tokens, len(found.events)) == ("cancelled", (), 1)


def test_recurrent_states_are_not_moved(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks before the one that failed have taken in the tokens of the call: their states cannot go back."""
    breaking(4)
    model = loaded(STATIC)
    monkeypatch.setattr(model._engine.executor, "recurrent", True)
    found = model.generate(prompt, max_tokens=NEW_TOKENS)
    assert found.tokens == expected.tokens
    assert found.events[0].detail.endswith(AGAIN)


def test_what_does_not_take_the_cache_computes_it_again(
    breaking: Break, loaded: Callable[..., Model], prompt: list[int], expected: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(4)
    model = loaded(STATIC)

    def refuse(self: SequenceRun, tokens: object, states: object) -> None:
        raise DeviceFailedError("no room")

    monkeypatch.setattr(SequenceRun, "write_states", refuse)
    found = model.generate(prompt, max_tokens=NEW_TOKENS)
    assert found.tokens == expected.tokens
    assert found.events[0].detail.endswith(AGAIN)


# The guard, without a model.

CONFIG = DeviceConfig("SIM", "f32")


class Fake:
    """A runner that does what it is told."""

    def __init__(self, *outputs: float) -> None:
        self.outputs = list(outputs)
        self.hang = threading.Event()
        self.hang.set()

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.hang.wait()
        return {"whole": np.ones(3, np.int64), "hidden": np.array([[1.0, *self.outputs]], inputs["type"].dtype)}

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        self.hang.wait()
        return {"state": np.zeros(1)}

    def write_states(self, states: Mapping[str, Array]) -> None:
        raise ValueError("not these")

    def reset(self) -> None:
        self.hang.wait()


F32 = {"type": np.zeros(1, np.float32)}


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.hang.set()


def test_the_first_call_has_more_time(fake: Fake) -> None:
    runner = GuardedRunner(fake, CONFIG, 0.01)
    fake.hang.clear()
    with pytest.raises(DeviceHungError, match=f"SIM@f32 failed: no answer within {0.01 * FIRST_CALL_FACTOR:g} s"):
        runner.infer(F32)
    fake.hang.set()
    later = GuardedRunner(fake, CONFIG, 0.01)
    later.infer(F32)
    fake.hang.clear()
    with pytest.raises(DeviceHungError, match=r"no answer within 0\.01 s"):
        later.infer(F32)


def test_what_hung_is_not_asked_again(fake: Fake) -> None:
    """Its answer, if it ever comes, belongs to a question that nobody waits for."""
    runner = GuardedRunner(fake, CONFIG, 0.01)
    fake.hang.clear()
    with pytest.raises(DeviceHungError):
        runner.read_states()
    fake.hang.set()
    for ask in (runner.reset, runner.read_states, lambda: runner.infer(F32), lambda: runner.write_states({})):
        with pytest.raises(DeviceHungError):
            ask()


def test_errors_of_the_runner_come_out(fake: Fake) -> None:
    runner = GuardedRunner(fake, CONFIG, 5)
    with pytest.raises(ValueError, match="not these"):
        runner.write_states({})
    assert list(runner.read_states()) == ["state"]  # and it goes on


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_is_nonsense_and_infinity_is_not(dtype: type) -> None:
    """Scores are infinite where a vocabulary is padded, and opposite infinities add up to NaN."""
    inputs = {"type": np.zeros(1, dtype)}
    runner = GuardedRunner(Fake(np.inf, -np.inf), CONFIG, 5)
    assert np.isinf(runner.infer(inputs)["hidden"]).sum() == 2
    with pytest.raises(DeviceNonsenseError, match="NaN in its output 'hidden'"):
        GuardedRunner(Fake(np.nan), CONFIG, 5).infer(inputs)


def test_a_guard_ends_with_its_runner() -> None:
    name = str(DeviceConfig("SIM", "guarded"))
    runner = GuardedRunner(Fake(), DeviceConfig("SIM", "guarded"), 5)
    runner.infer(F32)
    (thread,) = (t for t in threading.enumerate() if t.name == name)
    del runner
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_only_drivers_are_guarded() -> None:
    fake = Fake()
    for name in ("CPU@f32", "CPU@f32+dq", "ORT@CPU"):
        assert guarded(fake, DeviceConfig.parse(name), 5) is fake
    for name in ("GPU@f16", "NPU@f16", "SIM@f32"):
        assert isinstance(guarded(fake, DeviceConfig.parse(name), 5), GuardedRunner)

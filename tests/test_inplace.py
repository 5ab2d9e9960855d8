"""Caches that the host owns: they grow, change hands, and are cut back; on a device that is nothing but numpy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest

from edgert.backends.base import Array, Tensor
from edgert.device import DeviceConfig
from edgert.errors import DeviceFailedError
from edgert.graph import BOUNDARY
from edgert.inplace import KernelCompiled, KernelRunner
from edgert.kernel_lowering import LoweredCache
from edgert.kvlayout import BLOCK_TOKENS, KvLayout, blocks_of

HEADS, KEY, VALUE, LAYERS = 2, 8, 4, 3
LAYOUT = KvLayout("f16", HEADS, KEY, VALUE)
CACHES = tuple(LoweredCache(f"k{n}", f"v{n}", LAYOUT) for n in range(LAYERS))
NAMES = {name for n in range(LAYERS) for name in (f"k{n}", f"v{n}")}
CONFIG = DeviceConfig("CPU", "kernels+f16")
CONTEXT = 1000


class Device:
    """Appends rows to the caches as the kernels do, in place. `hidden` is a token's number; its rows follow from it."""

    def __init__(self, compiled: Below) -> None:
        self._compiled = compiled
        self.bound: dict[str, Array] = {}
        self.bindings = 0
        self.own: dict[str, Array] = dict(compiled.own)

    def bind(self, name: str, array: Array) -> None:
        assert array.flags.c_contiguous
        self.bound[name] = array
        self.bindings += 1

    def infer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(inputs) == {BOUNDARY}  # what is bound is nobody else's
        past, tokens = int(self.bound["past"][0]), inputs[BOUNDARY].shape[1]
        for number in range(LAYERS):
            cache = self.bound[f"cache.{number}"]
            assert cache.shape[0] * BLOCK_TOKENS >= past + tokens
            every = np.concatenate([LAYOUT.read_keys(cache, past), rows_of(inputs[BOUNDARY][0], number, KEY)], axis=2)
            LAYOUT.write_keys(cache, every)
            every = np.concatenate([LAYOUT.read_values(cache, past), rows_of(inputs[BOUNDARY][0], number, VALUE)], 2)
            LAYOUT.write_values(cache, every)
        if self._compiled.broken:
            raise DeviceFailedError("broken")
        return {BOUNDARY: inputs[BOUNDARY]}

    def read_states(self, names: Collection[str] | None = None) -> dict[str, Array]:
        return {name: rows for name, rows in self.own.items() if names is None or name in names}

    def write_states(self, states: Mapping[str, Array]) -> None:
        self.own.update({name: rows for name, rows in states.items() if name in self.own})

    def rewind(self, tokens: int) -> bool:
        return not self.own

    def reset(self) -> None:
        self.own = dict(self._compiled.own)


class Below:
    """A submodel compiled for that device."""

    inputs = frozenset({BOUNDARY, "past", *(f"cache.{n}" for n in range(LAYERS))})

    def __init__(self) -> None:
        self.own: dict[str, Array] = {}
        self.broken = False
        self.device: Device | None = None

    def runner(self) -> Device:
        self.device = Device(self)
        return self.device


def rows_of(tokens: Array, layer: int, width: int) -> Array:
    """What a layer makes of tokens, f32 `[1, heads, tokens, width]`; small whole numbers, so that f16 holds them."""
    dims = np.arange(HEADS * width).reshape(HEADS, 1, width)
    return ((tokens[None, :, None] + dims * (layer + 1)) % 509)[None].astype(np.float32)


def expected(count: int) -> dict[str, Array]:
    tokens = np.arange(count)
    keys = {f"k{n}": rows_of(tokens, n, KEY) for n in range(LAYERS)}
    return keys | {f"v{n}": rows_of(tokens, n, VALUE) for n in range(LAYERS)}


def same(found: Mapping[str, Array], count: int) -> None:
    assert found.keys() == NAMES
    for name, rows in expected(count).items():
        np.testing.assert_array_equal(found[name], rows)


def run(runner: KernelRunner, count: int) -> None:
    """The next tokens of the sequence 0, 1, 2 …"""
    tokens = np.arange(runner.past, runner.past + count)[None]
    assert runner.infer({BOUNDARY: tokens})[BOUNDARY] is tokens


@pytest.fixture
def below() -> Below:
    return Below()


@pytest.fixture
def runner(below: Below) -> KernelRunner:
    return KernelCompiled(below, CACHES, CONTEXT, CONFIG).runner()


def room(below: Below) -> int:
    assert below.device is not None
    return len(below.device.bound["cache.0"]) * BLOCK_TOKENS


def test_a_submodel_does_not_show_what_it_owns(below: Below) -> None:
    assert KernelCompiled(below, CACHES, CONTEXT, CONFIG).inputs == {BOUNDARY}


def test_rows_stay_whatever_the_calls_were(runner: KernelRunner) -> None:
    same(runner.read_states(), 0)
    for count in (5, 1, 10, 1, 30, 1, 1):
        run(runner, count)
    same(runner.read_states(), 49)
    assert runner.read_states(["k1", "nobody's"]).keys() == {"k1"}


def test_room_doubles_up_to_the_context(below: Below, runner: KernelRunner) -> None:
    assert below.device is not None
    seen, bindings = [], []
    while runner.past < CONTEXT:
        run(runner, 10)
        seen.append(room(below))
        bindings.append(below.device.bindings)
    assert list(dict.fromkeys(seen)) == [256, 512, blocks_of(CONTEXT) * BLOCK_TOKENS]
    assert bindings[-1] == 1 + 3 * LAYERS  # the number of past tokens once, and the caches each time they grew
    same(runner.read_states(), CONTEXT)


def test_a_long_prompt_gets_what_it_needs_at_once(below: Below, runner: KernelRunner) -> None:
    run(runner, 777)
    assert room(below) == blocks_of(777) * BLOCK_TOKENS
    same(runner.read_states(), 777)


def test_rewinding_touches_no_row(below: Below, runner: KernelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runner, 300)
    with monkeypatch.context() as patch:
        for name in ("read_keys", "write_keys", "read_values", "write_values", "empty"):
            patch.setattr(KvLayout, name, None)
        assert runner.rewind(17)
    same(runner.read_states(), 17)
    run(runner, 40)
    same(runner.read_states(), 57)
    assert runner.rewind(60)  # more than there are
    same(runner.read_states(), 57)
    runner.reset()
    same(runner.read_states(), 0)
    run(runner, 3)
    same(runner.read_states(), 3)


def test_rows_are_taken_over_at_once_or_state_by_state(below: Below, runner: KernelRunner) -> None:
    run(runner, 9)
    given = expected(400)
    runner.write_states({**given, "nobody's": np.zeros((1, 1, 5, 1), np.float32)})
    same(runner.read_states(), 400)
    other = KernelCompiled(below, CACHES, CONTEXT, CONFIG).runner()
    run(other, 30)
    for name, rows in given.items():
        other.write_states({name: rows})
    same(other.read_states(), 400)
    run(other, 20)
    same(other.read_states(), 420)
    other.write_states({})
    same(other.read_states(), 420)


def test_rows_that_do_not_belong_together_are_refused(runner: KernelRunner) -> None:
    given = expected(20)
    with pytest.raises(ValueError, match=r"keys and values are of \[5, 20\] tokens"):
        runner.write_states({**given, "v1": given["v1"][:, :, :5]})
    with pytest.raises(ValueError, match=r"keys are \[1, 2, 20, 4\], expected \[1, 2, tokens, 8\]"):
        runner.write_states({"k0": given["v0"]})


def test_a_call_that_fails_changes_nothing(below: Below, runner: KernelRunner) -> None:
    run(runner, 20)
    below.broken = True
    with pytest.raises(DeviceFailedError):
        run(runner, 300)
    below.broken = False
    same(runner.read_states(), 20)
    run(runner, 5)
    same(runner.read_states(), 25)


def test_states_of_the_device_are_its_own(below: Below) -> None:
    empty = np.zeros((1, 4), np.float32)
    below.own = {"recurrent": empty}
    runner = KernelCompiled(below, CACHES, CONTEXT, CONFIG).runner()
    run(runner, 4)
    assert runner.read_states().keys() == NAMES | {"recurrent"}
    runner.write_states({"recurrent": empty + 1})
    assert runner.past == 4
    np.testing.assert_array_equal(runner.read_states(["recurrent"])["recurrent"], empty + 1)
    assert not runner.rewind(2)  # nobody can forget half of a recurrent state
    assert runner.past == 4
    runner.reset()
    assert not runner.read_states()["recurrent"].any()


def test_no_memory_is_a_failure_that_says_so(runner: KernelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runner, 200)

    def none(self: KvLayout, blocks: int) -> Array:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(KvLayout, "empty", none)
        with pytest.raises(DeviceFailedError, match=r"CPU@kernels\+f16 failed: no memory for .* 300 tokens"):
            run(runner, 100)
    same(runner.read_states(), 200)
    run(runner, 100)
    same(runner.read_states(), 300)


def test_a_submodel_without_attention(below: Below) -> None:
    class Plain(Below):
        inputs = frozenset({"input_ids"})

    class Runs:
        def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return inputs

    runner = KernelCompiled(Plain(), (), CONTEXT, CONFIG).runner()
    runner._runner = Runs()  # type: ignore[assignment]
    for count in (3, 2000):
        runner.infer({"input_ids": np.zeros((1, count))})
    assert runner.past == 0

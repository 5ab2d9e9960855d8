"""Sequences that advance together: what each says does not depend, to the bit, on the others or on how it got there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from edgert.converters.compress import compress
from tiny_models import VOCAB_SIZE, exported

from edgert import native
from edgert.backends.base import Array
from edgert.backends.openvino import BACKEND
from edgert.batch import BatchedLane, BatchedLanes, Lane, Lanes, SerialLanes, open_lanes
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.errors import CacheFullError, ContextOverflowError, DeviceFailedError, UsageError
from edgert.executor import Executor
from edgert.inplace import KernelCompiled
from edgert.kernel_lowering import lower
from edgert.kvlayout import BLOCK_TOKENS, Precision
from edgert.lowering import keep_last_logits
from edgert.partition import annotate
from edgert.placement import Plan

pytestmark = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")

CONFIG = DeviceConfig("CPU", "kernels")
CONTEXT, ROOM = 256, 1 << 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., KernelCompiled]:
    """A tiny model with its weights at INT4, as a bundle's is put together for its device."""
    path = tmp_path_factory.mktemp("tiny") / "model.xml"
    ov.save_model(compress(exported("llama")[1], "int4", group_size=32, sym=False), path, compress_to_fp16=False)

    @cache
    def make(precision: Precision = "i8") -> KernelCompiled:
        model = ov.Core().read_model(path)
        keep_last_logits(model, annotate(model))
        found = lower(model, None, native.factory(), precision=precision, batched=True)
        compiled = BACKEND.compile(found.model, CONFIG)
        return KernelCompiled(compiled, found.caches, CONTEXT, CONFIG, found.arrays)

    return make


@pytest.fixture(scope="module")
def executor(packed_path: Path) -> Executor:
    bundle = Bundle.open(packed_path)
    assert bundle.graph is not None
    return Executor(bundle, Plan.single(bundle.graph, CONFIG))


@pytest.fixture(params=["together", "one after the other"])
def lanes(request: pytest.FixtureRequest, executor: Executor) -> Lanes:
    made = open_lanes(executor, kv_bytes=ROOM)
    assert isinstance(made, BatchedLanes)
    return made if request.param == "together" else SerialLanes(executor, kv_bytes=ROOM)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, VOCAB_SIZE, CONTEXT).tolist() for _ in range(8)]


def batched(compiled: KernelCompiled, kv_bytes: int = ROOM) -> BatchedLanes:
    return BatchedLanes(compiled, CONFIG, context=CONTEXT, kv_bytes=kv_bytes)


def token_by_token(lanes: Lanes, tokens: Sequence[int]) -> list[Array]:
    """The logits after each token, alone."""
    lane = lanes.open()
    found = [lanes.step([(lane, [token])])[0].copy() for token in tokens]
    lane.close()
    return found


def chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (tokens[i : i + size] for i in range(0, len(tokens), size))


# What a sequence says is its own.


@pytest.mark.parametrize("precision", ["i8", "bf16", "f16"])
def test_nothing_depends_on_steps_or_on_others(
    tiny: Callable[..., KernelCompiled], texts: list[list[int]], precision: str
) -> None:
    made, total = batched(tiny(precision)), 60
    expected = [token_by_token(made, text[:total]) for text in texts]
    for size in (total, 7, 16):
        lane = made.open()
        for part in chunks(texts[0][:total], size):
            (found,) = made.step([(lane, part)])
            np.testing.assert_array_equal(found, expected[0][len(lane.tokens) - 1])
        lane.close()
    random = np.random.default_rng(1)
    for count in range(1, 9):
        group = [made.open() for _ in range(count)]
        while any(len(lane.tokens) < total for lane in group):
            work = []
            for number, lane in enumerate(group):
                left = texts[number][len(lane.tokens) : total]
                if left and random.random() < 0.8:
                    work.append((lane, left[: random.choice([1, 1, 1, 2, 13])]))
            for (lane, _), found in zip(work, made.step(work), strict=True):
                np.testing.assert_array_equal(found, expected[group.index(lane)][len(lane.tokens) - 1])
        for lane in group:
            lane.close()


def test_the_demo_model_says_the_same_as_a_sequence_alone(executor: Executor, book: list[int]) -> None:
    """Over the end of a span of attention; the one call that gives all logits is the executor's own."""
    tokens, made = book[:560], open_lanes(executor, kv_bytes=ROOM)
    run = executor.open()
    expected = run.forward(tokens, keep=len(tokens)).copy()
    lane = made.open()
    for part in (tokens[:490], *chunks(tokens[490:530], 1)):
        np.testing.assert_array_equal(made.step([(lane, part)])[0], expected[len(lane.tokens) - 1])
    ours, other = made.open(), made.open()
    for part in chunks(tokens, 64):
        found, _ = made.step([(ours, part), (other, part[:30])])
        np.testing.assert_array_equal(found, expected[len(ours.tokens) - 1])
    assert run.forward(book[560:561]).tobytes() == made.step([(ours, book[560:561])])[0].tobytes()


def test_long_prompts_in_one_step_are_run_apart(tiny: Callable[..., KernelCompiled], texts: list[list[int]]) -> None:
    made = batched(tiny())
    group = [made.open() for _ in range(4)]
    sizes = [90, 150, 1, 70]
    found = made.step([(lane, text[:size]) for lane, text, size in zip(group, texts, sizes, strict=False)])
    for logits, text, size in zip(found, texts, sizes, strict=False):
        lane = made.open()
        np.testing.assert_array_equal(logits, made.step([(lane, text[:size])])[0])


# What every kind of lanes does.


def test_lanes_grow_fork_and_go_back(lanes: Lanes, book: list[int]) -> None:
    expected = token_by_token(lanes, book[:40])
    lane = lanes.open()
    lanes.step([(lane, book[:30])])
    other = lane.fork()
    assert other is not None
    assert list(other.tokens) == book[:30]
    assert other.kv_bytes == lane.kv_bytes > 0
    lanes.step([(other, [7])])
    np.testing.assert_array_equal(lanes.step([(lane, book[30:40])])[0], expected[39])
    assert (lane.rewind(20), other.rewind(100)) == (20, 31)
    assert list(other.tokens) == [*book[:30], 7]
    np.testing.assert_array_equal(lanes.step([(lane, book[20:33]), (other, [7])])[0], expected[32])
    assert lane.rewind(0) == lane.kv_bytes == 0
    np.testing.assert_array_equal(lanes.step([(lane, book[:1])])[0], expected[0])
    assert lanes.infer_us > 0


def test_a_lane_changes_hands(lanes: Lanes, executor: Executor, book: list[int]) -> None:
    for length in (0, 50):
        lane = lanes.open()
        if length:
            lanes.step([(lane, book[:length])])
        states = lane.export()
        assert all(rows.shape[2] == length for rows in states.values())
        for others in (open_lanes(executor, kv_bytes=ROOM), SerialLanes(executor, kv_bytes=ROOM)):
            copy = others.open()
            others.step([(copy, book[100:117])])
            copy.restore(book[:length], states)
            assert list(copy.tokens) == book[:length]
            # Codes are rounded anew from the rows that they stood for.
            (found,), (expected,) = others.step([(copy, [5])]), lanes.step([(lane, [5])])
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
            lane.rewind(length)


def test_a_budget_is_kept_and_what_does_not_fit_is_not_begun(lanes: Lanes, executor: Executor, book: list[int]) -> None:
    budget = 96 * executor.kv_bytes_per_token
    small: Lanes = (open_lanes if lanes.batched else SerialLanes)(executor, kv_bytes=budget)
    assert small.room() == 96
    first, second, third = small.open(), small.open(), small.open()
    expected = small.step([(first, book[:48])])[0].copy()
    small.step([(second, book[:16])])
    assert small.room() == 32
    with pytest.raises(CacheFullError, match=f"budget of {budget} bytes"):
        small.step([(first, [1]), (second, book[:33])])
    assert (len(first.tokens), len(second.tokens)) == (48, 16)
    assert first.fork() is None
    with pytest.raises(CacheFullError):
        third.restore(book[:48], first.export())
    assert small.room() == 32
    second.close()
    assert small.room() == 48
    copy = first.fork()
    assert copy is not None
    first.close()
    first.close()
    assert first.kv_bytes == 0
    copy.rewind(47)
    np.testing.assert_array_equal(small.step([(copy, book[47:48])])[0], expected)
    assert copy.kv_bytes + third.kv_bytes <= budget


def test_work_that_is_none_is_refused(lanes: Lanes, executor: Executor) -> None:
    lane, closed, foreign = lanes.open(), lanes.open(), open_lanes(executor, kv_bytes=ROOM).open()
    closed.close()
    assert lanes.step([]) == []
    for work, message in (
        ([(lane, [])], "0 tokens for a lane, expected 1 to 1024"),
        ([(lane, [1] * 1025)], "1025 tokens for a lane, expected 1 to 1024"),
        ([(lane, [1]), (lane, [2])], "a lane comes twice"),
        ([(lane, [1]), (closed, [2])], "it is closed"),
        ([(lane, [1]), (foreign, [2])], "of other lanes"),
    ):
        with pytest.raises(UsageError, match=message):
            lanes.step(work)
    lanes.step([(lane, [1] * 1000)])
    with pytest.raises(ContextOverflowError, match="1025 tokens are more than the context of 1024"):
        lanes.step([(lane, [1] * 25)])
    assert len(lane.tokens) == 1000
    for use in (closed.fork, closed.export, lambda: closed.rewind(0), lambda: closed.restore([], {})):
        with pytest.raises(UsageError, match="it is closed"):
            use()
    for kind in (open_lanes, SerialLanes):
        with pytest.raises(UsageError, match="a budget of 3 bytes"):
            kind(executor, kv_bytes=3)


# Places in the pool.


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_that_is_nearly_full_loses_nothing(
    tiny: Callable[..., KernelCompiled], texts: list[list[int]], seed: int
) -> None:
    """Lanes come, grow, fork, go back and go; blocks move all the time, and each still says what it says alone."""
    compiled = tiny()
    random, blocks = np.random.default_rng(seed), 14
    expected = [token_by_token(batched(compiled), text[:100]) for text in texts[:3]]
    made = batched(compiled, blocks * compiled.block_bytes)
    live: list[tuple[Lane, int]] = []
    full = 0
    for _ in range(150):
        deed = random.choice(["open", "close", "fork", "rewind", "step", "step", "step", "step"])
        chosen = live[random.integers(len(live))] if live else None
        if deed == "open" and len(live) < 6:
            live.append((made.open(), int(random.integers(len(expected)))))
        elif deed == "close" and chosen:
            chosen[0].close()
            live.remove(chosen)
        elif deed == "fork" and chosen and len(live) < 6:
            copy = chosen[0].fork()
            live += [(copy, chosen[1])] if copy is not None else []
        elif deed == "rewind" and chosen:
            chosen[0].rewind(int(random.integers(len(chosen[0].tokens) + 1)))
        elif deed == "step":
            work = []
            for lane, text in live:
                count = int(random.choice([1, 1, 5, 30]))
                if random.random() < 0.7 and len(lane.tokens) + count <= 100:
                    work.append((lane, text, texts[text][len(lane.tokens) : len(lane.tokens) + count]))
            lengths = [len(lane.tokens) for lane, _ in live]
            try:
                found = made.step([(lane, tokens) for lane, _, tokens in work])
            except CacheFullError:
                full += 1
                assert lengths == [len(lane.tokens) for lane, _ in live]
                continue
            for (lane, text, _), logits in zip(work, found, strict=True):
                np.testing.assert_array_equal(logits, expected[text][len(lane.tokens) - 1])
        assert made.room() + sum(lane.kv_bytes for lane, _ in live) // compiled.kv_bytes_per_token == 16 * blocks
    assert full


def test_the_last_lane_gives_all_memory_back(tiny: Callable[..., KernelCompiled], texts: list[list[int]]) -> None:
    made = batched(tiny())
    bound = made._pool._caches
    assert not bound  # nothing is taken before it is needed
    expected = token_by_token(made, texts[0][:20])
    assert not made._pool._caches
    lane = made.open()
    np.testing.assert_array_equal(made.step([(lane, texts[0][:20])])[0], expected[-1])
    assert [len(array) for array in made._pool._caches] == [ROOM // made.block_bytes] * 2


def test_memory_that_the_system_does_not_give(tiny: Callable[..., KernelCompiled]) -> None:
    made = batched(tiny(), 2**60)
    lane = made.open()
    with pytest.raises(CacheFullError, match="the system does not give"):
        made.step([(lane, [1])])
    assert (lane.tokens, lane.kv_bytes) == ([], 0)


def test_a_failure_names_the_hardware_and_leaves_lanes_as_they_were(
    tiny: Callable[..., KernelCompiled], texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = batched(tiny())
    (expected,) = token_by_token(made, texts[0][:20])[-1:]
    lane = made.open()
    made.step([(lane, texts[0][:19])])

    def fail(inputs: object) -> None:
        raise DeviceFailedError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(made._pool, "infer", fail)
        with pytest.raises(DeviceFailedError) as caught:
            made.step([(lane, texts[0][19:20])])
    assert caught.value.unit == "CPU"
    assert lane.tokens == texts[0][:19]
    np.testing.assert_array_equal(made.step([(lane, texts[0][19:20])])[0], expected)


def test_a_step_that_decodes_again_sets_no_tensor_anew(
    tiny: Callable[..., KernelCompiled], texts: list[list[int]]
) -> None:
    """Or a single lane would be slower than a sequence of the executor."""
    made = batched(tiny())
    lane = made.open()
    made.step([(lane, texts[0][:5])])
    made.step([(lane, texts[0][5:6])])
    assert made._last is not None
    before = {name: id(tensor) for name, tensor in made._last[2].items()}
    made.step([(lane, texts[0][6:7])])
    assert before == {name: id(tensor) for name, tensor in made._last[2].items()}


# Who is run together.


def test_which_lanes_a_plan_gets(executor: Executor, packed_path: Path, demo_path: Path) -> None:
    packed, plain = Bundle.open(packed_path), Bundle.open(demo_path)
    assert packed.graph is not None
    assert plain.graph is not None
    assert isinstance(open_lanes(executor, kv_bytes=ROOM).open(), BatchedLane)
    cut = Plan.explicit(packed.graph, f"*={CONFIG},head=CPU@f32")
    exact = Plan.single(packed.graph, DeviceConfig("CPU", "f32"))
    weights = Plan.single(plain.graph, CONFIG)  # f16: the products stay with OpenVINO
    for bundle, plan in ((packed, cut), (packed, exact), (plain, weights)):
        made = open_lanes(Executor(bundle, plan), kv_bytes=ROOM)
        assert isinstance(made, SerialLanes)
        assert made.room() > 1000
    assert BLOCK_TOKENS * executor.kv_bytes_per_token == open_lanes(executor, kv_bytes=ROOM).block_bytes  # type: ignore[attr-defined]

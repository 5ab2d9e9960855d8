"""Chunks of a prompt go through devices that work at the same time: in order, a few at once, and all threads end."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert import pipeline
from edgert.executor import SequenceRun
from edgert.pipeline import Segment, run_chunks
from edgert.session import Model
from edgert.shapes import StaticShapes

WAIT_S = 20.0  # for what comes at once; the limit turns a deadlock into a failure
SPLIT = "*=CPU@f32,attention=SIM@f32"


def waited(event: threading.Event) -> None:
    assert event.wait(WAIT_S), "what another thread was to do did not happen"


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "what another thread was to do did not happen"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """What `run_chunks` starts has ended when it returns, whichever way it returns."""
    before = set(threading.enumerate())
    yield
    left = [t for t in set(threading.enumerate()) - before if "work" in t.name]  # named after the function they run
    assert not left


class Log:
    """What happened, in order, and what goes on at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.started: list[tuple[int, int]] = []  # (segment, chunk)
        self.busy: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    def segment(self, number: int, unit: str, work: Callable[[int], None] = lambda chunk: None) -> Segment[list[int]]:
        """A segment whose chunks are `[chunk, segments it went through …]`."""

        def run(chunk: list[int]) -> list[int]:
            with self.lock:
                self.started.append((number, chunk[0]))
                self.busy[unit] += 1
                self.most[unit] = max(self.most[unit], self.busy[unit])
            work(chunk[0])
            with self.lock:
                self.busy[unit] -= 1
            return [*chunk, number]

        return Segment(unit, run)


def chunks(count: int) -> Iterator[list[int]]:
    return ([i] for i in range(count))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("units", ["A", "AB", "ABC", "ABA", "AAA"])
def test_every_chunk_goes_through_every_segment_in_order(units: str, count: int) -> None:
    log = Log()
    last = run_chunks([log.segment(i, unit) for i, unit in enumerate(units)], chunks(count))
    assert last == [count - 1, *range(len(units))]
    for number in range(len(units)):
        assert [chunk for segment, chunk in log.started if segment == number] == list(range(count))
    for chunk in range(count):
        assert [segment for segment, c in log.started if c == chunk] == list(range(len(units)))


def test_no_chunk_gives_nothing() -> None:
    log = Log()
    assert run_chunks([log.segment(0, "A"), log.segment(1, "B")], chunks(0)) is None
    assert log.started == []


def test_the_first_works_on_the_next_chunk_while_the_second_works_on_this_one() -> None:
    """Both wait for each other: neither would ever get on if they worked in turns."""
    count = 4
    first = [threading.Event() for _ in range(count + 1)]
    second = [threading.Event() for _ in range(count)]
    first[count].set()  # the last chunk has none after it

    def on_first(chunk: int) -> None:
        first[chunk].set()
        if chunk:
            waited(second[chunk - 1])

    def on_second(chunk: int) -> None:
        second[chunk].set()
        waited(first[chunk + 1])

    log = Log()
    assert run_chunks([log.segment(0, "A", on_first), log.segment(1, "B", on_second)], chunks(count)) == [3, 0, 1]


def test_two_segments_of_one_device_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[pipeline._Turns] = []
    asked, entered = threading.Event(), threading.Event()
    enter = pipeline._Turns.__enter__

    def watched_enter(self: pipeline._Turns) -> None:
        turns.append(self)
        if len(turns) == 4:  # the first segment for chunks 0 and 1, the second for chunk 0, and now the third
            asked.set()
        enter(self)

    def first(chunk: int) -> None:
        if chunk == 1:
            waited(asked)
            assert not entered.wait(0.2)  # nothing else keeps the third from going on

    monkeypatch.setattr(pipeline._Turns, "__enter__", watched_enter)
    log = Log()
    third = log.segment(2, "A", lambda chunk: entered.set())
    run_chunks([log.segment(0, "A", first), log.segment(1, "B"), third], chunks(4))
    assert log.most == {"A": 1, "B": 1}
    assert len(set(turns)) == 2
    assert entered.is_set()


def test_a_prompt_is_not_drawn_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the last segment is on the first chunk, one waits between the two and one is ready to get there."""
    drawn: list[int] = []
    ahead: list[int] = []
    stuck, go_on = threading.Event(), threading.Event()
    put = pipeline._put

    def watched_put(queue: Any, chunk: Any, failed: Any) -> None:
        if queue.full():
            go_on.set()
        put(queue, chunk, failed)

    def source() -> Iterator[list[int]]:
        for i in range(50):
            drawn.append(i)
            if i == 1:
                waited(stuck)
            if i == 20:
                go_on.set()
            yield [i]

    def last(chunk: int) -> None:
        if chunk == 0:
            stuck.set()
            waited(go_on)
            ahead.append(len(drawn))

    monkeypatch.setattr("edgert.pipeline._put", watched_put)
    log = Log()
    run_chunks([log.segment(0, "A"), log.segment(1, "B", last)], source())
    assert ahead == [3]
    assert drawn == list(range(50))


def test_a_chunk_is_drawn_when_the_first_segment_gets_to_it() -> None:
    """What stops a prompt is looked at when a chunk is drawn: those drawn early would still have to be computed."""
    drawn: list[int] = []
    seen: list[int] = []

    def source() -> Iterator[list[int]]:
        for i in range(6):
            drawn.append(i)
            yield [i]

    log = Log()
    run_chunks([log.segment(0, "A", lambda chunk: seen.append(len(drawn))), log.segment(1, "B")], source())
    assert seen == [1, 2, 3, 4, 5, 6]


def test_turns_go_to_who_waited_longest() -> None:
    """Whoever had the device last and wants it again comes after those who already wait."""
    turns, order = pipeline._Turns(), list[str]()

    def ask(name: str) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=ask, args=(f"waiting {number}",)) for number in range(4)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: len(turns._queue) == number + 2)  # it waits
        assert order == []
    ask("had it last")
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [*(f"waiting {number}" for number in range(4)), "had it last"]


def test_who_gives_up_waiting_is_passed_over() -> None:
    turns = pipeline._Turns()

    def interrupted(timeout: float | None = None) -> None:  # Ctrl-C, which a background process may ignore
        raise KeyboardInterrupt

    with turns:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(turns._condition, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                turns.__enter__()
        assert len(turns._queue) == 1
    with turns:  # not for ever
        pass


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 3])
def test_the_error_of_any_segment_comes_out(broken: int, at: int) -> None:
    error = ValueError("broken")

    def fail(chunk: int) -> None:
        if chunk == at:
            raise error

    log = Log()
    nothing: Callable[[int], None] = lambda chunk: None  # noqa: E731
    segments = [log.segment(i, f"{i}", fail if i == broken else nothing) for i in range(3)]
    with pytest.raises(ValueError, match="broken") as caught:
        run_chunks(segments, chunks(1000))
    assert caught.value is error
    assert len(log.started) < 100  # the others have not gone on to the end
    assert max(chunk for segment, chunk in log.started if segment == broken) == at


def test_the_error_of_the_source_comes_out() -> None:
    def source() -> Iterator[list[int]]:
        yield [0]
        raise KeyError("no more")

    log = Log()
    with pytest.raises(KeyError, match="no more"):
        run_chunks([log.segment(0, "A"), log.segment(1, "B")], source())


def test_the_first_error_counts() -> None:
    """What fails because something else has failed is not the news."""
    first = threading.Event()

    def early(chunk: int) -> None:
        first.set()
        raise ValueError("first")

    def late(chunk: int) -> None:
        if chunk == 1:
            waited(first)
            raise ValueError("second")

    log = Log()
    with pytest.raises(ValueError, match="first"):
        run_chunks([log.segment(0, "A", late), log.segment(1, "B", early)], chunks(5))


def test_ctrl_c_ends_the_threads() -> None:
    def interrupt(chunk: int) -> None:
        if chunk == 3:
            raise KeyboardInterrupt

    log = Log()
    with pytest.raises(KeyboardInterrupt):
        run_chunks([log.segment(0, "A", interrupt), log.segment(1, "B")], ([i] for i in itertools.count()))


# On the model.


@pytest.fixture(scope="module")
def split(demo_path: Path) -> Model:
    return edgert.load(demo_path, place=SPLIT, prefill_chunk=16)


def prefilled(run: SequenceRun, tokens: list[int], chunk: int) -> np.ndarray:
    logits = run.prefill(tokens, chunk=chunk)
    assert logits is not None
    return logits.copy()


@pytest.mark.parametrize(("length", "chunk"), [(50, 16), (33, 16), (7, 1), (128, 64), (9, 2)])
def test_a_pipelined_prompt_gives_the_logits_of_a_sequential_one(
    split: Model, demo: Model, book: list[int], length: int, chunk: int
) -> None:
    """Chunks of one token and a last chunk of one token among them."""
    run, alone = split._engine.executor.open(), demo._engine.executor.open()
    assert len(run._chains[0].segments()) > 1
    np.testing.assert_allclose(
        prefilled(run, book[:length], chunk), prefilled(alone, book[:length], length), rtol=1e-3, atol=1e-3
    )
    assert run.tokens == book[:length]
    for token in book[length : length + 3]:  # and the cache is the same
        np.testing.assert_allclose(run.forward([token]), alone.forward([token]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["0-4=CPU@f32,5-9=SIM@f32", "0-3=SIM@f32,4-6=CPU@f32,7-9=SIM@f32"])
def test_other_ways_to_cut(demo_path: Path, demo: Model, book: list[int], place: str) -> None:
    model = edgert.load(demo_path, place=place, prefill_chunk=16)
    found = model.generate(book[:90], max_tokens=6).tokens
    assert found == demo.generate(book[:90], max_tokens=6).tokens


def test_static_shapes_in_the_pipeline(demo_path: Path, demo: Model, book: list[int]) -> None:
    """Chunks that are padded, and a bucket that fills up on the way."""
    model = edgert.load(
        demo_path, place="*=CPU@f32,attention=SIM@f32+static", static_shapes=StaticShapes((16,), (64, 256))
    )
    assert model.generate(book[:90], max_tokens=6).tokens == demo.generate(book[:90], max_tokens=6).tokens


def test_two_pipelines_at_once(split: Model, demo: Model, book: list[int]) -> None:
    prompts = [book[:80], book[200:290], book[400:470]]
    expected = [demo.generate(prompt, max_tokens=4).tokens for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def work(number: int) -> None:
        found[number] = split.generate(prompts[number], max_tokens=4).tokens

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [found[number] for number in range(len(prompts))] == expected


class CancelAt(threading.Event):
    """Set when it is looked at for the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._looks = looks

    def is_set(self) -> bool:
        self._looks -= 1
        if self._looks < 0:
            self.set()
        return super().is_set()


@pytest.mark.parametrize("chunks_done", [0, 1, 3])
def test_a_prompt_cancelled_on_the_way_can_go_on(split: Model, demo: Model, book: list[int], chunks_done: int) -> None:
    run = split._engine.executor.open()
    assert run.prefill(book[:90], chunk=16, cancel=CancelAt(chunks_done)) is None
    assert run.tokens == book[: 16 * chunks_done]
    states = run.read_states()
    assert {array.shape[2] for array in states.values()} <= {16 * chunks_done}
    logits = prefilled(run, book[16 * chunks_done : 90], 16)
    alone = demo._engine.executor.open()
    np.testing.assert_allclose(logits, prefilled(alone, book[:90], 90), rtol=1e-3, atol=1e-3)


def test_a_cancelled_prompt_is_reused_as_far_as_it_came(demo_path: Path, demo: Model, book: list[int]) -> None:
    model = edgert.load(demo_path, place=SPLIT, prefill_chunk=16)
    cancelled = model.generate(book[:90], cancel=CancelAt(2), max_tokens=4)
    assert (cancelled.finish_reason, cancelled.tokens) == ("cancelled", ())
    again = model.generate(book[:90], max_tokens=4)
    assert again.timings.reused_tokens == 32
    assert again.tokens == demo.generate(book[:90], max_tokens=4).tokens

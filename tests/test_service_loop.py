"""Which sequences run next: on plain data, and on lanes without a device."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_lanes import FakeLanes, continuation
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import CacheFullError, UsageError
from edgert.service.protocol import Piece, Refused, Started, Step
from edgert.service.worker.joules import Joules
from edgert.service.worker.loop import Limits, Loop, Speed, Work, choose

PREEMPT_US = 100_000.0


class Fake:
    """A generation that takes the likeliest token until it has enough."""

    def __init__(self, id: int, prompt: list[int], new: int, background: bool = False) -> None:
        self.id, self.background, self.tokens, self.prompt_tokens = id, background, list(prompt), len(prompt)
        self.media: dict[int, Any] = {}
        self.new_tokens = 0
        self.finish_reason: Any = None
        self.params = SimpleNamespace(max_tokens=new)

    def feed(self, logits: np.ndarray) -> Piece:
        token = int(np.argmax(logits))
        self.tokens.append(token)
        self.new_tokens += 1
        self.finish_reason = "length" if self.new_tokens == self.params.max_tokens else None
        return Piece(self.id, "", token, finish_reason=self.finish_reason)

    def cancel(self) -> Piece:
        self.finish_reason = self.finish_reason or "cancelled"
        return Piece(self.id, "", finish_reason=self.finish_reason)


def loop_on(lanes: FakeLanes, *, places: int = 8, chunk: int = 512, idle: int = 64, speed: Speed | None = None) -> Loop:
    return Loop(
        lanes, places=places, most_idle=idle, limits=Limits(chunk, PREEMPT_US), speed=speed or Speed(lanes.batched),
        joules=Joules(None, {}),
    )  # fmt: skip


def finish(loop: Loop, most: int = 10_000) -> tuple[dict[int, list[int]], dict[int, Started]]:
    """Run to the end; tokens and beginnings by request."""
    tokens: dict[int, list[int]] = defaultdict(list)
    begun: dict[int, Started] = {}
    for _ in range(most):
        if not loop.busy:
            return tokens, begun
        for message in loop.step():
            if isinstance(message, Started):
                assert message.id not in begun
                begun[message.id] = message
            elif isinstance(message, Step):
                for piece in message.pieces:
                    if piece.token is not None:
                        tokens[piece.id].append(piece.token)
    raise AssertionError("it does not end")


# What runs next, on plain data

LIMITS = Limits(512, PREEMPT_US, batched=True)
GENERATING = Work(background=False, left=1, generating=True)
GENERATING_BEHIND = Work(background=True, left=1, generating=True)


def fast() -> Speed:
    speed = Speed(batched=True)
    speed.saw(1, 0, 10_000)
    speed.saw(0, 100, 100_000)  # 1 ms a token
    return speed


def test_all_that_generate_and_one_prompt() -> None:
    running = [GENERATING, Work(False, 700, False), GENERATING_BEHIND, Work(False, 20, False)]
    assert choose(running, LIMITS, fast(), 0) == [(0, 1), (2, 1), (1, 512)]


def test_an_interactive_prompt_is_first() -> None:
    running = [Work(True, 4000, False), Work(False, 30, False)]
    assert choose(running, LIMITS, fast(), 0) == [(1, 30)]
    assert choose(running[:1], LIMITS, fast(), 0) == [(0, 75)]


def test_a_background_chunk_leaves_time_for_those_that_generate() -> None:
    assert choose([Work(True, 4000, False), GENERATING], LIMITS, fast(), 0) == [(1, 1), (0, 65)]


def test_a_background_chunk_has_one_token_at_least() -> None:
    slow = Speed(batched=True)
    slow.saw(1, 0, 500_000)
    assert choose([Work(True, 4000, False)], LIMITS, slow, 0) == [(0, 1)]


@pytest.mark.parametrize(("batched", "turns"), [(True, [2, 2, 2, 2]), (False, [2, 1, 2, 1])])
def test_background_generation_yields_where_it_costs(batched: bool, turns: list[int]) -> None:
    limits = Limits(512, PREEMPT_US, batched)
    running = [GENERATING, GENERATING_BEHIND]
    assert [len(choose(running, limits, fast(), turn)) for turn in range(4)] == turns
    assert [len(choose(running[1:], limits, fast(), turn)) for turn in range(4)] == [1, 1, 1, 1]


def test_speed_follows_what_is_slower_at_once() -> None:
    speed = Speed(batched=False)
    assert speed.tokens_within(PREEMPT_US, 3) == 1  # nothing is known
    speed.saw(2, 0, 2000)
    assert speed.step_us(3, 0) == 3000
    assert speed.token_us == 1000  # of a prompt, before one was seen
    speed.saw(2, 10, 2000 + 4000)
    assert speed.token_us == 400
    speed.saw(0, 10, 9000)
    assert speed.token_us == 900
    speed.saw(0, 10, 1000)
    assert speed.token_us == 500
    assert speed.tokens_within(11_000, 1) == 20


# The loop, on lanes without a device


def test_a_background_prompt_of_4000_tokens_yields_at_once() -> None:
    """Tokens become dearer with the length; the device becomes three times slower in the middle."""
    slower = 1.0

    def cost_us(work: list[tuple[int, int]]) -> float:
        return slower * (5_000 + sum(new * (300 + past / 8) for past, new in work))

    lanes = FakeLanes(cost_us=cost_us)
    speed = Speed(batched=True)
    speed.saw(1, 0, cost_us([(0, 1)]))
    loop = loop_on(lanes, speed=speed)
    loop.add(Fake(1, list(range(4000)), 3, background=True))
    taken_us = []
    while sum(map(sum, lanes.steps)) < 1500:
        predicted_us = loop.speed.step_us(0, choose([Work(True, 4000, False)], loop.limits, loop.speed, 0)[0][1])
        assert predicted_us <= PREEMPT_US
        loop.step()
        taken_us.append(lanes.infer_us)
    assert max(taken_us) <= PREEMPT_US
    assert max(map(max, lanes.steps)) > 100  # and the chunks are no smaller than they must be
    slower = 3.0
    loop.step()
    loop.step()
    assert lanes.infer_us <= PREEMPT_US  # one step later it knows
    before = len(lanes.steps)
    loop.add(Fake(2, [7] * 50, 2))
    told = loop.step()
    assert lanes.steps[before] == [50]  # the very next step is the interactive prompt's
    assert [message.pieces[0].id for message in told if isinstance(message, Step)] == [2]
    tokens, _ = finish(loop)
    assert tokens[1] == continuation(range(4000), 3)


def test_several_get_what_each_would_get_alone() -> None:
    lanes = FakeLanes()
    loop = loop_on(lanes, chunk=5)
    prompts = {id: [id] * (3 * id) for id in range(1, 7)}
    for id, prompt in prompts.items():
        loop.add(Fake(id, prompt, 10, background=id % 2 == 0))
    tokens, begun = finish(loop)
    assert tokens == {id: continuation(prompt, 10) for id, prompt in prompts.items()}
    assert {id: each.prompt_tokens for id, each in begun.items()} == {id: 3 * id for id in prompts}
    assert max(map(len, lanes.steps)) == 5
    assert all(sum(tokens > 1 for tokens in step) <= 1 for step in lanes.steps)


def test_a_shared_beginning_is_prefilled_once() -> None:
    system = list(range(300))
    lanes = FakeLanes()
    loop = loop_on(lanes)
    loop.add(Fake(1, [*system, 1, 2, 3], 5))
    loop.add(Fake(2, [*system, 4, 5], 5))
    tokens, begun = finish(loop)
    assert (begun[1].cached_tokens, begun[2].cached_tokens) == (0, 300)
    assert tokens[2] == continuation([*system, 4, 5], 5)
    assert sum(map(sum, lanes.steps)) == 303 + 2 + 2 * 4
    loop.add(Fake(3, [*system, 4, 5, *tokens[2], 6], 1))  # the conversation goes on
    assert finish(loop)[1][3].cached_tokens == 302 + 4  # the last token never ran


def test_another_conversation_keeps_its_cache() -> None:
    lanes = FakeLanes()
    loop = loop_on(lanes)
    loop.add(Fake(1, list(range(100)), 1))
    finish(loop)
    for id, cached in ((2, 20), (3, 99)):  # a copy of the beginning, and then the first one again
        loop.add(Fake(id, [*range(20), 1] if id == 2 else list(range(100)), 1))
        assert finish(loop)[1][id].cached_tokens == cached


def test_no_room_sends_the_last_one_back() -> None:
    lanes = FakeLanes(budget=400)
    loop = loop_on(lanes)
    prompts = {id: [id] * 60 for id in (1, 2, 3)}
    for id, prompt in prompts.items():
        loop.add(Fake(id, prompt, 150))
    tokens, _ = finish(loop)
    assert tokens == {id: continuation(prompt, 150) for id, prompt in prompts.items()}
    assert sum(map(sum, lanes.steps)) > 3 * 209  # something was prefilled again


def test_one_that_does_not_fit_alone_is_an_error() -> None:
    loop = loop_on(FakeLanes(budget=50))
    loop.add(Fake(1, [1] * 40, 20))
    with pytest.raises(CacheFullError):
        finish(loop)


def test_an_interactive_request_takes_the_place_of_a_background_one() -> None:
    lanes = FakeLanes()
    loop = loop_on(lanes, places=2)
    for id in (1, 2):
        loop.add(Fake(id, [id] * 30, 20, background=True))
    for _ in range(6):
        loop.step()
    assert all(task.generating for task in loop.running)
    loop.add(Fake(3, [3] * 30, 5))
    loop.step()
    assert [task.generation.id for task in loop.running] == [1, 3]
    before = sum(map(sum, lanes.steps))
    tokens, _ = finish(loop)
    assert tokens[3] == continuation([3] * 30, 5)[1:]
    assert tokens[2] == continuation([2] * 30, 20)[-len(tokens[2]) :]
    assert sum(map(sum, lanes.steps)) - before < 60  # its cache was kept: the prompt is not read again
    assert not loop.background_only


def test_cancel_ends_a_request_and_keeps_its_cache() -> None:
    lanes = FakeLanes()
    loop = loop_on(lanes, places=1)
    loop.add(Fake(1, [1] * 40, 99))
    loop.add(Fake(2, [2] * 40, 99))
    for _ in range(3):
        loop.step()
    assert [piece.finish_reason for piece in loop.cancel(2)] == ["cancelled"]  # it waits
    assert [piece.finish_reason for piece in loop.cancel(1)] == ["cancelled"]
    assert loop.cancel(1) == []
    assert not loop.busy
    assert len(loop.idle) == 1
    assert loop.kv_bytes == loop.idle.kv_bytes == 42
    loop.add(Fake(3, [1] * 40, 1))
    assert finish(loop)[1][3].cached_tokens == 39


def test_a_grammar_that_fails_takes_nobody_along() -> None:
    class Failing(Fake):
        def feed(self, logits: np.ndarray) -> Piece:
            raise UsageError("grammar: too complex")

    loop = loop_on(FakeLanes())
    loop.add(Failing(1, [1] * 10, 5))
    loop.add(Fake(2, [2] * 10, 5))
    told = [message for _ in range(20) if loop.busy for message in loop.step()]
    assert [message for message in told if isinstance(message, Refused)] == [
        Refused(1, "UsageError", "grammar: too complex")
    ]
    assert sum(len(message.pieces) for message in told if isinstance(message, Step)) == 5


def test_requests_move_to_other_lanes() -> None:
    loop = loop_on(FakeLanes(batched=False))
    for id in (1, 2, 3):
        loop.add(Fake(id, [id] * 30, 5 if id == 3 else 20))
    seen: dict[int, list[int]] = defaultdict(list)
    for _ in range(9):
        for message in loop.step():
            for piece in message.pieces if isinstance(message, Step) else ():
                seen[piece.id].append(piece.token or 0)
    other = FakeLanes(budget=1000)
    loop.move(other, Speed(batched=True), "NPU")
    assert loop.limits.batched
    assert loop.longest == 50
    for id, tokens in finish(loop)[0].items():
        seen[id] += tokens
    assert seen == {id: continuation([id] * 30, 5 if id == 3 else 20) for id in (1, 2, 3)}
    assert {max(step) for step in other.steps} == {1}  # nothing is prefilled again


def test_what_does_not_move_is_prefilled_again() -> None:
    class Refusing(FakeLanes):
        def room(self) -> int:  # none for a cache that comes from elsewhere
            return super().room() if self.running else 0

        running = False

    loop = loop_on(FakeLanes())
    loop.add(Fake(1, [1] * 30, 9))
    for _ in range(3):
        loop.step()
    other = Refusing()
    loop.move(other, Speed(batched=True), None)
    assert not other.open_lanes
    other.running = True
    assert finish(loop)[0][1] == continuation([1] * 30, 9)[-len(other.steps) :]
    assert other.steps[0][0] > 30


def test_idle_lanes_are_bounded() -> None:
    lanes = FakeLanes()
    loop = loop_on(lanes, idle=2)
    for id in range(1, 5):
        loop.add(Fake(id, [id] * 20, 1))
        finish(loop)
    assert [lane.tokens[0] for lane in loop.idle] == [3, 4]
    assert len(lanes.open_lanes) == 2
    assert loop.idle.close_all() == 40
    assert not lanes.open_lanes


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 30), st.booleans(), st.integers(0, 40)),
        min_size=1,
        max_size=8,
    ),
    budget=st.integers(100, 400),
    places=st.integers(1, 4),
    chunk=st.integers(1, 30),
    batched=st.booleans(),
    cancelled=st.sets(st.integers(0, 7), max_size=2),
)
def test_nothing_is_lost_or_mixed(
    requests: list[tuple[int, int, int, bool, int]],
    budget: int,
    places: int,
    chunk: int,
    batched: bool,
    cancelled: set[int],
) -> None:
    lanes = FakeLanes(budget=budget, batched=batched, cost_us=lambda work: 1000.0 * sum(new for _, new in work))
    loop = loop_on(lanes, places=places, chunk=chunk)
    got: dict[int, list[int]] = defaultdict(list)
    ended: dict[int, Any] = {}
    for turn in range(3000):
        for id, (kind, length, new, background, at) in enumerate(requests):
            if turn == at:
                loop.add(Fake(id, [kind] * length, new, background))
            if turn == at + 7 and id in cancelled:
                ended |= {piece.id: piece.finish_reason for piece in loop.cancel(id)}
        for message in loop.step() if loop.busy else ():
            for piece in message.pieces if isinstance(message, Step) else ():
                assert piece.id not in ended
                got[piece.id].append(piece.token or 0)
                if piece.finish_reason:
                    ended[piece.id] = piece.finish_reason
        if len(ended) == len(requests) and not loop.busy:
            break
    assert len(ended) == len(requests)
    for id, (kind, length, new, _, _) in enumerate(requests):
        assert got[id] == continuation([kind] * length, new)[: len(got[id])]
        assert len(got[id]) == new or ended[id] == "cancelled"
    loop.idle.close_all()
    assert not lanes.open_lanes

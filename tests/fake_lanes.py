"""Lanes without a device: the next token is a hash of all before it, so whatever is mixed up or lost shows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgert.backends.base import Array
from edgert.errors import CacheFullError

VOCAB = 64


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(np.array(tokens, np.int64).tobytes()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request gets that has all to itself."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeLane:
    def __init__(self, lanes: FakeLanes) -> None:
        self.lanes = lanes
        self.tokens: list[int] = []
        self.media: object = {}
        self.closed = False

    @property
    def kv_bytes(self) -> int:
        return 0 if self.closed else len(self.tokens)

    def rewind(self, length: int) -> int:
        del self.tokens[length:]
        return len(self.tokens)

    def fork(self) -> FakeLane | None:
        if len(self.tokens) > self.lanes.room():
            return None
        copy = self.lanes.open()
        copy.tokens = list(self.tokens)
        return copy

    def export(self) -> dict[str, Array]:
        return {"k": np.zeros((1, 1, len(self.tokens), 1), np.float32)}

    def restore(self, tokens: Sequence[int], states: Mapping[str, Array]) -> None:
        if len(tokens) > self.lanes.room():
            raise CacheFullError("full")
        self.tokens = list(tokens)

    def close(self) -> None:
        self.closed = True
        self.lanes.open_lanes.discard(self)


class FakeLanes:
    """`cost_us` tells what a step takes, of the lanes' lengths before it and the tokens that each gets."""

    def __init__(
        self,
        *,
        budget: int = 10**6,
        batched: bool = True,
        cost_us: Callable[[list[tuple[int, int]]], float] = lambda work: 1.0,
    ) -> None:
        self.batched, self.context, self.max_chunk = batched, budget, 10**6
        self.infer_us = 0.0
        self.budget, self.cost_us = budget, cost_us
        self.open_lanes: set[FakeLane] = set()
        self.steps: list[list[int]] = []  # tokens that each lane got

    def open(self) -> FakeLane:
        lane = FakeLane(self)
        self.open_lanes.add(lane)
        return lane

    def step(self, work: Sequence[tuple[FakeLane, Sequence[int]]]) -> list[Array]:
        assert len({id(lane) for lane, _ in work}) == len(work)
        assert all(tokens and not lane.closed and lane.lanes is self for lane, tokens in work)
        if sum(len(tokens) for _, tokens in work) > self.room():
            raise CacheFullError("full")
        self.infer_us = self.cost_us([(len(lane.tokens), len(tokens)) for lane, tokens in work])
        self.steps.append([len(tokens) for _, tokens in work])
        rows = []
        for lane, tokens in work:
            lane.tokens += tokens
            row = np.zeros(VOCAB, np.float32)
            row[next_token(lane.tokens)] = 1
            rows.append(row)
        return rows

    def room(self) -> int:
        used = sum(len(lane.tokens) for lane in self.open_lanes)
        assert used <= self.budget
        return self.budget - used

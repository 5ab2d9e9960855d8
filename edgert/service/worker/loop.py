"""Which sequences run in the next step, together: a state machine over lanes, without threads, files or a clock.

    waiting ── a place and room ──▶ prefilling, a chunk a step ──▶ generating, a token a step ──▶ done, its lane is idle
       ▲                                     │                            │
       └───────────── no room for more keys and values ──────────────────┘

Interactive requests come before background ones wherever both want the same. `choose` decides that on plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgert.errors import CacheFullError, DeviceError, DeviceFailedError, EdgertError, UsageError
from edgert.features import needed, whole
from edgert.service.protocol import Piece, Refused, Started, Step
from edgert.service.worker.generation import Generation
from edgert.service.worker.prefixes import Prefixes

if TYPE_CHECKING:
    from edgert.batch import Lane, Lanes
    from edgert.service.worker.joules import Joules

MARGIN = 0.75  # of the time for a background prompt: the next chunk is dearer than the last one was
SLACK = 16  # idle caches leave this part of the budget free: a full one is costly to keep in order
RESERVE_TOKENS = 64  # a request is let in where its prompt and so many more tokens of it and of each other fit


@dataclass(frozen=True)
class Work:
    """What one running request wants.

    Attributes:
        left: tokens that it has and that have not run, at least 1.
        generating: whether the next logits give it another token than its first: `left` is 1 then.
    """

    background: bool
    left: int
    generating: bool


@dataclass(frozen=True)
class Limits:
    """What a step may be.

    Attributes:
        chunk: tokens of a prompt.
        preempt_us: microseconds that a step may take for the sake of a background prompt.
        batched: whether several sequences in one step cost less than one step each; the lanes tell.
    """

    chunk: int
    preempt_us: float
    batched: bool = False


class Speed:
    """What steps take, by what they took: microseconds for a token of a prompt, and for each generating sequence.

    Prompts become dearer the longer they are, and a device may become slower, so what is slower than thought counts at
    once and what is quicker by half. A small chunk is dear for its length: chunks grow while that is so.
    """

    def __init__(self, batched: bool) -> None:
        self._batched = batched
        self.prefill_us = self.decode_us = 0.0  # a token of a prompt; a generating sequence, or all where batched

    def saw(self, generating: int, prefilled: int, step_us: float) -> None:
        """Learn from a step of so many generating sequences and so many tokens of prompts."""
        if prefilled:
            rest_us = step_us - self._generating_us(generating)
            self.prefill_us = _follow(self.prefill_us, max(rest_us, 0.0) / prefilled)
        elif generating:
            self.decode_us = _follow(self.decode_us, step_us if self._batched else step_us / generating)

    def step_us(self, generating: int, prefilled: int) -> float:
        """What such a step will take."""
        return self._generating_us(generating) + prefilled * self.token_us

    def tokens_within(self, limit_us: float, generating: int) -> int:
        """Tokens of a prompt that fit in a step of so many microseconds, at least 1."""
        left_us = limit_us - self._generating_us(generating)
        return max(1, int(left_us / self.token_us)) if self.token_us > 0 else 1

    @property
    def token_us(self) -> float:
        """A token of a prompt; before one was seen, what a step of a single token takes."""
        return self.prefill_us or self.decode_us

    def _generating_us(self, generating: int) -> float:
        return self.decode_us * (min(1, generating) if self._batched else generating)


def _follow(known_us: float, seen_us: float) -> float:
    return max(seen_us, (known_us + seen_us) / 2) if known_us else seen_us


def choose(running: Sequence[Work], limits: Limits, speed: Speed, turn: int) -> list[tuple[int, int]]:
    """The next step: indices into `running` and how many of their tokens run.

    All that generate, and a chunk of one prompt. A background prompt has its turn only where no interactive one waits,
    in chunks that an interactive request need not wait for longer than `Limits.preempt_us`. Where sequences do not gain
    from each other, background ones generate in every other step only while interactive ones run.

    Args:
        running: the longest running first.
        turn: number of the step.
    """
    hurried = any(not work.background for work in running)
    yields = hurried and not limits.batched and turn % 2 == 1
    chosen = [(i, 1) for i, work in enumerate(running) if work.generating and not (work.background and yields)]
    prompts = [i for i, work in enumerate(running) if not work.generating]
    first = next((i for i in prompts if not running[i].background), next(iter(prompts), None))
    if first is not None:
        work = running[first]
        tokens = min(work.left, limits.chunk)
        if work.background:
            tokens = min(tokens, speed.tokens_within(MARGIN * limits.preempt_us, len(chosen)))
        chosen.append((first, tokens))
    return chosen


@dataclass(eq=False)
class Task:
    """A request with its lane, if it has one, and what it took."""

    generation: Generation
    lane: Lane | None = None
    announced: bool = False
    prefill_us: float = 0.0
    decode_us: float = 0.0

    @property
    def left(self) -> int:
        return len(self.generation.tokens) - (0 if self.lane is None else len(self.lane.tokens))

    @property
    def generating(self) -> bool:
        return self.lane is not None and self.left == 1 and self.generation.new_tokens > 0


class Loop:
    """The requests of one model on its lanes.

    Args:
        lanes: where they run.
        places: requests that run at once.
        most_idle: lanes that are kept when nobody runs them.
        limits: of a step; its chunk is at most what the lanes take.
        speed: what is known of the lanes' speed.
        joules: counts the energy.
        unit: of hardware, for a failure that does not tell its own.
    """

    def __init__(
        self,
        lanes: Lanes,
        *,
        places: int,
        most_idle: int,
        limits: Limits,
        speed: Speed,
        joules: Joules,
        unit: str | None = None,
    ) -> None:
        self.lanes = lanes
        self.idle = Prefixes(most_idle)
        self._slack = lanes.room() // SLACK
        self._asked = limits
        self.limits = replace(limits, chunk=min(limits.chunk, lanes.max_chunk), batched=lanes.batched)
        self.speed = speed
        self.places = places
        self.unit = unit
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self._joules = joules
        self._turn = 0

    def add(self, generation: Generation) -> list[Piece]:
        """Take a request; its last piece where it is at its end already."""
        if generation.finish_reason is not None:
            return [generation.cancel()]
        self.waiting.append(Task(generation))
        return []

    def cancel(self, id: int) -> list[Piece]:
        """End a request; its last piece, or nothing where there is no such request."""
        task = next((task for task in (*self.running, *self.waiting) if task.generation.id == id), None)
        if task is None:
            return []
        piece = self._told(task, task.generation.cancel())
        self._leave(task)
        return [piece]

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def background_only(self) -> bool:
        """Whether there is work and none of it is interactive."""
        return self.busy and all(task.generation.background for task in (*self.running, *self.waiting))

    @property
    def kv_bytes(self) -> int:
        return self.idle.kv_bytes + sum(task.lane.kv_bytes for task in self.running if task.lane is not None)

    @property
    def longest(self) -> int:
        """Tokens that a request here may come to have, at most."""
        tasks = (*self.running, *self.waiting)
        return max((task.generation.prompt_tokens + task.generation.params.max_tokens for task in tasks), default=0)

    def step(self) -> list[Started | Step | Refused]:
        """Run one step; what it has to tell.

        Raises:
            DeviceError: a device failed; `unit` says which, where it is one that fails.
        """
        told: list[Started | Step | Refused] = []
        while self.lanes.room() < self._slack and self.idle.close_oldest():
            pass
        self._admit()
        while True:
            work = self._chosen(told)
            if not work:
                return told
            generating = [task for task, *_ in work if task.generating]
            try:
                rows = self.lanes.step([(lane, task.generation.tokens[a:b]) for task, lane, a, b in work])
                break
            except CacheFullError:
                if not self._make_room():
                    raise
        self._turn += 1
        step_us = self.lanes.infer_us
        self.speed.saw(len(generating), sum(b - a for task, _, a, b in work if task not in generating), step_us)
        self._joules.step({task.generation.id: b - a for task, _, a, b in work}, step_us)
        pieces: list[Piece] = []
        for (task, _, _, end), logits in zip(work, rows, strict=True):
            if task in generating:
                task.decode_us += step_us
            else:
                task.prefill_us += step_us
            if end < len(task.generation.tokens):
                continue
            try:
                piece = task.generation.feed(logits)
            except UsageError as error:  # of its grammar or its bias: the others go on
                told.append(Refused(task.generation.id, type(error).__name__, str(error)))
                self._leave(task)
                continue
            except DeviceFailedError as error:
                error.unit = error.unit or self.unit
                raise
            pieces.append(self._told(task, piece))
            if piece.finish_reason is not None:
                self._leave(task)
        return [*told, Step(pieces)] if pieces else told

    def move(self, lanes: Lanes, speed: Speed, unit: str | None) -> None:
        """Go on with other lanes of the same model: caches move over, one after the other, or are prefilled again."""
        slack = lanes.room() // SLACK
        for task in self.running:
            if task.lane is not None:
                task.lane = _moved(task.lane, lanes)
        kept = Prefixes(self.idle.most)
        for idle in self.idle:
            fresh = _moved(idle, lanes)
            if fresh is not None:
                kept.put(fresh)
        self.lanes, self.idle, self.speed, self.unit, self._slack = lanes, kept, speed, unit, slack
        self.limits = replace(self._asked, chunk=min(self._asked.chunk, lanes.max_chunk), batched=lanes.batched)

    def _admit(self) -> None:
        """Let in who waits, as far as there are places and room; interactive requests take those of background ones."""
        while self.waiting:
            task = next((task for task in self.waiting if not task.generation.background), self.waiting[0])
            if len(self.running) < self.places and (not self.running or self._fits(task)):
                self.waiting.remove(task)
                self.running.append(task)
                continue
            last = next((task for task in reversed(self.running) if task.generation.background), None)
            if task.generation.background or last is None:
                return
            if last.lane is not None:
                self.idle.put(last.lane)
            self._send_back(last)

    def _fits(self, task: Task) -> bool:
        promised = sum(other.left + RESERVE_TOKENS for other in self.running)
        return self.lanes.room() + self.idle.tokens - promised >= task.left + RESERVE_TOKENS

    def _chosen(self, told: list[Started | Step | Refused]) -> list[tuple[Task, Lane, int, int]]:
        """What runs next: of each task its lane, and from where to where of its tokens."""
        wanted = [Work(task.generation.background, task.left, task.generating) for task in self.running]
        work, running = [], list(self.running)
        for index, tokens in choose(wanted, self.limits, self.speed, self._turn):
            task = running[index]
            if task.lane is None:
                task.lane = self._lane(task)
                if not task.announced:
                    generation, task.announced = task.generation, True
                    cached = min(len(task.lane.tokens), generation.prompt_tokens)
                    told.append(Started(generation.id, generation.prompt_tokens, cached))
            start = len(task.lane.tokens)
            end = min(start + tokens, len(task.generation.tokens))
            if task.generation.media:
                end = whole(task.generation.tokens, start, end) if self.lanes.together else end
                if not self._prepared(task, task.lane, start, end, told):
                    continue
            work.append((task, task.lane, start, end))
        return work

    def _prepared(self, task: Task, lane: Lane, start: int, end: int, told: list[Started | Step | Refused]) -> bool:
        """Whether the images and sounds among some tokens are there; a tower that fails costs its request only."""
        generation = task.generation
        lane.media = generation.media
        try:
            for medium in needed(generation.tokens[start:end], generation.media):
                _ = medium.rows
        except EdgertError as error:
            told.append(Refused(generation.id, type(error).__name__, str(error)))
            self._leave(task)
            return False
        return True

    def _lane(self, task: Task) -> Lane:
        """Looked for when the prompt's turn has come: one that came with it may have prefilled the same beginning."""
        used = [other.lane for other in self.running if other.lane is not None]
        return self.idle.take(task.generation.tokens, used) or self.lanes.open()

    def _make_room(self) -> bool:
        """Give keys and values back: idle ones, or those of the task that came last, which will be prefilled again.

        The task that came first keeps its own, so that there is an end to it; False where no other is left.
        """
        if self.idle.close_oldest():
            return True
        holders = [task for task in self.running[1:] if task.lane is not None]
        if not holders:
            return False
        last = next((task for task in reversed(holders) if task.generation.background), holders[-1])
        assert last.lane is not None
        last.lane.close()
        self._send_back(last)
        return True

    def _send_back(self, task: Task) -> None:
        task.lane = None
        self.running.remove(task)
        self.waiting.insert(0, task)

    def _leave(self, task: Task) -> None:
        self._joules.forget(task.generation.id)
        if task in self.waiting:
            self.waiting.remove(task)
            return
        self.running.remove(task)
        if task.lane is not None:
            task.lane.media = {}
            self.idle.put(task.lane)
            task.lane = None

    def _told(self, task: Task, piece: Piece) -> Piece:
        """A piece with what it took."""
        joules, provenance = self._joules.of(piece.id, last=piece.finish_reason is not None)
        return replace(
            piece, prefill_us=task.prefill_us, decode_us=task.decode_us, joules=joules, joules_provenance=provenance
        )


def _moved(lane: Lane, lanes: Lanes) -> Lane | None:
    """A lane's twin on other lanes; None where it cannot move. It is closed in any case."""
    tokens, fresh = list(lane.tokens), None
    try:
        states = lane.export()
        lane.close()
        fresh = lanes.open()
        fresh.restore(tokens, states)
        return fresh
    except (DeviceError, ValueError):  # ValueError: NumPy's, where shapes differ
        lane.close()
        if fresh is not None:
            fresh.close()
        return None

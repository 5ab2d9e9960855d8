"""The requests of one model: who waits, who runs at the worker, who was set aside, and what comes back for whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from edgert.errors import BusyError, EdgertError, UsageError, WorkerError
from edgert.service.contract import Embeddings, EnergyProvenance
from edgert.service.pool.jobs import Embedding, Generation, Job, refusal
from edgert.service.pool.queueing import FairQueue
from edgert.service.pool.recovery import POISON_AFTER, SUSPECT_AFTER
from edgert.service.pool.shared import Shared
from edgert.service.pool.workers import Worker
from edgert.service.protocol import Cancel, Message, Piece, Refused, Started, Step, Vectors

_USUAL_S = 5.0  # a request's time, where none has ended yet
_WEIGHT = 0.2  # of the newest request, in the running mean of their times
LONGEST_RETRY_S = 600.0
_REJECT_EVENTS_S = 10.0  # a flood of requests must not wash all other events away
_SPAN_S, _GRAIN_S = 10.0, 0.5  # of meters
_LEAST_RATE_S = 1.0  # a single token just now is no rate yet


class Desk:
    """The requests of one model. A request is in one place: waiting in the queue, waiting to go on (`_resuming`, it has
    had a place already), running, or set aside because its reader does not read."""

    def __init__(self, name: str, shared: Shared) -> None:
        self._name = name
        self._shared = shared
        self._limit = shared.settings.queue
        self._places = shared.settings.max_sequences
        self._queue: FairQueue[Job] = FairQueue(shared.patience.aging_s)
        self._resuming: deque[Job] = deque()
        self._aside: set[Job] = set()
        self._running: dict[int, Job] = {}
        self._service_s = _USUAL_S
        self._rejected_s: float | None = None
        self._unheard = 0  # turned away since the last event about it
        self.rejected = 0
        self.prefill_s = 0.0  # the longest that was measured
        self.tokens = Meter()
        self.joules = Meter()
        self.provenance: EnergyProvenance = "unavailable"

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._resuming)

    @property
    def wanting(self) -> bool:
        """Whether a worker has something to do; those set aside want none."""
        return bool(self._running or self._resuming or len(self._queue))

    @property
    def empty(self) -> bool:
        return not (self.wanting or self._aside)

    def waiting_interactive(self) -> int:
        return sum(not job.background for job in (*self._queue, *self._resuming))

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn. Raises `BusyError` where too many do; those set aside count, as they hold
        memory, those that places are free for do not."""
        waiting = len(self._queue) - max(0, self._places - len(self._running) - len(self._resuming))
        if max(waiting, -1) + len(self._aside) >= self._limit or len(self._aside) >= max(self._limit, 1):
            retry_s = self.retry_after_s()
            self.rejected += 1
            self._unheard += 1
            if self._rejected_s is None or job.since_s - self._rejected_s >= _REJECT_EVENTS_S:
                self._rejected_s = job.since_s
                self._shared.events.add("reject", self._name, f"the queue is full: {self._unheard} turned away")
                self._unheard = 0
            raise BusyError(
                f"model {self._name}: {self._limit} requests wait already (queue = {self._limit}); "
                f"try again in {retry_s:.0f} s",
                retry_after_s=retry_s,
            )
        job.waiting_s = job.since_s
        self._queue.push(job, client=job.client, background=job.background, since_s=job.since_s)
        self._shared.wake()

    def retry_after_s(self) -> float:
        """When a place may be free, by how long requests took lately; 1 s to 10 minutes."""
        rounds = (self.waiting + 1) / self._places
        return min(max(rounds * self._service_s, 1.0), LONGEST_RETRY_S)

    def withdraw(self, job: Job, worker: Worker | None) -> None:
        """Nobody waits for it any more."""
        if not job.done:
            job.done = True
            if job.id is not None:
                self._take_back(job, worker)
            elif not self._queue.remove(job):
                self._aside.discard(job)
                if job in self._resuming:
                    self._resuming.remove(job)
        self._shared.wake()

    def dispatch(self, worker: Worker) -> None:
        """Give the worker what it has places for, interactive requests first, taking places back for these."""
        now, background = self._shared.clock(), self._shared.background
        if not background:
            self._make_way(worker, len(self._running), aged=True)
        while not any(job.deaths >= SUSPECT_AFTER for job in self._running.values()):
            if len(self._running) >= self._places and not (
                self._queue.urgent(now, background=background) and self._make_way(worker, 1, aged=False)
            ):
                break
            job = self._next(now, background)
            if job is None:
                break
            number = next(self._shared.numbers)
            self._running[number] = job
            if job.interrupted is not None and isinstance(job, Generation) and worker.ready is not None:
                job.note(f"{job.interrupted}; it goes on with plan {worker.ready.plan}")
                job.interrupted = None
            try:
                worker.send(job.begin(number, now))
            except ValueError as error:  # of `encode`, before anything was written
                del self._running[number]
                job.fail(UsageError(f"model {self._name}: the request is {error}"))

    def take(self, message: Message, worker: Worker) -> bool:
        """A message about requests; whether it is a result: then the worker works."""
        now = self._shared.clock()
        if isinstance(message, Step):
            emulated = worker.ready is not None and worker.ready.emulated
            for piece in message.pieces:
                self._feed(piece, emulated, now)
            return any(piece.token is not None for piece in message.pieces)
        job = self._running.get(message.id) if isinstance(message, Started | Vectors | Refused) else None
        if job is None:
            return False
        if isinstance(message, Started):
            if isinstance(job, Generation):
                job.started(message, now)
            return False
        if isinstance(message, Refused):
            del self._running[message.id]
            job.fail(refusal(message))
            self._shared.wake()
            return False
        self._finish(job, now)
        if isinstance(message, Vectors) and isinstance(job, Embedding):
            job.succeed(Embeddings(tuple(tuple(row) for row in message.vectors), message.prompt_tokens))
        return True

    def interrupt(self, reason: str) -> tuple[int, int]:
        """The worker has ended; how many requests go on, and how many are given up, having ended too many."""
        now = self._shared.clock()
        jobs = sorted(self._running.values(), key=lambda job: job.since_s)
        self._running.clear()
        going, poison = [], 0
        for job in jobs:
            job.leave(now)
            job.deaths += 1
            job.interrupted = reason
            if job.deaths < POISON_AFTER:
                going.append(job)
                continue
            poison += 1
            why = f"{job.deaths} workers in a row ended over this request, the last one so: {reason}"
            job.fail(WorkerError(f"model {self._name}: {why}"))
        self._resuming.extendleft(reversed(going))
        return len(going), poison

    def fail(self, error: EdgertError) -> None:
        """All that wait or run fail with it; those set aside find out when they go on."""
        for job in (*self._running.values(), *self._resuming, *self._queue.clear()):
            job.id = None
            job.fail(error)
        self._running.clear()
        self._resuming.clear()

    def end(self, error: EdgertError, worker: Worker | None) -> None:
        """As `fail`, for those set aside too; the worker is told, which would finish them otherwise."""
        if worker is not None:
            for number in self._running:
                worker.send(Cancel(number))
        self.fail(error)
        for job in self._aside:
            job.fail(error)
        self._aside.clear()

    def set_aside(self, job: Generation, worker: Worker | None) -> None:
        """Its reader does not read: others need the place, and what it would get must not fill the memory."""
        if job.id is not None:
            self._take_back(job, worker)
            job.aside = True
            self._aside.add(job)
            self._shared.wake()

    def go_on(self, job: Generation) -> None:
        """Its reader reads again."""
        job.aside = False
        if job in self._aside:
            self._aside.discard(job)
            self._wait_again(job)
            self._shared.wake()

    def _next(self, now: float, background: bool) -> Job | None:
        for _ in range(len(self._resuming)):
            job = self._resuming.popleft()
            if background or not job.background:
                return job
            self._resuming.append(job)
        return self._queue.pop(now, background=background)

    def _make_way(self, worker: Worker, places: int, *, aged: bool) -> bool:
        """Take back up to so many background generations, the youngest first; whether any was.

        One that has waited long enough to count as interactive keeps its place, unless `aged` ones go too.
        """
        now, aging_s = self._shared.clock(), self._shared.patience.aging_s
        jobs: Iterator[Job] = (
            job
            for job in sorted(self._running.values(), key=lambda job: -job.started_s)
            if job.background and isinstance(job, Generation) and (aged or now - job.since_s < aging_s)
        )
        taken = [job for job, _ in zip(jobs, range(places), strict=False)]
        for job in taken:
            self._take_back(job, worker)
            self._wait_again(job)
        return bool(taken)

    def _wait_again(self, job: Job) -> None:
        if job.background:
            self._queue.push(job, client=job.client, background=True, since_s=job.since_s, front=True)
        else:
            self._resuming.append(job)

    def _take_back(self, job: Job, worker: Worker | None) -> None:
        assert job.id is not None
        del self._running[job.id]
        if worker is not None:
            worker.send(Cancel(job.id))
        job.leave(self._shared.clock())

    def _feed(self, piece: Piece, emulated: bool, now: float) -> None:
        job = self._running.get(piece.id)
        if not isinstance(job, Generation):  # taken back meanwhile
            return
        if piece.finish_reason is not None:
            self._finish(job, now)
        if job.deaths >= SUSPECT_AFTER:  # it was not the request: others may join it
            self._shared.wake()
        joules = job.feed(piece, emulated=emulated)
        if piece.token is not None:
            self.tokens.add(1, now)
        self.prefill_s = max(self.prefill_s, piece.prefill_us / 1e6)
        self.provenance = piece.joules_provenance  # type: ignore[assignment]
        if joules:
            self.joules.add(joules, now)
            if not emulated:
                self._shared.spend(joules)

    def _finish(self, job: Job, now: float) -> None:
        assert job.id is not None
        del self._running[job.id]
        self._service_s += _WEIGHT * (now - job.started_s - self._service_s)
        self._shared.wake()


class Meter:
    """Sums of amounts over the last ten seconds. Plain data: the times are the caller's."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[float, float]] = deque()  # when each begins, and its sum

    def add(self, amount: float, now_s: float) -> None:
        if self._buckets and now_s - self._buckets[-1][0] < _GRAIN_S:
            begin, total = self._buckets[-1]
            self._buckets[-1] = (begin, total + amount)
            return
        self._forget(now_s)
        self._buckets.append((now_s, amount))

    def total(self, now_s: float) -> float | None:
        """Of the span; None where nothing came in it."""
        self._forget(now_s)
        return sum(amount for _, amount in self._buckets) if self._buckets else None

    def rate(self, now_s: float) -> float | None:
        """A second, since the oldest amount in the span; None where nothing came in it."""
        total = self.total(now_s)
        return None if total is None else total / max(now_s - self._buckets[0][0], _LEAST_RATE_S)

    def _forget(self, now_s: float) -> None:
        while self._buckets and now_s - self._buckets[0][0] > _SPAN_S:
            self._buckets.popleft()

"""One model of the pool: brings its requests and a worker together, and gets another worker when one ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal, cast

from edgert.errors import BundleError, EdgertError, WorkerError
from edgert.service.contract import EnergyProvenance, ModelState, ModelStatus
from edgert.service.footprint import OVERHEAD, bundle_bytes, resident_bytes
from edgert.service.pool.desk import Desk
from edgert.service.pool.idle import Rest
from edgert.service.pool.jobs import Job, error_of
from edgert.service.pool.recovery import FALLBACK_DEVICE, Recovery, culprits, lasting
from edgert.service.pool.shared import Shared
from edgert.service.pool.steering import Steering, load_message, park_folder
from edgert.service.pool.workers import Ended, Worker
from edgert.service.protocol import Drop, Dropped, Message, PlanUsed, Pong, Ready
from edgert.service.settings import ModelSettings

_FRESH_S = 15.0  # what a worker said about watts is shown for so long


class Hosted:
    """One model that the service knows.

    Attributes:
        desk: its requests.
        steering: its worker's plan and pace.
        worker: None while there is none.
        pinned: never evicted nor unloaded by itself.
        used_s: when something was last asked of it, for choosing whom to evict.
        room_since_s: since when it waits for memory; None while it does not.
        yielding: takes no more requests, as another model needs its memory.
    """

    def __init__(self, settings: ModelSettings, shared: Shared) -> None:
        self.settings = settings
        self.name = settings.name
        self.desk = Desk(settings.name, shared)
        self.steering = Steering(settings.name, shared.events)
        self.worker: Worker | None = None
        self.pinned = settings.pin
        self.used_s = shared.clock()
        self.room_since_s: float | None = None
        self.yielding = False
        self.restarts = 0
        self._shared = shared
        self._recovery = Recovery(shared.patience)
        self._leaving: Literal["unload", "evict", "again"] | None = None
        self._again = False  # wanted although nobody asks: it was loaded, and should be
        self._fell_back = False  # its worker runs on the most careful configuration, which nobody asked for
        self._error: EdgertError | None = None  # why nothing is tried until somebody asks again
        self._waiters: list[asyncio.Future[None]] = []  # for Ready
        self._gone: list[asyncio.Future[None]] = []  # for the worker's end
        self._rest = Rest(settings, shared.settings)
        self._task: str | None = None
        self._context: int | None = None
        self._ready_s = 0.0
        self._pong_s = 0.0

    @property
    def ready(self) -> bool:
        """Whether requests can run."""
        return self.worker is not None and self.worker.ready is not None and not self.worker.stopping

    @property
    def wanted(self) -> bool:
        return self.desk.wanting or bool(self._waiters) or self._again

    @property
    def idle(self) -> bool:
        """Whether unloading it would disturb nobody."""
        return self.ready and not self.desk.wanting and not self._waiters

    @property
    def state(self) -> ModelState:
        if self.ready:
            if self.desk.wanting:
                return "ready"
            return "parked" if self._rest.dropped else "idle"
        if self._error is not None and not self.wanted:
            return "failed"
        if self.worker is None and not self.wanted:
            return "unloaded"
        return "recovering" if self._recovery.failures else "loading"

    # --- what is asked of it

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn. Raises `BusyError`."""
        self.desk.submit(job)
        self._touch(job.keep_alive_s)

    def withdraw(self, job: Job) -> None:
        self.desk.withdraw(job, self.worker)

    async def load(self, pin: bool | None, keep_alive_s: float | None) -> None:
        """Wait until it is ready. Raises what it failed with."""
        self._touch(keep_alive_s)
        if pin is not None:
            self.pinned = pin
        self._shared.wake()
        if self.ready and self._leaving is None:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def unload(self) -> None:
        """Take no more requests until those that run have ended, and the worker too."""
        self._again, self._error = False, None
        self._end_waiters(WorkerError(f"model {self.name} was unloaded while it was being loaded"))
        if self.worker is not None:
            gone = asyncio.get_running_loop().create_future()
            self._gone.append(gone)
            self._leaving = "unload"
            self._shared.wake()
            await gone

    def evict(self) -> None:
        """Unload it for another one's sake."""
        self._leaving = "evict"
        self._step_down()

    def give_up(self, error: EdgertError) -> None:
        """Fail what waits, and try nothing until somebody asks again."""
        self._error, self._again, self.room_since_s = error, False, None
        self.desk.fail(error)
        self._end_waiters(error)
        self._shared.events.add("failure", self.name, str(error))

    def steer(self, pace: float, plan: str | None) -> None:
        """Ask its worker for a pace, for a plan, and for an answer, which says what it holds and draws."""
        if self.ready and self.worker is not None:
            self.steering.set_pace(self.worker, pace)
            if plan is not None:
                self.steering.use_plan(self.worker, plan)
            self.worker.ping()

    # --- what it does by itself

    def advance(self) -> bool:
        """Look at everything once more; whether it now needs memory for a worker. Doing it too often does no harm."""
        now, worker = self._shared.clock(), self.worker
        if worker is None:
            return self.wanted and now >= self._recovery.retry_at_s
        worker.watch(busy=self.desk.running > 0)
        if worker.stopping:
            return False
        if self._leaving is not None or self.yielding:
            if not self.desk.running:
                self._leaving = self._leaving or "evict"
                self._step_down()
        elif worker.ready is not None:
            self.desk.dispatch(worker)
            self._idle(now, worker)
        return False

    def due_s(self) -> float | None:
        """When `advance` has something to do by itself, on the clock."""
        now, worker = self._shared.clock(), self.worker
        if worker is None:
            return self._recovery.retry_at_s if self.wanted and now < self._recovery.retry_at_s else None
        dues = [worker.watch_at_s(busy=self.desk.running > 0)]
        if self.ready and self._rest.since_s is not None:
            dues += [self._rest.due_s(), self._well_again_s(worker)]
        return min((due for due in dues if due is not None), default=None)

    def start(self) -> None:
        """Start a worker. There must be memory for it, and no other one."""
        self.room_since_s = None
        try:
            avoid = self._shared.quarantine.avoided(self._shared.clock())
            load = load_message(self._shared.settings, self.settings, avoid)
        except EdgertError as error:
            self.give_up(error)
            return
        self._fell_back = self._recovery.fallback and load.device != FALLBACK_DEVICE
        if self._fell_back:
            load = replace(load, plan=None, device=FALLBACK_DEVICE, objective=None)
        self.worker = Worker(
            self.name,
            self._shared.command,
            load,
            clock=self._shared.clock,
            silence_s=self._shared.settings.step_timeout_s,
            stop_s=self._shared.patience.stop_s,
            on_message=self._take,
            on_end=self._ended,
        )

    def needs_bytes(self) -> int:
        """What a worker may come to hold. Raises `BundleError` where there is no bundle."""
        return int(bundle_bytes(self.settings.path) * OVERHEAD) + self._shared.settings.kv_bytes

    def holds_bytes(self) -> int:
        """What its worker holds, or may come to hold while it is loading."""
        if self.worker is None:
            return 0
        if self.worker.ready is None:
            try:
                return self.needs_bytes()
            except BundleError:
                return 0
        return self.resident_bytes() or 0

    def resident_bytes(self) -> int | None:
        pid = None if self.worker is None else self.worker.pid
        return None if pid is None else resident_bytes(pid)

    def watts(self) -> tuple[float | None, EnergyProvenance]:
        """Of the machine, as its worker has said lately, and where that comes from; None where unknown."""
        pong = None if self.worker is None else self.worker.pong
        if pong is None or self._shared.clock() - self._pong_s >= _FRESH_S:
            return None, "unavailable"
        return pong.watts, cast(EnergyProvenance, pong.watts_provenance)

    def status(self) -> ModelStatus:
        now, worker, desk = self._shared.clock(), self.worker, self.desk
        status = ModelStatus(
            self.name,
            task=self._task,
            state=self.state,
            pinned=self.pinned,
            context_length=self._context,
            memory_bytes=self.resident_bytes(),
            running=desk.running,
            waiting=desk.waiting,
            restarts=self.restarts,
            warnings=() if self._error is None else (str(self._error),),
        )
        if worker is None or worker.ready is None:
            return status
        blocks = self.steering.blocks
        tokens, joules = desk.tokens.total(now), desk.joules.total(now)
        watts, provenance = self.watts()
        idle_s, unload_s = self._rest.since_s, self._rest.unload_s()
        return replace(
            status,
            plan=self.steering.plan,
            blocks=blocks,
            devices=tuple(dict.fromkeys(block.device for block in blocks)),
            kv_bytes=None if worker.pong is None else worker.pong.kv_bytes,
            tokens_per_second=desk.tokens.rate(now),
            watts=watts,
            joules_per_token=joules / tokens if joules is not None and tokens else None,
            energy_provenance=provenance if joules is None else desk.provenance,
            loaded_s=now - self._ready_s,
            idle_s=None if idle_s is None else now - idle_s,
            unload_in_s=None if unload_s is None else max(0.0, unload_s - now),
            warnings=(*worker.ready.warnings, *self._warnings(worker)),
        )

    # --- how it goes on

    def _take(self, message: Message) -> None:
        worker = self.worker
        assert worker is not None
        if isinstance(message, Ready):
            self._became_ready(worker, message)
        elif isinstance(message, Pong):
            self._pong_s = self._shared.clock()
        elif isinstance(message, PlanUsed):
            self.steering.used(message)
        elif isinstance(message, Dropped):
            self._rest.dropped = self._rest.dropping
            if message.freed_bytes or message.parked:
                done = f"{message.parked} caches parked" if message.parked else "caches dropped"
                self._shared.events.add("park", self.name, f"{done}, {message.freed_bytes / 2**20:.0f} MiB given back")
        elif self.desk.take(message, worker):
            self._recovery.succeeded()

    def _became_ready(self, worker: Worker, message: Ready) -> None:
        now = self._shared.clock()
        self._task, self._context = message.task, message.context_length
        self.steering.begin(message)
        self._ready_s, self._rest.reload_s = now, now - worker.started_s
        self._again, self._error = False, None
        took = f"plan {message.plan}, ready after {self._rest.reload_s:.1f} s"
        if self._recovery.since_s is not None:
            after_s = now - self._recovery.since_s
            self._shared.events.add("recovery", self.name, f"{took}, {after_s:.1f} s after the failure")
            if not self.desk.wanting:  # usable, and nobody will give it a token to prove itself with
                self._recovery.since_s = None
        else:
            self._shared.events.add("load", self.name, took)
        self._recovery.unready = 0
        if not self.desk.wanting:
            self._rest.begin(now)
        self._end_waiters(None)
        self.steering.set_pace(worker, self._shared.pace)
        worker.ping()
        self._shared.wake()

    def _ended(self, ended: Ended) -> None:
        now, worker, leaving = self._shared.clock(), self.worker, self._leaving
        assert worker is not None
        self.worker, self._leaving, self.yielding = None, None, False
        self._rest.end()
        if ended.asked:
            self._again = leaving == "again"
            if leaving != "again":
                self._shared.events.add(leaving or "unload", self.name, f"after {now - worker.started_s:.0f} s")
        else:
            self._failed(worker, ended, now)
        for gone in self._gone:
            if not gone.done():
                gone.set_result(None)
        self._gone.clear()
        self._shared.wake()

    def _failed(self, worker: Worker, ended: Ended, now: float) -> None:
        ready = worker.ready
        going, poison = self.desk.interrupt(f"the worker {ended.reason}" if ended.failed is None else ended.reason)
        detail = f"worker: {ended.reason}; {going} requests go on" + (f", {poison} given up" if poison else "")
        self._shared.events.add("failure", self.name, detail)
        for unit in culprits(ended, [] if ready is None else self.steering.units):
            spell_s = self._shared.quarantine.add(unit, ended.reason, now)
            self._shared.events.add("quarantine", self.name, f"{unit} is left alone for {spell_s:.0f} s")
        if ended.failed is not None and lasting(ended):
            self._recovery.retry_at_s = now + self._shared.patience.backoff_s
            self.give_up(error_of(ended.failed.kind, ended.failed.message))
            return
        self._recovery.failed(now, ready=ready is not None, outside=ended.outside)
        if self._recovery.hopeless:
            count = self._recovery.unready
            self.give_up(WorkerError(f"model {self.name}: {count} workers in a row failed; the last: {ended.reason}"))
        else:
            self._again = self.pinned or self.settings.preload or self._again
        self.restarts += self.wanted

    def _step_down(self) -> None:
        """End the worker; what it remembers is parked first, where that is wanted."""
        if self.worker is not None and not self.worker.stopping:
            if self._shared.settings.park and self.ready and not self._rest.dropping:
                self._drop()
            self.worker.stop()

    def _drop(self) -> None:
        assert self.worker is not None
        self._rest.dropping = True
        self.worker.send(Drop(str(park_folder(self.settings.path)) if self._shared.settings.park else None))

    def _idle(self, now: float, worker: Worker) -> None:
        if self.desk.wanting:
            self._rest.end()
            return
        self._rest.begin(now)
        memory = self._shared.memory_bytes
        self._rest.climb(
            pinned=self.pinned,
            prefill_s=self.desk.prefill_s,
            held_share=self.holds_bytes() / memory,
            kv_share=(0 if worker.pong is None else worker.pong.idle_kv_bytes) / memory,
        )
        due, well_s = self._rest.due(now), self._well_again_s(worker)
        if due == "unload":
            self._leaving = "unload"
            self._step_down()
        elif well_s is not None and now >= well_s:
            self._leaving = "again"
            self._shared.events.add("recovery", self.name, "loaded again, as what failed may be well now")
            self._step_down()
        elif due == "drop":
            self._drop()

    def _well_again_s(self, worker: Worker) -> float | None:
        """When an idle worker that avoids hardware, or took the fallback, gives way to one as it should be."""
        ends = [self._shared.quarantine.end_s(unit) for unit in worker.load.avoid]
        if self._fell_back:
            ends.append(self._ready_s + self._shared.patience.again_s)
        return max(ends, default=None)

    def _warnings(self, worker: Worker) -> list[str]:
        found = [f"{unit} is avoided: {reason}" for unit, reason in worker.load.avoid.items()]
        if self._fell_back:
            found.append(f"runs on {FALLBACK_DEVICE} after several failures")
        held = () if worker.ready is None else worker.ready.sandbox
        return [*found, *(f"sandbox: {each}" for each in held if each.startswith("without "))]

    def _touch(self, keep_alive_s: float | None) -> None:
        self.used_s = self._shared.clock()
        self._rest.touch(keep_alive_s, self.used_s)

    def _end_waiters(self, error: EdgertError | None) -> None:
        for waiter in self._waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        self._waiters.clear()

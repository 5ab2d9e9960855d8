"""Which models are loaded: `Pool` is the `contract.Service` that `edgert serve` offers.

    pool = Pool(settings)
    async for delta in pool.generate(Request("qwen3", prompt="Once upon a time")):
        print(delta.text, end="")
    await pool.close(grace_s=30)

Everything that can change something, a request, a message, a worker's end, a time that has come, ends in `tick`, which
looks at all models. Between two ticks nothing runs: a service without requests sleeps until the next step of the idle
ladder is due, and with a worker alive it looks at the machine's power every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import edgert
from edgert.errors import EdgertError, WorkerError
from edgert.service.contract import Delta, Embeddings, Health, ModelStatus, Request, Status
from edgert.service.footprint import machine_bytes
from edgert.service.pool.events import Subscription
from edgert.service.pool.hosted import Hosted
from edgert.service.pool.jobs import Embedding, Generation
from edgert.service.pool.names import Names
from edgert.service.pool.recovery import Patience
from edgert.service.pool.room import make_room, shrink
from edgert.service.pool.shared import Shared
from edgert.service.power.machine import MachineReader, MachineState
from edgert.service.power.policy import Loaded, Policy
from edgert.service.settings import Settings

_log = logging.getLogger("edgert.service.pool.pool")
MEMORY_SHARE = 0.6  # of the machine's
POWER_S = 5.0  # between two looks at the machine
ANSWER_S = 1.0  # a loop without work answers within this
WORK_S = 10.0  # and one with work is heard of: a step may take seconds on a small machine
_END_S = 5.0  # workers may take to end when the service does


class Pool:
    """The models of the service. See `contract.Service` for its methods, and what they raise.

    Made inside the event loop that it is to run in. Models are loaded when they are first asked for, or by `load`.

    Args:
        settings: of the service.
        command: starts a worker.
        clock: seconds, monotonic. Timers run by it, but are waited for in real time: who injects one calls `tick`.
        patience: times of supervision.
        reader, policy: see `power`; None for this machine, and the settings.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        command: Sequence[str] = (sys.executable, "-P", "-m", "edgert.service.worker"),
        clock: Callable[[], float] = time.monotonic,
        patience: Patience | None = None,
        reader: MachineReader | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._policy = policy or Policy(settings)
        self._reader = reader
        self._shared = Shared(
            settings,
            command,
            clock,
            patience or Patience(),
            settings.memory_bytes or int(machine_bytes() * MEMORY_SHARE),
            self._wake,
            lambda joules: self._policy.spend(joules, clock()),
        )
        self._names = Names(settings)
        self._hosted: dict[str, Hosted] = {}
        self._rejected = 0  # by models that are forgotten
        self._began_s = clock()
        self._empty_s: float | None = clock()
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._power_s = clock()  # of the next look
        self._looking: asyncio.Task[None] | None = None
        self._mode = (self._policy.status(self._began_s).mode, True)
        self._drained: asyncio.Future[None] | None = None

    # --- contract.Service

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        hosted = self._find(request.model)
        job = Generation(
            request,
            self._clock(),
            on_unread=lambda job: hosted.desk.set_aside(job, hosted.worker),
            on_caught_up=lambda job: hosted.desk.go_on(job),
        )
        hosted.submit(job)
        try:
            while (delta := await job.next()) is not None:
                yield delta
        finally:
            hosted.withdraw(job)

    async def embed(
        self, model: str, texts: Sequence[str], *, client: str = "", keep_alive_s: float | None = None
    ) -> Embeddings:
        hosted = self._find(model)
        job = Embedding(client, False, keep_alive_s, self._clock(), texts=tuple(texts))
        hosted.submit(job)
        try:
            return await job.result
        finally:
            hosted.withdraw(job)

    async def load(self, model: str, *, pin: bool | None = None, keep_alive_s: float | None = None) -> ModelStatus:
        hosted = self._find(model)
        await hosted.load(pin, keep_alive_s)
        return hosted.status()

    async def unload(self, model: str) -> ModelStatus:
        hosted = self._find(model, closing=True)
        await hosted.unload()
        return hosted.status()

    def models(self) -> tuple[ModelStatus, ...]:
        known = {name: ModelStatus(name, pinned=own.pin) for name, own in self._names.all().items()}
        for name, hosted in self._hosted.items():
            if name in known or hosted.worker is not None:  # a bundle may have been taken away
                known[name] = hosted.status()
        return tuple(known[name] for name in sorted(known))

    def status(self) -> Status:
        now, models = self._clock(), self.models()
        return Status(
            edgert.__version__,
            now - self._began_s,
            models,
            self._policy.status(now),
            self._shared.events.last(),
            self._shared.memory_bytes,
            sum(model.memory_bytes or 0 for model in models),
            self._settings.queue,
            self._rejected + sum(hosted.desk.rejected for hosted in self._hosted.values()),
            self._shared.quarantine.avoided(now),
        )

    def events(self) -> Subscription:
        return self._shared.events.listen()

    async def health(self) -> Health:
        """See `contract.Service`. A loop that works need not answer at once, as a step may take seconds, but it must
        have been heard of within ten."""
        if self._shared.closing:
            return Health(False, "stopping")
        wrong = []
        for own in self._settings.models.values():
            hosted = self._hosted.get(own.name)
            if own.preload and (hosted is None or not hosted.ready) and not (hosted and hosted.state == "unloaded"):
                wrong.append(f"{own.name} is {'not loaded yet' if hosted is None else hosted.state}")
        up = [hosted for hosted in self._hosted.values() if hosted.ready]
        if not up:
            wrong += [f"{hosted.name} is {hosted.state}" for hosted in self._hosted.values() if hosted.wanted]
        alive = await asyncio.gather(*(self._alive(hosted) for hosted in up))
        wrong += [f"{hosted.name} does not answer" for hosted, answers in zip(up, alive, strict=True) if not answers]
        return Health(not wrong, "; ".join(dict.fromkeys(wrong)))

    # --- for the server

    async def close(self, grace_s: float) -> None:
        """Take no more requests, let those that are there finish for so long, and end all workers."""
        self._shared.closing = True
        if not all(hosted.desk.empty for hosted in self._hosted.values()):
            self._drained = self._loop.create_future()
            self._wake()
            await asyncio.wait([self._drained], timeout=grace_s)
        for hosted in self._hosted.values():
            hosted.desk.end(_stopping(), hosted.worker)
        ends = [self._loop.create_task(hosted.unload()) for hosted in self._hosted.values()]
        if ends:
            _, late = await asyncio.wait(ends, timeout=_END_S)
            for hosted in self._hosted.values():
                if late and hosted.worker is not None:
                    hosted.worker.kill("did not end with the service")
            if late:
                await asyncio.wait(late, timeout=_END_S)
        if self._looking is not None:
            self._looking.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._shared.events.close()

    def idle_since(self) -> float | None:
        """Since when nothing has been loaded nor asked for, on the clock; None while something is."""
        return self._empty_s

    # --- by itself

    def tick(self) -> None:
        """Look at all models, and set the timer for the next time."""
        self._woken = False
        now, models = self._clock(), list(self._hosted.values())
        for hosted in models:
            try:
                if not hosted.advance() or (self._shared.closing and not hosted.desk.wanting):
                    hosted.room_since_s = None
                elif make_room(hosted, models, self._shared):
                    hosted.start()
            except EdgertError as error:
                hosted.give_up(error)
            except Exception as error:  # a bug of ours must not leave the other models, and the timer, to themselves
                _log.exception("model %s", hosted.name)
                hosted.give_up(WorkerError(f"model {hosted.name}: {type(error).__name__} in the service"))
                if hosted.worker is not None:
                    hosted.worker.kill("was left by a mistake of the service")
        if all(hosted.room_since_s is None for hosted in models):
            for hosted in models:
                hosted.yielding = False
        empty = all(hosted.worker is None and hosted.desk.empty for hosted in models)
        self._empty_s = (now if self._empty_s is None else self._empty_s) if empty else None
        alive = [hosted for hosted in models if hosted.worker is not None]
        if alive and now >= self._power_s and self._looking is None:
            self._looking = self._loop.create_task(self._look())
        if self._drained is not None and not self._drained.done() and all(hosted.desk.empty for hosted in models):
            self._drained.set_result(None)
        dues = [hosted.due_s() for hosted in models]
        dues += [now + self._shared.patience.handover_s for hosted in models if hosted.room_since_s is not None]
        dues.append(max(self._power_s, now + 0.1) if alive else None)
        self._arm(min((due for due in dues if due is not None), default=None), now)

    async def _look(self) -> None:
        """Look at the machine, and let the policy decide."""
        try:
            now = self._clock()
            self._power_s = now + POWER_S
            if self._reader is None:
                self._reader = MachineReader()
            try:
                machine = await asyncio.to_thread(self._reader.read, now)
            except (OSError, ValueError):
                _log.exception("the machine's state cannot be read")
                machine = MachineState()
            up = [hosted for hosted in self._hosted.values() if hosted.ready]
            said = [hosted.watts() for hosted in up]
            watts = max((watts for watts, source in said if watts is not None and source != "emulated"), default=None)
            loaded = {
                hosted.name: Loaded(hosted.steering.offers, hosted.desk.running, hosted.desk.waiting_interactive())
                for hosted in up
            }
            decision = self._policy.decide(machine, loaded, self._clock(), watts=watts)
            if (decision.mode, decision.admit_background) != self._mode:
                self._mode = (decision.mode, decision.admit_background)
                self._shared.events.add("power", None, f"{decision.mode}: {decision.reason}")
            self._shared.pace, self._shared.background = decision.pace, decision.admit_background
            for hosted in up:
                hosted.steer(decision.pace, decision.plans.get(hosted.name))
            shrink(list(self._hosted.values()), self._shared)
        finally:
            self._looking = None
            self._wake()

    def _find(self, name: str, *, closing: bool = False) -> Hosted:
        """Raises `UnknownModelError`, and `WorkerError` when the service is about to end."""
        if self._shared.closing and not closing:
            raise _stopping()
        hosted = self._hosted.get(name)
        if hosted is None:
            own = self._names.find(name)
            self._forget()
            hosted = self._hosted[name] = Hosted(own, self._shared)
        return hosted

    def _forget(self) -> None:
        """Drop what is known of models whose bundles are gone, or a folder where they come and go would fill memory."""
        for name, hosted in list(self._hosted.items()):
            unused = hosted.worker is None and not hosted.wanted and hosted.desk.empty
            if unused and name not in self._settings.models and not hosted.settings.path.is_dir():
                self._rejected += hosted.desk.rejected
                del self._hosted[name]

    async def _alive(self, hosted: Hosted) -> bool:
        worker = hosted.worker
        assert worker is not None
        if await worker.answer(ANSWER_S):
            return True
        return hosted.desk.running > 0 and self._clock() - worker.heard_s < WORK_S

    def _wake(self) -> None:
        """Have `tick` called soon, once."""
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon(self.tick)

    def _arm(self, due_s: float | None, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if due_s is not None:
            self._timer = self._loop.call_later(max(0.0, due_s - now), self._wake)


def _stopping() -> WorkerError:
    return WorkerError("the service is stopping and takes no more requests")

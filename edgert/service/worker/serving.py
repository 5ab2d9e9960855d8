"""A worker at work: commands in, messages out, and the loop in between.

    commands thread   reads lines            Ping, Cancel, Pace … ─┐
    prompts thread    Start, Embed: tokens, grammars, replays ─────┼─▶ inbox ─▶ this thread: devices, and all answers
    plan thread       compiles another plan ───────────────────────┘

Only one thread drives devices and answers, so an answer means that the loop is alive. Prompts are made ready beside it,
as a long text or a large grammar takes longer than a token may.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from edgert.device import DeviceConfig, DeviceKind
from edgert.energy import find_meters
from edgert.errors import DeviceError, EdgertError, UsageError
from edgert.service import protocol
from edgert.service.protocol import Load, Message
from edgert.service.worker import parking, scheduling
from edgert.service.worker.embedding import Embedder, Texts, tokenized
from edgert.service.worker.generation import Generation
from edgert.service.worker.joules import Joules
from edgert.service.worker.loaded import OnPlan, language_of, open_bundle, put_on
from edgert.service.worker.loop import Limits, Loop
from edgert.service.worker.plans import chosen, offers, units
from edgert.towers import Towers

log = logging.getLogger("edgert")
LONGEST_PAUSE_S = 5.0  # for the sake of the pace, so that a worker is never silent for long


@dataclass(frozen=True)
class Broken:
    """A line was no message."""

    reason: str


@dataclass(frozen=True)
class Built:
    """Another plan is compiled, or `error` says why it is not."""

    name: str
    made: OnPlan | None
    error: str | None


Item = Message | Generation | Texts | Built | Broken | None


class Serving:
    """A loaded model. `receive` may be called from another thread, all else belongs to one.

    Args:
        load: what to serve.
        send: sends a message to the server.
        inbox: where what is to be done arrives.
        held: what the sandbox holds.

    Raises:
        EdgertError: the bundle, plan or device cannot be used.
    """

    def __init__(self, load: Load, send: Callable[[Message], None], inbox: SimpleQueue[Item], held: list[str]) -> None:
        self.exit_code: int | None = None
        self._load, self._send, self._inbox = load, send, inbox
        self._bundle = open_bundle(load)
        plan = chosen(load, self._bundle)
        self._offers = offers(plan, self._bundle, load.avoid)
        self._on = put_on(self._bundle, plan, load)
        self._name = next(iter(self._offers))
        cpu = DeviceConfig.parse(DeviceKind.CPU)
        width = self._on.executor.taken.width
        towers = Towers(self._bundle, lambda: self._on.plan, fallback=cpu, timeout_s=load.device_timeout_s, width=width)
        self._language = language_of(self._bundle, self._on.context, load, towers)
        meters = find_meters()
        window = meters.measure().__enter__() if meters.present else None  # open as long as the process
        self._joules = Joules(window, load.declared_watts)
        self._joules.use(units(plan), emulated=self._on.executor.emulated)
        self._loop: Loop | None = None
        self._embedder: Embedder | None = None
        if self._on.lanes is None:
            self._embedder = Embedder(self._bundle, self._on.executor)
        else:
            self._loop = Loop(
                self._on.lanes,
                places=self._on.places(load.max_sequences),
                most_idle=self._on.most_idle,
                limits=Limits(load.prefill_chunk, load.preempt_us),
                speed=self._on.speed,
                joules=self._joules,
                unit=self._on.unit,
            )
            if load.park is not None:
                parking.take_up(Path(load.park), self._bundle, self._on.lanes, self._loop.idle)
        self._share, self._not_before_s = 1.0, 0.0
        self._stopping = self._was_busy = self._was_background = False
        self._building: str | None = None
        self._wanted: str | None = None
        self._preparing: set[int] = set()  # requests that the other thread makes ready
        self._unwanted: set[int] = set()  # those of them that were cancelled meanwhile
        self._requests: SimpleQueue[protocol.Start | protocol.Embed | protocol.Stop] = SimpleQueue()
        threading.Thread(target=self._prepare, daemon=True, name="prompts").start()
        send(self._ready(held))

    def receive(self, message: Message | None) -> None:
        """Take a message of the server, in the order in which they came; None at the end of all."""
        if isinstance(message, protocol.Stop):
            self._requests.put(message)  # behind the requests before it
        elif isinstance(message, protocol.Start | protocol.Embed):
            self._preparing.add(message.id)
            self._requests.put(message)
        else:
            self._inbox.put(message)

    @property
    def busy(self) -> bool:
        return bool((self._loop is not None and self._loop.busy) or self._embedder)

    def listen(self) -> None:
        """Do what has arrived; waits for something where there is nothing to run, or where the pace asks for it."""
        while self.exit_code is None:
            if self._stopping and not self.busy and not self._preparing:
                self.exit_code = 0
                return
            wait_s = max(0.0, self._not_before_s - time.perf_counter()) if self.busy else None
            try:
                item = self._inbox.get(timeout=wait_s) if wait_s != 0 else self._inbox.get_nowait()
            except Empty:
                return
            self._handle(item)

    def work(self) -> None:
        """Run one step."""
        begin_s = time.perf_counter()
        if not self._was_busy:
            self._joules.rest()
        if self._loop is not None:
            self._let_others_first(self._loop.background_only)
            self._tell(self._loop.step())
        elif self._embedder:
            self._tell(self._embedder.step())
        end_s = time.perf_counter()
        self._not_before_s = end_s + min((end_s - begin_s) * (1 / self._share - 1), LONGEST_PAUSE_S)
        self._was_busy = self.busy

    def fail(self, error: Exception) -> None:
        """Tell the server that it is over."""
        kind = type(error).__name__ if isinstance(error, EdgertError) else "WorkerError"
        text = str(error) if isinstance(error, EdgertError) else f"{type(error).__name__} in the worker"
        self._send(protocol.Failed(kind, text, getattr(error, "unit", None)))
        self.exit_code = 1

    def _handle(self, item: Item) -> None:
        loop = self._loop
        match item:
            case None:
                self.exit_code = 0
            case Broken(reason):
                log.error("%s", reason)
                self.exit_code = 2
            case Generation() if loop is not None:
                self._arrived(item.id)
                self._add(loop, item)
            case Texts() if self._embedder is not None:
                self._arrived(item.id)
                if item.id not in self._unwanted:
                    self._embedder.add(item)
                self._unwanted.discard(item.id)
            case protocol.Refused():
                self._arrived(item.id)
                self._unwanted.discard(item.id)
                self._send(item)
            case protocol.Cancel(id):
                self._cancel(id)
            case protocol.Ping(id):
                self._send(self._pong(id))
            case protocol.Pace(share):
                self._share = min(1.0, max(0.05, share))
            case protocol.Drop(folder):
                self._send(self._drop(folder))
            case protocol.UsePlan(name):
                self._use(name)
            case Built():
                self._built(item)
            case protocol.Stop():
                self._stopping = True
            case _:
                log.error("%s is no message for a worker", type(item).__name__)
                self.exit_code = 2

    def _add(self, loop: Loop, generation: Generation) -> None:
        try:  # again, as the plan may have changed since
            self._language.check(generation.ids[: generation.prompt_tokens], generation.params.max_tokens)
        except UsageError as error:
            self._unwanted.discard(generation.id)
            self._send(_refused(generation.id, error))
            return
        if pieces := loop.add(generation):
            self._send(protocol.Step(pieces))
        if generation.id in self._unwanted:
            self._cancel(generation.id)

    def _arrived(self, id: int) -> None:
        self._preparing.discard(id)

    def _cancel(self, id: int) -> None:
        if id in self._preparing:
            self._unwanted.add(id)
            return
        self._unwanted.discard(id)
        if self._embedder is not None:
            self._embedder.cancel(id)
        if self._loop is not None and (pieces := self._loop.cancel(id)):
            self._send(protocol.Step(pieces))

    def _pong(self, id: int) -> protocol.Pong:
        return protocol.Pong(
            id,
            0 if self._loop is None else self._loop.kv_bytes,
            0 if self._loop is None else self._loop.idle.kv_bytes,
            self._joules.watts(),
            self._joules.provenance,
        )

    def _drop(self, folder: str | None) -> protocol.Dropped:
        if self._loop is None:
            return protocol.Dropped(0, 0)
        parked = 0 if folder is None else parking.park(self._loop.idle, self._bundle, Path(folder))
        return protocol.Dropped(self._loop.idle.close_all(), parked)

    def _tell(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._send(message)

    def _let_others_first(self, background: bool) -> None:
        if self._load.low_priority and background != self._was_background:
            scheduling.set_background(background)
            self._was_background = background

    # --- plans -------------------------------------------------------------------------------------------------------

    def _use(self, name: str) -> None:
        if name not in self._offers or self._loop is None:
            self._send(protocol.PlanUsed(name, f"plan {name!r} is none of {', '.join(map(repr, self._offers))}"))
        elif self._building is not None:  # the newest wish counts
            if self._wanted is not None:
                self._send(protocol.PlanUsed(self._wanted, f"{name!r} was asked for after it"))
            self._wanted = name
        elif name == self._name:
            self._send(protocol.PlanUsed(name))
        else:
            self._building = name
            threading.Thread(target=self._build, args=(name,), daemon=True, name="plan").start()

    def _build(self, name: str) -> None:
        made, error = None, None
        try:
            made = put_on(self._bundle, self._offers[name][1], self._load)
        except EdgertError as failure:
            error = str(failure)
        except Exception as failure:  # of whatever kind: the loop must hear of it
            log.exception("plan %s cannot be compiled", name)
            error = type(failure).__name__
        self._inbox.put(Built(name, made, error))

    def _built(self, item: Built) -> None:
        self._building = None
        error = item.error
        assert self._loop is not None
        if item.made is not None and item.made.lanes is not None:
            if self._loop.longest > item.made.context:
                error = f"a running request needs {self._loop.longest} tokens, this plan holds {item.made.context}"
            else:
                self._loop.move(item.made.lanes, item.made.speed, item.made.unit)
                self._loop.places = item.made.places(self._load.max_sequences)
                self._loop.idle.most = item.made.most_idle
                self._on, self._name = item.made, item.name
                self._language = replace(self._language, context=item.made.context)
                self._joules.use(units(item.made.plan), emulated=item.made.executor.emulated)
        self._send(protocol.PlanUsed(item.name, error))
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            self._use(wanted)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make requests ready, on a thread of its own."""
        while True:
            request = self._requests.get()
            try:
                if isinstance(request, protocol.Start):
                    self._need("decoder", "generate")
                    item: Item = Generation(request, self._language)
                elif isinstance(request, protocol.Embed):
                    self._need("encoder", "embed")
                    item = tokenized(request, self._language, self._bundle.facts.hidden_size)
                else:
                    item = request
            except EdgertError as error:
                assert not isinstance(request, protocol.Stop)
                item = _refused(request.id, error)
            except BaseException as error:  # a panic of a Rust library is no Exception, and must not end this thread
                assert not isinstance(request, protocol.Stop)
                log.error("a request cannot be made ready: %s", type(error).__name__)
                item = protocol.Refused(request.id, "UsageError", f"request: {type(error).__name__} while it was read")
            self._inbox.put(item)

    def _need(self, task: str, method: str) -> None:
        facts = self._bundle.facts
        if facts.task != task:
            raise UsageError(f"{method}: model {facts.name!r} is of task {facts.task!r}, expected {task!r}")

    def _ready(self, held: list[str]) -> protocol.Ready:
        return protocol.Ready(
            task=self._bundle.facts.task,
            context_length=self._on.context,
            plan=self._name,
            plans=[offer for offer, _ in self._offers.values()],
            sandbox=held,
            warnings=list(self._on.plan.warnings),
            emulated=self._on.executor.emulated,
        )


def _refused(id: int, error: EdgertError) -> protocol.Refused:
    tokens, limit = getattr(error, "tokens", 0), getattr(error, "limit", 0)
    return protocol.Refused(id, type(error).__name__, str(error), tokens, limit)


def serve(serving: Serving) -> int:
    """Run a worker to its end; the exit code."""
    while serving.exit_code is None:
        try:
            serving.listen()
            if serving.exit_code is None:
                serving.work()
        except OSError:
            raise
        except DeviceError as error:
            log.error("the worker fails: %s", error)
            serving.fail(error)
        except Exception as error:
            log.exception("the worker fails")
            serving.fail(error)
    return serving.exit_code

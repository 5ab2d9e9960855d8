"""Messages between the server and a worker: one JSON object a line, over the worker's standard input and output.

`encode` and `decode` are all that both sides need. Numbers of requests are the server's; a worker knows nothing of
HTTP. The first message of a worker is `Ready` or `Failed`; the first that it gets is `Load`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_LINE_BYTES = 64 * 2**20  # a prompt of a million tokens is far below


# --- to the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What a worker is for. Sent once, first.

    Attributes:
        bundle: its path.
        plan: a plan as JSON (`Plan.to_json`); None to let the worker choose: by `objective` and this machine's
            profile, else `CPU@kernels` where these load and the bundle lets them, else `CPU`.
        device: a device configuration instead, e.g. `CPU@f32`; None.
        objective: as `edgert.load`; None.
        avoid: hardware that must not be used (`DeviceConfig.unit`), with the reason: it is in quarantine.
        kv_bytes: memory for KV caches, running and idle ones together.
        max_tokens: of one answer where its `Start` does not say, if the context has that much left.
        park: a folder from which idle caches are taken up that `Drop` has put there; None for none.
        max_sequences: that run at once.
        prefill_chunk: tokens of a prompt that run in one step, at most.
        preempt_us: how long a step of a background request may take, so that an interactive one need not wait longer.
        threads: of the CPU, for inference; 0 for OpenVINO's choice.
        device_timeout_s: as `edgert.load`.
        declared_watts: by device, where no counter can be read.
        verify: compare the bundle's files with their hashes.
        sandbox: give up network, other files and new privileges before the bundle is opened, as far as the system lets.
        low_priority: take a low scheduling class while there is background work only.
    """

    bundle: str
    plan: dict[str, Any] | None = None
    device: str | None = None
    objective: str | None = None
    avoid: dict[str, str] = field(default_factory=dict)
    kv_bytes: int = 2**30
    max_tokens: int = 4096
    park: str | None = None
    max_sequences: int = 16
    prefill_chunk: int = 512
    preempt_us: float = 100_000.0
    threads: int = 0
    device_timeout_s: float = 60.0
    declared_watts: dict[str, float] = field(default_factory=dict)
    verify: bool = True
    sandbox: bool = True
    low_priority: bool = True


@dataclass(frozen=True)
class Start:
    """A generation; fields as in `contract.Request`.

    Attributes:
        generated: tokens that another worker has already generated and sent: they are not sent again, and what
            follows is what that worker would have sent. That takes a `seed` in `sampling`.
    """

    id: int
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    constraint: str | None = None
    constraint_value: Any = None
    reasoning_budget: int | None = None
    template: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    generated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Embed:
    id: int
    texts: list[str]


@dataclass(frozen=True)
class Cancel:
    """Nothing is answered but the last `Piece` of the request, if it was not sent before."""

    id: int


@dataclass(frozen=True)
class Ping:
    """Answered with `Pong` by the thread that drives the devices, so an answer means that the loop is alive."""

    id: int


@dataclass(frozen=True)
class UsePlan:
    """Let new requests run on another plan of `Ready.plans`; those that run go over at their next chunk or token."""

    name: str


@dataclass(frozen=True)
class Pace:
    """Run at most this share of the time, 0.05 to 1, so that mean power stays below a limit."""

    share: float


@dataclass(frozen=True)
class Drop:
    """Give back the KV caches that nobody uses.

    Attributes:
        park: a folder to keep them in, from which `Load` of the same bundle takes them up; None to forget them.
    """

    park: str | None = None


@dataclass(frozen=True)
class Stop:
    """End, once the requests that came before it are finished."""


# --- from the worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanOffer:
    """A plan that the worker can switch to.

    Attributes:
        name: unique.
        latency_us, energy_uj, watts: predicted for a typical request; None where nobody knows.
        units: the hardware in use.
        blocks: where blocks run: `contract.PlacedBlocks` as objects.
    """

    name: str
    latency_us: float | None
    energy_uj: float | None
    watts: float | None
    units: list[str]
    blocks: list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """The model is loaded and has computed a token.

    Attributes:
        task, context_length: the model's; the length is at most what the memory for caches holds.
        plan: the name of the one in use.
        plans: all that can be switched to, the one in use first.
        sandbox: what holds the worker, and what could not be had, as `sandbox.enter` says it.
        warnings: of the plan.
        emulated: whether a device is.
    """

    task: str
    context_length: int
    plan: str
    plans: list[PlanOffer]
    sandbox: list[str]
    warnings: list[str]
    emulated: bool


@dataclass(frozen=True)
class Started:
    """A generation has begun: its prompt is being prefilled.

    Attributes:
        prompt_tokens, cached_tokens: counts.
    """

    id: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """One token of one generation; fields as in `contract.Delta`. Times and joules are totals up to here."""

    id: int
    text: str
    token: int | None = None
    reasoning: bool = False
    token_text: str | None = None
    logprob: float | None = None
    top: list[list[Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    reasoning_tokens: int = 0
    prefill_us: float = 0.0
    decode_us: float = 0.0
    joules: float | None = None
    joules_provenance: str = "unavailable"


@dataclass(frozen=True)
class Step:
    """What one step gave, of all generations that took part, in one line."""

    pieces: list[Piece]


@dataclass(frozen=True)
class Vectors:
    id: int
    vectors: list[list[float]]
    prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """A request cannot be done, and the worker goes on.

    Attributes:
        kind: name of the class in `edgert.errors`, e.g. `ContextOverflowError`.
        tokens, limit: of that one.
    """

    id: int
    kind: str
    message: str
    tokens: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Pong:
    """The loop is alive.

    Attributes:
        kv_bytes: of all caches; `idle_kv_bytes` those that nobody uses now.
        watts: of the machine over the last seconds; None where unknown.
    """

    id: int
    kv_bytes: int
    idle_kv_bytes: int
    watts: float | None = None
    watts_provenance: str = "unavailable"


@dataclass(frozen=True)
class PlanUsed:
    """A switch that `UsePlan` asked for is done, or is not and `error` says why."""

    name: str
    error: str | None = None


@dataclass(frozen=True)
class Dropped:
    """`Drop` is done: bytes given back, and sequences parked."""

    freed_bytes: int
    parked: int


@dataclass(frozen=True)
class Failed:
    """The worker cannot go on, and ends.

    Attributes:
        kind: name of the class in `edgert.errors`.
        unit: the hardware that failed; None where it was something else.
    """

    kind: str
    message: str
    unit: str | None = None


Message = (
    Load | Start | Embed | Cancel | Ping | UsePlan | Pace | Drop | Stop
    | Ready | Started | Step | Vectors | Refused | Pong | PlanUsed | Dropped | Failed
)  # fmt: skip
_KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in Message.__args__}


def encode(message: Message) -> bytes:
    """A line, with its end.

    Raises:
        ValueError: the other side would not take it: it is too long, or nested too deeply.
    """
    # Not `asdict`, which copies what is in there piece by piece: for a large prompt that takes seconds.
    data: dict[str, Any] = dict(vars(message))
    if isinstance(message, Step):
        data["pieces"] = [_sparse(piece) for piece in message.pieces]
    elif isinstance(message, Ready):
        data["plans"] = [vars(offer) for offer in message.plans]
    try:
        line = json.dumps({"is": type(message).__name__, **data}, separators=(",", ":")).encode() + b"\n"
    except RecursionError as error:
        raise ValueError("nested too deeply for a message") from error
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{len(line)} bytes as a message, at most {MAX_LINE_BYTES} allowed")
    return line


def decode(line: bytes) -> Message:
    """A message of a line.

    Raises:
        ValueError: the line is none.
    """
    try:
        data = json.loads(line)
        kind = data.pop("is")
        if kind in _LISTS:
            name, cls = _LISTS[kind]
            data[name] = [cls(**each) for each in data[name]]
        message: Message = _KINDS[kind](**data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"message {line[:80]!r} is none that is known: {error!r:.200}") from error
    return message


def _sparse(piece: Piece) -> dict[str, Any]:
    """A piece without what has its default."""
    return {name: value for name, value in vars(piece).items() if value != _PIECE[name] or name in ("id", "text")}


_LISTS: dict[str, tuple[str, type[Any]]] = {"Step": ("pieces", Piece), "Ready": ("plans", PlanOffer)}
_PIECE = {**vars(Piece(0, "")), "id": None, "text": None}

"""What the HTTP side, the dashboard and the clients know of the engine: requests, what comes back, and the state shown.

`Service` is what `pool.Pool` offers. Everything here is plain data; `to_json` of each is what `/v1/status` shows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

Priority = Literal["interactive", "background"]
FinishReason = Literal["stop", "length", "cancelled"]
ConstraintKind = Literal["json", "json_schema", "regex", "lark", "choice"]
ModelState = Literal["unloaded", "loading", "ready", "idle", "parked", "recovering", "failed"]
EnergyProvenance = Literal["measured", "estimated", "modelled", "unavailable", "emulated"]


@dataclass(frozen=True)
class Constraint:
    """What the generated text must look like.

    Attributes:
        kind: `json` (any JSON object), `json_schema`, `regex`, `lark` (llguidance's dialect), `choice`.
        value: the schema (an object), the pattern, the grammar, the list of texts; None for `json`.
    """

    kind: ConstraintKind
    value: Any = None


@dataclass(frozen=True)
class Request:
    """One generation. Exactly one of `prompt` and `messages` is given.

    Attributes:
        model: its name, as in `ModelStatus.name`; never a path.
        prompt: text, or token ids.
        messages, tools: a conversation and JSON schemas of functions, for the model's chat template. Content is text,
            or a list of parts of types `text`, `image_url` (with a `data:` URL) and `input_audio`, as OpenAI writes
            them.
        sampling: fields of `edgert.SamplingParams`; what is missing has its default. `max_tokens` missing: what is
            left of the context, at most the service's own limit.
        constraint: None for free text.
        reasoning_budget: tokens that the model may think before it must answer; None for no limit. Only models whose
            template opens a block of thoughts have one.
        template: more variables for the chat template, e.g. `{"enable_thinking": False}`.
        priority: background requests wait while interactive ones run.
        client: whom queueing is fair to; any text.
        keep_alive_s: how long the model stays loaded after this request; None for the service's default, negative for
            ever, 0 to unload at once.
    """

    model: str
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    reasoning_budget: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority = "interactive"
    client: str = ""
    keep_alive_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """What a generation took so far.

    Attributes:
        prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: counts; cached ones were not prefilled.
        queue_us: waiting for a place, and for the model to load.
        prefill_us, decode_us: inside the devices. Steps that several sequences share count whole for each.
        provenance: `measured`, or `emulated` where a device is.
        joules: of the machine, this request's share; None where nobody knows.
        joules_provenance: where `joules` come from.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_us: float = 0.0
    prefill_us: float = 0.0
    decode_us: float = 0.0
    provenance: Literal["measured", "emulated"] = "measured"
    joules: float | None = None
    joules_provenance: EnergyProvenance = "unavailable"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Delta:
    """What one step adds to a generation.

    Attributes:
        text: complete characters; may be empty.
        reasoning: whether the text is the model's thoughts, not its answer.
        token: its id; None for a closing delta that only flushes text.
        token_text: the token as text of its own, for `logprobs`; None unless these were asked for.
        logprob, top: as `edgert.results.Piece`, `top` as (id, text, logprob).
        finish_reason: set on the last delta.
        usage: set on the last delta.
        notes: what the reader should know, e.g. that a device failed and another one goes on.
    """

    text: str
    reasoning: bool = False
    token: int | None = None
    token_text: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embeddings:
    """Vectors of length 1, f32 `[texts][hidden]`, and the tokens that they were made of."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True)
class PlacedBlocks:
    """Neighbouring blocks of a plan on one device configuration; both ends count.

    Attributes:
        phase: `prefill` or `decode`; `both` where the plan does not tell them apart.
        kinds: how many blocks of each kind, e.g. `{"attention": 4, "ffn": 4}`.
    """

    phase: Literal["prefill", "decode", "both"]
    first: int
    last: int
    device: str
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class ModelStatus:
    """A model that the service knows.

    Attributes:
        name: what requests call it.
        task: `decoder` or `encoder`; None while nobody has looked.
        state: `idle` has no request, `parked` also no KV cache in memory, `recovering` gets a new worker.
        pinned: never evicted nor unloaded by itself.
        plan: the name of the plan, e.g. `single device CPU@kernels`; None while unloaded.
        blocks: where its blocks run.
        devices: configurations in use.
        memory_bytes: of the worker, resident; None while there is none. measured
        kv_bytes: of KV caches, idle ones too.
        context_length: tokens.
        running, waiting: requests.
        tokens_per_second: generated over the last seconds, of all its requests; None where nothing ran.
        watts, joules_per_token: over the last seconds; None where unknown, with `energy_provenance`.
        loaded_s, idle_s: since it was loaded, and since its last request ended.
        unload_in_s: seconds until it is unloaded if nothing comes; None for never.
        restarts: of its worker, since the service began.
        warnings: what is not as it was asked for: fallbacks, a failed device.
    """

    name: str
    task: str | None = None
    state: ModelState = "unloaded"
    pinned: bool = False
    plan: str | None = None
    blocks: tuple[PlacedBlocks, ...] = ()
    devices: tuple[str, ...] = ()
    memory_bytes: int | None = None
    kv_bytes: int | None = None
    context_length: int | None = None
    running: int = 0
    waiting: int = 0
    tokens_per_second: float | None = None
    watts: float | None = None
    joules_per_token: float | None = None
    energy_provenance: EnergyProvenance = "unavailable"
    loaded_s: float | None = None
    idle_s: float | None = None
    unload_in_s: float | None = None
    restarts: int = 0
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ServiceEvent:
    """Something that a person may want to know of.

    Attributes:
        number: counts up from 1.
        at_s: seconds since 1970, UTC.
        kind: `load`, `unload`, `evict`, `park`, `plan`, `failure`, `recovery`, `quarantine`, `power`, `reject`.
        model: its name; None for the service itself.
        detail: one line, without any prompt's text.
    """

    number: int
    at_s: float
    kind: str
    model: str | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PowerStatus:
    """What the power policy sees and does.

    Attributes:
        policy: as it was asked for: `saver`, `balanced`, `performance`, `auto`.
        mode: what that means now; never `auto`.
        reason: why, in words.
        on_battery, battery_share, throttled, user_active: what the machine says; None where it does not.
        max_watts, joules_per_hour: limits; None for none.
        spent_joules: in the last hour; None where unknown.
    """

    policy: Literal["saver", "balanced", "performance", "auto"] = "auto"
    mode: Literal["saver", "balanced", "performance"] = "performance"
    reason: str = ""
    on_battery: bool | None = None
    battery_share: float | None = None
    throttled: bool | None = None
    user_active: bool | None = None
    max_watts: float | None = None
    joules_per_hour: float | None = None
    spent_joules: float | None = None


@dataclass(frozen=True)
class Status:
    """The whole service, as `/v1/status` shows it.

    Attributes:
        version: of edgert.
        uptime_s: since the service began.
        memory_limit_bytes: of all workers together; None for none.
        memory_bytes: of all workers now, resident.
        queue_limit: requests that may wait, of each model.
        rejected: requests turned away because the queue was full.
        quarantined: hardware that failed and is left alone, with the reason.
    """

    version: str
    uptime_s: float
    models: tuple[ModelStatus, ...]
    power: PowerStatus
    events: tuple[ServiceEvent, ...] = ()
    memory_limit_bytes: int | None = None
    memory_bytes: int | None = None
    queue_limit: int = 0
    rejected: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Health:
    """`ready` only after a worker has answered just now, or where nothing is loaded and nothing should be.

    Attributes:
        detail: what is wrong or going on, in one line.
    """

    ready: bool
    detail: str = ""


class Service(Protocol):
    """The engine as the HTTP side sees it. All errors are `EdgertError`s.

    Raises, from whatever takes a model's name: `UnknownModelError`. From `generate`, `embed` and `load`:
    `UsageError` and its kin for what the request asks, `BusyError` when a queue is full, `WorkerError` when no worker
    can be brought to do it, `BundleError`, `DeviceError`.
    """

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """An async generator. Closing it, or cancelling its task, cancels the generation.

        What is wrong with the request is raised by the first step.
        """
        ...

    async def embed(
        self, model: str, texts: Sequence[str], *, client: str = "", keep_alive_s: float | None = None
    ) -> Embeddings: ...

    async def load(self, model: str, *, pin: bool | None = None, keep_alive_s: float | None = None) -> ModelStatus:
        """Load a model, waiting until it is ready; does nothing but pin or unpin one that is."""
        ...

    async def unload(self, model: str) -> ModelStatus:
        """Unload a model once its running requests have ended; pinned ones too."""
        ...

    def models(self) -> tuple[ModelStatus, ...]: ...

    def status(self) -> Status: ...

    def events(self) -> AsyncIterator[ServiceEvent]:
        """Events as they come, from now on, until it is closed."""
        ...

    async def health(self) -> Health:
        """Asks the loaded workers' loops for an answer, within a second."""
        ...

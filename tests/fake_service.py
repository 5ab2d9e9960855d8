"""A `contract.Service` without an engine: its models say what a test wrote down, and it notes what it was asked.

`echo` repeats the prompt word by word; `scripts` holds lists of deltas by model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from edgert.errors import EdgertError, UnknownModelError
from edgert.service.contract import (
    Delta,
    Embeddings,
    Health,
    ModelStatus,
    PowerStatus,
    Request,
    ServiceEvent,
    Status,
    Usage,
)

USAGE = Usage(
    prompt_tokens=7, cached_tokens=3, completion_tokens=5, reasoning_tokens=1, queue_us=1500.0, prefill_us=2500.0,
    decode_us=4000.0, joules=0.5, joules_provenance="measured",
)  # fmt: skip


def words(text: str, *, finish: str = "stop", usage: Usage = USAGE) -> list[Delta]:
    """A generation that says the text, a word a token, with logprobs."""
    parts = [part + " " for part in text.split(" ")] if text else []
    if parts:
        parts[-1] = parts[-1][:-1]
    said = [
        Delta(part, token=number, token_text=part, logprob=-0.5, top=((number, part, -0.5), (99, "no", -1.5)))
        for number, part in enumerate(parts)
    ]
    return [*said, Delta("", finish_reason=finish, usage=usage)]  # type: ignore[arg-type]


Script = Sequence[Delta] | Callable[[Request], Sequence[Delta]]


class FakeService:
    """Attributes:
    requests: that `generate` was asked, in order.
    embedded, loaded, unloaded: arguments, in order.
    closed: how many generations were ended before they were over.
    produced: how many deltas were given away.
    """

    def __init__(
        self,
        scripts: Mapping[str, Script] | None = None,
        *,
        error: EdgertError | None = None,
        error_after: int = 0,
        then: Callable[[int], object] | None = None,
    ) -> None:
        self.scripts = dict(scripts or {})
        self.error = error
        self.error_after = error_after
        self.then = then  # called with the number of each delta before it is given
        self.requests: list[Request] = []
        self.embedded: list[list[str]] = []
        self.loaded: list[tuple[str, bool | None, float | None]] = []
        self.unloaded: list[str] = []
        self.closed = 0
        self.produced = 0
        self.ended = asyncio.Event()
        self.ready = Health(True)
        self.state = "ready"
        self.past: tuple[ServiceEvent, ...] = ()
        self.news: asyncio.Queue[ServiceEvent | None] = asyncio.Queue()

    def _known(self, model: str) -> None:
        if model != "echo" and model not in self.scripts:
            raise UnknownModelError(f"no model is named {model[:100]!r}")

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self._known(request.model)
        script = self.scripts.get(request.model) or words(_last_text(request))
        if callable(script):
            script = script(request)
        over = False
        try:
            for number, delta in enumerate(script):
                if self.error is not None and number == self.error_after:
                    raise self.error
                if self.then is not None:
                    await self.then(number)  # type: ignore[misc]
                await asyncio.sleep(0)
                self.produced += 1
                yield delta
            over = True
        finally:
            self.closed += not over
            self.ended.set()

    async def embed(
        self, model: str, texts: Sequence[str], *, client: str = "", keep_alive_s: float | None = None
    ) -> Embeddings:
        self._known(model)
        self.embedded.append(list(texts))
        return Embeddings(tuple((0.6, 0.8, float(number)) for number, _ in enumerate(texts)), 2 * len(texts))

    async def load(self, model: str, *, pin: bool | None = None, keep_alive_s: float | None = None) -> ModelStatus:
        self._known(model)
        self.loaded.append((model, pin, keep_alive_s))
        return replace(self.models()[0], name=model, pinned=bool(pin))

    async def unload(self, model: str) -> ModelStatus:
        self._known(model)
        self.unloaded.append(model)
        return ModelStatus(model)

    def models(self) -> tuple[ModelStatus, ...]:
        names = ["echo", *self.scripts]
        return tuple(
            ModelStatus(
                name, task="decoder", state=self.state, plan="CPU", context_length=512, memory_bytes=1000, kv_bytes=10
            )  # type: ignore[arg-type]
            for name in names
        )

    def status(self) -> Status:
        return Status("1.2.3", 10.0, self.models(), PowerStatus(), events=self.past, rejected=2)

    async def events(self) -> AsyncIterator[ServiceEvent]:
        while (event := await self.news.get()) is not None:
            yield event

    async def health(self) -> Health:
        return self.ready


def _last_text(request: Request) -> str:
    if request.messages:
        return str(request.messages[-1]["content"])
    return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt or ()))

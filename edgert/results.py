"""What a generation gives back, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]
Provenance = Literal["measured", "emulated"]


@dataclass(frozen=True)
class Event:
    """Something that happened while text was generated and that the reader should know.

    Attributes:
        kind: `failover`: a device failed and another one went on.
        unit: the hardware, e.g. `NPU`.
        tokens: tokens of the sequence that had been computed until then.
        detail: what happened and what was done about it, in one line.
    """

    kind: Literal["failover"]
    unit: str
    tokens: int
    detail: str


@dataclass(frozen=True)
class Timings:
    """Where the time of a generation went so far, by the process's clock.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: how many of them were still in a KV cache.
        new_tokens: tokens generated.
        prefill_us: inside the devices, for the prompt.
        decode_us: inside the devices, for tokens after the first.
        handover_us: how much of these two went into moving keys and values from one device to another.
        host_us: everything else: sampling, decoding to text, bookkeeping.
        ttft_us: from the call to the first token.
        provenance: `measured`; `emulated` where a device is, so that these times say nothing of a real one.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_us: float
    decode_us: float
    handover_us: float
    host_us: float
    ttft_us: float
    provenance: Provenance

    @property
    def tpot_us(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens and for emulated devices."""
        if self.new_tokens < 2 or self.provenance == "emulated":
            return None
        return self.decode_us / (self.new_tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed inside the devices; None where `tpot_us` is."""
        return 1e6 / self.tpot_us if self.tpot_us else None

    def to_json(self) -> dict[str, Any]:
        speeds = {"tpot_us": self.tpot_us, "tokens_per_second": self.tokens_per_second}
        return {**self.__dict__, **speeds}


@dataclass(frozen=True)
class Piece:
    """What one step of a stream adds.

    Attributes:
        text: new text, complete characters only; may be empty while a character or a stop string is undecided.
        token: the token that was generated; None for the closing piece that only flushes text.
        logprob: natural log of its probability, if `logprobs` was asked for.
        top: the most likely tokens as (id, logprob), best first, if asked for.
        timings: of the whole generation up to here.
        finish_reason: set on the last piece: `stop` (end token or stop string), `length` or `cancelled`.
        events: what happened since the piece before.
    """

    text: str
    token: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    timings: Timings
    finish_reason: FinishReason | None = None
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished generation.

    Attributes:
        text: the text, without stop string and special tokens.
        tokens: all generated tokens, the end token included.
        logprobs: of each token, if asked for.
        finish_reason: as in `Piece`.
        timings: as in `Piece`.
        events: all that happened.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finish_reason: FinishReason
    timings: Timings
    events: tuple[Event, ...] = ()


class Clock:
    """Adds up what `Timings` reports. The consumer's own time, between `pause` and `resume`, is not counted."""

    def __init__(self, provenance: Provenance) -> None:
        self.prompt_tokens = self.reused = self.new_tokens = 0
        self.prefill_us = self.decode_us = self.handover_us = self._ttft_us = self._before_us = 0.0
        self.events: list[Event] = []
        self._provenance = provenance
        self._since = time.perf_counter_ns()

    def devices(self, decode: bool, infer_us: float, handover_us: float) -> None:
        """Add the time of a call into the devices."""
        if decode:
            self.decode_us += infer_us
        else:
            self.prefill_us += infer_us
        self.handover_us += handover_us

    def news(self) -> tuple[Event, ...]:
        """The events since the last call of this."""
        events, self.events = tuple(self.events), []
        return events

    def checked(self) -> None:
        """Stop between the check of the arguments and the first step."""
        self._before_us += (time.perf_counter_ns() - self._since) / 1000

    def pause(self) -> Timings:
        self._before_us += (time.perf_counter_ns() - self._since) / 1000
        if self.new_tokens == 1:
            self._ttft_us = self._before_us
        return Timings(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused,
            new_tokens=self.new_tokens,
            prefill_us=self.prefill_us,
            decode_us=self.decode_us,
            handover_us=self.handover_us,
            host_us=self._before_us - self.prefill_us - self.decode_us,
            ttft_us=self._ttft_us,
            provenance=self._provenance,
        )

    def resume(self) -> None:
        self._since = time.perf_counter_ns()


def collect(pieces: Iterator[Piece]) -> Result:
    collected = list(pieces)
    last = collected[-1]
    assert last.finish_reason is not None
    generated = [piece for piece in collected if piece.token is not None]
    return Result(
        text="".join(piece.text for piece in collected),
        tokens=tuple(piece.token for piece in generated if piece.token is not None),
        logprobs=tuple(piece.logprob for piece in generated),
        finish_reason=last.finish_reason,
        timings=last.timings,
        events=tuple(event for piece in collected for event in piece.events),
    )

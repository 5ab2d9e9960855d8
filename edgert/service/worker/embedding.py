"""Texts to vectors between other work: a text a step, as `Model.embed` does it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgert.bundle import Bundle
from edgert.errors import DeviceFailedError, DeviceNonsenseError, UsageError
from edgert.executor import Executor
from edgert.service.protocol import MAX_LINE_BYTES, Embed, Vectors
from edgert.service.worker.generation import Language

NUMBER_BYTES = 25  # of a vector as JSON, `-1.2345678901234567e-05, ` and a little


@dataclass
class Texts:
    """A request: token ids of its texts, and the vectors so far."""

    id: int
    prompts: list[list[int]]
    vectors: list[list[float]] = field(default_factory=list)


def tokenized(request: Embed, language: Language, hidden_size: int) -> Texts:
    """A request's texts as tokens.

    Raises:
        UsageError, EmptyPromptError, ContextOverflowError: for what is no text, has no token, or has too many; or the
            vectors would be too much for one message.
    """
    if not request.texts:
        raise UsageError("embed: texts is empty, expected at least one")
    most = MAX_LINE_BYTES // (NUMBER_BYTES * hidden_size)
    if len(request.texts) > most:
        raise UsageError(f"embed: {len(request.texts)} texts, at most {most} are taken at once")
    prompts = []
    for text in request.texts:
        tokens = language.encode(text)
        language.check(tokens, 0)
        prompts.append(tokens)
    return Texts(request.id, prompts)


class Embedder:
    """The requests of an encoder."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self._pooling = bundle.facts.pooling
        self._run = executor.open()
        self._waiting: deque[Texts] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, texts: Texts) -> None:
        self._waiting.append(texts)

    def cancel(self, id: int) -> None:
        self._waiting = deque(texts for texts in self._waiting if texts.id != id)

    def step(self) -> list[Vectors]:
        """Compute one text; the answer, if it was the last of its request.

        Raises:
            DeviceFailedError: a device failed.
        """
        texts = self._waiting[0]
        texts.vectors.append(self._vector(texts.prompts[len(texts.vectors)]))
        if len(texts.vectors) < len(texts.prompts):
            self._waiting.rotate(-1)  # each request in turn
            return []
        self._waiting.popleft()
        return [Vectors(texts.id, texts.vectors, sum(map(len, texts.prompts)))]

    def _vector(self, tokens: Sequence[int]) -> list[float]:
        states = self._run.forward(tokens, keep=len(tokens))
        self._run.tokens.clear()  # an encoder keeps nothing
        vector = states[0] if self._pooling == "cls" else states.mean(axis=0)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm):
            error: DeviceFailedError = DeviceNonsenseError("a vector holds NaN or infinite values")
            error.unit = self._run.executor.plan.configs[-1].unit
            raise error
        vector = vector / max(norm, 1e-12)
        values: list[float] = vector.tolist()
        return values

"""Texts to vectors between other work: a text a step, as `Model.embed` does it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgert.bundle import Bundle
from edgert.errors import DeviceFailedError, DeviceNonsenseError, UsageError
from edgert.executor import Executor
from edgert.service.protocol import Embed, Vectors
from edgert.service.worker.generation import Language


@dataclass
class Texts:
    """A request: token ids of its texts, and the vectors so far."""

    id: int
    prompts: list[list[int]]
    vectors: list[list[float]] = field(default_factory=list)


def tokenized(request: Embed, language: Language) -> Texts:
    """A request's texts as tokens.

    Raises:
        UsageError, EmptyPromptError, ContextOverflowError: for what is no text, has no token, or has too many.
    """
    if not request.texts:
        raise UsageError("embed: texts is empty, expected at least one")
    prompts = [language.tokenizer.encode(text) for text in request.texts]
    for tokens in prompts:
        language.check(tokens, 0)
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

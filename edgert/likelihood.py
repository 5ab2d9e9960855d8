"""How well a model predicts a text: losses token by token, and what they say beside those of a reference.

The protocol of `docs/quality.md`: a document is cut into windows that overlap; a token is scored once, in the first
window that holds it, so that all but a document's first tokens see at least `window - stride` tokens before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError

Floats = NDArray[np.float64]
END_OF_TEXT = "<|endoftext|>"
_AT_ONCE = 2**22  # probabilities in memory, 16 MB


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads at once, from an empty cache.

    Attributes:
        tokens: at least two.
        first: index of the first token that is scored, at least 1: nothing predicts the one at 0.
    """

    tokens: tuple[int, ...]
    first: int

    @property
    def targets(self) -> NDArray[np.int64]:
        """The tokens that are scored; the logits of positions `first - 1` to the last but one predict them."""
        return np.array(self.tokens[self.first :], np.int64)


def documents(text: str) -> list[str]:
    """The documents of a text, which lines of `<|endoftext|>` separate; empty ones are left out."""
    parts = [part.strip() for part in text.split(END_OF_TEXT)]
    return [part for part in parts if part]


def windows(documents: Sequence[Sequence[int]], *, window: int, stride: int, bos: int | None = None) -> list[Window]:
    """Cut documents, given as tokens without special ones, into windows.

    Args:
        window: tokens of a window at most, `bos` included; at least 2.
        stride: tokens from the start of a window to that of the next, 1 to `window - 1`: the first token that a window
            scores must have one before it.
        bos: token that each window begins with; None for none.

    Raises:
        UsageError: window or stride are out of their range.
    """
    if window < 2:
        raise UsageError(f"window is {window}, the least is 2")
    if not 1 <= stride < window:
        raise UsageError(f"stride is {stride}, expected 1 to {window - 1} with a window of {window}")
    head = () if bos is None else (bos,)
    room = window - len(head)
    found = []
    for tokens in documents:
        scored = 0 if head else 1  # index in the document of the first token that is not scored yet
        for start in range(0, max(len(tokens) - room, 0) + stride, stride):
            part = tuple(tokens[start : start + room])
            if start + len(part) <= scored:
                break
            found.append(Window((*head, *part), scored - start + len(head)))
            scored = start + len(part)
    return found


class Prediction:
    """The distributions that logits stand for. What takes long is computed when first asked for, and kept.

    Elements are f32, sums over them f64: divergences are exact to about 1e-7 nats.

    Attributes:
        logits: f32 `[tokens, vocabulary]`, of each token less the highest.
    """

    def __init__(self, logits: NDArray[np.floating]) -> None:
        self.logits = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)

    @cached_property
    def totals(self) -> Floats:
        """Of each token the logarithm of the sum of all exponentials, which logits exceed log probabilities by."""
        totals: Floats = np.log(np.exp(self.logits).sum(axis=-1, dtype=np.float64))
        return totals

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """`[tokens, vocabulary]`."""
        shares: NDArray[np.float32] = np.exp(self.logits - self.totals[:, None].astype(np.float32))
        return shares

    @cached_property
    def likeliest(self) -> NDArray[np.intp]:
        """Of each token the likeliest next one."""
        found: NDArray[np.intp] = self.logits.argmax(axis=-1)
        return found

    def losses(self, targets: NDArray[np.int64]) -> Floats:
        """Of each token, nats: the negative logarithm of the probability of the right one."""
        found: Floats = self.totals - self.logits[np.arange(len(targets)), targets]
        return found

    def divergence(self, other: Prediction) -> Floats:
        """Of each token the Kullback-Leibler divergence of another prediction from this one, nats."""
        # Not as the difference of two logarithms of probabilities: rounding would hide what is small.
        moved = self.logits - other.logits
        moved *= self.probabilities
        found: Floats = moved.sum(axis=-1, dtype=np.float64) - (self.totals - other.totals)
        return found


@dataclass
class Losses:
    """What a model says of some windows, in nats; filled window by window.

    Attributes:
        loss: of each window, `[scored tokens]`: the negative logarithm of the probability of the right token.
        kl: of each window, `[scored tokens]`: Kullback-Leibler divergence from the reference's distribution; empty
            where there is no reference.
        agrees: of each window, `[scored tokens]`: whether the likeliest token is the reference's; as `kl`.
    """

    loss: list[Floats] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    agrees: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(
        self,
        logits: NDArray[np.floating],
        targets: NDArray[np.int64],
        reference: NDArray[np.floating] | Iterable[Prediction] | None = None,
    ) -> None:
        """Take in a window.

        Args:
            logits: `[targets, vocabulary]`.
            reference: logits of the reference, of the same shape, or what `parts` made of them.
        """
        others = parts(reference) if isinstance(reference, np.ndarray) else reference
        loss, kl, agrees, start = [], [], [], 0
        for own, other in zip(parts(logits), repeat(None) if others is None else others, strict=others is not None):
            right = targets[start : start + len(own.logits)]
            start += len(right)
            loss.append(own.losses(right))
            if other is not None:
                kl.append(other.divergence(own))
                agrees.append(own.likeliest == other.likeliest)
        self.loss.append(np.concatenate(loss))
        if others is not None:
            self.kl.append(np.concatenate(kl))
            self.agrees.append(np.concatenate(agrees))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.loss))

    @property
    def nats(self) -> float:
        """The sum of all losses."""
        return float(sum(part.sum() for part in self.loss))

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats / self.tokens))

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(sum(part.sum() for part in self.kl) / self.tokens)

    @property
    def agreement(self) -> float:
        """The share of tokens for which the likeliest is the reference's."""
        return float(sum(part.sum() for part in self.agrees) / self.tokens)


def parts(logits: NDArray[np.floating]) -> Iterator[Prediction]:
    """A window's logits in a few rows at a time, as what is computed of them takes as much memory again."""
    step = max(1, _AT_ONCE // logits.shape[-1])
    return (Prediction(logits[start : start + step]) for start in range(0, len(logits), step))


def increase(losses: Losses, reference: Losses) -> tuple[float, float]:
    """By how much perplexity is above that of a reference on the same windows, and the standard error of that.

    Both are relative: 0.01 is one percent. The differences of a window's tokens are not independent, so windows are
    what is resampled: the error is that of a ratio of sums over clusters (Cochran, Sampling Techniques, 1977, 6.4).
    It is infinite with a single window.
    """
    counts = np.array([len(part) for part in reference.loss], np.float64)
    pairs = zip(losses.loss, reference.loss, strict=True)
    sums = np.array([float((own - other).sum()) for own, other in pairs])
    mean = float(sums.sum() / counts.sum())
    n = len(counts)
    error = np.inf
    if n > 1:
        residuals = sums - mean * counts
        error = float(np.sqrt((residuals**2).sum() * n / (n - 1)) / counts.sum())
    return float(np.expm1(mean)), float(np.exp(mean) * error)

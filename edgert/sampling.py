"""From one row of logits to one token: what a generation is asked for, and the draw itself.

The order of the steps is that of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p
(`transformers/generation/utils.py`, `_get_logits_processor`), so the same numbers mean the same here and there. Before
the temperature come OpenAI's frequency and presence penalties and its bias, as
https://platform.openai.com/docs/api-reference/chat/create defines them, and the mask of a grammar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from edgert.errors import DeviceFailedError, SamplingError, UsageError

Floats = npt.NDArray[np.float32]

# Dividing by less than this overflows or rounds to a one-token distribution anyway, so it is greedy. vLLM draws the
# same line (`_SAMPLING_EPS`).
GREEDY_BELOW = 1e-5
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
_BLOCK = 512


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. The defaults are greedy.

    Attributes:
        temperature: divides the logits, 0 to 100; 0 (anything below 1e-5) takes the most likely token.
        top_k: keep the k most likely tokens (and those tied with the last); 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this probability, over 0 to 1; 1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one, 0 to 1; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the history, 0.01 to 100;
            1 is off (CTRL, arXiv:1909.05858, section 4.1).
        frequency_penalty: subtracted from a token's logit for each time that it was generated, -2 to 2.
        presence_penalty: subtracted once from the logits of tokens that were generated, -2 to 2.
        logit_bias: added to the logits of tokens, -100 to 100 by id; at most 1024, ids may be text as in JSON.
        seed: 0 to 2^64 - 1, the same tokens each time; None takes a fresh one from the operating system.
        max_tokens: at most this many tokens are generated, 1 to 2^31 - 1.
        stop: strings that end the text and are not part of it; at most 16, of 1 to 256 characters.
        logprobs: 0 to 100: report the log-probability of the chosen token and of that many best ones; None for none.

    Raises:
        SamplingError: a field is out of its range; the message names field, value and range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, 0, 100)
        _check("top_k", self.top_k, Integral, 0, 2**31 - 1)
        _check("top_p", self.top_p, Real, 0, 1)
        if self.top_p == 0:
            raise SamplingError(f"top_p is {self.top_p!r}, expected a number over 0 and up to 1")
        _check("min_p", self.min_p, Real, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, Real, 0.01, 100)
        _check("frequency_penalty", self.frequency_penalty, Real, -2, 2)
        _check("presence_penalty", self.presence_penalty, Real, -2, 2)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.seed is not None:
            _check("seed", self.seed, Integral, 0, 2**64 - 1)
        _check("max_tokens", self.max_tokens, Integral, 1, 2**31 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, Integral, 0, 100)
        if not isinstance(self.stop, (tuple, list)):
            raise SamplingError(f"stop is {_short(self.stop)}, expected a tuple of strings")
        if len(self.stop) > MAX_STOPS:
            raise SamplingError(f"stop holds {len(self.stop)} strings, at most {MAX_STOPS} allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise SamplingError(f"stop holds {_short(text)}, expected strings of 1 to {MAX_STOP_CHARS} characters")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW


class Sampling(TypedDict, total=False):
    """Keyword arguments of every generating method; see `SamplingParams` for meaning and ranges."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    logprobs: int | None


@dataclass(frozen=True)
class Sampled:
    """One chosen token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability; None unless `SamplingParams.logprobs` asked for it.
        top: the most likely tokens as (id, logprob), best first, lower id first among equals.

    Log-probabilities are those of the model's own distribution: the log-softmax of the logits as the device returned
    them, before penalty, temperature and truncation.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one generation; holds its random state and what the penalties have seen.

    Args:
        prompt_tokens: how many tokens of the history are the prompt, which the frequency and presence penalties leave
            out.
    """

    def __init__(self, params: SamplingParams, *, prompt_tokens: int = 0) -> None:
        self.params = params
        self._prompt_tokens = prompt_tokens
        self._bias = (
            np.fromiter(params.logit_bias, dtype=np.int64, count=len(params.logit_bias)),
            np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias)),
        )
        self._random = np.random.Generator(np.random.PCG64(None if params.seed is None else int(params.seed)))
        self._seen = np.zeros(0, dtype=np.bool_)
        self._consumed = 0
        # Reused from token to token: fresh megabytes each time cost more in page faults than the sampling itself.
        self._scratch = np.empty((2, 0), dtype=np.float32)

    def skip(self, tokens: int) -> None:
        """Go on as if so many tokens had been sampled, by another sampler of the same parameters."""
        if tokens > 0 and not self.params.greedy:
            self._random.random(tokens)

    def sample(
        self,
        logits: Floats,
        history: Sequence[int] | npt.NDArray[np.integer[Any]],
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> Sampled:
        """Choose the next token.

        Args:
            logits: float32[vocab], one row as the device returned it; it is not changed.
            history: ids of prompt and answer so far. Between calls it only grows at its end: just the new part is
                read (a shorter one starts over).
            allowed: bool[vocab], one at least: the tokens that may be chosen; None for all.

        Raises:
            DeviceFailedError: the logits are not one row of numbers, or hold NaN or nothing finite.
            UsageError: the history or the bias holds an id outside of the vocabulary.
        """
        raw = np.asarray(logits, dtype=np.float32)
        if raw.ndim != 1 or raw.size == 0:
            raise DeviceFailedError(f"device returned logits of shape {list(raw.shape)}, expected [vocab]")
        scores = raw if self.params.repetition_penalty == 1 else self._penalised(raw, history)
        scores = self._shifted(scores, history)
        if allowed is not None:
            if math.isnan(raw[raw.argmax()]):  # which the mask may hide
                raise DeviceFailedError(f"device returned logits that hold NaN (token {raw.argmax()})")
            scores = np.where(allowed, scores, np.float32(-np.inf))
        best = int(scores.argmax())
        # argmax stops at the first NaN, and where it finds an infinity nothing can be drawn: one look tells all.
        if not math.isfinite(scores[best]):
            raise DeviceFailedError(f"device returned logits whose largest is {scores[best]} (token {best})")
        token = best if self.params.greedy else self._draw(scores, scores[best])
        if self.params.logprobs is None:
            return Sampled(token)
        return _with_logprobs(token, raw, int(self.params.logprobs))

    def _penalised(self, raw: Floats, history: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Floats:
        if len(history) < self._consumed or self._seen.size != raw.size:
            self._seen = np.zeros(raw.size, dtype=np.bool_)
            self._consumed = 0
        new = np.asarray(history[self._consumed :], dtype=np.int64)
        self._check_ids("history", new, raw.size)
        self._seen[new] = True
        self._consumed = len(history)
        # Scanning 152k flags takes some 20 us, whatever the history's length.
        ids = np.flatnonzero(self._seen)
        penalty = np.float32(self.params.repetition_penalty)
        scores = raw.copy()
        scores[ids] = np.where(raw[ids] < 0, raw[ids] * penalty, raw[ids] / penalty)
        return scores

    def _shifted(self, scores: Floats, history: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Floats:
        """The scores after frequency and presence penalty and bias; the same array where there is none of them."""
        params = self.params
        generated = history[self._prompt_tokens :] if params.frequency_penalty or params.presence_penalty else ()
        if not len(generated) and not params.logit_bias:
            return scores
        scores = scores.copy()
        if len(generated):
            ids, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
            self._check_ids("history", ids, scores.size)
            scores[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
            scores[ids] -= np.float32(params.presence_penalty)
        biased, amounts = self._bias
        self._check_ids("logit_bias", biased, scores.size)
        scores[biased] += amounts
        return scores

    @staticmethod
    def _check_ids(name: str, ids: npt.NDArray[np.int64], vocab: int) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
            wrong = ids[(ids < 0) | (ids >= vocab)][0]
            raise UsageError(f"{name} holds token {wrong}, expected 0 to {vocab - 1}")

    def _draw(self, scores: Floats, best: np.float32) -> int:
        params = self.params
        ids: npt.NDArray[np.intp] | None = None
        if 0 < params.top_k < scores.size:
            # Before the exponential, which would make ties of close logits.
            ids = np.flatnonzero(scores >= _largest(scores, params.top_k))
            scores = scores[ids]
        if self._scratch.shape[1] < scores.size:
            self._scratch = np.empty((2, scores.size), dtype=np.float32)
        weights, spare = self._scratch[:, : scores.size]
        np.subtract(scores, best, out=weights)
        weights /= np.float32(params.temperature)
        np.exp(weights, out=weights)  # the best weighs 1
        if params.top_p < 1:
            _keep_nucleus(weights, params.top_p, spare)
        if params.min_p > 0:
            weights *= weights >= params.min_p
        # 1 - u lies in (0, 1], so the reached index always carries weight.
        index = _reach(weights, (1.0 - self._random.random()) * _sum(weights))
        return index if ids is None else int(ids[index])


def _keep_nucleus(weights: Floats, top_p: float, spare: Floats) -> None:
    """Set all weights to 0 but the smallest set of largest ones whose share is at least `top_p`.

    Among equal weights the lower index stays. Only the weights over a floor are sorted. This is exact: the set is a
    beginning of the descending order, so when the weights over the floor, themselves such a beginning, reach the
    target, the set lies within them; otherwise the floor drops, and at last all are sorted
    (in `spare`, as long as `weights`).
    """
    target = top_p * _sum(weights)
    ordered = spare
    for floor in (1e-3, 1e-6):
        over = weights >= np.float32(floor)
        if np.count_nonzero(over) > weights.size // 16:
            break  # gathering that many costs more than sorting all
        candidates = weights[over]
        if _sum(candidates) >= target:
            ordered = candidates
            break
    np.negative(weights if ordered is spare else ordered, out=ordered)
    ordered.sort()  # descending, contiguous
    np.negative(ordered, out=ordered)
    count = _reach(ordered, target) + 1
    last = ordered[count - 1]
    kept = weights >= last
    weights *= kept
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        weights[np.flatnonzero(weights == last)[-surplus:]] = 0


def _reach(weights: Floats, target: float) -> int:
    """First index at which the running sum of `weights` reaches `target` (over 0; the total, if it is more).

    Sums of blocks find the block, a running sum finds the place in it: several times faster than one running sum in
    float64 over a whole vocabulary. For a target over 0 the weight at the index is never 0.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = min(target, float(ends[-1]))
    block = int(np.searchsorted(ends, target))
    rest = target - (float(ends[block - 1]) if block else 0.0)
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    return int(starts[block] + np.searchsorted(inside, min(rest, float(inside[-1]))))


def _sum(weights: Floats) -> float:
    return float(weights.sum(dtype=np.float64))


def _largest(scores: Floats, count: int) -> np.float32:
    """The `count`-th largest score."""
    value: np.float32 = np.partition(scores, scores.size - count)[scores.size - count]
    return value


def _with_logprobs(token: int, raw: Floats, count: int) -> Sampled:
    best = float(raw.max())
    norm = best + math.log(_sum(np.exp(raw - np.float32(best))))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        count = min(count, raw.size)
        ids = np.flatnonzero(raw >= _largest(raw, count))
        ids = ids[np.argsort(-raw[ids], kind="stable")][:count]
        top = tuple((int(i), float(raw[i]) - norm) for i in ids)
    return Sampled(token, float(raw[token]) - norm, top)


def _biases(given: Mapping[Any, Any]) -> dict[int, float]:
    """Biases by token id."""
    if not isinstance(given, Mapping):
        raise SamplingError(f"logit_bias is {_short(given)}, expected numbers by token id")
    if len(given) > MAX_BIASES:
        raise SamplingError(f"logit_bias holds {len(given)} tokens, at most {MAX_BIASES} allowed")
    biases: dict[int, float] = {}
    for key, value in given.items():
        plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = int(key) if plain else key
        _check("logit_bias: token", token, Integral, 0, 2**31 - 1)
        _check(f"logit_bias[{token}]", value, Real, -100, 100)
        biases[int(token)] = float(value)
    return biases


def _check(name: str, value: Any, kind: type, low: float, high: float) -> None:
    wanted = "an integer" if kind is Integral else "a number"
    # bool is an Integral; `not (low <= value <= high)` also catches NaN.
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        raise SamplingError(f"{name} is {_short(value)}, expected {wanted} from {low} to {high}")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 60 else text[:57] + "..."

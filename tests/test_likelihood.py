"""The ruler: windows score each token once, losses are known by hand, and resampling confirms the standard error."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert import likelihood
from edgert.errors import UsageError
from edgert.likelihood import Losses, Prediction, documents, increase, windows

BOS = -1  # no token of a document


def test_documents_lie_between_ends_of_text() -> None:
    text = "\n One. \n\nStill one.\n<|endoftext|>\n\n<|endoftext|>Two.<|endoftext|>\n"
    assert documents(text) == ["One. \n\nStill one.", "Two."]
    assert documents(" \n<|endoftext|> ") == []


@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    window=st.integers(2, 20),
    share=st.floats(0, 1, exclude_max=True),
    bos=st.sampled_from([None, BOS]),
)
def test_windows_score_each_token_once_and_with_context(
    lengths: list[int], window: int, share: float, bos: int | None
) -> None:
    stride = 1 + int(share * (window - 1))
    # Each token is a number of its own, so that it says where it comes from.
    starts = np.cumsum([0, *lengths])
    texts = [list(range(a, b)) for a, b in pairwise(starts)]
    found = windows(texts, window=window, stride=stride, bos=bos)
    head = 0 if bos is None else 1
    scored = [int(token) for part in found for token in part.targets]
    assert scored == [token for text in texts for token in text[1 - head :]]
    for part in found:
        assert 1 <= part.first < len(part.tokens) <= window
        assert part.tokens[:head] == (bos,) * head
        text = next(text for text in texts if part.tokens[-1] in text)
        own = list(part.tokens[head:])
        at = text.index(own[0])
        assert own == text[at : at + len(own)]
        begins = at == 0  # nothing comes before a document but its bos
        assert begins or part.first >= window - stride


def test_the_last_window_is_no_longer_than_needed() -> None:
    parts = windows([range(10)], window=4, stride=2, bos=BOS)
    assert [(part.tokens, part.first) for part in parts] == [
        ((BOS, 0, 1, 2), 1), ((BOS, 2, 3, 4), 2), ((BOS, 4, 5, 6), 2), ((BOS, 6, 7, 8), 2), ((BOS, 8, 9), 2),
    ]  # fmt: skip
    assert [part.first for part in windows([range(4)], window=4, stride=3)] == [1]


@pytest.mark.parametrize(
    ("window", "stride", "bos", "message"),
    [
        (1, 1, None, "window is 1, the least is 2"),
        (8, 0, None, "stride is 0, expected 1 to 7"),
        (8, 8, None, "stride is 8, expected 1 to 7"),
        (8, 8, BOS, "stride is 8, expected 1 to 7"),
    ],
)
def test_windows_out_of_range(window: int, stride: int, bos: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        windows([range(20)], window=window, stride=stride, bos=bos)


def test_losses_by_hand() -> None:
    """Of two tokens: probabilities 1/4 and 3/4, then 1/2 each; the reference has 1/2 each, then 1/4 and 3/4."""
    own = np.log(np.array([[1, 3], [2, 2]], np.float32)) + np.array([[5], [-300]], np.float32)  # a shift is no change
    other = np.log(np.array([[1, 1], [1, 3]], np.float32))
    losses = Losses()
    losses.add(own, np.array([0, 1]), other)
    assert losses.loss[0] == pytest.approx([math.log(4), math.log(2)])
    assert losses.tokens == 2
    assert losses.perplexity == pytest.approx(math.sqrt(8))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert losses.kl[0] == pytest.approx([first, second], rel=1e-5)
    assert losses.mean_kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert losses.agrees[0].tolist() == [False, False]  # of two that are alike, the first one counts


def test_extreme_logits_stay_finite() -> None:
    found = Prediction(np.array([[-1e38, 0, 1e38], [1e4, 1e4, 1e4]], np.float32))
    assert found.losses(np.array([2, 0])) == pytest.approx([0, math.log(3)])
    assert not np.isnan(found.losses(np.array([0, 1]))).any()


def test_many_rows_are_taken_in_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, other, targets = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), rng.integers(0, 5, 7)
    whole, sliced = Losses(), Losses()
    whole.add(logits, targets, other)
    monkeypatch.setattr(likelihood, "_AT_ONCE", 10)  # two rows
    sliced.add(logits, targets, other)
    for name in ("loss", "kl", "agrees"):
        assert np.array_equal(getattr(whole, name)[0], getattr(sliced, name)[0]), name


@given(st.integers(0, 2**32 - 1), st.floats(0, 30))
def test_divergence_is_not_negative_and_nothing_from_itself(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits, other = rng.normal(size=(2, 6, 9)) * spread
    losses, same = Losses(), Losses()
    losses.add(logits, np.zeros(6, np.int64), other)
    same.add(logits, np.zeros(6, np.int64), logits)
    assert (losses.kl[0] > -1e-6).all()
    assert same.mean_kl == 0
    assert same.agreement == 1


def resampled(own: Losses, reference: Losses, draws: int, rng: np.random.Generator) -> float:
    """The standard deviation of the increase over windows drawn with replacement (bootstrap)."""
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, len(own.loss), len(own.loss))
        both = [np.concatenate([side.loss[i] for i in chosen]).mean() for side in (own, reference)]
        found.append(math.expm1(both[0] - both[1]))
    return float(np.std(found))


def test_increase_and_its_standard_error_against_a_bootstrap() -> None:
    """Windows of different lengths, whose tokens' differences have a part in common."""
    rng = np.random.default_rng(1)
    own, reference = Losses(), Losses()
    for _ in range(60):
        length = int(rng.integers(20, 80))
        loss = rng.gamma(2, 1.5, length)
        reference.loss.append(loss)
        own.loss.append(loss + 0.02 + 0.03 * rng.normal() + 0.1 * rng.normal(size=length))
    found, error = increase(own, reference)
    assert found == pytest.approx(own.perplexity / reference.perplexity - 1)
    assert error == pytest.approx(resampled(own, reference, 2000, rng), rel=0.1)
    tokens = np.concatenate(own.loss) - np.concatenate(reference.loss)
    assert error > 1.5 * tokens.std() / math.sqrt(len(tokens))  # as if tokens were independent: too small


def test_increase_of_a_model_over_itself_and_of_a_single_window() -> None:
    one = Losses(loss=[np.array([1.0, 2.0]), np.array([3.0])])
    assert increase(one, one) == (0, 0)
    found, error = increase(Losses(loss=[np.array([1.1])]), Losses(loss=[np.array([1.0])]))
    assert found == pytest.approx(math.expm1(0.1))
    assert math.isinf(error)

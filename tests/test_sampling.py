"""Sampling against a plain reference (full sort, float64) and against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgert.errors import DeviceFailedError, SamplingError, UsageError
from edgert.sampling import Sampler, SamplingParams, _reach


def reference(logits, params, history=()):
    """Probabilities after penalty, temperature and truncation, the slow way."""
    scores = np.array(logits, dtype=np.float64)
    for token in set(history):
        penalty = params.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = scores / params.temperature
    if params.top_k:
        scores[scores < np.sort(scores)[-min(params.top_k, scores.size)]] = -np.inf
    order = np.argsort(-scores, kind="stable")
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        # A boundary within float32's reach may fall on either side.
        assume(np.abs(before - params.top_p).min() > 1e-5)
        probabilities[order[before >= params.top_p]] = 0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


class Quantiles:
    """Stands in for the random generator: the given numbers in [0, 1), one after the other."""

    def __init__(self, values):
        self.values = iter(values)

    def random(self):
        return next(self.values)


def support(params, logits, history=(), draws=400):
    """Share of each token over evenly spaced random numbers: the sampler's distribution, without chance."""
    sampler = Sampler(params)
    sampler._random = Quantiles((np.arange(draws) + 0.5) / draws)
    tokens = [sampler.sample(logits, history).token for _ in range(draws)]
    return np.bincount(tokens, minlength=logits.size) / draws


@settings(max_examples=150, deadline=None)
@given(
    # A grid of quarters: equal values are ties, different ones differ by far more than float32 rounds.
    logits=st.lists(st.integers(-24, 24), min_size=1, max_size=40),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 2.0, 0.5]),
    data=st.data(),
)
def test_distribution_is_the_reference(logits, temperature, top_k, top_p, min_p, penalty, data):
    row = np.array(logits, dtype=np.float32) / 4
    history = data.draw(st.lists(st.integers(0, row.size - 1), max_size=8))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    expected = reference(row, params, history)
    # min_p on its very boundary is the other place where rounding decides.
    ratios = np.exp((row.astype(np.float64)[:, None] - row.astype(np.float64)[None, :]) / temperature)
    assume(min_p in (0.0, 1.0) or np.abs(ratios - min_p).min() > 1e-5)
    found = support(params, row, history)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() <= 1.01 / 400


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.01, 8), top_p=st.floats(0.01, 0.999))
def test_nucleus_of_large_vocabularies(seed, spread, top_p):
    """Thousands of tokens, peaked and flat, so that every floor and the full sort are used."""
    row = (np.random.default_rng(seed).standard_normal(3000) * spread).astype(np.float32)
    expected = reference(row, SamplingParams(temperature=1.0, top_p=top_p))
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p))
    cuts = np.concatenate([[0.0], np.cumsum(expected)])
    for token in np.flatnonzero(expected > 1e-4)[:20]:
        # 1 - u is the quantile that is asked for: the middle of this token's share.
        sampler._random = Quantiles([1.0 - (cuts[token] + cuts[token + 1]) / 2])
        assert sampler.sample(row, ()).token == token


def test_nucleus_among_equals_keeps_the_lower_ids():
    params = SamplingParams(temperature=1.0, top_p=0.45)
    found = support(params, np.zeros(10, dtype=np.float32))
    assert list(np.flatnonzero(found)) == [0, 1, 2, 3, 4]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0]), min_size=1, max_size=1500), share=st.floats(0, 1))
def test_reach_finds_the_running_sum(weights, share):
    row = np.array(weights, dtype=np.float32)
    assume(row.sum() > 0)
    total = float(row.sum(dtype=np.float64))
    target = max(share * total, 1e-300)
    index = _reach(row, target)
    sums = np.cumsum(row, dtype=np.float64)
    assert row[index] > 0
    assert sums[index] >= target * (1 - 1e-12)
    assert index == 0 or sums[index - 1] <= target * (1 + 1e-12)
    assert row[_reach(row, total * 2)] > 0


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_transformers(seed):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(500) * 3).astype(np.float32)
    history = rng.integers(0, 500, 60).tolist()
    params = SamplingParams(temperature=0.7, top_k=80, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=seed)
    scores = torch.from_numpy(row)[None]
    ids = torch.tensor([history])
    for step in (
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(80),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        scores = step(ids, scores)
    expected = scores.softmax(-1)[0].numpy()
    assert np.abs(support(params, row, history, 2000) - expected).max() <= 1.01 / 2000
    sampler = Sampler(params)
    drawn = {sampler.sample(row, history).token for _ in range(300)}
    assert drawn <= set(np.flatnonzero(expected).tolist())


def test_greedy_takes_the_first_best_and_changes_nothing():
    row = np.array([0, 3, 1, 3], dtype=np.float32)
    row.flags.writeable = False
    assert Sampler(SamplingParams()).sample(row, [1]).token == 1
    assert Sampler(SamplingParams(temperature=1e-8)).sample(row, []).token == 1
    assert Sampler(SamplingParams(temperature=1.0, top_k=1, seed=3)).sample(row[:3], []).token == 1


def test_repetition_penalty_follows_a_growing_history():
    row = np.array([4.0, 3.0, 2.5], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.sample(row, []).token == 0
    assert sampler.sample(row, [0]).token == 1
    assert sampler.sample(row, [0, 1]).token == 2
    assert sampler.sample(row, [1]).token == 0  # shorter: starts over
    assert sampler.sample(row, np.array([1, 0])).token == 2
    assert list(row) == [4.0, 3.0, 2.5]


def test_only_the_new_part_of_the_history_is_read():
    begins = []

    class History(list):
        def __getitem__(self, part):
            begins.append(part.start)
            return super().__getitem__(part)

    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    for length in (3, 4, 7):
        sampler.sample(np.zeros(9, dtype=np.float32), History(range(length)))
    assert begins == [0, 3, 4]


@pytest.mark.parametrize("token", [-1, 3])
def test_history_outside_of_the_vocabulary(token):
    with pytest.raises(UsageError, match=f"token {token}, expected 0 to 2"):
        Sampler(SamplingParams(repetition_penalty=2.0)).sample(np.zeros(3, dtype=np.float32), [0, token])


def test_seed_decides():
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def tokens(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.95, seed=seed))
        return [sampler.sample(row, []).token for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)
    # Fixed tokens: PCG64 and this arithmetic are the same on every platform.
    few = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=42))
    expected = [int(np.searchsorted([0.1, 0.3, 0.6, 1.0], 1 - u)) for u in np.random.default_rng(42).random(8)]
    assert [sampler.sample(few, []).token for _ in range(8)] == expected


def test_logprobs_are_of_the_raw_distribution():
    row = np.array([1.0, 5.0, 3.0, 5.0, -2.0], dtype=np.float32)
    exact = row - np.log(np.exp(row.astype(np.float64)).sum())
    params = SamplingParams(temperature=2.0, repetition_penalty=1.5, top_k=1, logprobs=3, seed=0)
    sampled = Sampler(params).sample(row, [1, 3])
    assert sampled.token in (1, 3)
    assert math.isclose(sampled.logprob, exact[sampled.token], abs_tol=1e-6)
    assert [i for i, _ in sampled.top] == [1, 3, 2]
    assert np.allclose([v for _, v in sampled.top], exact[[1, 3, 2]], atol=1e-6)
    everything = Sampler(SamplingParams(logprobs=100)).sample(row, [])
    assert len(everything.top) == 5
    assert math.isclose(sum(math.exp(v) for _, v in everything.top), 1, abs_tol=1e-6)
    assert Sampler(SamplingParams(logprobs=0)).sample(row, []).top == ()
    assert Sampler(SamplingParams()).sample(row, []).logprob is None


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, top_k=2)])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("row", [[1, math.nan, 2], [-math.inf, -math.inf], [1, math.inf], [], [[1.0, 2.0]]], ids=str)
def test_broken_logits_are_the_device_s_failure(params, penalty, row):
    params = SamplingParams(temperature=params.temperature, top_p=params.top_p, repetition_penalty=penalty)
    with pytest.raises(DeviceFailedError, match="device returned logits"):
        Sampler(params).sample(np.array(row, dtype=np.float32), [0])


def test_masked_tokens_are_never_drawn():
    row = np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32)
    found = support(SamplingParams(temperature=1.0, top_k=4), row)
    assert list(np.flatnonzero(found)) == [1, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-0.1, 101, math.nan, math.inf, True, "1", None)],
        *[("top_k", v) for v in (-1, 1.0, True, 2**31, None)],
        *[("top_p", v) for v in (0, 0.0, -1, 1.01, math.nan, False, "x")],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan, True)],
        *[("repetition_penalty", v) for v in (0, -1, 101, math.nan, True)],
        *[("seed", v) for v in (-1, 2**64, 0.5, True, 10**5000)],
        *[("max_tokens", v) for v in (0, -5, 1.5, 2**31, True, None)],
        *[("logprobs", v) for v in (-1, 101, 1.0, True)],
        *[("stop", v) for v in ("x", ("",), (1,), ("a" * 257,), ("a",) * 17, None, {"a"})],
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, int) or value < 10**20 else "huge",
)
def test_parameters_out_of_range(field, value):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} ")
    assert "\n" not in message
    assert len(message) < 200


def test_parameters_in_range():
    assert SamplingParams(temperature=1, top_p=1, stop=["a"]).stop == ("a",)
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=0).top_k == 3


# Penalties as OpenAI defines them, bias, masks, and going on in the middle


def test_frequency_and_presence_count_what_was_generated() -> None:
    logits = np.array([3.0, 2.5, 2.0, 1.0], np.float32)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, logprobs=1)
    sampler = Sampler(params, prompt_tokens=2)
    assert sampler.sample(logits, [0, 0]).token == 0  # the prompt does not count
    assert sampler.sample(logits, [0, 0, 0]).token == 1  # 3 - 0.5 - 0.25 < 2.5
    assert sampler.sample(logits, [0, 0, 0, 1, 1]).token == 0  # 2.25 against 1.25
    assert sampler.sample(logits, [0, 0, 0, 0, 0, 1, 1]).token == 2
    assert sampler.sample(logits, [0, 0, 0]).logprob == pytest.approx(
        2.5 - np.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-6
    )


def test_negative_penalties_reward() -> None:
    logits = np.array([1.0, 0.9], np.float32)
    assert Sampler(SamplingParams(presence_penalty=-1.0)).sample(logits, [1]).token == 1


def test_bias_shifts_tokens() -> None:
    logits = np.zeros(4, np.float32)
    params = SamplingParams(logit_bias={"2": 1, 3: -100})
    assert params.logit_bias == {2: 1.0, 3: -100.0}
    assert Sampler(params).sample(logits, []).token == 2
    with pytest.raises(UsageError, match="logit_bias holds token 9"):
        Sampler(SamplingParams(logit_bias={9: 1})).sample(logits, [])


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 2.1}, {"presence_penalty": float("nan")}, {"logit_bias": {1: 101}},
        {"logit_bias": {-1: 1}}, {"logit_bias": {"x": 1}}, {"logit_bias": [1]},
        {"logit_bias": dict.fromkeys(range(1025), 0)},
    ],
)  # fmt: skip
def test_penalties_and_bias_have_limits(options: dict[str, object]) -> None:
    with pytest.raises(SamplingError, match=next(iter(options))):
        SamplingParams(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    logits = np.array([9.0, 1.0, 8.0, 0.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1, logprobs=1))
    allowed = np.array([False, True, False, True])
    sampled = [sampler.sample(logits, [], allowed) for _ in range(20)]
    assert {each.token for each in sampled} <= {1, 3}
    assert sampled[0].top[0][0] == 0  # the model's own distribution
    with pytest.raises(DeviceFailedError, match="NaN"):
        sampler.sample(np.array([np.nan, 1, 1, 1], np.float32), [], allowed)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_skipping_is_sampling(temperature: float) -> None:
    logits = np.linspace(0, 3, 50, dtype=np.float32)
    params = SamplingParams(temperature=temperature, seed=11)
    sampler = Sampler(params)
    tokens = [sampler.sample(logits, []).token for _ in range(30)]
    for count in (0, 1, 17):
        other = Sampler(params)
        other.skip(count)
        assert [other.sample(logits, []).token for _ in range(30 - count)] == tokens[count:]

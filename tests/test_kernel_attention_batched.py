"""CachedAttention over several sequences in one call: each gets what it gets alone, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from attention_definition import BLOCK, Attention
from attention_steps import Step, garbage, operation, steps_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ops import Array, same_bits, with_threads

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

SMALL = Attention(4, 2, 16, 12, precision="i8", causal=True, rope_dims=8, norm=True, sinks=True)
SPANS = 512  # tokens whose results are computed apart and then joined


@dataclass
class Sequenced:
    """One sequence of a call: the step it takes, and its own cache as it was and as it becomes."""

    step: Step
    before: Array
    after: Array
    out: Array


def alone(
    random: np.random.Generator, attention: Attention, past: int, count: int, step: Step | None = None
) -> Sequenced:
    """What a sequence gets in a call of its own; its past is anything that was written there."""
    steps = steps_of(random, attention, [past, count] if past else [count], "causal")
    cache = garbage(random, attention, past + count)
    op = operation(attention)
    shared = step or steps[-1]
    steps = [replace(each, norms=shared.norms, sinks=shared.sinks) for each in steps]
    for each in steps[:-1]:
        op(*each.tensors(cache))
    before = cache.copy()
    out = op(*steps[-1].tensors(cache))
    return Sequenced(steps[-1], before, cache, out)


def several(
    random: np.random.Generator, attention: Attention, sizes: Sequence[tuple[int, int]]
) -> tuple[list[Sequenced], list[Array], Array, Array]:
    """Sequences of `past` and `new` tokens: each alone, a call of all, how the pool must look after it, the output."""
    first = alone(random, attention, *sizes[0])
    found = [first, *(alone(random, attention, *size, first.step) for size in sizes[1:])]
    order = random.permutation(len(found))
    pool, after, rows, at = [], [], np.zeros((len(found), 3), np.int64), 0
    for i in order:
        gap = garbage(random, attention, BLOCK)[: random.integers(2)]
        pool += [gap, found[i].before]
        after += [gap, found[i].after]
        rows[i] = found[i].step.count, found[i].step.past, at + len(gap)
        at += len(gap) + len(found[i].before)
    steps = [each.step for each in found]
    rope = (
        tuple(np.concatenate([step.rope[n] for step in steps if step.rope], axis=1) for n in (0, 1))
        if attention.rope_dims
        else None
    )
    joined = replace(first.step, qkv=np.concatenate([step.qkv for step in steps], axis=1), rope=rope)
    tensors = joined.tensors(np.concatenate(pool))
    tensors[2] = rows
    return found, tensors, np.concatenate(after), np.concatenate([each.out for each in found], axis=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=6),
    st.sampled_from(["i8", "f16", "bf16"]),
    st.integers(0, 2**32 - 1),
)
def test_each_gets_what_it_gets_alone(sizes: list[tuple[int, int]], precision: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    attention = replace(SMALL, precision=precision)
    _, tensors, pool, expected = several(random, attention, sizes)
    before = tensors[1].copy()
    for name, out in operation(replace(attention, batched=True)).on_all(*tensors):
        assert same_bits(out, expected), name
        assert np.array_equal(tensors[1], pool), name
        tensors[1][:] = before


@pytest.mark.parametrize("precision", ["i8", "f16"])
def test_long_and_short_ones_with_any_number_of_threads(precision: str) -> None:
    random = np.random.default_rng(5)
    attention = Attention(6, 2, 32, 32, precision=precision, causal=True)
    _, tensors, pool, expected = several(random, attention, [(SPANS - 1, 1), (2 * SPANS, 90), (0, 700), (1500, 1)])
    op = operation(replace(attention, batched=True))
    before = tensors[1].copy()
    for threads in (1, 2, 5):
        assert same_bits(with_threads(threads, lambda: op(*tensors)), expected), threads
        assert np.array_equal(tensors[1], pool)
        tensors[1][:] = before


def test_the_cpu_plugin_computes_the_same() -> None:
    random = np.random.default_rng(6)
    _, tensors, pool, expected = several(random, SMALL, [(20, 1), (0, 30), (5, 1)])
    request = operation(replace(SMALL, batched=True)).compiled(2).create_infer_request()
    assert same_bits(request.infer(tensors, share_inputs=True)[0], expected)
    assert np.array_equal(tensors[1], pool)


@pytest.mark.parametrize("precision", ["i8", "f16", "bf16"])
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_a_row_does_not_know_what_others_there_are(precision: str, chunk: int) -> None:
    """The same tokens in one go and in parts, over the end of a span, give the same to the bit."""
    random = np.random.default_rng(7)
    attention = Attention(3, 1, 16, 16, precision=precision, causal=True, rope_dims=16, sinks=True)
    total = SPANS + 100
    (whole,) = steps_of(random, attention, [total], "causal")
    op = operation(attention)
    caches = [np.zeros((-(-total // BLOCK), 1, attention.block_bytes), np.uint8) for _ in range(2)]
    expected = op(*whole.tensors(caches[0]))
    assert whole.rope is not None
    for at in range(0, total, chunk):
        rope = (whole.rope[0][:, at : at + chunk], whole.rope[1][:, at : at + chunk])
        part = replace(whole, past=at, qkv=whole.qkv[:, at : at + chunk], rope=rope)
        assert same_bits(op(*part.tensors(caches[1])), expected[:, at : at + chunk]), at
    assert np.array_equal(*caches)


ROWS = [[1, 20, 0], [4, 0, 2], [2, 3, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(0, 0): 0}, "sequence 0 has 0 new tokens, expected 1 to the 7 that are left"),
        ({(1, 0): -1}, "sequence 1 has -1 new tokens, expected 1 to the 6 that are left"),
        ({(1, 0): 7}, "sequence 1 has 7 new tokens, expected 1 to the 6 that are left"),
        ({(1, 0): 2**62}, "new tokens, expected 1 to the 6 that are left"),
        ({(1, 0): 3}, "the last 1 rows are of no sequence"),
        ({(0, 1): -1}, "sequence 0: past -1 and 1 new tokens do not fit the cache of 4 blocks from block 0"),
        ({(0, 1): 64}, "sequence 0: past 64 and 1 new tokens do not fit the cache of 4 blocks from block 0"),
        ({(0, 1): 2**62}, "new tokens do not fit the cache"),
        ({(2, 1): 15}, "sequence 2: past 15 and 2 new tokens do not fit the cache of 4 blocks from block 3"),
        ({(1, 2): -1}, "sequence 1: past 0 and 4 new tokens do not fit the cache of 4 blocks from block -1"),
        ({(1, 2): 4}, "sequence 1: past 0 and 4 new tokens do not fit the cache of 4 blocks from block 4"),
        ({(1, 2): 2**62}, "new tokens do not fit the cache"),
        ({(1, 2): 1}, "two sequences have block 1 of the cache"),
        ({(1, 2): 3}, "two sequences have block 3 of the cache"),
    ],
)
def test_refuses_what_would_go_wrong_and_changes_nothing(change: dict[tuple[int, int], int], message: str) -> None:
    attention = replace(SMALL, batched=True)
    (step,) = steps_of(np.random.default_rng(0), attention, [7], "causal")
    cache = np.zeros((4, 2, attention.block_bytes), np.uint8)
    tensors = step.tensors(cache)
    tensors[2] = np.array(ROWS, np.int64)
    op = operation(attention)
    op(*tensors)
    cache[:] = 0
    for place, value in change.items():
        tensors[2][place] = value
    with pytest.raises(RuntimeError, match=message):
        op(*tensors)
    assert not cache.any()


def test_no_sequence_and_no_rows() -> None:
    attention = replace(SMALL, batched=True)
    (step,) = steps_of(np.random.default_rng(0), attention, [1], "causal")
    tensors = replace(step, qkv=step.qkv[:, :0], rope=tuple(each[:, :0] for each in step.rope or ())).tensors(
        np.zeros((1, 2, attention.block_bytes), np.uint8)
    )
    tensors[2] = np.zeros((0, 3), np.int64)
    assert operation(attention)(*tensors).shape == (1, 0, 48)


def test_not_with_a_mask_and_not_with_another_shape() -> None:
    with pytest.raises(RuntimeError, match="batched must be false where there is a mask"):
        operation(Attention(4, 2, 8, 8, mask=True, batched=True))
    (step,) = steps_of(np.random.default_rng(0), SMALL, [3], "causal")
    tensors = step.tensors(np.zeros((1, 2, SMALL.block_bytes), np.uint8))
    with pytest.raises(RuntimeError, match=r"past must have shape \[\?,3\], got \[1\]"):
        operation(replace(SMALL, batched=True))(*tensors)

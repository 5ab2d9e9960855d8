"""CachedAttention: against its definition on every instruction set, and against OpenVINO's own attention."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import openvino as ov
import pytest
from attention_definition import Attention
from attention_steps import MASKS, Step, garbage, operation, steps_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ops import Array, Operation, core, same_bits, with_threads
from openvino import opset13 as ops

from edgert import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")

SIZES = {"plain": 1.0, "small": 1e-3, "large": 30.0}


def check_cache(attention: Attention, step: Step, before: Array, after: Array) -> None:
    """New rows are as near as the precision allows; nothing else has changed."""
    owned = attention.owned(len(before), step.past, step.total)
    assert np.array_equal(before[~owned], after[~owned])
    _, key, value = attention.split(step.qkv)
    key = attention.prepared(key, step.norms[1] if step.norms else None, step.rope)
    keys, values, key_steps, value_steps = (each[step.past : step.total] for each in attention.rows(after))
    rounding = 1e-5 * (1 + np.abs(key).max(axis=-1, keepdims=True))  # of norm and rotation, in f32
    assert (np.abs(keys - key) <= 0.5001 * key_steps + rounding).all()
    value_steps = np.broadcast_to(value_steps, values.shape)[..., : attention.value_dim]
    assert (np.abs(values[..., : attention.value_dim] - value) <= 0.5001 * value_steps).all()
    assert not values[..., attention.value_dim :].any()
    if attention.precision == "i8":
        np.testing.assert_allclose(key_steps, np.abs(key).max(axis=-1, keepdims=True) / 127, rtol=1e-4, atol=1e-37)
        np.testing.assert_allclose(
            value_steps[..., 0], np.abs(value).max(axis=-1) / np.float32(127), rtol=2e-7, atol=1e-37
        )


def check_output(attention: Attention, step: Step, cache: Array, out: Array) -> None:
    """Attention over what the cache holds now, but for the arithmetic: 15 bits of queries, 14 of weights."""
    query, _, _ = attention.split(step.qkv)
    query = attention.prepared(query, step.norms[0] if step.norms else None, step.rope)
    keys, values, _, _ = (each[: step.total] for each in attention.rows(cache))
    expected = attention.attend(query, keys, values, step.mask, step.sinks)
    steps = 2.0**-15 if attention.precision == "i8" else 2.0**-22
    highest_query = np.abs(query).max(axis=-1, initial=0.0).max(initial=0.0)
    score_error = attention.scale * highest_query * np.abs(keys).sum(axis=-1).max() * steps
    if step.mask is not None:
        score_error += 1e-6 * np.abs(step.mask, where=step.mask > -100, out=np.zeros(step.mask.shape)).max()
    bound = (2 * score_error + (3e-3 if attention.precision == "i8" else 3e-6)) * np.abs(values).max()
    found = out[0].reshape(expected.shape)
    assert (np.abs(found - expected) <= bound).all(), (np.abs(found - expected).max(), bound)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Attention, str]:
    kv_heads = draw(st.integers(1, 3))
    head_dim = 4 * draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 20, 32])))
    kind = draw(st.sampled_from(MASKS))
    made = Attention(
        heads=kv_heads * draw(st.integers(1, 7)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=4 * draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 20]))),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.05])),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        precision=draw(st.sampled_from(["i8", "i8", "f16", "bf16"])),
        rope_dims=draw(st.one_of(st.just(0), st.integers(1, head_dim // 2).map(lambda half: 2 * half))),
        norm=draw(st.booleans()),
        epsilon=draw(st.sampled_from([1e-6, 1e-2])),
        causal=kind == "causal",
        mask=kind not in ("none", "causal"),
        sinks=draw(st.booleans()),
    )
    return made, kind


@settings(max_examples=200, deadline=None)
@given(
    attentions(),
    st.lists(st.one_of(st.integers(1, 4), st.integers(5, 60)), min_size=1, max_size=4),
    st.sampled_from(sorted(SIZES)),
    st.integers(0, 2**32 - 1),
)
def test_is_its_definition_on_every_instruction_set(
    made: tuple[Attention, str], counts: list[int], size: str, seed: int
) -> None:
    attention, kind = made
    random = np.random.default_rng(seed)
    steps = steps_of(random, attention, counts, kind, SIZES[size])
    op = operation(attention, bool if kind == "boolean" else np.float32)
    fresh = garbage(random, attention, steps[-1].total)
    caches: dict[str, Array] = {}
    for step in steps:
        tensors = step.tensors(fresh)
        before = fresh.copy()
        outs: dict[str, Array] = {}
        for name, out in _each(op, tensors, before, caches):
            outs[name] = out
        for name in outs:
            assert np.array_equal(caches[name], caches["scalar"]), name
            assert same_bits(outs[name], outs["scalar"]), name
        fresh = caches["scalar"].copy()
        check_cache(attention, step, before, fresh)
        check_output(attention, step, fresh, outs["scalar"])


def _each(op: Operation, tensors: list[Array], before: Array, caches: dict[str, Array]) -> Any:
    """Every instruction set on a cache of its own, in `tensors[1]` as it was before."""
    cache = tensors[1]
    for name, out in op.on_all(*tensors):
        caches[name] = cache.copy()
        cache[:] = before
        yield name, out


LONG = [
    (Attention(6, 2, 64, 32, precision="i8", causal=True), "causal", [1600, 1]),
    (Attention(4, 1, 32, 20, precision="f16", mask=True, sinks=True), "sliding", [1300, 1, 3]),
    (Attention(8, 8, 16, 16, precision="i8", mask=True, softcap=8.0), "additive", [700, 1, 1]),
    (Attention(7, 1, 48, 64, precision="bf16", rope_dims=24), "none", [600, 2]),
    (Attention(14, 2, 64, 64, precision="i8", mask=True, norm=True), "ragged", [333, 40, 7]),
]


@pytest.mark.parametrize(("attention", "kind", "counts"), LONG)
def test_long_ones_too_with_any_number_of_threads(attention: Attention, kind: str, counts: list[int]) -> None:
    random = np.random.default_rng(len(counts))
    op = operation(attention)
    cache = garbage(random, attention, sum(counts))
    for step in steps_of(random, attention, counts, kind):
        before = cache.copy()
        out = op(*step.tensors(cache))
        check_cache(attention, step, before, cache)
        check_output(attention, step, cache, out)
        for threads in (1, 2, 5):
            other = before.copy()
            assert same_bits(with_threads(threads, lambda step=step, other=other: op(*step.tensors(other))), out), (
                threads
            )
            assert np.array_equal(other, cache)
        for name, again in op.on_all(*step.tensors(cache)):  # writing the same rows again changes nothing
            assert same_bits(again, out), name


@pytest.mark.parametrize(("attention", "kind", "counts"), LONG)
def test_the_cpu_plugin_computes_the_same(attention: Attention, kind: str, counts: list[int]) -> None:
    random = np.random.default_rng(0)
    op = operation(attention)
    request = op.compiled(2).create_infer_request()
    cache = garbage(random, attention, sum(counts))
    other = cache.copy()
    for step in steps_of(random, attention, counts, kind):
        expected = op(*step.tensors(cache))
        for i, each in enumerate(step.tensors(other)):
            request.set_input_tensor(i, ov.Tensor(each, shared_memory=True))
        request.infer()
        assert same_bits(request.get_output_tensor(0).data, expected)
        assert np.array_equal(other, cache)


def test_the_cpu_plugin_passes_boolean_masks_and_small_positions() -> None:
    attention = Attention(4, 2, 8, 8, mask=True)
    (step,) = steps_of(np.random.default_rng(0), attention, [20], "boolean")
    assert step.mask is not None
    caches = [np.zeros((2, 2, attention.block_bytes), np.uint8) for _ in range(3)]
    expected = operation(attention, bool)(*step.tensors(caches[0]))
    assert same_bits(operation(attention, bool).compiled()(step.tensors(caches[1]))[0], expected)
    tensors = step.tensors(caches[2])
    tensors[2] = tensors[2].astype(np.int32)
    tensors[3] = np.where(step.mask, np.float32(0), np.float32(-np.inf))
    assert same_bits(operation(attention, past=np.int32)(*tensors), expected)


def test_requests_at_the_same_time_do_not_disturb_each_other() -> None:
    attention = Attention(6, 2, 64, 32, mask=True)
    random = np.random.default_rng(1)
    op = operation(attention)
    steps = [steps_of(random, attention, [1200, 1], "sliding") for _ in range(4)]
    caches = [garbage(random, attention, 1201) for _ in steps]
    expected = []
    for (first, second), cache in zip(steps, caches, strict=True):
        op(*first.tensors(cache))
        expected.append(op(*second.tensors(cache)))
    compiled = op.compiled(2, NUM_STREAMS=2)
    found: list[list[Array]] = [[] for _ in steps]

    def work(i: int) -> None:
        request = compiled.create_infer_request()
        for _ in range(20):
            found[i].append(np.array(request.infer(steps[i][1].tensors(caches[i]))[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, want in zip(found, expected, strict=True):
        assert len(outs) == 20
        assert all(same_bits(out, want) for out in outs)


@pytest.mark.parametrize("precision", ["i8", "f16", "bf16"])
@pytest.mark.parametrize("part", ["key", "value", "query"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(value: float, part: str, precision: str) -> None:
    attention = Attention(6, 2, 32, 24, precision=precision, mask=True)
    random = np.random.default_rng(0)
    (clean,) = steps_of(random, attention, [70], "sliding")
    cache = garbage(random, attention, 70)
    bad, head = 33, 1
    at = {"query": 3 * 32 + 5, "key": 6 * 32 + 32 + 7, "value": 8 * 32 + 24 + 23}[part]  # query head 3, kv head 1
    spoilt = replace(clean, qkv=clean.qkv.copy())
    spoilt.qkv[0, bad, at] = value
    sees = clean.mask[0, 0, :, bad] == 0 if part != "query" else np.arange(70) == bad
    heads = [3] if part == "query" else [3 * head, 3 * head + 1, 3 * head + 2]
    op = operation(attention)
    expected = op(*clean.tensors(cache.copy()))[0].reshape(70, 6, 24)
    for name, out in op.on_all(*spoilt.tensors(cache)):
        found = out[0].reshape(70, 6, 24)
        touched = np.zeros((70, 6), bool)
        touched[np.ix_(np.flatnonzero(sees), heads)] = True
        assert same_bits(found[~touched], expected[~touched]), name
        dims = [23] if part == "value" and precision != "i8" else slice(None)
        assert not np.isfinite(found[touched][:, dims]).any() or (part == "key" and np.isinf(value)), name


def test_a_row_that_sees_nothing_is_zero() -> None:
    random = np.random.default_rng(0)
    for precision in ("i8", "f16", "bf16"):
        for sinks in (False, True):
            attention = Attention(4, 2, 8, 12, precision=precision, mask=True, sinks=sinks)
            (step,) = steps_of(random, attention, [30], "sliding")
            assert step.mask is not None
            step.mask[0, 0, 7] = -np.inf
            for name, out in operation(attention).on_all(*step.tensors(garbage(random, attention, 30))):
                assert not out[0, 7].any(), name
                assert np.abs(out[0, [6, 8]]).max() > 0, name


def test_new_tokens_in_one_go_or_one_by_one_fill_the_cache_alike() -> None:
    random = np.random.default_rng(0)
    attention = Attention(4, 2, 16, 16, precision="i8", causal=True, norm=True)
    (whole,) = steps_of(random, attention, [50], "causal")
    op = operation(attention)
    caches = [np.zeros((4, 2, attention.block_bytes), np.uint8) for _ in range(2)]
    out = op(*whole.tensors(caches[0]))
    for i in range(50):
        one = replace(whole, past=i, qkv=whole.qkv[:, i : i + 1])
        np.testing.assert_allclose(op(*one.tensors(caches[1]))[0, 0], out[0, i], atol=1e-3)
    assert np.array_equal(*caches)


def test_rows_too_small_or_too_large_for_codes() -> None:
    attention = Attention(1, 1, 8, 8, precision="i8", causal=True)
    for size in (0.0, 1e-38, 1e-37, 3e38):
        qkv = np.full((1, 1, 24), size, np.float32)
        qkv[0, 0, :8] = 1e-3
        step = Step(0, qkv)
        for name, out in operation(attention).on_all(*step.tensors(np.zeros((1, 1, attention.block_bytes), np.uint8))):
            near = 1e-36 if size < 1e-35 else size * 1e-3  # a scale that is no normal number counts as none
            assert np.abs(out - np.float32(size)).max() <= near, (name, size)


@pytest.mark.parametrize(("precision", "tolerance"), [("i8", 2e-2), ("f16", 1e-3), ("bf16", 8e-3)])
def test_agrees_with_openvino(precision: str, tolerance: float) -> None:
    attention = Attention(8, 2, 64, 32, 64**-0.5, precision=precision, rope_dims=64, norm=True, mask=True)
    random = np.random.default_rng(3)
    (step,) = steps_of(random, attention, [100], "sliding")
    query, key, value = attention.split(step.qkv)
    assert step.norms is not None
    query, key = (
        attention.prepared(each, weight, step.rope).astype(np.float32)
        for each, weight in zip((query, key), step.norms, strict=True)
    )
    inputs = [each.transpose(1, 0, 2)[None] for each in (query, key.repeat(4, axis=1), value.repeat(4, axis=1))]
    parameters = [ops.parameter(each.shape, np.float32) for each in [*inputs, step.mask]]
    node = ops.scaled_dot_product_attention(*parameters, np.float32(attention.scale))
    compiled = core().compile_model(ov.Model([node], parameters), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = compiled([*inputs, step.mask])[0][0].transpose(1, 0, 2)
    ours = operation(attention)(*step.tensors(garbage(random, attention, 100)))[0].reshape(theirs.shape)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()

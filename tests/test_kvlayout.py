"""The layout of the kernels' caches: packed rows against the definition, element by element, and rows read back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.kvlayout import BLOCK_TOKENS, KvLayout, Precision, blocks_of

Array = NDArray[Any]
PRECISIONS: tuple[Precision, ...] = ("i8", "f16", "bf16")
# Of the largest element of a row, or, in floating point, of each element.
ERROR = {"i8": 0.5 / 127, "f16": 2.0**-11, "bf16": 2.0**-8}

layouts = st.builds(
    KvLayout,
    st.sampled_from(PRECISIONS),
    st.integers(1, 3),
    st.integers(1, 9).map(lambda n: 4 * n),
    st.integers(1, 9).map(lambda n: 4 * n),
)


def random_rows(layout: KvLayout, width: int, tokens: int, seed: int) -> Array:
    """Rows of very different magnitudes, some of them zero."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((1, layout.heads, tokens, width))
    magnitudes = random.choice([0.0, 1e-6, 1.0, 300.0], (1, layout.heads, tokens, 1))
    return (rows * magnitudes).astype(np.float32)


def filled(layout: KvLayout, keys: Array, values: Array, spare: int = 1) -> Array:
    cache = layout.empty(blocks_of(keys.shape[2]) + spare)
    layout.write_keys(cache, keys)
    layout.write_values(cache, values)
    return cache


def half(two_bytes: Array, precision: Precision) -> float:
    bits = int(two_bytes[0]) | int(two_bytes[1]) << 8
    wide = np.array([bits << 16], np.uint32).view(np.float32) if precision == "bf16" else None
    return float(np.array([bits], np.uint16).view(np.float16)[0] if wide is None else wide[0])


def element(layout: KvLayout, cache: Array, token: int, head: int, dim: int, *, value: bool) -> float:
    """One element of a cache by the definition of the layout."""
    block, lane = cache[token // 16, head], token % 16
    width = 16 * -(-layout.value_dim // 16)
    if layout.precision != "i8":
        at = 32 * layout.key_dim + 2 * (width * lane + dim) if value else 2 * (16 * dim + lane)
        return half(block[at : at + 2], layout.precision)
    keys, values = 16 * layout.key_dim, 16 * width
    at = keys + lane // 4 * 4 * width + 4 * dim + lane % 4 if value else dim // 4 * 64 + 4 * lane + dim % 4
    scale_at = keys + values + 4 * lane + (64 if value else 0)
    scale = float(block[scale_at : scale_at + 4].copy().view(np.float32)[0])
    return (float(block[at]) - 128) * scale


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_rows_lie_where_the_definition_says(layout: KvLayout, tokens: int, seed: int) -> None:
    keys = random_rows(layout, layout.key_dim, tokens, seed)
    values = random_rows(layout, layout.value_dim, tokens, seed + 1)
    cache = filled(layout, keys, values)
    read = layout.read_keys(cache, tokens), layout.read_values(cache, tokens)
    for given_rows, found, value in ((keys, read[0], False), (values, read[1], True)):
        assert found.shape == given_rows.shape
        assert found.dtype == np.float32
        expected = np.array(
            [
                element(layout, cache, token, head, dim, value=value)
                for head in range(layout.heads) for token in range(tokens) for dim in range(given_rows.shape[3])
            ],
            np.float32,
        )  # fmt: skip
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6, atol=0)
        largest = np.abs(given_rows).max(axis=-1, keepdims=True, initial=0)
        bound = largest if layout.precision == "i8" else np.abs(given_rows) + 2.0**-14  # f16's smallest normal number
        assert (np.abs(found - given_rows) <= ERROR[layout.precision] * bound * (1 + 1e-5)).all()


@settings(max_examples=30, deadline=None)
@given(layouts, st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_what_was_read_packs_to_the_same(layout: KvLayout, tokens: int, seed: int) -> None:
    """So that nothing is lost more than once, however often a cache changes hands."""
    keys = random_rows(layout, layout.key_dim, tokens, seed)
    values = random_rows(layout, layout.value_dim, tokens, seed + 1)
    first = filled(layout, keys, values)
    again = filled(layout, layout.read_keys(first, tokens), layout.read_values(first, tokens))
    codes = slice(0, layout.scales_at)
    np.testing.assert_array_equal(again[..., codes], first[..., codes])
    for one, other in ((layout.read_keys, tokens), (layout.read_values, tokens)):
        np.testing.assert_allclose(one(again, other), one(first, other), rtol=2.5e-7)  # a scale's rounding


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes(precision: Precision) -> None:
    layout = KvLayout(precision, 2, 64, 72)  # 72 values are padded to 80
    assert layout.block_bytes == {"i8": 16 * 64 + 16 * 80 + 128}.get(precision, 32 * 64 + 32 * 80)
    cache = layout.empty(3)
    assert cache.shape == (3, 2, layout.block_bytes)
    assert cache.dtype == np.uint8
    assert cache.flags.c_contiguous
    assert not cache.any()
    assert cache.ctypes.data % 64 == 0
    assert [blocks_of(tokens) for tokens in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]


def test_codes_are_those_of_the_definition() -> None:
    layout = KvLayout("i8", 1, 4, 4)
    rows = np.array([[[[1, -127, 63.5, 0.4], [0, 0, 0, 0], [1e-42, 0, 0, 0], [-2, 2, 1, 0]]]], np.float32)
    cache = filled(layout, rows, rows, spare=0)
    codes = cache[0, 0, :64].reshape(16, 4)
    assert codes[0].tolist() == [129, 1, 192, 128]  # 63.5 is a tie, and goes to the even 64
    assert codes[1].tolist() == codes[2].tolist() == [128] * 4
    assert codes[3].tolist() == [1, 255, 192, 128]
    scales = cache[0, 0, layout.scales_at : layout.scales_at + 16].copy().view(np.float32)
    assert scales[0] == 1
    assert scales[1] == 0
    assert scales[3] == np.float32(2) / np.float32(127)
    quads = cache[0, 0, 64 : 64 + 4 * 16 * 4].reshape(4, 16, 4)
    assert quads[0, :4, 0].tolist() == [129, 1, 192, 128]
    assert (quads[:, 4:] == 128).all()  # padding
    assert (layout.read_keys(cache, 4)[0, 0, 1:3] == 0).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(odd: float) -> None:
    layout = KvLayout("i8", 2, 8, 8)
    rows = np.ones((1, 2, 20, 8), np.float32)
    rows[0, 1, 17, 3] = odd
    cache = filled(layout, rows, rows)
    for read in (layout.read_keys(cache, 20), layout.read_values(cache, 20)):
        assert np.isnan(read[0, 1, 17]).all()
        read[0, 1, 17] = 1
        np.testing.assert_allclose(read, 1)


def test_floating_point_rounds_to_nearest_and_keeps_what_is_odd() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 1e30, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 1e-41], np.float32)
    odd_nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)  # one that rounding would carry over
    odd[0] = odd_nan[0]
    rows = odd.reshape(1, 1, 1, 8)
    for precision in ("bf16", "f16"):
        layout = KvLayout(precision, 1, 8, 8)
        cache = filled(layout, rows, rows)
        keys, values = layout.read_keys(cache, 1), layout.read_values(cache, 1)
        np.testing.assert_array_equal(keys, values)
        assert np.isnan(keys.ravel()[0])
        assert keys.ravel()[1:3].tolist() == [np.inf, -np.inf]
        if precision == "bf16":
            assert keys.ravel()[4:6].tolist() == [1, 1 + 2.0**-6]  # ties to even
            assert keys.ravel()[3] == pytest.approx(1e30, rel=2.0**-8)
        else:
            assert keys.ravel()[3] == np.inf


@pytest.mark.parametrize("shape", [(1, 3, 5, 8), (2, 2, 5, 8), (1, 2, 5, 12), (2, 5, 8)])
def test_rows_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    layout = KvLayout("i8", 2, 8, 8)
    with pytest.raises(ValueError, match=r"keys are \[.*\], expected \[1, 2, tokens, 8\]"):
        layout.write_keys(layout.empty(1), np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"values are"):
        layout.write_values(layout.empty(1), np.zeros(shape, np.float32))


def test_other_types_of_rows_are_taken() -> None:
    layout = KvLayout("i8", 1, 4, 4)
    rows = np.arange(4, dtype=np.float16).reshape(1, 1, 1, 4)
    cache = filled(layout, rows, rows.astype(np.float64))
    np.testing.assert_allclose(layout.read_values(cache, 1), rows, atol=3 * 0.5 / 127)

// Single rows of CachedAttention for one instruction set S (simd_*.hpp): norm, rotation, quantization, into the cache.

#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.hpp"
#include "half.hpp"

namespace edgert {
namespace {

constexpr std::size_t kWide = CacheLayout::kTokens;  // lanes
constexpr std::size_t kQuad = CacheLayout::kQuad;

inline std::size_t whole_lanes(std::size_t n) {
    return (n + kWide - 1) / kWide * kWide;
}

// row[0, dim) = x, zeros up to whole_lanes(dim).
inline void copy_row(const float* x, std::size_t dim, float* row) {
    std::memcpy(row, x, dim * sizeof(float));
    std::memset(row + dim, 0, (whole_lanes(dim) - dim) * sizeof(float));
}

// Rows of one head are far apart: no processor guesses where the next one lies.
constexpr std::size_t kAhead = 3;  // rows

template <class S>
void prefetch_row(const float* x, std::size_t dim) {
    for (std::size_t i = 0; i < dim; i += kWide)
        S::prefetch(x + i);
}

// A query or key: RMSNorm where there is a weight, then the rotation of its first dims. `spare` has room for a row.
template <class S>
void prepare_row(const AttentionCall& call, const float* x, const float* weight, std::size_t token, float* row, float* spare) {
    const auto dim = call.layout.head_dim;
    copy_row(x, dim, row);
    if (weight != nullptr) {
        copy_row(weight, dim, spare);
        auto squares = S::set1(0.0f);
        for (std::size_t i = 0; i < dim; i += kWide)
            squares = S::fma(S::load(row + i), S::load(row + i), squares);
        const auto factor = S::set1(1.0f / std::sqrt(S::sum(squares) / static_cast<float>(dim) + call.epsilon));
        for (std::size_t i = 0; i < dim; i += kWide)
            S::store(row + i, S::mul(S::mul(S::load(row + i), factor), S::load(spare + i)));
    }
    const auto half = call.rope_dims / 2;
    const auto* const cosine = call.cosine + token * call.rope_dims;
    const auto* const sine = call.sine + token * call.rope_dims;
    std::size_t i = 0;
    for (; i + kWide <= half; i += kWide) {
        const auto low = S::load(row + i);
        const auto high = S::load(row + half + i);
        S::store(row + i, S::sub(S::mul(low, S::load(cosine + i)), S::mul(high, S::load(sine + i))));
        S::store(row + half + i, S::add(S::mul(high, S::load(cosine + half + i)), S::mul(low, S::load(sine + half + i))));
    }
    for (; i < half; ++i) {
        const auto low = row[i];
        const auto high = row[half + i];
        row[i] = low * cosine[i] - high * sine[i];
        row[half + i] = high * cosine[half + i] + low * sine[half + i];
    }
}

// Without a sign, bits order like values; Inf and then NaN are the largest.
template <class S>
typename S::I32 magnitude_bits(typename S::F32 x) {
    return S::iand(S::bits(x), S::iset1(0x7FFFFFFF));
}

// The largest magnitude of a row that is padded to whole lanes.
template <class S>
float magnitude(const float* row, std::size_t dim) {
    auto highest = S::iset1(0);
    for (std::size_t i = 0; i < dim; i += kWide)
        highest = S::imax(highest, magnitude_bits<S>(S::load(row + i)));
    return float_of(static_cast<std::uint32_t>(S::ihighest(highest)));
}

// What `steps` steps of a scale must reach: the scale, which is 0 where a row is nothing and NaN where it is no number.
inline float scale_of(float highest, float steps) {
    if (!(highest <= std::numeric_limits<float>::max()))
        return std::numeric_limits<float>::quiet_NaN();
    const auto scale = highest / steps;
    return scale < std::numeric_limits<float>::min() ? 0.0f : scale;
}

// One byte of each of 16 integers.
template <class S, int Shift>
void put_byte(std::int32_t* integers, typename S::I32 byte) {
    const auto old = S::iload(integers);
    const auto cleared = S::isub(old, S::iand(old, S::template shift_left<Shift>(S::iset1(0xFF))));
    S::istore(integers, S::iadd(cleared, S::template shift_left<Shift>(byte)));
}

template <class S>
void append_integers(const CacheLayout& layout, std::uint8_t* block, std::size_t lane, const float* key, const float* value) {
    const float scales[] = {scale_of(magnitude<S>(key, layout.head_dim), 127.0f),
                            scale_of(magnitude<S>(value, layout.value_dim), 127.0f)};
    const auto codes = [](const float* x, float scale) {
        return scale > 0.0f ? S::iadd(S::to_i32(S::div(S::load(x), S::set1(scale))), S::iset1(128)) : S::iset1(128);
    };
    for (std::size_t i = 0; i < layout.head_dim; i += kWide) {
        std::int8_t bytes[kWide];
        S::store_s8(bytes, codes(key + i, scales[0]));
        for (std::size_t j = 0; j < kWide && i + j < layout.head_dim; j += kQuad)
            std::memcpy(block + layout.key(i + j, lane), bytes + j, kQuad);
    }
    for (std::size_t i = 0; i < layout.value_dim; i += kWide) {
        // A token has one byte of each dim's four.
        auto* const quads = reinterpret_cast<std::int32_t*>(block + layout.values_at() + layout.value(i, lane / kQuad * kQuad));
        const auto code = codes(value + i, scales[1]);
        switch (lane % kQuad) {
        case 0: put_byte<S, 0>(quads, code); break;
        case 1: put_byte<S, 8>(quads, code); break;
        case 2: put_byte<S, 16>(quads, code); break;
        default: put_byte<S, 24>(quads, code); break;
        }
    }
    std::memcpy(block + layout.key_scales_at() + lane * sizeof(float), &scales[0], sizeof(float));
    std::memcpy(block + layout.value_scales_at() + lane * sizeof(float), &scales[1], sizeof(float));
}

template <class S>
void append_halves(const CacheLayout& layout, std::uint8_t* block, std::size_t lane, const float* key, const float* value) {
    const auto convert = [&](const float* x, std::uint16_t* out) {
        if (layout.precision == CachePrecision::f16)
            S::store_f16(out, S::load(x));
        else
            for (std::size_t i = 0; i < kWide; ++i)
                out[i] = f32_to_bf16(x[i]);
    };
    auto* const keys = reinterpret_cast<std::uint16_t*>(block);
    for (std::size_t i = 0; i < layout.head_dim; i += kWide) {
        std::uint16_t bits[kWide];
        convert(key + i, bits);
        for (std::size_t j = 0; j < kWide && i + j < layout.head_dim; ++j)
            keys[layout.key(i + j, lane)] = bits[j];
    }
    auto* const values = reinterpret_cast<std::uint16_t*>(block + layout.values_at());
    for (std::size_t i = 0; i < layout.value_dim; i += kWide)
        convert(value + i, values + layout.value(i, lane));
}

template <class S>
void append_block(const AttentionCall& call, std::size_t block, std::size_t kv_head, float* scratch) {
    const auto& layout = call.layout;
    auto* const key = scratch;
    auto* const spare = key + whole_lanes(layout.head_dim);
    auto* const value = spare + whole_lanes(layout.head_dim);
    const auto first = block * kWide;
    for (std::size_t lane = 0; lane < kWide; ++lane) {
        if (first + lane < call.past || first + lane >= call.total())
            continue;
        const auto token = first + lane - call.past;
        if (token + kAhead < call.tokens) {
            prefetch_row<S>(call.key(token + kAhead, kv_head), layout.head_dim);
            prefetch_row<S>(call.value(token + kAhead, kv_head), layout.value_dim);
        }
        prepare_row<S>(call, call.key(token, kv_head), call.key_norm, token, key, spare);
        copy_row(call.value(token, kv_head), layout.value_dim, value);
        if (layout.precision == CachePrecision::i8)
            append_integers<S>(layout, call.block(block, kv_head), lane, key, value);
        else
            append_halves<S>(layout, call.block(block, kv_head), lane, key, value);
    }
}

}  // namespace
}  // namespace edgert

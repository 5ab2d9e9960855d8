// QuantizedLinear for one instruction set S (simd_*.hpp): INT8 activations times packed INT4 or INT8 weights.
//
// Products of one step (at most 128 columns) are summed exactly in 32-bit integers; steps are then joined in f32, in
// order. So a result depends neither on the instruction set nor on how the work was divided.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.hpp"
#include "simd_math.hpp"

namespace edgert {
namespace {

// Quantize the rows of one tile to INT8, each step with a scale of its own; with `norm`, RMSNorm goes before.
//   data [rows, in_features], the tile's rows; scratch f32 [padded]
template <class S>
void quantize_tile(const Weights& w, const Activations& a, const Norm& norm, std::int64_t tile, const float* data,
                   float* scratch) {
    const auto first = tile * S::kRows;
    const auto n = std::min<std::int64_t>(S::kRows, a.rows - first);
    auto* codes = a.codes + first * w.padded;
    auto* scales = a.scales + first * w.steps();
    auto* sums = a.sums + first * w.steps();
    std::memset(scratch + w.in_features, 0, static_cast<std::size_t>(w.padded - w.in_features) * sizeof(float));
    for (std::int64_t r = 0; r < n; ++r) {
        std::memcpy(scratch, data + r * w.in_features, static_cast<std::size_t>(w.in_features) * sizeof(float));
        if (norm.weight != nullptr) {
            auto squares = S::set1(0.0f);
            for (std::int64_t k = 0; k < w.padded; k += kLanes) {
                const auto x = S::load(scratch + k);
                squares = S::fma(x, x, squares);
            }
            const auto mean = S::sum(squares) / static_cast<float>(w.in_features);
            const auto factor = 1.0f / std::sqrt(mean + norm.epsilon);
            std::int64_t k = 0;
            for (; k + kLanes <= w.in_features; k += kLanes)
                S::store(scratch + k, S::mul(S::mul(S::load(scratch + k), S::set1(factor)), S::load(norm.weight + k)));
            for (; k < w.in_features; ++k)
                scratch[k] = scratch[k] * factor * norm.weight[k];
        }
        for (std::int64_t s = 0; s < w.steps(); ++s) {
            const auto begin = s * w.step;
            const auto end = std::min(begin + w.step, w.padded);
            auto highest = S::iset1(0);
            for (auto k = begin; k < end; k += kLanes)
                highest = S::imax(highest, S::iand(S::bits(S::load(scratch + k)), S::iset1(0x7FFFFFFF)));
            const auto bits = S::ihighest(highest);  // of positive numbers the bits order like the values; NaN comes last
            float largest = 0.0f;
            std::memcpy(&largest, &bits, sizeof largest);
            const bool finite = bits < 0x7F800000;
            // Below, 127 / largest would overflow; such a step is zero as far as INT8 can tell.
            const bool tiny = largest < 1e-36f;
            const auto inverse = S::set1(finite && !tiny ? 127.0f / largest : 0.0f);
            auto sum = S::iset1(0);
            for (auto k = begin; k < end; k += kLanes) {
                const auto x = finite ? S::load(scratch + k) : S::set1(0.0f);
                const auto code = S::to_i32(S::mul(x, inverse));
                sum = S::iadd(sum, code);
                if (S::kRowByRow && n == S::kRows) {  // for AMX: [n][padded] instead of [padded / 4][n][4]
                    S::store_s8(codes + r * w.padded + k, code);
                    continue;
                }
                std::int8_t bytes[kLanes];
                S::store_s8(bytes, code);
                for (std::int64_t q = 0; q < kLanes / 4; ++q)
                    std::memcpy(codes + ((k / 4 + q) * n + r) * 4, bytes + 4 * q, 4);
            }
            scales[s * n + r] = !finite ? std::numeric_limits<float>::quiet_NaN() : tiny ? 0.0f : largest / 127.0f;
            sums[s * n + r] = S::isum(sum);
        }
    }
}

// One block of 16 columns for N rows: out[r] = sum over steps.
template <class S, int Bits, int N>
void multiply_tile(const Weights& w, const Activations& a, std::int64_t first, std::int64_t block, float (*out)[kLanes]) {
    const auto* weight = w.codes + block * w.block_bytes();
    const auto* scale = w.scales + block * w.groups * kLanes;
    const auto* zero = w.zero_points == nullptr ? nullptr : w.zero_points + block * w.groups * kLanes;
    const auto* codes = a.codes + first * w.padded;
    const auto* scales = a.scales + first * w.steps();
    const auto* sums = a.sums + first * w.steps();
    for (int r = 0; r < N; ++r)
        S::store(out[r], S::set1(0.0f));
    for (std::int64_t begin = 0, filled = 0; begin < w.padded; begin += w.step) {
        const auto end = std::min(begin + w.step, w.padded);
        // Codes are unsigned, so the zero point's share is taken off: as the first value of the sum it costs nothing.
        const auto offset = zero == nullptr ? S::iset1(1 << (Bits - 1)) : S::iload_u8(zero);
        typename S::I32 acc[N], odd[N];  // two chains a row: one would wait for each product's latency
        for (int r = 0; r < N; ++r) {
            acc[r] = S::isub(S::iset1(0), S::imul16(offset, S::iset1(sums[r])));
            odd[r] = S::iset1(0);
        }
        for (auto k = begin; k < end; k += 8) {
            if constexpr (Bits == 4) {
                const auto both = S::load_u8(weight);
                S::prefetch(weight + 512);
                const auto low = S::low_nibbles(both);
                for (int r = 0; r < N; ++r)
                    acc[r] = S::dot_nibbles(acc[r], low, codes + 4 * r);
                const auto high = S::high_nibbles(both);
                auto& second = N <= S::kRows / 4 ? odd : acc;
                for (int r = 0; r < N; ++r)
                    second[r] = S::dot_nibbles(second[r], high, codes + 4 * (N + r));
                weight += 64;
            } else {
                const auto one = S::load_u8(weight);
                S::prefetch(weight + 512);
                for (int r = 0; r < N; ++r)
                    acc[r] = S::dot(acc[r], one, codes + 4 * r);
                const auto two = S::load_u8(weight + 64);
                auto& second = N <= S::kRows / 4 ? odd : acc;
                for (int r = 0; r < N; ++r)
                    second[r] = S::dot(second[r], two, codes + 4 * (N + r));
                weight += 128;
            }
            codes += 8 * N;
        }
        const auto factor = S::load_f16(scale);
        for (int r = 0; r < N; ++r) {
            const auto sum = N <= S::kRows / 4 ? S::iadd(acc[r], odd[r]) : acc[r];
            S::store(out[r], S::fma(S::to_f32(sum), S::mul(factor, S::set1(scales[r])), S::load(out[r])));
        }
        scales += N;
        sums += N;
        filled += w.step;
        if (filled == w.group) {  // never where one scale serves the whole row: there is no next one
            filled = 0;
            scale += kLanes;
            zero = zero == nullptr ? nullptr : zero + kLanes;
        }
    }
}

template <class S>
typename S::F32 activate(Activation activation, typename S::F32 x) {
    switch (activation) {
    case Activation::silu:
        return silu<S>(x);
    case Activation::gelu:
        return gelu<S>(x);
    case Activation::gelu_tanh:
        return gelu_tanh<S>(x);
    case Activation::none:
        break;
    }
    return x;
}

// Add what belongs to 16 columns of a row, and write as many of them as there are.
template <class S>
void finish(const Epilogue& e, std::int64_t row, std::int64_t column, const float* gate, const float* up) {
    auto x = S::load(gate);
    if (up != nullptr)
        x = S::mul(activate<S>(e.activation, x), S::load(up));
    const auto at = row * e.columns + column;
    const auto count = std::min(kLanes, e.columns - column);
    if (count == kLanes) {
        if (e.bias != nullptr)
            x = S::add(x, S::load(e.bias + column));
        if (e.residual != nullptr)
            x = S::add(x, S::load(e.residual + at));
        S::store(e.out + at, x);
        return;
    }
    float values[kLanes];
    S::store(values, x);
    for (std::int64_t i = 0; i < count; ++i) {
        auto y = values[i];
        if (e.bias != nullptr)
            y += e.bias[column + i];
        if (e.residual != nullptr)
            y += e.residual[at + i];
        e.out[at + i] = y;
    }
}

template <class S, int Bits, int N>
void rows_of_block(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t first, std::int64_t block) {
    float gate[N][kLanes];
    multiply_tile<S, Bits, N>(w, a, first, block, gate);
    if (e.gated) {
        float up[N][kLanes];
        multiply_tile<S, Bits, N>(w, a, first, block + 1, up);
        for (int r = 0; r < N; ++r)
            finish<S>(e, first + r, block / 2 * kLanes, gate[r], up[r]);
    } else {
        for (int r = 0; r < N; ++r)
            finish<S>(e, first + r, block * kLanes, gate[r], nullptr);
    }
}

// A tile of any number of rows up to N.
template <class S, int Bits, int N>
void tile_of_block(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t first, std::int64_t n,
                   std::int64_t block) {
    if (n == N)
        rows_of_block<S, Bits, N>(w, a, e, first, block);
    else if constexpr (N > 1)
        tile_of_block<S, Bits, N - 1>(w, a, e, first, n, block);
}

// All rows of the tiles [tile_begin, tile_end) times the blocks [begin, end); `begin` is even where gated.
template <class S>
void multiply_blocks(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t tile_begin,
                     std::int64_t tile_end, std::int64_t begin, std::int64_t end) {
    for (auto tile = tile_begin; tile < tile_end; ++tile) {  // whose activations stay in the first cache
        const auto first = tile * S::kRows;
        const auto n = std::min<std::int64_t>(S::kRows, a.rows - first);
        for (auto block = begin; block < end; block += e.gated ? 2 : 1) {
            if (w.bits == 4)
                tile_of_block<S, 4, S::kRows>(w, a, e, first, n, block);
            else
                tile_of_block<S, 8, S::kRows>(w, a, e, first, n, block);
        }
    }
}

}  // namespace
}  // namespace edgert

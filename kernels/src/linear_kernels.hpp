// QuantizedLinear for one instruction set S (simd_*.hpp): INT8 activations times packed INT4 or INT8 weights.
//
// Products of one step (32 columns) are summed exactly in 32-bit integers; steps, and then groups, are joined in f32, in
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
    auto* sums = a.sums + first * w.groups;
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
            const auto* x = scratch + s * kStepColumns;
            const auto size = [&](const float* p) { return S::iand(S::bits(S::load(p)), S::iset1(0x7FFFFFFF)); };
            // Of positive numbers the bits order like the values, and NaN comes last.
            const auto bits = S::ihighest(S::imax(size(x), size(x + kLanes)));
            float largest = 0.0f;
            std::memcpy(&largest, &bits, sizeof largest);
            const bool finite = bits < 0x7F800000;
            // Below, 127 / largest would overflow; such a step is zero as far as INT8 can tell.
            const bool zero = largest < 1e-36f;
            const auto scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : largest / 127.0f;
            auto sum = S::iset1(0);
            for (std::int64_t k = s * kStepColumns; k < (s + 1) * kStepColumns; k += kLanes) {
                const auto code = finite && !zero ? S::to_i32(S::mul(S::load(scratch + k), S::set1(127.0f / largest))) : S::iset1(0);
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
            scales[s * n + r] = scale;
            auto& total = sums[s / w.steps_of_group() * n + r];
            total = std::fma(static_cast<float>(S::isum(sum)), scale, s % w.steps_of_group() == 0 ? 0.0f : total);
        }
    }
}

// Add what n rows got from one group of the weights of a block.
template <class S>
void join_group(const Weights& w, std::int64_t block, std::int64_t group, int n, const typename S::F32* total,
                const float* sums, float (*out)[kLanes]) {
    const auto at = (block * w.groups + group) * kLanes;
    const auto scale = S::load_f16(w.scales + at);
    const auto zero = w.zero_points == nullptr ? S::iset1(1 << (w.bits - 1)) : S::iload_u8(w.zero_points + at);
    const auto offset = S::mul(scale, S::to_f32(S::isub(S::iset1(0), zero)));
    for (int r = 0; r < n; ++r) {
        const auto sum = S::fma(total[r], scale, S::load(out[r]));
        S::store(out[r], S::fma(offset, S::set1(sums[r]), sum));
    }
}

// N rows of a tile of n, the first of them `row`, times one block of 16 columns:
// out[r] = sum over groups of scale * (sum over steps - zero point * sum of row).
template <class S, int Bits, int N>
void multiply_rows(const Weights& w, const Activations& a, std::int64_t first, std::int64_t n, std::int64_t row,
                   std::int64_t block, float (*out)[kLanes]) {
    const auto* weight = w.codes + block * w.block_bytes();
    const auto* codes = a.codes + first * w.padded + 4 * row;
    const auto* scales = a.scales + first * w.steps() + row;
    const auto* sums = a.sums + first * w.groups + row;
    for (int r = 0; r < N; ++r)
        S::store(out[r], S::set1(0.0f));
    for (std::int64_t g = 0; g < w.groups; ++g, sums += n) {
        typename S::F32 total[N];
        for (int r = 0; r < N; ++r)
            total[r] = S::set1(0.0f);
        for (auto step = w.steps_of_group(); step > 0; --step, scales += n) {
            typename S::I32 acc[N];
            for (int r = 0; r < N; ++r)
                acc[r] = S::iset1(0);
            for (int k = 0; k < kStepColumns; k += 8, codes += 8 * n) {
                S::prefetch(weight + 512);
                if constexpr (Bits == 4) {
                    const auto both = S::load_u8(weight);
                    const auto low = S::low_nibbles(both);
                    for (int r = 0; r < N; ++r)
                        acc[r] = S::dot_nibbles(acc[r], low, codes + 4 * r);
                    const auto high = S::high_nibbles(both);
                    for (int r = 0; r < N; ++r)
                        acc[r] = S::dot_nibbles(acc[r], high, codes + 4 * (n + r));
                    weight += 64;
                } else {
                    const auto low = S::load_u8(weight);
                    for (int r = 0; r < N; ++r)
                        acc[r] = S::dot(acc[r], low, codes + 4 * r);
                    const auto high = S::load_u8(weight + 64);
                    for (int r = 0; r < N; ++r)
                        acc[r] = S::dot(acc[r], high, codes + 4 * (n + r));
                    weight += 128;
                }
            }
            for (int r = 0; r < N; ++r)
                total[r] = S::fma(S::to_f32(acc[r]), S::set1(scales[r]), total[r]);
        }
        join_group<S>(w, block, g, N, total, sums, out);
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
void rows_of_block(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t first, std::int64_t n,
                   std::int64_t row, std::int64_t block) {
    float gate[N][kLanes];
    multiply_rows<S, Bits, N>(w, a, first, n, row, block, gate);
    if (e.gated) {
        float up[N][kLanes];
        multiply_rows<S, Bits, N>(w, a, first, n, row, block + 1, up);
        for (int r = 0; r < N; ++r)
            finish<S>(e, first + row + r, block / 2 * kLanes, gate[r], up[r]);
    } else {
        for (int r = 0; r < N; ++r)
            finish<S>(e, first + row + r, block * kLanes, gate[r], nullptr);
    }
}

// Rows [row, n) of a tile, N at once as long as there are so many, then half as many.
template <class S, int Bits, int N = (S::kRows < 8 ? S::kRows : 8)>
void tile_of_block(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t first, std::int64_t n,
                   std::int64_t block, std::int64_t row = 0) {
    for (; row + N <= n; row += N)
        rows_of_block<S, Bits, N>(w, a, e, first, n, row, block);
    if constexpr (N > 1)
        tile_of_block<S, Bits, N / 2>(w, a, e, first, n, block, row);
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
                tile_of_block<S, 4>(w, a, e, first, n, block);
            else
                tile_of_block<S, 8>(w, a, e, first, n, block);
        }
    }
}

}  // namespace
}  // namespace edgert

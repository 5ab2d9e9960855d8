// QuantizedLinear on AMX: full tiles of 16 rows; fewer rows, as in decode, go the way of AVX-512.
//
// A block of packed weights is a tile of AMX as it lies there (16 rows of 4 columns each, 64 bytes a row), INT4 once it
// is unpacked. Activations of a full tile are kept row by row instead of interleaved: the other operand's form.
// Tiles and their products: Intel SDM, volume 1, chapter 18 (Programming with Intel AMX).

#pragma once

#include "linear_kernels.hpp"

namespace edgert {
namespace {

// The codes of one step of a block as bytes: [quads of columns][16 rows][4].
template <class S>
void unpack_step(const std::uint8_t* packed, std::uint8_t* out) {
    for (int k = 0; k < kStepColumns; k += 8, packed += 64, out += 128) {
        const auto both = S::load_u8(packed);
        S::store_u8(out, S::low_nibbles(both));
        S::store_u8(out + 64, S::high_nibbles(both));
    }
}

// 16 rows times one block, as multiply_rows; the rows' codes are [16][padded].
template <class S, class Tiles>
void multiply_full_tile(const Weights& w, const Activations& activations, std::int64_t first, std::int64_t block,
                        float (*out)[kLanes]) {
    const auto* weight = w.codes + block * w.block_bytes();
    const auto* rows = activations.codes + first * w.padded;
    const auto* scales = activations.scales + first * w.steps();
    const auto* sums = activations.sums + first * w.groups;
    for (int r = 0; r < kLanes; ++r)
        S::store(out[r], S::set1(0.0f));
    for (std::int64_t g = 0; g < w.groups; ++g, sums += kLanes) {
        typename S::F32 total[kLanes];
        for (int r = 0; r < kLanes; ++r)
            total[r] = S::set1(0.0f);
        for (auto step = w.steps_of_group(); step > 0; --step, scales += kLanes) {
            alignas(64) std::uint8_t unpacked[kStepColumns * kLanes];
            if (w.bits == 4)
                unpack_step<S>(weight, unpacked);
            std::int32_t product[kLanes][kLanes];
            Tiles::multiply(rows, w.padded, w.bits == 4 ? unpacked : weight, product[0]);
            for (int r = 0; r < kLanes; ++r)
                total[r] = S::fma(S::to_f32(S::iload(product[r])), S::set1(scales[r]), total[r]);
            rows += kStepColumns;
            weight += kStepColumns * kLanes * w.bits / 8;
        }
        join_group<S>(w, block, g, kLanes, total, sums, out);
    }
}

template <class S, class Tiles>
void multiply_blocks_in_tiles(const Weights& w, const Activations& a, const Epilogue& e, std::int64_t tile_begin,
                              std::int64_t tile_end, std::int64_t begin, std::int64_t end) {
    const auto full = std::min(tile_end, a.rows / kLanes);
    if (tile_begin < full) {
        const auto parts = e.gated ? 2 : 1;
        const typename Tiles::Session session;
        for (auto block = begin; block < end; block += parts)
            for (auto tile = tile_begin; tile < full; ++tile) {
                float out[2][kLanes][kLanes];
                for (int part = 0; part < parts; ++part)
                    multiply_full_tile<S, Tiles>(w, a, tile * kLanes, block + part, out[part]);
                for (int r = 0; r < kLanes; ++r)
                    finish<S>(e, tile * kLanes + r, block / parts * kLanes, out[0][r], e.gated ? out[1][r] : nullptr);
            }
    }
    if (std::max(tile_begin, full) < tile_end)
        multiply_blocks<S>(w, a, e, std::max(tile_begin, full), tile_end, begin, end);
}

}  // namespace
}  // namespace edgert

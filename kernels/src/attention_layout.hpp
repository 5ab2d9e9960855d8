// How CachedAttention keeps keys and values.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edgert {

enum class CachePrecision { i8, f16, bf16 };

// One (block, kv head) of the cache tensor u8 [blocks][kv heads][bytes()]: 16 tokens, token t in block t / 16, lane t % 16.
//
//   i8         key codes    u8  [head_dim / 4][16 tokens][4]         code = round(k / scale) + 128
//              value codes  u8  [4 quads of tokens][padded value_dim][4 tokens]   dims past value_dim hold 128
//              key scales   f32 [16], value scales f32 [16]           scale = max|row| / 127
//   f16, bf16  keys         [head_dim][16 tokens], values [16 tokens][padded value_dim]
//
// A scale too small for a normal f32 is 0 (its codes 128); the scale of a row with NaN or Inf is NaN (codes 128).
struct CacheLayout {
    static constexpr std::size_t kTokens = 16;  // of a block, and the lanes of every kernel
    static constexpr std::size_t kQuad = 4;     // bytes that one integer dot product adds up

    CachePrecision precision;
    std::size_t head_dim;
    std::size_t value_dim;

    std::size_t padded_value_dim() const { return (value_dim + kTokens - 1) / kTokens * kTokens; }
    std::size_t element_bytes() const { return precision == CachePrecision::i8 ? 1 : 2; }
    std::size_t values_at() const { return kTokens * head_dim * element_bytes(); }
    std::size_t key_scales_at() const { return values_at() + kTokens * padded_value_dim() * element_bytes(); }
    std::size_t value_scales_at() const { return key_scales_at() + kTokens * sizeof(float); }
    std::size_t bytes() const {
        return precision == CachePrecision::i8 ? value_scales_at() + kTokens * sizeof(float) : key_scales_at();
    }

    // Index of an element of one token, counted in elements from the start of its keys or values.
    std::size_t key(std::size_t dim, std::size_t lane) const {
        if (precision == CachePrecision::i8)
            return (dim / kQuad * kTokens + lane) * kQuad + dim % kQuad;
        return dim * kTokens + lane;
    }
    std::size_t value(std::size_t dim, std::size_t lane) const {
        if (precision == CachePrecision::i8)
            return (lane / kQuad * padded_value_dim() + dim) * kQuad + lane % kQuad;
        return lane * padded_value_dim() + dim;
    }
};

}  // namespace edgert

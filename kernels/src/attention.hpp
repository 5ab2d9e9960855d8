// What CachedAttention hands to the kernels of an instruction set.

#pragma once

#include "attention_layout.hpp"

namespace edgert {

// Additive mask values from here on downwards hide a token: exporters write the lowest f16 or f32, or -Inf.
constexpr float kHidden = -30000.0f;

// One evaluation of the operation. Pointers that an attribute leaves out are null.
struct AttentionCall {
    CacheLayout layout;
    std::size_t heads;
    std::size_t kv_heads;
    std::size_t tokens;  // new ones
    std::size_t past;    // tokens in the cache before them
    float scale;
    float softcap;  // 0: none
    float epsilon;  // of the norms
    bool causal;

    const float* qkv;     // [tokens][heads * head_dim + kv_heads * (head_dim + value_dim)]
    std::uint8_t* cache;  // [blocks][kv_heads][layout.bytes()], room for past + tokens
    float* out;           // [tokens][heads * value_dim]

    const float* mask;               // additive, or
    const std::uint8_t* visible;     // boolean; rows of past + tokens elements
    std::size_t mask_heads;          // 1 or heads
    std::size_t mask_rows;           // 1 or tokens
    const float* cosine;             // [tokens][rope_dims]
    const float* sine;               // [tokens][rope_dims]
    std::size_t rope_dims;           // 0: no rotation
    const float* query_norm;         // [head_dim]
    const float* key_norm;           // [head_dim]
    const float* sinks;              // [heads]

    std::size_t group() const { return heads / kv_heads; }
    std::size_t total() const { return past + tokens; }
    std::size_t width() const { return heads * layout.head_dim + kv_heads * (layout.head_dim + layout.value_dim); }
    const float* query(std::size_t token, std::size_t head) const {
        return qkv + token * width() + head * layout.head_dim;
    }
    const float* key(std::size_t token, std::size_t kv_head) const {
        return qkv + token * width() + (heads + kv_head) * layout.head_dim;
    }
    const float* value(std::size_t token, std::size_t kv_head) const {
        return qkv + token * width() + (heads + kv_heads) * layout.head_dim + kv_head * layout.value_dim;
    }
    float* output(std::size_t token, std::size_t head) const {
        return out + (token * heads + head) * layout.value_dim;
    }
    std::uint8_t* block(std::size_t index, std::size_t kv_head) const {
        return cache + (index * kv_heads + kv_head) * layout.bytes();
    }
    // Offset of a row of the mask, in elements.
    std::size_t mask_row(std::size_t token, std::size_t head) const {
        return ((mask_heads == 1 ? 0 : head) * mask_rows + (mask_rows == 1 ? 0 : token)) * total();
    }
};

// The tokens that a row of the mask shows lie in [begin, end); plain: all of them, and nothing is added to their scores.
struct VisibleRange {
    std::size_t begin;
    std::size_t end;
    bool plain;
};

// The queries of one kv head, [tokens][group()], are rows that share its keys and values. A unit of work is a tile of up
// to kTileRows of them over a span of the tokens in the cache, taken kStepTokens at a time.
constexpr std::size_t kTileRows = 48;
constexpr std::size_t kGroupRows = 6;  // whose sums one look at keys or values adds to, at most
constexpr std::size_t kStepTokens = 256;
// Tokens of a span. Results of spans are joined in order, whoever computes them, so what a row gives depends on the tokens
// before it alone: not on threads, nor on how many rows there are with it.
constexpr std::size_t kSpanTokens = 512;

struct AttentionUnit {
    std::size_t kv_head;
    std::size_t first;  // row
    std::size_t rows;
    std::size_t begin;  // tokens of the cache: one or more spans
    std::size_t end;
    bool apart;  // a result for each span, [spans][rows]; otherwise they are joined as they come
};

inline std::size_t span_count(std::size_t begin, std::size_t end) {
    return end > begin ? (end - begin + kSpanTokens - 1) / kSpanTokens : 1;
}

// A result, a row each: padded_value_dim() sums of weighted values, then the highest score and the sum of weights.
// Scores are powers of two.
inline std::size_t result_stride(const CacheLayout& layout) {
    return layout.padded_value_dim() + CacheLayout::kTokens;
}

struct AttentionKernels {
    // What row `row` of the mask, [mask_heads * mask_rows], shows.
    VisibleRange (*scan)(const AttentionCall&, std::size_t row);
    // Writes the keys and values of the new tokens that lie in a block of the cache.
    void (*append)(const AttentionCall&, std::size_t block, std::size_t kv_head, float* scratch);
    void (*attend)(const AttentionCall&, const VisibleRange* mask, const AttentionUnit&, float* scratch, float* result);
    // Joins the results of a tile, [count][rows], into the first, and writes the rows of the output.
    void (*finish)(const AttentionCall&, const AttentionUnit&, float* results, std::size_t count);
};

// The whole operation for several sequences, whose caches have nothing in common, on all threads. All calls are of the
// same heads, layout and attributes; with masks there is one call.
void cached_attention(const AttentionCall* calls, std::size_t count, const AttentionKernels& kernels);

// Floats of scratch memory that append and attend take: rows being prepared, queries, scores, weights, scales, and the
// results of a span before they are joined.
inline std::size_t attention_scratch(const CacheLayout& layout) {
    const auto lanes = CacheLayout::kTokens;
    return 2 * (layout.head_dim + lanes) + layout.value_dim + lanes + kTileRows * layout.head_dim +
           kStepTokens * (2 * kGroupRows + 1) + kTileRows * result_stride(layout);
}

}  // namespace edgert

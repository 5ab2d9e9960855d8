#pragma once

#include <string>
#include <vector>

#include "attention.hpp"
#include "openvino/op/op.hpp"

namespace edgert {

// Scaled dot product attention of M new tokens over a cache that the caller owns. Batch is 1.
//
//   inputs   qkv     f32 [1, M, (H + HK) * D + HK * DV]: every query head, then key heads, then value heads
//            cache   u8 [blocks, HK, bytes of a block] (attention_layout.hpp), WRITTEN IN PLACE: rows past .. past + M - 1
//            past    i64 or i32 [1], tokens in the cache already; iff batched: [S, 3], see below
//            mask    iff mask:    f32 (added; -30000 and less hides) or boolean/u8 (true: may see), [1, 1 or H, 1 or M, past + M]
//            cos     iff rope:    f32 [1, M, R], R even, R <= D: the first R dims of each head of q and k are rotated
//            sin     iff rope:    f32 [1, M, R]
//            q_norm  iff norm:    f32 [D], per head, before the rotation
//            k_norm  iff norm:    f32 [D]
//            sinks   iff sinks:   f32, H elements: one more logit a head in the denominator
//   output   f32 [1, M, H * DV]; a row that sees nothing is zero
//
// The attributes are those of `Attributes`, by the same names. Query head h reads kv head h / (H / HK). A head whose key
// or value holds NaN or Inf makes every row that sees it NaN. What a row gives depends, to the bit, on its own query and the
// keys and values that it sees, not on the other rows of the call.
//
// Iff batched, the M tokens are those of S sequences, one after the other, and each row of `past` is about one: how many
// tokens are new (1 and more, M in all), how many are in the cache already, and the first block of its own part of the
// cache. Parts have nothing in common; blocks that belong to no sequence of the call are left alone. Without mask.
class CachedAttention : public ov::op::Op {
public:
    OPENVINO_OP("CachedAttention", "edgert");

    struct Attributes {
        std::int64_t heads = 0;
        std::int64_t kv_heads = 0;
        std::int64_t head_dim = 0;   // a multiple of 4
        std::int64_t value_dim = 0;  // a multiple of 4
        double scale = 1;            // of q.k
        double softcap = 0;          // 0: none
        std::string precision = "i8";  // of the cache: i8, f16, bf16
        std::string rope;              // "" or half (the halves of the first R dims rotate against each other)
        std::string norm;              // "" or rms
        double epsilon = 1e-6;
        bool causal = false;  // only without mask: token m sees 0 .. past + m
        bool mask = false;
        bool sinks = false;
        bool batched = false;
    };

    CachedAttention() = default;
    CachedAttention(const ov::OutputVector& inputs, Attributes attributes);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    void check_attributes() const;
    template <class Shape, class Type>
    std::int64_t check_inputs(std::size_t count, const Shape& shape_of, const Type& type_of, std::int64_t total) const;
    struct Inputs {
        std::size_t count;
        int which[9];
    };
    Inputs inputs() const;  // which there are
    // A call for each sequence, all of them checked: [past, past + tokens) lies in its part of the cache.
    std::vector<AttentionCall> sequences(const ov::Tensor& past, AttentionCall call, std::size_t blocks) const;
    CacheLayout layout() const;

    Attributes m_attributes;
};

}  // namespace edgert

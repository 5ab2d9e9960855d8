// CachedAttention straight from its definition, in double: what the vector kernels are measured against.

#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention.hpp"
#include "half.hpp"

namespace edgert {
namespace {

// Norm and rotation of one head's row; weight null: no norm.
std::vector<double> attention_row(const AttentionCall& call, const float* x, const float* weight, std::size_t token) {
    const auto dim = call.layout.head_dim;
    std::vector<double> row(x, x + dim);
    if (weight != nullptr) {
        double squares = 0;
        for (const auto value : row)
            squares += value * value;
        const auto factor = 1 / std::sqrt(squares / static_cast<double>(dim) + static_cast<double>(call.epsilon));
        for (std::size_t i = 0; i < dim; ++i)
            row[i] *= factor * static_cast<double>(weight[i]);
    }
    const auto half = call.rope_dims / 2;
    const auto* const cosine = call.cosine + token * call.rope_dims;
    const auto* const sine = call.sine + token * call.rope_dims;
    for (std::size_t i = 0; i < half; ++i) {
        const auto low = row[i];
        const auto high = row[i + half];
        row[i] = low * cosine[i] - high * sine[i];
        row[i + half] = high * cosine[i + half] + low * sine[i + half];
    }
    return row;
}

// Bytes of a cache: an i8 code, or a 16-bit number.
void store_element(const CacheLayout& layout, std::uint8_t* base, std::size_t index, double x, float scale) {
    if (layout.precision == CachePrecision::i8) {
        const auto code = scale > 0 ? std::nearbyint(static_cast<float>(x) / scale) : 0.0f;
        base[index] = static_cast<std::uint8_t>(static_cast<int>(code > 127 ? 127 : code < -127 ? -127 : code) + 128);
    } else {
        const auto value = static_cast<float>(x);
        const auto bits = layout.precision == CachePrecision::f16 ? f32_to_f16(value) : f32_to_bf16(value);
        std::memcpy(base + 2 * index, &bits, sizeof bits);
    }
}

double load_element(const CacheLayout& layout, const std::uint8_t* base, std::size_t index, float scale) {
    if (layout.precision == CachePrecision::i8)
        return static_cast<double>(scale) * (base[index] - 128);
    std::uint16_t bits;
    std::memcpy(&bits, base + 2 * index, sizeof bits);
    return layout.precision == CachePrecision::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

float row_scale(const std::vector<double>& row) {
    float highest = 0;
    for (const auto value : row) {
        const auto magnitude = std::fabs(static_cast<float>(value));
        if (!std::isfinite(magnitude))
            return std::numeric_limits<float>::quiet_NaN();
        highest = magnitude > highest ? magnitude : highest;
    }
    const auto scale = highest / 127;
    return scale < std::numeric_limits<float>::min() ? 0 : scale;
}

void append_reference(const AttentionCall& call, std::size_t token, std::size_t kv_head) {
    const auto& layout = call.layout;
    const auto lane = (call.past + token) % CacheLayout::kTokens;
    auto* const block = call.block((call.past + token) / CacheLayout::kTokens, kv_head);
    const auto key = attention_row(call, call.key(token, kv_head), call.key_norm, token);
    const auto* const v = call.value(token, kv_head);
    std::vector<double> value(v, v + layout.value_dim);
    value.resize(layout.padded_value_dim());
    const float scales[] = {row_scale(key), row_scale(value)};
    for (std::size_t dim = 0; dim < key.size(); ++dim)
        store_element(layout, block, layout.key(dim, lane), key[dim], scales[0]);
    for (std::size_t dim = 0; dim < value.size(); ++dim)
        store_element(layout, block + layout.values_at(), layout.value(dim, lane), value[dim], scales[1]);
    if (layout.precision == CachePrecision::i8) {
        std::memcpy(block + layout.key_scales_at() + lane * sizeof(float), &scales[0], sizeof(float));
        std::memcpy(block + layout.value_scales_at() + lane * sizeof(float), &scales[1], sizeof(float));
    }
}

// Adds to `score` what the mask says of (token, head) and `position`; false where it is hidden.
bool unmask(const AttentionCall& call, std::size_t token, std::size_t head, std::size_t position, double& score) {
    if (call.causal)
        return position <= call.past + token;
    if (call.visible != nullptr)
        return call.visible[call.mask_row(token, head) + position] != 0;
    if (call.mask != nullptr) {
        const auto value = call.mask[call.mask_row(token, head) + position];
        score += static_cast<double>(value);
        return !(value <= kHidden);
    }
    return true;
}

void attend_reference(const AttentionCall& call, std::size_t token, std::size_t head) {
    const auto& layout = call.layout;
    const auto kv_head = head / call.group();
    const auto query = attention_row(call, call.query(token, head), call.query_norm, token);
    const auto infinity = std::numeric_limits<double>::infinity();
    std::vector<double> scores(call.total(), -infinity);
    std::vector<bool> seen(call.total());
    auto highest = -infinity;
    for (std::size_t position = 0; position < call.total(); ++position) {
        const auto lane = position % CacheLayout::kTokens;
        const auto* const block = call.block(position / CacheLayout::kTokens, kv_head);
        float scale = 1;
        if (layout.precision == CachePrecision::i8)
            std::memcpy(&scale, block + layout.key_scales_at() + lane * sizeof(float), sizeof(float));
        double score = 0;
        for (std::size_t dim = 0; dim < query.size(); ++dim)
            score += query[dim] * load_element(layout, block, layout.key(dim, lane), scale);
        score *= static_cast<double>(call.scale);
        if (call.softcap > 0)
            score = call.softcap * std::tanh(score / call.softcap);
        seen[position] = unmask(call, token, head, position, score);
        if (!seen[position])
            continue;
        scores[position] = score;
        highest = score > highest || std::isnan(score) ? score : highest;
    }
    if (call.sinks != nullptr && static_cast<double>(call.sinks[head]) > highest)
        highest = call.sinks[head];
    auto sum = call.sinks != nullptr ? std::exp(static_cast<double>(call.sinks[head]) - highest) : 0;
    std::vector<double> out(layout.value_dim);
    bool any = false;
    for (std::size_t position = 0; position < call.total(); ++position) {
        if (!seen[position])
            continue;
        any = true;
        const auto lane = position % CacheLayout::kTokens;
        const auto* const block = call.block(position / CacheLayout::kTokens, kv_head);
        float scale = 1;
        if (layout.precision == CachePrecision::i8)
            std::memcpy(&scale, block + layout.value_scales_at() + lane * sizeof(float), sizeof(float));
        const auto weight = std::exp(scores[position] - highest);
        sum += weight;
        for (std::size_t dim = 0; dim < out.size(); ++dim)
            out[dim] += weight * load_element(layout, block + layout.values_at(), layout.value(dim, lane), scale);
    }
    for (std::size_t dim = 0; dim < out.size(); ++dim)
        call.output(token, head)[dim] = any ? static_cast<float>(out[dim] / sum) : 0.0f;
}

void cached_attention_reference(const AttentionCall& call) {
    for (std::size_t token = 0; token < call.tokens; ++token)
        for (std::size_t kv_head = 0; kv_head < call.kv_heads; ++kv_head)
            append_reference(call, token, kv_head);
    for (std::size_t token = 0; token < call.tokens; ++token)
        for (std::size_t head = 0; head < call.heads; ++head)
            attend_reference(call, token, head);
}

}  // namespace
}  // namespace edgert

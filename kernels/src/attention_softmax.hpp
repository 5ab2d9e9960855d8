// Softmax of CachedAttention for one instruction set S (simd_*.hpp): what rows see, and weights from scores.

#pragma once

#include "attention_rows.hpp"
#include "simd_math.hpp"

namespace edgert {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// 2^x, relative error below 2e-7, for x <= 0; 0 below -126; NaN stays NaN. Coefficients: a minimax fit on [-1/2, 1/2].
template <class S>
typename S::F32 exp2_negative(typename S::F32 x) {
    const auto bounded = S::max(S::set1(-126.0f), x);
    const auto n = S::to_i32(bounded);
    const auto f = S::sub(bounded, S::to_f32(n));
    auto p = S::fma(S::set1(1.326472614891827e-3f), f, S::set1(9.671512991189957e-3f));
    p = S::fma(p, f, S::set1(5.550733581185341e-2f));
    p = S::fma(p, f, S::set1(2.4022242426872253e-1f));
    p = S::fma(p, f, S::set1(6.931470036506653e-1f));
    p = S::fma(p, f, S::set1(1.0f));
    const auto power = S::from_bits(S::iadd(S::bits(p), S::template shift_left<23>(n)));
    return S::select_gt(S::set1(-126.0f), x, S::set1(0.0f), power);
}

template <class S>
float exp2_negative_one(float x) {
    float out[kWide];
    S::store(out, exp2_negative<S>(S::set1(x)));
    return out[0];
}

// Plain loops of counts, which compilers turn into vectors.
inline std::size_t count_shown(const AttentionCall& call, std::size_t row, std::size_t begin, std::size_t end) {
    std::uint32_t shown = 0;
    if (call.mask != nullptr)
        for (const auto* x = call.mask + row * call.total() + begin; begin < end; ++begin, ++x)
            shown += !(*x <= kHidden);
    else
        for (const auto* x = call.visible + row * call.total() + begin; begin < end; ++begin, ++x)
            shown += *x != 0;
    return shown;
}

template <class S>
VisibleRange scan_mask(const AttentionCall& call, std::size_t row) {
    constexpr std::size_t kChunk = 256;
    const auto total = call.total();
    std::size_t begin = 0;
    while (begin < total && count_shown(call, row, begin, begin + kChunk < total ? begin + kChunk : total) == 0)
        begin += kChunk;
    if (begin >= total)
        return {0, 0, true};
    while (count_shown(call, row, begin, begin + 1) == 0)
        ++begin;
    auto end = total;
    while (end - begin > kChunk && count_shown(call, row, end - kChunk, end) == 0)
        end -= kChunk;
    while (count_shown(call, row, end - 1, end) == 0)
        --end;
    std::size_t plain = 0;
    if (call.mask == nullptr) {
        plain = count_shown(call, row, begin, end);
    } else {
        std::uint32_t zeros = 0;
        const auto* const x = call.mask + row * total;
        for (auto i = begin; i < end; ++i)
            zeros += x[i] == 0.0f;
        plain = zeros;
    }
    return {begin, end, plain == end - begin};
}

// A row of a unit.
struct Row {
    std::size_t token;
    std::size_t head;
    std::size_t begin;  // what it sees of the unit's span
    std::size_t end;
    bool plain;
    float highest;
    float sum;
};

// Scores of one row in 16 tokens of which it does not see all, or not all alike: hidden ones become -Inf.
template <class S>
typename S::F32 hide(const AttentionCall& call, const Row& row, std::size_t position, typename S::F32 scores) {
    float added[kWide];
    const auto mask = row.plain ? 0 : call.mask_row(row.token, row.head) + position;
    for (std::size_t i = 0; i < kWide; ++i) {
        added[i] = -kInfinity;
        if (position + i < row.begin || position + i >= row.end)
            continue;
        if (row.plain)
            added[i] = 0.0f;
        else if (call.mask == nullptr)
            added[i] = call.visible[mask + i] != 0 ? 0.0f : -kInfinity;
        else if (!(call.mask[mask + i] <= kHidden))
            added[i] = call.mask[mask + i] * kLog2E;
    }
    const auto mask_values = S::load(added);
    return S::select_gt(S::set1(kLowest), mask_values, S::set1(-kInfinity), S::add(scores, mask_values));
}

// One step of online softmax: the row's scores of blocks [first, last), counted from the step's first token, become
// weights relative to the highest score so far, times the values' scales where there are any.
struct Weighed {
    float correction;  // brings earlier sums to the same footing
    float largest;     // weight; NaN where one is no number
};

template <class S>
Weighed weigh(const AttentionCall& call, Row& row, std::size_t position, std::size_t first, std::size_t last, float* scores,
            const float* value_scales) {
    const auto seen_begin = row.begin > position ? row.begin - position : 0;
    const auto seen_end = row.end > position ? row.end - position : 0;
    const auto begin = seen_begin / kWide < first ? first : seen_begin / kWide;
    const auto end = whole_lanes(seen_end) / kWide > last ? last : whole_lanes(seen_end) / kWide;
    const auto all_seen = [&](std::size_t block) {
        return row.plain && block * kWide >= seen_begin && block * kWide + kWide <= seen_end;
    };
    const auto clear = [&](std::size_t from, std::size_t to) {
        for (auto block = from; block < to; ++block)
            S::store(scores + block * kWide, S::set1(0.0f));
    };
    if (begin >= end) {
        clear(first, last);
        return {1.0f, 0.0f};
    }
    auto highest = S::set1(-kInfinity);
    for (auto block = begin; block < end; ++block) {
        auto score = S::load(scores + block * kWide);
        if (call.softcap > 0.0f) {
            score = S::mul(tanh<S>(score), S::set1(call.softcap * kLog2E));
            S::store(scores + block * kWide, score);
        }
        if (!all_seen(block)) {
            score = hide<S>(call, row, position + block * kWide, score);
            S::store(scores + block * kWide, score);
        }
        highest = S::max(score, highest);  // skips NaN, which the weights will show
    }
    auto step_highest = S::highest(highest);
    if (step_highest == -kInfinity) {  // all hidden, unless some are NaN
        auto sum = S::set1(0.0f);
        for (auto block = begin; block < end; ++block)
            sum = S::add(sum, S::max(S::set1(0.0f), S::load(scores + block * kWide)));
        const auto nan = S::sum(sum);
        if (nan == 0.0f) {
            clear(first, last);
            return {1.0f, 0.0f};
        }
        step_highest = nan;
    }
    const auto now = row.highest > step_highest ? row.highest : step_highest;
    const auto correction = exp2_negative_one<S>(row.highest - now);
    row.highest = now;
    clear(first, begin);
    auto sum = S::set1(0.0f);
    auto largest = S::iset1(0);
    for (auto block = begin; block < end; ++block) {
        const auto score = S::load(scores + block * kWide);
        auto weight = exp2_negative<S>(S::sub(score, S::set1(now)));
        sum = S::add(sum, weight);
        if (value_scales != nullptr) {
            weight = S::mul(weight, S::load(value_scales + block * kWide));
            if (!all_seen(block))  // a hidden token's scale may be anything
                weight = S::select_gt(S::set1(kLowest), score, S::set1(0.0f), weight);
            largest = S::imax(largest, magnitude_bits<S>(weight));
        }
        S::store(scores + block * kWide, weight);
    }
    clear(end, last);
    row.sum = row.sum * correction + S::sum(sum);
    return {correction, float_of(static_cast<std::uint32_t>(S::ihighest(largest)))};
}

}  // namespace
}  // namespace edgert

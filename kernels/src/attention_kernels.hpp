// CachedAttention for one instruction set S (simd_*.hpp): softmax over the cache, some tokens at a time.
//
// The work is divided by positions alone and joined in order, so results do not depend on the number of threads.

#pragma once

#include "attention_dots.hpp"
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
// weights relative to the highest score so far, times the values' scales where there are any. Returns the factor that
// brings earlier sums to the same footing.
template <class S>
float weigh(const AttentionCall& call, Row& row, std::size_t position, std::size_t first, std::size_t last, float* scores,
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
        return 1.0f;
    }
    auto highest = S::set1(-kInfinity);
    for (auto block = begin; block < end; ++block) {
        auto score = S::load(scores + block * kWide);
        if (call.softcap > 0.0f)
            score = S::mul(tanh<S>(score), S::set1(call.softcap * kLog2E));
        if (!all_seen(block))
            score = hide<S>(call, row, position + block * kWide, score);
        S::store(scores + block * kWide, score);
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
            return 1.0f;
        }
        step_highest = nan;
    }
    const auto now = row.highest > step_highest ? row.highest : step_highest;
    const auto correction = exp2_negative_one<S>(row.highest - now);
    row.highest = now;
    clear(first, begin);
    auto sum = S::set1(0.0f);
    for (auto block = begin; block < end; ++block) {
        const auto score = S::load(scores + block * kWide);
        auto weight = exp2_negative<S>(S::sub(score, S::set1(now)));
        sum = S::add(sum, weight);
        if (value_scales != nullptr) {
            weight = S::mul(weight, S::load(value_scales + block * kWide));
            if (!all_seen(block))  // a hidden token's scale may be anything
                weight = S::select_gt(S::set1(kLowest), score, S::set1(0.0f), weight);
        }
        S::store(scores + block * kWide, weight);
    }
    clear(end, last);
    row.sum = row.sum * correction + S::sum(sum);
    return correction;
}

// One unit of work for one precision of the cache.
template <class S, class Cache>
class Unit {
public:
    Unit(const AttentionCall& call, const VisibleRange* mask, const AttentionUnit& unit, float* scratch, float* result)
        : m_call(call),
          m_unit(unit),
          m_stride(call.kv_heads * call.layout.bytes()),
          m_values(call.layout.padded_value_dim()),
          m_row(scratch),
          m_queries(reinterpret_cast<std::uint8_t*>(m_row + 2 * whole_lanes(call.layout.head_dim))),
          m_scores(m_row + 2 * whole_lanes(call.layout.head_dim) + unit.rows * call.layout.head_dim),
          m_weights(reinterpret_cast<std::uint8_t*>(m_scores + kGroup * kStep)),
          m_scales(m_scores + 2 * kGroup * kStep),
          m_result(result) {
        for (std::size_t i = 0; i < unit.rows; ++i) {
            auto& row = m_rows[i];
            row.token = (unit.first + i) / call.group();
            row.head = unit.kv_head * call.group() + (unit.first + i) % call.group();
            VisibleRange sees{0, call.causal ? call.past + row.token + 1 : call.total(), true};
            if (mask != nullptr)
                sees = mask[call.mask_row(row.token, row.head) / call.total()];
            row.begin = sees.begin > unit.begin ? sees.begin : unit.begin;
            row.end = sees.end < unit.end ? sees.end : unit.end;
            row.plain = sees.plain;
        }
    }

    // `careful`: weights of zero keep NaN and Inf out, which multiplication would not. i8 has neither.
    void run(bool careful) {
        std::size_t begin = m_unit.end;
        std::size_t end = m_unit.begin;
        for (std::size_t i = 0; i < m_unit.rows; ++i) {
            auto& row = m_rows[i];
            row.highest = -kInfinity;
            row.sum = 0.0f;
            std::memset(result(i), 0, m_values * sizeof(float));
            if (row.begin >= row.end)
                continue;
            begin = row.begin < begin ? row.begin : begin;
            end = row.end > end ? row.end : end;
        }
        if (begin < end)
            groups([&](auto size, std::size_t i) { put_queries<decltype(size)::value>(i); });
        for (auto position = begin / kWide * kWide; position < end; position += kStep) {
            const auto last = position + kStep < end ? position + kStep : end;
            if constexpr (Cache::kIntegers)
                copy_scales(position, last);
            groups([&](auto size, std::size_t i) { step<decltype(size)::value>(i, position, last, careful); });
        }
        for (std::size_t i = 0; i < m_unit.rows; ++i) {
            result(i)[m_values] = m_rows[i].highest;
            result(i)[m_values + 1] = m_rows[i].sum;
        }
    }

    bool has_nan() const {
        for (std::size_t i = 0; i < m_unit.rows; ++i)
            if (!(magnitude<S>(result(i), m_values) <= std::numeric_limits<float>::max()))
                return true;
        return false;
    }

private:
    static constexpr std::size_t kGroup = static_cast<std::size_t>(Cache::kRows);

    float* result(std::size_t row) const { return m_result + row * result_stride(m_call.layout); }
    const std::uint8_t* block(std::size_t position) const { return m_call.block(position / kWide, m_unit.kv_head); }
    std::uint8_t* queries(std::size_t row) const {
        return m_queries + row * m_call.layout.head_dim * Cache::kFactorBytes;
    }

    template <class Function>
    void groups(const Function& f) const {
        for (std::size_t i = 0; i < m_unit.rows;)
            with_group<Cache::kRows>(m_unit.rows - i, [&](auto size) {
                f(size, i);
                i += static_cast<std::size_t>(decltype(size)::value);
            });
    }

    template <int R>
    void put_queries(std::size_t first) {
        const auto dim = m_call.layout.head_dim;
        const auto factor = S::set1(m_call.softcap > 0.0f ? m_call.scale / m_call.softcap : m_call.scale * kLog2E);
        for (int r = 0; r < R; ++r) {
            const auto& row = m_rows[first + static_cast<std::size_t>(r)];
            prepare_row<S>(m_call, m_call.query(row.token, row.head), m_call.query_norm, row.token, m_row,
                           m_row + whole_lanes(dim));
            for (std::size_t i = 0; i < dim; i += kWide)
                S::store(m_row + i, S::mul(S::load(m_row + i), factor));
            m_query_factors[first + static_cast<std::size_t>(r)] = Cache::put_query(m_row, dim, queries(first), R, r);
        }
    }

    void copy_scales(std::size_t position, std::size_t end) {
        auto* to = m_scales;
        for (; position < end; position += kWide, to += kWide)
            std::memcpy(to, block(position) + m_call.layout.value_scales_at(), kWide * sizeof(float));
    }

    // R rows over the tokens [position, end) of the cache.
    template <int R>
    void step(std::size_t first, std::size_t position, std::size_t end, bool careful) {
        auto* const rows = m_rows + first;
        std::size_t first_seen = end;
        std::size_t last_seen = position;
        for (int r = 0; r < R; ++r) {
            if (rows[r].begin >= rows[r].end)
                continue;
            first_seen = rows[r].begin < first_seen ? rows[r].begin : first_seen;
            last_seen = rows[r].end > last_seen ? rows[r].end : last_seen;
        }
        first_seen = first_seen < position ? position : first_seen;
        last_seen = last_seen > end ? end : last_seen;
        if (first_seen >= last_seen)
            return;
        const auto from = (first_seen - position) / kWide;
        const auto to = whole_lanes(last_seen - position) / kWide;
        constexpr int kLanesAtOnce = Cache::template lanes<R>();
        auto b = from;
        for (; b + kLanesAtOnce <= to; b += kLanesAtOnce)
            scores<R, kLanesAtOnce>(first, position, b);
        if constexpr (kLanesAtOnce > 1)
            for (; b < to; ++b)
                scores<R, 1>(first, position, b);

        float corrections[R];
        RowFactors factors[R];
        for (int r = 0; r < R; ++r) {
            auto* const row_scores = m_scores + static_cast<std::size_t>(r) * kStep;
            corrections[r] = weigh<S>(m_call, rows[r], position, from, to, row_scores, Cache::kIntegers ? m_scales : nullptr);
            factors[r] = Cache::put_weights(row_scores + from * kWide, to - from, m_weights, R, r);
        }
        if constexpr (!Cache::kIntegers) {
            if (careful)
                return careful_values<R>(first, position, from * kWide, last_seen - position, corrections);
        }
        constexpr std::size_t kDims = kWide * static_cast<std::size_t>(kLanesAtOnce);
        std::size_t dim = 0;
        for (; dim + kDims <= m_values; dim += kDims)
            values<R, kLanesAtOnce>(first, position + from * kWide, last_seen, dim, corrections, factors);
        if constexpr (kLanesAtOnce > 1)
            for (; dim < m_values; dim += kWide)
                values<R, 1>(first, position + from * kWide, last_seen, dim, corrections, factors);
    }

    // What becomes of sums: operator() of vector n and row r.
    struct StoreScores {
        float* to;
        const RowFactors* factors;
        const std::uint8_t* key_scales;
        std::size_t stride;

        EDGERT_INLINE void operator()(int n, int r, typename S::F32 sum) const {
            if constexpr (Cache::kIntegers) {
                const auto* const scales = reinterpret_cast<const float*>(key_scales + static_cast<std::size_t>(n) * stride);
                sum = S::mul(sum, S::mul(S::load(scales), S::set1(factors[r].scale)));
            }
            S::store(to + static_cast<std::size_t>(r) * kStep + static_cast<std::size_t>(n) * kWide, sum);
        }
    };
    struct AddValues {
        float* to;
        std::size_t stride;
        const float* corrections;
        const RowFactors* factors;

        EDGERT_INLINE void operator()(int n, int r, typename S::F32 sum) const {
            auto* const at = to + static_cast<std::size_t>(r) * stride + static_cast<std::size_t>(n) * kWide;
            const auto before = S::mul(S::load(at), S::set1(corrections[r]));
            S::store(at, S::fma(sum, S::set1(factors[r].scale), before));
        }
    };

    // Scores of blocks b .. b + N - 1 of the step.
    template <int R, int N>
    void scores(std::size_t first, std::size_t position, std::size_t b) {
        const auto& layout = m_call.layout;
        const auto* const data = block(position + b * kWide);
        const auto steps = Cache::kIntegers ? layout.head_dim / kQuad : layout.head_dim;
        const Stream stream{data, steps, kVectorBytes, steps, 0, m_stride, 0};
        Cache::template multiply<R, N>(stream, queries(first), m_query_factors + first,
                                       StoreScores{m_scores + b * kWide, m_query_factors + first, data + layout.key_scales_at(), m_stride});
    }

    // Adds the values of the tokens [position, end), dims `dim` .. dim + 16 N - 1.
    template <int R, int N>
    void values(std::size_t first, std::size_t position, std::size_t end, std::size_t dim, const float* corrections,
                const RowFactors* factors) {
        const auto& layout = m_call.layout;
        const auto* const data = block(position) + layout.values_at() + dim * kVectorBytes / kWide;
        // Past the last token there may be anything; codes of it do no harm, being no NaN, but come in fours.
        const auto total = Cache::kIntegers ? whole_lanes(end - position) / kQuad : end - position;
        const auto step = m_values * kVectorBytes / kWide;
        const Stream stream{data, total, step, kTokenSteps, m_stride - kTokenSteps * step, kVectorBytes, 0};
        const auto stride = result_stride(layout);
        Cache::template multiply<R, N>(stream, m_weights, factors, AddValues{result(first) + dim, stride, corrections, factors});
    }

    // f16 and bf16: one token after another, leaving out those without weight.
    template <int R>
    void careful_values(std::size_t first, std::size_t position, std::size_t begin, std::size_t end, const float* corrections) {
        for (std::size_t r = 0; r < static_cast<std::size_t>(R); ++r) {
            auto* const to = result(first + r);
            for (std::size_t dim = 0; dim < m_values; dim += kWide)
                S::store(to + dim, S::mul(S::load(to + dim), S::set1(corrections[r])));
            for (auto token = begin; token < end; ++token) {
                const auto weight = m_scores[r * kStep + token];
                if (weight == 0.0f)
                    continue;
                const auto* const data = block(position + token) + m_call.layout.values_at() +
                                         token % kWide * m_values * Cache::kElementBytes;
                for (std::size_t dim = 0; dim < m_values; dim += kWide) {
                    const auto value = Cache::load(data + dim * Cache::kElementBytes);
                    S::store(to + dim, S::fma(value, S::set1(weight), S::load(to + dim)));
                }
            }
        }
    }

    static constexpr std::size_t kTokenSteps = Cache::kIntegers ? kWide / kQuad : kWide;
    static constexpr std::size_t kVectorBytes = kWide * (Cache::kIntegers ? kQuad : Cache::kElementBytes);

    const AttentionCall& m_call;
    const AttentionUnit& m_unit;
    const std::size_t m_stride;  // bytes from one block of this head to the next
    const std::size_t m_values;  // padded
    float* const m_row;          // two rows
    std::uint8_t* const m_queries;
    float* const m_scores;  // [group][kStep]
    std::uint8_t* const m_weights;
    float* const m_scales;  // of values, [kStep]
    float* const m_result;
    Row m_rows[kTileRows];
    RowFactors m_query_factors[kTileRows];
};

template <class S, class Cache>
void attend_with(const AttentionCall& call, const VisibleRange* mask, const AttentionUnit& work, float* scratch, float* result) {
    Unit<S, Cache> unit(call, mask, work, scratch, result);
    unit.run(false);
    if constexpr (!Cache::kIntegers) {
        if (unit.has_nan())
            unit.run(true);
    }
}

template <class S>
void attend(const AttentionCall& call, const VisibleRange* mask, const AttentionUnit& unit, float* scratch, float* result) {
    switch (call.layout.precision) {
    case CachePrecision::i8: return attend_with<S, IntegerCache<S>>(call, mask, unit, scratch, result);
    case CachePrecision::f16: return attend_with<S, HalfCache<S, false>>(call, mask, unit, scratch, result);
    case CachePrecision::bf16: return attend_with<S, HalfCache<S, true>>(call, mask, unit, scratch, result);
    }
}

template <class S>
void finish_rows(const AttentionCall& call, const AttentionUnit& unit, const float* results, std::size_t spans) {
    const auto padded = call.layout.padded_value_dim();
    const auto stride = result_stride(call.layout);
    for (std::size_t i = 0; i < unit.rows; ++i) {
        const auto head = unit.kv_head * call.group() + (unit.first + i) % call.group();
        auto* const out = call.output((unit.first + i) / call.group(), head);
        const auto span = [&](std::size_t s) { return results + (s * unit.rows + i) * stride; };
        const auto sink = call.sinks != nullptr ? call.sinks[head] * kLog2E : -kInfinity;
        auto highest = sink;
        bool seen = false;
        for (std::size_t s = 0; s < spans; ++s) {
            seen = seen || span(s)[padded + 1] != 0.0f;
            highest = span(s)[padded] > highest ? span(s)[padded] : highest;
        }
        if (!seen) {
            std::memset(out, 0, call.layout.value_dim * sizeof(float));
            continue;
        }
        float weights[kMaxSpans];
        auto sum = call.sinks != nullptr ? exp2_negative_one<S>(sink - highest) : 0.0f;
        for (std::size_t s = 0; s < spans; ++s) {
            weights[s] = exp2_negative_one<S>(span(s)[padded] - highest);
            sum += span(s)[padded + 1] * weights[s];
        }
        for (std::size_t dim = 0; dim < padded; dim += kWide) {
            auto joined = S::set1(0.0f);
            for (std::size_t s = 0; s < spans; ++s)
                joined = S::fma(S::load(span(s) + dim), S::set1(weights[s]), joined);
            joined = S::div(joined, S::set1(sum));
            if (dim + kWide <= call.layout.value_dim) {
                S::store(out + dim, joined);
            } else {
                float last[kWide];
                S::store(last, joined);
                std::memcpy(out + dim, last, (call.layout.value_dim - dim) * sizeof(float));
            }
        }
    }
}

template <class S>
constexpr AttentionKernels attention_kernels() {
    return {scan_mask<S>, append_block<S>, attend<S>, finish_rows<S>};
}

}  // namespace
}  // namespace edgert

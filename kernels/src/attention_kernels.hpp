// CachedAttention for one instruction set S (simd_*.hpp): a unit of work from its queries to its results.
//
// The work is divided by positions alone and joined in order, so results do not depend on the number of threads; nor on
// what other rows there are, nor on the instruction set, which only says how many rows share a look at the cache.

#pragma once

#include "attention_dots.hpp"
#include "attention_softmax.hpp"

namespace edgert {
namespace {

// Joins what a row gave in one more span to what it gave in the spans before. One in which it saw nothing changes nothing.
template <class S>
void join_row(std::size_t padded, float* joined, const float* more) {
    auto& highest = joined[padded];
    auto& sum = joined[padded + 1];
    if (more[padded + 1] == 0.0f)
        return;
    if (sum == 0.0f) {
        std::memcpy(joined, more, (padded + 2) * sizeof(float));
        return;
    }
    const auto now = highest > more[padded] ? highest : more[padded];
    const auto before = exp2_negative_one<S>(highest - now);
    const auto weight = exp2_negative_one<S>(more[padded] - now);
    for (std::size_t dim = 0; dim < padded; dim += kWide) {
        const auto scaled = S::mul(S::load(joined + dim), S::set1(before));
        S::store(joined + dim, S::fma(S::load(more + dim), S::set1(weight), scaled));
    }
    highest = now;
    sum = sum * before + more[padded + 1] * weight;
}

// One unit of work for one precision of the cache.
template <class S, class Cache>
class Unit {
public:
    Unit(const AttentionCall& call, const VisibleRange* mask, const AttentionUnit& unit, float* scratch)
        : m_call(call),
          m_unit(unit),
          m_stride(call.kv_heads * call.layout.bytes()),
          m_values(call.layout.padded_value_dim()),
          m_row(scratch),
          m_queries(reinterpret_cast<std::uint8_t*>(m_row + 2 * whole_lanes(call.layout.head_dim))),
          m_scores(m_row + 2 * whole_lanes(call.layout.head_dim) + unit.rows * call.layout.head_dim),
          m_weights(reinterpret_cast<std::uint8_t*>(m_scores + kGroupRows * kStepTokens)),
          m_scales(m_scores + 2 * kGroupRows * kStepTokens) {
        for (std::size_t i = 0; i < unit.rows; ++i) {
            auto& row = m_rows[i];
            row.token = (unit.first + i) / call.group();
            row.head = unit.kv_head * call.group() + (unit.first + i) % call.group();
            VisibleRange sees{0, call.causal ? call.past + row.token + 1 : call.total(), true};
            if (mask != nullptr)
                sees = mask[call.mask_row(row.token, row.head) / call.total()];
            m_sees[i] = sees;
        }
        groups([&](auto size, std::size_t i) { put_queries<decltype(size)::value>(i); });
    }

    // Results over [span_begin, span_end). `careful`: weights of zero keep NaN and Inf out, which multiplication would not.
    // i8 has neither.
    void run(std::size_t span_begin, std::size_t span_end, float* results, bool careful) {
        m_result = results;
        std::size_t begin = span_end;
        std::size_t end = span_begin;
        for (std::size_t i = 0; i < m_unit.rows; ++i) {
            auto& row = m_rows[i];
            row.begin = m_sees[i].begin > span_begin ? m_sees[i].begin : span_begin;
            row.end = m_sees[i].end < span_end ? m_sees[i].end : span_end;
            row.plain = m_sees[i].plain;
            row.highest = -kInfinity;
            row.sum = 0.0f;
            std::memset(result(i), 0, m_values * sizeof(float));
            if (row.begin >= row.end)
                continue;
            begin = row.begin < begin ? row.begin : begin;
            end = row.end > end ? row.end : end;
        }
        const auto first = begin / kWide * kWide;
        for (auto position = first; position < end; position += kStepTokens) {
            const auto last = position + kStepTokens < end ? position + kStepTokens : end;
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
    static_assert(Cache::kRows <= static_cast<int>(kGroupRows), "room in the scratch memory");

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
        const auto next = first + static_cast<std::size_t>(R);
        for (auto i = next; i < m_unit.rows && i < next + kGroupRows; ++i)
            prefetch_row<S>(m_call.query(m_rows[i].token, m_rows[i].head), dim);
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
            auto* const row_scores = m_scores + static_cast<std::size_t>(r) * kStepTokens;
            const auto weighed = weigh<S>(m_call, rows[r], position, from, to, row_scores, Cache::kIntegers ? m_scales : nullptr);
            corrections[r] = weighed.correction;
            factors[r] = Cache::put_weights(row_scores + from * kWide, to - from, weighed.largest, m_weights, R, r);
        }
        if constexpr (!Cache::kIntegers) {
            if (careful)
                return careful_values<R>(first, position, from * kWide, last_seen - position, corrections, factors);
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
            S::store(to + static_cast<std::size_t>(r) * kStepTokens + static_cast<std::size_t>(n) * kWide, sum);
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
        const Stream stream{data, steps, kVectorBytes, steps, 0, m_stride, layout.values_at()};
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
        const auto next_keys = kStepTokens / kWide * m_stride - layout.values_at();
        const Stream stream{data, total, step, kTokenSteps, m_stride - kTokenSteps * step, kVectorBytes, next_keys};
        const auto stride = result_stride(layout);
        Cache::template multiply<R, N>(stream, m_weights, factors, AddValues{result(first) + dim, stride, corrections, factors});
    }

    // f16 and bf16: the same sums, without the tokens that have no weight.
    template <int R>
    void careful_values(std::size_t first, std::size_t position, std::size_t begin, std::size_t end, const float* corrections,
                        const RowFactors* factors) {
        const auto stride = result_stride(m_call.layout);
        for (std::size_t dim = 0; dim < m_values; dim += kWide) {
            const AddValues add{result(first) + dim, stride, corrections, factors};
            for (int r = 0; r < R; ++r) {
                auto sum = S::set1(0.0f);
                for (auto token = begin; token < end; ++token) {
                    const auto weight = m_scores[static_cast<std::size_t>(r) * kStepTokens + token];
                    const auto* const values = block(position + token) + m_call.layout.values_at();
                    if (weight != 0.0f)
                        sum = S::fma(Cache::load(values + (token % kWide * m_values + dim) * Cache::kElementBytes),
                                     S::set1(weight), sum);
                }
                add(0, r, sum);
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
    float* const m_scores;  // [kGroupRows][kStepTokens]
    std::uint8_t* const m_weights;
    float* const m_scales;  // of values, [kStepTokens]
    float* m_result = nullptr;
    Row m_rows[kTileRows];
    VisibleRange m_sees[kTileRows];
    RowFactors m_query_factors[kTileRows];
};

template <class S, class Cache>
void attend_with(const AttentionCall& call, const VisibleRange* mask, const AttentionUnit& work, float* scratch, float* result) {
    Unit<S, Cache> unit(call, mask, work, scratch);
    const auto stride = result_stride(call.layout);
    auto* const spare = scratch + attention_scratch(call.layout) - kTileRows * stride;
    const auto spans = span_count(work.begin, work.end);
    for (std::size_t s = 0; s < spans; ++s) {
        const auto begin = work.begin + s * kSpanTokens;
        const auto end = begin + kSpanTokens < work.end ? begin + kSpanTokens : work.end;
        auto* const own = work.apart ? result + s * work.rows * stride : s == 0 ? result : spare;
        unit.run(begin, end, own, false);
        if constexpr (!Cache::kIntegers) {
            if (unit.has_nan())
                unit.run(begin, end, own, true);
        }
        for (std::size_t i = 0; own == spare && i < work.rows; ++i)
            join_row<S>(call.layout.padded_value_dim(), result + i * stride, spare + i * stride);
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
void finish_rows(const AttentionCall& call, const AttentionUnit& unit, float* results, std::size_t count) {
    const auto padded = call.layout.padded_value_dim();
    const auto stride = result_stride(call.layout);
    for (std::size_t i = 0; i < unit.rows; ++i) {
        const auto head_of = [&](std::size_t row) { return unit.kv_head * call.group() + (unit.first + row) % call.group(); };
        const auto out_of = [&](std::size_t row) { return call.output((unit.first + row) / call.group(), head_of(row)); };
        if (i + kAhead < unit.rows)
            prefetch_row<S>(out_of(i + kAhead), call.layout.value_dim);
        auto* const out = out_of(i);
        auto* const result = results + i * stride;
        for (std::size_t n = 1; n < count; ++n)
            join_row<S>(padded, result, result + n * unit.rows * stride);
        const auto highest = result[padded];
        auto sum = result[padded + 1];
        if (sum == 0.0f) {
            std::memset(out, 0, call.layout.value_dim * sizeof(float));
            continue;
        }
        auto weight = 1.0f;
        if (call.sinks != nullptr) {
            const auto sink = call.sinks[head_of(i)] * kLog2E;
            const auto now = highest > sink ? highest : sink;
            weight = exp2_negative_one<S>(highest - now);
            sum = exp2_negative_one<S>(sink - now) + sum * weight;
        }
        for (std::size_t dim = 0; dim < padded; dim += kWide) {
            const auto joined = S::div(S::fma(S::load(result + dim), S::set1(weight), S::set1(0.0f)), S::set1(sum));
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

// Products of CachedAttention for one instruction set S (simd_*.hpp).
//
// Queries times keys and weights times values are one operation: vectors of the cache (16 tokens, or 16 dims), each
// multiplied by one factor of every row, are summed in registers for as many rows as these hold. Rows are therefore
// taken in groups of R, whose factors alternate: [dim or token][R] for f16 and bf16, [quad][R][high 4, low 4] for i8.

#pragma once

#include "attention_rows.hpp"

namespace edgert {
namespace {

// Sizes of groups, largest first; any number of rows is a sum of them.
constexpr int smaller_group(int rows) {
    return rows > 8 ? 8 : rows > 6 ? 6 : rows > 4 ? 4 : rows - 1;
}

template <int R>
struct Rows {
    static constexpr int value = R;
};

// f(Rows<R>()) for the largest group of at most `rows` and Limit rows.
template <int Limit, class Function>
void with_group(std::size_t rows, const Function& f) {
    if constexpr (Limit > 1) {
        if (rows < static_cast<std::size_t>(Limit))
            return with_group<smaller_group(Limit)>(rows, f);
    }
    f(Rows<Limit>());
}

// `total` vectors of the cache, one after another: after each comes `step`, after each `block_steps` of them `jump` on
// top. In bytes.
struct Stream {
    const std::uint8_t* data;
    std::size_t total;
    std::size_t step;
    std::size_t block_steps;
    std::size_t jump;
    std::size_t lanes;  // to the vectors of the next 16 lanes
    std::size_t ahead;  // to what is fetched now and read later
};

// What a row's factors stand for: i8 has scale * (128 * high + low), and its sums start with what is to be taken off for
// the cache's codes being 128 too large. Otherwise the factors are what they are, and scale is 1, or NaN.
struct RowFactors {
    float scale;
    std::int32_t start[2];
};

#ifdef _MSC_VER
#define EDGERT_INLINE __forceinline
#else
#define EDGERT_INLINE inline __attribute__((always_inline))
#endif

// The sums of all rows by N vectors, K in number. Nested members instead of arrays: only these are sure to be registers.
template <class S, int K, int N>
struct IntegerSums {
    static constexpr int kRow = (K - 1) / N;
    static constexpr int kLane = (K - 1) % N;
    IntegerSums<S, K - 1, N> rest;
    typename S::I32 high, low;

    EDGERT_INLINE void start(const RowFactors* rows) {
        rest.start(rows);
        high = S::iset1(rows[kRow].start[0]);
        low = S::iset1(rows[kRow].start[1]);
    }
    EDGERT_INLINE void add(const typename S::U8 (&vector)[N], const std::int8_t* four) {
        rest.add(vector, four);
        high = S::dot(high, vector[kLane], four + 8 * kRow);
        low = S::dot(low, vector[kLane], four + 8 * kRow + 4);
    }
    template <class Use>
    EDGERT_INLINE void use(const Use& f) {
        rest.use(f);
        S::pin(high);
        S::pin(low);
        f(kLane, kRow, S::to_f32(S::iadd(S::template shift_left<7>(high), low)));
    }
};
template <class S, int N>
struct IntegerSums<S, 0, N> {
    EDGERT_INLINE void start(const RowFactors*) {}
    EDGERT_INLINE void add(const typename S::U8 (&)[N], const std::int8_t*) {}
    template <class Use>
    EDGERT_INLINE void use(const Use&) const {}
};

template <class S, int K, int N>
struct FloatSums {
    static constexpr int kRow = (K - 1) / N;
    static constexpr int kLane = (K - 1) % N;
    FloatSums<S, K - 1, N> rest;
    typename S::F32 sum;

    EDGERT_INLINE void start() {
        rest.start();
        sum = S::set1(0.0f);
    }
    EDGERT_INLINE void add(const typename S::F32 (&vector)[N], const float* factor) {
        rest.add(vector, factor);
        sum = S::fma(vector[kLane], S::set1(factor[kRow]), sum);
    }
    template <class Use>
    EDGERT_INLINE void use(const Use& f) const {
        rest.use(f);
        f(kLane, kRow, sum);
    }
};
template <class S, int N>
struct FloatSums<S, 0, N> {
    EDGERT_INLINE void start() {}
    EDGERT_INLINE void add(const typename S::F32 (&)[N], const float*) {}
    template <class Use>
    EDGERT_INLINE void use(const Use&) const {}
};

template <class S>
struct IntegerCache {
    static constexpr bool kIntegers = true;
    static constexpr int kSums = S::kVectors >= 32 ? 12 : 3;  // of two registers
    static constexpr int kRows = S::kVectors >= 32 ? 6 : 3;  // fewer rows and more vectors: fewer factors to load
    static constexpr std::size_t kFactorBytes = 2;            // a row and dim or token
    static constexpr std::size_t kElementBytes = 1;

    template <int R>
    static constexpr int lanes() {
        return kSums / R < 4 ? kSums / R : 4;
    }

    template <int R, int N, class Use>
    static void multiply(const Stream& stream, const std::uint8_t* factors, const RowFactors* rows, const Use& use) {
        IntegerSums<S, R * N, N> sums;
        sums.start(rows);
        const auto* codes = stream.data;
        const auto* four = reinterpret_cast<const std::int8_t*>(factors);
        auto in_block = stream.block_steps;
        for (auto left = stream.total; left != 0; --left) {
            typename S::U8 vector[N];
            for (int n = 0; n < N; ++n) {
                vector[n] = S::load_u8(codes + static_cast<std::size_t>(n) * stream.lanes);
                S::prefetch_far(codes + static_cast<std::size_t>(n) * stream.lanes + stream.ahead);
            }
            sums.add(vector, four);
            four += 8 * R;
            codes += stream.step;
            if (--in_block == 0) {
                codes += stream.jump;
                in_block = stream.block_steps;
            }
        }
        sums.use(use);
    }

    // Row r of a group of R: 16 integers of up to 15 bits, as the factors of dims or tokens i, i + 1, ...
    static void put(std::uint8_t* factors, std::size_t i, std::size_t count, int group, int r, typename S::I32 value,
                    typename S::I32 high) {
        const auto stride = static_cast<std::size_t>(group) * 2 * kQuad;
        auto* const to = factors + i / kQuad * stride + static_cast<std::size_t>(r) * 2 * kQuad;
        const auto low = S::isub(value, S::template shift_left<7>(high));
        if (count >= kWide)
            return S::store_quads(to, stride, high, low);
        std::uint8_t all[2 * kWide];
        S::store_quads(all, 2 * kQuad, high, low);
        for (std::size_t j = 0; j < count; j += kQuad)
            std::memcpy(to + j / kQuad * stride, all + 2 * j, 2 * kQuad);
    }

    // 15 bits: high -127..127, low -64..63.
    static RowFactors put_query(const float* query, std::size_t dim, std::uint8_t* factors, int group, int r) {
        constexpr float kSteps = 127 * 128;
        const auto scale = scale_of(magnitude<S>(query, dim), kSteps);
        const auto inverse = S::set1(scale > 0.0f ? 1.0f / scale : 0.0f);
        auto sum = S::iset1(0);
        auto high_sum = S::iset1(0);
        for (std::size_t i = 0; i < dim; i += kWide) {
            const auto value = S::to_i32(S::mul(scale > 0.0f ? S::load(query + i) : S::set1(0.0f), inverse));
            const auto high = S::template shift_right<7>(S::iadd(value, S::iset1(64)));
            put(factors, i, dim - i, group, r, value, high);
            sum = S::iadd(sum, value);
            high_sum = S::iadd(high_sum, high);
        }
        return with_sums(scale, S::isum(sum), S::isum(high_sum));
    }

    // Weights, none negative, of 16 * blocks tokens. 14 bits: high and low 0..127.
    static RowFactors put_weights(const float* weights, std::size_t blocks, float largest, std::uint8_t* factors, int group,
                                  int r) {
        constexpr float kSteps = 128 * 128 - 1;
        const auto scale = scale_of(largest, kSteps);
        const auto inverse = S::set1(scale > 0.0f ? 1.0f / scale : 0.0f);
        auto sum = S::iset1(0);
        auto high_sum = S::iset1(0);
        for (std::size_t i = 0; i < blocks * kWide; i += kWide) {
            const auto value = S::to_i32(S::mul(scale > 0.0f ? S::load(weights + i) : S::set1(0.0f), inverse));
            const auto high = S::template shift_right<7>(value);
            put(factors, i, kWide, group, r, value, high);
            sum = S::iadd(sum, value);
            high_sum = S::iadd(high_sum, high);
        }
        return with_sums(scale, S::isum(sum), S::isum(high_sum));
    }

private:
    static RowFactors with_sums(float scale, std::int32_t sum, std::int32_t high) {
        return {scale, {-128 * high, -128 * (sum - 128 * high)}};
    }
};

// f16, or bf16.
template <class S, bool Brain>
struct HalfCache {
    static constexpr bool kIntegers = false;
    static constexpr int kSums = S::kVectors >= 32 ? 24 : 6;
    static constexpr int kRows = 6;
    static constexpr std::size_t kFactorBytes = sizeof(float);
    static constexpr std::size_t kElementBytes = 2;

    template <int R>
    static constexpr int lanes() {
        return kSums / R < 4 ? kSums / R : 4;
    }

    static typename S::F32 load(const std::uint8_t* data) {
        const auto* const bits = reinterpret_cast<const std::uint16_t*>(data);
        return Brain ? S::load_bf16(bits) : S::load_f16(bits);
    }

    template <int R, int N, class Use>
    static void multiply(const Stream& stream, const std::uint8_t* factors, const RowFactors*, const Use& use) {
        FloatSums<S, R * N, N> sums;
        sums.start();
        const auto* elements = stream.data;
        const auto* factor = reinterpret_cast<const float*>(factors);
        auto in_block = stream.block_steps;
        for (auto left = stream.total; left != 0; --left) {
            typename S::F32 vector[N];
            for (int n = 0; n < N; ++n) {
                vector[n] = load(elements + static_cast<std::size_t>(n) * stream.lanes);
                S::prefetch_far(elements + static_cast<std::size_t>(n) * stream.lanes + stream.ahead);
            }
            sums.add(vector, factor);
            factor += R;
            elements += stream.step;
            if (--in_block == 0) {
                elements += stream.jump;
                in_block = stream.block_steps;
            }
        }
        sums.use(use);
    }

    static RowFactors put_query(const float* query, std::size_t dim, std::uint8_t* factors, int group, int r) {
        return put(query, dim, factors, group, r);
    }
    static RowFactors put_weights(const float* weights, std::size_t blocks, float, std::uint8_t* factors, int group, int r) {
        return put(weights, blocks * kWide, factors, group, r);
    }

private:
    static RowFactors put(const float* values, std::size_t count, std::uint8_t* factors, int group, int r) {
        auto* const to = reinterpret_cast<float*>(factors) + r;
        for (std::size_t i = 0; i < count; ++i)
            to[i * static_cast<std::size_t>(group)] = values[i];
        return {1.0f, {0, 0}};
    }
};

}  // namespace
}  // namespace edgert

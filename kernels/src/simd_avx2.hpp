// AVX2 with FMA and F16C: 16 lanes are two registers. The template parameter is the byte product, which differs.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgert {
namespace {

// acc[lane] += codes (unsigned) * four (signed), in AVX2 alone. vpmaddubsw saturates at 16 bits, which two products of a
// byte above 127 can pass, so bytes are widened to words first; nibbles cannot reach it (2 * 15 * 128 < 2^15).
struct WordProducts {
    static __m256i bytes(__m256i acc, __m256i codes, __m256i four) {
        const auto even = _mm256_and_si256(codes, _mm256_set1_epi16(0x00FF));
        const auto odd = _mm256_srli_epi16(codes, 8);
        const auto even_four = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
        const auto odd_four = _mm256_srai_epi16(four, 8);
        const auto sum = _mm256_add_epi32(_mm256_madd_epi16(even, even_four), _mm256_madd_epi16(odd, odd_four));
        return _mm256_add_epi32(acc, sum);
    }
    static __m256i nibbles(__m256i acc, __m256i codes, __m256i four) {
        const auto pairs = _mm256_maddubs_epi16(codes, four);
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

template <class Products>
struct Avx2 {
    static constexpr int kVectors = 8;
    static constexpr int kRows = 4;
    static constexpr bool kRowByRow = false;

    struct F32 {
        __m256 a, b;
    };
    struct I32 {
        __m256i a, b;
    };
    struct U8 {
        __m256i a, b;
    };

    static F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F32 x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static F32 load_f16(const std::uint16_t* p) { return {_mm256_cvtph_ps(words(p)), _mm256_cvtph_ps(words(p + 8))}; }
    static F32 load_bf16(const std::uint16_t* p) { return {from_bf16(words(p)), from_bf16(words(p + 8))}; }
    static void store_f16(std::uint16_t* p, F32 x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
    }
    static F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F32 select_gt(F32 x, F32 y, F32 yes, F32 no) {
        return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
    }
    static F32 round(F32 x) {
        return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    static float sum(F32 x) {
        const auto half = _mm256_add_ps(x.a, x.b);
        auto quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
        return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
    }
    static float highest(F32 x) {
        const auto half = _mm256_max_ps(x.a, x.b);
        auto quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
        return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
    }

    static I32 iset1(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static I32 iload(const std::int32_t* p) { return {integers(p), integers(p + 8)}; }
    static void istore(std::int32_t* p, I32 x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
    }
    static I32 iload_u8(const std::uint8_t* p) {
        const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    }
    static I32 iadd(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    static I32 isub(I32 x, I32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
    static I32 imul16(I32 x, I32 y) {
        const auto low = _mm256_set1_epi32(0xFFFF);  // see Avx512Vnni::imul16
        return {_mm256_madd_epi16(_mm256_and_si256(x.a, low), y.a), _mm256_madd_epi16(_mm256_and_si256(x.b, low), y.b)};
    }
    static I32 imax(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
    static I32 iand(I32 x, I32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
    template <int Bits>
    static I32 shift_left(I32 x) {
        return {_mm256_slli_epi32(x.a, Bits), _mm256_slli_epi32(x.b, Bits)};
    }
    template <int Bits>
    static I32 shift_right(I32 x) {
        return {_mm256_srai_epi32(x.a, Bits), _mm256_srai_epi32(x.b, Bits)};
    }
    static std::int32_t isum(I32 x) {
        const auto half = _mm256_add_epi32(x.a, x.b);
        auto quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        quarter = _mm_add_epi32(quarter, _mm_unpackhi_epi64(quarter, quarter));
        return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 1)));
    }
    static std::int32_t ihighest(I32 x) {
        const auto half = _mm256_max_epi32(x.a, x.b);
        auto quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        quarter = _mm_max_epi32(quarter, _mm_unpackhi_epi64(quarter, quarter));
        return _mm_cvtsi128_si32(_mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 1)));
    }
    static void store_s8(std::int8_t* p, I32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_bytes(x)); }
    static void store_quads(std::uint8_t* p, std::size_t stride, I32 x, I32 y) {
        const auto x_bytes = low_bytes(x);
        const auto y_bytes = low_bytes(y);
        const auto front = _mm_unpacklo_epi32(x_bytes, y_bytes);
        const auto back = _mm_unpackhi_epi32(x_bytes, y_bytes);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), front);
        _mm_storeh_pd(reinterpret_cast<double*>(p + stride), _mm_castsi128_pd(front));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * stride), back);
        _mm_storeh_pd(reinterpret_cast<double*>(p + 3 * stride), _mm_castsi128_pd(back));
    }
    static F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static I32 to_i32(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
    static I32 bits(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
    static F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

    static void pin(I32& x) {
#ifdef __GNUC__
        __asm__("" : "+x"(x.a), "+x"(x.b));
#else
        (void)x;
#endif
    }

    static U8 load_u8(const std::uint8_t* p) { return {integers(p), integers(p + 32)}; }
    static U8 low_nibbles(U8 x) {
        const auto low = _mm256_set1_epi8(0x0F);
        return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
    }
    static U8 high_nibbles(U8 x) {
        const auto low = _mm256_set1_epi8(0x0F);
        return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), low), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), low)};
    }
    static I32 dot(I32 acc, U8 codes, const std::int8_t* four) {
        const auto all = broadcast(four);
        return {Products::bytes(acc.a, codes.a, all), Products::bytes(acc.b, codes.b, all)};
    }
    static I32 dot_nibbles(I32 acc, U8 codes, const std::int8_t* four) {
        const auto all = broadcast(four);
        return {Products::nibbles(acc.a, codes.a, all), Products::nibbles(acc.b, codes.b, all)};
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

private:
    static __m128i low_bytes(I32 x) {
        const auto low = _mm256_set1_epi32(0xFF);  // masked first, so that no pack saturates
        const auto words = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
        const auto ordered = _mm256_permute4x64_epi64(words, 0xD8);  // packing goes half by half
        return _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    }
    static __m128i words(const std::uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __m256 from_bf16(__m128i words) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
    static __m256i integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static __m256i broadcast(const std::int8_t* four) {
        std::int32_t word;
        std::memcpy(&word, four, sizeof word);
        return _mm256_set1_epi32(word);
    }
};

}  // namespace
}  // namespace edgert

// AVX-512 with VNNI: 16 lanes are one register.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgert {
namespace {

struct Avx512Vnni {
    static constexpr int kVectors = 32;
    static constexpr int kRows = 8;
    static constexpr bool kRowByRow = false;  // see quantize_tile

    using F32 = __m512;
    struct I32 {
        __m512i v;
    };
    struct U8 {
        __m512i v;
    };

    static F32 set1(float x) { return _mm512_set1_ps(x); }
    static F32 load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
    static F32 load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(load_16_words(p)); }
    static F32 load_bf16(const std::uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_words(p)), 16));
    }
    static void store_f16(std::uint16_t* p, F32 a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
    static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
    static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
    static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
    static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
    static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
    static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
    static F32 select_gt(F32 a, F32 b, F32 yes, F32 no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
    }
    static F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static float sum(F32 a) {
        const auto half = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
        auto quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
        return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
    }
    static float highest(F32 a) {
        const auto half = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
        auto quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
        return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
    }

    static I32 iset1(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
    static I32 iload(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
    static void istore(std::int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
    static I32 iload_u8(const std::uint8_t* p) {
        return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static I32 iadd(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
    static I32 isub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
    // vpmaddwd multiplies the low halves; for a negative factor the other's high half is not zero, so one is masked.
    static I32 imul16(I32 a, I32 b) {
        return {_mm512_madd_epi16(_mm512_and_si512(a.v, _mm512_set1_epi32(0xFFFF)), b.v)};
    }
    static I32 imax(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
    static I32 iand(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
    template <int Bits>
    static I32 shift_left(I32 a) {
        return {_mm512_slli_epi32(a.v, Bits)};
    }
    template <int Bits>
    static I32 shift_right(I32 a) {
        return {_mm512_srai_epi32(a.v, Bits)};
    }
    static std::int32_t isum(I32 a) { return _mm512_reduce_add_epi32(a.v); }
    static std::int32_t ihighest(I32 a) { return _mm512_reduce_max_epi32(a.v); }
    static void store_s8(std::int8_t* p, I32 a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
    }
    static void store_quads(std::uint8_t* p, std::size_t stride, I32 a, I32 b) {
        const auto a_bytes = _mm512_cvtepi32_epi8(a.v);
        const auto b_bytes = _mm512_cvtepi32_epi8(b.v);
        const auto front = _mm_unpacklo_epi32(a_bytes, b_bytes);
        const auto back = _mm_unpackhi_epi32(a_bytes, b_bytes);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), front);
        _mm_storeh_pd(reinterpret_cast<double*>(p + stride), _mm_castsi128_pd(front));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * stride), back);
        _mm_storeh_pd(reinterpret_cast<double*>(p + 3 * stride), _mm_castsi128_pd(back));
    }
    static F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a.v); }
    static I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a)}; }
    static I32 bits(F32 a) { return {_mm512_castps_si512(a)}; }
    static F32 from_bits(I32 a) { return _mm512_castsi512_ps(a.v); }

    static void pin(I32& a) {
#ifdef __GNUC__
        __asm__("" : "+v"(a.v));
#else
        (void)a;
#endif
    }

    static U8 load_u8(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    static void store_u8(std::uint8_t* p, U8 a) { _mm512_storeu_si512(p, a.v); }
    static U8 low_nibbles(U8 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0F))}; }
    static U8 high_nibbles(U8 a) {
        return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(0x0F))};
    }
    static I32 dot(I32 acc, U8 codes, const std::int8_t* four) {
        std::int32_t word;
        std::memcpy(&word, four, sizeof word);
        return {_mm512_dpbusd_epi32(acc.v, codes.v, _mm512_set1_epi32(word))};
    }
    static I32 dot_nibbles(I32 acc, U8 codes, const std::int8_t* four) { return dot(acc, codes, four); }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

private:
    static __m256i load_16_words(const std::uint16_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static __m256 upper(F32 a) {
        return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(a), 1));
    }
};

}  // namespace
}  // namespace edgert

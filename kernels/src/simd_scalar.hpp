// The portable path, and the definition of what every other one must compute: 16 lanes, one after the other.
//
// All paths round alike: products are joined to sums by fused multiply-add only where the source says fma, and sums over
// lanes have one order. Integer results are therefore equal everywhere, and floating point ones too.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.hpp"

namespace edgert {
namespace {  // internal linkage: nothing compiled for one instruction set may be linked into another's place

struct Scalar {
    static constexpr int kVectors = 8;  // registers of 16 lanes that a kernel may count on
    static constexpr int kRows = 4;     // rows of activations that a product of matrices takes at once
    static constexpr bool kRowByRow = false;  // see quantize_tile

    struct F32 {
        float v[16];
    };
    struct I32 {
        std::int32_t v[16];
    };
    struct U8 {  // 16 lanes of 4 bytes
        std::uint8_t v[64];
    };

    template <class Function>
    static F32 each(Function f) {
        F32 out;
        for (int i = 0; i < 16; ++i)
            out.v[i] = f(i);
        return out;
    }
    template <class Function>
    static I32 each_int(Function f) {
        I32 out;
        for (int i = 0; i < 16; ++i)
            out.v[i] = f(i);
        return out;
    }

    static F32 set1(float x) { return each([&](int) { return x; }); }
    static F32 load(const float* p) { return each([&](int i) { return p[i]; }); }
    static void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
    static F32 load_f16(const std::uint16_t* p) { return each([&](int i) { return f16_to_f32(p[i]); }); }
    static F32 load_bf16(const std::uint16_t* p) { return each([&](int i) { return bf16_to_f32(p[i]); }); }
    static void store_f16(std::uint16_t* p, F32 a) {
        for (int i = 0; i < 16; ++i)
            p[i] = f32_to_f16(a.v[i]);
    }
    static F32 add(F32 a, F32 b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static F32 sub(F32 a, F32 b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static F32 mul(F32 a, F32 b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static F32 div(F32 a, F32 b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
    static F32 fma(F32 a, F32 b, F32 c) { return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
    // As x86 has them: b where either is NaN.
    static F32 min(F32 a, F32 b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static F32 max(F32 a, F32 b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    // where a > b: yes, elsewhere (NaN too): no
    static F32 select_gt(F32 a, F32 b, F32 yes, F32 no) {
        return each([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
    }
    static F32 round(F32 a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
    static float sum(F32 a) {  // halves onto each other: the order in which wide registers do it
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                a.v[i] += a.v[i + width];
        return a.v[0];
    }
    static float highest(F32 a) {
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i)
                a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
        return a.v[0];
    }

    static I32 iset1(std::int32_t x) { return each_int([&](int) { return x; }); }
    static I32 iload(const std::int32_t* p) { return each_int([&](int i) { return p[i]; }); }
    static void istore(std::int32_t* p, I32 a) { std::memcpy(p, a.v, sizeof a.v); }
    static I32 iload_u8(const std::uint8_t* p) { return each_int([&](int i) { return p[i]; }); }
    static I32 iadd(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] + b.v[i]; }); }
    static I32 isub(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] - b.v[i]; }); }
    // For |a|, |b| < 2^15: what the vector paths multiply in one instruction.
    static I32 imul16(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] * b.v[i]; }); }
    static I32 imax(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static I32 iand(I32 a, I32 b) { return each_int([&](int i) { return a.v[i] & b.v[i]; }); }
    template <int Bits>
    static I32 shift_left(I32 a) {
        return each_int([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << Bits); });
    }
    template <int Bits>
    static I32 shift_right(I32 a) {  // arithmetic
        return each_int([&](int i) { return a.v[i] >> Bits; });
    }
    static std::int32_t isum(I32 a) {
        std::int32_t out = 0;
        for (const auto x : a.v)
            out += x;
        return out;
    }
    static std::int32_t ihighest(I32 a) {
        auto out = a.v[0];
        for (const auto x : a.v)
            out = x > out ? x : out;
        return out;
    }
    static void store_s8(std::int8_t* p, I32 a) {  // the low bytes
        for (int i = 0; i < 16; ++i)
            p[i] = static_cast<std::int8_t>(static_cast<std::uint32_t>(a.v[i]));
    }
    // The low bytes of four lanes of one, then of the other, for each four lanes: 8 bytes every `stride`.
    static void store_quads(std::uint8_t* p, std::size_t stride, I32 a, I32 b) {
        for (std::size_t i = 0; i < 16; ++i) {
            p[i / 4 * stride + i % 4] = static_cast<std::uint8_t>(static_cast<std::uint32_t>(a.v[i]) & 0xFF);
            p[i / 4 * stride + 4 + i % 4] = static_cast<std::uint8_t>(static_cast<std::uint32_t>(b.v[i]) & 0xFF);
        }
    }
    static F32 to_f32(I32 a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
    static I32 to_i32(F32 a) {  // to nearest, ties to even; what does not fit becomes INT_MIN, as on x86
        return each_int([&](int i) {
            return a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f ? static_cast<std::int32_t>(std::nearbyint(a.v[i]))
                                                                      : std::numeric_limits<std::int32_t>::min();
        });
    }
    static I32 bits(F32 a) {
        I32 out;
        std::memcpy(&out, &a, sizeof out);
        return out;
    }
    static F32 from_bits(I32 a) {
        F32 out;
        std::memcpy(&out, &a, sizeof out);
        return out;
    }

    // Ends what the compiler knows of a sum. GCC otherwise holds some twice through a loop, as 8 lanes of 64 bits and as 16
    // of 32, and runs out of registers.
    static void pin(I32&) {}

    static U8 load_u8(const std::uint8_t* p) {
        U8 out;
        std::memcpy(out.v, p, sizeof out.v);
        return out;
    }
    static void store_u8(std::uint8_t* p, U8 a) { std::memcpy(p, a.v, sizeof a.v); }
    static U8 low_nibbles(U8 a) {
        for (auto& x : a.v)
            x &= 0x0F;
        return a;
    }
    static U8 high_nibbles(U8 a) {
        for (auto& x : a.v)
            x >>= 4;
        return a;
    }
    // acc[lane] += sum over j < 4 of codes[lane][j] * four[j], the codes unsigned.
    static I32 dot(I32 acc, U8 codes, const std::int8_t* four) {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 4; ++j)
                acc.v[i] += codes.v[4 * i + j] * four[j];
        return acc;
    }
    // The same for codes below 16, which some instruction sets multiply faster.
    static I32 dot_nibbles(I32 acc, U8 codes, const std::int8_t* four) { return dot(acc, codes, four); }
    static void prefetch(const void*) {}
    static void prefetch_far(const void*) {}  // into the second level, which can wait for more lines at once
};

}  // namespace
}  // namespace edgert

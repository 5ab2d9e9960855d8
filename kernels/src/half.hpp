// 16-bit floating point numbers as their bits.

#pragma once

#include <cstdint>
#include <cstring>

namespace edgert {
namespace {

inline float float_of(std::uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline std::uint32_t bits_of(float x) {
    std::uint32_t out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

inline float bf16_to_f32(std::uint16_t x) {
    return float_of(static_cast<std::uint32_t>(x) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline std::uint16_t f32_to_bf16(float x) {
    const auto bits = bits_of(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline float f16_to_f32(std::uint16_t x) {
    const auto sign = static_cast<std::uint32_t>(x & 0x8000u) << 16;
    const std::uint32_t exponent = x >> 10 & 0x1Fu;
    const std::uint32_t fraction = x & 0x3FFu;
    if (exponent == 0x1F)
        return float_of(sign | 0x7F800000u | fraction << 13 | (fraction != 0 ? 0x400000u : 0u));
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const auto magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | (exponent + 112u) << 23 | fraction << 13);
}

// To nearest, ties to even; too large becomes infinite, NaN stays NaN.
inline std::uint16_t f32_to_f16(float x) {
    const auto bits = bits_of(x);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const auto magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u)
        return static_cast<std::uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
    if (magnitude >= 0x477FF000u)  // 65520, from where on it rounds to infinity
        return static_cast<std::uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the fraction
        const auto moved = float_of(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bits_of(moved) - 0x3F000000u));
    }
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13));
}

}  // namespace
}  // namespace edgert

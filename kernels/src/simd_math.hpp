// Functions of 16 lanes, built from the operations of an instruction set, so that all of them round alike.

#pragma once

namespace edgert {
namespace {

// e^x, relative error below 2e-7 for -87.3 <= x <= 88; clamped to that range, NaN stays NaN.
// Coefficients: Cephes, expf.c (S. Moshier), https://www.netlib.org/cephes/
template <class S>
typename S::F32 exp(typename S::F32 x) {
    x = S::max(S::set1(-87.3f), S::min(S::set1(88.0f), x));
    const auto n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
    auto r = S::fma(n, S::set1(-0.693359375f), x);
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    auto p = S::fma(S::set1(1.9875691500e-4f), r, S::set1(1.3981999507e-3f));
    p = S::fma(p, r, S::set1(8.3334519073e-3f));
    p = S::fma(p, r, S::set1(4.1665795894e-2f));
    p = S::fma(p, r, S::set1(1.6666665459e-1f));
    p = S::fma(p, r, S::set1(5.0000001201e-1f));
    p = S::add(S::fma(p, S::mul(r, r), r), S::set1(1.0f));
    const auto power = S::from_bits(S::template shift_left<23>(S::iadd(S::to_i32(n), S::iset1(127))));
    return S::mul(p, power);
}

template <class S>
typename S::F32 sigmoid(typename S::F32 x) {
    return S::div(S::set1(1.0f), S::add(S::set1(1.0f), exp<S>(S::sub(S::set1(0.0f), x))));
}

template <class S>
typename S::F32 tanh(typename S::F32 x) {  // 2 sigmoid(2x) - 1
    return S::fma(S::set1(2.0f), sigmoid<S>(S::add(x, x)), S::set1(-1.0f));
}

template <class S>
typename S::F32 silu(typename S::F32 x) {
    return S::mul(x, sigmoid<S>(x));
}

// x/2 * (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 (error < 1.5e-7).
template <class S>
typename S::F32 gelu(typename S::F32 x) {
    const auto z = S::mul(x, S::set1(0.70710678118654752f));
    const auto size = S::from_bits(S::iand(S::bits(z), S::iset1(0x7FFFFFFF)));
    const auto t = S::div(S::set1(1.0f), S::fma(S::set1(0.3275911f), size, S::set1(1.0f)));
    auto p = S::fma(S::set1(1.061405429f), t, S::set1(-1.453152027f));
    p = S::fma(p, t, S::set1(1.421413741f));
    p = S::fma(p, t, S::set1(-0.284496736f));
    p = S::mul(S::fma(p, t, S::set1(0.254829592f)), t);
    // 1 - erf(|z|); for negative x the sum 1 + erf is just this, without a difference of near equals.
    const auto rest = S::mul(p, exp<S>(S::sub(S::set1(0.0f), S::mul(z, z))));
    const auto sum = S::select_gt(x, S::set1(0.0f), S::sub(S::set1(2.0f), rest), rest);
    return S::mul(S::mul(x, S::set1(0.5f)), sum);
}

// The tanh form of Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), written as a sigmoid.
template <class S>
typename S::F32 gelu_tanh(typename S::F32 x) {
    const auto cube = S::mul(S::mul(x, x), x);
    const auto u = S::mul(S::fma(S::set1(0.044715f), cube, x), S::set1(1.5957691216057308f));
    return S::mul(x, sigmoid<S>(u));
}

}  // namespace
}  // namespace edgert

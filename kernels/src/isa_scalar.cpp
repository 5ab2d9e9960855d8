#include "simd_scalar.hpp"
// The instruction set comes first: the kernels are templates over it.
#include "attention_kernels.hpp"
#include "isa.hpp"

namespace edgert {
extern const AttentionKernels scalar_attention;
constexpr AttentionKernels scalar_attention = attention_kernels<Scalar>();
extern const Kernels scalar_kernels;
constexpr Kernels scalar_kernels = make_kernels<Scalar>("scalar", scalar_attention);
}  // namespace edgert

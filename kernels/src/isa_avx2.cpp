#include "simd_avx2.hpp"

#include "attention_kernels.hpp"
#include "isa.hpp"

namespace edgert {
extern const AttentionKernels avx2_attention;
constexpr AttentionKernels avx2_attention = attention_kernels<Avx2<WordProducts>>();
extern const Kernels avx2_kernels;
constexpr Kernels avx2_kernels = make_kernels<Avx2<WordProducts>>("avx2", avx2_attention);
}  // namespace edgert

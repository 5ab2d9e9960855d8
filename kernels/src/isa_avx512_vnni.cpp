#include "simd_avx512.hpp"
// The instruction set comes first: the kernels are templates over it.
#include "attention_kernels.hpp"
#include "isa.hpp"

namespace edgert {
extern const AttentionKernels avx512_vnni_attention;
constexpr AttentionKernels avx512_vnni_attention = attention_kernels<Avx512Vnni>();
extern const Kernels avx512_vnni_kernels;
constexpr Kernels avx512_vnni_kernels = make_kernels<Avx512Vnni>("avx512-vnni", avx512_vnni_attention);
}  // namespace edgert

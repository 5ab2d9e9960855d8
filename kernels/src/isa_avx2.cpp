#include "simd_avx2.hpp"

#include "isa.hpp"

namespace edgert {
extern const Kernels avx2_kernels;
constexpr Kernels avx2_kernels = make_kernels<Avx2<WordProducts>>("avx2");
}  // namespace edgert

#include "simd_avx512.hpp"
// The instruction set comes first: the kernels are templates over it.
#include "isa.hpp"

namespace edgert {
extern const Kernels avx512_vnni_kernels;
constexpr Kernels avx512_vnni_kernels = make_kernels<Avx512Vnni>("avx512-vnni");
}  // namespace edgert

#include "simd_scalar.hpp"
// The instruction set comes first: the kernels are templates over it.
#include "isa.hpp"

namespace edgert {
extern const Kernels scalar_kernels;
constexpr Kernels scalar_kernels = make_kernels<Scalar>("scalar");
}  // namespace edgert

// The AMX path with its tiles in software: what it computes can be tested on any processor, its speed on none.

#include "simd_scalar.hpp"

#include "amx_kernels.hpp"
#include "isa.hpp"

namespace edgert {
namespace {

struct EmulatedRows : Scalar {
    static constexpr int kRows = 16;
    static constexpr bool kRowByRow = true;
};

struct EmulatedTiles {
    struct Session {
        Session() {}
    };

    // TDPBSUD: signed bytes of the first operand, unsigned ones of the second.
    static void multiply(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads, std::int32_t* out) {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 16; ++n) {
                std::int32_t sum = 0;
                for (int k = 0; k < kStepColumns; ++k)
                    sum += rows[m * stride + k] * quads[k / 4 * 64 + n * 4 + k % 4];
                out[16 * m + n] = sum;
            }
    }
};

}  // namespace

extern const AttentionKernels scalar_attention;
extern const Kernels amx_emulated_kernels;
constexpr Kernels amx_emulated_kernels = [] {
    auto kernels = make_kernels<EmulatedRows>("amx-int8-emulated", scalar_attention);
    kernels.multiply_blocks = multiply_blocks_in_tiles<EmulatedRows, EmulatedTiles>;
    return kernels;
}();
}  // namespace edgert

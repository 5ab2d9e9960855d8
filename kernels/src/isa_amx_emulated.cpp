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

    static std::int32_t (&sums())[16][16] {
        static thread_local std::int32_t tile[16][16];
        return tile;
    }
    static void zero() { std::memset(sums(), 0, sizeof sums()); }
    // TDPBSUD: signed bytes of the first operand, unsigned ones of the second.
    static void multiply_columns(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads, int columns) {
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < columns; ++k)
                for (int n = 0; n < 16; ++n)
                    sums()[m][n] += rows[m * stride + k] * quads[k / 4 * 64 + n * 4 + k % 4];
    }
    static void multiply(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads) {
        multiply_columns(rows, stride, quads, 64);
    }
    static void multiply_half(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads) {
        multiply_columns(rows, stride, quads, 32);
    }
    static void store(std::int32_t* out) { std::memcpy(out, sums(), sizeof sums()); }
};

}  // namespace

extern const Kernels amx_emulated_kernels;
constexpr Kernels amx_emulated_kernels = [] {
    auto kernels = make_kernels<EmulatedRows>("amx-int8-emulated");
    kernels.multiply_blocks = multiply_blocks_in_tiles<EmulatedRows, EmulatedTiles>;
    return kernels;
}();
}  // namespace edgert

#include "simd_avx512.hpp"

#include "amx_kernels.hpp"
#include "isa.hpp"

namespace edgert {
namespace {

struct AmxRows : Avx512Vnni {
    static constexpr int kRows = 16;
    static constexpr bool kRowByRow = true;
};

// Tile 0: sums, 16 rows of 16 numbers. Tile 1: a step of 16 rows of activations. Tile 2: the step of a block of weights,
// 8 quads of columns.
struct Amx {
    struct Session {
        Session() {
            struct {
                std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
                std::uint16_t bytes[16] = {64, kStepColumns, 64};
                std::uint8_t rows[16] = {16, 16, kStepColumns / 4};
            } config;
            static_assert(sizeof config == 64, "the layout that LDTILECFG reads");
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    static void multiply(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads, std::int32_t* out) {
        _tile_zero(0);
        _tile_loadd(1, rows, static_cast<std::size_t>(stride));
        _tile_loadd(2, quads, 64);
        _tile_dpbsud(0, 1, 2);
        _tile_stored(0, out, 64);
    }
};

}  // namespace

extern const AttentionKernels avx512_vnni_attention;
extern const Kernels amx_int8_kernels;
constexpr Kernels amx_int8_kernels = [] {
    auto kernels = make_kernels<AmxRows>("amx-int8", avx512_vnni_attention);
    kernels.multiply_blocks = multiply_blocks_in_tiles<AmxRows, Amx>;
    return kernels;
}();
}  // namespace edgert

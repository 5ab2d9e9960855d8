#include "simd_avx512.hpp"

#include "amx_kernels.hpp"
#include "isa.hpp"

namespace edgert {
namespace {

struct AmxRows : Avx512Vnni {
    static constexpr int kRows = 16;
    static constexpr bool kRowByRow = true;
};

// Tile 0: sums, 16 rows of 16 numbers. Tiles 1 and 2: 16 rows of activations and 16 quads of columns of weights, 64 bytes
// each. Tiles 3 and 4: the same for half as many columns.
struct Amx {
    struct Session {
        Session() {
            struct {
                std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
                std::uint16_t bytes[16] = {64, 64, 64, 32, 64};
                std::uint8_t rows[16] = {16, 16, 16, 16, 8};
            } config;
            static_assert(sizeof config == 64, "the layout that LDTILECFG reads");
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    static void zero() { _tile_zero(0); }
    static void multiply(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads) {
        _tile_loadd(1, rows, static_cast<std::size_t>(stride));
        _tile_loadd(2, quads, 64);
        _tile_dpbsud(0, 1, 2);
    }
    static void multiply_half(const std::int8_t* rows, std::int64_t stride, const std::uint8_t* quads) {
        _tile_loadd(3, rows, static_cast<std::size_t>(stride));
        _tile_loadd(4, quads, 64);
        _tile_dpbsud(0, 3, 4);
    }
    static void store(std::int32_t* out) { _tile_stored(0, out, 64); }
};

}  // namespace

extern const Kernels amx_int8_kernels;
constexpr Kernels amx_int8_kernels = [] {
    auto kernels = make_kernels<AmxRows>("amx-int8");
    kernels.multiply_blocks = multiply_blocks_in_tiles<AmxRows, Amx>;
    return kernels;
}();
}  // namespace edgert

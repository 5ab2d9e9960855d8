// How weights lie in memory: one layout for all instruction sets, used where it is mapped.
//
// N rows (out features), K columns (in features), `group` columns share a scale. Rows go in blocks of 16, padded with
// rows of scale 0; columns are padded to a multiple of 32 with codes that mean zero. weight = (code - zero) * scale.
//
//   codes        4 bits: [blocks][padded / 8][16 rows][4 bytes], a byte holds columns 8v + j (low half), 8v + 4 + j (high)
//                8 bits: [blocks][padded / 4][16 rows][4 bytes], a byte holds column 4v + j
//   scales       f16 [blocks][K / group][16]
//   zero points  u8 [blocks][K / group][16]; only if asymmetric, otherwise the zero point is 8 or 128
//
// Sixteen rows of four columns are what one instruction multiplies: vpdpbusd on 512 bits, twice on 256, a row of an AMX
// tile. Wider or narrower registers take more or fewer of them, so no instruction set needs an order of its own.

#pragma once

#include "linear.hpp"
#include "openvino/core/except.hpp"

namespace edgert {

struct PackedShape {
    std::int64_t in_features = 0;
    std::int64_t rows = 0;  // out features, before padding
    std::int64_t bits = 4;
    std::int64_t group = 0;
    bool asymmetric = false;

    // Throws ov::Exception where the numbers fit no packed weights.
    void check(const std::string& owner) const {
        constexpr std::int64_t limit = std::int64_t{1} << 31;
        OPENVINO_ASSERT(in_features > 0 && in_features < limit, owner, ": in_features is ", in_features, ", expected 1 to 2^31 - 1");
        OPENVINO_ASSERT(rows > 0 && rows < limit, owner, ": out_features is ", rows, ", expected 1 to 2^31 - 1");
        OPENVINO_ASSERT(bits == 4 || bits == 8, owner, ": bits is ", bits, ", expected 4 or 8");
        OPENVINO_ASSERT(group == in_features || (group > 0 && group % 32 == 0 && in_features % group == 0), owner, ": group is ",
                        group, ", expected in_features (", in_features, ") or a multiple of 32 that divides it");
    }
    std::int64_t padded() const { return (in_features + 31) / 32 * 32; }
    std::int64_t blocks() const { return (rows + kLanes - 1) / kLanes; }
    std::int64_t groups() const { return in_features / group; }
    std::size_t bytes() const {
        const auto scales = blocks() * groups() * kLanes;
        return static_cast<std::size_t>(blocks() * kLanes * (padded() / 8) * bits + scales * (asymmetric ? 3 : 2));
    }
    // Throws ov::Exception where the scales could not be read as 16-bit numbers.
    Weights view(const std::uint8_t* data, const std::string& owner) const {
        OPENVINO_ASSERT(reinterpret_cast<std::uintptr_t>(data) % alignof(std::uint16_t) == 0, owner,
                        ": weights begin at an odd address");
        Weights w{};
        w.codes = data;
        const auto* scales = data + blocks() * kLanes * (padded() / 8) * bits;
        w.scales = reinterpret_cast<const std::uint16_t*>(scales);
        w.zero_points = asymmetric ? scales + blocks() * groups() * kLanes * 2 : nullptr;
        w.in_features = in_features;
        w.padded = padded();
        w.blocks = blocks();
        w.groups = groups();
        w.bits = static_cast<int>(bits);
        return w;
    }
};

}  // namespace edgert

// What QuantizedLinear hands to the kernels of an instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edgert {

enum class Activation { none, silu, gelu, gelu_tanh };

constexpr std::int64_t kLanes = 16;     // rows of a block of packed weights
constexpr std::int64_t kStepColumns = 32;  // columns of activations that share one scale

// Packed weights: see packed_weights.hpp.
struct Weights {
    const std::uint8_t* codes;
    const std::uint16_t* scales;      // f16 [blocks][groups][16]
    const std::uint8_t* zero_points;  // [blocks][groups][16]; null where symmetric
    std::int64_t in_features;
    std::int64_t padded;  // in_features, rounded up to whole steps
    std::int64_t blocks;
    std::int64_t groups;
    int bits;  // 4 or 8

    std::int64_t steps() const { return padded / kStepColumns; }
    std::int64_t steps_of_group() const { return steps() / groups; }
    std::int64_t block_bytes() const { return padded * kLanes * bits / 8; }
};

// Rows of INT8 activations in tiles of `Kernels::rows` rows (the last tile may have fewer): row r of a tile with n rows
// has its columns 4q..4q+3 at codes[(q * n + r) * 4], the scale of its step s at [s * n + r], and at [g * n + r] the sum of
// its values over group g of the weights, which their zero points are multiplied with.
struct Activations {
    std::int8_t* codes;  // [tile][padded / 4][n][4]
    float* scales;       // [tile][steps][n]
    float* sums;         // [tile][groups][n]
    std::int64_t rows;
};

struct Norm {
    const float* weight;  // [in_features]; null for none
    float epsilon;
};

struct Epilogue {
    const float* bias;      // [columns], or null
    const float* residual;  // [rows, columns], or null; may be out
    float* out;             // [rows, columns]
    std::int64_t columns;
    bool gated;  // blocks 2b and 2b + 1 are the gate and the up part of the same 16 columns
    Activation activation;
};

}  // namespace edgert

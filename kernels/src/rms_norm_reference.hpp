// RMSNorm as its definition says it, one row after another, without OpenVINO.
//
// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4, with the epsilon under the root that Llama
// and its descendants use:   out[r][i] = data[r][i] / sqrt(mean_i(data[r][i]^2) + epsilon) * weight[i]

#pragma once

#include <cmath>
#include <cstddef>

namespace edgert {

// data [rows, width], weight [width] -> out [rows, width]; out may be data.
inline void rms_norm_reference(const float* data, const float* weight, float* out, std::size_t rows, std::size_t width,
                               float epsilon) {
    for (std::size_t row = 0; row < rows; ++row, data += width, out += width) {
        double sum = 0.0;  // in f32 the sum of a wide row would lose the low bits of the late elements
        for (std::size_t i = 0; i < width; ++i)
            sum += static_cast<double>(data[i]) * data[i];
        const auto scale =
            static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(width) + static_cast<double>(epsilon)));
        for (std::size_t i = 0; i < width; ++i)
            out[i] = data[i] * scale * weight[i];
    }
}

}  // namespace edgert

#pragma once

#include <string>

#include "openvino/op/op.hpp"
#include "packed_weights.hpp"

namespace edgert {

// Activations, quantized to INT8 on the way, times packed INT4 or INT8 weights; with what usually stands around it.
//
//   out = gated ? act(gate) * up : product,  product = W . norm(data) + bias;  + residual
//
//   inputs      data         f32 [..., in_features]
//               weights      u8 [bytes], laid out as packed_weights.hpp says; gated ones in blocks of 16 by turns
//               norm_weight  f32 [in_features]          if norm is "rms"
//               bias         f32 [out_features]         if bias
//               residual     f32 [..., out_features]    if residual
//   attributes  in_features, out_features (of the output), bits (4, 8), group, asymmetric
//               norm ("" or "rms"), epsilon, gated, activation ("", "silu", "gelu", "gelu_tanh"; of the gate), bias, residual
//   output      f32 [..., out_features]
//
// Every 32 activations of a row share a scale (INT8 symmetric, amax / 127). A row with NaN or an infinite value
// becomes NaN.
class QuantizedLinear : public ov::op::Op {
public:
    OPENVINO_OP("QuantizedLinear", "edgert");

    QuantizedLinear() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    struct Attributes {
        std::int64_t in_features = 0;
        std::int64_t out_features = 0;
        std::int64_t bits = 4;
        std::int64_t group = 0;
        bool asymmetric = false;
        std::string norm;
        double epsilon = 1e-6;
        bool gated = false;
        std::string activation;
        bool bias = false;
        bool residual = false;
    };

    PackedShape packed() const;
    std::size_t input_count() const;

    Attributes m;
};

}  // namespace edgert

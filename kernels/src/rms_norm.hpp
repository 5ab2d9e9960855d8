#pragma once

#include "openvino/op/op.hpp"

namespace edgert {

// Root mean square normalization over the last dimension, in f32.
//
//   inputs     data    f32 [..., D], rank 1 or more, any dimension dynamic
//              weight  f32 [D]
//   attribute  epsilon f32, finite and not negative
//   output     f32, the shape of data
class RMSNorm : public ov::op::Op {
public:
    OPENVINO_OP("RMSNorm", "edgert");

    RMSNorm() = default;
    RMSNorm(const ov::Output<ov::Node>& data, const ov::Output<ov::Node>& weight, float epsilon);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    float m_epsilon = 1e-6f;  // the default of Llama and Qwen configurations
};

}  // namespace edgert

#include "rms_norm.hpp"

#include <cmath>

#include "rms_norm_reference.hpp"

namespace edgert {

RMSNorm::RMSNorm(const ov::Output<ov::Node>& data, const ov::Output<ov::Node>& weight, float epsilon)
    : Op({data, weight}),
      m_epsilon(epsilon) {
    constructor_validate_and_infer_types();
}

void RMSNorm::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "takes 2 inputs (data, weight), got ", get_input_size());
    const char* names[] = {"data", "weight"};
    for (std::size_t i = 0; i < 2; ++i) {
        const auto& type = get_input_element_type(i);
        NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type.is_dynamic(), names[i], " must be f32, got ", type);
    }
    NODE_VALIDATION_CHECK(this, std::isfinite(m_epsilon) && m_epsilon >= 0.0f,
                          "epsilon must be finite and not negative, got ", m_epsilon);

    const auto& data = get_input_partial_shape(0);
    const auto& weight = get_input_partial_shape(1);
    NODE_VALIDATION_CHECK(this, weight.rank().compatible(1), "weight must have rank 1, got shape ", weight);
    auto shape = data;
    if (data.rank().is_static()) {
        NODE_VALIDATION_CHECK(this, data.size() >= 1, "data must have rank 1 or more, got a scalar");
        if (weight.rank().is_static()) {
            NODE_VALIDATION_CHECK(this, ov::Dimension::merge(shape[data.size() - 1], data[data.size() - 1], weight[0]),
                                  "the last dimension of data ", data, " must equal the size of weight ", weight);
        }
    }
    set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> RMSNorm::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    return std::make_shared<RMSNorm>(inputs[0], inputs[1], m_epsilon);
}

bool RMSNorm::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("epsilon", m_epsilon);
    return true;
}

bool RMSNorm::has_evaluate() const {
    return get_input_element_type(0) == ov::element::f32 && get_input_element_type(1) == ov::element::f32;
}

bool RMSNorm::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const auto& data = inputs[0];
    const auto& weight = inputs[1];
    // With dynamic dimensions the shapes are known only here, and a wrong one would read past the end of the weight.
    const auto shape = data.get_shape();
    OPENVINO_ASSERT(!shape.empty() && weight.get_shape() == ov::Shape{shape.back()}, "RMSNorm ", get_friendly_name(),
                    ": the last dimension of data ", shape, " must equal the size of weight ", weight.get_shape());
    outputs[0].set_shape(shape);
    const auto width = shape.back();
    if (data.get_size() == 0)
        return true;
    rms_norm_reference(data.data<const float>(), weight.data<const float>(), outputs[0].data<float>(),
                       data.get_size() / width, width, m_epsilon);
    return true;
}

}  // namespace edgert

#include "embedding_lookup.hpp"

#include "half.hpp"
#include "parallel.hpp"

namespace edgert {

namespace {

// One row of the table; out f32 [in_features].
void read_row(const Weights& w, std::int64_t row, float* out) {
    const auto block = row / kLanes, lane = row % kLanes, group = w.in_features / w.groups;
    const auto* codes = w.codes + block * w.block_bytes() + lane * 4;
    for (std::int64_t k = 0; k < w.in_features; ++k) {
        const auto at = block * w.groups * kLanes + k / group * kLanes + lane;
        const auto zero = w.zero_points == nullptr ? 1 << (w.bits - 1) : static_cast<int>(w.zero_points[at]);
        const auto byte = static_cast<int>(w.bits == 4 ? codes[k / 8 * 64 + k % 4] : codes[k / 4 * 64 + k % 4]);
        const auto code = w.bits == 8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
        out[k] = static_cast<float>(code - zero) * f16_to_f32(w.scales[at]);
    }
}

template <class Id>
void look_up(const ov::Tensor& ids, const Weights& w, std::int64_t rows, float* out, const std::string& name) {
    const auto* id = ids.data<const Id>();
    const auto count = static_cast<std::int64_t>(ids.get_size());
    for (std::int64_t i = 0; i < count; ++i)
        OPENVINO_ASSERT(id[i] >= -rows && id[i] < rows, name, ": id ", id[i], " is outside of a table of ", rows, " rows");
    parallel_for(count, [&](std::int64_t i) { read_row(w, id[i] < 0 ? id[i] + rows : id[i], out + i * w.in_features); });
}

}  // namespace

void EmbeddingLookup::validate_and_infer_types() {
    m_packed.check("EmbeddingLookup " + get_friendly_name());
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "takes 2 inputs (ids, weights), got ", get_input_size());
    const auto& ids = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, ids == ov::element::i32 || ids == ov::element::i64 || ids.is_dynamic(), "ids must be i32 or i64, got ", ids);
    const auto& weights = get_input_element_type(1);
    NODE_VALIDATION_CHECK(this, weights == ov::element::u8 || weights.is_dynamic(), "weights must be u8, got ", weights);
    const ov::PartialShape expected{static_cast<std::int64_t>(m_packed.bytes())};
    NODE_VALIDATION_CHECK(this, get_input_partial_shape(1).compatible(expected), "weights must have shape ", expected, ", got ",
                          get_input_partial_shape(1));
    auto shape = get_input_partial_shape(0);
    if (shape.rank().is_static())
        shape.push_back(m_packed.in_features);
    set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> EmbeddingLookup::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    auto copy = std::make_shared<EmbeddingLookup>();
    copy->m_packed = m_packed;
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool EmbeddingLookup::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in_features", m_packed.in_features);
    visitor.on_attribute("out_features", m_packed.rows);
    visitor.on_attribute("bits", m_packed.bits);
    visitor.on_attribute("group", m_packed.group);
    visitor.on_attribute("asymmetric", m_packed.asymmetric);
    return true;
}

bool EmbeddingLookup::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const auto name = "EmbeddingLookup " + get_friendly_name();
    OPENVINO_ASSERT(inputs[1].get_size() == m_packed.bytes(), name, ": weights have ", inputs[1].get_size(), " bytes, expected ",
                    m_packed.bytes());
    auto shape = inputs[0].get_shape();
    shape.push_back(static_cast<std::size_t>(m_packed.in_features));
    outputs[0].set_shape(shape);
    const auto w = m_packed.view(inputs[1].data<const std::uint8_t>(), name);
    if (inputs[0].get_element_type() == ov::element::i32)
        look_up<std::int32_t>(inputs[0], w, m_packed.rows, outputs[0].data<float>(), name);
    else
        look_up<std::int64_t>(inputs[0], w, m_packed.rows, outputs[0].data<float>(), name);
    return true;
}

}  // namespace edgert

#include "quantized_linear.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace edgert {

namespace {

// Weights that a thread takes at once: enough to outweigh handing them out, few enough that threads end together.
constexpr std::int64_t kPieceBytes = 128 * 1024;
// Activations that stay in the second cache (1 MB or more) while all weights pass by.
constexpr std::int64_t kChunkBytes = 384 * 1024;

Activation activation_of(const std::string& name) {
    if (name == "silu")
        return Activation::silu;
    if (name == "gelu")
        return Activation::gelu;
    return name == "gelu_tanh" ? Activation::gelu_tanh : Activation::none;
}

// Buffers of the thread that evaluates, kept from call to call.
struct Scratch {
    std::vector<std::int8_t> codes;
    std::vector<float> scales, sums;

    Activations fit(const Weights& w, std::int64_t rows) {
        return {grow(codes, rows * w.padded), grow(scales, rows * w.steps()), grow(sums, rows * w.groups), rows};
    }

private:
    template <class T>
    static T* grow(std::vector<T>& values, std::int64_t count) {
        if (values.size() < static_cast<std::size_t>(count))
            values.resize(static_cast<std::size_t>(count));
        return values.data();
    }
};

}  // namespace

PackedShape QuantizedLinear::packed() const {
    const auto rows = m.gated ? 2 * ((m.out_features + kLanes - 1) / kLanes * kLanes) : m.out_features;
    return {m.in_features, rows, m.bits, m.group, m.asymmetric};
}

std::size_t QuantizedLinear::input_count() const {
    return 2u + (m.norm.empty() ? 0u : 1u) + (m.bias ? 1u : 0u) + (m.residual ? 1u : 0u);
}

void QuantizedLinear::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, m.out_features > 0 && m.out_features < std::int64_t{1} << 30, "out_features is ", m.out_features,
                          ", expected 1 to 2^30 - 1");
    const auto shape = packed();
    shape.check("QuantizedLinear " + get_friendly_name());
    NODE_VALIDATION_CHECK(this, m.norm.empty() || m.norm == "rms", "norm is '", m.norm, "', expected '' or 'rms'");
    NODE_VALIDATION_CHECK(this, std::isfinite(m.epsilon) && m.epsilon >= 0.0, "epsilon must be finite and not negative, got ", m.epsilon);
    NODE_VALIDATION_CHECK(this, m.activation.empty() || (m.gated && activation_of(m.activation) != Activation::none), "activation is '",
                          m.activation, "', expected '', or for a gated product 'silu', 'gelu' or 'gelu_tanh'");
    NODE_VALIDATION_CHECK(this, !m.gated || !m.bias, "a gated product takes no bias");
    NODE_VALIDATION_CHECK(this, get_input_size() == input_count(), "takes ", input_count(), " inputs, got ", get_input_size());

    const auto check = [&](std::size_t input, const char* name, const ov::element::Type& type, const ov::PartialShape& expected) {
        const auto& found = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, found == type || found.is_dynamic(), name, " must be ", type, ", got ", found);
        NODE_VALIDATION_CHECK(this, get_input_partial_shape(input).compatible(expected), name, " must have shape ", expected, ", got ",
                              get_input_partial_shape(input));
    };
    auto rows = get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(this, rows.rank().is_dynamic() || rows.size() >= 1, "data must have rank 1 or more, got a scalar");
    if (rows.rank().is_static()) {
        NODE_VALIDATION_CHECK(this, rows[rows.size() - 1].compatible(m.in_features), "the last dimension of data ", rows, " must be in_features (",
                              m.in_features, ")");
        rows[rows.size() - 1] = m.out_features;
    }
    std::size_t next = 0;
    check(next++, "data", ov::element::f32, ov::PartialShape::dynamic());
    check(next++, "weights", ov::element::u8, ov::PartialShape{static_cast<std::int64_t>(shape.bytes())});
    if (!m.norm.empty())
        check(next++, "norm_weight", ov::element::f32, ov::PartialShape{m.in_features});
    if (m.bias)
        check(next++, "bias", ov::element::f32, ov::PartialShape{m.out_features});
    if (m.residual)
        check(next++, "residual", ov::element::f32, rows);
    set_output_type(0, ov::element::f32, rows);
}

std::shared_ptr<ov::Node> QuantizedLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    auto copy = std::make_shared<QuantizedLinear>();
    copy->m = m;
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
}

bool QuantizedLinear::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in_features", m.in_features);
    visitor.on_attribute("out_features", m.out_features);
    visitor.on_attribute("bits", m.bits);
    visitor.on_attribute("group", m.group);
    visitor.on_attribute("asymmetric", m.asymmetric);
    visitor.on_attribute("norm", m.norm);
    visitor.on_attribute("epsilon", m.epsilon);
    visitor.on_attribute("gated", m.gated);
    visitor.on_attribute("activation", m.activation);
    visitor.on_attribute("bias", m.bias);
    visitor.on_attribute("residual", m.residual);
    return true;
}

bool QuantizedLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    // With dynamic dimensions the shapes are known only here, and a wrong one would read past the end of a tensor.
    const auto name = "QuantizedLinear " + get_friendly_name();
    const auto& data = inputs[0];
    auto shape = data.get_shape();
    OPENVINO_ASSERT(!shape.empty() && shape.back() == static_cast<std::size_t>(m.in_features), name, ": the last dimension of data ", shape,
                    " must be in_features (", m.in_features, ")");
    shape.back() = static_cast<std::size_t>(m.out_features);
    outputs[0].set_shape(shape);
    const auto rows = static_cast<std::int64_t>(data.get_size()) / m.in_features;
    if (rows == 0)
        return true;
    const auto layout = packed();
    OPENVINO_ASSERT(inputs[1].get_size() == layout.bytes(), name, ": weights have ", inputs[1].get_size(), " bytes, expected ", layout.bytes());
    std::size_t next = 2;
    const auto optional = [&](bool given, std::size_t elements) -> const float* {
        if (!given)
            return nullptr;
        const auto& tensor = inputs[next++];
        OPENVINO_ASSERT(tensor.get_size() == elements, name, ": input ", next - 1, " has ", tensor.get_size(), " elements, expected ", elements);
        return tensor.data<const float>();
    };
    const Norm norm{optional(!m.norm.empty(), static_cast<std::size_t>(m.in_features)), static_cast<float>(m.epsilon)};
    const auto* bias = optional(m.bias, static_cast<std::size_t>(m.out_features));
    const auto* residual = optional(m.residual, ov::shape_size(shape));
    const Epilogue epilogue{bias, residual, outputs[0].data<float>(), m.out_features, m.gated, activation_of(m.activation)};

    const auto& k = kernels();
    const auto w = layout.view(inputs[1].data<const std::uint8_t>(), name);
    static thread_local Scratch scratch;
    const auto activations = scratch.fit(w, rows);
    const auto tiles = (rows + k.rows - 1) / k.rows;
    const auto* values = data.data<const float>();
    parallel_for(tiles, [&](std::int64_t tile) {
        static thread_local std::vector<float> row;
        if (row.size() < static_cast<std::size_t>(w.padded))
            row.resize(static_cast<std::size_t>(w.padded));
        k.quantize_tile(w, activations, norm, tile, values + tile * k.rows * m.in_features, row.data());
    });

    const auto unit = m.gated ? 2 : 1;
    const auto units = w.blocks / unit;
    const auto piece = std::max<std::int64_t>(1, std::min(kPieceBytes / (w.block_bytes() * unit), units / thread_count()));
    const auto pieces = (units + piece - 1) / piece;
    const auto chunk = std::max<std::int64_t>(1, kChunkBytes / (w.padded * k.rows));
    for (std::int64_t tile = 0; tile < tiles; tile += chunk)
        parallel_for(pieces, [&](std::int64_t i) {
            k.multiply_blocks(w, activations, epilogue, tile, std::min(tile + chunk, tiles), i * piece * unit,
                              std::min((i + 1) * piece, units) * unit);
        });
    return true;
}

}  // namespace edgert

#include "cached_attention.hpp"

#include <cmath>
#include <map>

#include "attention.hpp"
#include "dispatch.hpp"

namespace edgert {

namespace {

constexpr std::int64_t kMaxHeads = 4096;
constexpr std::int64_t kMaxDim = 1024;  // products of 15-bit queries and 8-bit keys add up within 32 bits

const std::map<std::string, CachePrecision>& precisions() {
    static const std::map<std::string, CachePrecision> names = {
        {"i8", CachePrecision::i8}, {"f16", CachePrecision::f16}, {"bf16", CachePrecision::bf16}};
    return names;
}

bool fits(const ov::element::Type& type, const std::string& input) {
    // The CPU plugin turns i64 into i32 and boolean into u8 throughout a graph.
    if (input == "cache")
        return type == ov::element::u8;
    if (input == "past")
        return type == ov::element::i64 || type == ov::element::i32;
    if (input == "mask" && (type == ov::element::boolean || type == ov::element::u8))
        return true;
    return type == ov::element::f32;
}

std::int64_t scalar(const ov::Tensor& tensor) {
    return tensor.get_element_type() == ov::element::i64 ? *tensor.data<const std::int64_t>()
                                                         : *tensor.data<const std::int32_t>();
}

}  // namespace

CachedAttention::CachedAttention(const ov::OutputVector& inputs, Attributes attributes)
    : Op(inputs),
      m_attributes(std::move(attributes)) {
    constructor_validate_and_infer_types();
}

void CachedAttention::check_attributes() const {
    const auto& a = m_attributes;
    const auto check = [&](bool holds, const char* name, const auto& value, const auto&... rule) {
        NODE_VALIDATION_CHECK(this, holds, name, " must be ", rule..., ", got ", value);
    };
    check(a.kv_heads >= 1 && a.kv_heads <= kMaxHeads, "kv_heads", a.kv_heads, "1 to ", kMaxHeads);
    check(a.heads >= 1 && a.heads <= kMaxHeads && a.heads % a.kv_heads == 0, "heads", a.heads, "1 to ", kMaxHeads,
          " and a multiple of kv_heads ", a.kv_heads);
    check(a.head_dim >= 4 && a.head_dim <= kMaxDim && a.head_dim % 4 == 0, "head_dim", a.head_dim, "4 to ", kMaxDim,
          " and a multiple of 4");
    check(a.value_dim >= 4 && a.value_dim <= kMaxDim && a.value_dim % 4 == 0, "value_dim", a.value_dim, "4 to ",
          kMaxDim, " and a multiple of 4");
    check(std::isfinite(a.scale), "scale", a.scale, "finite");
    check(std::isfinite(a.softcap) && a.softcap >= 0, "softcap", a.softcap, "finite and not negative");
    check(std::isfinite(a.epsilon) && a.epsilon >= 0, "epsilon", a.epsilon, "finite and not negative");
    check(precisions().count(a.precision) == 1, "precision", a.precision, "i8, f16 or bf16");
    check(a.rope.empty() || a.rope == "half", "rope", a.rope, "empty or half");
    check(a.norm.empty() || a.norm == "rms", "norm", a.norm, "empty or rms");
    check(!(a.causal && a.mask), "causal", a.causal, "false where there is a mask");
}

CacheLayout CachedAttention::layout() const {
    return {precisions().at(m_attributes.precision), static_cast<std::size_t>(m_attributes.head_dim),
            static_cast<std::size_t>(m_attributes.value_dim)};
}

std::vector<std::string> CachedAttention::input_names() const {
    std::vector<std::string> names = {"qkv", "cache", "past"};
    if (m_attributes.mask)
        names.insert(names.end(), {"mask"});
    if (!m_attributes.rope.empty())
        names.insert(names.end(), {"cos", "sin"});
    if (!m_attributes.norm.empty())
        names.insert(names.end(), {"q_norm", "k_norm"});
    if (m_attributes.sinks)
        names.insert(names.end(), {"sinks"});
    return names;
}

ov::Dimension CachedAttention::check_inputs(const std::vector<ov::PartialShape>& shapes,
                                            const std::vector<ov::element::Type>& types,
                                            const ov::Dimension& total) const {
    const auto& a = m_attributes;
    const auto names = input_names();
    NODE_VALIDATION_CHECK(this, shapes.size() == names.size(), "takes ", names.size(),
                          " inputs with these attributes, got ", shapes.size());
    NODE_VALIDATION_CHECK(this, shapes[0].rank().compatible(3), "qkv must have rank 3, got shape ", shapes[0]);
    const auto tokens = shapes[0].rank().is_static() ? shapes[0][1] : ov::Dimension();
    const auto width = (a.heads + a.kv_heads) * a.head_dim + a.kv_heads * a.value_dim;
    auto rope_dims = ov::Dimension();
    for (std::size_t i = 0; i < names.size(); ++i) {
        const auto& name = names[i];
        const auto& shape = shapes[i];
        NODE_VALIDATION_CHECK(this, types[i].is_dynamic() || fits(types[i], name), name, " cannot be ", types[i]);
        if (name == "sinks") {
            NODE_VALIDATION_CHECK(
                this, shape.is_dynamic() || ov::shape_size(shape.to_shape()) == static_cast<std::size_t>(a.heads),
                "sinks must have as many elements as heads, ", a.heads, ", got shape ", shape);
            continue;
        }
        ov::PartialShape wanted;
        if (name == "qkv")
            wanted = {1, tokens, width};
        else if (name == "cache")
            wanted = {-1, a.kv_heads, static_cast<std::int64_t>(layout().bytes())};
        else if (name == "past")
            wanted = {1};
        else if (name == "mask") {
            wanted = {1, 1, 1, total};
            if (shape.rank().is_static() && shape.size() == 4) {
                wanted[1] = shape[1].compatible(1) ? shape[1] : a.heads;
                wanted[2] = shape[2].compatible(1) ? shape[2] : tokens;
            }
        } else if (name == "cos" || name == "sin")
            wanted = {1, tokens, rope_dims};
        else
            wanted = {a.head_dim};
        NODE_VALIDATION_CHECK(this, shape.compatible(wanted), name, " must have shape ", wanted, ", got ", shape);
        if (name == "cos" && shape.rank().is_static()) {
            rope_dims = shape[2];
            NODE_VALIDATION_CHECK(
                this, rope_dims.is_dynamic() || (rope_dims.get_length() % 2 == 0 && rope_dims.get_length() <= a.head_dim),
                "the last dimension of cos must be even and at most head_dim ", a.head_dim, ", got ", rope_dims);
        }
    }
    return tokens;
}

void CachedAttention::validate_and_infer_types() {
    check_attributes();
    std::vector<ov::PartialShape> shapes;
    std::vector<ov::element::Type> types;
    for (std::size_t i = 0; i < get_input_size(); ++i) {
        shapes.push_back(get_input_partial_shape(i));
        types.push_back(get_input_element_type(i));
    }
    const auto tokens = check_inputs(shapes, types, ov::Dimension());
    set_output_type(0, ov::element::f32, {1, tokens, m_attributes.heads * m_attributes.value_dim});
}

std::shared_ptr<ov::Node> CachedAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    return std::make_shared<CachedAttention>(inputs, m_attributes);
}

bool CachedAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("heads", m_attributes.heads);
    visitor.on_attribute("kv_heads", m_attributes.kv_heads);
    visitor.on_attribute("head_dim", m_attributes.head_dim);
    visitor.on_attribute("value_dim", m_attributes.value_dim);
    visitor.on_attribute("scale", m_attributes.scale);
    visitor.on_attribute("softcap", m_attributes.softcap);
    visitor.on_attribute("precision", m_attributes.precision);
    visitor.on_attribute("rope", m_attributes.rope);
    visitor.on_attribute("norm", m_attributes.norm);
    visitor.on_attribute("epsilon", m_attributes.epsilon);
    visitor.on_attribute("causal", m_attributes.causal);
    visitor.on_attribute("mask", m_attributes.mask);
    visitor.on_attribute("sinks", m_attributes.sinks);
    return true;
}

bool CachedAttention::has_evaluate() const {
    const auto names = input_names();
    for (std::size_t i = 0; i < names.size() && i < get_input_size(); ++i)
        if (!fits(get_input_element_type(i), names[i]))
            return false;
    return get_input_size() == names.size();
}

bool CachedAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    // With dynamic dimensions the shapes are known only here, and a wrong one would read or write past a tensor's end.
    const auto& a = m_attributes;
    OPENVINO_ASSERT(inputs.size() == input_names().size() && inputs[0].get_shape().size() == 3 && inputs[2].get_size() == 1,
                    "CachedAttention ", get_friendly_name(), ": wrong number or rank of inputs");
    const auto past = scalar(inputs[2]);
    const auto tokens = inputs[0].get_shape()[1];
    const auto room = inputs[1].get_shape().empty() ? 0 : inputs[1].get_shape()[0] * CacheLayout::kTokens;
    OPENVINO_ASSERT(past >= 0 && static_cast<std::size_t>(past) <= room && tokens <= room - static_cast<std::size_t>(past),
                    "CachedAttention ", get_friendly_name(), ": past ", past, " and ", tokens,
                    " new tokens do not fit the cache of ", room, " tokens");
    std::vector<ov::PartialShape> shapes;
    std::vector<ov::element::Type> types;
    for (const auto& input : inputs) {
        shapes.emplace_back(input.get_shape());
        types.push_back(input.get_element_type());
    }
    check_inputs(shapes, types, static_cast<std::int64_t>(past + static_cast<std::int64_t>(tokens)));
    outputs[0].set_shape({1, tokens, static_cast<std::size_t>(a.heads * a.value_dim)});
    if (tokens == 0)
        return true;

    AttentionCall call{};
    call.layout = layout();
    call.heads = static_cast<std::size_t>(a.heads);
    call.kv_heads = static_cast<std::size_t>(a.kv_heads);
    call.tokens = tokens;
    call.past = static_cast<std::size_t>(past);
    call.scale = static_cast<float>(a.scale);
    call.softcap = static_cast<float>(a.softcap);
    call.epsilon = static_cast<float>(a.epsilon);
    call.causal = a.causal;
    call.qkv = inputs[0].data<const float>();
    // The one input that is an output too: the caller hands over its cache to be extended in place.
    call.cache = const_cast<std::uint8_t*>(inputs[1].data<const std::uint8_t>());
    call.out = outputs[0].data<float>();
    auto next = inputs.begin() + 3;
    if (a.mask) {
        call.mask_heads = next->get_shape()[1];
        call.mask_rows = next->get_shape()[2];
        if (next->get_element_type() == ov::element::f32)
            call.mask = next->data<const float>();
        else
            call.visible = static_cast<const std::uint8_t*>(next->data());
        ++next;
    }
    if (!a.rope.empty()) {
        call.rope_dims = next->get_shape()[2];
        call.cosine = (next++)->data<const float>();
        call.sine = (next++)->data<const float>();
    }
    if (!a.norm.empty()) {
        call.query_norm = (next++)->data<const float>();
        call.key_norm = (next++)->data<const float>();
    }
    if (a.sinks)
        call.sinks = next->data<const float>();
    cached_attention(call, kernels().attention);
    return true;
}

}  // namespace edgert

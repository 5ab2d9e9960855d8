#include "cached_attention.hpp"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <ostream>

#include "dispatch.hpp"

namespace edgert {

namespace {

constexpr std::int64_t kMaxHeads = 4096;
constexpr std::int64_t kMaxDim = 1024;  // products of 15-bit queries and 8-bit keys add up within 32 bits

enum Input { kQkv, kCache, kPast, kMask, kCos, kSin, kQueryNorm, kKeyNorm, kSinks };
constexpr std::size_t kSequence = 3;  // numbers about one: new tokens, past ones, first block
constexpr const char* kNames[] = {"qkv", "cache", "past", "mask", "cos", "sin", "q_norm", "k_norm", "sinks"};

constexpr std::int64_t kAny = -1;

// A shape, or what is known or expected of one. Checked at every token, so it takes no memory of its own.
struct Dims {
    static constexpr std::size_t kMostShown = 8;
    std::int64_t rank = kAny;
    std::int64_t dims[kMostShown] = {};

    Dims() = default;
    Dims(std::initializer_list<std::int64_t> expected) {
        for (const auto dim : expected)
            dims[++rank] = dim;
        ++rank;
    }
    explicit Dims(const ov::PartialShape& shape) {
        if (shape.rank().is_dynamic())
            return;
        rank = static_cast<std::int64_t>(shape.size());
        for (std::size_t i = 0; i < shape.size() && i < kMostShown; ++i)
            dims[i] = shape[i].is_static() ? shape[i].get_length() : kAny;
    }
    explicit Dims(const ov::Shape& shape) : rank(static_cast<std::int64_t>(shape.size())) {
        for (std::size_t i = 0; i < shape.size() && i < kMostShown; ++i)
            dims[i] = static_cast<std::int64_t>(shape[i]);
    }
    std::int64_t operator[](std::size_t i) const { return rank == kAny ? kAny : dims[i]; }
    bool fits(const Dims& expected) const {
        if (rank != kAny && rank != expected.rank)
            return false;
        for (std::size_t i = 0; rank != kAny && i < static_cast<std::size_t>(rank); ++i)
            if (dims[i] != kAny && expected.dims[i] != kAny && dims[i] != expected.dims[i])
                return false;
        return true;
    }
    // Whether there are `count` elements, as far as is known.
    bool holds(std::int64_t count) const {
        if (rank == kAny || rank > static_cast<std::int64_t>(kMostShown))
            return rank == kAny;
        std::int64_t found = 1;
        for (std::size_t i = 0; i < static_cast<std::size_t>(rank); ++i) {
            if (dims[i] == kAny)
                return true;
            if (dims[i] > count)
                return false;
            found *= dims[i];
        }
        return found == count;
    }
};

std::ostream& operator<<(std::ostream& out, const Dims& shape) {
    if (shape.rank == kAny)
        return out << "[...]";
    out << '[';
    for (std::size_t i = 0; i < static_cast<std::size_t>(shape.rank) && i < Dims::kMostShown; ++i) {
        out << (i == 0 ? "" : ",");
        shape.dims[i] == kAny ? out << '?' : out << shape.dims[i];
    }
    return out << (shape.rank > static_cast<std::int64_t>(Dims::kMostShown) ? ",...]" : "]");
}

bool fits(const ov::element::Type& type, Input input) {
    // The CPU plugin turns i64 into i32 and boolean into u8 throughout a graph.
    if (input == kCache)
        return type == ov::element::u8;
    if (input == kPast)
        return type == ov::element::i64 || type == ov::element::i32;
    if (input == kMask && (type == ov::element::boolean || type == ov::element::u8))
        return true;
    return type == ov::element::f32;
}

bool find_precision(const std::string& name, CachePrecision& found) {
    if (name == "i8")
        found = CachePrecision::i8;
    else if (name == "f16")
        found = CachePrecision::f16;
    else if (name == "bf16")
        found = CachePrecision::bf16;
    else
        return false;
    return true;
}

std::int64_t number(const ov::Tensor& tensor, std::size_t at) {
    return tensor.get_element_type() == ov::element::i64 ? tensor.data<const std::int64_t>()[at]
                                                         : tensor.data<const std::int32_t>()[at];
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
    const auto finite = [](double x) { return std::fabs(x) <= static_cast<double>(std::numeric_limits<float>::max()); };
    check(a.kv_heads >= 1 && a.kv_heads <= kMaxHeads, "kv_heads", a.kv_heads, "1 to ", kMaxHeads);
    check(a.heads >= 1 && a.heads <= kMaxHeads && a.heads % a.kv_heads == 0, "heads", a.heads, "1 to ", kMaxHeads,
          " and a multiple of kv_heads ", a.kv_heads);
    check(a.head_dim >= 4 && a.head_dim <= kMaxDim && a.head_dim % 4 == 0, "head_dim", a.head_dim, "4 to ", kMaxDim,
          " and a multiple of 4");
    check(a.value_dim >= 4 && a.value_dim <= kMaxDim && a.value_dim % 4 == 0, "value_dim", a.value_dim, "4 to ",
          kMaxDim, " and a multiple of 4");
    check(finite(a.scale), "scale", a.scale, "finite");
    check(finite(a.softcap) && a.softcap >= 0, "softcap", a.softcap, "finite and not negative");
    check(finite(a.epsilon) && a.epsilon >= 0, "epsilon", a.epsilon, "finite and not negative");
    CachePrecision precision{};
    check(find_precision(a.precision, precision), "precision", a.precision, "i8, f16 or bf16");
    check(a.rope.empty() || a.rope == "half", "rope", a.rope, "empty or half");
    check(a.norm.empty() || a.norm == "rms", "norm", a.norm, "empty or rms");
    check(!(a.causal && a.mask), "causal", a.causal, "false where there is a mask");
    check(!(a.batched && a.mask), "batched", a.batched, "false where there is a mask");
}

CacheLayout CachedAttention::layout() const {
    CacheLayout found{CachePrecision::i8, static_cast<std::size_t>(m_attributes.head_dim),
                      static_cast<std::size_t>(m_attributes.value_dim)};
    find_precision(m_attributes.precision, found.precision);
    return found;
}

CachedAttention::Inputs CachedAttention::inputs() const {
    const auto& a = m_attributes;
    const bool present[] = {true, true, true, a.mask, !a.rope.empty(), !a.rope.empty(), !a.norm.empty(), !a.norm.empty(), a.sinks};
    Inputs found{};
    for (std::size_t i = 0; i < std::size(present); ++i)
        if (present[i])
            found.which[found.count++] = static_cast<int>(i);
    return found;
}

// Every input against the attributes and each other; what is not known is taken as right. Returns the number of tokens.
template <class Shape, class Type>
std::int64_t CachedAttention::check_inputs(std::size_t count, const Shape& shape_of, const Type& type_of,
                                           std::int64_t total) const {
    const auto& a = m_attributes;
    const auto expected = inputs();
    NODE_VALIDATION_CHECK(this, count == expected.count, "takes ", expected.count, " inputs with these attributes, got ", count);
    const Dims qkv(shape_of(0));
    NODE_VALIDATION_CHECK(this, qkv.rank == kAny || qkv.rank == 3, "qkv must have rank 3, got shape ", qkv);
    const auto tokens = qkv[1];
    auto rope_dims = kAny;
    for (std::size_t i = 0; i < count; ++i) {
        const auto input = static_cast<Input>(expected.which[i]);
        const auto* const name = kNames[input];
        const Dims shape(shape_of(i));
        const ov::element::Type type = type_of(i);
        NODE_VALIDATION_CHECK(this, type.is_dynamic() || fits(type, input), name, " cannot be ", type);
        Dims wanted;
        switch (input) {
        case kQkv:
            wanted = {1, tokens, (a.heads + a.kv_heads) * a.head_dim + a.kv_heads * a.value_dim};
            break;
        case kCache:
            wanted = {kAny, a.kv_heads, static_cast<std::int64_t>(layout().bytes())};
            break;
        case kPast:
            wanted = a.batched ? Dims{kAny, static_cast<std::int64_t>(kSequence)} : Dims{1};
            break;
        case kMask:
            wanted = {1, shape[1] == 1 ? 1 : a.heads, shape[2] == 1 ? 1 : tokens, total};
            break;
        case kCos:
        case kSin:
            wanted = {1, tokens, rope_dims};
            break;
        case kQueryNorm:
        case kKeyNorm:
            wanted = {a.head_dim};
            break;
        case kSinks:
            NODE_VALIDATION_CHECK(this, shape.holds(a.heads), "sinks must have as many elements as heads, ", a.heads,
                                  ", got shape ", shape);
            continue;
        }
        NODE_VALIDATION_CHECK(this, shape.fits(wanted), name, " must have shape ", wanted, ", got ", shape);
        if (input == kCos) {
            rope_dims = shape[2];
            NODE_VALIDATION_CHECK(this, rope_dims == kAny || (rope_dims % 2 == 0 && rope_dims <= a.head_dim),
                                  "the last dimension of cos must be even and at most head_dim ", a.head_dim, ", got ",
                                  rope_dims);
        }
    }
    return tokens;
}

void CachedAttention::validate_and_infer_types() {
    check_attributes();
    const auto tokens = check_inputs(
        get_input_size(), [&](std::size_t i) -> const ov::PartialShape& { return get_input_partial_shape(i); },
        [&](std::size_t i) { return get_input_element_type(i); }, kAny);
    set_output_type(0, ov::element::f32, {1, ov::Dimension(tokens), m_attributes.heads * m_attributes.value_dim});
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
    visitor.on_attribute("batched", m_attributes.batched);
    return true;
}

bool CachedAttention::has_evaluate() const {
    const auto expected = inputs();
    if (get_input_size() != expected.count)
        return false;
    for (std::size_t i = 0; i < expected.count; ++i)
        if (!fits(get_input_element_type(i), static_cast<Input>(expected.which[i])))
            return false;
    return true;
}

std::vector<AttentionCall> CachedAttention::sequences(const ov::Tensor& past, AttentionCall call, std::size_t blocks) const {
    struct Part {
        std::size_t begin;
        std::size_t end;
    };
    const auto count = past.get_shape()[0];
    std::vector<AttentionCall> calls;
    std::vector<Part> parts;
    calls.reserve(count);
    parts.reserve(count);
    auto left = call.tokens;
    for (std::size_t i = 0; i < count; ++i) {
        const auto fresh = number(past, i * kSequence);
        const auto old = number(past, i * kSequence + 1);
        const auto first = number(past, i * kSequence + 2);
        OPENVINO_ASSERT(fresh >= 1 && static_cast<std::size_t>(fresh) <= left, "CachedAttention ", get_friendly_name(),
                        ": sequence ", i, " has ", fresh, " new tokens, expected 1 to the ", left, " that are left");
        const auto room = first >= 0 && static_cast<std::size_t>(first) <= blocks
                              ? (blocks - static_cast<std::size_t>(first)) * CacheLayout::kTokens
                              : 0;
        OPENVINO_ASSERT(old >= 0 && static_cast<std::size_t>(old) <= room &&
                            static_cast<std::size_t>(fresh) <= room - static_cast<std::size_t>(old),
                        "CachedAttention ", get_friendly_name(), ": sequence ", i, ": past ", old, " and ", fresh,
                        " new tokens do not fit the cache of ", blocks, " blocks from block ", first);
        call.tokens = static_cast<std::size_t>(fresh);
        call.past = static_cast<std::size_t>(old);
        calls.push_back(call);
        calls.back().cache = call.block(static_cast<std::size_t>(first), 0);
        const auto begin = static_cast<std::size_t>(first);
        parts.push_back({begin, begin + (call.total() - 1) / CacheLayout::kTokens + 1});
        call.qkv += call.tokens * call.width();
        call.out += call.tokens * call.heads * call.layout.value_dim;
        if (call.rope_dims > 0) {
            call.cosine += call.tokens * call.rope_dims;
            call.sine += call.tokens * call.rope_dims;
        }
        left -= call.tokens;
    }
    OPENVINO_ASSERT(left == 0, "CachedAttention ", get_friendly_name(), ": the last ", left, " rows are of no sequence");
    std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < count; ++i)
        OPENVINO_ASSERT(parts[i - 1].end <= parts[i].begin, "CachedAttention ", get_friendly_name(),
                        ": two sequences have block ", parts[i].begin, " of the cache");
    return calls;
}

bool CachedAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& tensors) const {
    // With dynamic dimensions the shapes are known only here, and a wrong one would read or write past a tensor's end.
    const auto& a = m_attributes;
    OPENVINO_ASSERT(tensors.size() == inputs().count && tensors[0].get_shape().size() == 3 &&
                        (a.batched || tensors[2].get_size() == 1),
                    "CachedAttention ", get_friendly_name(), ": wrong number or rank of inputs");
    const auto tokens = tensors[0].get_shape()[1];
    const auto blocks = tensors[1].get_shape().empty() ? 0 : tensors[1].get_shape()[0];
    const auto room = blocks * CacheLayout::kTokens;
    const auto past = a.batched ? 0 : number(tensors[2], 0);
    OPENVINO_ASSERT(a.batched || (past >= 0 && static_cast<std::size_t>(past) <= room &&
                                  tokens <= room - static_cast<std::size_t>(past)),
                    "CachedAttention ", get_friendly_name(), ": past ", past, " and ", tokens,
                    " new tokens do not fit the cache of ", room, " tokens");
    check_inputs(
        tensors.size(), [&](std::size_t i) -> const ov::Shape& { return tensors[i].get_shape(); },
        [&](std::size_t i) { return tensors[i].get_element_type(); }, past + static_cast<std::int64_t>(tokens));
    outputs[0].set_shape({1, tokens, static_cast<std::size_t>(a.heads * a.value_dim)});
    if (tokens == 0 && !a.batched)
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
    call.qkv = tensors[0].data<const float>();
    // The one input that is an output too: the caller hands over its cache to be extended in place.
    call.cache = const_cast<std::uint8_t*>(tensors[1].data<const std::uint8_t>());
    call.out = outputs[0].data<float>();
    auto next = tensors.begin() + 3;
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
    if (!a.batched) {
        cached_attention(&call, 1, *kernels().attention);
        return true;
    }
    const auto calls = sequences(tensors[2], call, blocks);
    cached_attention(calls.data(), calls.size(), *kernels().attention);
    return true;
}

}  // namespace edgert

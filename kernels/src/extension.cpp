// The library's entry point: the list of operations that edgert adds to OpenVINO.

#include "cached_attention.hpp"
#include "embedding_lookup.hpp"
#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "quantized_linear.hpp"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<edgert::CachedAttention>>(),
    std::make_shared<ov::OpExtension<edgert::EmbeddingLookup>>(),
    std::make_shared<ov::OpExtension<edgert::QuantizedLinear>>(),
}));

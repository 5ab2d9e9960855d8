// The library's entry point: the list of operations that edgert adds to OpenVINO.

#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "rms_norm.hpp"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<edgert::RMSNorm>>(),
}));

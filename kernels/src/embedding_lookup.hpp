#pragma once

#include "openvino/op/op.hpp"
#include "packed_weights.hpp"

namespace edgert {

// Rows of a packed table (packed_weights.hpp), decompressed: the table may be the head's, in place.
//
//   inputs      ids      i32 or i64 [...]; a negative one counts from the end, as in Gather
//               weights  u8 [bytes]
//   attributes  in_features (width of a row), out_features (rows), bits, group, asymmetric
//   output      f32 [..., in_features]; an id outside of the table is an error
class EmbeddingLookup : public ov::op::Op {
public:
    OPENVINO_OP("EmbeddingLookup", "edgert");

    EmbeddingLookup() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    PackedShape m_packed;
};

}  // namespace edgert

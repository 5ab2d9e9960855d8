"""Let a model with kernels in it take several sequences in one call, as rows one after the other.

Nothing but the attention may look at more than one row then; and what a row gives must not depend, to the last bit, on
what others there are, so that a text is the same whoever else is served. OpenVINO's matrix products do not promise it.
"""

from __future__ import annotations

import openvino as ov
import openvino.opset13 as ops

from edgert.kernel_lowering.rewrite import Factory
from edgert.kvlayout import PAST, SEQUENCES

_ATTENTION = "CachedAttention"
_PAST_AT = 2  # among its inputs
# Operations that mix rows, or whose rounding depends on how many there are.
_MIXING = {
    "Convolution", "GroupConvolution", "CumSum", "GRUSequence", "LSTMSequence", "Loop", "MatMul",
    "ScaledDotProductAttention", "TensorIterator",
}  # fmt: skip


def take_sequences(model: ov.Model, factory: Factory) -> str | None:
    """Put the input `sequences` in the place of `past`; see `edgert.kernel_lowering.LoweredModel`.

    Returns:
        Why it cannot be done, and then nothing has changed; None where it is done.
    """
    parameters = {name: p for p in model.get_parameters() for name in p.output(0).get_names()}
    past = parameters.get(PAST)
    if past is None:
        return "it has no cache that the kernels change in place"
    if model.get_sinks():
        return "it has states that are the device's"
    if "attention_mask" in parameters:
        return "it takes attention_mask"
    for op in model.get_ops():
        if op.get_type_name() in _MIXING and not _is_outer(op):
            return f"{op.get_friendly_name()} stays with OpenVINO"
    attentions = [target.get_node() for target in past.output(0).get_target_inputs()]
    for node in attentions:
        if node.get_type_name() != _ATTENTION:
            return f"{node.get_friendly_name()} takes the number of past tokens"
        if not node.get_attributes()["causal"]:
            return f"{node.get_friendly_name()} hides more than what comes later, or less"
    sequences = ops.parameter([-1, 3], ov.Type.i64, SEQUENCES)
    sequences.output(0).set_names({SEQUENCES})
    for node in attentions:
        inputs = node.input_values()
        inputs[_PAST_AT] = sequences.output(0)
        made = factory.create(_ATTENTION, inputs, {**node.get_attributes(), "batched": True})
        made.set_friendly_name(node.get_friendly_name())
        for consumer in node.output(0).get_target_inputs():
            consumer.replace_source_output(made.output(0))
    model.remove_parameter(past)
    model.add_parameters([sequences])
    return None


def _is_outer(op: ov.Node) -> bool:
    """Whether a product adds nothing up, as that of positions and frequencies: each element is a single one."""
    if op.get_type_name() != "MatMul":
        return False
    shape = op.get_input_partial_shape(0)
    if shape.rank.is_dynamic or shape.rank.get_length() < 2:
        return False
    inner = shape[-2 if op.get_attributes()["transpose_a"] else -1]
    return bool(inner.is_static) and inner.get_length() == 1

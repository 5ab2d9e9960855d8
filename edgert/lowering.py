"""Rewrites that make a model cheaper on its device without changing what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable

import openvino as ov
import openvino.opset13 as ops

from edgert.graph import BlockGraph, BlockKind
from edgert.irgraph import find_tensor, name_new
from edgert.shapes import KEEP


def keep_last_logits(model: ov.Model, graph: BlockGraph) -> bool:
    """Let the head compute only the last tokens' logits, as many as the new input `logits_to_keep` (i64, [1]) says.

    A prompt of a thousand tokens needs one row of logits; the head is often the largest matrix of a small model. The
    model is changed in place. Blocks keep their boundaries, so `graph` stays valid.

    Raises:
        BundleError: `graph` belongs to another model.

    Returns:
        False, and nothing changed, where the model has no head block (encoders, models in one piece).
    """
    head = graph.blocks[-1]
    if head.kind is not BlockKind.HEAD or head.input is None:
        return False
    tensor = find_tensor(model, head.input)
    consumers = list(tensor.get_target_inputs())
    keep = ops.parameter([1], ov.Type.i64, KEEP)
    keep.output(0).set_names({KEEP})
    start = ops.negative(keep)
    one, end, axis = (ops.constant([v], ov.Type.i64) for v in (1, sys.maxsize, 1))
    last = ops.slice(tensor, start, end, one, axis)
    name_new([keep, start, one, end, axis, last], KEEP)
    for consumer in consumers:
        consumer.replace_source_output(last.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()
    return True


def halve(model: ov.Model, chosen: Callable[[str], bool]) -> None:
    """Make f32 inputs and outputs f16, in place; between them the device chooses its precision itself.

    Args:
        chosen: which, by name.
    """
    for parameter in model.get_parameters():
        if parameter.get_element_type() == ov.Type.f32 and chosen(parameter.output(0).get_any_name()):
            consumers = list(parameter.output(0).get_target_inputs())
            parameter.set_element_type(ov.Type.f16)
            wide = ops.convert(parameter, "f32")
            for consumer in consumers:
                consumer.replace_source_output(wide.output(0))
    for result in model.get_results():
        tensor, name = result.input_value(0), result.output(0).get_any_name()
        if tensor.get_element_type() == ov.Type.f32 and chosen(name):
            result.input(0).replace_source_output(ops.convert(tensor, "f16").output(0))
            result.output(0).set_names({name})
    model.validate_nodes_and_infer_types()

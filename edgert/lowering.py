"""Rewrites that make a model cheaper on its device without changing what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable

import openvino as ov
import openvino.opset13 as ops

from edgert.graph import BlockGraph, BlockKind
from edgert.irgraph import IrGraph, find_tensor, name_new
from edgert.shapes import KEEP


def keep_last_logits(model: ov.Model, graph: BlockGraph) -> bool:
    """Let the head compute only the last tokens' logits, as many as the new input `logits_to_keep` (i64, [1]) says.

    A prompt of a thousand tokens needs one row of logits; the head is often the largest matrix of a small model. The
    model is changed in place. Blocks keep their boundaries, so `graph` stays valid.

    Raises:
        BundleError: `graph` belongs to another model.

    Returns:
        False, and nothing changed, where the model has no head block (encoders, models in one piece), or one that would
        not work with fewer rows than the model has tokens.
    """
    head = graph.blocks[-1]
    if head.kind is not BlockKind.HEAD or head.input is None:
        return False
    found = _where_rows_can_go(model, head.input)
    if found is None:
        return False
    tensor = find_tensor(model, found)
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


def _where_rows_can_go(model: ov.Model, start: str) -> str | None:
    """The first tensor of the head that can lose rows: all behind it follows from it, so nothing expects the others.

    A head may reshape its rows to the number of tokens that `input_ids` has (GPT-2's does); then it is behind that.
    """
    index = IrGraph(model)
    node = index[index.tensor(start).get_node().get_friendly_name()]
    while True:
        follows, other = {node.name}, None
        for each in index.nodes.values():
            sources = {source for source, _ in each.inputs} - index.constant_only
            if sources and sources <= follows:
                follows.add(each.name)
            elif sources & follows:
                other = each
                break
        if other is None:
            return start if all(result.name in follows for result in index.of_type("Result")) else None
        if other.type != "Reshape" or other.inputs[0][0] not in follows or not _is_stream(model, other.name):
            return None
        node, start = other, f"{other.name}:0"


def _is_stream(model: ov.Model, name: str) -> bool:
    """Whether an operation gives `[batch, tokens, width]`, by what OpenVINO infers for a number of tokens."""
    tokens, trial = 5, model.clone()
    for parameter in trial.get_parameters():
        if parameter.output(0).get_any_name() == "input_ids":
            parameter.set_partial_shape(ov.PartialShape([1, tokens]))
    trial.validate_nodes_and_infer_types()
    shape = find_tensor(trial, f"{name}:0").get_partial_shape()
    return len(shape) == 3 and shape[1] == tokens and shape[2].is_static


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

"""Submodels with static shapes: what an NPU's compiler accepts, and other devices can run too.

A submodel that `edgert.cutting` made for static shapes takes the residual stream, masks and RoPE tables as inputs. Here
its keys and values become inputs and outputs as well, and every dimension a number: `query` rows of new tokens, the
last of which may be padding, and `past` slots for keys and values, of which a mask hides those that are empty. New rows
stand behind all slots, so what a query may see is decided by the mask alone; positions were applied before.

The same form with buckets of past tokens is what OpenVINO's NPU pipeline uses (NPUW's static LLM pipeline,
https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.html).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import openvino as ov
import openvino.opset13 as ops

from edgert.cutting import PRELUDE
from edgert.errors import PlanError
from edgert.graph import BOUNDARY
from edgert.irgraph import IrGraph, Node
from edgert.lowering import halve
from edgert.shapes import KEEP, NEW, PAST, QUERY, TOTAL, Axes, StaticShape

LOGITS = "logits"


def prelude_axes(first: ov.Model) -> dict[str, Axes]:
    """What the dimensions of the masks and tables are that the first submodel gives to the others.

    Returns:
        For each output `prelude.N` its dimensions: a number, `query` (rows of new tokens) or `total` (past and new).

    Raises:
        PlanError: a dimension is neither.
    """
    trials = []
    for query, total in ((5, 16), (7, 20)):  # no two of these numbers, nor their differences, are alike
        trial = first.clone()
        known = {"input_ids": query, "position_ids": query, "token_type_ids": query, "attention_mask": total}
        shapes = {port: [1, known[name]] if (name := port.get_any_name()) in known else [1] for port in trial.inputs}
        trial.reshape(shapes)
        trials.append({port.get_any_name(): port.get_partial_shape() for port in trial.outputs})
    found: dict[str, Axes] = {}
    for name in (name for name in trials[0] if name.startswith(PRELUDE)):
        axes: list[int | str] = []
        for a, b in zip(trials[0][name], trials[1][name], strict=True):
            sizes = (a.get_max_length(), b.get_max_length()) if a.is_static and b.is_static else None
            meaning = {(5, 7): QUERY, (16, 20): TOTAL}.get(sizes or (0, 0))
            if meaning is None and (sizes is None or sizes[0] != sizes[1]):
                raise PlanError(f"static shapes: dimension {a} of {name} follows neither new nor all tokens")
            axes.append(meaning or a.get_length())
        found[name] = tuple(axes)
    return found


def caches(submodel: ov.Model) -> dict[str, tuple[int, int]]:
    """Heads and head size of each cache of a submodel, by state id.

    Raises:
        PlanError: a state is no cache that grows by one row a token.
    """
    graph = IrGraph(submodel)
    found = {}
    for assign in graph.of_type("Assign"):
        shape = _concat(graph, assign).op.get_output_partial_shape(0)
        found[graph.variable_id(assign)] = (shape[1].get_length(), shape[3].get_length())
    return found


def lower(submodel: ov.Model, shape: StaticShape, axes: Mapping[str, Axes], *, half: bool) -> ov.Model:
    """A static copy of a submodel.

    Args:
        submodel: one of `edgert.cutting.cut` that was cut for static shapes.
        axes: of the prelude; see `prelude_axes`.
        half: whether all real inputs and outputs, keys and values included, are f16; logits stay f32.

    Returns:
        A model with inputs `hidden` `[1, query, width]`, those preludes that it needs, and for each state
        `past.STATE` `[1, heads, past, head_dim]`; and with outputs `new.hidden`, or `logits` for the head, and for each
        state `new.STATE` `[1, heads, query, head_dim]`.

    Raises:
        PlanError: a state is no cache, or a dimension depends on data.
    """
    model = submodel.clone()
    new_rows = _states_to_tensors(model, shape.past)
    known = {"input_ids": [1, shape.query], "attention_mask": [1, shape.past + shape.query], "beam_idx": [1]}
    known |= {"position_ids": [1, shape.query], "token_type_ids": [1, shape.query], KEEP: [1]}
    sizes = {QUERY: shape.query, TOTAL: shape.query + shape.past}
    for parameter in model.get_parameters():
        name = parameter.output(0).get_any_name()
        if name == BOUNDARY:
            width = parameter.get_partial_shape()[2].get_length()
            parameter.set_partial_shape(ov.PartialShape([1, shape.query, width]))
        elif name in axes:
            sizes_of = [sizes[axis] if isinstance(axis, str) else axis for axis in axes[name]]
            parameter.set_partial_shape(ov.PartialShape(sizes_of))
        elif name in known:
            _fix(parameter, known[name])
    # OpenVINO gives one of two tensors of a name another name when it reads them from a file.
    names = [f"{NEW}{n}" if n == BOUNDARY else n for n in (port.get_any_name() for port in model.outputs)]
    names += new_rows
    model.add_results([ops.result(tensor) for tensor in new_rows.values()])
    _make_masks_additive(model)
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.outputs, names, strict=True):
        port.set_names({name})
    if half:
        halve(model, lambda name: name != LOGITS)
    dynamic = next((op for op in model.get_ordered_ops() for out in op.outputs() if out.partial_shape.is_dynamic), None)
    if dynamic is not None:
        raise PlanError(
            f"static shapes: {dynamic.get_type_name()} {dynamic.get_friendly_name()!r} has a dimension that depends on "
            "data; place its block on CPU or GPU@f16"
        )
    return model


def _fix(parameter: ov.Node, shape: Sequence[int]) -> None:
    """Replace what is taken of a model input by numbers: its shape, or, of the head's rows to keep, that it is one.

    Not by constant folding, which would unpack compressed weights too.
    """
    for consumer in list(parameter.output(0).get_target_inputs()):
        node = consumer.get_node()
        if node.get_type_name() == "ShapeOf":
            number = ops.constant(list(shape), node.get_output_element_type(0))
            for user in list(node.output(0).get_target_inputs()):
                user.replace_source_output(number.output(0))
        elif parameter.output(0).get_any_name() == KEEP:
            consumer.replace_source_output(ops.constant([1], ov.Type.i64).output(0))


def _states_to_tensors(model: ov.Model, slots: int) -> dict[str, ov.Output]:
    """Make the caches inputs; gives the tensors of their new rows by name.

    What reorders the past for beam search is dropped, as there is one beam.
    """
    graph = IrGraph(model)
    found: dict[str, ov.Output] = {}
    assigns = graph.of_type("Assign")
    for assign in assigns:
        state = graph.variable_id(assign)
        concat = _concat(graph, assign).op
        past, shape = concat.input_value(0), concat.get_output_partial_shape(0)
        name = f"{PAST}{state}"
        parameter = ops.parameter([1, shape[1].get_length(), slots, shape[3].get_length()], ov.Type.f32, name)
        parameter.output(0).set_names({name})
        for consumer in list(past.get_target_inputs()):
            consumer.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
        found[f"{NEW}{state}"] = concat.input_value(1)
    for assign in assigns:
        model.remove_sink(assign.op)
    for variable in list(model.get_variables()):
        model.remove_variable(variable)
    return found


def _make_masks_additive(model: ov.Model) -> None:
    """Let attention take what is added to its scores, where it took what is allowed.

    The NPU compiler (2026.4.1) rejects a boolean mask of more than one row: `Compilation failed`, and nothing else.
    """
    for parameter in model.get_parameters():
        consumers = list(parameter.output(0).get_target_inputs())
        attention = [c.get_node().get_type_name() == "ScaledDotProductAttention" for c in consumers]
        if parameter.get_element_type() == ov.Type.boolean and all(attention):
            parameter.set_element_type(ov.Type.f32)


def _concat(graph: IrGraph, assign: Node) -> Node:
    concat = graph.cache_concat(assign)
    if concat is None:
        state = graph.variable_id(assign)
        raise PlanError(
            f"static shapes: state {state!r} is no cache [batch, heads, tokens, head_dim] that new rows join"
        )
    return concat

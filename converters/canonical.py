"""The one form that every OpenVINO model in a bundle has, whatever it was made from.

A decoder:  input_ids i64 [batch, query], attention_mask i64 [batch, past + query], position_ids i64 [batch, query],
            beam_idx i32 [batch]  ->  logits f32 [batch, query, vocabulary]. What layer N keeps between tokens are
            states, reordered by beam_idx before use: `past_key_values.N.key|value` f32 [batch, heads, past, head_dim],
            `past_key_values.N.conv` [batch, channels, kernel], the last inputs of a short convolution, and
            `past_key_values.N.recurrent` [batch, heads, ...]. The last two do not grow and begin as zeros; they see
            every token of `input_ids`, whatever attention_mask hides.
An encoder: input_ids, attention_mask and, where the model takes it, token_type_ids i64 [batch, query]
            ->  last_hidden_state f32 [batch, query, hidden].

This is also what optimum-intel and OpenVINO GenAI use, and what the CPU plugin fuses into one attention operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation

from edgert.errors import ConversionError

DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
MEDIA_INPUTS = ("features", "feature_mask", "image_ids")  # of a decoder that sees or hears, see media/inputs.py
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DECODER_OUTPUT = "logits"
ENCODER_OUTPUT = "last_hidden_state"
BATCH_AXIS = 0
PAST_AXIS = 2


def cache_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the cache inputs and outputs, layer by layer, key before value."""
    both = [(f"{layer}.key", f"{layer}.value") for layer in range(layers)]
    flat = [name for pair in both for name in pair]
    return [f"past_key_values.{name}" for name in flat], [f"present.{name}" for name in flat]


def past_name(state: str) -> str:
    """The cache input of a state such as `3.key`."""
    return f"past_key_values.{state}"


def rename(port: ov.Output, name: str) -> None:
    """Make `name` the only name of a model's input or output."""
    port.get_tensor().set_names({name})
    if port.get_node().get_type_name() == "Parameter":  # what makes an output may be called like it already
        port.get_node().set_friendly_name(name)


def hide_cache(
    model: ov.Model, past: Sequence[ov.Output], present: Sequence[ov.Output], names: Sequence[str] | None = None
) -> None:
    """Turn explicit caches into states, in place.

    A `beam_idx` input is added, and states start empty, or as zeros where they do not grow, with the batch of
    `input_ids`.

    Args:
        past: inputs of `model`: keys and values [batch, heads, tokens, head_dim], whose batch and tokens become
            dynamic, or states of a fixed size, whose batch becomes dynamic.
        present: outputs of `model`, pairwise.
        names: of the states, `past_key_values.N.*`; without them `past` are keys and values of every layer.

    Raises:
        ConversionError: a cache input has another unknown size.
    """
    names = cache_names(len(past) // 2)[0] if names is None else names
    for port, result, name in zip(past, present, names, strict=True):
        shape = port.get_partial_shape()
        grows = name.endswith((".key", ".value"))
        free = (BATCH_AXIS, PAST_AXIS) if grows else (BATCH_AXIS,)
        fixed = [] if shape.rank.is_dynamic else [size for axis, size in enumerate(shape) if axis not in free]
        if not fixed or (grows and len(shape) != 4) or any(size.is_dynamic for size in fixed):
            known = "[batch, heads, tokens, head_dim] with known heads and head_dim"
            expected = known if grows else "known sizes but for the batch"
            raise ConversionError(f"cache input {port.any_name}: shape {shape}, expected {expected}")
        for axis in free:
            shape[axis] = -1
        port.get_node().set_partial_shape(shape)
        rename(port, name)
        result.get_tensor().set_names({name.replace("past_key_values", "present")})
    model.validate_nodes_and_infer_types()

    beam_idx = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    for port in past:
        consumers = port.get_target_inputs()
        reordered = ops.gather(port, beam_idx, ops.constant(np.int64(BATCH_AXIS)))
        for consumer in consumers:
            consumer.replace_source_output(reordered.output(0))
    apply_make_stateful_transformation(model, {n: n.replace("past_key_values", "present") for n in names})

    ids = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(ids, ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0)))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [0 if size.is_dynamic else size.get_length() for size in node.get_output_partial_shape(0)][1:]
            rest = ops.constant(np.array(sizes, np.int64))
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, ops.concat([batch, rest], axis=0))])
    model.validate_nodes_and_infer_types()


def check_form(model: ov.Model, task: str, states: int | None = None) -> None:
    """Check that `model` has the form of `task`, `decoder` or `encoder`, and where given that it has so many states.

    Raises:
        ConversionError: naming the input, output or state that is missing or not expected.
    """
    allowed, output = (DECODER_INPUTS, DECODER_OUTPUT) if task == "decoder" else (ENCODER_INPUTS, ENCODER_OUTPUT)
    required = allowed if task == "decoder" else allowed[:2]
    found = [port.any_name for port in model.inputs]
    optional = MEDIA_INPUTS if task == "decoder" else ()
    missing, unknown = sorted(set(required) - set(found)), sorted(set(found) - {*allowed, *optional})
    if missing or unknown:
        raise ConversionError(f"{task}: inputs are {found}; missing {missing}, not expected {unknown}")
    outputs = [port.any_name for port in model.outputs]
    if outputs != [output]:
        raise ConversionError(f"{task}: outputs are {outputs}, expected only {output!r}")
    sinks = len(model.get_sinks())
    if (task == "decoder") != bool(sinks) or states not in (None, sinks):
        expected = states or ("a KV cache" if task == "decoder" else "none")
        raise ConversionError(f"{task}: has {sinks} states, expected {expected}")


def canonical_decoder(model: ov.Model) -> ov.Model:
    """Bring a decoder that already has the usual names into the form, in place: IR folders, optimum-intel's exports.

    Explicit caches become states; inputs that the model has no use for are added, and outputs but the logits dropped.

    Raises:
        ConversionError: it is no such decoder.
    """
    model_outputs = {name: port for port in model.outputs for name in port.get_names()}
    if DECODER_OUTPUT not in model_outputs:
        raise ConversionError(f"decoder: has no output {DECODER_OUTPUT!r}, only {sorted(model_outputs)}")
    rename(model_outputs[DECODER_OUTPUT], DECODER_OUTPUT)
    past = {name: port for port in model.inputs for name in port.get_names() if name.startswith("past_key_values.")}
    if past:
        present = [model_outputs.get(name.replace("past_key_values.", "present.")) for name in past]
        if None in present or len(past) % 2:
            raise ConversionError(f"decoder: cache inputs {sorted(past)} without their present.* outputs")
        hide_cache(model, [*past.values()], present)
    for port in model.outputs:
        if DECODER_OUTPUT not in port.get_names():
            model.remove_result(port.get_node())
    add_unused_inputs(model)
    for port in model.inputs:
        rename(port, next(iter({*DECODER_INPUTS, *MEDIA_INPUTS} & port.get_names()), port.any_name))
    model.validate_nodes_and_infer_types()
    check_form(model, "decoder")
    return model


def add_unused_inputs(model: ov.Model) -> None:
    """Add the inputs of a decoder that `model` has no use for, in place, but for `input_ids`."""
    found = {name for port in model.inputs for name in port.get_names()}
    for name in DECODER_INPUTS[1:]:
        if name not in found:
            rank, kind = (1, ov.Type.i32) if name == "beam_idx" else (2, ov.Type.i64)
            unused = ops.parameter([-1] * rank, kind, name=name)
            unused.output(0).get_tensor().set_names({name})
            model.add_parameters([unused])


def canonical_encoder(model: ov.Model) -> ov.Model:
    """Bring an encoder that already has the usual names into the form, in place.

    Raises:
        ConversionError: it is no such encoder.
    """
    for port in model.outputs:
        if ENCODER_OUTPUT in port.get_names():
            rename(port, ENCODER_OUTPUT)
        elif len(model.outputs) > 1:  # a pooled output; what remains is checked below
            model.remove_result(port.get_node())
    for port in model.inputs:
        rename(port, next(iter(set(ENCODER_INPUTS) & port.get_names()), port.any_name))
    model.validate_nodes_and_infer_types()
    check_form(model, "encoder")
    return model

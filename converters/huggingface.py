"""The general route: any causal language model of transformers becomes a stateful OpenVINO model.

transformers' own code is traced with `torch.export`, its KV cache made explicit as inputs and outputs, which then
become states. No code in here knows a model family, so a new family needs none.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
import torch
from edgert.converters.canonical import DECODER_OUTPUT, ENCODER_OUTPUT, check_form, hide_cache, rename
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from edgert.errors import ConversionError

# Sizes of the example that is traced: all different, none 0 or 1, which torch.export would take for constants.
_BATCH, _QUERY, _PAST = 2, 3, 5


class _Decoder(torch.nn.Module):
    """A causal language model whose KV cache comes in and goes out as plain tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()  # never a sliding one: what a window shows is the attention mask's business
            layer.keys, layer.values, layer.is_initialized = key, value, True
            layer.dtype, layer.device = key.dtype, key.device
            cache.layers.append(layer)
        cache.layer_class_to_replicate = None
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


class _Encoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        hidden: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return hidden


def export_decoder(model: PreTrainedModel) -> ov.Model:
    """Export a causal language model in the form of `edgert.converters.canonical`.

    Weights keep the type they have in `model` and may share its memory: keep `model` alive as long as the result.

    Raises:
        ConversionError: the model has no KV cache of keys and values, or its code cannot be traced or translated.
    """
    program, cache_shapes = trace_decoder(model)
    converted = _convert(program, model)
    expected = 3 + len(cache_shapes)
    if len(converted.inputs) != expected or len(converted.outputs) != expected - 2:
        raise ConversionError(
            f"{model.config.model_type}: the export has {len(converted.inputs)} inputs and {len(converted.outputs)} "
            f"outputs, expected {expected} and {expected - 2}"
        )
    for port, name in zip(converted.inputs, ("input_ids", "attention_mask", "position_ids"), strict=False):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        rename(port, name)
    for port, shape in zip(converted.inputs[3:], cache_shapes, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, shape[1], -1, shape[3]]))
    rename(converted.outputs[0], DECODER_OUTPUT)
    converted.validate_nodes_and_infer_types()
    hide_cache(converted, converted.inputs[3:], converted.outputs[1:])
    check_form(converted, "decoder")
    return converted


def trace_decoder(model: PreTrainedModel) -> tuple[ExportedProgram, list[torch.Size]]:
    """Trace `(input_ids, attention_mask, position_ids, past) -> (logits, *present)` with dynamic batch, query and past.

    Also returns the shape of each cache tensor, key before value, [batch, heads, tokens, head_dim].

    Raises:
        ConversionError: as `export_decoder`.
    """
    if getattr(model.config.get_text_config(), "num_experts_per_tok", None):
        # The other implementations loop over data-dependent sizes or call kernels that no frontend translates.
        model.config._experts_implementation = "batched_mm"
    past = _example_cache(model)
    example = (
        torch.ones(_BATCH, _QUERY, dtype=torch.long),
        torch.ones(_BATCH, _PAST + _QUERY, dtype=torch.long),
        torch.arange(_PAST, _PAST + _QUERY).expand(_BATCH, -1).contiguous(),
        past,
    )
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = (free, free, free, [{0: Dim.AUTO, 2: Dim.AUTO}] * len(past))
    return _trace(_Decoder(model).eval(), example, shapes, model), [tensor.shape for tensor in past]


def export_encoder(model: PreTrainedModel) -> ov.Model:
    """Export a bare encoder (`AutoModel`) in the form of `edgert.converters.canonical`.

    Raises:
        ConversionError: its code cannot be traced or translated.
    """
    program, names = trace_encoder(model)
    converted = _convert(program, model)
    for port, name in zip(converted.inputs, names, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        rename(port, name)
    rename(converted.outputs[0], ENCODER_OUTPUT)
    converted.validate_nodes_and_infer_types()
    check_form(converted, "encoder")
    return converted


def trace_encoder(model: PreTrainedModel) -> tuple[ExportedProgram, list[str]]:
    """Trace the inputs that the model takes, whose names are also returned, to its last hidden state.

    Raises:
        ConversionError: as `export_encoder`.
    """
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    ones = torch.ones(_BATCH, _QUERY, dtype=torch.long)
    example = [ones if name == "attention_mask" else ones * (name == "input_ids") for name in names]
    shapes = ([{0: Dim.AUTO, 1: Dim.AUTO}] * len(names),)
    return _trace(_Encoder(model, names).eval(), (example,), shapes, model), names


def _example_cache(model: PreTrainedModel) -> list[torch.Tensor]:
    """Keys and values of `_PAST` tokens, as the model itself makes them."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(_BATCH, _PAST, dtype=torch.long), past_key_values=cache, use_cache=True)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if not tensors or any(t is None or t.ndim != 4 or t.shape[2] != _PAST for t in tensors):
        raise ConversionError(
            f"{model.config.model_type}: its cache is not keys and values of every layer, all that is supported"
        )
    return tensors


def _trace(module: torch.nn.Module, example: tuple[Any, ...], shapes: Any, model: PreTrainedModel) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise ConversionError(f"{model.config.model_type}: torch.export failed: {first_line(error)}") from error


def _convert(program: ExportedProgram, model: PreTrainedModel) -> ov.Model:
    _state_static_sizes(program)
    try:
        return ov.convert_model(program)
    except Exception as error:  # OpConversionFailure, RuntimeError …, by operation
        raise ConversionError(
            f"{model.config.model_type}: OpenVINO cannot translate it: {first_line(error)}"
        ) from error


def _state_static_sizes(program: ExportedProgram) -> None:
    """Write the size that a `view` leaves as -1 where the trace knows it.

    `view(batch, query, -1, head_dim)` would leave OpenVINO without the number of heads, and so without its fused RoPE.
    """
    views = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in views:
            known = node.meta["val"].shape
            sizes = [k if s == -1 and isinstance(k, int) else s for s, k in zip(node.args[1], known, strict=True)]
            node.args = (node.args[0], sizes)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]

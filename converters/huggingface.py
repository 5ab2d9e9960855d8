"""The general route: any causal language model of transformers becomes a stateful OpenVINO model.

transformers' own code is traced with `torch.export`, its cache made explicit as inputs and outputs, which then become
states. No code in here knows a model family, so a new family needs none; what it needs of transformers' inside is in
`edgert.converters.general`.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import openvino as ov
import torch
from edgert.converters.canonical import (
    DECODER_OUTPUT,
    ENCODER_OUTPUT,
    check_form,
    hide_cache,
    past_name,
    rename,
)
from edgert.converters.general.states import Layout, build_cache, cache_argument, layout, read_cache
from edgert.converters.general.tracing import EXTENSIONS, adapted
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from edgert.errors import ConversionError

if TYPE_CHECKING:
    from edgert.converters.media.inputs import MoreInputs

# Sizes of the example that is traced: all different, none 0 or 1, which torch.export would take for constants. To the
# new tokens those of a short convolution are added: code that pads up to its length must not do so here.
_BATCH, _QUERY, _PAST = 2, 3, 5


class _Decoder(torch.nn.Module):
    """A causal language model whose cache comes in and goes out as plain tensors."""

    def __init__(self, model: PreTrainedModel, layout: Layout, more: MoreInputs | None) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.more = more
        self.accepted = set(inspect.signature(model.forward).parameters)
        if not any(state.grows for state in layout.states):
            self.accepted -= {"attention_mask"}  # nothing to mask: all that came before is in the state

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
        extra: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = build_cache(self.layout, past)
        values = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        call: Any = {name: value for name, value in values.items() if name in self.accepted}
        call[cache_argument(self.model)] = cache
        with self.more.around(self.model, extra, call) if self.more else nullcontext(call) as call:
            logits = self.model(**call, use_cache=True).logits
        return logits, *read_cache(self.layout, cache, past)


class _Encoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        hidden: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return hidden


def export_decoder(model: PreTrainedModel, more: MoreInputs | None = None) -> ov.Model:
    """Export a causal language model in the form of `edgert.converters.canonical`.

    Weights keep the type they have in `model` and may share its memory: keep `model` alive as long as the result.

    Args:
        more: inputs beside tokens, of a model that sees or hears.

    Raises:
        ConversionError: the model keeps something between tokens that is neither keys and values nor a recurrent state,
            or its code cannot be traced or translated.
    """
    program, kept = trace_decoder(model, more)
    converted = _convert(program, model)
    first, end = 3, 3 + len(kept.states)
    inputs, outputs = end + (len(more.names) if more else 0), 1 + len(kept.states)
    if len(converted.inputs) != inputs or len(converted.outputs) != outputs:
        raise ConversionError(
            f"{model.config.model_type}: the export has {len(converted.inputs)} inputs and {len(converted.outputs)} "
            f"outputs, expected {inputs} and {outputs}"
        )
    positions = [more.positions, -1, -1] if more and more.positions else [-1, -1]
    shapes = [ov.PartialShape(shape) for shape in ([-1, -1], [-1, -1], positions)]
    for state in kept.states:
        free = (0, 2) if state.grows else (0,)
        sizes = [-1 if axis in free else size for axis, size in enumerate(state.example.shape)]
        shapes.append(ov.PartialShape(sizes))
    state_names = [past_name(state.name) for state in kept.states]
    names = ["input_ids", "attention_mask", "position_ids", *state_names, *(more.names if more else ())]
    for port, name, shape in zip(converted.inputs, names, [*shapes, *(more.shapes if more else ())], strict=True):
        port.get_node().set_partial_shape(shape)
        rename(port, name)
    rename(converted.outputs[0], DECODER_OUTPUT)
    converted.validate_nodes_and_infer_types()
    hide_cache(converted, converted.inputs[first:end], converted.outputs[1:], state_names)
    check_form(converted, "decoder", states=len(kept.states))
    return converted


def trace_decoder(model: PreTrainedModel, more: MoreInputs | None = None) -> tuple[ExportedProgram, Layout]:
    """Trace `(input_ids, attention_mask, position_ids, past, extra) -> (logits, *present)` with dynamic sizes.

    Also returns what the tensors of `past` and `present` are.

    Raises:
        ConversionError: as `export_decoder`.
    """
    kept = layout(model, _BATCH, _PAST)
    past = [state.example for state in kept.states]
    query = _QUERY + kept.kernel
    positions = torch.arange(_PAST, _PAST + query).expand(_BATCH, -1)
    if more and more.positions:
        positions = positions.expand(more.positions, -1, -1)
    example = (
        torch.ones(_BATCH, query, dtype=torch.long),
        torch.ones(_BATCH, _PAST + query, dtype=torch.long),
        positions.contiguous(),
        past,
        more.example(_BATCH, query) if more else [],
    )
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = (
        free,
        free,
        {1: Dim.AUTO, 2: Dim.AUTO} if more and more.positions else free,
        [{0: Dim.AUTO, 2: Dim.AUTO} if state.grows else {0: Dim.AUTO} for state in kept.states],
        more.dynamic if more else [],
    )
    return _trace(_Decoder(model, kept, more).eval(), example, shapes, model), kept


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


def _trace(module: torch.nn.Module, example: tuple[Any, ...], shapes: Any, model: PreTrainedModel) -> ExportedProgram:
    try:
        with torch.no_grad(), adapted(model):
            return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise ConversionError(f"{model.config.model_type}: torch.export failed: {first_line(error)}") from error


def _convert(program: ExportedProgram, model: PreTrainedModel) -> ov.Model:
    _state_static_sizes(program)
    try:
        return ov.convert_model(program, extension=EXTENSIONS)
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

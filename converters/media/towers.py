"""A tower and its projector as an OpenVINO model of static shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import openvino as ov
import torch
from edgert.converters.canonical import rename
from edgert.converters.huggingface import first_line
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from edgert.errors import ConversionError

OUTPUT = "features"
_SIZES = {torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel, torch.numel}
_SQUEEZES = {torch.Tensor.squeeze, torch.squeeze}


class _Static(TorchFunctionMode):
    """While a tower is traced: only what depends on its inputs is recorded, and sizes are numbers.

    The tracer would record the making of every grid, mask and position, and has sizes as tensors, which the masks of
    transformers do not take. Squeezing an axis that is longer than 1 is left out: OpenVINO 2026.4.1 takes it away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()

    def depends(self, values: Any) -> None:
        """From now on, what is made of these tensors is recorded."""
        for tensor in _tensors(values):
            self._known[tensor] = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SQUEEZES and len(args) == 2 and isinstance(args[1], int) and args[0].shape[args[1]] != 1:
            return args[0]
        if function not in _SIZES and any(tensor in self._known for tensor in _tensors((args, kwargs))):
            result = function(*args, **kwargs)
            self.depends(result)
            self.depends(args[:1])  # may have been changed in place
            return result
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors([*values.values()])


class _Tower(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, run: Callable[..., torch.Tensor], mode: _Static) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.mode = mode

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.mode.depends(inputs)
        return self.run(*inputs)


def export_tower(
    model: PreTrainedModel, run: Callable[..., torch.Tensor], example: dict[str, torch.Tensor]
) -> ov.Model:
    """Export what `run` makes of inputs, whose names and fixed shapes are those of `example`, with `model`'s weights.

    What depends on shapes only (grids, masks, positions) becomes constants: it is computed while tracing, which is why
    this is a trace of real tensors and not `torch.export`, to which every number read from a tensor is unknown.
    Gives `features` f32 [tokens, width].

    Raises:
        ConversionError: the code cannot be traced or translated, or the result has no fixed shape.
    """
    family = model.config.model_type
    mode = _Static()
    wrapper = _Tower(model.requires_grad_(False), run, mode).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad(), mode:
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(wrapper, tuple(example.values()), check_trace=False)
            converted = ov.convert_model(traced, example_input=tuple(example.values()))
    except Exception as error:  # whatever the model's code, the tracer or the frontend raises
        raise ConversionError(f"{family}: a tower cannot be exported: {first_line(error)}") from error
    if len(converted.inputs) != len(example):
        raise ConversionError(f"{family}: a tower has {len(converted.inputs)} inputs, expected {[*example]}")
    for port, (name, tensor) in zip(converted.inputs, example.items(), strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([*tensor.shape]))
        rename(port, name)
    rename(converted.outputs[0], OUTPUT)
    converted.validate_nodes_and_infer_types()
    shape = converted.outputs[0].get_partial_shape()
    if shape.is_dynamic or len(shape) != 2:
        raise ConversionError(f"{family}: a tower gives {shape}, expected a fixed [tokens, width]")
    return converted

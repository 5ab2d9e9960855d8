"""Code of transformers that cannot be traced or translated as it is, and what stands in for it during a trace.

Everything in here is found by what a model has, so that a new family of the same make needs no line. The source model
computes what it did before once the trace is over: the gate compares with it unpatched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from edgert.converters.general.adaptation import Adaptation
from edgert.converters.general.experts import EXPERTS, EXPERTS_DECOMPOSITIONS, EXPERTS_EXTENSIONS
from edgert.converters.general.recurrent import RECURRENCES, RECURRENT_EXTENSIONS
from edgert.converters.general.rope import ROPE
from edgert.converters.general.sinks import SINKS, SINKS_DECOMPOSITIONS, SINKS_EXTENSIONS
from transformers import PreTrainedModel

ADAPTATIONS: tuple[Adaptation, ...] = (*EXPERTS, *ROPE, SINKS, *RECURRENCES)

EXTENSIONS = (*EXPERTS_EXTENSIONS, *SINKS_EXTENSIONS, *RECURRENT_EXTENSIONS)
"""Translations of operations of our own, for `openvino.convert_model`."""

DECOMPOSITIONS = {**EXPERTS_DECOMPOSITIONS, **SINKS_DECOMPOSITIONS}
"""The same operations in those of torch, for `torch.export.ExportedProgram.run_decompositions` before torch.onnx."""


@contextmanager
def adapted(model: PreTrainedModel) -> Iterator[None]:
    """All adaptations that `model` needs, in force while the context lasts."""
    with ExitStack() as stack:
        for adaptation in ADAPTATIONS:
            if adaptation.applies(model):
                stack.enter_context(adaptation.apply(model))
        yield

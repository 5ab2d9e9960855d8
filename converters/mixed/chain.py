"""A model as a chain of blocks whose weights are inputs: any mix of precisions runs without being compiled anew.

Every window of tokens is read from an empty cache. What is alive between two blocks is kept for each window, so that a
change in a block costs that block and those behind it, and one block's weights are in memory at a time, in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from edgert.converters.mixed.matrices import Matrix, choosable
from edgert.converters.quality import EXACT, decoder_inputs
from numpy.typing import NDArray

from edgert.experts import without_grouped_products
from edgert.likelihood import Window

Array = NDArray[np.float32]
State = dict[str, NDArray[Any]]
"""What is alive between two blocks, for one window."""
Weights = Callable[[Matrix], Array]
"""A matrix as the blocks shall read it: f32, of the matrix' shape."""


@dataclass(frozen=True)
class _Stage:
    """A compiled block.

    Attributes:
        request: its weights are inputs, named by their constants.
        matrices: that it reads.
        inputs: its other inputs.
        outputs: in order.
        kept: what is alive behind it.
    """

    request: Any
    matrices: tuple[Matrix, ...]
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    kept: frozenset[str]


class Chain:
    """The blocks of a decoder.

    Args:
        submodels: one for each block, with f16 or f32 weights; not changed.
    """

    def __init__(self, submodels: Sequence[ov.Model], matrices: Sequence[Matrix]) -> None:
        self.matrices = list(matrices)
        core, needed = ov.Core(), frozenset[str]()
        stages = []
        for index, submodel in reversed(list(enumerate(submodels))):
            own = tuple(matrix for matrix in matrices if index in matrix.blocks)
            inputs = frozenset(port.any_name for port in submodel.inputs)
            outputs = tuple(port.any_name for port in submodel.outputs)
            compiled = core.compile_model(_with_weight_inputs(submodel), "CPU", dict(EXACT))
            stages.append(_Stage(compiled.create_infer_request(), own, inputs, outputs, needed | {*outputs[:1]}))
            needed = (needed | inputs) - {*outputs}
        self._stages = stages[::-1]

    @property
    def blocks(self) -> int:
        return len(self._stages)

    def start(self, windows: Sequence[Window]) -> list[State]:
        """What is alive before the first block."""
        return [
            {**decoder_inputs(np.array([window.tokens], np.int64), 0), "beam_idx": np.zeros(1, np.int32)}
            for window in windows
        ]

    def run(self, block: int, states: Iterable[State], weights: Weights) -> Iterator[State]:
        """What is alive behind a block; behind the last one that is `logits`, `[1, tokens, vocabulary]`."""
        stage = self._stages[block]
        arrays = {matrix.constant: np.ascontiguousarray(weights(matrix), np.float32) for matrix in stage.matrices}
        tensors = {name: ov.Tensor(array, shared_memory=True) for name, array in arrays.items()}
        for state in states:
            stage.request.reset_state()
            for name, tensor in tensors.items():  # each time: between two windows others may have run the block
                stage.request.set_tensor(name, tensor)
            # By position: the stream has the same name where it enters and where it leaves.
            inputs = {name: state[name] for name in stage.inputs}
            results = stage.request.infer(inputs, share_inputs=True, share_outputs=True).to_tuple()
            after = {name: value for name, value in state.items() if name in stage.kept}
            after |= {name: np.array(value) for name, value in zip(stage.outputs, results, strict=True)}
            yield after

    def through(self, first: int, last: int, states: Iterable[State], weights: Weights) -> Iterable[State]:
        """Run the blocks `first` to `last`, both included, each over all windows before the next."""
        for block in range(first, last + 1):
            states = list(self.run(block, states, weights)) if block < last else self.run(block, states, weights)
        return states


def from_empty(submodel: ov.Model) -> ov.Model:
    """A copy that remembers nothing: what it reads from its states is what they are at first.

    Without a cache to fuse it with, OpenVINO's CPU plugin (2026.4.1) computes attention in f32 three to ten times as
    fast.
    """
    model = submodel.clone()
    kept = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReadValue" and node.get_input_size():
            for consumer in node.output(0).get_target_inputs():
                consumer.replace_source_output(node.input(0).get_source_output())
        elif node.get_type_name() == "ReadValue":
            kept.append(node.get_attributes()["variable_id"])
    sinks = [sink for sink in model.get_sinks() if sink.get_attributes()["variable_id"] in kept]
    return ov.Model(model.get_results(), sinks, model.get_parameters(), model.get_friendly_name())


def _with_weight_inputs(submodel: ov.Model) -> ov.Model:
    """A copy whose matrices, but for routers, are inputs, f32, under the names of their constants.

    Of experts all are computed: the CPU plugin (2026.4.1) chooses among constants only, and fails to compile a block
    that has its pattern with inputs ("Only constant weights are supported for GatherMatmul operation").
    """
    model = without_grouped_products(submodel).clone()
    parameters: dict[str, ov.Node] = {}
    for use in choosable(model):
        name = use.constants[0].get_friendly_name()
        if name not in parameters:
            parameters[name] = ops.parameter(use.constants[0].get_output_shape(0), ov.Type.f32, name)
            parameters[name].output(0).set_names({name})
        use.port.replace_source_output(parameters[name].output(0))
        if len(use.constants[0].get_output_shape(0)) == 3 and use.node.get_type_name() == "MatMul":
            _turn(use.node)
    model.add_parameters(list(parameters.values()))
    model.validate_nodes_and_infer_types()
    return model


def _turn(product: ov.Node) -> None:
    """Let a product a b of experts be computed as (bᵀ aᵀ)ᵀ, which is in no pattern of the plugin's."""
    (a, b), attributes = product.input_values(), product.get_attributes()
    turned = ops.matmul(b, a, not attributes["transpose_b"], not attributes["transpose_a"])
    back = ops.transpose(turned, ops.constant([0, 2, 1]))
    for consumer in list(product.output(0).get_target_inputs()):
        consumer.replace_source_output(back.output(0))

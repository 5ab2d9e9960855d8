"""The kernels' operations in exact arithmetic, and what runs a lowered model.

Products and lookups become OpenVINO's own operations in f32 over the packed weights. What is left of a difference to
the unlowered model is then keys and values in f16, so a wiring that is wrong shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import kernel_ops
import numpy as np
import openvino as ov
import openvino.opset13 as ops

from edgert.graph import BOUNDARY
from edgert.kernel_lowering import CACHE, PAST, LoweredCache
from edgert.kvlayout import blocks_of
from edgert.packing import PackedShape, unpack

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
Array = np.ndarray[Any, np.dtype[Any]]


class ExactFactory:
    """Makes of a QuantizedLinear and an EmbeddingLookup what they stand for; attention is the real one."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []

    def create(self, name: str, inputs: Sequence[ov.Output], attributes: dict[str, Any]) -> ov.Node:
        self.made.append((name, attributes))
        if name == "CachedAttention":
            return kernel_ops.factory().create(name, inputs, attributes)
        fields = ("out_features", "in_features", "bits", "group", "asymmetric")
        shape = PackedShape(*(attributes[field] for field in fields), attributes.get("gated", False))
        weights = ops.constant(unpack(inputs[1].get_node().data, shape))
        if name == "EmbeddingLookup":
            return ops.gather(weights, inputs[0], ops.constant(0))
        return self._linear(weights, inputs[0], list(inputs[2:]), attributes)

    def _linear(self, weights: ov.Node, data: Any, rest: list[Any], attributes: dict[str, Any]) -> ov.Node:
        if attributes["norm"]:
            mean = ops.reduce_mean(ops.multiply(data, data), np.int64([-1]), keep_dims=True)
            root = ops.sqrt(ops.add(mean, np.float32(attributes["epsilon"])))
            data = ops.multiply(ops.divide(data, root), rest.pop(0))
        product = ops.matmul(data, weights, False, True)
        if attributes["gated"]:
            gate, up = ops.split(product, np.int64(-1), 2).outputs()
            kind = attributes["activation"]
            act = ops.swish(gate) if kind == "silu" else ops.gelu(gate, "TANH" if kind == "gelu_tanh" else "ERF")
            product = ops.multiply(act, up)
        if attributes["bias"]:
            product = ops.add(product, rest.pop(0))
        if attributes["residual"]:
            product = ops.add(product, rest.pop(0))
        assert not rest
        return product


class Chain:
    """One sequence through models that follow each other, lowered ones with their caches.

    Args:
        models: each with its caches, none where it was not lowered.
    """

    def __init__(self, models: Sequence[tuple[ov.Model, Sequence[LoweredCache]]]) -> None:
        self._stages = []
        for model, caches in models:
            names = [port.any_name for port in model.outputs]
            request = kernel_ops.core().compile_model(model, "CPU", EXACT).create_infer_request()
            self._stages.append((request, names, [cache.layout.empty(blocks_of(64)) for cache in caches]))
        self.past = 0

    def step(self, inputs: Mapping[str, Array]) -> Array:
        """The last model's first output for the next tokens; what is not in `inputs` follows from their number."""
        rows = inputs["input_ids"] if "input_ids" in inputs else inputs[BOUNDARY]
        tokens = rows.shape[1]
        end = self.past + tokens
        values: dict[str, Any] = {
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.past, end)[None],
            "token_type_ids": np.zeros((1, tokens), np.int64),
            "beam_idx": np.zeros(1, np.int32),
            PAST: np.array([self.past], np.int64),
            **inputs,
        }
        for request, outputs, caches in self._stages:
            own = values | {f"{CACHE}{n}": ov.Tensor(cache, shared_memory=True) for n, cache in enumerate(caches)}
            results = request.infer({port.any_name: own[port.any_name] for port in request.model_inputs}).to_tuple()
            values |= {name: np.array(result) for name, result in zip(outputs, results, strict=True)}
        self.past = end
        return values[outputs[0]][0]

    def tokens(self, tokens: Sequence[int], chunks: Sequence[int]) -> Array:
        """The outputs for all tokens, given in chunks of these sizes and then one by one."""
        ids = np.array([tokens], np.int64)
        ends = np.cumsum([*chunks, *[1] * (len(tokens) - sum(chunks))])
        return np.concatenate([self.step({"input_ids": part}) for part in np.split(ids, ends[:-1], axis=1)])

"""A GGUF file becomes a canonical `ov.Model` by OpenVINO's own frontend, without torch; weights stay as they are.

The frontend builds llama.cpp's graph: batch 1, caches in f16 that are written in place by index, and an additive mask
made outside. `canonical` turns that into caches that grow and a mask made from `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino as ov
from edgert.converters import quality
from edgert.converters.canonical import DECODER_INPUTS, DECODER_OUTPUT, check_form, hide_cache, rename
from openvino import opset13 as ops
from openvino.frontend import FrontEndManager

from edgert.errors import ConversionError

_UNUSED = ("inp_kv_idx", "inp_out_ids", "token_len_per_seq")
_MASKS = ("self_kq_mask", "self_kq_mask_swa")


@dataclass(frozen=True)
class Metadata:
    """The key-value part of a GGUF file, arrays as lists."""

    path: Path
    fields: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", "unknown"))

    def number(self, name: str) -> int:
        """`ARCHITECTURE.name` as a positive number; raises `ConversionError` where it is missing."""
        value = self.fields.get(f"{self.architecture}.{name}")
        if not isinstance(value, int) or value < 1:
            raise ConversionError(f"{self.path}: {self.architecture}.{name} is {value!r}, expected a positive number")
        return value

    def config(self) -> dict[str, Any]:
        """The facts that a config.json would have."""
        return {
            "model_type": self.architecture,
            "max_position_embeddings": self.number("context_length"),
            "hidden_size": self.number("embedding_length"),
            "num_hidden_layers": self.number("block_count"),
        }


def read_metadata(path: Path) -> Metadata:
    """Read and bounds-check a GGUF file's header and tensor table with the `gguf` package, not with the frontend.

    Raises:
        ConversionError: the file is truncated, damaged, or no GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # ValueError, IndexError, KeyError, UnicodeDecodeError, by where the damage is
        raise ConversionError(f"{path}: is no whole GGUF file: {type(error).__name__}: {error}") from error
    if not reader.tensors or end > path.stat().st_size:
        raise ConversionError(f"{path}: holds {len(reader.tensors)} tensors up to byte {end} of {path.stat().st_size}")
    return Metadata(path, fields)


def convert(metadata: Metadata, progress: Callable[[str], None]) -> tuple[ov.Model, list[dict[str, Any]]]:
    """Convert a decoder and check that it computes the same step by step as at once.

    Raises:
        ConversionError: OpenVINO's frontend does not know the architecture or a quantization in it.
        ParityError: the caches are wired wrongly.
    """
    path = metadata.path
    progress("export")
    try:
        frontend = FrontEndManager().load_by_framework("gguf")
        model = frontend.convert(frontend.load(str(path)))
    except Exception as error:  # RuntimeError and the frontend's own classes
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConversionError(
            f"{path}: OpenVINO's GGUF frontend does not take architecture {metadata.architecture!r}: {lines[-1][:300]}"
        ) from error
    canonical(model, metadata)
    progress("check")
    vocab_size = model.output(DECODER_OUTPUT).get_partial_shape()[-1].get_length()
    return model, [quality.check_states(lambda: quality.openvino_decoder(model), vocab_size=vocab_size)]


def canonical(model: ov.Model, metadata: Metadata) -> None:
    """Bring the frontend's graph to the form of `edgert.converters.canonical`, in place, with batch 1.

    Raises:
        ConversionError: the graph is not the one of a decoder with attention only.
    """
    parameters = {p.get_friendly_name(): p for p in model.get_parameters()}
    caches = [name for name in parameters if name.startswith("cache_")]
    unknown = sorted(set(parameters) - {*caches, *_UNUSED, *_MASKS, "inp_tokens", "inp_pos"})
    if unknown or not caches or "inp_tokens" not in parameters:
        raise ConversionError(f"{metadata.path}: {metadata.architecture} needs inputs {unknown}, unknown to edgert")

    ids, mask, positions = (ops.parameter([1, -1], ov.Type.i64, name=name) for name in DECODER_INPUTS[:3])
    for node, old in ((ids, "inp_tokens"), (positions, "inp_pos")):
        if old in parameters:
            as_i32 = ops.unsqueeze(ops.convert(node, "i32"), _ints(0, 1))
            _replace(parameters[old].output(0), as_i32.output(0))
    for name in _MASKS:
        if name in parameters:
            window = metadata.number("attention.sliding_window") if name.endswith("_swa") else None
            _replace(parameters[name].output(0), _causal_mask(ids, mask, window).output(0))
    _keep_all_positions(parameters.get("inp_out_ids"))

    past, present = [], []
    layers = sorted({int(name.rpartition("_l")[2]) for name in caches})
    for name in (f"cache_{kind}_l{layer}" for layer in layers for kind in "kv"):
        before, after = _grow(parameters[name], metadata.path)
        past.append(before)
        present.append(ops.result(after))
    logits = next(
        v for r in model.get_results() if (v := r.input_value(0)).get_node().get_type_name() != "ScatterUpdate"
    )
    flat = ops.squeeze(logits, _ints(1))
    for result in model.get_results():
        model.remove_result(result)
    for parameter in parameters.values():
        model.remove_parameter(parameter)
    model.add_parameters([ids, mask, positions, *past])
    model.add_results([ops.result(flat), *present])
    for parameter in (ids, mask, positions):
        rename(parameter.output(0), parameter.get_friendly_name())
    _attend_directly(model)
    _stay_in_f32(model)
    model.validate_nodes_and_infer_types()
    rename(model.outputs[0], DECODER_OUTPUT)
    hide_cache(model, [p.output(0) for p in past], model.outputs[1:])
    check_form(model, "decoder")


def _grow(cache: ov.Node, path: Path) -> tuple[ov.Node, ov.Output]:
    """Replace `ScatterUpdate(cache [1, context, heads, dim], index, new)` by a concatenation along the tokens.

    Returns the new cache input and output, [batch, heads, tokens, dim].
    """
    users = [port.get_node() for port in cache.output(0).get_target_inputs()]
    if len(users) != 1 or users[0].get_type_name() != "ScatterUpdate":
        raise ConversionError(f"{path}: {cache.get_friendly_name()} is not a cache of keys or values written by index")
    scatter = users[0]
    shape = cache.get_output_partial_shape(0)
    heads, dim = shape[2].get_length(), shape[3].get_length()
    past = ops.parameter([1, heads, -1, dim], ov.Type.f32)
    new = ops.reshape(_before_rounding(scatter.input_value(2)), _ints(1, -1, heads, dim), False)
    grown = ops.concat([past, ops.transpose(new, _ints(0, 2, 1, 3))], axis=2)
    _replace(scatter.output(0), ops.transpose(grown, _ints(0, 2, 1, 3)).output(0), keep_results=True)
    return past, grown.output(0)


def _attend_directly(model: ov.Model) -> None:
    """Give attention the caches as they lie, heads repeated the way the CPU plugin's fusion knows."""
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        heads = attention.get_input_partial_shape(0)[1].get_length()
        for index in (1, 2):
            port = attention.input_value(index)
            while port.get_node().get_type_name() in {"Transpose", "Reshape", "Broadcast", "Unsqueeze", "Convert"}:
                port = port.get_node().input_value(0)
            shape = port.get_partial_shape()
            kept, dim = shape[1].get_length(), shape[3].get_length()
            if heads != kept:
                repeats = _ints(1, 1, heads // kept, 1, 1)
                single = ops.unsqueeze(port, ops.constant(np.int64(2)))
                wide = ops.broadcast(single, repeats, broadcast_spec="bidirectional")
                port = ops.reshape(wide, _ints(0, heads, -1, dim), True).output(0)
            attention.input(index).replace_source_output(port)


def _causal_mask(ids: ov.Node, mask: ov.Node, window: int | None) -> ov.Node:
    """[1, 1, query, past + query], f32: 0 where a query may look, the most negative number elsewhere."""
    zero, one = ops.constant(np.int64(0)), ops.constant(np.int64(1))
    query = ops.gather(ops.shape_of(ids), one, zero)
    total = ops.gather(ops.shape_of(mask), one, zero)
    rows = ops.unsqueeze(ops.range(ops.subtract(total, query), total, one, "i64"), one)
    columns = ops.unsqueeze(ops.range(zero, total, one, "i64"), zero)
    seen = ops.less_equal(columns, rows)
    if window is not None:
        seen = ops.logical_and(seen, ops.greater(columns, ops.subtract(rows, ops.constant(np.int64(window)))))
    seen = ops.logical_and(seen, ops.convert(mask, "boolean"))
    lowest = ops.constant(np.float32(np.finfo(np.float32).min))
    return ops.unsqueeze(ops.select(seen, ops.constant(np.float32(0)), lowest), _ints(0, 1))


def _keep_all_positions(chosen: ov.Node | None) -> None:
    """Logits of every position: llama.cpp drops rows before the last FFN, the runtime does its own dropping."""
    if chosen is None:
        return
    squeezes = [port.get_node() for port in chosen.output(0).get_target_inputs()]
    for squeeze in squeezes:
        for port in squeeze.output(0).get_target_inputs():
            gather = port.get_node()
            _replace(gather.output(0), ops.unsqueeze(gather.input_value(0), ops.constant(np.int64(0))).output(0))


def _stay_in_f32(model: ov.Model) -> None:
    """Undo the frontend's rounding of attention to f16, scale included, which also keeps it from being fused."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == ov.Type.f16:
            source = node.input_value(0)
            if source.get_node().get_type_name() != "Constant":
                _replace(node.output(0), source)
        elif node.get_type_name() == "ScaledDotProductAttention" and node.get_input_size() == 5:
            scale = float(node.input_value(4).get_node().data)
            exact = 1 / float(np.sqrt(node.get_input_partial_shape(0)[3].get_length()))
            scale = exact if np.float16(exact) == np.float16(scale) else scale
            node.input(4).replace_source_output(ops.constant(np.float32(scale)).output(0))


def _before_rounding(port: ov.Output) -> ov.Output:
    """The value before reshapes and the conversion to the cache's f16."""
    while port.get_node().get_type_name() in {"Reshape", "Convert"} and port.get_element_type() == ov.Type.f16:
        port = port.get_node().input_value(0)
    return port


def _replace(old: ov.Output, new: ov.Output, *, keep_results: bool = False) -> None:
    for consumer in old.get_target_inputs():
        if not (keep_results and consumer.get_node().get_type_name() == "Result"):
            consumer.replace_source_output(new)


def _ints(*values: int) -> ov.Node:
    return ops.constant(np.array(values, np.int64))

"""An ONNX decoder with past, or encoder, becomes a canonical `ov.Model`; checked against onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import openvino as ov
from edgert.converters import quality
from edgert.converters.canonical import DECODER_OUTPUT, ENCODER_OUTPUT, canonical_decoder, canonical_encoder, hide_cache
from edgert.converters.sources import Task, read_json

from edgert.errors import ConversionError

_INT64 = onnx.TensorProto.INT64
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
# onnxruntime rounds to f16 after each operation of an f16 file, the converted model does not.
HALF_LIMIT = 1e-2


def convert(path: Path, progress: Callable[[str], None]) -> tuple[ov.Model, Task, list[dict[str, Any]]]:
    """Convert and check an ONNX file.

    Inputs are told apart by name, as optimum and most hand-made exports have them; cache inputs are the floating-point
    ones of rank 4, matched to outputs by optimum's names, else by order.

    Raises:
        ConversionError: the file is damaged, refers to data outside its folder, or has another form.
        ParityError: the converted model computes something else than onnxruntime.
    """
    proto = read(path)
    names = _names(proto, path)
    pairs = _cache_pairs(proto, path)
    half = any(port.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for port in proto.graph.output)
    config = read_json(path.parent / "config.json")
    del proto
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise ConversionError(
            f"{path.name}: OpenVINO cannot translate it: {str(error).splitlines()[-1][:300]}"
        ) from error
    if half:
        model = _in_f32(model)
    ports = {name: port for port in (*model.inputs, *model.outputs) for name in port.get_names()}
    for canonical, name in names.items():
        ports[name].get_tensor().set_names({canonical})
    limit = HALF_LIMIT if half else quality.LIMIT
    against = f"onnxruntime {version('onnxruntime')}"
    progress("check")
    if DECODER_OUTPUT in names:
        hide_cache(model, [ports[name] for name in pairs], [ports[name] for name in pairs.values()])
        canonical_decoder(model)
        row = quality.check_decoder(
            quality.openvino_decoder(model),
            quality.onnx_decoder(path, pairs, names),
            vocab_size=_vocab_size(model, config),
            window=quality.attention_window(config),
            against=against,
            limit=limit,
        )
        return model, "decoder", [row]
    canonical_encoder(model)
    pair = quality.openvino_encoder(model), quality.onnx_encoder(path, names)
    row = quality.check_encoder(*pair, vocab_size=int(config.get("vocab_size", 100)), against=against, limit=limit)
    return model, "encoder", [row]


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, without the data of external tensors, after checking where those lie.

    Raises:
        ConversionError: it is no ONNX model, or refers to a file that is not a plain one inside its folder.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, OSError
        raise ConversionError(f"{path}: is no ONNX file: {error}") from error
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError, and what the C++ side throws
        raise ConversionError(f"{path}: is no valid ONNX model: {str(error).splitlines()[0]}") from error
    return proto


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    outside = not parts or location.startswith("/") or "\\" in location or ":" in location or ".." in parts
    if outside:
        raise ConversionError(f"{path}: tensor {tensor.name!r} lies at {location!r}, outside the model's folder")
    file = path.parent
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise ConversionError(f"{path}: tensor {tensor.name!r} lies at {location!r}, a symbolic link")
    if not file.is_file():
        raise ConversionError(f"{path}: tensor {tensor.name!r} lies at {location!r}, which is missing")
    status = os.stat(file)
    if status.st_nlink > 1:
        raise ConversionError(f"{path}: tensor {tensor.name!r} lies at {location!r}, a file with several hard links")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as error:
        raise ConversionError(f"{path}: tensor {tensor.name!r}: {error}") from error
    if min(offset, length) < 0 or offset + length > status.st_size:
        raise ConversionError(
            f"{path}: tensor {tensor.name!r} takes bytes {offset} to {offset + length} of {location}, "
            f"which has {status.st_size}"
        )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, those of subgraphs and functions included."""

    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                for graph in (attribute.g, *attribute.graphs):
                    yield from of_graph(graph)

    def of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from of_nodes(graph.node)

    yield from of_graph(proto.graph)
    for function in proto.functions:
        yield from of_nodes(function.node)


def _names(proto: onnx.ModelProto, path: Path) -> dict[str, str]:
    """Canonical names -> the file's names, for its token inputs and its first output."""
    names: dict[str, str] = {}
    for port in _inputs(proto):
        if _rank(port) == 4:
            continue
        lower = port.name.lower()
        known = {"mask": "attention_mask", "pos": "position_ids", "type": "token_type_ids", "segment": "token_type_ids"}
        canonical = next((role for part, role in known.items() if part in lower), "input_ids")
        if port.type.tensor_type.elem_type != _INT64 or _rank(port) != 2 or canonical in names:
            raise ConversionError(
                f"{path}: input {port.name!r} is not understood; edgert takes input_ids, attention_mask, position_ids, "
                "token_type_ids (int64 [batch, tokens]) and caches (float [batch, heads, tokens, head_dim])"
            )
        names[canonical] = port.name
    if "input_ids" not in names:
        raise ConversionError(f"{path}: has no input of token ids, only {[port.name for port in _inputs(proto)]}")
    outputs = {port.name: port for port in proto.graph.output}
    usual = DECODER_OUTPUT if _caches(_inputs(proto)) or DECODER_OUTPUT in outputs else ENCODER_OUTPUT
    main = usual if usual in outputs else next((name for name, port in outputs.items() if _rank(port) == 3), None)
    if main is None:
        raise ConversionError(f"{path}: has no output [batch, tokens, ...], only {sorted(outputs)}")
    if usual == DECODER_OUTPUT and not _caches(_inputs(proto)):
        raise ConversionError(f"{path}: has logits but no KV cache; export it with past (text-generation-with-past)")
    return {**names, usual: main}


def _cache_pairs(proto: onnx.ModelProto, path: Path) -> dict[str, str]:
    """For each cache input the output that continues it, layer by layer, key before value."""
    past, present = _caches(_inputs(proto)), _caches(proto.graph.output)
    if len(past) != len(present) or len(past) % 2:
        raise ConversionError(
            f"{path}: {len(past)} cache inputs and {len(present)} cache outputs, expected as many pairs"
        )
    by_name = [name.replace("past_key_values", "present") for name in past]
    matched = by_name if set(by_name) == set(present) else list(present)
    for before, after in zip(past, matched, strict=True):
        dims = [[d.dim_value for d in shape.type.tensor_type.shape.dim] for shape in (past[before], present[after])]
        if any(a and b and a != b for a, b in zip(dims[0][1::2], dims[1][1::2], strict=True)):
            raise ConversionError(f"{path}: cache input {before!r} {dims[0]} does not continue in {after!r} {dims[1]}")
    return dict(zip(past, matched, strict=True))


def _inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in proto.graph.initializer}
    return [port for port in proto.graph.input if port.name not in constants]


def _caches(ports: Iterable[onnx.ValueInfoProto]) -> dict[str, onnx.ValueInfoProto]:
    return {p.name: p for p in ports if _rank(p) == 4 and p.type.tensor_type.elem_type in _FLOATS}


def _rank(port: onnx.ValueInfoProto) -> int:
    return len(port.type.tensor_type.shape.dim)


def _in_f32(model: ov.Model) -> ov.Model:
    """Give an f16 model f32 inputs and outputs."""
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    for index, port in enumerate(model.inputs):
        if port.get_element_type() == ov.Type.f16:
            steps.input(index).tensor().set_element_type(ov.Type.f32)
    for index, port in enumerate(model.outputs):
        if port.get_element_type() == ov.Type.f16:
            steps.output(index).tensor().set_element_type(ov.Type.f32)
    return steps.build()


def _vocab_size(model: ov.Model, config: dict[str, Any]) -> int:
    width = model.output(DECODER_OUTPUT).get_partial_shape()[-1]
    return int(width.get_length()) if width.is_static else int(config.get("vocab_size", 100))

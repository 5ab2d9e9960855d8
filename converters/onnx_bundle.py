"""`--format onnx`: a Hugging Face model becomes a bundle that onnxruntime runs whole.

Inputs input_ids, attention_mask, position_ids, past_key_values.N.key|value; outputs logits, present.N.key|value. An
encoder as in `edgert.converters.canonical`.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from edgert.converters import pretrained, quality
from edgert.converters.build import describe, report, samples
from edgert.converters.canonical import DECODER_OUTPUT, ENCODER_OUTPUT, cache_names
from edgert.converters.compress import ROLES, compress
from edgert.converters.general.tracing import DECOMPOSITIONS
from edgert.converters.huggingface import first_line, trace_decoder, trace_encoder
from edgert.converters.sources import Source, Task, copy_tokenizer
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from tokenizers import Tokenizer

from edgert.bundle import Draft, ModelFacts, Report
from edgert.errors import BundleError, ConversionError

if TYPE_CHECKING:
    from edgert.converters.build import Options, Progress

OPSET = 21  # the first whose DequantizeLinear has blocks, which NNCF needs for INT4
EXTERNAL_BEYOND = 1_900_000_000  # bytes; protobuf ends at 2 GiB
_BITS = {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.UINT8: 8, TensorProto.INT8: 8,
         TensorProto.UINT4: 4, TensorProto.INT4: 4}  # fmt: skip
_SHORT = {TensorProto.FLOAT: "f32", TensorProto.FLOAT16: "f16", TensorProto.UINT8: "u8", TensorProto.INT8: "i8",
          TensorProto.UINT4: "u4", TensorProto.INT4: "i4"}  # fmt: skip


def build_onnx(source: Source, draft: Draft, options: Options, progress: Progress) -> tuple[ModelFacts, Report, None]:
    """Export, check, compress and write model.onnx into `draft`.

    Raises:
        ConversionError: the model cannot be loaded, traced, translated or compressed.
        ParityError: the export computes something else than its source.
        BundleError: the disk did not take it.
    """
    tokenizer = copy_tokenizer(source.folder, draft.path / "tokenizer")
    config = source.config()
    _, task = pretrained.load_config(source.folder)
    with tempfile.TemporaryDirectory() as scratch, pretrained.quiet():
        model = pretrained.load(source.folder, task)
        vocab_size = int(model.config.get_text_config().vocab_size)
        progress("export")
        exported = Path(scratch) / "model.onnx"
        caches = _export(model, task, exported)
        progress("check")
        checks = [_check(model, task, exported, caches, vocab_size)]
        del model
        gc.collect()
        progress(f"compress to {options.weights}")
        proto = _compress(exported, caches, options, tokenizer, vocab_size)
    progress("write")
    rows = precision_table(proto)
    _write(proto, draft.path / "model.onnx")
    facts = describe(
        source, config, options, task, "onnx", vocab_size, tokenizer, draft, options.weights,
        sum(row["elements"] for row in rows),
    )  # fmt: skip
    return facts, report(source, options, rows, checks), None


def _export(model: Any, task: Task, path: Path) -> dict[str, torch.Size]:
    """Write the ONNX file; returns the cache inputs and an example of their shapes."""
    if task == "decoder":
        program, kept = trace_decoder(model)
        if kept.recurrent:
            parts = ", ".join(sorted({state.part for state in kept.states if not state.grows}))
            raise ConversionError(
                f"{model.config.model_type}: its layers keep states ({parts}) that are not keys and values, which ONNX "
                "bundles cannot have; the OpenVINO format can"
            )
        shapes = [state.example.shape for state in kept.states]
        program = program.run_decompositions(dict(DECOMPOSITIONS))
        past, present = cache_names(len(shapes) // 2)
        inputs, outputs = ["input_ids", "attention_mask", "position_ids", *past], [DECODER_OUTPUT, *present]
    else:
        program, inputs = trace_encoder(model)
        past, shapes, outputs = [], [], [ENCODER_OUTPUT]
    try:
        exported = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
        )
    except Exception as error:  # OnnxExporterError and what its passes raise
        raise ConversionError(
            f"{model.config.model_type}: torch.onnx cannot translate it: {first_line(error)}"
        ) from error
    exported.save(path, external_data=True)
    _transpose_once(path)
    return dict(zip(past, shapes, strict=True))


def _transpose_once(path: Path) -> None:
    """Store weights that the graph transposes at run time, as it does with tied ones, the way they are used.

    NNCF finds no weight behind a Transpose. The data go to a file beside the model: protobuf ends at 2 GiB.
    """
    proto = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    moved = [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in tensors]
    for number, node in enumerate(moved):
        order = next((attribute.ints for attribute in node.attribute if attribute.name == "perm"), None)
        values = numpy_helper.to_array(tensors[node.input[0]], str(path.parent)).transpose(order)
        turned = TensorProto(name=node.output[0], data_type=tensors[node.input[0]].data_type, dims=values.shape)
        location = f"transposed_{number}.data"
        (path.parent / location).write_bytes(np.ascontiguousarray(values).tobytes())
        turned.raw_data = b""  # set_external_data insists on the field, onnx.save would write it again
        external_data_helper.set_external_data(turned, location, 0, values.nbytes)
        turned.ClearField("raw_data")
        proto.graph.initializer.append(turned)
        proto.graph.node.remove(node)
    onnx.save(proto, path)


def _compress(
    path: Path, caches: dict[str, torch.Size], options: Options, tokenizer: Tokenizer, vocab_size: int
) -> onnx.ModelProto:
    if options.weights == "fp16":
        proto = onnx.load(path)
        to_fp16(proto)
        return proto
    chosen = samples(options, tokenizer, vocab_size) if options.dataset else None
    for sample in chosen or []:
        sample.pop("beam_idx")
        sample.update({name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()})
    # Beyond 2 GiB NNCF takes a model only with its data outside, and samples only with it inside.
    return compress(
        onnx.load(path, load_external_data=bool(chosen)),
        options.weights,
        group_size=options.group_size,
        sym=options.sym,
        awq=options.awq,
        samples=chosen,
        external_data=None if chosen else path.parent,
    )


def _check(model: Any, task: Task, path: Path, caches: dict[str, torch.Size], vocab_size: int) -> dict[str, Any]:
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids", DECODER_OUTPUT)}
    against = quality.transformers_name()
    if task == "decoder":
        pairs = {name: name.replace("past_key_values", "present") for name in caches}
        window = quality.attention_window(model.config.to_dict())
        both = quality.onnx_decoder(path, pairs, names), quality.torch_decoder(model)
        return quality.check_decoder(*both, vocab_size=vocab_size, window=window, against=against)
    session = quality.onnx_session(path)
    names = {port.name: port.name for port in (*session.get_inputs(), *session.get_outputs())}
    pair = quality.onnx_encoder(path, names), quality.torch_encoder(model)
    return quality.check_encoder(*pair, vocab_size=vocab_size, against=against)


def to_fp16(proto: onnx.ModelProto) -> None:
    """Store every f32 matrix as f16, in place; onnxruntime casts it back once, when it loads the model."""
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2 and min(tensor.dims[-2:]) > 1:
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_f16")
            casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(half)
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def precision_table(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    """The same table as `edgert.converters.compress.precision_table`, for an ONNX model."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type in _BITS}
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            users.setdefault(name, []).append((node, position))
    scales = {name: node for node in proto.graph.node if node.op_type == "DequantizeLinear" for name in node.input[1:]}
    head = _head(proto)
    rows: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name in scales or (tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16) and name not in users):
            continue
        role, group, size = _role(name, tensor, users, head), None, _size(tensor)
        for node, _ in users.get(name, []):
            if node.op_type == "DequantizeLinear":
                block = next((a.i for a in node.attribute if a.name == "block_size"), 0)
                group = block or -1
                size += sum(_size(tensors[extra]) for extra in node.input[1:] if extra in tensors)
        precision = _SHORT[tensor.data_type]
        if group is None and precision not in {"f32", "f16"}:
            continue  # a number of some other kind: a mask, an index
        row = rows.setdefault(
            (role, precision, group),
            {"role": role, "precision": precision, "group_size": group, "tensors": 0, "elements": 0, "bytes": 0},
        )
        row["tensors"] += 1
        row["elements"] += int(np.prod(tensor.dims, dtype=np.int64))
        row["bytes"] += size
    return sorted(rows.values(), key=lambda row: (ROLES.index(row["role"]), -row["bytes"]))


def _role(
    name: str, tensor: onnx.TensorProto, users: dict[str, list[tuple[onnx.NodeProto, int]]], head: str | None
) -> str:
    roles = set()
    open_names = [name]
    while open_names:
        for node, position in users.get(open_names.pop(), []):
            if node.op_type in {"DequantizeLinear", "Cast", "Reshape", "Transpose"} and position == 0:
                open_names += node.output
            elif node.op_type == "Gather" and position == 0 and len(tensor.dims) == 2:
                roles.add("embedding")
            elif node.op_type in {"MatMul", "Gemm"} and len(tensor.dims) >= 2 and min(tensor.dims[-2:]) > 1:
                roles.add("head" if node.output[0] == head else "linear")
            elif node.op_type == "Gather" and position == 0 and len(tensor.dims) > 2:
                roles.add("linear")  # experts, chosen by the router
    if not roles:
        return "norms+other"
    return "embedding+head" if roles == {"embedding", "head"} else min(roles, key=ROLES.index)


def _head(proto: onnx.ModelProto) -> str | None:
    """Output of the last matrix product before the logits."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    open_names = [DECODER_OUTPUT]
    for name in open_names:
        node = makers.get(name)
        if node is not None and node.op_type in {"MatMul", "Gemm"}:
            return name
        open_names += node.input if node is not None else []
    return None


def _size(tensor: onnx.TensorProto) -> int:
    return (int(np.prod(tensor.dims, dtype=np.int64)) * _BITS[tensor.data_type] + 7) // 8


def _write(proto: onnx.ModelProto, path: Path) -> None:
    # The exporter notes on each node where in the build machine's files it came from.
    del proto.metadata_props[:]
    for item in (proto, proto.graph, *proto.graph.node, *proto.functions):
        item.doc_string = ""
    for noted in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output,
                  *proto.graph.initializer):  # fmt: skip
        del noted.metadata_props[:]
    weights = sum(_size(tensor) for tensor in proto.graph.initializer if tensor.data_type in _BITS)
    try:
        onnx.save(
            proto, path, save_as_external_data=weights > EXTERNAL_BEYOND, all_tensors_to_one_file=True,
            location=f"{path.name}.data",
        )  # fmt: skip
    except OSError as error:
        raise BundleError(f"{path.name}: cannot be written: {error}") from error

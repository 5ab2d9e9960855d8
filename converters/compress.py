"""Weight compression by NNCF, and the table of what became which precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import compress_model_transformation

from edgert.errors import ConversionError, UsageError

Weights = Literal["fp16", "int8", "int4"]
SAMPLE_TOKENS = 128
MAX_SAMPLES = 128  # NNCF's own default for the size of the subset it reads


def compress(
    model: Any,
    weights: Literal["int8", "int4"],
    *,
    group_size: int = 128,
    sym: bool = False,
    awq: bool = False,
    samples: list[dict[str, np.ndarray]] | None = None,
    external_data: Path | None = None,
    kept: Sequence[str] = (),
) -> Any:
    """Compress the weights of an `ov.Model` or `onnx.ModelProto` with NNCF's defaults; use what is returned.

    INT4 leaves embedding and head at INT8, and both leave routers of experts as they are: they are small, and a wrong
    choice of experts is a large error. A matrix whose input size `group_size` does not divide gets the largest power of
    two that does, or INT8 where there is none from 32 up (NNCF's `GroupSizeFallbackMode.ADJUST`); `precision_table`
    shows it.

    Args:
        kept: names of operations whose weights stay as they are, besides the routers of an `ov.Model`.
        group_size: INT4 weights along the input dimension that share a scale; -1 is the whole dimension.
        sym: no zero points (INT4 only, as NNCF has INT8 asymmetric).
        awq: move scale from activations into weights (AWQ), judged from `samples`, or from the weights alone.
        samples: model inputs; scales are then fitted to what the layers compute on them (scale estimation).
        external_data: the folder of an ONNX model's external data, where that is not loaded.

    Raises:
        ConversionError: NNCF cannot compress the model.
        UsageError: experts would get groups that are no power of two.
    """
    chosen = routers(model) if isinstance(model, ov.Model) else set()
    if chosen and weights == "int4" and group_size > 0 and group_size & (group_size - 1):
        # The CPU plugin (2026.4.1) computes such groups of experts wrongly: up to 90 % off, in silence.
        raise UsageError(f"group_size is {group_size}, a model with experts needs a power of two, or -1")
    import nncf
    import rich
    from nncf.parameters import CompressWeightsMode

    logging.getLogger("nncf").setLevel(logging.ERROR)
    advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    if external_data is not None:
        advanced.backend_params["external_data_dir"] = str(external_data.resolve())
    options: dict[str, Any] = {"mode": CompressWeightsMode.INT8_ASYM, "advanced_parameters": advanced}
    if weights == "int4":
        options |= {
            "mode": CompressWeightsMode.INT4_SYM if sym else CompressWeightsMode.INT4_ASYM,
            "group_size": group_size,
            "awq": awq or None,
            "dataset": nncf.Dataset(samples) if samples else None,
            "scale_estimation": bool(samples) or None,
        }
        if samples:
            options["subset_size"] = min(len(samples), MAX_SAMPLES)
    if names := [*kept, *sorted(chosen)]:
        options["ignored_scope"] = nncf.IgnoredScope(names=names)
    console = rich.get_console()
    quiet, console.quiet = console.quiet, True  # NNCF draws bars of its own over ours
    try:
        return nncf.compress_weights(model, **options)
    except Exception as error:  # NNCF raises its own and the backends' classes
        raise ConversionError(f"compression to {weights}: {type(error).__name__}: {error}") from error
    finally:
        console.quiet = quiet


def to_fp16(model: ov.Model) -> None:
    """Store every weight matrix as f16, in place.

    `openvino.save_model(compress_to_fp16=True)` would round RoPE's frequencies too, which turns positions beyond a few
    thousand by a visible angle. So what is no matrix is taken out while the matrices are compressed, and save_model
    leaves a model alone that is compressed already.
    """
    kept = [
        node
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and _type(node) == "f32" and not _is_matrix(node)
    ]
    stand_ins = []
    for constant in kept:
        stand_in = ops.parameter(constant.get_output_shape(0), ov.Type.f32)
        for consumer in constant.output(0).get_target_inputs():
            consumer.replace_source_output(stand_in.output(0))
        stand_ins.append(stand_in)
    model.add_parameters(stand_ins)
    compress_model_transformation(model)
    for constant, stand_in in zip(kept, stand_ins, strict=True):
        for consumer in stand_in.output(0).get_target_inputs():
            consumer.replace_source_output(constant.output(0))
        model.remove_parameter(stand_in)


def read_samples(
    file: Path, encode: Callable[[str], list[int]], inputs: dict[str, np.dtype]
) -> list[dict[str, np.ndarray]]:
    """Cut a text file into model inputs of `SAMPLE_TOKENS` tokens, at most `MAX_SAMPLES` of them, evenly spread.

    Args:
        encode: text to token ids, without special tokens.
        inputs: names of the model's inputs and their types.

    Raises:
        UsageError: the file is missing, no UTF-8 text, or shorter than one sample.
    """
    try:
        ids = encode(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"dataset {file}: cannot be read as UTF-8 text: {error}") from error
    count = len(ids) // SAMPLE_TOKENS
    if not count:
        raise UsageError(f"dataset {file}: {len(ids)} tokens, at least {SAMPLE_TOKENS} needed")
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_SAMPLES)).astype(int))
    known = {
        "attention_mask": np.ones((1, SAMPLE_TOKENS)),
        "position_ids": np.arange(SAMPLE_TOKENS)[None],
        "token_type_ids": np.zeros((1, SAMPLE_TOKENS)),
        "beam_idx": np.zeros(1),
    }
    samples = []
    for index in chosen:
        part = np.array(ids[index * SAMPLE_TOKENS : (index + 1) * SAMPLE_TOKENS])[None]
        samples.append({name: {**known, "input_ids": part}[name].astype(kind) for name, kind in inputs.items()})
    return samples


# Operations that hand a weight on without mixing it with an activation.
_PASSING = {"Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Constant"}
_BITS = {"u4": 4, "i4": 4, "nf4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
_FLOATS = {"f16", "bf16", "f32"}
# Where an operation may take a weight; GroupedMatMul's third input says where the rows of each expert end.
_WEIGHT_PORTS = {"MatMul": slice(0, 2), "GroupedMatMul": slice(1, 2), "Gather": slice(0, 1)}
ROLES = ("embedding", "embedding+head", "router", "linear", "head", "norms+other")
# What may lie between the product of a router and its choice: scores, biases, limits on groups of experts.
_CHOOSING = {
    "Abs", "Add", "Broadcast", "Clamp", "Convert", "Divide", "Equal", "Exp", "Gather", "GatherElements", "Greater",
    "GreaterEqual", "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "LogSoftmax", "Maximum",
    "Minimum", "Multiply", "NotEqual", "Power", "ReduceMax", "ReduceSum", "Reshape", "ScatterElementsUpdate", "Select",
    "Sigmoid", "Softmax", "SoftPlus", "Sqrt", "Squeeze", "Subtract", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze",
}  # fmt: skip


def precision_table(model: ov.Model) -> list[dict[str, Any]]:
    """What the weights of `model` are: one row for each role, precision and group size.

    Rows are `{"role", "precision", "group_size", "tensors", "elements", "bytes"}`. Roles: `embedding` (a table that is
    looked up), `head` (the last matrix before the logits), `embedding+head` (tied), `router` (chooses experts),
    `linear` (all other matrices), `norms+other`. Scales and zero points are in `bytes` only. `group_size` is None for
    weights without scales and -1 for one scale a channel.
    """
    roles: dict[int, set[str]] = {}
    cones: dict[int, list[ov.Node]] = {}  # memory of a weight -> the weight, its scales and zero points
    grouped = set()
    for use in weight_uses(model):
        key = _memory(use.constants[0])
        cones.setdefault(key, use.constants)
        if len(use.constants[0].get_output_shape(0)) > len(use.port.get_partial_shape()):
            grouped.add(key)  # [..., groups, group] until a Reshape joins the groups
        roles.setdefault(key, set()).add(use.role)
    seen = {constant.get_friendly_name() for cone in cones.values() for constant in cone}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() not in seen and _type(node) in _FLOATS:
            roles.setdefault(_memory(node), {"norms+other"})
            cones.setdefault(_memory(node), [node])

    rows: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for key, (weight, *scales) in cones.items():
        role = joint_role(roles[key])
        group = (weight.get_output_shape(0)[-1] if key in grouped else -1) if scales else None
        row = rows.setdefault(
            (role, _type(weight), group),
            {"role": role, "precision": _type(weight), "group_size": group, "tensors": 0, "elements": 0, "bytes": 0},
        )
        row["tensors"] += 1
        row["elements"] += _elements(weight)
        row["bytes"] += sum((_elements(c) * _BITS[_type(c)] + 7) // 8 for c in (weight, *scales))
    return sorted(rows.values(), key=lambda row: (ROLES.index(row["role"]), -row["bytes"]))


@dataclass(frozen=True)
class WeightUse:
    """Where a model reads a weight matrix.

    Attributes:
        port: the input of a product or lookup that takes it.
        constants: what it is computed from, largest first: the weight, scales and zero points.
        role: `embedding`, `head`, `router` or `linear`.
    """

    port: ov.Input
    constants: list[ov.Node]
    role: str

    @property
    def node(self) -> ov.Node:
        return self.port.get_node()


def weight_uses(model: ov.Model) -> list[WeightUse]:
    """Every place of a model or submodel that reads a weight matrix, in the order of execution."""
    special = dict.fromkeys(routers(model), "router")
    if (head := _head(model)) is not None:
        special[head] = "head"
    found = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        for port in node.inputs()[_WEIGHT_PORTS[kind]] if kind in _WEIGHT_PORTS else []:
            constants = _constants(port.get_source_output().get_node())
            if not constants or not _is_matrix(constants[0]):
                continue
            table = kind == "Gather" and len(port.get_partial_shape()) == 2  # three axes: experts
            role = "embedding" if table else special.get(node.get_friendly_name(), "linear")
            found.append(WeightUse(port, constants, role))
    return found


def routers(model: ov.Model) -> set[str]:
    """Names of the products with weights whose result only chooses experts and weighs them.

    They are what leads to a TopK of a constant number through nothing but `_CHOOSING`. A TopK of all there is sorts.
    """
    found: set[str] = set()
    seen: set[str] = set()
    open_nodes = [
        node.input_value(0).get_node()
        for node in model.get_ops()
        if node.get_type_name() == "TopK" and node.input_value(1).get_node().get_type_name() == "Constant"
    ]
    while open_nodes:
        node = open_nodes.pop()
        name = str(node.get_friendly_name())
        if name in seen:
            continue
        seen.add(name)
        if node.get_type_name() == "MatMul":
            if any(_constants(port.get_source_output().get_node()) for port in node.inputs()):
                found.add(name)
        elif node.get_type_name() in _CHOOSING:
            open_nodes += [port.get_source_output().get_node() for port in node.inputs()]
    return found


def joint_role(roles: set[str]) -> str:
    """The role of a matrix that is used in some roles."""
    return "embedding+head" if roles == {"embedding", "head"} else min(roles, key=ROLES.index)


def _constants(node: ov.Node) -> list[ov.Node]:
    """The constants that a weight is computed from, largest first; empty where an activation is among its sources."""
    found: dict[str, ov.Node] = {}
    open_nodes = [node]
    while open_nodes:
        node = open_nodes.pop()
        if node.get_type_name() not in _PASSING:
            return []
        if node.get_type_name() == "Constant" and _type(node) in _BITS:
            found[node.get_friendly_name()] = node
        sources = [port.get_source_output().get_node() for port in node.inputs()]
        # The second input of a Reshape is a shape, not a part of the weight.
        open_nodes += sources if node.get_type_name() in {"Subtract", "Multiply"} else sources[:1]
    return sorted(found.values(), key=_elements, reverse=True)


def _head(model: ov.Model) -> str | None:
    """The last matrix product before the logits; None where there are none."""
    if "logits" not in model.outputs[0].get_names():
        return None
    open_nodes = [model.get_results()[0]]
    for node in open_nodes:
        if node.get_type_name() == "MatMul":
            return str(node.get_friendly_name())
        open_nodes += [port.get_source_output().get_node() for port in node.inputs()]
    return None


def _type(constant: ov.Node) -> str:
    return str(constant.get_output_element_type(0).get_type_name())


def _elements(constant: ov.Node) -> int:
    return int(np.prod(constant.get_output_shape(0)))


def _is_matrix(constant: ov.Node) -> bool:
    shape = constant.get_output_shape(0)
    return len(shape) >= 2 and (min(shape[-2:]) > 1 or _type(constant) not in _FLOATS)


def _memory(constant: ov.Node) -> int:
    """Where the values lie: tied weights may be two constants over the same memory."""
    return int(constant.data.ctypes.data)

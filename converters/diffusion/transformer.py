"""A diffusion transformer of diffusers: load it, export it, compare the two."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import torch
from edgert.converters.canonical import rename
from edgert.converters.diffusion.families import FAMILIES, Family, Sizes
from edgert.converters.quality import EXACT, LIMIT, compared
from edgert.converters.sources import read_json
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

from edgert.errors import ConversionError, MissingDependencyError
from edgert.irgraph import name_new

# Traced with the first, compared at both: no size of one is a size of the other, so none can stay in the graph.
SIZES = (Sizes(2, 2, 3, 4, 5, 6), Sizes(1, 3, 5, 2, 7, 9))
Arrays = dict[str, NDArray[Any]]


def load(folder: Path) -> Any:
    """The transformer of a diffusers folder, in f32, from safetensors, running no code but diffusers' own.

    Raises:
        ConversionError: a class that edgert does not know, or files that are missing or damaged.
        MissingDependencyError: diffusers is not installed.
    """
    name = str(read_json(folder / "config.json").get("_class_name"))
    if name not in FAMILIES:
        raise ConversionError(f"{folder}: {name} is no transformer that edgert exports; known: {', '.join(FAMILIES)}")
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} needs diffusers ({error}): pip install edgert[compile,diffusion]"
        ) from error
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError …, by what is wrong with the files
        raise ConversionError(f"{folder}: diffusers cannot load it: {_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # which diffusers would make up
        raise ConversionError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval()


def example(model: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Inputs of one size, the same each time."""
    torch.manual_seed(0)
    return _family(model).example(model, sizes)


def export(model: Any, exporter: Literal["general", "optimum"] = "general") -> ov.Model:
    """Export a transformer: its inputs and outputs as `FAMILIES` names them, f32 and i64, of free size.

    Raises:
        ConversionError: its code cannot be traced or translated, or optimum-intel does not export it.
    """
    exported = _through_optimum(model) if exporter == "optimum" else _traced(model)
    for port in exported.inputs:
        if not port.get_target_inputs():
            exported.remove_parameter(port.get_node())
    dims = _family(model).inputs(model)
    for port in exported.inputs:
        shape = [size if isinstance(size, int) else -1 for size in dims[port.get_any_name()]]
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(exported.outputs, _family(model).outputs, strict=True):
        rename(port, name)
    exported.validate_nodes_and_infer_types()
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(exported)
    _fold_doubles(exported)
    return exported


def check(exported: ov.Model, model: Any) -> dict[str, Any]:
    """Compare an export with its source on random latents of two sizes; a row of a report.

    Raises:
        ParityError: it computes something else.
    """
    import diffusers

    compiled, rows = ov.Core().compile_model(exported, "CPU", EXACT), []
    for sizes in SIZES:
        inputs = example(model, sizes)
        with torch.no_grad():
            expected = model(**inputs, **_family(model).options(model), return_dict=False)
        found = compiled({port: inputs[port.get_any_name()].numpy() for port in compiled.inputs})
        for number, tensor in enumerate(expected):
            against = f"diffusers {diffusers.__version__}"
            rows.append(compared("samples of two sizes", found[number], tensor.numpy(), against, LIMIT))
    return worst(rows)


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of one check that with the largest error."""
    return max(rows, key=lambda row: float(row["relative_error"]))


class _Call(torch.nn.Module):
    """The model with its options filled in, and its inputs in order: a trace has no names."""

    def __init__(self, model: Any, names: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.options = options

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.names, inputs, strict=True))
        outputs: tuple[torch.Tensor, ...] = self.model(**named, **self.options, return_dict=False)
        return outputs


def _traced(model: Any) -> ov.Model:
    family = _family(model)
    inputs = example(model, SIZES[0])
    call = _Call(model, list(inputs), family.options(model)).eval()
    try:
        with family.adapted(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that become constants: the check at another size would find them
            exported = ov.convert_model(call, example_input=tuple(inputs.values()))
    except Exception as error:  # whatever the model's code or a translator raises
        raise ConversionError(f"{type(model).__name__}: cannot be exported: {_line(error)}") from error
    if len(exported.inputs) != len(inputs):
        raise ConversionError(
            f"{type(model).__name__}: the export has {len(exported.inputs)} inputs, expected {len(inputs)}"
        )
    for port, name in zip(exported.inputs, inputs, strict=True):
        rename(port, name)
    return exported


def _through_optimum(model: Any) -> ov.Model:
    """Export with optimum-intel, which knows LTX-2 and no later one."""
    from optimum.exporters.openvino import export as optimum_export
    from optimum.exporters.tasks import TasksManager

    if type(model).__name__ != "LTX2VideoTransformer3DModel":
        raise ConversionError(f"{type(model).__name__}: edgert uses optimum-intel for LTX2VideoTransformer3DModel only")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(scratch) / "model.xml"
        try:
            made = TasksManager.get_exporter_config_constructor(
                model=model,
                exporter="openvino",
                library_name="diffusers",
                task="semantic-segmentation",  # what optimum-intel registers every part of a pipeline for
                model_type="ltx2-video-transformer",
            )(model.config, int_dtype="int64", float_dtype="fp32")
            # stateful: it would look for what only a transformers configuration has.
            optimum_export(model, made, path, library_name="diffusers", stateful=False)
        except Exception as error:  # RuntimeError, AttributeError …
            raise ConversionError(
                f"LTX2VideoTransformer3DModel: optimum-intel cannot export it: {_line(error)}"
            ) from error
        # Not memory-mapped: the files go away with the folder.
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})
        return core.read_model(path)


_IN_F64 = {"Power": np.power, "Multiply": np.multiply, "Divide": np.divide}


def _fold_doubles(model: ov.Model) -> None:
    """Make constants of what is computed from constants in f64: the frequencies of RoPE.

    OpenVINO folds no powers in f64, and devices compute them in f32, which turns the last patches by a visible angle.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or node.get_input_element_type(0) != ov.Type.f64:
            continue
        value = _in_f64(node.input_value(0).get_node())
        if value is not None and node.get_output_element_type(0) == ov.Type.f32:
            constant = ops.constant(value.astype(np.float32))
            name_new([constant], f"{node.get_friendly_name()}/f32")
            node.output(0).replace(constant.output(0))
    model.validate_nodes_and_infer_types()


def _in_f64(node: ov.Node) -> NDArray[Any] | None:
    """The value of a node that is computed from constants in f64; None of any other."""
    if node.get_type_name() == "Constant":
        return np.asarray(node.data, np.float64)
    if node.get_type_name() not in _IN_F64:
        return None
    left, right = (_in_f64(port.get_source_output().get_node()) for port in node.inputs())
    if left is None or right is None:
        return None
    value: NDArray[Any] = _IN_F64[node.get_type_name()](left, right)
    return value


def _family(model: Any) -> Family:
    return FAMILIES[type(model).__name__]


def _line(error: Exception) -> str:
    """The beginning of a message, in one line: tracers say what went wrong in the third."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

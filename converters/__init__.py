"""Source models become bundles: `edgert.compile`. Needs the packages of `edgert[compile]`.

    sources.py      what SRC is, and what lies beside the weights
    pretrained.py   a Hugging Face folder, through huggingface.py (the general route) or optimum-intel
    onnx_source.py  an ONNX file            gguf_source.py  a GGUF file
    canonical.py    the one form of every model in a bundle
    quality.py      the gate                compress.py     NNCF and the table of precisions
    onnx_bundle.py  a bundle that onnxruntime runs
    diffusion/      a diffusers folder: a bundle of its transformer
    media/          towers for images and sound, and what the decoder takes of them
    npu.py          submodels compiled for NPUs
    mixed/          the mix of precisions that keeps a budget of perplexity
    kernels.py      weights packed for the CPU kernels

build.py puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgert import native
from edgert.errors import MissingDependencyError, UsageError

if __name__ != "edgert.converters":
    raise ImportError(f"edgert's converters must be imported as edgert.converters, not as {__name__}")

if TYPE_CHECKING:
    from edgert.converters.mixed.mixing import MixedOptions

    from edgert.bundle import Bundle
    from edgert.profile import Profile
    from edgert.scheduler import Objective
    from edgert.shapes import StaticShapes

_WEIGHTS = ("fp16", "int8", "int4")
_EXPORTERS = ("general", "optimum")
_FORMATS = ("openvino", "onnx")
_PACKAGES = ("torch", "transformers", "nncf", "onnx", "onnxruntime", "onnxscript", "optimum", "gguf", "psutil")


def compile(
    src: str | Path,
    out: str | Path,
    *,
    weights: Literal["fp16", "int8", "int4"] = "int4",
    group_size: int | None = None,
    sym: bool | None = None,
    awq: bool = False,
    dataset: str | Path | None = None,
    exporter: Literal["general", "optimum"] = "general",
    format: Literal["openvino", "onnx"] = "openvino",
    name: str | None = None,
    force: bool = False,
    npu: Sequence[str] = (),
    npu_shapes: StaticShapes | None = None,
    npu_split: bool = False,
    kernels: bool | None = None,
    max_ppl_increase: float | None = None,
    calibration: str | Path | None = None,
    target: Profile | str | None = None,
    target_devices: Sequence[str] | None = None,
    objective: Objective | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    text_only: bool = False,
    progress: Callable[[str], None] | None = None,
    advance: Callable[[float], None] | None = None,
) -> Bundle:
    """Turn a model into a bundle.

    Args:
        src: a Hugging Face folder or hub id, the folder of a diffusers pipeline or of its transformer, an ONNX file or
            folder, an OpenVINO IR folder, or a GGUF file.
        out: the bundle to write.
        weights: precision of the weight matrices. Compressed IR and GGUF keep what they have.
        group_size: INT4 weights that share a scale; -1 is a whole channel. By default 128, and -1 for an NPU.
        sym: symmetric INT4, without zero points. By default for an NPU only.
        awq: activation-aware scaling, with activations from `dataset` where one is given.
        dataset: a UTF-8 text file, at least 128 tokens long; INT4 scales are fitted to it (scale estimation).
        exporter: how a Hugging Face model is exported.
        format: `onnx` makes a bundle that onnxruntime runs whole; from a Hugging Face folder or hub id only.
        name: the model's name for people; by default that of `src`.
        force: replace an existing bundle.
        npu: NPU platforms to compile for ahead of time, e.g. `["4000"]`; INT4 weights are then symmetric, in whole
            channels or groups of 128.
        npu_shapes: chunks and buckets to compile for; each shape costs a copy of the weights. By default a chunk of
            256 tokens, and caches of 1024 and 4096.
        npu_split: compile each block by itself, so that any of them can be placed on an NPU alone.
        kernels: add the weights packed for edgert's CPU kernels, another copy. By default where the kernels load here.
        max_ppl_increase: instead of `weights`: for each matrix a precision is searched, INT4 to f16, so that the model
            is as small, or on `target` as good, as it can be while its perplexity is, with 95 % confidence, at most so
            much above that of the f16 model; 0.01 is one percent. What a search measures is kept beside `out` until
            it is done, so that one that was interrupted goes on. docs/quality.md says how it works.
        calibration: UTF-8 text, or a folder of it, that this is measured on, at least 4096 tokens; more make the bound
            narrower. By default the model writes one itself.
        target: profile of the machine that the model is for, or its name: then time or energy there counts, and a plan
            is chosen along with the precisions.
        target_devices: configurations of the profile that may run blocks, e.g. `["NPU@f16"]`; all by default.
        objective: what counts on the target; by default `tokens_per_joule`.
        seed: of what the search draws: the same one gives the same bundle.
        image_size: height and width in pixels that a vision tower is made for; every picture is brought to it. By
            default the model's own size, and where any will do the largest square of at most 256 tokens.
        text_only: leave out the towers of a model that sees or hears.
        progress: is told each stage as it begins.
        advance: is told which share of a long stage is done, 0 to 1.

    Raises:
        QualityError: `max_ppl_increase` cannot be kept, and `force` is not set; no bundle is written.
        UsageError: an argument is wrong, or `out` exists.
        ConversionError: the model cannot be converted; `ParityError`: it could, but computes something else.
        MissingDependencyError: a package of `edgert[compile]` is missing or does not load.
        BundleError: the bundle cannot be written.
    """
    _check_choice("weights", weights, _WEIGHTS)
    _check_choice("exporter", exporter, _EXPORTERS)
    _check_choice("format", format, _FORMATS)
    if max_ppl_increase is None:
        given = {"calibration": calibration, "target": target, "target_devices": target_devices, "objective": objective}
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} is {str(value)[:80]!r}, and needs max_ppl_increase")
    elif weights != "int4" or group_size is not None or sym or awq or dataset is not None or format != "openvino":
        raise UsageError(
            "max_ppl_increase chooses precisions: it excludes weights, group_size, sym, awq, dataset, onnx"
        )
    npu_int4 = bool(npu) and weights == "int4" and max_ppl_increase is None
    if weights != "int4" and (sym or awq or dataset is not None or group_size is not None):
        raise UsageError(f"group_size, sym, awq and dataset are for weights='int4', not for {weights!r}")
    group_size = (-1 if npu_int4 else 128) if group_size is None else group_size
    sym = npu_int4 if sym is None else sym
    if isinstance(group_size, bool) or not isinstance(group_size, int) or not (group_size == -1 or group_size > 1):
        raise UsageError(f"group_size is {group_size!r}, expected -1 (a whole channel) or a number from 2")
    if npu_int4 and (not sym or group_size not in (-1, 128)):
        raise UsageError(f"npu needs INT4 with sym and group_size -1 or 128, not sym={sym} and group_size={group_size}")
    if npu and format != "openvino":
        raise UsageError(f"npu needs format 'openvino', not {format!r}")
    if not npu and (npu_shapes is not None or npu_split):
        raise UsageError("npu_shapes and npu_split need npu, the platforms to compile for")
    if kernels and format != "openvino":
        raise UsageError(f"kernels need format 'openvino', not {format!r}")
    if npu and max_ppl_increase is not None and target is None:
        raise UsageError("npu with max_ppl_increase needs target, whose plan says which blocks run on the NPU")
    if image_size is not None:
        _check_image_size(image_size, text_only, format)
    if dataset is not None and not Path(dataset).is_file():
        raise UsageError(f"dataset {dataset}: no such file")
    if kernels is None:
        kernels = format == "openvino" and native.status().loads
    try:
        from edgert.converters.build import Options, build
        from edgert.converters.npu import DEFAULT_SHAPES, NpuOptions

        mixed = None
        if max_ppl_increase is not None:
            mixed = _mixed(max_ppl_increase, calibration, target, target_devices, objective, seed)
        return build(
            src,
            Path(out),
            Options(
                weights,
                group_size,
                sym,
                awq,
                Path(dataset) if dataset else None,
                exporter,
                format,
                name,
                force,
                NpuOptions(tuple(dict.fromkeys(npu)), npu_shapes or DEFAULT_SHAPES, npu_split) if npu else None,
                kernels,
                mixed,
                image_size,
                text_only,
            ),
            progress or (lambda stage: None),
            advance or (lambda share: None),
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingDependencyError(f"compile needs {package}: pip install edgert[compile]") from error


def _mixed(
    max_increase: float,
    calibration: str | Path | None,
    target: Profile | str | None,
    devices: Sequence[str] | None,
    objective: Objective | None,
    seed: int,
) -> MixedOptions:
    from edgert.converters.mixed.mixing import MixedOptions
    from edgert.converters.mixed.search import Target

    from edgert.device import DeviceConfig
    from edgert.profile import find
    from edgert.scheduler import OBJECTIVES

    if not 0 < max_increase < 1:
        raise UsageError(f"max_ppl_increase is {max_increase}, expected a number above 0 and below 1 (100 %)")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed is {seed!r}, expected a whole number, 0 or more")
    if calibration is not None and not Path(calibration).exists():
        raise UsageError(f"calibration {calibration}: no such file or folder")
    if target is None:
        if devices is not None or objective is not None:
            raise UsageError("target_devices and objective need target, the profile of a machine")
        return MixedOptions(max_increase, Path(calibration) if calibration else None, None, seed)
    profile = find(target) if isinstance(target, str) else target
    configs = None if devices is None else tuple(DeviceConfig.parse(name) for name in devices)
    if configs == ():
        raise UsageError("target_devices is empty: nothing could run there")
    for config in configs or ():
        if config not in profile.configs:
            known = ", ".join(map(str, profile.configs))
            raise UsageError(f"target_devices: profile {profile.machine} has no {config}; it has {known}")
    wanted = objective or "tokens_per_joule"
    _check_choice("objective", wanted, OBJECTIVES)
    found = Target(profile, wanted, configs=configs)
    return MixedOptions(max_increase, Path(calibration) if calibration else None, found, seed)


def _check_image_size(size: tuple[int, int], text_only: bool, format: str) -> None:
    pair = (
        isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in size)
    )
    if not pair or not all(1 <= side <= 4096 for side in size):
        raise UsageError(f"image_size is {size!r}, expected (height, width), each 1 to 4096 pixels")
    if text_only or format != "openvino":
        raise UsageError("image_size is for models that see: it excludes text_only and format 'onnx'")


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{argument} is {value!r}, expected one of {', '.join(choices)}")

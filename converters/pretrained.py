"""From a Hugging Face folder to a checked `ov.Model`: load, export by the route that was asked for, compare."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openvino as ov
import psutil
import torch
import transformers
from edgert.converters import quality
from edgert.converters.canonical import canonical_decoder, canonical_encoder
from edgert.converters.huggingface import export_decoder, export_encoder
from edgert.converters.media.compiling import Media, convert_media, perceives
from edgert.converters.sources import Task, load_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from edgert.errors import ConversionError, UsageError

Exporter = Literal["general", "optimum"]
Rows = list[dict[str, Any]]
_DECODER_CLASSES = ("ForCausalLM", "LMHeadModel")
# f32 copies of the weights that are alive at the peak of export and check: transformers', the CPU plugin's, and room.
_COPIES = 3
_TEXT = "In 1928 a mould fell on a dish, and it was seen that no bacteria grew around it: that is how penicillin came."


@dataclass(frozen=True)
class Wanted:
    """What of a model that sees or hears is wanted beside its language model.

    Attributes:
        tokenizer: its own.
        image_size: height and width of the pictures that its tower takes; None for the default.
    """

    tokenizer: Tokenizer
    image_size: tuple[int, int] | None = None


def convert(folder: Path, exporter: Exporter, progress: Callable[[str], None]) -> tuple[ov.Model, Task, Rows]:
    """Export the model in `folder` to the canonical form and compare it with its source: what it does with text.

    A model whose copies do not fit in the free memory is compared on its first layers, by the same route.

    Returns:
        the model in f32, its task, and the report's check rows.

    Raises:
        ConversionError: it cannot be loaded or exported.
        ParityError: the export computes something else.
    """
    return convert_whole(folder, exporter, progress, None)[:3]


def convert_whole(
    folder: Path, exporter: Exporter, progress: Callable[[str], None], wanted: Wanted | None
) -> tuple[ov.Model, Task, Rows, Media | None]:
    """As `convert`, and with `wanted` also the towers of a model that sees or hears.

    Raises:
        UsageError: it does not take pictures of the size that is wanted, or takes none.
    """
    config, task = load_config(folder)
    if wanted is not None and not perceives(config):
        if wanted.image_size is not None:
            raise UsageError(f"image_size is {wanted.image_size}, but {folder} is a model of text only")
        wanted = None
    if wanted is not None and exporter == "optimum":
        raise UsageError(f"exporter 'optimum' exports text only: {folder} needs text_only with it")
    rows: Rows = []
    if _too_large(folder):
        layers = _few_layers(config)
        progress(f"check on a copy cut to {layers} of {config.get_text_config().num_hidden_layers} layers")
        with tempfile.TemporaryDirectory() as cut:
            source = load(folder, task, layers)
            if exporter == "optimum":
                source.save_pretrained(cut)
            rows = _exported(source, Path(cut), task, exporter, wanted, progress)[1]
        for row in rows:
            row["check"] += f", on a copy cut to its first {layers} layers"
        del source
        gc.collect()
        progress("load")
    source = load(folder, task)
    model, found, media = _exported(source, folder, task, exporter, wanted, progress, check=not rows)
    return model, task, rows or found, media


def _exported(
    source: PreTrainedModel,
    folder: Path,
    task: Task,
    exporter: Exporter,
    wanted: Wanted | None,
    progress: Callable[[str], None],
    *,
    check: bool = True,
) -> tuple[ov.Model, Rows, Media | None]:
    if wanted is not None:
        return convert_media(
            source,
            folder,
            wanted.tokenizer,
            wanted.image_size,
            progress,
            lambda model: _check(model, source, task, folder),
            check,
        )
    progress("export")
    model = _export(source, folder, task, exporter)
    if not check:
        return model, [], None
    progress("check")
    return model, _check(model, source, task, folder), None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices and bars, and warnings of its and torch's own making, from the user's screen."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def load_config(folder: Path) -> tuple[PretrainedConfig, Task]:
    """The model's configuration and what it is for.

    Raises:
        ConversionError: no configuration that transformers knows, or neither a decoder nor an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError …, by what is wrong with the file
        raise ConversionError(f"{folder}: config.json is missing or not for transformers: {_line(error)}") from error
    name = (config.architectures or ["unknown architecture"])[0]
    if config.is_encoder_decoder:
        raise ConversionError(f"{folder}: {name} is an encoder-decoder, which edgert does not run")
    if name.endswith(_DECODER_CLASSES) or _auto(config) is not None:
        return config, "decoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return config, "encoder"
    raise ConversionError(
        f"{folder}: {name} is neither a causal language model (*ForCausalLM, *LMHeadModel), nor one that sees or "
        "hears, nor a text encoder"
    )


def _auto(config: PretrainedConfig) -> Any:
    """What loads a model that sees or hears; None for others."""
    if not perceives(config):
        return None
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM if config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES else None


def load(folder: Path, task: Task, layers: int | None = None) -> PreTrainedModel:
    """Load from safetensors only, in f32, running no code but transformers' own; with `layers`, only the first ones.

    bf16 weights become f32 and not f16, whose range they may exceed.

    Raises:
        ConversionError: files are missing, damaged, or do not fit the configuration.
    """
    config, _ = load_config(folder)
    if layers is not None:
        text = config.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == text.num_hidden_layers:  # layer_types and its like
                setattr(text, key, value[:layers])
        text.num_hidden_layers = layers
    auto = AutoModel if task == "encoder" else _auto(config) or AutoModelForCausalLM
    if auto is AutoModelForCausalLM and type(config) not in AutoModelForCausalLM._model_mapping:
        # Mistral 4: transformers 5.5 has the class and does not list it.
        auto = getattr(transformers, (config.architectures or [""])[0], auto)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError, KeyError …
        raise ConversionError(f"{folder}: transformers cannot load it: {_line(error)}") from error
    if info["missing_keys"] and task == "decoder":  # an encoder may lack a pooler, which is not used
        missing = sorted(info["missing_keys"])
        raise ConversionError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval()


def _export(source: PreTrainedModel, folder: Path, task: Task, exporter: Exporter) -> ov.Model:
    if exporter == "general":
        return export_decoder(source) if task == "decoder" else export_encoder(source)
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with tempfile.TemporaryDirectory() as scratch:
        try:
            main_export(
                str(folder),
                scratch,
                task="text-generation-with-past" if task == "decoder" else "feature-extraction",
                library_name="transformers",
                ov_config=OVConfig(dtype="fp32"),  # without it, models beyond 1e9 weights come out in INT8
                model_loading_kwargs={"dtype": torch.float32, "use_safetensors": True},
                convert_tokenizer=False,
                local_files_only=True,
            )
        except Exception as error:  # ValueError, ImportError, RuntimeError …
            raise ConversionError(f"{folder}: optimum-intel cannot export it: {_line(error)}") from error
        # Not memory-mapped: the files go away with the folder.
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})
        model = core.read_model(Path(scratch) / "openvino_model.xml")
    return canonical_decoder(model) if task == "decoder" else canonical_encoder(model)


def _check(model: ov.Model, source: PreTrainedModel, task: Task, folder: Path) -> Rows:
    vocab_size, against = source.config.get_text_config().vocab_size, quality.transformers_name()
    if task == "encoder":
        pair = quality.openvino_encoder(model), quality.torch_encoder(source)
        return [quality.check_encoder(*pair, vocab_size=vocab_size, against=against)]
    window = quality.attention_window(source.config.to_dict())
    return [
        quality.check_decoder(
            quality.openvino_decoder(model),
            quality.torch_decoder(source),
            vocab_size=vocab_size,
            window=window,
            against=against,
            text=text,
        )
        for text in (None, *_tokens_of_text(folder, vocab_size))
    ]


def _tokens_of_text(folder: Path, vocab_size: int) -> list[list[int]]:
    """A text's tokens, once, where there is a tokenizer to make some with."""
    if not (folder / "tokenizer.json").is_file():
        return []
    tokens = [t for t in load_tokenizer(folder).encode(_TEXT, add_special_tokens=False).ids if t < vocab_size]
    return [tokens] if tokens else []


def _too_large(folder: Path) -> bool:
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    as_f32 = stored * 4 / _bytes_per_weight(folder)
    return _COPIES * as_f32 > psutil.virtual_memory().available


def _bytes_per_weight(folder: Path) -> int:
    """From the header of the first file: a JSON object of the length in its first 8 bytes (safetensors format)."""
    file = sorted(folder.glob("*.safetensors"))[0]
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 100_000_000)))
        kinds = [sizes.get(entry["dtype"], 1) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file}: is no safetensors file: {_line(error)}") from error
    return max(kinds, default=4)


def _few_layers(config: PretrainedConfig) -> int:
    """The fewest first layers, two at least, with every kind of layer among them."""
    text = config.get_text_config()
    kinds: list[str] = getattr(text, "layer_types", None) or []
    seen = [kinds.index(kind) + 1 for kind in set(kinds)]
    dense_first = int(getattr(text, "first_k_dense_replace", 0) or 0) + 1
    return int(min(max(2, dense_first, *seen), text.num_hidden_layers))


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]

"""What SRC is, and what lies beside the weights: configuration, tokenizer, facts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from edgert.bundle import ModelFacts
from edgert.errors import ConversionError

Kind = Literal["huggingface", "diffusers", "openvino", "onnx", "gguf"]
Task = Literal["decoder", "encoder"]
IR_NAMES = ("openvino_model.xml", "model.xml")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What transformers can make a tokenizer.json from. Without any of these it makes up an empty tokenizer.
_OTHER_TOKENIZERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # no pickles, no code


@dataclass(frozen=True)
class Source:
    """A model that can become a bundle.

    Attributes:
        kind: what reads it.
        path: the folder of a Hugging Face model, else the model file.
        folder: where config.json and the tokenizer lie.
        name: a name for people.
    """

    kind: Kind
    path: Path
    folder: Path
    name: str

    def config(self) -> dict[str, Any]:
        """config.json; raises `ConversionError` where there is none."""
        return read_json(self.folder / "config.json")


def detect(src: str | Path) -> Source:
    """Find out what `src` is; a hub id is fetched first.

    Raises:
        ConversionError: it is nothing that edgert reads; the message says what was looked for.
    """
    path = Path(src)
    if path.is_file():
        kinds: dict[str, Kind] = {".gguf": "gguf", ".onnx": "onnx", ".xml": "openvino"}
        if path.suffix not in kinds:
            raise ConversionError(f"source {path}: a file must end in .gguf, .onnx or .xml")
        named = path.parent.resolve().name if path.stem in {"model", "openvino_model"} else path.stem
        return Source(kinds[path.suffix], path, path.parent, named)
    if path.is_dir():
        return _detect_folder(path)
    if _HUB_ID.fullmatch(str(src)):
        return _detect_folder(_fetch(str(src)), str(src).rpartition("/")[2])
    raise ConversionError(f"source {path}: no such file or folder, and no hub id (ORGANISATION/NAME)")


def _detect_folder(folder: Path, name: str | None = None) -> Source:
    name = name or folder.resolve().name
    if (transformer := _diffusers_transformer(folder)) is not None:
        return Source("diffusers", transformer, transformer, name)
    if any(folder.glob("*.safetensors")):
        return Source("huggingface", folder, folder, name)
    for ir in IR_NAMES:
        if (folder / ir).is_file():
            return Source("openvino", folder / ir, folder, name)
    for kind, pattern in (("onnx", "*.onnx"), ("gguf", "*.gguf")):
        files = sorted(folder.glob(pattern))
        files = [f for f in files if f.name == "model.onnx"] or files
        if len(files) > 1:
            raise ConversionError(f"source {folder}: has {len(files)} {pattern} files; name one of them")
        if files:
            return Source("onnx" if kind == "onnx" else "gguf", files[0], folder, name)
    pickled = "; weights in *.bin are pickles, which edgert does not load" * any(folder.glob("pytorch_model*.bin"))
    raise ConversionError(
        f"source {folder}: found no *.safetensors, {' or '.join(IR_NAMES)}, *.onnx or *.gguf{pickled}"
    )


def _diffusers_transformer(folder: Path) -> Path | None:
    """Where the transformer of a diffusers folder lies, a pipeline's or its own; None where it is none."""
    if (folder / "model_index.json").is_file():
        if not (folder / "transformer").is_dir():
            raise ConversionError(f"source {folder}: a pipeline without transformer/, the part that edgert runs")
        return folder / "transformer"
    try:
        return folder if "_diffusers_version" in read_json(folder / "config.json") else None
    except ConversionError:  # whoever needs the file says what is wrong with it
        return None


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except Exception as error:  # network, access, validation: as many classes as causes
        raise ConversionError(
            f"source {repository}: no such folder here, and the hub did not give it: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `ConversionError` naming the file."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing, and needed to convert the model") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConversionError(f"{path}: is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: holds a {type(data).__name__}, expected an object")
    return data


def copy_tokenizer(folder: Path, target: Path) -> Tokenizer:
    """Put a tokenizer's own files into `target`; one without tokenizer.json is converted by transformers.

    Raises:
        ConversionError: there is no tokenizer, or it cannot be read.
    """
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if not (target / "tokenizer.json").is_file():
        if not any((folder / name).is_file() for name in _OTHER_TOKENIZERS):
            raise ConversionError(f"{folder}: has no tokenizer: no tokenizer.json, {', '.join(_OTHER_TOKENIZERS)}")
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(target)
        except Exception as error:  # what is wrong with a tokenizer has no class of its own
            raise ConversionError(f"{folder}: no tokenizer.json, and no other tokenizer that can be read") from error
        for file in target.iterdir():
            if file.name not in TOKENIZER_FILES:
                file.unlink()
    return load_tokenizer(target)


def load_tokenizer(folder: Path) -> Tokenizer:
    """`folder`/tokenizer.json; raises `ConversionError` where it is missing or damaged."""
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConversionError(f"{folder / 'tokenizer.json'}: is missing or damaged: {error}") from error


def special_ids(source: Source, tokenizer: Tokenizer, tokenizer_folder: Path) -> tuple[tuple[int, ...], int | None]:
    """End-of-sequence ids and the beginning-of-sequence id.

    From generation_config.json, else config.json, else the tokens that tokenizer_config.json names.
    """
    config = source.config()
    text = config.get("text_config") or {}
    generation_file = source.folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokens_file = tokenizer_folder / "tokenizer_config.json"
    tokens = read_json(tokens_file) if tokens_file.is_file() else {}

    def find(role: str) -> tuple[int, ...]:
        for place in (generation, config, text):
            value = place.get(f"{role}_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
        token = tokens.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        return () if number is None else (number,)

    bos = find("bos")
    return find("eos"), bos[0] if bos else None


def facts(
    config: dict[str, Any],
    *,
    name: str,
    task: Task,
    format: Literal["openvino", "onnx"],
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    bos_token_id: int | None,
    weights: str,
    parameters: int,
    pooling: Literal["mean", "cls"] | None = None,
    max_tokens: int | None = None,
) -> ModelFacts:
    """Facts from a transformers configuration; `max_tokens` limits the context further.

    Raises:
        ConversionError: the configuration lacks a number that the runtime needs.
    """
    config = {**config, **(config.get("text_config") or {})}

    def number(*names: str) -> int:
        for key in names:
            if isinstance(config.get(key), int) and config[key] > 0:
                return int(config[key])
        raise ConversionError(f"model {name}: its configuration has none of {', '.join(names)} as a positive number")

    kinds = config.get("layers_block_type", config.get("hybrid_override_pattern"))
    if isinstance(kinds, (list, str)):  # transformers writes Nemotron-H's layers so, and not their number
        config = {"num_hidden_layers": len(kinds), **config}
    context = number("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
    return ModelFacts(
        name=name,
        task=task,
        format=format,
        architecture=str(config.get("model_type", "unknown")),
        vocab_size=vocab_size,
        hidden_size=number("hidden_size", "n_embd", "d_model"),
        context_length=min(context, max_tokens or context),
        num_layers=number("num_hidden_layers", "n_layer", "num_layers"),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        weights=weights,
        parameters=parameters,
        pooling=pooling,
    )


def encoder_facts(folder: Path, tokenizer_folder: Path) -> tuple[Literal["mean", "cls"], int | None]:
    """Pooling (`mean` or `cls`) and the longest input of an encoder, where sentence-transformers' files say so."""
    pooling_file = folder / "1_Pooling" / "config.json"
    pooling = read_json(pooling_file) if pooling_file.is_file() else {}
    tokens_file = tokenizer_folder / "tokenizer_config.json"
    longest = read_json(tokens_file).get("model_max_length") if tokens_file.is_file() else None
    # Tokenizers without a limit write int(1e30).
    limited = isinstance(longest, int) and 0 < longest < 2**31
    return ("cls" if pooling.get("pooling_mode_cls_token") else "mean"), longest if limited else None

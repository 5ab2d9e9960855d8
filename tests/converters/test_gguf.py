"""GGUF in: logits of the source, its tokenizer, and files that are not what they say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import openvino as ov
import pytest
import tiny_gguf
from edgert.converters import compile as compile_model
from edgert.converters import gguf_source, quality
from edgert.converters.gguf_tokenizer import write_tokenizer
from tiny_models import VOCAB_SIZE, tiny
from tokenizers import Tokenizer

from edgert.errors import ConversionError

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("family", "matrices", "limit"),
    [("qwen3", "F32", 1e-4), ("llama", "F32", 1e-4), ("qwen3", "Q8_0", 5e-2)],
)
def test_logits(family: str, matrices: str, limit: float, decoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{family}.gguf"
    source = tiny(family)
    tiny_gguf.write(source, path, decoder_folder, template=TEMPLATE, matrices=gguf.GGMLQuantizationType[matrices])
    bundle = compile_model(path, tmp_path / "out.edge")
    facts = bundle.facts
    assert (facts.name, facts.architecture, facts.task, facts.weights) == (family, family, "decoder", "source")
    assert (facts.vocab_size, facts.hidden_size, facts.context_length, facts.num_layers) == (256, 64, 256, 2)
    assert (facts.eos_token_ids, facts.bos_token_id) == ((2,), 1)
    assert bundle.graph is not None
    assert len(bundle.graph.blocks) == 6
    linear = {row["precision"] for row in bundle.report.precisions if row["role"] == "linear"}
    assert linear == ({"f32"} if matrices == "F32" else {"i8"})
    model = ov.Core().read_model(bundle.model_path)
    row = quality.check_decoder(
        quality.openvino_decoder(model), quality.torch_decoder(source),
        vocab_size=VOCAB_SIZE, window=None, against="transformers", limit=limit,
    )  # fmt: skip
    assert row["relative_error"] > 0
    compiled = ov.Core().compile_model(model, "CPU", quality.EXACT)
    kinds = [n.get_rt_info()["layerType"].astype(str) for n in compiled.get_runtime_model().get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2

    written = Tokenizer.from_file(str(bundle.tokenizer_path / "tokenizer.json"))
    original = Tokenizer.from_file(str(decoder_folder / "tokenizer.json"))
    text = "<|user|>The quick brown fox weights.</s>"
    assert written.encode(text).ids == original.encode(text).ids
    assert written.decode(written.encode(text).ids) == "The quick brown fox weights."
    assert TEMPLATE in (bundle.tokenizer_path / "tokenizer_config.json").read_text("utf-8")


@pytest.fixture
def file(decoder_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny("qwen3"), path, decoder_folder)
    return path


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 100, 1000, 20_000, -1])
def test_truncated(kept: int, file: Path, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConversionError, match="is no whole GGUF file"):
        compile_model(file, tmp_path / "out.edge")
    assert not (tmp_path / "out.edge").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"not a GGUF file at all" * 50,
        struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60) + b"\0" * 1000,
        struct.pack("<4sIQQ", b"GGUF", 99, 0, 0),
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63) + b"x" * 100,
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 0),
    ],
)
def test_garbage(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"model\.gguf"):
        compile_model(path, tmp_path / "out.edge")


def test_unsupported_architecture(decoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny("qwen3"), path, decoder_folder, architecture="mamba")
    with pytest.raises(ConversionError, match="does not take architecture 'mamba'"):
        gguf_source.convert(gguf_source.read_metadata(path), lambda stage: None)


def test_unknown_pre_tokenizer(decoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny("qwen3"), path, decoder_folder, pre="martian")
    with pytest.raises(ConversionError, match="pre-tokenizer 'martian' is not among"):
        compile_model(path, tmp_path / "out.edge")


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    scores = [0.0] * 259 + [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    fields = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "bos_token_id": 1,
              "eos_token_id": 2, "unknown_token_id": 0, **changes}  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(sentencepiece_fields(), tmp_path / "tokenizer")
    tokens = tokenizer.encode("ab ba é").tokens
    assert tokens == ["<s>", "▁ab", "▁", "b", "a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab ba é").ids) == "ab ba é"
    bare = write_tokenizer(sentencepiece_fields(add_bos_token=False, add_space_prefix=False), tmp_path / "bare")
    assert bare.encode("ab").tokens == ["ab"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "is 't5', expected gpt2 or llama"),
        ({"tokens": []}, "expected gpt2 or llama, with tokens"),
        ({"scores": [1.0]}, "1 scores for"),
        ({"bos_token_id": 10_000}, "bos_token_id is 10000"),
        ({"token_type": [1]}, "GGUF tokenizer"),
    ],
)
def test_bad_tokenizers(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        write_tokenizer(sentencepiece_fields(**changes), tmp_path / "tokenizer")

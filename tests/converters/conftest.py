"""One tiny Hugging Face folder of each task for the converters' tests, with a tokenizer trained on a few words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import openvino as ov
import pytest
from edgert.converters import pretrained
from tiny_models import exported, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

TEXT = "The quick brown fox jumps over the lazy dog. A bundle holds a model, and a model holds its weights. " * 40
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_model(folder: Path, family: str) -> Path:
    folder.mkdir(parents=True)
    tiny(family).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny-bert", "bert")


@pytest.fixture
def known_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it: the export of the tiny models is taken from memory, where it was made once."""

    def known(model: PreTrainedModel) -> ov.Model:
        family = model.config.model_type
        assert model.config.num_hidden_layers == 2
        return exported(family)[1]

    monkeypatch.setattr(pretrained, "export_decoder", known)
    monkeypatch.setattr(pretrained, "export_encoder", known)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some hundred tokens of text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, to damage the copy."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))

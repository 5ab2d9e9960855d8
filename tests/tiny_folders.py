"""Hugging Face folders of the tiny models, with a tokenizer trained on a few words."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "The quick brown fox jumps over the lazy dog. A bundle holds a model, and a model holds its weights. " * 40
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Into a folder that is there."""
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
    """`tiny(family)` as a folder that `edgert compile` takes."""
    folder.mkdir(parents=True)
    tiny(family).save_pretrained(folder)
    write_tokenizer(folder)
    return folder

"""A Hugging Face folder as something that predicts tokens: transformers' own code in f32, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from edgert.converters import pretrained, quality

from edgert.errors import ConversionError
from edgert.evaluation import Logits, Scorer


class TorchScorer(Scorer):
    """See `edgert.evaluation.Scorer`.

    Raises:
        ConversionError: transformers cannot load it, or it is no decoder.
    """

    def __init__(self, folder: Path) -> None:
        with pretrained.quiet():
            config, task = pretrained.load_config(folder)
            if task != "decoder":
                raise ConversionError(f"{folder}: is an {task}, which predicts no tokens")
            self._model = pretrained.load(folder, task)
        text = config.get_text_config()
        self.name = f"{folder.resolve().name} in transformers"
        self.vocab_size = int(text.vocab_size)
        self.context = getattr(text, "max_position_embeddings", None)

    def logits(self, tokens: Sequence[int]) -> Logits:
        return quality.torch_decoder(self._model)(np.array([tokens], np.int64))[0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        step = quality.torch_decoder(self._model)
        ids = list(prompt)
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(step(np.array([ids], np.int64))[0, -1].argmax()))
            ids = tokens[-1:]
        return tokens

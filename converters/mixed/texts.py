"""What a model reads while its precisions are chosen: a text of the user's, or one that the model writes itself.

Windows that scales are fitted to, those that a choice is searched with, and those that the outcome is measured on are
different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from edgert.converters.quality import EXACT, decoder_inputs

from edgert.errors import UsageError
from edgert.evaluation import read_documents
from edgert.likelihood import Window, windows
from edgert.text import Tokenizer

WINDOW = 512
LEAST_TOKENS = 4096  # a standard error of perplexity below half a percent, on average
CALIBRATION_TOKENS = 8192
SEARCH_TOKENS = 8192
VERIFY_TOKENS = 12288
_WRITTEN = 32  # windows that a model writes, in two batches


@dataclass(frozen=True)
class Texts:
    """Windows of one text, each in one of three sets.

    Attributes:
        name: for people.
        sha256: of its tokens, as little-endian 32-bit numbers.
        generated: whether the model wrote it.
        bos: token that each window begins with; None for none.
        window: tokens of a window at most.
        calibration, search, verify: see above.
    """

    name: str
    sha256: str
    generated: bool
    bos: int | None
    window: int
    calibration: tuple[Window, ...]
    search: tuple[Window, ...]
    verify: tuple[Window, ...]


def read_texts(path: Path, tokenizer: Tokenizer, vocab_size: int, context: int, seed: int) -> Texts:
    """Windows of a file or of a folder of `*.txt`.

    Raises:
        UsageError: as `edgert.evaluation.read_documents`, or the text is shorter than `LEAST_TOKENS`.
    """
    tokens = []
    for document in read_documents(path):
        ids, _ = tokenizer.encode_with_ends(document.text)
        tokens.append([one for one in ids if one < vocab_size])
    bos, window = tokenizer.prefix(), min(WINDOW, context)
    cut = [part for part in windows(tokens, window=window, stride=window - 1, bos=bos) if len(part.tokens) > 1]
    count = sum(len(part.targets) for part in cut)
    if count < LEAST_TOKENS:
        raise UsageError(f"calibration {path}: has {count} tokens to predict, at least {LEAST_TOKENS} needed")
    return _split(path.name, cut, bos, window, seed, generated=False)


def write_texts(
    model: ov.Model, bos: int | None, vocab_size: int, context: int, seed: int, report: Callable[[float], None]
) -> Texts:
    """Windows that a model writes, drawing every token from its own distribution (temperature 1).

    On such a text the expected rise of the loss is the Kullback-Leibler divergence from the model. That a model can
    calibrate itself so is shown in LLM-QAT (https://arxiv.org/abs/2305.17888).

    Args:
        report: is told the share that is done.
    """
    draw = np.random.default_rng(seed)
    request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    window, found = min(WINDOW, context), []
    batch = _WRITTEN // 2
    for number in range(2):
        request.reset_state()
        first = np.full(batch, bos) if bos is not None else draw.integers(0, vocab_size, batch)
        written = [first.astype(np.int64)]
        for past in range(window - 1):
            inputs = {
                name: np.repeat(value, batch, 0) for name, value in decoder_inputs(written[-1][:1, None], past).items()
            }
            inputs["input_ids"] = written[-1][:, None]
            logits = request.infer({**inputs, "beam_idx": np.arange(batch, dtype=np.int32)})["logits"][:, -1]
            # Gumbel's way to draw from the softmax of each row.
            written.append((logits + draw.gumbel(size=logits.shape)).argmax(axis=-1))
            report((number * window + past) / (2 * window))
        found += [Window(tuple(row), 1) for row in np.stack(written, 1).tolist()]
    return _split("written by the model", found, bos, window, seed, generated=True)


def _split(name: str, cut: Sequence[Window], bos: int | None, window: int, seed: int, *, generated: bool) -> Texts:
    """Shuffle the windows and deal them out: to each set its limit of tokens, or its share where there are fewer."""
    flat = np.array([token for part in cut for token in part.tokens], "<i4")
    order = [cut[i] for i in np.random.default_rng(seed).permutation(len(cut))]
    limits = (CALIBRATION_TOKENS, SEARCH_TOKENS, VERIFY_TOKENS)
    share = min(1.0, len(flat) / sum(limits))
    sets: list[tuple[Window, ...]] = []
    for number, limit in enumerate(limits):
        chosen, taken = 0, 0
        while chosen < len(order) - (len(limits) - 1 - number) and (not chosen or taken < share * limit):
            taken += len(order[chosen].tokens)
            chosen += 1
        sets.append(tuple(order[:chosen]))
        order = order[chosen:]
    return Texts(name, hashlib.sha256(flat.tobytes()).hexdigest(), generated, bos, window, *sets)

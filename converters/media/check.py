"""The gate for what is not text: a tower, and the whole model with a picture or a sound in its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from edgert.converters.quality import COMPARED, EXACT, STEPS, Floats, Row, compared, transformers_name
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from edgert.features import Medium, Places, Taken, media_of

_AROUND = 6  # tokens of text before and behind
Arrays = dict[str, NDArray[Any]]


def gradient(shape: Sequence[int]) -> Floats:
    """A smooth picture, -1 to 1: unlike noise it has what towers were made for, edges and areas."""
    rows, columns = np.linspace(-1, 1, shape[-2]), np.linspace(-1, 1, shape[-1])
    picture = np.stack([np.add.outer(rows, columns) / 2, np.add.outer(-rows, columns) / 2, np.outer(rows, columns)])
    return np.broadcast_to(picture.astype(np.float32), shape).copy()


def noise(shape: Sequence[int]) -> Floats:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def check_tower(
    name: str,
    tower: ov.Model,
    reference: Callable[[Arrays], Floats],
    inputs: Sequence[Arrays],
    counts: Sequence[int] | None = None,
) -> tuple[Row, list[Floats]]:
    """Compare a tower with transformers on some inputs; also returns its rows for each.

    Args:
        counts: how many of its rows count, for each input; those behind are of padding.

    Raises:
        ParityError: it computes something else.
    """
    compiled = ov.Core().compile_model(tower, "CPU", EXACT)
    found = [np.array(compiled(values)["features"]) for values in inputs]
    ends = [len(rows) for rows in found] if counts is None else counts
    expected = np.concatenate([reference(values)[:end] for values, end in zip(inputs, ends, strict=True)])
    counted = np.concatenate([rows[:end] for rows, end in zip(found, ends, strict=True)])
    return compared(f"{name} tower", counted, expected, transformers_name(), limit=1e-3), found


def check_prompt(
    what: str,
    model: ov.Model,
    source: PreTrainedModel,
    medium: Medium,
    call: dict[str, Any],
    *,
    ids_argument: str | None,
    grid: tuple[int, int] | None,
    vocab_size: int,
) -> Row:
    """Compare a decoder that gets a tower's rows with the whole model that gets the picture or sound itself.

    The prompt has text before and behind it. The decoder takes it in two calls, as a session might, then single tokens.

    Args:
        call: what `source` takes for it, beside tokens.
        ids_argument: an argument of `source` that says which tokens stand for it, where it needs that.

    Raises:
        ParityError: as `edgert.converters.quality.check_decoder`.
    """
    draw = np.random.default_rng(1)
    before, behind, steps = (draw.integers(0, vocab_size, size).tolist() for size in (_AROUND, _AROUND, STEPS))
    real = [*before, *medium.ids, *behind]
    expected = _reference(source, real, steps, call, ids_argument, medium.token)

    taken = Taken.of(model, vocab_size, grid)
    places, media = Places(taken), media_of([medium])
    request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    seen: list[int] = []
    kept: list[Floats] = []
    own = [*before, *medium.tokens]
    for tokens in (own, behind, *([step] for step in steps)):
        count = len(tokens)
        inputs: Arrays = {
            "input_ids": np.zeros((1, count), np.int64),
            "attention_mask": np.ones((1, len(seen) + count), np.int64),
            "position_ids": np.ascontiguousarray(places.after(seen, tokens)[..., None, :]),
            "beam_idx": np.zeros(1, np.int32),
            **taken.zeros(count),
        }
        taken.fill(inputs, tokens, media)
        seen = [*seen, *tokens]
        kept.append(np.array(request.infer(inputs)["logits"])[0])
    found = np.concatenate(kept)[-COMPARED:]
    return compared(f"logits with {what}", found, expected[-COMPARED:], transformers_name(), limit=1e-3)


def _reference(
    source: PreTrainedModel, prompt: list[int], steps: list[int], call: dict[str, Any], argument: str | None, token: int
) -> Floats:
    """Logits of transformers' own model: the prompt with `call`, then single tokens."""
    ids = torch.tensor([prompt])
    extra = {} if argument is None else {argument: (ids == token).long()}
    for module in source.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None  # M-RoPE models remember them from one prompt to the next
    cache = DynamicCache(config=source.config)
    with torch.no_grad():
        logits = [source(input_ids=ids, **call, **extra, past_key_values=cache, use_cache=True).logits[0]]
        logits += [
            source(input_ids=torch.tensor([[step]]), past_key_values=cache, use_cache=True).logits[0] for step in steps
        ]
    for module in source.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return np.asarray(torch.cat(logits).float().numpy())

"""The inputs that a decoder has beside tokens when images or sounds stand among them.

features:      f32 [batch, query, width]: a row stands in the place of the token's embedding. width is hidden *
               (1 + levels); the further parts are added to what the first `levels` layers give
               (DeepStack, https://arxiv.org/abs/2406.04334).
feature_mask:  boolean [batch, query], where there are such rows.
image_ids:     i64 [batch, query], 0 for text, k for the k-th image, whose tokens see each other both ways.

They come in through hooks on modules that every model of transformers has, its input embedding and its decoder layers,
so that no model's code is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openvino as ov
import torch
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from edgert.errors import ConversionError

FEATURES, FEATURE_MASK, IMAGE_IDS = "features", "feature_mask", "image_ids"


@dataclass(frozen=True)
class MoreInputs:
    """What a decoder takes beside tokens.

    Attributes:
        hidden: width of an embedding.
        levels: first layers to whose outputs something is added.
        bidirectional: tokens of one image see each other both ways.
        positions: rows of `position_ids`, 3 for M-RoPE; 0 where it is [batch, query].
    """

    hidden: int
    levels: int = 0
    bidirectional: bool = False
    positions: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (FEATURES, FEATURE_MASK, IMAGE_IDS) if self.bidirectional else (FEATURES, FEATURE_MASK)

    @property
    def width(self) -> int:
        """Numbers in a row of `features`."""
        return self.hidden * (1 + self.levels)

    @property
    def shapes(self) -> list[ov.PartialShape]:
        plain = ov.PartialShape([-1, -1])
        return [ov.PartialShape([-1, -1, self.width]), plain, *([plain] if self.bidirectional else [])]

    @property
    def dynamic(self) -> list[dict[int, Any]]:
        return [{0: Dim.AUTO, 1: Dim.AUTO}] * len(self.names)

    def example(self, batch: int, query: int) -> list[torch.Tensor]:
        """Tensors to trace with."""
        mask = torch.zeros(batch, query, dtype=torch.bool)
        mask[:, 0] = True
        return [torch.zeros(batch, query, self.width), mask, *([mask.long()] if self.bidirectional else [])]

    @contextmanager
    def around(
        self, model: PreTrainedModel, tensors: list[torch.Tensor], call: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """While the model is called: these inputs are in force. Gives the keyword arguments to call it with.

        Raises:
            ConversionError: the model has no list of decoder layers where `levels` needs one.
        """
        features, mask = tensors[0], tensors[1][..., None]
        zero = torch.zeros((), dtype=features.dtype)
        hooks = [model.get_input_embeddings().register_forward_hook(_instead(features[..., : self.hidden], mask))]
        for level, layer in enumerate(decoder_layers(model)[: self.levels] if self.levels else []):
            part = features[..., (level + 1) * self.hidden : (level + 2) * self.hidden]
            hooks.append(layer.register_forward_hook(_added(torch.where(mask, part, zero))))
        if self.bidirectional:
            past = call["attention_mask"].shape[1] - features.shape[1]
            groups = torch.nn.functional.pad(tensors[2], (past, 0))
            call = {
                **call,
                "attention_mask": create_masks_for_generate(
                    config=model.config.get_text_config(),
                    inputs_embeds=features[..., : self.hidden],
                    attention_mask=call["attention_mask"],
                    past_key_values=call["past_key_values"],
                    position_ids=call["position_ids"],
                    or_mask_function=_same_image(groups),
                ),
            }
        try:
            yield call
        finally:
            for hook in hooks:
                hook.remove()


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The layers of the language model, wherever it lies; raises `ConversionError` where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for module in (decoder, *decoder.children()):
        layers = getattr(module, "layers", None)
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == count:
            return layers
    raise ConversionError(f"{model.config.model_type}: no list of its {count} decoder layers was found")


def _instead(features: torch.Tensor, mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda module, arguments, output: torch.where(mask, features, output)


def _added(part: torch.Tensor) -> Callable[..., Any]:
    return lambda module, arguments, output: (
        (output[0] + part, *output[1:]) if isinstance(output, tuple) else output + part
    )


def _same_image(groups: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether query and key are of one image; `groups` [batch, past + query] is 0 for text and all of the past."""

    def same(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        mine, other = groups[batch_idx, q_idx], groups[batch_idx, kv_idx]
        return (mine == other) & (mine > 0)

    return same

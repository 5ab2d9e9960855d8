"""Attention sinks as OpenVINO's own operation takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov
import torch
from edgert.converters.general.adaptation import Adaptation, replaced
from openvino import opset13 as ops
from openvino.frontend.pytorch import ConversionExtension
from openvino.utils.node_factory import NodeFactory
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "edgert_sinks"


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    logits = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    extra = sinks.expand(logits.shape[0], -1, logits.shape[2], 1)
    return torch.softmax(torch.cat([logits, extra], dim=-1), dim=-1)[..., :-1] @ value


@torch.library.custom_op("edgert::sink_attention", mutates_args=())
def sink_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention with one more logit a head, which takes its share of the softmax and gives nothing.

    Args:
        query: [batch, heads, query, head_dim]; key and value have the same heads.
        mask: boolean, broadcastable to [batch, heads, query, past + query].
        sinks: the logits, [1, heads, 1, 1].
    """
    return _plain(query, key, value, mask, sinks, scale)


@sink_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _translate(context: Any) -> list[ov.Output]:
    # openvino.opset13 has no argument for the sixth input, which the operation has had since 2025.4.
    query, key, value, mask, sinks, scale = (context.get_input(index) for index in range(6))
    inputs = [query, key, value, mask, ops.convert_like(scale, query).output(0), sinks]
    return NodeFactory("opset13").create("ScaledDotProductAttention", inputs, {"causal": False}).outputs()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
    output = sink_attention(query, key, value, attention_mask, module.sinks.reshape(1, -1, 1, 1), scaling)
    return output.transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> torch.Tensor:
    """The mask of the sdpa attention, where that would leave it out, too."""
    mask: torch.Tensor = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return mask


def _modules(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "sinks", None), torch.nn.Parameter)]


@contextmanager
def _one_operation(model: PreTrainedModel) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
    configs = {id(module.config): module.config for module in _modules(model)}.values()
    with replaced(*((config, "_attn_implementation_internal", _NAME) for config in configs)):
        yield


SINKS = Adaptation(
    name="attention sinks in one operation",
    reason="gpt_oss: eager attention only, which keeps all logits in memory and reads the cache outside of it",
    until="transformers has sinks in its sdpa attention and aten.scaled_dot_product_attention takes them",
    applies=lambda model: bool(_modules(model)),
    apply=_one_operation,
)
SINKS_EXTENSIONS = (ConversionExtension("edgert.sink_attention.default", _translate),)
SINKS_DECOMPOSITIONS = {torch.ops.edgert.sink_attention.default: _plain}

"""Mixtures of experts in forms whose cost is that of the chosen experts, and whose weights NNCF compresses to INT4.

transformers' own forms do not do: `eager` loops over data-dependent sizes, `batched_mm` gathers whole expert matrices
for every token (tokens x k x matrix bytes of memory, and a Gather that NNCF leaves at INT8), `grouped_mm` counts with
aten.histc, which no frontend translates.

* Tiled: every expert computes every token, weighted by what the router says. OpenVINO's plugins know this block
  (passes ConvertTiledMoeBlockTo2GatherMatmuls and ...To3GatherMatmuls, MoeOpFusion) and compute the chosen experts
  only. It is also what optimum-intel exports. On an NPU it costs all experts.
* Grouped: rows sorted by expert, and one GroupedMatMul for each matrix (opset 17, as aten._grouped_mm is translated).
  For everything that the passes above do not match: other activations, no gate, biases, scores on the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov
import torch
from edgert.converters.general.adaptation import Adaptation, replaced
from openvino.frontend.pytorch import ConversionExtension
from openvino.opset17 import grouped_matmul
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

_NAME = "edgert"


@torch.library.custom_op("edgert::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each of `rows` [n, in], sorted by group, by the matrix [groups, out, in] of its group; `ends` [groups].

    torch._grouped_mm is this, but in a trace it takes nothing but bf16 (torch 2.13).
    """
    return torch._grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


@grouped_product.register_fake
def _(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[1])


def _dense_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_product` in operations that every runtime has, at the cost of all groups for every row."""
    every = torch.matmul(rows[None], matrices.transpose(1, 2))
    group = (torch.arange(rows.shape[0])[:, None] >= ends[None]).to(torch.int64).sum(dim=1)
    own = group[None] == torch.arange(matrices.shape[0])[:, None]
    return (every * own[..., None].to(every.dtype)).sum(dim=0)


def _translate(context: Any) -> list[ov.Output]:
    rows, matrices, ends = (context.get_input(index) for index in range(3))
    return grouped_matmul(rows, matrices, ends).outputs()


EXPERTS_DECOMPOSITIONS = {torch.ops.edgert.grouped_product.default: _dense_product}
EXPERTS_EXTENSIONS = (ConversionExtension("edgert.grouped_product.default", _translate),)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of a block in the form that suits them, as an experts function of transformers.

    Args:
        self: an experts module of transformers: `gate_up_proj` or `up_proj`, `down_proj` [experts, out, in] (or
            transposed), `has_gate`, `has_bias`, `is_transposed`.
        hidden_states: [tokens, hidden].
        top_k_index: the chosen experts, [tokens, k].
        top_k_weights: their weights, [tokens, k].

    Returns:
        [tokens, hidden].
    """
    if _is_swiglu(self):
        return _tiled_swiglu(self, hidden_states, top_k_index, top_k_weights)
    if _is_clamped(self):
        return _tiled_clamped(self, hidden_states, top_k_index, top_k_weights)
    rows, ends, order = _sorted_by_expert(hidden_states, top_k_index, self.num_experts)
    outer = _grouped_products(self, rows, ends, top_k_index.reshape(-1)[order])
    return _weighted_sum(outer, top_k_weights, order)


def _is_swiglu(experts: Any) -> bool:
    """silu(gate) * up without biases, which is what the three-product pattern is."""
    plain = type(experts)._apply_gate is _default_apply_gate
    silu = isinstance(experts.act_fn, torch.nn.SiLU | SiLUActivation) if hasattr(experts, "act_fn") else False
    return bool(experts.has_gate and not experts.has_bias and plain and silu)


def _is_clamped(experts: Any) -> bool:
    """The interleaved, clamped gate with biases of gpt_oss, which is what the two-product pattern is."""
    return bool(experts.has_gate and experts.has_bias and hasattr(experts, "limit") and hasattr(experts, "alpha"))


def _dense_weights(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Router weights of all experts, zero where not chosen: [tokens, experts]."""
    zeros = torch.zeros(top_k_index.shape[0], experts, dtype=top_k_weights.dtype)
    return zeros.scatter(1, top_k_index, top_k_weights)


def _tiles(hidden_states: torch.Tensor, experts: int) -> torch.Tensor:
    """[experts, tokens, hidden]; the Reshape, Tile and Reshape are parts of the pattern."""
    width = hidden_states.shape[-1]
    return hidden_states.reshape(-1, width).repeat(experts, 1).view(experts, -1, width)


def _untiled(output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Sum of [experts, tokens, hidden] weighted by [tokens, experts]."""
    experts, _, width = output.shape
    weights = dense.transpose(0, 1).reshape(experts, -1)[..., None]
    return (output.view(experts, -1, width) * weights).sum(dim=0)


def _tiled_swiglu(self: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate_up, down = _rows_out(self, "gate_up_proj"), _rows_out(self, "down_proj")
    gate_proj, up_proj = gate_up.chunk(2, dim=1)
    tiles = _tiles(hidden_states, self.num_experts)
    inner = self.act_fn(torch.bmm(tiles, gate_proj.transpose(1, 2))) * torch.bmm(tiles, up_proj.transpose(1, 2))
    output = torch.bmm(inner, down.transpose(1, 2))
    return _untiled(output, _dense_weights(index, weights.to(hidden_states.dtype), self.num_experts))


def _tiled_clamped(self: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate_up, down = _rows_out(self, "gate_up_proj"), _rows_out(self, "down_proj")
    tiles = _tiles(hidden_states, self.num_experts)
    inner = torch.bmm(tiles, gate_up.transpose(1, 2)) + self.gate_up_proj_bias[:, None, :]
    inner = self._apply_gate(inner)
    output = torch.bmm(inner, down.transpose(1, 2)) + self.down_proj_bias[:, None, :]
    return _untiled(output, _dense_weights(index, weights.to(hidden_states.dtype), self.num_experts))


def _rows_out(self: Any, name: str) -> torch.Tensor:
    """A stack of matrices as [experts, out, in]."""
    matrices: torch.Tensor = self.turned[name] if self.is_transposed else getattr(self, name)
    return matrices


def _turn(experts: Any, *names: str) -> dict[str, torch.Tensor]:
    """Copies of stacks that are [experts, in, out] as [experts, out, in], the only order that the patterns know."""
    return {name: getattr(experts, name).detach().transpose(1, 2).contiguous() for name in names}


def _sorted_by_expert(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row for each token and chosen expert, by expert.

    Returns:
        rows [tokens * k, hidden]; where the rows of each expert end, i32 [experts]; which of the tokens * k choices
        each row is.
    """
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    token = torch.div(order, top_k_index.shape[1], rounding_mode="floor")
    is_expert = (chosen[:, None] == torch.arange(experts)).to(torch.int32)
    ends = torch.cumsum(is_expert.sum(dim=0), dim=0).to(torch.int32)
    return hidden_states[token], ends, order


def _grouped_products(self: Any, rows: torch.Tensor, ends: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The experts over rows in their order; `chosen` is the expert of each row."""

    def product(name: str, inputs: torch.Tensor) -> torch.Tensor:
        output = grouped_product(inputs, _rows_out(self, name), ends)
        return output + getattr(self, f"{name}_bias")[chosen] if self.has_bias else output

    if not self.has_gate:
        return product("down_proj", self.act_fn(product("up_proj", rows)))
    return product("down_proj", self._apply_gate(product("gate_up_proj", rows)))


def _weighted_sum(rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows back in the order of the choices, weighted [tokens, k] and summed over k."""
    tokens, k = weights.shape
    choices = rows[torch.argsort(order)].view(tokens, k, -1)
    return (choices * weights.to(rows.dtype)[..., None]).sum(dim=1)


class _Stacks:
    """Experts of a block that has them under names of its own, for `experts_forward`."""

    has_gate, has_bias = True, False
    _apply_gate = _default_apply_gate

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: Any, transposed: bool = False) -> None:
        self.gate_up_proj, self.down_proj = gate_up, down
        self.act_fn, self.is_transposed, self.num_experts = activation, transposed, gate_up.shape[0]
        self.turned = _turn(self, "gate_up_proj", "down_proj") if transposed else {}


def _parallel_experts(block: Any) -> Any:
    """The forward of a granitemoe block: a linear router, and experts that its own code calls one after the other."""
    experts = _Stacks(block.input_linear.weight, block.output_linear.weight, block.activation)

    def forward(layer_input: torch.Tensor) -> torch.Tensor:
        hidden_states = layer_input.reshape(-1, layer_input.shape[-1])
        logits, index = block.router.layer(hidden_states).float().topk(block.router.top_k, dim=1)
        weights = torch.softmax(logits, dim=1).type_as(hidden_states)
        return experts_forward(experts, hidden_states, index, weights).view(layer_input.shape)

    return forward


def _scored_inputs(block: Any) -> Any:
    """The forward of a llama4 block: the router's score multiplies what an expert gets, not what it gives."""
    stacks = block.experts
    experts = _Stacks(stacks.gate_up_proj, stacks.down_proj, stacks.act_fn, transposed=True)

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, block.hidden_dim)
        logits = torch.nn.functional.linear(hidden_states, block.router.weight)
        scores, index = torch.topk(logits, block.top_k, dim=1)
        rows, ends, order = _sorted_by_expert(hidden_states, index, block.num_experts)
        weights = torch.sigmoid(scores.float()).to(rows.dtype).reshape(-1)[order]
        routed = _grouped_products(experts, rows * weights[:, None], ends, index.reshape(-1)[order])
        return block.shared_expert(hidden_states) + _weighted_sum(routed, torch.ones_like(scores), order), logits

    return forward


def _is_stack(linear: Any) -> bool:
    return linear is not None and linear.weight.dim() == 3


def _blocks(model: PreTrainedModel) -> list[tuple[torch.nn.Module, Any]]:
    """Blocks of experts that have no interface to choose an implementation, and the forward for each."""
    found: list[tuple[torch.nn.Module, Any]] = []
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            found.append((module, _scored_inputs(module)))
        elif hasattr(module, "router") and _is_stack(getattr(module, "input_linear", None)):
            found.append((module, _parallel_experts(module)))
    return found


@contextmanager
def _own_blocks(model: PreTrainedModel) -> Iterator[None]:
    with replaced(*((block, "forward", forward) for block, forward in _blocks(model))):
        yield


def _modules(model: PreTrainedModel) -> list[Any]:
    """Experts that ask for an implementation."""
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]


@contextmanager
def _own_implementation(model: PreTrainedModel) -> Iterator[None]:
    ALL_EXPERTS_FUNCTIONS.register(_NAME, experts_forward)
    modules = _modules(model)
    turned = [(m, "turned", _turn(m, "gate_up_proj", "down_proj")) for m in modules if m.is_transposed]
    configs = {id(m.config): m.config for m in modules}.values()
    with replaced(*turned, *((config, "_experts_implementation_internal", _NAME) for config in configs)):
        yield


EXPERTS = (
    Adaptation(
        name="experts by their interface",
        reason="eager: data-dependent loop; grouped_mm: `No conversion rule found for operations: aten.histc.default`; "
        "batched_mm: gathers a matrix for every token and chosen expert",
        until="transformers has a form of experts that OpenVINO translates to GatherMatmul",
        applies=lambda model: bool(_modules(model)),
        apply=_own_implementation,
    ),
    Adaptation(
        name="experts without an interface",
        reason="granitemoe: `Could not guard on data-dependent expression` of its split by expert; "
        "llama4 computes every expert for every token",
        until="these blocks use transformers' experts interface",
        applies=lambda model: bool(_blocks(model)),
        apply=_own_blocks,
    ),
)

"""Families whose code is adapted while it is traced: they compute what transformers computes, and are fused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from edgert.converters import quality
from edgert.converters.compress import compress, precision_table
from edgert.converters.general.experts import experts_forward, grouped_product
from edgert.converters.general.sinks import sink_attention
from edgert.converters.general.tracing import DECOMPOSITIONS, adapted
from tiny_models import SLIDING_WINDOW, VOCAB_SIZE, exported, tiny
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

PIECES = [5, 13, 9, *[1] * 12]  # all beyond one window, chunk or original context; then steps


def layers(model: ov.Model) -> list[str]:
    compiled = ov.Core().compile_model(model, "CPU", quality.EXACT)
    return [str(node.get_rt_info()["layerType"].astype(str)) for node in compiled.get_runtime_model().get_ops()]


def logits(decoder: quality.Decoder) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, sum(PIECES)), dtype=np.int64)
    ends = np.cumsum(PIECES)
    return np.concatenate([decoder(ids[:, end - size : end]) for size, end in zip(PIECES, ends, strict=True)], axis=1)


@pytest.mark.parametrize("family", ["llama4", "phi4_mini", "gemma4_e2b", "gpt_oss"])
def test_pieces_beyond_windows(family: str) -> None:
    source, model = exported(family)
    assert sum(PIECES[:2]) > 2 * SLIDING_WINDOW
    found, expected = logits(quality.openvino_decoder(model)), logits(quality.torch_decoder(source))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_source_is_as_before() -> None:
    """Forwards, buffers and implementations are those of the model again, and so are its logits."""
    for family in ("llama4", "phi4_mini", "gpt_oss"):
        model = tiny(family)
        ids = torch.arange(3, 27)[None]
        with torch.no_grad():
            before = model(ids).logits
        attributes = [set(vars(module)) for module in model.modules()]
        implementations = (model.config._experts_implementation, model.config._attn_implementation)
        polar = torch.polar
        with adapted(model), torch.no_grad():
            inside = model(ids).logits
            assert (torch.polar is not polar) == (family == "llama4")
        assert torch.polar is polar
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert (model.config._experts_implementation, model.config._attn_implementation) == implementations
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
        assert (inside - before).abs().max() < 1e-5 * before.abs().max()


def stand_in(gate: bool, bias: bool, transposed: bool, activation: str) -> Any:
    """Experts with the attributes that transformers' decorator gives them: 5 experts, 16 wide, 24 within."""
    torch.manual_seed(0)
    inner = 48 if gate else 24
    shapes = {"gate_up_proj" if gate else "up_proj": (5, inner, 16), "down_proj": (5, 16, 24)}
    matrices = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    biases = {f"{name}_bias": torch.randn(5, shape[1]) for name, shape in shapes.items()} if bias else {}
    kind = type("Experts", (SimpleNamespace,), {"_apply_gate": _default_apply_gate})
    stored = {name: m.transpose(1, 2).contiguous() if transposed else m for name, m in matrices.items()}
    return kind(
        **stored, **biases, turned=matrices, num_experts=5, has_gate=gate, has_bias=bias, is_transposed=transposed,
        act_fn=ACT2FN[activation], matrices=matrices,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "bias", "transposed", "activation"),
    [
        (True, False, False, "silu"),  # tiled
        (True, False, True, "silu"),
        (True, False, False, "gelu"),  # grouped, and so all below
        (False, False, False, "relu2"),
        (True, True, True, "silu"),
    ],
)
def test_experts(gate: bool, bias: bool, transposed: bool, activation: str) -> None:
    """Against every expert by itself, some with no token."""
    experts = stand_in(gate, bias, transposed, activation)
    hidden, weights = torch.randn(7, 16), torch.rand(7, 2)
    index = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [0, 1], [1, 0], [3, 0]])
    first = "gate_up_proj" if gate else "up_proj"
    expected = torch.zeros(7, 16)
    for token in range(7):
        for expert, weight in zip(index[token], weights[token], strict=True):
            inner = hidden[token] @ experts.matrices[first][expert].T
            inner = inner + getattr(experts, f"{first}_bias")[expert] if bias else inner
            inner = experts._apply_gate(inner) if gate else experts.act_fn(inner)
            outer = inner @ experts.matrices["down_proj"][expert].T
            outer = outer + experts.down_proj_bias[expert] if bias else outer
            expected[token] += weight * outer
    torch.testing.assert_close(experts_forward(experts, hidden, index, weights), expected)


@pytest.mark.parametrize(("family", "products"), [("qwen3_moe", 6), ("gpt_oss", 4), ("llama4", 4)])
def test_only_chosen_experts_are_computed(family: str, products: int) -> None:
    """By OpenVINO's own operation, whatever the weights are; and all experts are in the table of weights."""
    source, model = exported(family)
    assert layers(model).count("GatherMatmul") == products
    stacks = sum(p.numel() for name, p in source.named_parameters() if p.dim() == 3 and "bias" not in name)
    compressed = compress(exported(family)[1], "int4", group_size=32)
    assert layers(compressed).count("GatherMatmul") == products
    linear = {row["precision"]: row["elements"] for row in precision_table(compressed) if row["role"] == "linear"}
    assert set(linear) == {"u4"}
    assert linear["u4"] > stacks
    assert np.isfinite(logits(quality.openvino_decoder(compressed))).all()


def test_operations_of_our_own_can_be_taken_apart() -> None:
    """For ONNX, which has neither of them."""

    class Both(torch.nn.Module):
        def forward(self, rows: torch.Tensor, heads: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            product = grouped_product(rows, matrices, torch.tensor([2, 2, 7], dtype=torch.int32))
            return product, sink_attention(heads, heads, heads, mask, torch.ones(1, 2, 1, 1), 0.5)

    matrices = torch.randn(3, 6, 8)
    example = (torch.randn(7, 8), torch.randn(1, 2, 5, 4), torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
    program = torch.export.export(Both(), example, strict=False)
    apart = program.run_decompositions(dict(DECOMPOSITIONS))
    assert not [node for node in apart.graph.nodes if str(node.target).startswith("edgert")]
    for found, expected in zip(apart.module()(*example), program.module()(*example), strict=True):
        torch.testing.assert_close(found, expected)


def test_sinks_take_their_share() -> None:
    """A sink as large as the only logit that a token sees takes half of it."""
    query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    mask = torch.tensor([[[[True, False]]]])
    found = sink_attention(query, key, value, mask, torch.zeros(1, 1, 1, 1), 0.5)
    assert torch.equal(found, torch.full((1, 1, 1, 4), 0.5))
    assert layers(exported("gpt_oss")[1]).count("ScaledDotProductAttention") == 2

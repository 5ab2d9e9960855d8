"""Blocks are found in every family, and cutting at every boundary changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from edgert.converters.compress import compress
from tiny_models import DECODERS, FAMILIES, exported, tiny

from edgert import bundle as bundles
from edgert.architecture import from_config
from edgert.bundle import Bundle
from edgert.cutting import cut
from edgert.device import DeviceConfig
from edgert.errors import PlanError
from edgert.executor import Executor
from edgert.graph import BlockGraph, BlockKind
from edgert.partition import annotate, whole
from edgert.placement import Plan
from edgert.session import Model

CPU = DeviceConfig("CPU", "f32")
# Chain of the tiny models' two layers, embed and head left out.
KINDS = {
    "gpt_neox": "block block",  # attention and FFN in parallel
    "cohere2": "block block",
    "gpt_oss": "attention moe attention moe",
    "qwen3_moe": "attention moe attention moe",
    "deepseek_v3": "attention ffn attention moe",
}
# Operations for one token of a mixture of experts: a router of 4 by 64; two experts with two gated products in and one
# out, 64 by 64 or 64 by 128 each; in deepseek_v3 a third that every token uses.
MOE_FLOPS = {
    "gpt_oss": 2 * (4 * 64 + 2 * 3 * 64 * 128),
    "qwen3_moe": 2 * (4 * 64 + 2 * 3 * 64 * 64),
    "deepseek_v3": 2 * (4 * 64 + 3 * 3 * 64 * 64),
}
PROMPT, CHUNK, TOTAL = 12, 3, 20


class Case:
    """A tiny model with its bundle and its logits for `TOTAL` random tokens, `[TOTAL, vocab]`."""

    def __init__(self, family: str, folder: Path) -> None:
        source, converted = exported(family)
        self.family = family
        self.encoder = family == "bert"
        vocab = source.config.vocab_size
        facts = bundles.ModelFacts(
            name=family, task="encoder" if self.encoder else "decoder", format="openvino", architecture=family,
            vocab_size=vocab, hidden_size=source.config.hidden_size, context_length=64,
            num_layers=source.config.num_hidden_layers, eos_token_ids=(), bos_token_id=None, weights="source",
            parameters=source.num_parameters(), pooling="mean" if self.encoder else None,
        )  # fmt: skip
        with bundles.create(folder / "tiny.edge") as draft:
            ov.save_model(converted, draft.path / "model.xml", compress_to_fp16=False)
            self.graph = annotate(ov.Core().read_model(draft.path / "model.xml"))
            draft.finish(facts, bundles.Report(f"test: {family}", {}), self.graph)
        self.bundle = Bundle.open(folder / "tiny.edge")
        self.tokens = np.random.default_rng(7).integers(3, vocab, TOTAL).tolist()
        with torch.no_grad():
            out = source(torch.tensor([self.tokens]))
        self.expected = (out.last_hidden_state if self.encoder else out.logits)[0].numpy()

    def run(self, plan: Plan) -> np.ndarray:
        """All logits: a prompt, a further chunk, then token by token."""
        run = Executor(self.bundle, plan).open()
        if self.encoder:
            return run.forward(self.tokens, keep=TOTAL).copy()
        parts = [self.tokens[:PROMPT], self.tokens[PROMPT : PROMPT + CHUNK]]
        parts += [[token] for token in self.tokens[PROMPT + CHUNK :]]
        return np.concatenate([run.forward(part, keep=len(part)).copy() for part in parts])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_blocks(case: Case) -> None:
    graph = case.graph
    assert graph.reason is None
    layers = KINDS.get(case.family, "attention ffn attention ffn").split()
    assert [str(b.kind) for b in graph.blocks] == ["embed", *layers, *([] if case.encoder else ["head"])]
    for before, after in zip(graph.blocks, graph.blocks[1:], strict=False):
        assert after.input == before.output
    assert [bool(b.states) for b in graph.blocks] == [
        not case.encoder and b.kind in {BlockKind.ATTENTION, BlockKind.BLOCK} for b in graph.blocks
    ]
    assert all(b.flops_per_token > 0 for b in graph.blocks[1:])
    assert BlockGraph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize("weights", ["source", "int4"])
@pytest.mark.parametrize("family", DECODERS)
def test_operations_are_those_of_the_configuration(family: str, weights: str) -> None:
    source, model = exported(family)
    graph = annotate(model if weights == "source" else compress(model, "int4"))
    expected = from_config(source.config.to_dict()).graph
    assert [(b.kind, b.flops_per_token, b.score_flops) for b in graph.blocks] == [
        (b.kind, b.flops_per_token, b.score_flops) for b in expected.blocks
    ]
    assert all(b.score_flops > 0 for b in graph.blocks if b.states)
    experts = {b.flops_per_token for b in graph.blocks if b.kind is BlockKind.MOE}
    assert experts == ({MOE_FLOPS[family]} if family in MOE_FLOPS else set())


def test_experts_without_a_gather() -> None:
    """All experts are computed, two of four are used. The router's weight has as many groups as there are experts."""
    import openvino.opset13 as ops

    data = ops.parameter([-1, 64], ov.Type.f32, "hidden")
    groups = ops.constant(np.ones((4, 1, 64), np.float32))
    scores = ops.matmul(data, ops.reshape(groups, [4, 64], False), False, True)
    chosen = ops.topk(scores, ops.constant(2), -1, "max", "value")
    experts = ops.matmul(ops.unsqueeze(data, [0]), ops.constant(np.ones((4, 64, 32), np.float32)), False, False)
    model = ov.Model([ops.result(chosen.output(1)), ops.result(experts)], [data], "experts")
    assert whole(model, "a test").blocks[0].flops_per_token == 2 * (4 * 64 + 2 * 64 * 32)


def test_weights_are_all_accounted_for(case: Case) -> None:
    """Bytes of the blocks against those of the source; a tied embedding counts in embed and in head."""
    source = tiny(case.family)
    parameters = {name: p for name, p in source.named_parameters() if p.dim() >= 2 and "bias" not in name}
    # Position and token-type tables depend on the inputs alone, so they belong to the prelude, not to a block.
    shared = [n for n in parameters if any(t in n for t in ("wpe", "position_embeddings", "token_type", "pooler"))]
    expected = sum(4 * p.numel() for name, p in parameters.items() if name not in shared)
    if getattr(source.config, "tie_word_embeddings", False) and not case.encoder:
        expected += 4 * source.get_input_embeddings().weight.numel()
    found = sum(b.total_weight_bytes for b in case.graph.blocks)
    assert expected <= found <= 1.05 * expected + 8192  # norms, biases, epsilons


def test_one_device_is_the_source_model(case: Case) -> None:
    plan = Plan.single(case.graph, CPU)
    assert relative_error(case.run(plan), case.expected) <= 1e-3
    if not case.encoder:  # fewer rows than tokens, whose number GPT-2's head wants to know
        last = Executor(case.bundle, plan).open().forward(case.tokens[:PROMPT], keep=1)
        assert relative_error(last[0], case.expected[PROMPT - 1]) <= 1e-3


def test_cutting_at_every_boundary_changes_nothing(case: Case) -> None:
    everywhere = Plan.from_configs([CPU] * len(case.graph.blocks), "every boundary", merge=False)
    assert relative_error(case.run(everywhere), case.run(Plan.single(case.graph, CPU))) <= 1e-5


def test_uneven_groups(case: Case) -> None:
    """Cuts elsewhere than at every boundary: a group may begin in the middle of a layer."""
    blocks = len(case.graph.blocks)
    configs = [CPU if i < blocks // 2 else DeviceConfig("SIM", "f32") for i in range(blocks)]
    assert relative_error(case.run(Plan.from_configs(configs, "two halves")), case.expected) <= 1e-3


@pytest.mark.parametrize("groups", [[], [(0, 1)], [(0, 1), (3, 9)], [(1, 9), (0, 0)], [(0, 10)]])
def test_groups_must_cover_the_model(groups: list[tuple[int, int]], demo: Model) -> None:
    model = ov.Core().read_model(demo.bundle.model_path)
    assert demo.bundle.graph is not None
    with pytest.raises(PlanError, match="do not cover"):
        cut(model, demo.bundle.graph, groups)


def test_a_graph_of_another_model_is_refused(demo: Model, tmp_path: Path) -> None:
    other = Case("gpt2", tmp_path)
    model = ov.Core().read_model(demo.bundle.model_path)
    with pytest.raises(PlanError, match="does not belong"):
        cut(model, other.graph, [(0, 2), (3, len(other.graph.blocks) - 1)])


def test_a_model_that_cannot_be_cut_stays_whole(tmp_path: Path) -> None:
    import openvino.opset13 as ops

    data = ops.parameter([-1, -1], ov.Type.f32, "input_ids")
    data.output(0).set_names({"input_ids"})
    product = ops.matmul(data, ops.constant(np.ones((4, 4), np.float32)), False, False)
    model = ov.Model([ops.result(product)], [data], "plain")
    graph = annotate(model)
    assert len(graph.blocks) == 1
    assert graph.reason == "no block with attention, a state or two matrix products on the residual stream"
    assert graph.blocks[0].weight_bytes == {"f32": 64}
    assert cut(model, graph, [(0, 0)]) == [model]

"""Models with more than one tensor between two blocks are cut block by block: the graphs are made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from openvino.op.util import Variable, VariableInfo

from edgert import bundle as bundles
from edgert.bundle import Bundle
from edgert.cutting import cut
from edgert.device import DeviceConfig
from edgert.errors import PlanError
from edgert.executor import Executor
from edgert.graph import BlockGraph, BlockKind
from edgert.irgraph import make_names_unique
from edgert.npu import recipe
from edgert.partition import annotate
from edgert.placement import Plan
from edgert.shapes import StaticShapes

CPU, STATIC = DeviceConfig("CPU", "f32"), DeviceConfig("CPU", "f32+static")
WIDTH, HEADS, HEAD, VOCAB, LAYERS, SIDE, KERNEL = 16, 2, 8, 32, 3, 2, 3
CALLS = (7, 3, 1, 1, 1, 1)


class Decoder:
    """Layers of a decoder: 0 has keys and values, 1 a short convolution, 2 the keys and values of 0.

    Behind the FFN of each a gate takes embeddings of that layer, which are computed from the tokens at the start.
    """

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.sinks: list[ov.Node] = []
        self.ids = self.input("input_ids", ov.Type.i64, 2)
        self.mask = self.input("attention_mask", ov.Type.i64, 2)
        self.positions = self.input("position_ids", ov.Type.i64, 2)
        self.beams = self.input("beam_idx", ov.Type.i32, 1)
        zero = ops.constant(0, ov.Type.i64)
        self.batch = ops.gather(ops.shape_of(self.ids), ops.constant([0], ov.Type.i64), zero)
        total = ops.gather(ops.shape_of(self.mask), ops.constant(1, ov.Type.i64), zero)
        keys = ops.range(zero, total, ops.constant(1, ov.Type.i64), output_type="i64")
        seen = ops.less_equal(keys, ops.unsqueeze(self.positions, ops.constant(2)))
        self.allowed = ops.unsqueeze(seen, ops.constant(1))

    def model(self) -> ov.Model:
        zero = ops.constant(0, ov.Type.i64)
        hidden = ops.multiply(ops.gather(self.weight(VOCAB, WIDTH), self.ids, zero), ops.constant(np.float32(2)))
        rows = ops.gather(self.weight(VOCAB, LAYERS * SIDE), self.ids, zero)
        side = ops.add(rows, self.linear(hidden, LAYERS * SIDE))
        shared: tuple[ov.Node, ov.Node] | None = None
        for layer in range(LAYERS):
            normed = ops.normalize_l2(hidden, ops.constant([2]), 1e-6, "add")
            if layer == 1:
                mixed = self.convolution(normed, layer)
            else:
                shared = shared or (self.cache(normed, layer, "key"), self.cache(normed, layer, "value"))
                mixed = self.attention(normed, *shared)
            hidden = ops.add(hidden, mixed)
            hidden = ops.add(hidden, self.linear(ops.swish(self.linear(hidden, 2 * WIDTH)), WIDTH))
            own = ops.slice(side, *(ops.constant([n]) for n in (layer * SIDE, (layer + 1) * SIDE, 1, 2)))
            gate = ops.multiply(ops.gelu(self.linear(hidden, SIDE), "erf"), own)
            hidden = ops.add(hidden, self.linear(gate, WIDTH))
        logits = ops.result(self.linear(hidden, VOCAB))
        logits.output(0).set_names({"logits"})
        return ov.Model([logits], self.sinks, [self.ids, self.mask, self.positions, self.beams], "streams")

    def input(self, name: str, kind: ov.Type, rank: int) -> ov.Node:
        parameter = ops.parameter([-1] * rank, kind, name)
        parameter.output(0).set_names({name})
        return parameter

    def weight(self, *shape: int) -> ov.Node:
        return ops.constant((self.random.standard_normal(shape) * 0.3).astype(np.float32))

    def linear(self, data: ov.Node, width: int) -> ov.Node:
        inner = data.get_output_partial_shape(0)[2].get_length()
        return ops.matmul(data, self.weight(width, inner), False, True)

    def heads(self, data: ov.Node) -> ov.Node:
        split = ops.reshape(self.linear(data, HEADS * HEAD), ops.constant([0, 0, HEADS, HEAD]), True)
        return ops.transpose(split, ops.constant([0, 2, 1, 3]))

    def state(self, layer: int, part: str, shape: list[int]) -> tuple[ov.Node, Variable]:
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, *(n or -1 for n in shape)])
        info.data_type, info.variable_id = ov.Type.f32, f"past_key_values.{layer}.{part}"
        size = ops.concat([self.batch, ops.constant(np.array(shape, np.int64))], 0)
        variable = Variable(info)
        read = ops.read_value(ops.broadcast(ops.constant(np.float32(0)), size), variable)
        return ops.gather(read, self.beams, ops.constant(0)), variable

    def cache(self, data: ov.Node, layer: int, part: str) -> ov.Node:
        past, variable = self.state(layer, part, [HEADS, 0, HEAD])
        every = ops.concat([past, self.heads(data)], 2)
        self.sinks.append(ops.assign(every, variable))
        return every

    def attention(self, data: ov.Node, keys: ov.Node, values: ov.Node) -> ov.Node:
        found = ops.scaled_dot_product_attention(self.heads(data), keys, values, self.allowed)
        joined = ops.reshape(ops.transpose(found, ops.constant([0, 2, 1, 3])), ops.constant([0, 0, WIDTH]), True)
        return self.linear(joined, WIDTH)

    def convolution(self, data: ov.Node, layer: int) -> ov.Node:
        """Of a token and the two before it, those kept in a state of three columns as transformers does."""
        turned = ops.transpose(self.linear(data, WIDTH), ops.constant([0, 2, 1]))
        past, variable = self.state(layer, "conv", [WIDTH, KERNEL])
        every = ops.concat([past, turned], 2)
        last, most, one, axis = (ops.constant([n]) for n in (-KERNEL, 2**31 - 1, 1, 2))
        self.sinks.append(ops.assign(ops.slice(every, last, most, one, axis), variable))
        seen = ops.slice(every, ops.constant([1]), most, one, axis)  # the oldest is used no more
        conv = ops.group_convolution(seen, self.weight(WIDTH, 1, 1, KERNEL), [1], [0], [0], [1])
        return self.linear(ops.transpose(conv, ops.constant([0, 2, 1])), WIDTH)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = Decoder().model()
    make_names_unique(model)
    facts = bundles.ModelFacts(
        name="streams", task="decoder", format="openvino", architecture="test", vocab_size=VOCAB, hidden_size=WIDTH,
        context_length=32, num_layers=LAYERS, eos_token_ids=(), bos_token_id=None, weights="source", parameters=1,
        pooling=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("streams") / "tiny.edge"
    with bundles.create(path) as draft:
        ov.save_model(model, draft.path / "model.xml", compress_to_fp16=False)
        graph = annotate(ov.Core().read_model(draft.path / "model.xml"))
        draft.finish(facts, bundles.Report("test", {}), graph)
    return Bundle.open(path)


def graph_of(bundle: Bundle) -> BlockGraph:
    assert bundle.graph is not None
    return bundle.graph


def run(bundle: Bundle, configs: list[DeviceConfig], *, merge: bool) -> np.ndarray:
    plan = Plan.from_configs(configs, "test", merge=merge)
    run = Executor(bundle, plan, shapes=StaticShapes(chunks=(2, 8), buckets=(8, 32))).open()
    tokens = np.random.default_rng(1).integers(0, VOCAB, sum(CALLS)).tolist()
    ends = np.cumsum(CALLS)
    parts = [tokens[end - count : end] for end, count in zip(ends, CALLS, strict=True)]
    return np.concatenate([run.forward(part, keep=len(part)).copy() for part in parts])


def test_blocks_of_a_decoder_with_side_streams(decoder: Bundle) -> None:
    graph = graph_of(decoder)
    assert [b.kind for b in graph.blocks] == ["embed", "attention", "ffn", "ssm", "ffn", "attention", "ffn", "head"]
    first, conv, sharing = graph.blocks[1], graph.blocks[3], graph.blocks[5]
    assert (first.kv_bytes_per_token, first.recurrent_bytes) == (2 * 4 * HEADS * HEAD, 0)
    assert (conv.kv_bytes_per_token, conv.recurrent_bytes) == (0, 4 * WIDTH * KERNEL)
    assert (sharing.states, sharing.score_flops) == ((), first.score_flops)
    assert conv.score_flops == 0
    tables = 4 * (VOCAB * WIDTH + VOCAB * LAYERS * SIDE + LAYERS * SIDE * WIDTH)
    assert tables <= graph.blocks[0].total_weight_bytes <= tables + 64
    gated = 2 * (2 * 2 * WIDTH * WIDTH + 2 * SIDE * WIDTH)
    assert [graph.blocks[i].flops_per_token for i in (2, 4, 6)] == [gated] * 3


def test_edges_tell_what_is_carried(decoder: Bundle) -> None:
    """Embeddings of the layers up to the last gate; keys and values, which grow, up to the block that shares them."""
    edges = graph_of(decoder).edges
    side, cache = 4 * LAYERS * SIDE, 2 * 4 * HEADS * HEAD
    assert [e.carried_bytes_per_token for e in edges] == [side] * 6 + [0]
    assert [e.carried_bytes_per_past for e in edges] == [0, cache, cache, cache, cache, 0, 0]
    assert [e.crossing_bytes_per_token for e in edges] == [4 * WIDTH + side] * 6 + [4 * WIDTH]
    older = graph_of(decoder).to_json()
    for edge in older["edges"]:
        for name in ("carried", "carried_bytes_per_token", "carried_bytes_per_past"):
            del edge[name]
    assert [e.carried for e in BlockGraph.from_json(older).edges] == [()] * len(edges)


@pytest.mark.parametrize(
    ("static", "merge"),
    [((), False), (range(1, 8), True), (range(1, 8), False), ((1, 3, 7), True), ((5, 6), True), ((2, 3, 4), True)],
)
def test_cut_anywhere(decoder: Bundle, static: tuple[int, ...], merge: bool) -> None:
    """Carried tensors change between devices with dynamic and with static shapes; no state sees padding."""
    blocks = len(graph_of(decoder).blocks)
    expected = run(decoder, [CPU] * blocks, merge=True)
    found = run(decoder, [STATIC if i in static else CPU for i in range(blocks)], merge=merge)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_cache_is_carried_and_not_its_copies(decoder: Bundle) -> None:
    model = ov.Core().read_model(decoder.model_path)
    submodels = cut(model, graph_of(decoder), [(0, 2), (3, 4), (5, 7)])
    names = [{port.get_any_name() for port in submodel.inputs} for submodel in submodels]
    carried = {port.get_any_name() for port in submodels[0].outputs if port.get_any_name().startswith("carried.")}
    assert len(carried) == 3  # keys, values, embeddings of the layers
    assert carried <= names[2]
    assert len(carried & names[1]) == 1  # the embeddings alone
    assert "hidden" in names[1] & names[2]


def test_a_recurrent_state_is_refused_for_an_npu(decoder: Bundle) -> None:
    graph = graph_of(decoder)
    found = recipe.check(ov.Core().read_model(decoder.model_path), graph)
    assert [(f.block, f.property) for f in found if f.property == "state"] == [("ssm.0", "state")]
    plan = Plan.from_configs([CPU, *[DeviceConfig("NPU", "f16")] * 7], "test")
    with pytest.raises(PlanError, match=r"NPU@f16 takes no block with a recurrent state, ssm\.0 has one"):
        plan.check(graph)


def two_streams(blocks: int = 2) -> ov.Model:
    """A picture and a sound, changed in turn by each other and by a condition that all blocks take."""
    random = np.random.default_rng(0)

    def linear(data: ov.Node, width: int) -> ov.Node:
        inner = data.get_output_partial_shape(0)[2].get_length()
        weight = (random.standard_normal((width, inner)) * 0.2).astype(np.float32)
        return ops.matmul(data, ops.constant(weight), False, True)

    def attend(own: ov.Node, other: ov.Node) -> ov.Node:
        scores = ops.softmax(ops.matmul(linear(own, 12), linear(other, 12), False, True), 2)
        return linear(
            ops.matmul(scores, linear(other, 12), False, False), own.get_output_partial_shape(0)[2].get_length()
        )

    inputs = {name: ops.parameter([-1, -1, width], ov.Type.f32, name) for name, width in WIDTHS.items()}
    for name, parameter in inputs.items():
        parameter.output(0).set_names({name})
    picture, sound, condition = linear(inputs["pixels"], 16), linear(inputs["sound"], 8), linear(inputs["time"], 16)
    for _ in range(blocks):
        picture = ops.add(picture, ops.multiply(attend(picture, picture), condition))
        sound = ops.add(sound, attend(sound, sound))
        picture, sound = ops.add(picture, attend(picture, sound)), ops.add(sound, attend(sound, picture))
        picture = ops.add(picture, ops.multiply(linear(ops.relu(linear(picture, 32)), 16), condition))
        sound = ops.add(sound, linear(ops.relu(linear(sound, 16)), 8))
    results = [ops.result(linear(picture, 4)), ops.result(linear(sound, 2))]
    for result, name in zip(results, ("out_pixels", "out_sound"), strict=True):
        result.output(0).set_names({name})
    return ov.Model(results, list(inputs.values()), "two streams")


WIDTHS = {"pixels": 4, "sound": 2, "time": 6}


def test_two_streams_and_two_results(tmp_path: Path) -> None:
    ov.save_model(two_streams(), tmp_path / "model.xml", compress_to_fp16=False)
    model = ov.Core().read_model(tmp_path / "model.xml")
    graph = annotate(model)
    assert graph.reason is None
    assert [b.kind for b in graph.blocks] == [
        BlockKind.EMBED, *[BlockKind.ATTENTION, BlockKind.ATTENTION, BlockKind.FFN] * 2, BlockKind.HEAD,
    ]  # fmt: skip
    # Beside the picture pass the sound and, up to the last FFN, the condition.
    assert [len(edge.carried) for edge in graph.edges] == [2] * 6 + [1]
    rows = {"pixels": 5, "sound": 3, "time": 1}
    random = np.random.default_rng(1)
    values = {n: random.standard_normal((1, rows[n], w)).astype(np.float32) for n, w in WIDTHS.items()}
    expected = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)
    known = dict(values)
    for submodel in cut(model, graph, [(i, i) for i in range(len(graph.blocks))]):
        compiled = ov.Core().compile_model(submodel, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled({port.get_any_name(): known[port.get_any_name()] for port in compiled.inputs})
        known |= {port.get_any_name(): found[port] for port in compiled.outputs}
    for name in ("out_pixels", "out_sound"):
        assert np.abs(known[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()


def test_a_sum_inside_a_block_is_no_residual(tmp_path: Path) -> None:
    """Rows of a matrix that are corrected by what was computed from them, as in a chunked delta rule."""
    random = np.random.default_rng(0)

    def linear(data: ov.Node, width: int) -> ov.Node:
        inner = data.get_output_partial_shape(0)[2].get_length()
        return ops.matmul(data, ops.constant(random.standard_normal((inner, width)).astype(np.float32)), False, False)

    data = ops.parameter([-1, -1, 4], ov.Type.f32, "pixels")
    data.output(0).set_names({"pixels"})
    hidden = linear(data, 16)
    for _ in range(2):
        rows = linear(hidden, 12)
        hidden = ops.add(hidden, linear(ops.add(rows, linear(ops.tanh(rows), 12)), 16))
        hidden = ops.add(hidden, linear(ops.relu(linear(hidden, 32)), 16))
    ov.save_model(ov.Model([ops.result(hidden)], [data], "rows"), tmp_path / "model.xml", compress_to_fp16=False)
    graph = annotate(ov.Core().read_model(tmp_path / "model.xml"))
    assert [b.kind for b in graph.blocks] == ["embed", *["ffn"] * 4]
    assert [len(edge.carried) for edge in graph.edges] == [0] * 4

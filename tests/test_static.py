"""Static shapes: what an NPU is given computes the same as the model it was made of, padding and buckets or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from test_partition import Case, relative_error
from tiny_models import DECODERS

import edgert
from edgert import static
from edgert.backends.base import Array
from edgert.bucketed import HIDDEN_SLOT, StaticRunner, pad
from edgert.cutting import cut
from edgert.device import DeviceConfig
from edgert.errors import ContextOverflowError, PlanError, UsageError
from edgert.executor import Executor
from edgert.graph import BOUNDARY
from edgert.lowering import halve
from edgert.placement import Plan
from edgert.session import Model
from edgert.shapes import StaticShape, StaticShapes

STATIC = DeviceConfig("CPU", "f32+static")
SMALL = StaticShapes(chunks=(4, 16), buckets=(16, 24, 64))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Against the dynamic model: a padded prompt, a chunk, single tokens over a bucket change; sliding windows too."""
    case = Case(family, tmp_path)
    plan = Plan.single(case.graph, STATIC)
    run = Executor(case.bundle, plan, shapes=SMALL).open()
    parts = [case.tokens[:12], case.tokens[12:15], *([t] for t in case.tokens[15:])]
    found = np.concatenate([run.forward(part, keep=len(part)).copy() for part in parts])
    assert relative_error(found, case.expected) <= 1e-3
    assert relative_error(found, case.run(Plan.single(case.graph, DeviceConfig("CPU", "f32")))) <= 1e-3


@pytest.fixture(scope="module")
def as_npu(demo_path: Path) -> Model:
    """The demo model in NPU form, in f32 on the CPU."""
    shapes = StaticShapes(chunks=(64,), buckets=(128, 256, 1024))
    return edgert.load(demo_path, device=STATIC, static_shapes=shapes)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_prompt_lengths(demo: Model, as_npu: Model, book: list[int], length: int) -> None:
    tokens = book[:length]
    assert np.abs(as_npu.score(tokens) - demo.score(tokens)).max() <= 1e-3
    # 20 tokens after 120 and 250 pass a bucket's end.
    assert as_npu.generate(tokens, max_tokens=20).tokens == demo.generate(tokens, max_tokens=20).tokens


def test_a_sequence_begins_again_in_the_bucket_it_has(demo: Model, as_npu: Model, book: list[int]) -> None:
    run = as_npu._engine.executor.open()
    run.prefill(book[:200], chunk=64)
    run.rewind(0)
    logits = run.prefill(book[300:340], chunk=64)
    assert logits is not None
    assert np.abs(logits[0] - demo.score(book[300:340])[-1]).max() <= 1e-3


def test_going_back_moves_rows_only_into_a_smaller_bucket(
    demo: Model, as_npu: Model, book: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    move = StaticRunner._move

    def watched(self: StaticRunner, bucket: int, rows: Mapping[str, Array]) -> None:
        moved.append(bucket)
        move(self, bucket, rows)

    run = as_npu._engine.executor.open()
    run.prefill(book[:200], chunk=64)
    monkeypatch.setattr(StaticRunner, "_move", watched)
    for length, buckets in ((150, set()), (100, {128})):
        run.rewind(length)
        assert set(moved) == buckets
        found = run.forward(book[300:310], keep=10)
        expected = demo.score([*book[:length], *book[300:310]])[-10:]
        assert np.abs(found - expected).max() <= 1e-3


@pytest.mark.parametrize("length", [120, 250])
def test_decode_over_a_bucket_change(demo: Model, as_npu: Model, book: list[int], length: int) -> None:
    runs = [model._engine.executor.open() for model in (demo, as_npu)]
    for run in runs:
        run.prefill(book[:length], chunk=64)
    for token in book[length : length + 16]:
        expected, found = (run.forward([token])[0].copy() for run in runs)
        assert np.abs(found - expected).max() <= 1e-3


def test_blocks_apart(demo: Model, demo_path: Path, book: list[int]) -> None:
    """Attention static, FFN not: caches and masks are where the attention is."""
    model = edgert.load(demo_path, place="ffn=CPU@f32,attention=CPU@f32+static")
    assert np.abs(model.score(book[:90]) - demo.score(book[:90])).max() <= 1e-3


def test_a_prompt_beyond_the_limit_is_refused(demo_path: Path, book: list[int]) -> None:
    model = edgert.load(demo_path, device=STATIC, static_shapes=StaticShapes((64,), (128,)))
    assert model.context_length == 128
    with pytest.raises(ContextOverflowError, match=r"129 prompt tokens.*holds 128"):
        model.score(book[:129])
    assert model.generate(book[:120], max_tokens=8).finish_reason in {"length", "stop"}
    with pytest.raises(ContextOverflowError, match="holds 128"):
        model.generate(book[:120], max_tokens=9)


def test_the_cache_can_be_cut_back(demo: Model, demo_path: Path, book: list[int]) -> None:
    model = edgert.load(demo_path, device=STATIC, static_shapes=StaticShapes((64,), (256, 1024)))
    model.generate(book[:300], max_tokens=4)
    again = model.generate([*book[:200], *book[500:520]], max_tokens=8)
    assert again.timings.reused_tokens == 200
    assert again.tokens == demo.generate([*book[:200], *book[500:520]], max_tokens=8).tokens


@pytest.mark.parametrize(
    ("chunks", "buckets"), [((), (8,)), ((4,), ()), ((1,), (8,)), ((8, 4), (8,)), ((4,), (0, 8)), ((5000,), (8,))]
)
def test_bad_shapes(chunks: tuple[int, ...], buckets: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected ascending numbers"):
        StaticShapes(chunks, buckets)


def test_shapes_within_a_context() -> None:
    assert StaticShapes().within(1024).buckets == (512, 1024)
    assert StaticShapes().within(1000).buckets == (512, 1000)
    assert StaticShapes().within(100_000).buckets == StaticShapes().buckets
    assert StaticShapes().fit(1, 511) == StaticShape(1, 512)
    assert StaticShapes().fit(2, 511) == StaticShape(256, 1024)


def test_no_token_ids_reach_a_static_submodel(demo: Model) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    with pytest.raises(PlanError, match="take no token ids"):
        Plan.from_configs([STATIC] * len(graph.blocks), "all").check(graph)
    plan = Plan.explicit(graph, f"*={STATIC}")
    assert plan.placements[0].config == DeviceConfig("CPU", "f32")
    assert "embed" in plan.warnings[0]


@pytest.mark.parametrize("half", [False, True])
def test_what_the_npu_compiler_sees(demo: Model, half: bool) -> None:
    """Every dimension a number, no states, f16 where asked for: the form of the NPU partitions."""
    graph = demo.bundle.graph
    assert graph is not None
    model = ov.Core().read_model(demo.bundle.model_path)
    last = len(graph.blocks) - 1
    first, body, _ = cut(model, graph, [(0, 0), (1, last - 1), (last, last)], static=[1, 2])
    lowered = static.lower(body, StaticShape(64, 128), static.shared_axes([first]), half=half)
    assert not lowered.is_dynamic()
    assert not lowered.get_sinks()
    kinds = {port.get_element_type().get_type_name() for port in [*lowered.inputs, *lowered.outputs]}
    assert kinds == {"f16" if half else "f32"}
    names = [port.get_any_name() for port in lowered.inputs]
    assert names[0] == "hidden"
    assert sum(name.startswith("past.") for name in names) == 8
    assert not any(name in names for name in ("input_ids", "attention_mask", "beam_idx"))


def test_f16_boundaries_of_a_device_that_computes_in_f16(demo: Model, book: list[int]) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    model = ov.Core().read_model(demo.bundle.model_path)
    submodels = cut(model, graph, [(0, 2), (3, 5), (6, 9)])
    halve(submodels[1], lambda name: name == BOUNDARY)
    kinds = {port.get_any_name(): port.get_element_type().get_type_name() for port in submodels[1].inputs}
    assert kinds[BOUNDARY] == "f16"
    assert kinds["beam_idx"] == "i32"
    assert submodels[1].output(BOUNDARY).get_element_type() == ov.Type.f16
    values: dict[str, np.ndarray] = {
        "input_ids": np.array([book[:9]]), "attention_mask": np.ones((1, 9), np.int64),
        "position_ids": np.arange(9)[None], "beam_idx": np.zeros(1, np.int32),
    }  # fmt: skip
    for number, submodel in enumerate(submodels):
        if number:
            values[BOUNDARY] = values[BOUNDARY].astype(np.float16 if number == 1 else np.float32)
        compiled = ov.Core().compile_model(submodel, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [port.get_any_name() for port in submodel.outputs]
        results = compiled({p.get_any_name(): values[p.get_any_name()] for p in submodel.inputs})
        values |= dict(zip(names, (results[i] for i in range(len(names))), strict=True))
    assert relative_error(values["logits"][0], demo.score(book[:9])) <= 1e-3


@pytest.mark.parametrize("size", [4, -1])
def test_states_that_are_no_cache(size: int) -> None:
    """One of a fixed size is taken as it is; one that grows along another axis has no static shape."""
    import openvino.opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape([1, size]), ov.Type.f32, "conv"
    variable = Variable(info)
    data = ops.parameter([1, size], ov.Type.f32)
    read = ops.read_value(ops.constant(np.zeros((1, 4), np.float32)), variable)
    assign = ops.assign(ops.add(read, data), variable)
    model = ov.Model([ops.result(read)], [assign], [data], "recurrent")
    if size == 4:
        assert static.caches(model) == {}
        assert static.fixed_states(model) == {"conv": (1, 4)}
        return
    with pytest.raises(PlanError, match=r"state 'conv' is no cache"):
        static.caches(model)


def test_padding() -> None:
    mask = np.zeros((1, 1, 2, 3), bool)
    mask[..., 0, :2] = mask[..., 1, :] = True
    target = np.zeros((1, 1, 4, 8), bool)
    pad(target, mask, (1, 1, "query", "total"), tokens=2, past=1, slots=4)
    assert target[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0], [1] * 8, [1] * 8,
    ]  # fmt: skip
    additive = np.zeros((1, 1, 4, 8), np.float16)
    pad(additive, np.where(mask, 0, -np.inf), (1, 1, "query", "total"), tokens=2, past=1, slots=4)
    of_boolean = np.zeros_like(additive)
    pad(of_boolean, mask, (1, 1, "query", "total"), tokens=2, past=1, slots=4)
    assert (of_boolean == additive).all()
    assert additive[0, 0, 0].tolist() == [
        0,
        HIDDEN_SLOT,
        HIDDEN_SLOT,
        HIDDEN_SLOT,
        0,
        HIDDEN_SLOT,
        HIDDEN_SLOT,
        HIDDEN_SLOT,
    ]
    assert np.isfinite(additive).all()
    assert not additive[0, 0, 2:].any()
    table = np.zeros((1, 4, 3), np.float16)
    pad(table, np.full((1, 2, 3), -60000.0), (1, "query", 3), tokens=2, past=9, slots=16)
    assert table[0, :, 0].tolist() == [-60000, -60000, 0, 0]

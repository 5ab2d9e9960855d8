"""Submodels with kernels in them: which operations they replace, and that the model still says the same."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import kernel_ops
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from attention_models import attention_model, rows, weights_of
from edgert.converters.compress import compress, to_fp16
from edgert.converters.kernels import add_kernels
from exact_kernels import EXACT, Chain, ExactFactory
from test_partition import relative_error
from tiny_models import FAMILIES, exported

import edgert
from edgert import native
from edgert.cutting import cut
from edgert.errors import BundleError, PlanError, UsageError
from edgert.irgraph import make_names_unique
from edgert.kernel_lowering import LoweredModel, lower, packables
from edgert.kernelfile import DATA, INDEX, PackedWeights, PackedWriter, make_unusable
from edgert.lowering import keep_last_logits
from edgert.partition import annotate

pytestmark = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")

# In exact arithmetic but for keys and values in f16: 11 bits.
LIMIT = 2e-3
# Their masks are more than causal.
SLIDING = ("mistral", "gemma3", "cohere2", "gpt_oss")
# With activations in INT8, which matrices of 64 random columns make little of.
QUANTIZED_LIMIT = 6e-2
TOTAL, CHUNKS = 40, (12, 3)

# QuantizedLinears, EmbeddingLookups, CachedAttentions of two layers. Four products a layer and a head are nine:
# queries, keys and values are one of them, gate and up another.
EXPECTED = {
    "ministral3": (13, 1, 2),  # queries are scaled by position after the rotation
    "cohere2": (11, 1, 2),  # two neighbours rotate against each other, not two halves
    "gpt2": (9, 2, 2),
    "gpt_oss": (5, 1, 2),  # two matrices of attention; routers and experts are OpenVINO's
    "qwen3_moe": (5, 1, 2),
    "deepseek_v3": (15, 1, 2),
    "olmo2": (13, 1, 2),  # norms over all heads
    "bert": (12, 3, 0),
}
MIXTURES = ("gpt_oss", "qwen3_moe", "deepseek_v3")
WEIGHTS = ("int4", "int4 symmetric", "int8")


class Tiny:
    """A tiny model with compressed weights, on disk, and its logits."""

    def __init__(self, family: str, weights: str, folder: Path) -> None:
        source, model = exported(family)
        to_fp16(model)
        model = compress(model, "int8" if weights == "int8" else "int4", group_size=32, sym="symmetric" in weights)
        make_names_unique(model)
        self.family, self.folder = family, folder
        ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
        self.chunks = (TOTAL,) if family == "bert" else CHUNKS
        self.vocab_size = source.config.vocab_size
        self.tokens = np.random.default_rng(7).integers(3, self.vocab_size, TOTAL).tolist()
        self.expected = Chain([(self.read(), ())]).tokens(self.tokens, self.chunks)

    def read(self) -> ov.Model:
        return ov.Core().read_model(self.folder / "model.xml")

    def pack(self) -> PackedWeights:
        found = packables(self.read())
        with PackedWriter(self.folder, found.refused) as writer:
            for packable in found.packed:
                writer.add(packable.key, packable.shape, packable.content, packable.pack)
        packed = PackedWeights.open(self.folder)
        assert packed is not None
        return packed

    def error(self, *lowered: LoweredModel) -> float:
        found = Chain([(part.model, part.caches) for part in lowered]).tokens(self.tokens, self.chunks)
        return relative_error(found, self.expected)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    weights = WEIGHTS[FAMILIES.index(request.param) % len(WEIGHTS)]
    return Tiny(request.param, weights, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny("qwen3", "int4", tmp_path_factory.mktemp("qwen3"))


def test_every_family(tiny: Tiny) -> None:
    model = tiny.read()
    before = {port.any_name for port in model.inputs}, [port.names for port in model.outputs]
    lowered = lower(model, None, ExactFactory(), precision="f16")
    linears, lookups, attentions = EXPECTED.get(tiny.family, (9, 1, 2))
    assert lowered.replaced == {
        "QuantizedLinear": linears, "EmbeddingLookup": lookups, "CachedAttention": attentions,
    }  # fmt: skip
    assert tiny.error(lowered) <= LIMIT
    assert [port.names for port in model.outputs] == before[1]
    caches = {f"cache.{number}" for number in range(attentions)}
    if attentions:
        needless = {"beam_idx"} if tiny.family in SLIDING else {"beam_idx", "attention_mask"}
        assert {port.any_name for port in model.inputs} == before[0] - needless | caches | {"past"}
        assert not model.get_sinks()
        assert not model.get_variables()
        assert len({state for cache in lowered.caches for state in (cache.key_state, cache.value_state)}) == 4
    reasons = set(lowered.left.values())
    if tiny.family in MIXTURES:
        assert reasons == {"its weight has 3 dimensions", "its weight is f16"}  # experts and routers
    elif tiny.family == "bert":
        assert all("no cache that new rows join" in reason for reason in reasons)
        assert len(lowered.left) == 2
    else:
        assert not reasons


@pytest.mark.parametrize("precision", ["f16", "i8"])
def test_every_family_on_the_kernels(tiny: Tiny, precision: Any) -> None:
    lowered = lower(tiny.read(), None, native.factory(), precision=precision)
    assert tiny.error(lowered) <= QUANTIZED_LIMIT * (3 if tiny.family in MIXTURES else 1)  # another expert is chosen
    assert lowered.packed_bytes == sum(array.nbytes for array in lowered.arrays)


def test_which_families_take_several_sequences(tiny: Tiny) -> None:
    """Those of which nothing but the attention looks at other rows, and no product is OpenVINO's."""
    lowered = lower(tiny.read(), None, native.factory(), batched=True)
    inputs = {port.any_name for port in lowered.model.inputs}
    if tiny.family in SLIDING:
        assert lowered.unbatched == "it takes attention_mask"
    elif tiny.family in MIXTURES:
        assert str(lowered.unbatched).endswith("stays with OpenVINO")
    elif tiny.family == "bert":
        assert lowered.unbatched == "it has no cache that the kernels change in place"
    else:
        assert lowered.unbatched is None
        assert inputs == {"input_ids", "position_ids", "sequences", "cache.0", "cache.1"}
        return
    assert "sequences" not in inputs
    assert ("past" in inputs) == (tiny.family != "bert")


def test_every_family_cut_at_every_boundary(tiny: Tiny) -> None:
    """Submodels find the weights that were packed for the whole model, and give each other masks and tables."""
    packed, model = tiny.pack(), tiny.read()
    graph = annotate(model)
    lowered = [
        lower(submodel, packed, ExactFactory(), precision="f16")
        for submodel in cut(model, graph, [(block.index, block.index) for block in graph.blocks])
    ]
    assert tiny.error(*lowered) <= LIMIT
    whole = lower(tiny.read(), packed, ExactFactory())
    for name, count in whole.replaced.items():
        assert sum(part.replaced[name] for part in lowered) == count
    assert whole.packed_bytes == 0
    assert set(packed.entries) == {packable.key for packable in packables(tiny.read()).packed}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_weight(weights: str, tmp_path: Path) -> None:
    case = Tiny("llama", weights, tmp_path)
    assert case.error(lower(case.read(), case.pack(), ExactFactory(), precision="f16")) <= LIMIT


def test_what_is_fused(qwen3: Tiny) -> None:
    factory = ExactFactory()
    model = qwen3.read()
    lower(model, None, factory)
    attention = {
        "heads": 4, "kv_heads": 2, "head_dim": 32, "value_dim": 32, "scale": pytest.approx(32**-0.5), "softcap": 0.0,
        "precision": "i8", "rope": "half", "norm": "rms", "epsilon": pytest.approx(1e-6), "causal": True,
        "mask": False, "sinks": False,
    }  # fmt: skip
    assert [made for name, made in factory.made if name == "CachedAttention"] == [attention, attention]
    products = [made for name, made in factory.made if name == "QuantizedLinear"]
    assert [(p["out_features"], p["norm"], p["activation"], p["residual"]) for p in products] == [
        *[(256, "rms", "", False), (64, "", "", True), (128, "rms", "silu", False), (64, "", "", True)] * 2,
        (256, "rms", "", False),
    ]
    kinds = Counter(op.get_type_name() for op in lower(qwen3.read(), None, native.factory()).model.get_ops())
    assert kinds["MatMul"] == 1  # the angles of the rotation
    assert not kinds.keys() & {"ReadValue", "Assign", "ScaledDotProductAttention", "Power", "Swish", "Slice", "Range"}


def test_a_tied_table_is_packed_once(tmp_path: Path) -> None:
    case = Tiny("gemma3", "int4", tmp_path)
    packed = case.pack()
    tables = [entry for entry in packed.entries.values() if entry.shape.bits == 8]
    assert len(tables) == 1
    lowered = lower(case.read(), packed, native.factory())
    assert lowered.replaced["EmbeddingLookup"] == 1
    assert len(lowered.arrays) == len(packed.entries)
    assert sum(array.nbytes for array in lowered.arrays) == sum(entry.bytes for entry in packed.entries.values())


def test_the_head_of_the_last_tokens(qwen3: Tiny) -> None:
    model = qwen3.read()
    assert keep_last_logits(model, annotate(qwen3.read()))
    lowered = lower(model, qwen3.pack(), ExactFactory(), precision="f16")
    assert not lowered.left
    chain = Chain([(lowered.model, lowered.caches)])
    found = chain.step({"input_ids": np.array([qwen3.tokens[:9]]), "logits_to_keep": np.array([2])})
    assert relative_error(found, qwen3.expected[7:9]) <= LIMIT


def test_a_wrong_model_is_not_run(qwen3: Tiny, tmp_path: Path) -> None:
    qwen3.pack()
    for name in (INDEX, DATA):
        shutil.copy(qwen3.folder / name, tmp_path)
    make_unusable(tmp_path, "relative error 9")
    with pytest.raises(PlanError, match="the CPU kernels must not run it: relative error 9"):
        lower(qwen3.read(), PackedWeights.open(tmp_path), native.factory())


def test_weights_of_another_model(qwen3: Tiny, tmp_path: Path) -> None:
    index = (qwen3.pack().path / INDEX).read_text()
    shutil.copy(qwen3.folder / DATA, tmp_path)
    (tmp_path / INDEX).write_text(index.replace('"group": 32', '"group": 64', 1))
    with pytest.raises(BundleError, match="bytes is"):
        PackedWeights.open(tmp_path)
    (tmp_path / INDEX).write_text(index.replace('"asymmetric": true', '"asymmetric": false'))
    with pytest.raises(BundleError, match="bytes is"):
        PackedWeights.open(tmp_path)


def test_weights_that_were_not_packed_stay(qwen3: Tiny, tmp_path: Path) -> None:
    """The products of one attention and one gate are missing; their parts are not packed either."""
    packed = qwen3.pack()
    joined = next(key for key in packed.entries if key.count("+") == 2)
    gated = next(key for key in packed.entries if key.startswith("gated:"))
    entries = {key: entry for key, entry in packed.entries.items() if key not in (joined, gated)}
    some = PackedWeights(packed.path, entries, packed.refused, None, packed._data)
    lowered = lower(qwen3.read(), some, ExactFactory(), precision="f16")
    assert Counter(lowered.left.values()) == {"it is not packed in the bundle": 5}
    assert lowered.replaced["CachedAttention"] == 2
    assert qwen3.error(lowered) <= LIMIT


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ({}, {"scale": 0.25, "causal": False, "mask": False, "sinks": False}),
        ({"kv_heads": 2}, {"heads": 4, "kv_heads": 2}),
        ({"kv_heads": 1}, {"heads": 4, "kv_heads": 1}),
        ({"kv_heads": 1, "repeated": False}, {"heads": 4, "kv_heads": 1}),
        ({"value_dim": 8}, {"head_dim": 16, "value_dim": 8}),
        ({"scale": 0.1}, {"scale": pytest.approx(0.1)}),
        ({"causal": True}, {"causal": True, "mask": False}),
        ({"mask": "f32"}, {"mask": True}),
        ({"mask": "boolean"}, {"mask": True}),
        ({"mask": "boolean", "mask_rank": 2, "kv_heads": 2}, {"mask": True}),
        ({"mask": "f32", "mask_rank": 3}, {"mask": True}),
        ({"sinks": True, "scale": 0.3}, {"sinks": True, "mask": False}),
        ({"sinks": True, "mask": "f32", "kv_heads": 2}, {"sinks": True, "mask": True}),
        ({"spelled_out": True}, {"scale": 1.0}),
        ({"spelled_out": True, "scale": 0.2, "mask": "f32", "kv_heads": 2}, {"scale": pytest.approx(0.2)}),
        ({"spelled_out": True, "scale": 0.2, "softcap": 0.5, "mask": "f32"}, {"softcap": 0.5}),
        ({"spelled_out": True, "sinks": True, "mask": "f32"}, {"sinks": True}),
    ],
)
def test_attention(options: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Every form of attention, in a submodel that takes hidden rows, with a cache that its operations make longer."""
    model, given = attention_model(**options)
    factory = ExactFactory()
    lowered = lower(model.clone(), None, factory, precision="f16")
    (made,) = [made for name, made in factory.made if name == "CachedAttention"]
    assert attributes.items() <= made.items()
    if "mask" not in options and len(options.keys() & {"scale", "sinks"}):  # OpenVINO wants a mask with those
        model, _ = attention_model(**{"scale": 0.25, **options, "spelled_out": True})
    chains = [Chain([(model, ())]), Chain([(lowered.model, lowered.caches)])]
    past = 0
    for tokens in (5, 1, 12, 1, 1):
        inputs = {"hidden": rows(tokens, past), **given(tokens, past)}
        expected, found = (chain.step(inputs) for chain in chains)
        assert relative_error(found, expected) <= LIMIT
        past += tokens


@pytest.mark.parametrize("spelled_out", [False, True])
@pytest.mark.parametrize(
    ("places", "causal"),
    [
        ("compared", True),
        ("greater", True),
        ("shifted", True),
        ("padding", True),
        ("added shifted padding", True),
        ("window", False),
        ("later", False),
        ("added little", False),
    ],
)
def test_masks(places: str, causal: bool, spelled_out: bool) -> None:
    """Only a mask that hides what comes later, and nothing else, need not be made."""
    if spelled_out:
        places += " added"  # scores take no boolean
    model, _ = attention_model(places=places, spelled_out=spelled_out, scale=0.25 if spelled_out else None)
    factory = ExactFactory()
    lowered = lower(model.clone(), None, factory, precision="f16")
    assert [made["causal"] for _, made in factory.made] == [causal]
    chains = [Chain([(model, ())]), Chain([(lowered.model, lowered.caches)])]
    past = 0
    for tokens in (5, 1, 7, 1):
        expected, found = (chain.step({"hidden": rows(tokens, past)}) for chain in chains)
        assert relative_error(found, expected) <= LIMIT
        past += tokens


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_dim": 6}, "heads of 6 and 6 dimensions, expected multiples of 4"),
        ({"scale": "computed", "mask": "f32"}, "its scale is computed"),
        ({"also": "state"}, r"state 'k' is also taken by Abs"),
        ({"also": "past"}, r"state 'k' is also taken by Abs"),
        ({"also": "keys"}, r"state 'k' is also taken by Abs"),
        ({"kv_heads": 2, "interleaved": True}, "a cache is re"),
        ({"sinks": "computed", "mask": "f32"}, "its sinks are no constant of 4 numbers"),
        ({"spelled_out": True, "softcap": 0.5, "softcap_after": 3.0}, "scores are capped at 3 after another scaling"),
    ],
)
def test_attention_that_stays(options: dict[str, Any], reason: str) -> None:
    model, given = attention_model(**options)
    lowered = lower(model.clone(), None, ExactFactory(), precision="f16")
    assert not lowered.caches
    assert any(reason in text for text in lowered.left.values())
    chains = [Chain([(model, ())]), Chain([(lowered.model, ())])]
    for tokens, past in ((5, 0), (1, 5)):
        inputs = {"hidden": rows(tokens, past), **given(tokens, past)}
        expected, found = (chain.step(inputs) for chain in chains)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("inf"), "mask": "f32"}, "the CPU kernels do not take the model: .*scale"),
        ({"kv_heads": 2, "rows_from": "tokens"}, "takes neither input_ids nor hidden"),
    ],
)
def test_a_hostile_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lower(attention_model(**options)[0], None, native.factory())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"columns": 20}, "in_features is 20, expected a multiple of 8"),
        ({"scale": 1e-9}, "scale 1e-09 loses more than 2^-10 in f16"),
        ({"scale": float("inf")}, "a scale is not finite in f16"),
        ({"zero": 2.5}, "zero points from 2.5 to 2.5, expected integers from 0 to 255"),
        ({"zero": -1.0}, "zero points from -1 to -1, expected integers from 0 to 255"),
        ({"transposed": False}, "what it multiplies is transposed"),
        ({"groups": 4}, "group is 16, expected in_features (64) or a multiple of 32 that divides it"),
        ({"experts": True}, "its weight has 3 dimensions"),
        ({"compressed": False}, "its weight is f32"),
    ],
)
def test_products_that_stay(change: dict[str, Any], reason: str) -> None:
    model = weights_of(**change)
    lowered = lower(model.clone(), None, ExactFactory())
    assert list(lowered.left.values()) == [reason]
    assert packables(model).refused.keys() <= {"codes"}
    assert lowered.replaced["QuantizedLinear"] == 0


COLUMNS_FIRST = [
    {"columns_first": True, **more} for more in ({}, {"groups": 2}, {"kind": "i8"}, {"kind": "u8", "zero": 7.0})
]


@pytest.mark.parametrize(
    "change", [{}, {"zero": 3.0}, {"groups": 2}, {"columns": 24}, {"kind": "i8"}, {"kind": "u8"}, *COLUMNS_FIRST]
)
def test_products_of_other_compressors(change: dict[str, Any]) -> None:
    """Scales in f32, one zero point for all or none, a weight that is not square."""
    model = weights_of(**change)
    lowered = lower(model.clone(), None, ExactFactory())
    assert not lowered.left
    assert lowered.replaced["QuantizedLinear"] == 1
    data = rows(3, 0, change.get("columns", 64))
    expected, found = (kernel_ops.core().compile_model(m, "CPU", EXACT)(data)[0] for m in (model, lowered.model))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_residual_of_two_products() -> None:
    """Both could take the other; one of them does."""
    data = ops.parameter([1, -1, 64], np.float32, name="hidden")
    sides = [weights_of(data=data, seed=seed).get_results()[0].input_value(0) for seed in (1, 2)]
    model = ov.Model([ops.result(ops.add(*sides))], [data], "parallel")
    factory = ExactFactory()
    lowered = lower(model.clone(), None, factory)
    assert sorted(made["residual"] for _, made in factory.made) == [False, True]
    models = model, lowered.model
    expected, found = (kernel_ops.core().compile_model(m, "CPU", EXACT)(rows(3, 0, 64))[0] for m in models)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.fixture
def draft(qwen3: Tiny, tmp_path: Path) -> Path:
    for name in ("model.xml", "model.bin"):
        shutil.copy(qwen3.folder / name, tmp_path)
    return tmp_path


def test_compile_checks_the_kernels(draft: Path, qwen3: Tiny) -> None:
    (row,) = add_kernels(draft, vocab_size=qwen3.vocab_size, window=None)
    assert row["check"].startswith("CPU kernels: logits of random tokens: a prefill")
    assert 1e-4 < row["relative_error"] <= row["limit"]
    assert PackedWeights.open(draft) is not None


def test_compile_keeps_no_wrong_kernels(draft: Path, qwen3: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.kernel_lowering.rewrite.Rewriter._table", swapped_tables)
    assert add_kernels(draft, vocab_size=qwen3.vocab_size, window=None) == []
    packed = PackedWeights.open(draft)
    assert packed is not None
    assert packed.unusable is not None
    assert "at most" in packed.unusable
    assert not (draft / DATA).exists()


def swapped_tables(self: Any, tensor: Any, tables: Any) -> ov.Output:
    return self._output(tables.sin if tensor is tables.cos else tables.cos)


@pytest.mark.parametrize(
    ("arguments", "loads", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"kernels": True}, False, True),
        ({"kernels": False}, True, False),
        ({"format": "onnx"}, True, False),
    ],
)
def test_when_compile_packs(
    arguments: dict[str, Any], loads: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = native.KernelStatus(None, loads, None if loads else "it is not there")
    monkeypatch.setattr(native, "status", lambda: status)
    monkeypatch.setattr("edgert.converters.build.build", lambda src, out, options, *told: options.kernels)
    assert edgert.compile(tmp_path, tmp_path / "out.edge", **arguments) is expected


def test_kernels_are_for_openvino(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kernels need format 'openvino', not 'onnx'"):
        edgert.compile(tmp_path, tmp_path / "out.edge", format="onnx", kernels=True)

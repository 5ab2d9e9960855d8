"""Matrices as NNCF compresses them: what is evaluated is what a saved model computes with, and as large as is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from edgert.converters.compress import precision_table
from edgert.converters.mixed import variants as module
from edgert.converters.mixed.chain import Chain, State
from edgert.converters.mixed.nncf_runs import INT4, METRICS, Method, compress_exactly, quiet, sensitivity_metrics
from edgert.converters.mixed.variants import Variants
from mixed_models import F16, WINDOWS, Parts, logits_of, model_of, parts_of

from edgert.errors import ConversionError
from edgert.precision.formats import FORMATS, Format, named

Chosen = dict[str, tuple[Format, Method]]


def no_data() -> Sequence[State]:
    raise AssertionError("no data is needed")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return parts_of(model_of("small"), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def states(small: Parts) -> list[list[State]]:
    """What reaches each block."""
    chain = small.chain()
    found = [chain.start(WINDOWS)]
    for block in range(chain.blocks - 1):
        found.append(list(chain.run(block, found[-1], exact(small, chain))))
    return found


def exact(parts: Parts, chain: Chain) -> Any:
    variants = parts.variants(parts.path.parent / "none")
    return lambda matrix: variants.weights(matrix, F16, "rtn")


@pytest.fixture(scope="module")
def ffn(small: Parts, tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """The small model's feed-forward block in every format."""
    variants = small.variants(tmp_path_factory.mktemp("ffn"))
    for kind in FORMATS[1:]:
        variants.make(2, kind, "rtn", no_data)
    return variants


def saved(model: ov.Model, folder: Path) -> ov.Model:
    """A model as it is read back."""
    ov.save_model(model, folder / "mixed.xml", compress_to_fp16=False)
    return ov.Core().read_model(folder / "mixed.xml")


def assert_evaluated(parts: Parts, variants: Variants, chosen: Chosen, folder: Path) -> ov.Model:
    """The chain's logits with a mix are those of the model that is saved with it, which is returned."""
    model = parts.model()
    variants.put(model, chosen)
    mixed = saved(model, folder)
    chain = parts.chain()
    after = chain.through(
        0, chain.blocks - 1, chain.start(WINDOWS),
        lambda matrix: variants.weights(matrix, *chosen.get(matrix.name, (F16, "rtn"))),
    )  # fmt: skip
    for state, right in zip(after, logits_of(mixed), strict=True):
        np.testing.assert_allclose(state["logits"][0], right, atol=2e-6 * np.abs(right).max())
    return mixed


def test_what_is_evaluated_is_what_is_saved(small: Parts, states: list[list[State]], tmp_path: Path) -> None:
    """A tied table in INT4, formats of all kinds beside f16 in the same blocks, and methods that need data."""
    variants = small.variants(tmp_path)
    wanted: dict[int, tuple[tuple[str, Method], ...]] = {
        3: (("int4-asym-g32", "rtn"),),
        1: (("int8", "rtn"), ("int4-sym-g32", "gptq")),
        2: (("int4-asym-pc", "scale-estimation"), ("int4-sym-g64", "rtn")),
    }
    chosen: Chosen = {"embed/embedding": (named("int4-asym-g32"), "rtn")}
    for block, kinds in wanted.items():
        for number, (name, method) in enumerate(kinds):
            fitting = variants.make(block, named(name), method, lambda block=block: states[block])  # type: ignore[misc]
            if block != 3:
                chosen[fitting[number - len(kinds)].name] = named(name), method
    assert len(chosen) == 5
    mixed = assert_evaluated(small, variants, chosen, tmp_path)
    rows = {(row["role"], row["precision"], row["group_size"]): row["tensors"] for row in precision_table(mixed)}
    norms = rows.pop(("norms+other", "f32", None))
    assert norms > 0
    assert rows == {
        ("embedding+head", "u4", 32): 1, ("linear", "f16", None): 3, ("linear", "u8", -1): 1, ("linear", "i4", 32): 1,
        ("linear", "u4", -1): 1, ("linear", "i4", 64): 1,
    }  # fmt: skip
    whole = logits_of(small.model())
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(logits_of(mixed), whole, strict=True))


def test_an_empty_choice_leaves_the_model_alone(small: Parts, tmp_path: Path) -> None:
    variants = small.variants(tmp_path)
    mixed = assert_evaluated(small, variants, {}, tmp_path)
    chosen: Chosen = {matrix.name: (F16, "rtn") for matrix in small.matrices}
    assert precision_table(assert_evaluated(small, variants, chosen, tmp_path)) == precision_table(mixed)
    assert {row["precision"] for row in precision_table(mixed)} == {"f16", "f32"}


@pytest.mark.parametrize(("family", "blocks"), [("llama", (0, 5)), ("qwen3_moe", (2,))])
def test_tables_apart_and_experts(family: str, blocks: tuple[int, ...], tmp_path: Path) -> None:
    parts = parts_of(model_of(family), tmp_path / family)
    variants, int8, chosen = parts.variants(tmp_path), named("int8"), Chosen()
    for block in blocks:
        chosen |= {matrix.name: (int8, "rtn") for matrix in variants.make(block, int8, "rtn", no_data)}
    table = precision_table(assert_evaluated(parts, variants, chosen, tmp_path))
    for row in table:
        if row["precision"] == "u8":
            own = [parts.named(name) for name in chosen if parts.named(name).role == row["role"]]
            assert row["tensors"] == len(own)
            assert row["bytes"] == sum(int8.total_bytes(matrix.shape) for matrix in own)
    if family == "llama":
        assert {row["role"] for row in table if row["precision"] == "u8"} == {"embedding", "head"}
    else:
        assert sum(len(parts.named(name).shape) == 3 for name in chosen) == 3


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: str(kind.name))
def test_every_format_has_its_bytes(kind: Format, small: Parts, ffn: Variants, tmp_path: Path) -> None:
    own = [matrix for matrix in small.matrices if matrix.blocks == (2,) and kind.fits(matrix.shape)]
    assert (
        [matrix.name for matrix in ffn.make(2, kind, "rtn", no_data)] == [m.name for m in own] if kind != F16 else own
    )
    model = small.model()
    ffn.put(model, {matrix.name: (kind, "rtn") for matrix in own})
    rows = [row for row in precision_table(saved(model, tmp_path)) if row["role"] == "linear"]
    inside = sum(row["bytes"] for row in rows)
    others = sum(2 * m.elements for m in small.matrices if m.role == "linear" and m not in own)
    assert inside == others + sum(kind.total_bytes(matrix.shape) for matrix in own)
    group = {matrix.shape[-1]: kind.group_size for matrix in own}
    assert {row["group_size"] for row in rows if row["precision"] != "f16"} == {g for g in group.values() if g}


def test_errors_are_as_large_as_formats_are_coarse(small: Parts, ffn: Variants) -> None:
    matrix = next(m for m in small.matrices if m.shape == (64, 128))
    right = ffn.weights(matrix, F16, "rtn")
    assert right.dtype == np.float32
    assert right.shape == matrix.shape
    errors = {
        kind.name: float(np.linalg.norm(ffn.weights(matrix, kind, "rtn") - right) / np.linalg.norm(right))
        for kind in FORMATS
        if kind.fits(matrix.shape)
    }
    assert errors["f16"] == 0
    assert 0 < errors["int8"] < 0.01 < errors["int4-asym-g32"] < errors["int4-asym-g64"] < errors["int4-asym-pc"] < 0.2
    assert errors["int4-sym-g32"] < errors["int4-sym-g64"] < errors["int4-sym-pc"] < 0.2


def test_matrices_in_memory_are_bounded(small: Parts, ffn: Variants) -> None:
    a, b, c = (matrix for matrix in small.matrices if matrix.blocks == (2,))  # each 32 kB in f32
    assert len({matrix.elements for matrix in (a, b, c)}) == 1
    two = small.variants(ffn._folder, kept_bytes=2 * 4 * a.elements)
    first, second = (two.weights(matrix, named("int8"), "rtn") for matrix in (a, b))
    assert two.weights(a, named("int8"), "rtn") is first
    two.weights(c, named("int8"), "rtn")  # b was not asked for as long
    assert two.weights(a, named("int8"), "rtn") is first
    again = two.weights(b, named("int8"), "rtn")
    assert again is not second
    np.testing.assert_array_equal(again, second)
    none = small.variants(ffn._folder, kept_bytes=0)  # one is always there
    assert none.weights(a, F16, "rtn").shape == a.shape
    assert none.weights(b, F16, "rtn").shape == b.shape


def test_nothing_is_compressed_twice(
    small: Parts, states: list[list[State]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, str]] = []

    def counted(model: ov.Model, format: Format, method: Method, *rest: Any) -> ov.Model:
        runs.append((format.name, method))
        return compress_exactly(model, format, method, *rest)

    monkeypatch.setattr(module, "compress_exactly", counted)
    asked: list[int] = []

    def samples() -> Sequence[State]:
        asked.append(1)
        return states[2]

    for variants in (small.variants(tmp_path), small.variants(tmp_path)):  # the second one is another process
        for _ in range(2):
            made = [variants.make(2, named("int8"), "rtn", samples), variants.make(2, INT4, "gptq", samples)]
            assert [len(matrices) for matrices in made] == [3, 3]
        assert variants.make(0, named("int8"), "rtn", samples) == []  # the table is compressed with the head
        assert variants.make(1, named("int4-asym-g128"), "rtn", samples) == []  # fits none
    assert runs == [("int8", "rtn"), ("int4-asym-pc", "gptq")]
    assert len(asked) == 1


@pytest.mark.parametrize("when", ["while it is written", "before it has its name"])
def test_a_file_that_is_cut_off_is_made_again(
    when: str, small: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants, int8 = small.variants(tmp_path), named("int8")
    write: Callable[..., None] = ov.save_model

    def fail(model: ov.Model, path: Path, **options: Any) -> None:
        write(model, path, **options)
        for file in (path, path.with_suffix(".bin")):
            file.write_bytes(file.read_bytes()[:100])
        raise RuntimeError("no space left")

    def stop(self: Path, target: Path) -> Path:
        if target.suffix == ".xml":
            raise KeyboardInterrupt
        return original(self, target)

    original = Path.replace
    with monkeypatch.context() as patched:
        if when == "while it is written":
            patched.setattr(module.ov, "save_model", fail)
            with pytest.raises(ConversionError, match=r"002-int8-rtn\.xml: cannot be written: no space left"):
                variants.make(2, int8, "rtn", no_data)
        else:
            patched.setattr(Path, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                variants.make(2, int8, "rtn", no_data)
    assert list(tmp_path.glob("*.partial.xml"))
    assert len(variants.make(2, int8, "rtn", no_data)) == 3
    assert not list(tmp_path.glob("*.partial*"))
    assert_evaluated(small, variants, {m.name: (int8, "rtn") for m in small.matrices if m.blocks == (2,)}, tmp_path)


def samples_of(submodel: ov.Model, states: Sequence[State]) -> list[dict[str, np.ndarray]]:
    return [{port.any_name: state[port.any_name] for port in submodel.inputs} for state in states]


def test_layers_that_nncf_keeps_are_those_with_the_highest_scores(small: Parts, states: list[list[State]]) -> None:
    """NNCF itself chooses INT8 for those of which it is told that their scores are high; so scores are its own."""
    import nncf

    submodel = small.submodels[1]
    data = samples_of(submodel, states[1])
    scores = sensitivity_metrics(submodel.clone(), data, ())
    assert len(scores) == 4
    assert all(set(row) == set(METRICS) and np.isfinite(list(row.values())).all() for row in scores.values())
    shapes = {m.name.partition("/")[2]: m.elements for m in small.matrices if m.blocks == (1,)}
    for metric in METRICS[:2]:
        with quiet():
            mixed = nncf.compress_weights(
                submodel.clone(), mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=-1, all_layers=True, ratio=0.6,
                sensitivity_metric=nncf.SensitivityMetric(metric),
                dataset=None if metric == METRICS[0] else nncf.Dataset(data),
            )  # fmt: skip
        kept = {
            use.node.get_friendly_name()
            for use in module.weight_uses(mixed)
            if use.constants[0].get_output_element_type(0) == ov.Type.u8
        }
        assert 0 < len(kept) < 4
        assert min(scores[name][metric] for name in kept) >= max(
            row[metric] for name, row in scores.items() if name not in kept
        )
    assert {name.partition("/")[0] for name in scores} == set(shapes)


def test_metrics_are_of_products(small: Parts, states: list[list[State]], tmp_path: Path) -> None:
    variants = small.variants(tmp_path)
    assert variants.metrics(0, states[0]) == {}  # a table alone
    found = variants.metrics(3, states[3])
    assert set(found) == {"embed/embedding"}  # the tied table, as the head reads it
    assert set(found["embed/embedding"]) == set(METRICS)


def test_a_matrix_that_nncf_lost_is_named(small: Parts, tmp_path: Path) -> None:
    variants = small.variants(tmp_path)
    variants.make(1, named("int8"), "rtn", no_data)
    (tmp_path / "001-int8-rtn.xml").rename(tmp_path / "002-int8-rtn.xml")
    (tmp_path / "001-int8-rtn.bin").rename(tmp_path / "002-int8-rtn.bin")
    lost = next(matrix for matrix in small.matrices if matrix.blocks == (2,))
    with pytest.raises(ConversionError, match=f"{lost.name}: NNCF lost it in compressing it to int8"):
        variants.weights(lost, named("int8"), "rtn")


def test_nncf_s_refusal_is_ours(small: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    import nncf

    def refuse(*_: Any, **__: Any) -> None:
        raise nncf.ValidationError("not like this")

    monkeypatch.setattr(nncf, "compress_weights", refuse)
    with pytest.raises(ConversionError, match="compression to int8: not like this"):
        compress_exactly(small.submodels[1].clone(), named("int8"), "rtn", None)

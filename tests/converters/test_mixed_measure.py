"""What is measured of matrices and mixes: against the whole model, once, and honest where numbers are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, log1p, nan
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from edgert.converters.mixed import measure, nncf_runs, texts
from edgert.converters.mixed.chain import Array
from edgert.converters.mixed.journal import Journal
from edgert.converters.mixed.measure import Measurements, Quality, Sensitivity, rank_correlation
from edgert.converters.mixed.texts import Texts, write_texts
from mixed_models import F16, Parts, logits_of, model_of, parts_of
from tiny_models import VOCAB_SIZE

from edgert.errors import ConversionError
from edgert.evaluation import Scorer
from edgert.likelihood import Losses, Window
from edgert.precision.formats import FORMATS, named

KINDS = ("f16", "int8", "int4-asym-g32", "int4-asym-g64", "int4-sym-g32", "int4-sym-g64")


@dataclass(frozen=True)
class Study:
    """A model whose matrices are measured.

    Attributes:
        folder: of the journal and of the compressed matrices.
    """

    parts: Parts
    texts: Texts
    folder: Path
    found: dict[str, Sensitivity]

    def measurements(self, folder: Path | None = None) -> Measurements:
        """As another process would have them."""
        variants = self.parts.variants(self.folder / "variants")
        return Measurements(self.parts.chain(), variants, self.texts, Journal(folder or self.folder / "search", {}))


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """Few formats, methods, metrics and tokens: of others nothing is different but the time they take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "FORMATS", tuple(kind for kind in FORMATS if kind.name in KINDS))
        patched.setattr(measure, "METHODS", ("rtn", "scale-estimation"))
        patched.setattr(nncf_runs, "METRICS", nncf_runs.METRICS[:1])
        patched.setattr(texts, "WINDOW", 32)
        yield


@pytest.fixture(scope="module")
def study(few: None, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    parts = parts_of(model_of("small"), folder / "model")
    own = write_texts(parts.model(), 1, VOCAB_SIZE, 256, 0, lambda share: None)
    made = Study(parts, own, folder, {})
    shares: list[float] = []
    made.found.update(made.measurements().sensitivities(shares.append))
    assert shares == [0.25, 0.5, 0.75, 1.0]
    return made


def test_every_matrix_is_measured(study: Study) -> None:
    assert list(study.found) != []
    assert set(study.found) == {matrix.name for matrix in study.parts.matrices}
    for matrix in study.parts.matrices:
        one = study.found[matrix.name]
        family = "asym" if "asym" in one.anchor else "sym"
        assert one.anchor == f"int4-{family}-g{64 if matrix.shape[-1] == 128 else 32}"
        fitting = [k for k in KINDS[1:] if named(k).fits(matrix.shape) and (k == "int8" or family in k.split("-"))]
        assert list(one.errors) == list(one.methods) == fitting
        assert one.methods["int8"] == "rtn"
        assert one.errors["int8"] < one.errors["int4-" + family + "-g32"] / 50
        assert one.kl > 1e-4
        assert one.metrics["weight_quantization_error"] > 0
    kinds = {(matrix.blocks[-1], study.found[matrix.name].anchor.split("-")[1]) for matrix in study.parts.matrices}
    assert len(kinds) == 3  # one family for a block


def test_what_is_predicted_of_the_anchor_is_what_is_measured(study: Study) -> None:
    """Alone in it, in the whole chain: for a matrix in the middle as for the table, which two blocks read."""
    measurements = study.measurements()
    for name in ("embed/embedding", "attention.0/linear_2", "ffn.0/linear_6"):
        one = study.found[name]
        kind = named(one.anchor)
        alone = measurements.quality({name: (kind, one.methods[kind.name])})
        assert one.predicted(kind) == one.kl == pytest.approx(alone.kl, rel=1e-6)
        assert one.loss == pytest.approx(log1p(alone.increase), abs=1e-9)
        assert one.predicted(F16) == 0
        assert 0 < one.predicted(named("int8")) < one.kl / 50


def test_what_is_predicted_of_other_formats_and_mixes_is_near(study: Study) -> None:
    """Of all the text the divergence is a few percent off, though each was measured alone and in other formats."""
    measurements = study.measurements()
    mixes: list[dict[str, str]] = [
        dict.fromkeys(study.found, "int8"),
        {name: one.anchor for name, one in study.found.items()},
        {name: "int8" if number % 2 else one.anchor for number, (name, one) in enumerate(study.found.items())},
        {name: "int4-" + one.anchor.split("-")[1] + "-g32" for name, one in study.found.items()},
    ]
    for mix in mixes:
        chosen = {name: (named(kind), study.found[name].methods[kind]) for name, kind in mix.items()}
        predicted = sum(study.found[name].predicted(named(kind)) for name, kind in mix.items())
        assert measurements.quality(chosen).kl == pytest.approx(predicted, rel=0.15)


def test_nothing_is_measured_twice(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: Any) -> None:
        raise AssertionError("this is known")

    name, one = next(iter(study.found.items()))
    chosen = {name: (named("int8"), one.methods["int8"])}
    first = study.measurements().quality(chosen, "verify")
    perplexity = study.measurements().reference_perplexity("verify")
    monkeypatch.setattr(measure._Study, "run", again)
    monkeypatch.setattr(Measurements, "_quality", again)
    monkeypatch.setattr(Measurements, "reference", again)
    other = study.measurements()
    assert other.sensitivities(lambda share: None) == study.found
    assert other.quality(chosen, "verify") == first
    assert other.reference_perplexity("verify") == perplexity
    with pytest.raises(AssertionError, match="known"):
        other.quality({name: (named(one.anchor), "rtn")}, "verify")


def test_all_in_f16_is_the_reference_itself(study: Study) -> None:
    measurements = study.measurements()
    found = measurements.quality({}, "verify")
    perplexity = measurements.reference_perplexity("verify")
    assert found == Quality(perplexity, 0.0, 0.0, pytest.approx(0, abs=1e-12), 1.0)  # type: ignore[arg-type]
    losses = Losses()
    for window, logits in zip(study.texts.verify, logits_of(study.parts.model(), study.texts.verify), strict=True):
        losses.add(logits[:-1], window.targets)
    assert perplexity == pytest.approx(losses.perplexity, rel=1e-6)


class Mixed(Scorer):
    """What a whole model says of some windows."""

    name, vocab_size, context = "a model", VOCAB_SIZE, None

    def __init__(self, model: ov.Model, windows: Sequence[Window]) -> None:
        said = zip(windows, logits_of(model, windows), strict=True)
        self.said = {window.tokens: logits for window, logits in said}

    def logits(self, tokens: Sequence[int]) -> Array:
        return self.said[tuple(tokens)]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        raise NotImplementedError


def test_a_bundle_is_measured_as_the_chain_is(study: Study) -> None:
    measurements = study.measurements()
    chosen = {name: (named(one.anchor), one.methods[one.anchor]) for name, one in study.found.items()}
    model = study.parts.model()
    measurements.variants.put(model, chosen)
    own, other = measurements.quality(chosen, "verify"), measurements.quality_of(Mixed(model, study.texts.verify))
    assert own.increase != 0
    for name in ("perplexity", "increase", "standard_error", "kl", "agreement"):
        assert getattr(other, name) == pytest.approx(getattr(own, name), rel=1e-4)
    assert own.bound == own.increase + 1.645 * own.standard_error


def test_logits_that_are_too_many_to_keep_are_computed_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, one = next(iter(study.found.items()))
    chosen = {name: (named(one.anchor), one.methods[one.anchor])}
    kept = study.measurements(tmp_path / "a")
    monkeypatch.setattr(measure, "_KEPT_BYTES", 0)
    lean = study.measurements(tmp_path / "b")
    for _ in range(2):
        assert lean.quality(chosen, "search") == kept.quality(chosen, "search")
    assert not lean._kept


def test_a_model_without_a_finite_loss_is_refused(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = study.measurements(tmp_path)
    exact = measurements.variants.weights

    def broken(matrix: Any, kind: Any, method: Any) -> Any:
        return np.full(matrix.shape, nan, np.float32) if matrix.blocks == (2,) else exact(matrix, kind, method)

    with monkeypatch.context() as patched:
        patched.setattr(measurements.variants, "weights", broken)
        with pytest.raises(ConversionError, match="the f16 model's loss is nan on written by the model"):
            measurements.quality({})
        with pytest.raises(ConversionError, match="the f16 model's loss is nan"):
            measurements.sensitivities(lambda share: None)
    measurements = study.measurements(tmp_path / "other")
    exact = measurements.variants.weights
    monkeypatch.setattr(
        measurements.variants, "weights",
        lambda matrix, kind, method: exact(matrix, kind, method) + (0 if kind == F16 else inf),
    )  # fmt: skip
    with pytest.raises(ConversionError, match="a mix of 1 compressed matrices: gives no finite loss"):
        measurements.quality({next(iter(study.found)): (named("int8"), "rtn")})


def test_a_format_that_gives_no_number_is_no_option(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = study.measurements(tmp_path)
    exact = measurements.variants.weights
    bad = "int8"
    monkeypatch.setattr(
        measurements.variants, "weights",
        lambda matrix, kind, method: exact(matrix, kind, method) * (nan if kind.name == bad else 1),
    )  # fmt: skip
    for name, one in measurements.sensitivities(lambda share: None).items():
        assert set(one.errors) == set(study.found[name].errors) - {bad}
        assert one.kl == pytest.approx(study.found[name].kl, rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 2, 3), (10, 20, 300), 1.0),
        ((1, 2, 3), (3, 2, 1), -1.0),
        ((1, 2, 3, 4, 5), (2, 1, 4, 3, 5), 0.8),  # 1 - 6 * 4 / (5 * 24)
        ((1, 2, 2, 3), (1, 3, 2, 4), 4.5 / 22.5**0.5),  # mean ranks 0, 1.5, 1.5, 3
        ((1, 1, 2, 2), (1, 2, 1, 2), 0.0),
        ((7, 7, 7), (1, 2, 3), 0.0),
        ((1,), (2,), 0.0),
        ((), (), 0.0),
        ((1e-9, 2e-9, -1), (0.1, inf, -inf), 1.0),
    ],
)
def test_rank_correlation(first: tuple[float, ...], second: tuple[float, ...], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation(second, first) == pytest.approx(expected)


def test_rank_correlation_asks_for_order_alone() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=20).tolist()
    others = draw.normal(size=20).tolist()
    found = rank_correlation(values, others)
    assert rank_correlation(np.exp(values).tolist(), others) == pytest.approx(found)
    ranks, other_ranks = (np.argsort(np.argsort(side)) for side in (values, others))
    squares = int(np.square(ranks - other_ranks).sum())
    assert found == pytest.approx(1 - 6 * squares / (20 * 399))


def test_a_sensitivity_of_nothing_predicts_nothing(study: Study) -> None:
    one = replace(next(iter(study.found.values())), kl=0.0, errors={"int8": 0.0, "int4-asym-g32": 0.0})
    one = replace(one, anchor="int4-asym-g32")
    assert one.predicted(named("int8")) == 0

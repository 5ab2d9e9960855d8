"""`edgert compile --max-ppl-increase`: mixed precision, searches that were interrupted, budgets out of reach."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from edgert.converters import compile as compile_model
from edgert.converters.compress import compress
from edgert.converters.mixed import measure, mixing, nncf_runs, search, texts
from edgert.converters.mixed.measure import Measurements
from edgert.converters.mixed.mixing import Mixing
from edgert.converters.mixed.texts import write_texts
from mixed_models import logits_of, model_of, write_source
from tiny_models import VOCAB_SIZE

from edgert.bundle import Bundle
from edgert.cli import main
from edgert.device import DeviceKind
from edgert.errors import EdgertError, QualityError, UsageError
from edgert.likelihood import Losses, increase
from edgert.npu.recipe import check
from edgert.placement import Plan
from edgert.precision.formats import FORMATS, named
from edgert.scorers import bundle_scorer, exact_plan

KINDS = ("f16", "int8", "int4-asym-g32", "int4-asym-g64", "int4-sym-g32", "int4-sym-g64", "int4-sym-pc")
BUDGET = 0.03
Compile = Callable[..., Bundle]


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Few formats, methods, metrics, mixes and tokens: of others nothing is different but the time they take."""
    kinds = tuple(kind for kind in FORMATS if kind.name in KINDS)
    with pytest.MonkeyPatch.context() as patched:
        for module in (measure, search):
            patched.setattr(module, "FORMATS", kinds)
        patched.setattr(measure, "METHODS", ("rtn",))
        patched.setattr(nncf_runs, "METRICS", nncf_runs.METRICS[:1])
        patched.setattr(search, "MIXES", 4)
        patched.setattr(texts, "WINDOW", 32)
        yield


@pytest.fixture(scope="module")
def source(decoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IR folder: a decoder with one layer and a tied table."""
    folder = write_source(tmp_path_factory.mktemp("mixed") / "small", decoder_folder, model_of("small"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def bundle(source: Path, stages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What was measured for it is kept beside it."""
    out = tmp_path_factory.mktemp("bundles") / "mixed.edge"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Mixing, "remove", Mixing.close)
        return compile_model(source, out, max_ppl_increase=BUDGET, progress=stages.append)


def record_of(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.path / "quality.json").read_text("utf-8"))
    return found


def hash_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_the_bundle_is_whole(bundle: Bundle, stages: list[str]) -> None:
    Bundle.open(bundle.path, verify=True)
    assert {"quality.json", "quality.html", "model.xml", "model.bin"} <= set(bundle.files)
    assert bundle.facts.weights == "mixed"
    assert stages[:2] == ["load", "check"]
    assert {"measure random mixes", "search the best mix", "write"} <= set(stages)
    page = (bundle.path / "quality.html").read_text("utf-8")
    record = record_of(bundle)
    assert all(row["name"] in page for row in record["layers"])
    assert record["met"] is True
    assert record["protocol"]["generated"] is True
    assert set(record["seconds"]) < set(stages)


def test_its_matrices_are_as_the_record_says(bundle: Bundle) -> None:
    layers = record_of(bundle)["layers"]
    types = {"f16": "f16", "int8": "u8"}
    wanted: Counter[tuple[str, str, int | None]] = Counter()
    for row in layers:
        kind = named(row["format"])
        group = kind.group_size if kind.bits != 8 else -1
        wanted[row["role"], types.get(kind.name, "i4" if kind.symmetric else "u4"), group] += 1
    rows = [row for row in bundle.report.precisions if row["role"] != "norms+other"]
    assert {(row["role"], row["precision"], row["group_size"]): row["tensors"] for row in rows} == wanted
    assert sum(row["bytes"] for row in rows) == sum(row["bytes"] for row in layers)
    assert record_of(bundle)["result"]["bytes"] == sum(row["bytes"] for row in layers)
    assert any(row["format"].startswith("int4") for row in layers)


def test_its_numbers_are_those_of_the_bundle(bundle: Bundle, source: Path) -> None:
    """Of the text that the model writes again, with the seed, on the windows for verification."""
    record = record_of(bundle)
    model = ov.Core().read_model(source / "openvino_model.xml")
    bos = record["protocol"]["bos"]
    own = write_texts(model, bos, VOCAB_SIZE, 256, 0, lambda share: None)
    assert own.sha256 == record["protocol"]["sha256"]
    exact, found = Losses(), Losses()
    scorer = bundle_scorer(bundle, exact_plan(bundle))
    for window, logits in zip(own.verify, logits_of(model, own.verify), strict=True):
        exact.add(logits[:-1], window.targets)
        found.add(scorer.logits(window.tokens)[:-1], window.targets, logits[:-1])
    above, error = increase(found, exact)
    result = record["result"]
    assert exact.perplexity == pytest.approx(record["reference"]["perplexity"], rel=1e-5)
    assert (above, error) == pytest.approx((result["increase"], result["standard_error"]), abs=1e-5)
    assert found.mean_kl == pytest.approx(result["kl"], rel=1e-3)
    assert found.tokens == record["protocol"]["verify_tokens"] - len(own.verify)


def test_the_manifest_has_the_worst_of_what_has_to_keep_the_budget(bundle: Bundle) -> None:
    record, quality = record_of(bundle), bundle.report.quality
    used = [row for row in record["configs"] if row["used"]]
    worst = max(used, key=lambda row: row["bound"])
    assert quality is not None
    assert quality["config"] == worst["config"]
    assert quality["bound"] == worst["bound"] <= BUDGET == quality["budget"]
    assert quality["met"] is True
    assert quality["sha256"] == record["protocol"]["sha256"]
    assert "CPU@f32+dq" in {row["config"] for row in used}


def test_an_interrupted_search_goes_on_and_ends_alike(
    bundle: Bundle, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "other.edge"
    studied: list[int] = []
    original = measure._Study.run

    def run(study: measure._Study) -> Any:
        if len(studied) == stop:
            raise KeyboardInterrupt
        studied.append(study._block)
        return original(study)

    monkeypatch.setattr(measure._Study, "run", run)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        compile_model(source, out, max_ppl_increase=BUDGET)
    folder = tmp_path / ".other.edge.search"
    assert list(tmp_path.iterdir()) == [folder]  # no bundle, and no half of one
    assert studied == [1, 2]  # the table is the head's
    stop = -1
    resumed = compile_model(source, out, max_ppl_increase=BUDGET)
    assert studied == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [out]  # nothing is left of the search
    assert hash_of(out / "model.bin") == hash_of(bundle.path / "model.bin")
    first, second = record_of(bundle), record_of(resumed)
    for record in (first, second):
        del record["seconds"]
    assert first == second


def test_another_seed_is_another_search(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(own: Mixing) -> None:
        seen.append(own._texts.sha256)
        assert own._journal.rows == 0
        own._journal.measured("something", lambda: 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Mixing, "run", run)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            compile_model(source, tmp_path / "out.edge", max_ppl_increase=BUDGET, seed=seed)
    assert len(set(seen)) == 2


def test_a_budget_out_of_reach(
    source: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in f16 is then the best there is, and on this machine even that loses more."""
    original = Measurements.quality_of

    def worse(measurements: Measurements, scorer: Any) -> measure.Quality:
        return replace(original(measurements, scorer), increase=0.5, standard_error=0.01)

    monkeypatch.setattr(Measurements, "quality_of", worse)
    monkeypatch.setattr(mixing, "_ROUNDS", 2)
    monkeypatch.setattr(measure._Study, "run", None)  # all is measured
    out, folder = tmp_path / "out.edge", tmp_path / ".out.edge.search"
    shutil.copytree(bundle.path.with_name(".mixed.edge.search"), folder)
    with pytest.raises(QualityError, match=r"max_ppl_increase is 3\.0000%.*at most 5\d\..*force") as raised:
        compile_model(source, out, max_ppl_increase=BUDGET, kernels=False)
    assert raised.value.value > 0.5
    assert raised.value.limit == BUDGET
    assert list(tmp_path.iterdir()) == [folder]
    assert str(folder) in str(raised.value)

    monkeypatch.setenv("COLUMNS", "500")
    command = ["compile", str(source), "-o", str(out), "--max-ppl-increase", "3%", "--no-kernels"]
    assert main(command) == 3
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "max_ppl_increase is 3.0000%" in said.err
    assert not out.exists()
    assert main([*command, "--force"]) == 0
    assert list(tmp_path.iterdir()) == [out]
    forced = Bundle.open(out, verify=True)
    assert forced.report.quality is not None
    assert forced.report.quality["met"] is False
    assert record_of(forced)["met"] is False
    assert {row["format"] for row in record_of(forced)["layers"]} == {"f16"}
    assert {row["precision"] for row in forced.report.precisions} == {"f16", "f32"}


def test_blocks_on_an_npu_have_its_formats(source: Path, tmp_path: Path) -> None:
    found = compile_model(
        source, tmp_path / "out.edge", max_ppl_increase=0.2, target="lunarlake", target_devices=["NPU@f16"],
        objective="latency", kernels=False,
    )  # fmt: skip
    record = record_of(found)
    assert record["target"]["profile"]
    assert record["unit"] == "us"
    plan = Plan.from_json(record["target"]["plan"])
    placements = [p for phase in plan.phases.values() for p in phase if p.config.kind is DeviceKind.NPU]
    blocks = sorted({index for p in placements for index in range(p.first, p.last + 1)})
    assert blocks == [1, 2, 3]
    layers = [row for row in record["layers"] if set(row["blocks"]) & set(blocks)]
    assert len(layers) == 8
    assert all(named(row["format"]).npu for row in layers)
    assert any(row["format"] == "int4-sym-pc" for row in layers)
    assert found.graph is not None
    findings = check(ov.Core().read_model(found.model_path), found.graph, blocks=blocks)
    assert [str(one) for one in findings if "weights" in str(one) or "INT4" in str(one)] == []
    price = record["target"]["npu_price"]
    assert price["bytes_free"] <= price["bytes_recipe"]
    assert set(price) == {"increase_free", "increase_recipe", "bytes_free", "bytes_recipe"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "fp16"}, "excludes weights"),
        ({"group_size": 64}, "excludes weights, group_size"),
        ({"awq": True}, "excludes"),
        ({"format": "onnx"}, "excludes .*onnx"),
        ({"max_ppl_increase": 0}, "max_ppl_increase is 0, expected a number above 0 and below 1"),
        ({"max_ppl_increase": -0.01}, r"max_ppl_increase is -0\.01"),
        ({"max_ppl_increase": nan}, "max_ppl_increase is nan"),
        ({"max_ppl_increase": 1.0}, r"max_ppl_increase is 1\.0"),
        ({"max_ppl_increase": None, "calibration": "x.txt"}, r"calibration is 'x\.txt', and needs max_ppl_increase"),
        ({"max_ppl_increase": None, "target": "lunarlake"}, "target is 'lunarlake', and needs max_ppl_increase"),
        ({"max_ppl_increase": None, "objective": "latency"}, "objective is 'latency', and needs"),
        ({"calibration": "nowhere.txt"}, r"calibration nowhere\.txt: no such file or folder"),
        ({"target": "sunlake"}, "profile 'sunlake' is neither a file nor one of .*lunarlake"),
        ({"target": "lunarlake", "target_devices": ["NPU@f16", "CPU@f8"]}, "target_devices: .* has no CPU@f8; it has"),
        ({"target": "lunarlake", "target_devices": []}, "target_devices is empty"),
        ({"target": "lunarlake", "objective": "beauty"}, "objective is 'beauty', expected one of"),
        ({"target_devices": ["NPU@f16"]}, "need target"),
        ({"objective": "latency"}, "need target"),
        ({"npu": ["4000"]}, "npu with max_ppl_increase needs target"),
        ({"seed": -1}, "seed is -1, expected a whole number, 0 or more"),
        ({"seed": 0.5}, r"seed is 0\.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Found before the model is looked at: there is none."""
    with pytest.raises(EdgertError, match=message):
        compile_model(tmp_path / "none", tmp_path / "out.edge", **{"max_ppl_increase": BUDGET, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-ppl-increase", "1%", "--weights", "int8"], "--weights int8 gives one: leave one out"),
        (["--max-ppl-increase", "100%"], "max_ppl_increase is 1.0, expected"),
        (["--max-ppl-increase", "0"], "max_ppl_increase is 0.0, expected"),
        (["--calibration", "x.txt"], "needs max_ppl_increase"),
        (["--max-ppl-increase", "1%", "--target-devices", "NPU@f16"], "need target"),
        (["--max-ppl-increase", "-1%"], "--max-ppl-increase"),
        (["--max-ppl-increase", "nan"], "--max-ppl-increase"),
        (["--max-ppl-increase", "much"], "--max-ppl-increase"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    try:
        code = main(["compile", str(tmp_path / "none"), "-o", str(tmp_path / "out.edge"), *arguments])
    except SystemExit as stop:  # argparse's
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def test_models_that_have_no_such_choice(
    source: Path, encoder_folder: Path, decoder_folder: Path, tmp_path: Path, known_export: None
) -> None:
    compressed = write_source(tmp_path / "int8", decoder_folder, compress(model_of("small"), "int8"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    sources = (
        (compressed, "int8: its weights are compressed already"),
        (encoder_folder, "it is an encoder"),
        (tmp_path / "model.gguf", r"needs float weights; those of .*model\.gguf"),
    )
    for path, message in sources:
        with pytest.raises(UsageError, match=f"max_ppl_increase.*{message}"):
            compile_model(path, tmp_path / "out.edge", max_ppl_increase=BUDGET)
    assert not list(tmp_path.glob("*out.edge*"))


@pytest.mark.parametrize(("content", "message"), [(b"too short", "at least 4096"), (b"\xff\xfe\xff", "UTF-8")])
def test_bad_calibration_texts(content: bytes, message: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"texts\.txt.*{message}"):
        compile_model(source, tmp_path / "out.edge", max_ppl_increase=BUDGET, calibration=path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_taken(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".out.edge.search"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(UsageError, match="is no search of edgert's"):
        compile_model(source, tmp_path / "out.edge", max_ppl_increase=BUDGET)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_weights_that_are_no_numbers_are_refused(source: Path, decoder_folder: Path, tmp_path: Path) -> None:
    model = model_of("small")
    weight = next(n for n in model.get_ops() if n.get_type_name() == "Constant" and list(n.shape) == [128, 64])
    values = np.array(weight.data)
    values[3, 4] = nan
    replaced = ov.opset13.constant(values, ov.Type.f16)
    for port in weight.output(0).get_target_inputs():
        port.replace_source_output(replaced.output(0))
    broken = write_source(tmp_path / "broken", decoder_folder, model)
    with pytest.raises(EdgertError, match=r"nan|finite"):
        compile_model(broken, tmp_path / "out.edge", max_ppl_increase=BUDGET)
    assert not (tmp_path / "out.edge").exists()

"""The benchmark of the speed of mixes: how a mix gets to another shape, and what is made of the figures."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import openvino as ov
import pytest
from edgert.converters import quality
from edgert.converters.build import save
from edgert.converters.canonical import canonical_decoder
from edgert.converters.compress import to_fp16, weight_uses
from edgert.converters.mixed.matrices import find_matrices
from rich.console import Console
from tiny_models import VOCAB_SIZE, exported

from edgert import native
from edgert.bundle import Bundle, ModelFacts, Report, create
from edgert.cutting import cut
from edgert.partition import annotate
from edgert.precision.formats import FORMATS, named

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: its modules find each other beside the one that runs
forms, speed, measure = (import_module(name) for name in ("mixed_forms", "mixed_speed", "runtimes.measure"))
Slot = forms.Slot
QUALITY = {"budget": 0.01, "increase": 0.004, "bound": 0.009, "bits": 4.5}


def layers(count: int, width: int = 256, *, tied: bool = True) -> list[Any]:
    """The matrices of a decoder with four products in an attention and three in an FFN."""
    found, number = [Slot("embed/embedding", "embedding+head" if tied else "embedding", (4096, width))], 0
    for layer in range(count):
        for kind, products in (("attention", 4), ("ffn", 3)):
            for _ in range(products):
                suffix = f"_{number}" if number else ""
                found.append(Slot(f"{kind}.{layer}/linear{suffix}", "linear", (width, width)))
                number += 1
    return found if tied else [*found, Slot(f"head/linear_{number}", "head", (4096, width))]


def donor(slots: list[Any], *names: str) -> Any:
    """With the formats, over and over."""
    chosen = [named(names[index % len(names)]) for index in range(len(slots))]
    return forms.Donor("trained", tuple(slots), tuple(chosen), QUALITY)


def test_a_mix_is_transferred_to_its_own_shape_as_it_is_in_whatever_order_matrices_are_met() -> None:
    slots = layers(5)
    given = donor(slots, *(kind.name for kind in FORMATS))
    expected = {slot.name: kind for slot, kind in zip(slots, given.formats, strict=True)}
    assert forms.transfer(given, slots) == expected
    assert forms.transfer(given, slots[::-1]) == expected


def test_matrices_take_after_those_of_their_role_place_and_depth() -> None:
    given = donor(layers(3), "int4-asym-g64")
    marked = {"attention.0/linear_1": "int8", "ffn.2/linear_20": "int4-sym-pc", "embed/embedding": "int4-asym-g32"}
    chosen = (named(marked.get(slot.name, "int4-asym-g64")) for slot in given.slots)
    found = forms.transfer(replace(given, formats=tuple(chosen)), layers(9, 1024))
    special = {name: kind.name for name, kind in found.items() if kind.name != "int4-asym-g64"}
    # Of nine layers the first two are nearest to the first of three, and the last two to the last; the third and the
    # seventh are as near to the one in the middle, and there the earlier one counts.
    assert special == {
        "embed/embedding": "int4-asym-g32",
        **{f"attention.{layer}/linear_{7 * layer + 1}": "int8" for layer in (0, 1, 2)},
        **{f"ffn.{layer}/linear_{7 * layer + 6}": "int4-sym-pc" for layer in (7, 8)},
    }


def test_a_table_that_is_also_the_head_takes_after_a_head_and_both_take_after_it() -> None:
    tied, apart = layers(1), layers(1, tied=False)
    formats = ["int8", *["int4-sym-pc"] * 7, "int4-asym-g32"]
    assert forms.transfer(donor(apart, *formats), tied)["embed/embedding"].name == "int4-asym-g32"
    found = forms.transfer(donor(tied, *formats[:-1]), apart)
    assert (found["embed/embedding"].name, found["head/linear_7"].name) == ("int8", "int8")


def test_blocks_that_the_donor_has_not_get_what_other_products_have() -> None:
    experts = [Slot("moe.0/experts", "linear", (8, 256, 256)), Slot("moe.0/router_1", "linear", (8, 256))]
    found = forms.transfer(donor(layers(2), "int4-sym-g64"), experts)
    assert [kind.name for kind in found.values()] == ["int4-sym-g64", "int4-sym-g64"]


@pytest.mark.parametrize(
    ("format", "shape", "expected"),
    [
        ("int4-asym-g128", (8, 256), "int4-asym-g128"),
        ("int4-asym-g128", (8, 128), "int4-asym-pc"),  # a group as large as a row is the row
        ("int4-sym-g128", (8, 192), "int4-sym-pc"),  # 192 is nearer to it than 64
        ("int4-sym-g128", (8, 320), "int4-sym-g64"),
        ("int4-asym-g64", (8, 96), "int4-asym-pc"),
        ("int4-asym-g64", (8, 1056), "int4-asym-g32"),
        ("int4-asym-pc", (8, 100), "int4-asym-pc"),
        ("int4-asym-g32", (4, 8, 64), "int4-asym-g32"),
        ("f16", (4, 8, 64), "f16"),
    ],
)
def test_a_group_that_does_not_fit_gives_way_to_the_nearest(format: str, shape: tuple[int, ...], expected: str) -> None:
    assert forms.fitting(named(format), shape).name == expected


def record(slots: list[Any], *names: str) -> dict[str, Any]:
    given = donor(slots, *names)
    return {
        "model": "trained", "budget": 0.01, "result": {"increase": 0.004, "bound": 0.009, "bits_per_weight": 4.5},
        "layers": [
            {"name": slot.name, "role": slot.role, "shape": [*slot.shape], "format": kind.name}
            for slot, kind in zip(given.slots, given.formats, strict=True)
        ],
    }  # fmt: skip


def test_a_donor_is_read_from_a_bundle_or_its_record(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(record(layers(2), "f16", "int8")), "utf-8")
    assert forms.read_donor(file) == forms.read_donor(tmp_path) == donor(layers(2), "f16", "int8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({**record(layers(1), "f16"), "result": {}}), "'increase'"),
        (json.dumps(record([], "f16")), "no matrices"),
        (json.dumps(record(layers(1), "f16")).replace("f16", "int3"), "'int3' is not known"),
        (None, "FileNotFoundError"),
    ],
)
def test_what_is_no_record_of_a_mix_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "quality.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        forms.read_donor(tmp_path)
    assert "quality.json" in str(caught.value)


@pytest.fixture(scope="module")
def tiny_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 as an f16 bundle."""
    model = exported("qwen3")[1]
    canonical_decoder(model)
    to_fp16(model)
    out = tmp_path_factory.mktemp("shape") / "tiny.edge"
    facts = ModelFacts("tiny", "decoder", "openvino", "qwen3", VOCAB_SIZE, 64, 256, 2, (2,), 1, "fp16", 1)
    with create(out) as draft:
        (draft.path / "tokenizer").mkdir()
        (draft.path / "tokenizer" / "tokenizer.json").write_text("{}")
        rows, graph = save(model, draft, [], partial(quality.check_cut, task="decoder", vocab_size=VOCAB_SIZE))
        draft.finish(facts, Report("test: tiny", {}, rows, []), graph)
    return out


def stored(bundle: Path) -> dict[str, str]:
    """How the matrices of a bundle lie in its file, by the operation's name."""
    model = ov.Core().read_model(bundle / "model.xml")
    return {
        use.node.get_friendly_name().partition("/")[0]: use.constants[0].get_element_type().get_type_name()
        for use in weight_uses(model)
    }


def test_forms_of_a_shape_have_what_they_are_named_for_and_are_made_once(tiny_f16: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = forms.Forms(tiny_f16, tmp_path / "forms", told.append)
    slots = layers(1, tied=False)
    given = donor(slots, "int8", *["int4-asym-g32"] * 4, *["int4-sym-pc"] * 3, "f16")
    assert made.f16().path == tiny_f16
    assert made.f16().bits == 16

    mixed = made.mixed(given)
    assert Bundle.open(mixed.path, verify=True).facts.weights == "mixed"
    assert (mixed.path / "kernels.bin").is_file() == native.status().loads
    operations = stored(mixed.path)
    kinds = {name: kind for name, kind in operations.items() if name.startswith("linear")}
    by_layer = ["u4"] * 4 + ["i4"] * 3
    assert [kinds[f"linear_{n}" if n else "linear"] for n in range(14)] == by_layer * 2
    assert operations["embedding"] == "u8"
    assert kinds["linear_14"] == "f16"
    assert mixed.formats["f16"] == pytest.approx(mixed.formats["u8 per channel"])
    assert sum(mixed.formats.values()) == pytest.approx(1)
    model = ov.Core().read_model(tiny_f16 / "model.xml")
    graph = annotate(model)
    matrices = find_matrices(graph, cut(model, graph, [(block.index, block.index) for block in graph.blocks]))
    chosen = forms.transfer(given, [Slot(matrix.name, matrix.role, matrix.shape) for matrix in matrices])
    assert mixed.bytes == sum(chosen[matrix.name].total_bytes(matrix.shape) for matrix in matrices)
    assert mixed.bits == 8 * mixed.bytes / sum(matrix.elements for matrix in matrices)

    told.clear()
    assert made.mixed(replace(given, quality={})).path == mixed.path
    assert told == []
    other = made.mixed(replace(given, formats=(named("f16"),) * len(slots)))
    assert other.bits == 16
    assert list((tmp_path / "forms").iterdir()) == [other.path]


def test_a_shape_must_be_f16(tiny_f16: Path, tmp_path: Path) -> None:
    int8 = forms.Forms(tiny_f16, tmp_path / "forms", str).uniform("int8")
    assert {*stored(int8.path).values()} == {"u8"}
    assert 8 < int8.bits < 9
    with pytest.raises(ValueError, match="weights int8, expected fp16"):
        forms.Forms(int8.path, tmp_path / "others", str).f16()


def form(key: str, trained: Any = None) -> Any:
    return forms.Form(key, Path(key), 16.0 if key == "f16" else 4.5, 1 << 20, {"u4 group 64": 1.0}, trained)


class Fake:
    """A process that takes as long as its form does, or fails."""

    asked: ClassVar[list[tuple[str, int]]] = []
    ended: ClassVar[list[str]] = []
    step_s: ClassVar[dict[str, float]] = {"f16": 0.1, "mix-a": 0.03, "mix-b": 0.05}
    broken = ""

    def __init__(self, runtime: Any, threads: int, vocab_size: int, log: Any) -> None:
        self.runtime = runtime

    def ask(self, limit_s: float, **request: Any) -> dict[str, Any]:
        if request["do"] != "run":
            return {}
        assert (request["prompt"], request["new"]) == (512, 34)
        Fake.asked.append((self.runtime.name, request["seed"]))
        if self.runtime.name == Fake.broken:
            raise measure.RuntimeFailedError("no memory")
        step = Fake.step_s[self.runtime.name.partition(" ")[0]]
        late = 9.0 if len(Fake.asked) <= 3 else 0.0  # in the round that does not count
        return {"stamps_s": [late + 1.0, late + 5.0, *(late + 5.0 + step * n for n in range(1, 33))]}

    def end(self) -> None:
        Fake.ended.append(self.runtime.name)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs three runs for some rounds and gives them."""
    monkeypatch.setattr(speed, "Process", Fake)
    monkeypatch.setattr(speed, "read_gbps", lambda threads: 20.0)
    Fake.asked, Fake.ended = [], []

    def run(broken: str = "") -> tuple[list[Any], list[Any], list[float]]:
        Fake.broken = broken
        chosen = [form("f16"), form("mix-a", donor(layers(1), "int8")), form("mix-b", donor(layers(1), "int8"))]
        runs = speed.planned(chosen, {"CPU@f32+dq"})
        return chosen, runs, speed.measure(runs, 3, 2, 4096, 10, io.BytesIO(), Console(file=io.StringIO()))

    return run


def test_runs_take_turns_and_the_first_round_does_not_count(measured: Any) -> None:
    _, runs, rates = measured()
    assert rates == [20.0] * 3
    names = [run.name for run in runs]
    assert [name for name, _ in Fake.asked] == [*names, *names[1:], names[0], *names[2:], *names[:2], *names]
    assert len({seed for _, seed in Fake.asked}) == 12  # no prompt comes twice
    assert sorted(Fake.ended) == sorted(names)
    assert [run.prefill.values for run in runs] == [[1000.0] * 3] * 3
    assert [run.decode.median for run in runs] == pytest.approx([100, 30, 50])


def test_mixes_are_held_against_the_fastest_f16(measured: Any) -> None:
    chosen, runs, rates = measured()
    slow = speed.Run(chosen[0], "CPU@f32")
    slow.decode.values = [200.0] * 3
    result = speed.described("a shape", chosen, [slow, *runs], 3, 2, rates)
    assert result["against"] == "CPU@f32+dq"
    a, b = result["asked"]
    assert a["each"] == pytest.approx({"CPU@f32": 200 / 30, "CPU@f32+dq": 100 / 30})
    assert (a["met"], b["met"]) == (True, False)
    assert b["value"] == pytest.approx(2.0)
    text = speed.page(result)
    assert "3.33 (3.33–3.33)" in text
    assert "6.67 against CPU@f32, 3.33 against CPU@f32+dq; asked 2.5 against the fastest: met." in text
    assert "2.00 against CPU@f32+dq; asked 2.5 against the fastest: missed." in text
    assert "+0.40% perplexity" in text
    assert json.loads(json.dumps(result)) == result
    assert speed.picture(result).count("mix-a, CPU@f32+dq") == 1


def test_who_fails_is_left_out_and_its_words_are_shown(measured: Any) -> None:
    chosen, runs, rates = measured("mix-a CPU@f32+dq")
    assert len([name for name, _ in Fake.asked if name == Fake.broken]) == 1
    result = speed.described("a shape", chosen, runs, 3, 2, rates)
    assert [asked["met"] for asked in result["asked"]] == [None, False]
    assert "mix-a CPU@f32+dq: no memory" in speed.page(result)


def test_without_f16_nothing_is_compared(measured: Any) -> None:
    chosen, runs, rates = measured("f16 CPU@f32+dq")
    result = speed.described("a shape", chosen, runs, 3, 2, rates)
    assert [row["times"] for row in result["runs"]] == [None] * 3
    assert [asked["met"] for asked in result["asked"]] == [None, None]
    assert "not measured" in speed.page(result)


def test_only_what_the_machine_has_is_measured() -> None:
    runs = speed.planned([form("f16"), form("int4"), form("mix-a")], {"CPU@f32", "CPU@kernels"})
    assert [run.name for run in runs] == ["f16 CPU@f32", "f16 CPU@kernels", "int4 CPU@kernels", "mix-a CPU@kernels"]


def test_what_is_kept_is_whole(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "DOCUMENT", tmp_path / "mixed_speed.json")
    chosen, runs, rates = measured()
    result = speed.described("a shape", chosen, runs, 3, 2, rates)
    speed.keep(result)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".svg"]
    assert json.loads((tmp_path / "mixed_speed.json").read_text("utf-8")) == result

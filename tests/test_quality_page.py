"""The page and the lines about a mix of precisions: all of a record is in them, and nothing of it is markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_plan_report import Page

from edgert.charts import Axis, chart_svg, log_ticks
from edgert.cli import main
from edgert.page import size
from edgert.precision import FORMATS
from edgert.quality_charts import FORMAT_COLOURS, front_svg, kind_colours, kind_of, layers_svg, percent, proxy_svg
from edgert.quality_page import figure, headline, quality_html, quality_lines, summary_lines, value_text

SHAPE = (96, 256)
EVIL = '<script>alert("x")</script>&\'"'


def layer(name: str, role: str, blocks: list[int], number: int) -> dict[str, Any]:
    """A matrix whose format depends on its number; every format is an option."""
    options = [
        {"format": kind.name, "loss": (16 - kind.bits) * (1 + number) * 1.1e-6 * (1 + i / 7),
         "bytes": kind.total_bytes(SHAPE)}
        for i, kind in enumerate(FORMATS)
    ]  # fmt: skip
    chosen = options[number % len(options)]
    return {
        "name": name, "role": role, "blocks": blocks, "shape": list(SHAPE), **chosen, "anchor": "int4-asym-g128",
        "method": None if chosen["format"] == "f16" else "awq+scale", "measured": 3.21e-4 + number * 1e-6,
        "measured_loss": 2e-4, "options": options,
        "metrics": {"weight_quantization_error": 0.5 + number, "hessian_input_activation": 1 / (1 + number)},
    }  # fmt: skip


def mix(name: str, predicted: float, increase: float, taken: int, value: float | None) -> dict[str, Any]:
    return {
        "name": name, "predicted": predicted, "perplexity": 5 * (1 + increase), "increase": increase,
        "standard_error": 0.0011, "kl": predicted * 1.1, "agreement": 0.9712, "bytes": taken, "value": value,
    }  # fmt: skip


def made(layers: int = 4, *, target: bool = False) -> dict[str, Any]:
    """A record of a model of so many decoder layers, with a tied table; with a plan for a CPU and an NPU, or none."""
    head = 2 * layers + 1
    rows = [layer("embedding/table", "embedding+head", [0, head], 1)]
    for i in range(layers):
        rows += [layer(f"attention.{i}/linear_{k}", "linear", [1 + 2 * i], 4 * i + k) for k in range(4)]
        rows += [layer(f"ffn.{i}/linear_{k}", "linear", [2 + 2 * i], 3 * i + k + 5) for k in range(3)]
    taken, exact = sum(row["bytes"] for row in rows), sum(2 * math.prod(row["shape"]) for row in rows)
    value = (lambda size: size / 3) if target else (lambda size: size)
    mixes = [
        mix(f"random {i + 1}", 0.005 * 1.12**i, math.expm1(0.0047 * 1.12**i), exact // 4 + (40 - i) * exact // 100,
            None if target else exact // 4 + (40 - i) * exact // 100)
        for i in range(32)
    ]  # fmt: skip
    mixes += [mix(f"candidate {i}", 0.004 + i / 2000, 0.004 + i / 1900, taken - 99 * i, value(taken)) for i in range(3)]
    mixes += [mix("int8", 0.0002, -0.0004, exact // 2, value(exact // 2))]
    plan = {
        "placements": [
            {"first": 0, "last": 0, "config": "CPU@kernels"}, {"first": 1, "last": head, "config": "NPU@f16"},
        ],
        "decode": [{"first": 0, "last": head, "config": "CPU@kernels"}], "rationale": "made up", "warnings": [],
    }  # fmt: skip
    return {
        "version": 1, "model": "bookworm", "budget": 0.01, "met": True,
        "reference": {"what": "the model's own weights in f16, computed in f32", "perplexity": 5.0123},
        "protocol": {"text": "books.txt", "sha256": "0f" * 32, "generated": False, "seed": 0, "window": 512,
                     "stride": 511, "bos": 1, "calibration_tokens": 8193, "search_tokens": 4097,
                     "verify_tokens": 12289},
        "result": {"perplexity": 5.0539, "increase": 0.0083, "standard_error": 0.001, "bound": 0.00994, "kl": 0.00812,
                   "agreement": 0.9634, "bytes": taken, "bits_per_weight": 16 * taken / exact, "value": value(taken),
                   "f16_bytes": exact},
        "layers": rows, "measured": mixes,
        "front": [{"predicted": 1e-5 * 1.4**i, "bytes": size, "value": value(size)}
                  for i, size in enumerate(range(exact, exact * 2 // 5, -exact // 40))],
        "unit": "us" if target else "bytes",
        "proxy": {"rank_correlation": 0.987, "mixes": 32, "slope": 0.94, "kl_rank_correlation": 0.9911,
                  "metrics": {"weight_quantization_error": 0.713, "hessian_input_activation": 0.642}},
        "configs": [
            {**mix("", 0, 0.00831, 0, 0), "config": "CPU@f32", "bound": 0.00991, "used": True},
            {**mix("", 0, 0.00877, 0, 0), "config": "CPU@kernels", "bound": 0.00998, "used": False},
        ],
        "target": {
            "profile": "lunarlake", "objective": "latency", "value": value(taken), "unit": "us", "plan": plan,
            "npu_price": {"increase_free": 0.0081, "increase_recipe": 0.0093, "bytes_free": taken,
                          "bytes_recipe": taken + 5000},
        } if target else None,
        "seconds": {"measure what compressing each matrix costs": 61.37, "search the best mix": 12.25},
    }  # fmt: skip


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def numbers(picture: str) -> Iterator[tuple[float, float]]:
    """Where things are in a picture: corners of rectangles, centres of circles, starts of texts, corners of paths."""
    for element in ElementTree.fromstring(picture).iter():
        tag, a = element.tag.rpartition("}")[2], element.attrib
        if tag == "rect" and "x" in a:
            x, y = float(a["x"]), float(a["y"])
            yield x, y
            yield x + float(a["width"]), y + float(a["height"])
        elif tag == "circle":
            yield float(a["cx"]), float(a["cy"])
        elif tag == "text" and "x" in a:
            yield float(a["x"]), float(a["y"])
        elif tag == "path":
            x = y = math.nan
            for kind, first, second in re.findall(r"([MLHV])(-?[\d.]+)(?: (-?[\d.]+))?", a["d"]):
                x, y = (float(first), float(second)) if kind in "ML" else (x, y)
                x, y = (float(first), y) if kind == "H" else (x, float(first)) if kind == "V" else (x, y)
                yield x, y


def pictures(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("layers", [1, 4, 29, 70])
def test_all_of_a_record_is_in_the_page(layers: int, target: bool) -> None:
    record = made(layers, target=target)
    html = quality_html(record)
    page = Page(html)
    told = "".join(pictures(html))
    for row in record["layers"]:
        assert row["name"] in page.text
        assert f"<title>{row['name']}: {row['format']}" in told
        assert f"{row['loss']:.3g}" in page.text
        assert size(row["bytes"]) in page.text
        assert all(f"{option['loss']:.3g}" in page.text for option in row["options"])
        assert f"{row['measured']:.3g}" in page.text
    for row in record["measured"]:
        assert f"<title>{row['name']}: " in told
        assert f"<td>{row['name']}<td class=n>{row['predicted']:.3g}" in html
        assert f"{100 * row['increase']:+.3g} % ± 0.11" in page.text
    for row in record["front"]:
        assert f"<td class=n>{row['predicted']:.3g}" in html
    for row in record["configs"]:
        assert f"<td>{row['config']}<td class=n>{100 * row['increase']:+.3g} % ± 0.11" in html
    for text in (
        "0f" * 32,
        "books.txt",
        "8193",
        "4097",
        "12289",
        "61.4",
        "12.2",
        "0.987",
        "0.991",
        "0.713",
        "0.642",
        "5.012",
    ):
        assert text in page.text
    assert ("lunarlake" in page.text) == target
    assert ("540.6 kB at +0.93 %" in page.text) == (target and layers == 4)
    assert len(pictures(html)) == 4 + target
    assert {"script", "link", "img"}.isdisjoint(page.tags)
    assert not any(name in {"src", "href"} for name, _ in page.attributes)


@pytest.mark.parametrize("layers", [1, 29, 70])
def test_nothing_is_drawn_outside_of_its_picture(layers: int) -> None:
    for picture in pictures(quality_html(made(layers, target=True))):
        wide, high = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)[0])
        found = list(numbers(picture))
        assert len(found) > 10
        assert all(0 <= x <= wide and 0 <= y <= high for x, y in found)


def test_a_cell_for_each_block_that_reads_a_matrix() -> None:
    record = made(29, target=True)
    cells = re.findall(r'<rect x="([\d.]+)"[^>]*fill="([^"]+)"><title>([^:]+): ([\w-]+)', layers_svg(record))
    matrices = {row["name"]: row["format"] for row in record["layers"]}
    drawn = [cell for cell in cells if cell[2] in matrices]
    assert len(drawn) == len(matrices) + 1  # the tied table is read by two blocks
    assert all(colour == FORMAT_COLOURS[matrices[name]] and form == matrices[name] for _, colour, name, form in drawn)
    columns = {name.partition("/")[0]: x for x, _, name, _ in drawn if not name.startswith("embedding")}
    assert len(set(columns.values())) == 58
    runs = [title for _, _, title, phase in cells if phase in {"prefill", "decode"}]
    assert len(runs) == 2 * 60
    assert runs.count("head") == 2  # has no matrix of its own


def test_every_format_has_a_colour() -> None:
    assert list(FORMAT_COLOURS) == [kind.name for kind in FORMATS]
    assert len(set(FORMAT_COLOURS.values())) == len(FORMATS)


def test_a_format_that_is_not_known_is_grey() -> None:
    record = made(1)
    record["layers"][0]["format"] = "nf4"
    assert 'fill="#999999"><title>embedding/table: nf4 by' in layers_svg(record)
    assert "nf4" in quality_html(record)


def strings(value: Any, path: str = "") -> Iterator[tuple[Callable[[Any], None], str]]:
    """How to replace each text of a record, and where it is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, str):
            yield lambda text, value=value, key=key: value.__setitem__(key, text), f"{path}.{key}"  # type: ignore[misc]
        yield from strings(item, f"{path}.{key}")


def test_names_are_no_markup() -> None:
    record = made(2, target=True)
    for replace, where in strings(record):
        if "plan" not in where and where not in {".unit"}:
            replace(EVIL)
    record["proxy"]["metrics"] = {EVIL: 0.5}
    record["seconds"] = {EVIL: 1.5}
    record["protocol"][EVIL] = EVIL
    html = quality_html(record)
    page = Page(html)
    assert "script" not in page.tags
    assert EVIL in page.text
    assert "<script" not in html
    for picture in pictures(html):
        ElementTree.fromstring(picture)


@pytest.mark.parametrize("name", ["model", "reference", "protocol", "proxy", "configs", "target", "seconds"])
def test_a_part_may_be_missing(name: str) -> None:
    record = made(2, target=name != "target")
    for lacking in (without(record, name), {**record, name: None}):
        assert "Every layer" in Page(quality_html(lacking)).headings
        assert headline(lacking) == headline(record)
        assert quality_lines(lacking)


def test_the_least_that_a_record_holds() -> None:
    names = ("model", "reference", "protocol", "proxy", "configs", "target", "seconds")
    record = {**without(made(1), *names), "measured": [], "front": []}
    record["result"] = {"increase": 0.02, "bytes": 1000}
    record["layers"] = [
        {name: row[name] for name in ("name", "role", "blocks", "shape", "format", "bytes", "loss")}
        for row in record["layers"]
    ]
    page = Page(quality_html(record))
    assert page.headings == ["Layers", "Quality against size", "Every layer"]
    assert "? bits a weight" in page.text


def test_a_target_without_a_plan_or_a_price() -> None:
    record = made(2, target=True)
    record["target"] |= {"plan": None, "npu_price": None}
    page = Page(quality_html(record))
    assert "Target" in page.headings
    assert "NPU" not in page.text


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
def test_numbers_that_are_none(odd: float | None) -> None:
    record = made(2, target=True)
    for row in record["measured"]:
        row |= {"standard_error": odd, "kl": odd, "value": odd}
    record["measured"][0]["predicted"] = odd
    record["front"][0]["value"] = odd
    record["proxy"]["rank_correlation"] = odd
    for picture in pictures(quality_html(record)):
        assert "nan" not in picture
        assert "inf" not in picture


def test_marks_stand_where_their_numbers_say() -> None:
    record = made(4)
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^:]+):', front_svg(record, "bytes"))
    placed = {name: (float(x), float(y)) for x, y, name in circles}
    rows = {row["name"]: row for row in record["measured"]}
    inside = [name for name in rows if rows[name]["increase"] > 0.0002]
    assert len(inside) == 35
    by_bytes, by_loss = (sorted(inside, key=lambda name: rows[name][what]) for what in ("bytes", "increase"))
    assert [placed[name][0] for name in by_bytes] == sorted(placed[name][0] for name in inside)
    assert [placed[name][1] for name in by_loss] == sorted((placed[name][1] for name in inside), reverse=True)
    bottom = max(y for _, y in placed.values())
    assert placed["int8"][1] == bottom  # its increase is below zero, where a logarithmic axis has no place
    assert front_svg(record, "bytes").count("stroke-dasharray") == 2  # what is predicted, and the budget
    record["measured"][0]["predicted"] = 0.0  # has no place on a logarithmic axis
    svg = proxy_svg(record, "increase")
    assert "chosen" not in svg
    marks = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>random', svg)
    assert len(marks) == 31
    for x, y in marks:  # both axes have the same ends, and a measured loss is a little below the predicted one
        assert -0.02 < (320 - float(y)) / 286 - (float(x) - 70) / 660 < 0


def test_the_front_is_a_line_over_what_it_is_of() -> None:
    record = made(4, target=True)
    lines = {
        what: front_svg(record, what).count('class="line" fill="none" stroke-dasharray') for what in ("bytes", "value")
    }
    assert lines == {"bytes": 0, "value": 1}
    html = quality_html(record)
    assert "<th class=n>size<th class=n>time in all" in html
    assert "least time in all that is predicted" in html
    page = quality_html(made(4))
    assert "least size that is predicted" in page
    assert page.count("<th class=n>size") == 3


def test_logarithmic_axes() -> None:
    assert log_ticks(0.02, 20) == [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    assert log_ticks(0.01, 1000) == [0.01, 0.1, 1, 10, 100, 1000]
    assert log_ticks(2.1, 3.9) == [2, 3, 4]
    for only in (1.0, 9.0, 9.5, 1e4, 3e-5):
        found = log_ticks(only, only)
        assert len(found) >= 2
        assert found[0] <= only <= found[-1]
    axis = Axis("x", [0.1, 1, 10], log=True)
    assert [axis.share(v) for v in (-1, 0, 0.1, 10, 99, math.inf)] == [0, 0, 0, 1, 1, 1]
    assert axis.share(1) == pytest.approx(0.5)
    assert Axis("x", [1, 2, 3]).share(2.5) == 0.75


def test_an_empty_chart() -> None:
    ElementTree.fromstring(chart_svg([], Axis("x", [0, 1]), Axis("y", [0, 1])))
    assert front_svg({**made(1), "measured": [], "front": [], "result": {"increase": 1, "bytes": 0}}, "bytes") == ""
    assert proxy_svg({**made(1), "measured": []}, "kl") == ""


def test_no_budget_has_no_line() -> None:
    record = {**made(2), "budget": 0.0}
    assert front_svg(record, "bytes").count("stroke-dasharray") == 1
    assert "at most 0 % asked" in headline(record)


def test_kinds_of_mixes() -> None:
    assert [kind_of(n) for n in ("random 12", "npu recipe", "final", "12", "free mix 3")] == [
        "random", "npu recipe", "final", "12", "free mix",
    ]  # fmt: skip
    colours = kind_colours([f"kind{'x' * i}" for i in range(9)] + ["random 1"])
    assert len(colours) == 10
    assert list(colours.values())[-4:] == ["#999999"] * 4


def test_the_headline_and_the_lines() -> None:
    record = made(4, target=True)
    assert headline(record) == (
        "+0.83 % perplexity ± 0.1 (at most 1 % asked), 6.01 bits a weight, 535.6 kB (f16: 1.4 MB)"
    )
    assert "asked, NOT kept" in headline({**record, "met": False})
    lines = dict(quality_lines(record))
    assert lines["budget"] == "at most 1 % more perplexity, kept"
    assert lines["with 95 % confidence"] == "at most +0.994 %"
    assert lines["perplexity"] == "5.054, of the source 5.012"
    assert lines["time in all"] == "179 ms"
    assert sum(float(part.split(" %")[0]) for part in lines["formats"].split(", ")) == pytest.approx(100, abs=0.2)
    assert lines["rank correlation of predictions"] == "0.987 over 32 random mixes"
    assert "540.6 kB at +0.93 %" in lines["price of the NPU's recipe"]


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [(2e6, "bytes", "2.0 MB"), (2.5e3, "us", "2.5 ms"), (2.5e6, "uJ", "2.5 J"), (7.0, "apples", "7 apples"),
     (None, "us", "?"), (math.nan, "us", "?")],
)  # fmt: skip
def test_values_for_people(value: float | None, unit: str, told: str) -> None:
    assert value_text(value, unit) == told


def test_figures_for_people() -> None:
    assert [figure(v) for v in (0.12345, 12345.6, 7, True, None, "7")] == ["0.123", "12346", "7", "?", "?", "?"]
    assert math.isfinite(percent(1e6))


def test_inspect_shows_quality(
    fake_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = {
        "budget": 0.01, "met": False, "increase": 0.0123, "standard_error": 0.001, "bound": 0.01395,
        "perplexity": 5.0739, "reference": 5.0123, "text": "[b]books.txt", "sha256": "0f" * 32, "tokens": 12289,
        "config": "CPU@kernels",
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", "120")
    path = fake_bundle()
    assert main(["inspect", str(path)]) == 0
    assert "budget" not in capsys.readouterr().out
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    manifest["report"]["quality"] = quality
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for value in dict(summary_lines(quality)).values():
        assert value in out
    assert "quality.html" not in out
    assert "at most 1 % more perplexity, NOT kept" in out
    assert "CPU@kernels, 12289 tokens of [b]books.txt (0f0f0f0f0f0f…)" in out
    (path / "quality.html").write_text("page", "utf-8")
    manifest["files"]["quality.html"] = {"bytes": 4, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert main(["inspect", str(path)]) == 0
    assert "quality.html has every layer" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["quality"] == quality

"""`edgert plan` with a profile: every way to name a model, the table, the JSON, the page, and its errors."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from edgert import architecture, profile
from edgert.charts import GREY, Point, bars_svg, palette, points_svg, ticks, tornado_svg
from edgert.cli import main
from edgert.cli.model import find_model
from edgert.cli.picture import plan_svg, rows
from edgert.cli.report import Study, proof, runner_ups, study_html
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.errors import UsageError
from edgert.page import duration
from edgert.placement import Plan
from edgert.prediction import predict
from edgert.scheduler import Constraints, schedule, sensitivity

DEMO_CONFIG = Path(__file__).parents[1] / "examples" / "models" / "bookworm" / "config.json"
CPU, GPU, NPU = (DeviceConfig.parse(name) for name in ("CPU", "GPU", "NPU"))
QWEN = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The shape of Qwen3 0.6B, without weights."""
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN), "utf-8")
    return folder / "config.json"


@pytest.fixture
def powerless(tmp_path: Path) -> Path:
    """A profile in which nobody knows what the NPU draws."""
    known = profile.find("lunarlake")
    devices = tuple(replace(m, active_w=None, ranges={}) if m.device == NPU else m for m in known.devices)
    path = tmp_path / "powerless.json"
    replace(known, devices=devices).write(path)
    return path


class Page(HTMLParser):
    """What is in a page; every element that must be closed is closed."""

    OPEN = frozenset({"meta", "td", "th", "tr"})  # elements whose end HTML lets one leave out

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPEN:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.stack[-1:] == ["h2"]:
            self.headings.append(data)


def test_every_way_to_name_a_model(
    config: Path, demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = find_model(str(demo_path))
    assert bundle.bundle is not None
    assert bundle.graph == bundle.bundle.graph
    shape = architecture.read(config)
    assert find_model(str(config)).graph == find_model(str(config.parent)).graph == shape.graph
    assert find_model(str(config), "fp16").graph.blocks[1].weight_bytes.keys() == {"f16", "f32"}
    assert len(find_model("qwen3-8b").graph.blocks) == len(find_model("Qwen3 8B").graph.blocks) == 2 + 2 * 36

    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "them/none":
            raise OSError("404\nNot found")
        return str(config)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = find_model("them/Some-Model")
    assert (found.graph, asked) == (shape.graph, [("them/Some-Model", "config.json")])
    assert found.name.startswith("Some-Model")
    with pytest.raises(UsageError, match=r"them/none.*no bundle.*the catalogue does not.*OSError: Not found"):
        find_model("them/none")
    with pytest.raises(UsageError, match=r"no bundle or config.json .* a hub id would be ORGANISATION/NAME"):
        find_model("no such model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for local in ("them/gone.edge", "them/gone.json", "models/Some-Model"):
        with pytest.raises(UsageError, match="looks like a file of this machine"):
            find_model(local)
    assert len(asked) == 2


def test_the_chosen_plan_is_never_beaten_by_a_baseline(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    for objective, figure in (("tokens_per_joule", "energy_uj"), ("latency", "total_us"), ("throughput", "tpot_us")):
        data = planned(capsys, config, "--profile", "lunarlake", "--objective", objective)
        others = [b["prediction"][figure] for b in data["baselines"]]
        assert len(others) >= 9  # three configurations and their pairs
        assert data["prediction"][figure] <= min(others) * (1 + 1e-6)
        assert data["objective"] == objective
        assert {p["first"] for p in data["plan"]["placements"]} >= {0}


def test_a_plan_is_saved_and_read(capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "p.json"
    more = ["--profile", "lunarlake", "--forbid", "GPU", "--forbid", "NPU"]
    data = planned(capsys, demo_path, *more, "--save", saved)
    assert Plan.read(saved).to_json() == data["plan"]
    assert {config.kind for config in Plan.read(saved).configs} == {CPU.kind}
    assert main(["run", str(demo_path), "It", "--max-tokens", "2", "--plan", str(saved)]) == 0
    assert capsys.readouterr().out.strip()


def test_a_bundle_is_planned_for_another_machine(
    capsys: pytest.CaptureFixture[str], demo_path: Path, tmp_path: Path
) -> None:
    page = tmp_path / "p.html"
    more = ["--objective", "latency", "--require", "NPU", "--prompt", 300, "--new", 8]
    code, out, err = run(capsys, demo_path, "--profile", "lunarlake", *more, "--html", page)
    assert code == 0, err
    assert "NPU@f16" in out
    assert re.search(r"│ 8 +│ ffn.3 ", out)  # a small model is shown block by block
    text = Page(page.read_text("utf-8")).text
    assert all(f"attention.{i}" in text for i in range(4))


def test_a_given_plan_is_predicted_beside_the_others(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    data = planned(capsys, config, "--profile", "lunarlake", "--device", "NPU", "--prompt", 512, "--new", 8)
    graph = architecture.read(config).graph
    plan = Plan.single(graph, NPU)
    assert data["given"]["plan"]["placements"] == plan.to_json()["placements"]
    # 512 tokens are two whole chunks, so that padding makes no difference to what they compute.
    bare = predict(Costs(graph, profile.find("lunarlake")), plan, Workload(512, 8))
    assert data["given"]["prediction"]["prefill_us"] >= bare.prefill_us * (1 - 1e-9)
    assert data["given"]["prediction"]["tokens_per_joule"] <= data["prediction"]["tokens_per_joule"]
    code, out, _ = run(capsys, config, "--profile", "lunarlake", "--device", "NPU", "--prompt", 512, "--new", 8)
    assert code == 0
    assert re.search(r"> +given", out)


def test_the_table_says_what_it_rests_on(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, config, "--profile", "lunarlake", "--explain", "--sensitivity")
    assert code == 0
    assert "Lunar Lake, Core Ultra 7 258V" in out
    known = profile.find("lunarlake")
    base = (
        f"base {known.base_w:g} W ({known.base_range[0]:g}–{known.base_range[1]:g} W likely, {known.base_provenance})"
    )
    assert re.search(r"times rest on \d+ (published|modelled).* entries; energy modelled; " + re.escape(base), out)
    assert "ffn.0–27" in out or "ffn.27" in out  # compact, but all of it
    assert out.count("warning:") <= 1  # that it is for another machine is said once
    explained = out[out.index("runners-up") :]
    assert re.search(r"ffn\.\d+–\d+ .*\+[\d.]+ m?J", explained)
    assert "if a number of the profile" in out
    assert "runners-up" not in run(capsys, config, "--profile", "lunarlake")[1]
    every = run(capsys, config, "--profile", "lunarlake", "--blocks", "--explain")[1]
    assert all(every.count(f" attention.{i} ") == every.count(f" ffn.{i} ") == 2 for i in range(28))


def test_the_page(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "p.html", tmp_path / "p.svg"
    code, _, err = run(capsys, config, "--profile", "lunarlake", "--html", path, "--svg", picture)
    assert code == 0, err
    text = path.read_text("utf-8")
    page = Page(text)
    assert page.headings == [
        "Blocks", "Time and energy", "Where the energy goes", "Baselines", "Library", "Sensitivity", "Runners-up",
        "What the numbers rest on",
    ]  # fmt: skip
    assert page.tags.count("svg") == 4
    assert page.tags.count("circle") >= 9
    assert all(model.source in page.text for model in profile.find("lunarlake").devices)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert not loading & {name for name, _ in page.attributes}
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    ElementTree.parse(picture)


def test_names_are_escaped(
    capsys: pytest.CaptureFixture[str], demo_path: Path, powerless: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "b.edge"
    shutil.copytree(demo_path, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["model"]["name"] = "<script>alert(1)</script> & [b]"
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    data = json.loads(powerless.read_text("utf-8"))
    data |= {"machine": "<script>machine</script>", "source": "</table><script>"}
    powerless.write_text(json.dumps(data), "utf-8")
    page = tmp_path / "p.html"
    for more in (["--profile", powerless, "--forbid", "NPU"], []):
        code, _, err = run(capsys, bundle, *more, "--html", page)
        assert code == 0, err
        assert "script" not in Page(page.read_text("utf-8")).tags
        assert "&lt;script&gt;alert(1)" in page.read_text("utf-8")


def test_where_the_energy_is_not_known(
    capsys: pytest.CaptureFixture[str], config: Path, powerless: Path, tmp_path: Path
) -> None:
    code, _, err = run(capsys, config, "--profile", powerless)
    assert code == 2
    assert "NPU@f16: active_w" in err
    assert "--forbid NPU@f16 leaves out" in err
    assert planned(capsys, config, "--profile", powerless, "--forbid", "NPU@f16")["prediction"]["energy_uj"]
    page = tmp_path / "p.html"
    code, out, _ = run(
        capsys, config, "--profile", powerless, "--objective", "latency", "--device", "NPU", "--html", page
    )
    assert code == 0
    assert "energy not known, for want of NPU@f16: active_w" in " ".join(out.split())
    assert "seconds of prefill" in Page(page.read_text("utf-8")).text


def test_this_machines_own_profile(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgert.conditions.find_cached", lambda: profile.find("meteorlake"))
    data = planned(capsys, config, "--profile", "measured")
    assert data["machine"] == profile.find("meteorlake").machine


def test_warnings_of_another_machine_are_one(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    place = ["--place", "*=NPU.7@f16,attention=GPU.7@f16"]
    here = planned(capsys, config, *place)["warnings"]
    assert len([w for w in here if "not available" in w or "when this plan" in w]) == 2
    absent = [DeviceConfig.parse(name) for name in ("NPU.7@f16", "GPU.7@f16")]
    known = profile.find("lunarlake")
    devices = (*known.devices, *(replace(known.devices[1], name=f"d{c.device}", config=str(c)) for c in absent))
    path = config.parent / "other.json"
    replace(known, devices=devices).write(path)
    given = planned(capsys, config, "--profile", path, *place)["given"]["plan"]["warnings"]
    made = [w for w in given if w.startswith("made for")]
    assert len(made) == 1
    assert "Lunar Lake" in made[0]
    assert "no GPU.7@f16, NPU.7@f16" in made[0]


def test_the_prompt_fits_the_context(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    (config.parent / "config.json").write_text(json.dumps({**QWEN, "max_position_embeddings": 512}), "utf-8")
    load = planned(capsys, config, "--profile", "lunarlake")["prediction"]["load"]
    assert load["prompt_tokens"] + load["new_tokens"] <= 512
    code, _, err = run(capsys, config, "--profile", "lunarlake", "--prompt", 500, "--new", 13)
    assert code == 2
    assert "are 513; the context holds 512" in err


def test_the_machines_memory_is_a_limit(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    known = profile.find("lunarlake")
    free = planned(capsys, config, "--profile", "lunarlake", "--objective", "latency")
    assert free["constraints"]["max_memory_bytes"] == known.memory_bytes
    assert any("by its profile; --memory" in note for note in free["notes"])
    needed = {b["name"]: sum(b["prediction"]["memory_bytes"].values()) for b in free["baselines"]}
    least, most = min(needed.values()), max(needed.values())
    assert least < most

    path = tmp_path / "small.json"
    replace(known, memory_bytes=(least + most) // 2).write(path)
    tight = planned(capsys, config, "--profile", path, "--objective", "latency")
    assert sum(tight["prediction"]["memory_bytes"].values()) <= (least + most) // 2
    broken = {b["name"] for b in tight["baselines"] if any("max_memory_bytes" in why for why in b["broken"])}
    assert broken == {name for name, bytes_ in needed.items() if bytes_ > (least + most) // 2}
    more = planned(capsys, config, "--profile", path, "--objective", "latency", "--memory", 64)
    assert more["constraints"]["max_memory_bytes"] == 64 * 10**9
    assert not any("by its profile" in note for note in more["notes"])

    replace(known, memory_bytes=least // 2).write(path)
    code, _, err = run(capsys, config, "--profile", path)
    assert code == 2
    assert "max_memory_bytes is what" in err
    assert "--memory GB sets another limit" in err


def test_names_of_devices_are_those_of_the_profile(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    lake = ["--profile", "lunarlake", "--prompt", 64, "--new", 8]
    plain = planned(capsys, config, *lake, "--forbid", "GPU@f16+static", "--memory", "NPU=0.001")
    other = planned(capsys, config, *lake, "--forbid", "GPU.0@f16+static", "--memory", "NPU.0=0.001")
    assert plain["plan"] == other["plan"]
    assert other["constraints"]["forbidden"] == ["GPU@f16+static"]
    assert other["constraints"]["max_device_memory_bytes"] == {"NPU": 10**6}
    assert not any("changes nothing" in note for note in (*plain["notes"], *other["notes"]))
    absent = planned(capsys, config, *lake, "--forbid", "NPU.1", "--memory", "GPU.2=4", "--forbid", "CPU@bf61")
    assert [note.partition(" changes nothing")[0] for note in absent["notes"] if "changes nothing" in note] == [
        "--memory GPU.2", "--forbid NPU.1", "--forbid CPU@bf61",
    ]  # fmt: skip


def test_an_encoder_generates_nothing(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = find_model(str(config))
    encoder = replace(known, bundle=SimpleNamespace(facts=SimpleNamespace(task="encoder")))
    monkeypatch.setattr("edgert.cli.plan.find_model", lambda *_: encoder)
    monkeypatch.setattr("edgert.cli.plan._recipe", lambda *_: [])
    lake = [config, "--profile", "lunarlake", "--objective", "latency"]
    assert planned(capsys, *lake)["prediction"]["load"]["new_tokens"] == 1
    assert planned(capsys, *lake, "--new", 1)["prediction"]["load"]["new_tokens"] == 1
    code, _, err = run(capsys, *lake, "--new", 5)
    assert code == 2
    assert "--new is 5" in err
    assert "is an encoder" in err


def study(objective: Any = "latency", given: Plan | None = None, new: int = 16, **limits: Any) -> Study:
    shape = architecture.from_config(QWEN)
    costs, load = Costs(shape.graph, profile.find("lunarlake")), Workload(512, new)
    found = schedule(costs, objective, Constraints(**limits), load)
    plan = given or found.plan
    return Study("m", shape.graph, costs.profile, found, plan, predict(costs, plan, load))


def test_one_new_token_has_no_decode(
    capsys: pytest.CaptureFixture[str], config: Path, powerless: Path, tmp_path: Path
) -> None:
    page = tmp_path / "p.html"
    code, _, err = run(
        capsys, config, "--profile", powerless, "--objective", "latency", "--new", 1, "--html", page
    )  # decode takes no time, and the chart has no energy to show instead
    assert code == 0, err
    assert "seconds of decode" in Page(page.read_text("utf-8")).text
    for new in (1, 2):
        cells = runner_ups(study(new=new), each=True)[1:]
        assert all(row[1] and row[2] for row in cells)
        assert {bool(cell) for row in cells[1:] for cell in row[4:6]} == {new > 1}


def test_a_limit_that_may_bind_makes_prices_least_ones() -> None:
    for memory, sign in ((32 * 10**9, "+"), (10**9, "≥ "), (None, "+")):
        prices = {row[3] for row in runner_ups(study(max_memory_bytes=memory), each=False)[1:]} - {""}
        assert prices
        assert all(price.startswith(sign) for price in prices)
    assert {r[3][:1] for r in runner_ups(study(max_ttft_us=9e9), each=False)[1:]} <= {"≥", ""}


def test_baselines_come_by_the_objective() -> None:
    for objective, figure in (("tokens_per_joule", "energy_uj"), ("latency", "total_us"), ("throughput", "decode_us")):
        found = study(objective, forbidden=("NPU",)).lines[1:]
        fair = [getattr(line.prediction, figure) for line in found if not line.broken]
        assert len(fair) >= 4
        assert fair == sorted(fair)
        marks = [bool(line.broken) for line in found]
        assert any(marks)
        assert marks == sorted(marks)


def test_the_gap_is_told_above_the_bound() -> None:
    found = replace(study().schedule, value=2e6, bound=1e6, gap=0.5)
    assert proof(found).startswith("at most 100.00% above 1 s,")
    assert proof(replace(found, bound=2e6, gap=0.0)).startswith("proved")


def test_what_cannot_be_chosen_is_grey_and_on_no_front() -> None:
    good = [Point("a", 1.0, 4.0, "#111111", True), Point("b", 3.0, 2.0, "#222222", False)]
    svg = points_svg([*good, Point("c", 0.5, 1.0, "#333333", False, out=True)], "x", "y")
    fills = [e.attrib["fill"] for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    assert fills == ["#111111", "#222222", GREY]

    def front(text: str) -> str:
        return re.findall(r'<path d="([^"]+)"[^>]*stroke-dasharray', text)[0]

    assert front(svg) == front(points_svg(good, "x", "y"))
    page = study_html(study(forbidden=("GPU",)))
    assert f'fill="{GREY}"><title>GPU@f16' in page


def test_a_given_plan_that_breaks_a_limit_says_so(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    lake = ["--profile", "lunarlake", "--prompt", 64, "--new", 8, "--device", "NPU"]
    assert planned(capsys, config, *lake)["given"]["broken"] == []
    assert planned(capsys, config, *lake, "--forbid", "NPU")["given"]["broken"] == ["NPU is forbidden"]
    assert "x given: NPU is forbidden" in run(capsys, config, *lake, "--forbid", "NPU")[1]


def test_runners_up_are_the_scheduled_plans() -> None:
    own = study()
    told = "Where a block of the scheduled plan, not of the given one would run"
    assert told not in study_html(own)
    assert told in study_html(study(given=Plan.single(own.graph, NPU)))


def test_a_change_that_is_not_known_is_no_change() -> None:
    own = study()
    row = next(r for r in sensitivity(Costs(own.graph, own.profile), own.plan, "latency", load=Workload(512, 16)))
    page = study_html(replace(own, sensitivity=(replace(row, factor=0.8, kept=2 * own.schedule.value, again=None),)))
    assert "+100.0% / –" in page
    assert "+0.0%" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CONFIG", "--profile", "no-such"], "no-such"),
        (["CONFIG", "--profile", "no-such.json"], "no-such.json"),
        (["CONFIG", "--profile", "lunarlake", "--max-watts", "0.5"], "watts"),
        (["CONFIG", "--profile", "lunarlake", "--max-ttft-ms", "0.001"], "ttft"),
        (["CONFIG", "--profile", "lunarlake", "--memory", "0.001"], "memory"),
        (["CONFIG", "--profile", "lunarlake", "--max-watts", "nan"], "watts"),
        (["CONFIG", "--profile", "lunarlake", "--forbid", "TPU"], "TPU"),
        (["CONFIG", "--profile", "lunarlake", "--forbid", "CPU", "--forbid", "GPU", "--forbid", "NPU"], ""),
        (["CONFIG", "--profile", "lunarlake", "--device", "CPU@bf16"], "CPU@bf16"),
        (["CONFIG", "--profile", "lunarlake", "--chunk", "0"], "chunk is 0"),
        (["CONFIG", "--profile", "lunarlake", "--prompt", "0"], "prompt_tokens is 0"),
        (["CONFIG", "--objective", "latency"], "--objective needs --profile"),
        (["CONFIG", "--max-watts", "5"], "--max-watts needs --profile"),
        (["CONFIG", "--explain"], "--explain needs --profile"),
        (["CONFIG", "--new", "3"], "--new needs --profile"),
        (["CONFIG", "--profile", "lunarlake", "--memory", "NPU=much"], "--memory is 'NPU=much'"),
        (["CONFIG", "--profile", "lunarlake", "--memory", "=5"], "--memory is '=5'"),
        (["CONFIG", "--profile", "lunarlake", "--memory", "NPU@f16=5"], "'NPU@f16' is no device"),
        (["DEMO", "--weights", "int4"], "--weights is int4"),
        (["BROKEN", "--profile", "lunarlake"], "broken.json: Expecting property name"),
        (["EMPTY", "--profile", "lunarlake"], "hidden_size"),
        (["FOLDER"], "manifest.json"),
        (["x" * 300, "--profile", "lunarlake"], "x"),
        (["no-such-model", "--profile", "lunarlake"], "the catalogue does not have it"),
        (["CONFIG", "--profile", "lunarlake", "--html", "no/such/folder/p.html"], "cannot be written"),
    ],
    ids=lambda a: " ".join(a)[:60] if isinstance(a, list) else "",
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    demo_path: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "broken.json").write_text("{", "utf-8")
    (tmp_path / "empty.json").write_text("{}", "utf-8")
    (tmp_path / "folder").mkdir()
    places = {
        "CONFIG": config, "DEMO": demo_path, "BROKEN": tmp_path / "broken.json", "EMPTY": tmp_path / "empty.json",
        "FOLDER": tmp_path / "folder",
    }  # fmt: skip
    code, out, err = run(capsys, *(places.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("edgert: error: ")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()


def test_a_second_model_is_no_prompt(config: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(config), "stray", "--profile", "lunarlake"])
    assert stop.value.code == 2


def test_rows_of_blocks_that_are_alike() -> None:
    graph = architecture.from_config(QWEN).graph
    plan = Plan.explicit(graph, "*=CPU@f32,ffn=GPU@f16,9-10=CPU@bf16,prefill:ffn.7=CPU@bf16")
    found = rows(graph, plan, each=False)
    assert sorted(row.name for row in found) == sorted(
        ["embed", "head", "attention.0–3, 5–27", "attention.4", "ffn.0–3, 5–6, 8–27", "ffn.4", "ffn.7"]
    )
    assert sorted(b.index for row in found for b in row.blocks) == list(range(58))
    assert next(row for row in found if row.name == "ffn.7").configs == ("CPU@bf16", "GPU@f16")
    assert [row.name for row in rows(graph, plan, each=True)] == [block.name for block in graph.blocks]


def test_a_large_model_is_drawn_small() -> None:
    graph = architecture.from_config(QWEN).graph
    plan = Plan.explicit(graph, "attention=CPU,ffn=GPU,prefill:0-9=CPU@bf16")
    root = ElementTree.fromstring(plan_svg("m", graph, plan))
    assert float(root.attrib["height"]) < 400
    titles = [e.text or "" for e in root.iter() if e.tag.endswith("title")]
    assert {"ffn.20: GPU@f16+static", "attention.20: CPU@f32+dq", "head: GPU@f16+static"} <= set(titles)
    drawn = {t.split(":")[0] for t in titles}
    assert {block.name for block in graph.blocks} <= drawn


def test_charts_stay_within_their_frames() -> None:
    points = [
        Point("a", 1.0, 4.0, "#000", True),
        Point("b", 2.0, 2.0, "#000", True),
        Point("c", 3.0, 3.0, "#000", False),
    ]
    svgs = [
        points_svg(points, "x", "y"),
        bars_svg({"one": {"base": 2.0, "CPU": 1.0}, "two": {"base": 1.0}}, {"base": "#777", "CPU": "#0072B2"}, "J"),
        tornado_svg({"a": (-0.5, 0.2), "b": (0.0, 0.0)}, ("#111", "#222"), ("less", "more")),
    ]
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        wide, high = float(root.attrib["width"]), float(root.attrib["height"])
        for e in root.iter():
            if e.tag.endswith("rect") and "x" in e.attrib:
                assert float(e.attrib["x"]) >= 0
                assert float(e.attrib["x"]) + float(e.attrib["width"]) <= wide
                assert float(e.attrib["y"]) + float(e.attrib["height"]) <= high
            if e.tag.endswith("circle"):
                assert 0 <= float(e.attrib["cx"]) <= wide
                assert 0 <= float(e.attrib["cy"]) <= high
    circles = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in ElementTree.fromstring(svgs[0]).iter()
               if e.tag.endswith("circle")]  # fmt: skip
    assert circles[0][0] < circles[1][0] < circles[2][0]
    assert circles[1][1] > circles[2][1] > circles[0][1]  # y grows downwards


def test_a_chart_of_nothing_has_an_axis() -> None:
    assert ticks(0.0) == [0.0, 1.0]
    assert points_svg([Point("a", 1.0, 0.0, "#000", True)], "x", "y").count("<circle") == 1


@pytest.mark.parametrize("largest", [1e-7, 0.999, 1.0, 3.7, 10.0, 12345.6])
def test_ticks(largest: float) -> None:
    found = ticks(largest)
    assert found[0] == 0
    assert found[-2] < largest <= found[-1] * (1 + 1e-9)
    assert 3 <= len(found) <= 7


def test_colours_are_the_same_for_the_same_name() -> None:
    found = palette(["a", "b", "a", *map(str, range(9))])
    assert len({found[name] for name in ("a", "b", "0", "1", "2", "3", "4")}) == 7
    assert found["7"] == found["8"]  # grey: there are only so many


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "0.5 µs"), (999.0, "999 µs"), (1000.0, "1 ms"), (1.5e6, "1.5 s"), (9.9e8, "990 s"), (5e9, "5000 s")],
)
def test_durations(us: float, text: str) -> None:
    assert duration(us) == text

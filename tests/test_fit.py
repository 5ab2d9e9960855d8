"""`edgert fit`: memory, speed and price against what one reckons by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgert.architecture import from_config
from edgert.catalogue import find
from edgert.cli import main
from edgert.graph import BlockKind

GBPS, WATTS, BASE_W = 100.0, 20.0, 5.0
Capture = pytest.CaptureFixture[str]


def device(name: str, **changes: Any) -> dict[str, Any]:
    """A device that reads at `GBPS` and for which everything else costs nothing."""
    return {
        "name": name, "config": "CPU@f32+dq", "bandwidth_gbps": GBPS, "compute_gops": 1e9, "launch_us": 0,
        "transfer_gbps": 1000, "active_w": WATTS, "idle_w": 0, "precision": "f32", "provenance": "modelled",
        "source": "made up", **changes,
    }  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return write(tmp_path, [device("cpu")])


def write(folder: Path, devices: list[dict[str, Any]], **facts: Any) -> Path:
    path = folder / "machine.json"
    profile = {"version": 2, "machine": "Testbox", "devices": devices, "base_w": BASE_W, "source": "assumed", **facts}
    path.write_text(json.dumps(profile))
    return path


def fit(capsys: Capture, machine: Path, *arguments: str) -> dict[str, Any]:
    assert main(["fit", "--profile", str(machine), "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_numbers(capsys: Capture, machine: Path) -> None:
    found = fit(
        capsys, machine, "--memory", "64", "--model", "llama 2 7b", "--weights", "fp16", "--prompt", "1000", "--new",
        "2", "--price-kwh", "0.36", "--api-price", "10",
    )  # fmt: skip
    (row,) = found["models"]
    graph = find(["Llama 2 7B"])[0].shape("fp16").graph
    read = sum(b.total_weight_bytes for b in graph.blocks if b.kind is not BlockKind.EMBED)
    cache = 32 * 2 * 4096 * 4  # layers, keys and values, width, f32
    step_s = (read + 1001 * cache) / (GBPS * 1e9)
    assert row["decode_tokens_per_second"] == pytest.approx(1 / step_s, rel=0.001)
    assert row["memory_bytes"] == pytest.approx(read + 2 * 32000 * 4096 + 4096 * cache, rel=1e-6)
    # Four calls read all weights, and what is in the cache then.
    prefill_s = (4 * read + (256 + 512 + 768 + 1000) * cache) / (GBPS * 1e9)
    assert row["ttft_ms"] == pytest.approx(prefill_s * 1e3, rel=0.01)
    assert row["prefill_tokens_per_second"] == pytest.approx(1000 / prefill_s, rel=0.01)
    joules = (WATTS + BASE_W) * (prefill_s + step_s) / 2
    assert row["joules_per_token"] == pytest.approx(joules, rel=0.01)
    assert row["price_per_million"] == pytest.approx(joules * 0.1, rel=0.01)  # 10^6 / 3.6e6 * 0.36
    assert row["api_ratio"] == pytest.approx(10 / row["price_per_million"])
    assert (row["config"], row["provenance"], row["energy_provenance"]) == ("CPU@f32+dq", "modelled", "modelled")
    assert row["why_not"] is None


def test_more_memory_never_fits_less(capsys: Capture, machine: Path) -> None:
    fitting: set[tuple[str, str]] = set()
    for memory in ("8", "16", "32", "400"):
        models = fit(capsys, machine, "--memory", memory)["models"]
        here = {(row["model"], row["weights"]) for row in models if row["why_not"] is None}
        assert fitting < here
        room = (float(memory) - 4) * 2**30
        assert all((row["memory_bytes"] <= room) == (row["why_not"] is None) for row in models)
        assert sorted(row["why_not"] is not None for row in models) == [row["why_not"] is not None for row in models]
        fitting = here
    assert len(models) == len(find([])) * 3


def test_context_and_reserve(capsys: Capture, machine: Path) -> None:
    arguments = ("--model", "qwen3 8b", "--weights", "int4")
    short = fit(capsys, machine, "--memory", "16", "--context", "2048", *arguments)["models"][0]
    long = fit(capsys, machine, "--memory", "64", "--context", "32768", *arguments)["models"][0]
    assert long["memory_bytes"] - short["memory_bytes"] == (32768 - 2048) * 36 * 2 * 8 * 128 * 4
    over = fit(capsys, machine, "--memory", "64", "--context", "50000", *arguments)["models"][0]
    assert over["why_not"] == "its context holds 40960 tokens"
    assert over["decode_tokens_per_second"] is None
    full = fit(capsys, machine, "--memory", "16", "--reserve", "14", *arguments)["models"][0]
    assert full["why_not"] == "more than the 2.0 GiB that are left"
    assert short["notes"] == []


def test_objectives_choose_among_devices(capsys: Capture, tmp_path: Path) -> None:
    frugal = device("npu", config="NPU@f16", bandwidth_gbps=50, active_w=2, precision="f16")
    both = write(tmp_path, [device("cpu"), frugal], memory_bytes=32 * 10**9)
    one = ("--model", "llama 3.2 1b", "--weights", "int4")
    assert fit(capsys, both, *one)["models"][0]["config"] == "NPU@f16"
    assert fit(capsys, both, *one, "--objective", "latency")["models"][0]["config"] == "CPU@f32+dq"
    # Static shapes hold the weights twice: 1.6 GiB are enough for the CPU only.
    assert fit(capsys, both, *one, "--memory", "5.6")["models"][0]["config"] == "CPU@f32+dq"


def test_weights_that_a_configuration_is_reckoned_with(capsys: Capture, tmp_path: Path) -> None:
    """An NPU keeps INT4 packed with one scale a row only; one rate for products is that of compressed weights."""
    machine = write(tmp_path, [device("cpu"), device("npu", config="NPU@f16", active_w=2, precision="f16")])
    int4, fp16 = fit(
        capsys, machine, "--memory", "64", "--model", "llama 3.2 1b", "--weights", "int4", "--weights", "fp16"
    )["models"]
    assert (int4["config"], fp16["config"]) == ("NPU@f16", "NPU@f16")
    assert [len(int4["notes"]), len(fp16["notes"])] == [1, 1]
    assert "one scale a row" in int4["notes"][0]
    assert "compressed weights" in fp16["notes"][0]
    entry = find(["Llama 3.2 1B"])[0]
    (alone,) = fit(
        capsys, write(tmp_path, [device("cpu")]), "--memory", "64", "--model", "llama 3.2 1b", "--weights", "int4"
    )["models"]
    assert alone["notes"] == []
    grouped, packed = (
        sum(b.total_weight_bytes for b in entry.shape("int4", group_size=g).graph.blocks[1:]) for g in (128, -1)
    )
    assert packed < 0.98 * grouped
    assert int4["decode_tokens_per_second"] == pytest.approx(GBPS * 1e9 / (packed + 2048 * 32768), rel=0.02)


def test_joules_that_are_not_known(capsys: Capture, tmp_path: Path) -> None:
    unknown = write(tmp_path, [device("cpu", active_w=None)])
    arguments = ("--memory", "16", "--model", "qwen3 0.6b", "--price-kwh", "0.3", "--api-price", "1")
    row = fit(capsys, unknown, *arguments)["models"][0]
    assert row["decode_tokens_per_second"] > 0
    assert (row["joules_per_token"], row["price_per_million"], row["api_ratio"]) == (None, None, None)
    assert main(["fit", "--profile", str(unknown), *arguments]) == 0
    text = capsys.readouterr().out
    assert "?" in text
    assert "joules not known" in text


def test_table(capsys: Capture, machine: Path) -> None:
    assert main(["fit", "--profile", str(machine), "--memory", "16", "--price-kwh", "0.3", "--api-price", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("Qwen3") < text.index("does not fit") < text.index("Llama 4 Scout 109B-A17B, int4")
    for words in (
        "Times are modelled, joules modelled, by the profile of Testbox. assumed", "CPU@f32+dq (modelled): made up",
        "as 4 are assumed to go elsewhere", "keys outside a window take memory", "shapes by quotation", "12.0 are left",
        "a prompt of 1024 in chunks of 256", "has the electricity of their prompts in it. An API may charge", "FP16's",
    ):  # fmt: skip
        assert words in text
    assert main(["fit", "--profile", str(machine), "--memory", "400", "--model", "qwen3 8b"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" not in text
    assert "price" not in text


def test_a_configuration_of_ones_own(capsys: Capture, machine: Path, tmp_path: Path) -> None:
    """Beside models of the catalogue; its towers take memory, too."""
    entry = find(["Qwen3 0.6B"])[0]
    folder = tmp_path / "mine"
    folder.mkdir()
    arguments = ("--memory", "16", "--weights", "int8")

    def memory(config: dict[str, Any]) -> int:
        (folder / "config.json").write_text(json.dumps(config))
        (row,) = fit(capsys, machine, str(folder), *arguments)["models"]
        assert row["model"] == "mine"
        assert fit(capsys, machine, str(folder / "config.json"), *arguments)["models"] == [row]
        return int(row["memory_bytes"])

    (known,) = fit(capsys, machine, "--model", "qwen3 0.6b", *arguments)["models"]
    assert memory(entry.config) == known["memory_bytes"]
    vision = {"model_type": "siglip_vision_model", "hidden_size": 512, "intermediate_size": 2048, "image_size": 224}
    whole = {"model_type": "gemma3", "text_config": entry.config, "vision_config": {**vision, "num_hidden_layers": 6}}
    (tower,) = from_config(whole, weights="int8").graph.towers
    assert memory(whole) - known["memory_bytes"] == tower.total_weight_bytes > 6 * 12 * 512 * 512
    both = fit(capsys, machine, str(folder), "--model", "qwen3 0.6b", *arguments)["models"]
    assert [row["model"] for row in both] == ["mine", "Qwen3 0.6B"]
    (folder / "config.json").write_text("[]")
    assert main(["fit", "--profile", str(machine), "--memory", "16", str(folder)]) == 2
    assert "expected an object, got list" in capsys.readouterr().err


def test_profiles_that_come_with_edgert(capsys: Capture) -> None:
    assert main(["fit", "--profile", "lunarlake", "--memory", "16", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    speeds = {r["model"]: r["decode_tokens_per_second"] for r in models if r["weights"] == "int4"}
    assert speeds["Qwen3 0.6B"] > speeds["Qwen3 8B"] > 1
    assert speeds["Qwen3 32B"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0"], "--memory is 0, expected 0.1"),
        (["--memory", "nan"], "--memory is nan"),
        (["--memory", "16", "--reserve", "-1"], "--reserve is -1"),
        (["--memory", "16", "--context", "0"], "--context is 0"),
        (["--memory", "16", "--context", "512"], "are 1280 tokens together, --context has room for 512"),
        (["--memory", "16", "--new", "1"], "--new is 1, expected 2"),
        (["--memory", "16", "--prompt", "-3"], "--prompt is -3"),
        (["--memory", "16", "--price-kwh", "-0.1"], "--price-kwh is -0.1"),
        (["--memory", "16", "--api-price", "inf"], "--api-price is inf"),
        (["--memory", "16", "--model", "no such"], "'no such' is not in the catalogue"),
        ([], "does not say how much memory there is; give --memory GIB"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: Capture, machine: Path) -> None:
    assert main(["fit", "--profile", str(machine), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_that_is_not_there(capsys: Capture) -> None:
    assert main(["fit", "--profile", "nowhere"]) == 2
    assert "profile 'nowhere' is neither a file nor one of" in capsys.readouterr().err

"""`edgert bench`: what it prints, on meters and machines that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from edgert.cli import bench, main
from edgert.device import DeviceConfig
from edgert.energy import Absence, Counter, Energy, Meters, Register, find_meters
from edgert.errors import UsageError
from edgert.placement import Plan

CPU, NPU = DeviceConfig("CPU", "f32"), DeviceConfig("NPU", "f16")
SHORT = ("--prompt-tokens", "10", "--new-tokens", "5", "--repeat", "3", "--idle", "0")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def a_joule_a_read(*domains: str) -> Meters:
    """Each read finds a joule more, so a window takes one joule whatever happens in it."""

    def meter(domain: str, values: Iterator[int]) -> Counter:
        return Counter(domain, f"made-up {domain}", [Register(lambda: 1e6 * next(values), None)], resolution_uj=61)

    return Meters([meter(domain, count()) for domain in domains], [Absence("npu", "there is none")])


def energy(domain: str) -> Energy:
    return Energy(domain, 1e6, None, 1.0, "estimated", "made up", None)


def test_speed(capsys: pytest.CaptureFixture[str], demo_path: Path) -> None:
    code, out, err = run(capsys, str(demo_path), *SHORT)
    assert (code, err) == (0, "")
    assert "10 prompt tokens, 5 new, 3 runs" in out
    assert "tok/s" in out
    assert "J/token" not in out
    data = json.loads(run(capsys, str(demo_path), *SHORT, "--json")[1])
    assert (data["prompt_tokens"], data["new_tokens"], data["provenance"]) == (10, [5, 5, 5], "measured")
    for name in ("ttft_ms", "prefill_tokens_per_s", "tpot_ms", "decode_tokens_per_s"):
        row = data[name]
        assert len(row["runs"]) == 3
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert data["tpot_ms"]["runs"][0] * data["decode_tokens_per_s"]["runs"][0] == pytest.approx(1000)
    assert data["energy"] is None


def test_energy(capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: a_joule_a_read("psys", "package"))
    data = json.loads(run(capsys, str(demo_path), *SHORT, "--energy", "--json")[1])
    energy = data["energy"]
    assert energy["prefill_j_per_token"]["runs"] == pytest.approx([0.1] * 3)
    assert energy["decode_j_per_token"]["runs"] == pytest.approx([0.25] * 3)  # the first of the 5 came with the prefill
    assert energy["decode_tokens_per_s_per_w"]["median"] == pytest.approx(4)
    assert energy["decode_j_per_token_above_idle"] is None
    whole = energy["total"]["decode"]
    assert (whole["domain"], whole["energy_uj"], whole["provenance"]) == ("psys", 3e6, "measured")
    assert energy["decode_w"]["median"] > 0
    npu = energy["domains"]["decode"][-1]
    assert (npu["domain"], npu["energy_uj"], npu["provenance"]) == ("npu", None, "unavailable")
    out = run(capsys, str(demo_path), *SHORT, "--energy")[1]
    for text in ("J/token", "tok/s/W", "0.25", "total: psys, measured", "made-up package", "61 µJ", "there is none"):
        assert text in out


def test_a_domain_that_fails_in_one_run_is_used_in_none(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = a_joule_a_read("package").present
    # The last window is between the last two of the reads: one when found, two in each of three prefills and decodes.
    values = [*range(12), 11]
    psys = Counter("psys", "made-up psys", [Register(lambda: 5e6 * values.pop(0), None)])
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: Meters([psys, *package]))
    energy = json.loads(run(capsys, str(demo_path), *SHORT, "--energy", "--json")[1])["energy"]
    assert values == []
    assert energy["total"]["prefill"]["domain"] == "psys"
    assert energy["total"]["decode"]["domain"] == "package"
    assert energy["prefill_j_per_token"]["runs"] == pytest.approx([0.5] * 3)
    assert energy["decode_j_per_token"]["runs"] == pytest.approx([0.25] * 3)


def test_idle(capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: a_joule_a_read("package"))
    monkeypatch.setattr(bench.time, "sleep", seconds.append)
    data = json.loads(run(capsys, str(demo_path), *SHORT[:-1], "1000", "--energy", "--json")[1])
    assert seconds == [1000]
    energy = data["energy"]
    above = energy["decode_j_per_token_above_idle"]["runs"]
    whole = energy["total"]["decode"]
    assert whole["idle_uj"] == pytest.approx(energy["idle"]["watts"]["package"] * whole["duration_s"] * 1e6)
    assert sum(above) * 4 == pytest.approx((whole["energy_uj"] - whole["idle_uj"]) / 1e6)


def test_what_cannot_be_read_is_no_zero(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: find_meters(tmp_path, declared_w))
    out = run(capsys, str(demo_path), *SHORT, "--energy")[1]
    assert "energy is unavailable" in out
    assert "no battery under" in " ".join(out.split())
    data = json.loads(run(capsys, str(demo_path), *SHORT, "--energy", "--json")[1])
    assert data["decode_tokens_per_s"]["median"] > 0
    assert data["energy"]["decode_j_per_token"] is None
    assert data["energy"]["decode_w"] is None
    assert data["energy"]["total"]["decode"]["provenance"] == "unavailable"


def test_declared_watts(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: find_meters(tmp_path, declared_w))
    arguments = (str(demo_path), *SHORT, "--energy", "--watts", "CPU=15.5")
    energy = json.loads(run(capsys, *arguments, "--json")[1])["energy"]
    assert energy["decode_w"]["median"] == pytest.approx(15.5, rel=0.05)
    assert energy["total"]["decode"]["provenance"] == "estimated"
    assert "declared CPU, estimated" in run(capsys, *arguments)[1]
    with_base = json.loads(run(capsys, *arguments, "--watts", "base=4", "--json")[1])["energy"]
    assert with_base["decode_w"]["median"] == pytest.approx(19.5, rel=0.05)


def test_declared_watts_count_in_the_phases_that_use_the_device() -> None:
    plan = Plan.from_configs([CPU] * 3, "a test", decode=[CPU, NPU, NPU])
    results = [energy(domain) for domain in ("package", "declared CPU", "declared NPU", "declared base")]
    prefill, decode = (bench._of(results, placements) for placements in plan.phases.values())
    assert [e.domain for e in prefill] == ["package", "declared CPU", "declared base"]
    assert [e.domain for e in decode] == ["package", "declared CPU", "declared NPU", "declared base"]
    bench._check_watts({}, plan)
    bench._check_watts({"CPU": 15, "NPU": 4}, plan)
    with pytest.raises(UsageError, match="uses NPU too"):
        bench._check_watts({"CPU": 15, "base": 3}, plan)


def test_emulated_devices_have_no_speed_and_no_joules(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: a_joule_a_read("psys"))
    arguments = (str(demo_path), *SHORT, "--energy", "--device", "SIM")
    data = json.loads(run(capsys, *arguments, "--json")[1])
    assert data["provenance"] == "emulated"
    assert [data[n] for n in ("ttft_ms", "prefill_tokens_per_s", "tpot_ms", "decode_tokens_per_s", "energy")] == [
        None
    ] * 5
    out = run(capsys, *arguments)[1]
    assert "emulated device" in out
    assert "tok/s" not in out


def test_prompts_are_not_taken_from_a_cache(
    capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bench.Run] = []
    monkeypatch.setattr(bench, "_show", lambda out, model, runs: seen.extend(runs))
    run(capsys, str(demo_path), *SHORT)
    assert [r.timings.reused_tokens for r in seen] == [0, 0, 0]


def test_one_new_token(capsys: pytest.CaptureFixture[str], demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_meters", lambda declared_w: a_joule_a_read("package"))
    arguments = (str(demo_path), "--new-tokens", "1", "--repeat", "1", "--idle", "0", "--energy")
    data = json.loads(run(capsys, *arguments, "--json")[1])
    assert data["ttft_ms"]["median"] > 0
    assert data["tpot_ms"] is data["decode_tokens_per_s"] is data["energy"]["decode_j_per_token"] is None
    assert data["energy"]["prefill_j_per_token"]["median"] == pytest.approx(1 / 128)
    assert "no second token" in run(capsys, *arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "--repeat is 0, the least is 1"),
        (["--prompt-tokens", "-1"], "--prompt-tokens is -1, the least is 1"),
        (["--new-tokens", "0"], "--new-tokens is 0, the least is 1"),
        (["--idle", "nan"], "--idle is nan, the least is 0"),
        (["--prompt-tokens", "999999999999"], "the context holds 1024"),
        (["--watts", "CPU=15"], "add --energy"),
        (["--energy", "--watts", "CPU"], "expected NAME=WATTS"),
        (["--energy", "--watts", "=5"], "expected NAME=WATTS"),
        (["--energy", "--watts", "CPU=much"], "expected NAME=WATTS"),
        (["--energy", "--watts", "CPU=nan"], "expected NAME=WATTS with watts above 0"),
        (["--energy", "--watts", "NPU=5"], "--watts NPU: the plan does not use it; it uses CPU"),
        (["--energy", "--watts", "base=5"], "--watts: the plan uses CPU too; declare what it draws"),
        (["--energy", "--watts", "CPU=2000"], "declared watts of CPU are 2000"),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], demo_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, str(demo_path), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("edgert: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_this_machine(capsys: pytest.CaptureFixture[str], demo_path: Path) -> None:
    data = json.loads(run(capsys, str(demo_path), *SHORT, "--energy", "--json")[1])
    for domain in (d for phase in data["energy"]["domains"].values() for d in phase):
        assert (domain["energy_uj"] is None) == (domain["provenance"] == "unavailable") == bool(domain["reason"])

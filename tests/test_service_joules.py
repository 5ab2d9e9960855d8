"""The machine's joules, shared out to requests."""

from __future__ import annotations

import pytest

from edgert.energy import Energy
from edgert.service.worker.joules import Joules


class Machine:
    """A clock, and a meter that counts `watts`; `reads` says how often it was read."""

    def __init__(self, watts: float | None = 10.0) -> None:
        self.now_s, self.watts, self.reads, self._counted_uj = 100.0, watts, 0, 0.0
        self._sampled_s = self.now_s

    def sample(self) -> None:
        self.reads += 1
        if self.watts is not None:
            self._counted_uj += self.watts * (self.now_s - self._sampled_s) * 1e6
        self._sampled_s = self.now_s

    @property
    def results(self) -> tuple[Energy, ...]:
        known = self.watts is not None
        uj = self._counted_uj if known else None
        return (Energy("package", uj, None, 1.0, "measured" if known else "unavailable", "test", None, "none"),)

    def joules(self, declared: dict[str, float] | None = None, *, emulated: bool = False) -> Joules:
        made = Joules(self, declared or {}, clock=lambda: self.now_s)
        made.use(["CPU"], emulated=emulated)
        return made


def run(machine: Machine, joules: Joules, tokens: dict[int, int], took_s: float) -> None:
    machine.now_s += took_s
    joules.step(tokens, took_s * 1e6)


def test_tokens_share_what_was_counted() -> None:
    machine = Machine()
    joules = machine.joules()
    machine.now_s += 50  # nobody's
    joules.rest()
    run(machine, joules, {1: 30, 2: 1}, 0.031)
    run(machine, joules, {1: 30, 2: 1}, 0.031)
    assert joules.of(1) == (pytest.approx(0.6), "measured")
    assert joules.of(2) == (pytest.approx(0.02), "measured")
    run(machine, joules, {2: 1}, 0.001)
    assert joules.of(2)[0] == pytest.approx(0.02)  # not read yet
    assert joules.of(2, last=True)[0] == pytest.approx(0.03)
    joules.forget(1)
    joules.forget(2)
    assert joules.of(1)[0] == 0.0


def test_meters_are_read_every_50_ms_at_most() -> None:
    machine = Machine()
    joules = machine.joules()
    before = machine.reads
    for _ in range(100):
        run(machine, joules, {1: 1}, 0.01)
        joules.of(1)
    assert machine.reads - before == pytest.approx(20, abs=2)
    assert joules.of(1)[0] == pytest.approx(10.0, rel=0.06)


def test_declared_watts_count_busy_time() -> None:
    machine = Machine(watts=None)
    joules = machine.joules({"CPU": 15.0, "NPU": 5.0})
    run(machine, joules, {1: 1}, 1.0)
    machine.now_s += 9
    run(machine, joules, {1: 3, 2: 1}, 1.0)
    assert joules.of(1) == (pytest.approx(15 + 15 * 3 / 4), "estimated")
    assert joules.of(2) == (pytest.approx(15 / 4), "estimated")


def test_a_declared_base_is_drawn_all_the_time() -> None:
    machine = Machine(watts=None)
    joules = machine.joules({"CPU": 15.0, "base": 4.0})
    for _ in range(4):
        run(machine, joules, {1: 1}, 1.0)
        machine.now_s += 1.0
    assert joules.of(1) == (pytest.approx(4 * 19), "estimated")  # while it ran
    assert joules.watts() == pytest.approx(4 + 15 / 2, rel=0.2)


def test_meters_are_better_than_declarations() -> None:
    machine = Machine(watts=20.0)
    joules = machine.joules({"CPU": 15.0})
    run(machine, joules, {1: 1}, 1.0)
    assert joules.of(1) == (pytest.approx(20.0), "measured")


@pytest.mark.parametrize(
    ("machine", "declared", "emulated", "provenance"),
    [(Machine(None), {}, False, "unavailable"), (Machine(None), {"NPU": 5.0}, False, "unavailable"),
     (Machine(), {"CPU": 5.0}, True, "emulated")],
)  # fmt: skip
def test_what_nobody_knows(machine: Machine, declared: dict[str, float], emulated: bool, provenance: str) -> None:
    joules = machine.joules(declared, emulated=emulated)
    run(machine, joules, {1: 1}, 1.0)
    assert joules.of(1, last=True) == (None, provenance)
    assert joules.watts() is None
    assert joules.provenance == provenance


def test_watts_are_of_the_last_seconds() -> None:
    machine = Machine()
    joules = machine.joules()
    for _ in range(100):
        run(machine, joules, {1: 1}, 0.1)
    assert joules.watts() == pytest.approx(10.0)
    machine.watts = 30.0
    for _ in range(100):
        run(machine, joules, {1: 1}, 0.1)
    assert joules.watts() == pytest.approx(30.0)

"""Who is next, which step of the idle ladder is due, what is in quarantine: rules on plain data."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgert.service.pool.desk import Meter
from edgert.service.pool.events import KEPT, EventLog
from edgert.service.pool.idle import LONGEST, UNDOING, Rest, due_after_s
from edgert.service.pool.queueing import FairQueue
from edgert.service.pool.recovery import FIRST_S, LONGEST_S, Patience, Quarantine, Recovery, culprits, lasting
from edgert.service.pool.workers import Ended
from edgert.service.protocol import Failed
from edgert.service.settings import ModelSettings, Settings


def all_of(queue: FairQueue[str], now_s: float = 0.0, **how: bool) -> list[str]:
    found = []
    while (item := queue.pop(now_s, **how)) is not None:
        found.append(item)
    return found


def filled(*entries: tuple[str, str, bool, float]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(aging_s=30.0)
    for item, client, background, since_s in entries:
        queue.push(item, client=client, background=background, since_s=since_s)
    return queue


def test_clients_take_turns_whatever_they_have_waiting() -> None:
    queue = filled(*((f"a{i}", "a", False, 0.0) for i in range(4)), ("b0", "b", False, 1.0), ("c0", "c", False, 2.0))
    assert len(queue) == 6
    assert all_of(queue) == ["a0", "b0", "c0", "a1", "a2", "a3"]
    assert len(queue) == 0


def test_interactive_requests_go_first_until_a_background_one_is_old() -> None:
    entries = [("b", "x", True, 0.0), ("i", "x", False, 5.0), ("j", "y", False, 6.0)]
    assert all_of(filled(*entries), 29.9) == ["i", "j", "b"]
    queue = filled(*entries)
    assert queue.pop(30.0) == "i"  # it is old now, and waits for its turn like the others
    assert all_of(queue, 30.0) == ["j", "b"]
    queue = filled(("b", "x", True, 0.0), *((f"i{k}", "y", False, 5.0) for k in range(5)))
    assert all_of(queue, 30.0)[:2] == ["i0", "b"]


def test_background_requests_can_be_held_back() -> None:
    queue = filled(("b", "x", True, 0.0), ("i", "y", False, 0.0))
    assert queue.urgent(100.0, background=False)
    assert all_of(queue, 100.0, background=False) == ["i"]
    assert not queue.urgent(100.0, background=False)
    assert queue.urgent(100.0)
    assert all_of(queue, 100.0) == ["b"]


def test_a_request_can_come_back_to_the_front_and_leave() -> None:
    queue = filled(("a0", "a", False, 0.0), ("b0", "b", False, 0.0), ("b1", "b", False, 0.0))
    queue.push("b-", client="b", background=False, since_s=0.0, front=True)
    assert list(queue) == ["b-", "b0", "b1", "a0"]
    assert queue.remove("b0")
    assert not queue.remove("b0")
    assert queue.remove("a0")
    assert queue.clear() == ["b-", "b1"]
    assert all_of(queue) == []


@pytest.mark.parametrize(
    ("undo_s", "share", "expected"),
    [
        (0.0, 0.5, 300.0),  # nobody knows: as configured
        (1.0, 0.5, 300.0),  # 20 s of holding half of the memory cost as much as loading: long over
        (20.0, 0.5, UNDOING * 20 / 0.5),
        (20.0, 1.0, 300.0),  # it holds more, so it goes earlier
        (20.0, 0.25, 800.0),
        (500.0, 0.25, 300.0 * LONGEST),
        (1.0, 0.0, 300.0),  # soon loaded again, so it goes as configured
        (6.0, 0.01, UNDOING * 6 / 0.1),
    ],
)
def test_a_step_waits_for_what_undoing_it_costs(undo_s: float, share: float, expected: float) -> None:
    assert due_after_s(300.0, undo_s, share) == pytest.approx(expected)


def resting(keep_alive_s: float, drop_after_s: float | None = None, **options: float | None) -> Rest:
    """Idle since second 1000."""
    rest = Rest(ModelSettings(Path(), "m"), Settings(keep_alive_s=keep_alive_s, drop_after_s=drop_after_s))
    rest.reload_s = options.get("reload_s") or 1.0
    rest.touch(options.get("asked_s"), 0.0)
    rest.begin(1000.0)
    rest.climb(pinned=bool(options.get("pinned")), prefill_s=0.1, held_share=0.5, kv_share=0.5)
    return rest


def test_the_ladder() -> None:
    rest = resting(300.0, 60.0)
    assert [rest.due(t) for t in (1000, 1059.9, 1060, 1299)] == [None, None, "drop", "drop"]
    assert (rest.due_s(), rest.unload_s()) == (1060.0, 1300.0)
    rest.dropping = True
    assert [rest.due(t) for t in (1060, 1299.9, 1300)] == [None, None, "unload"]
    assert rest.due_s() == 1300.0
    rest.end()
    assert (rest.due(1e9), rest.due_s(), rest.unload_s(), rest.dropping) == (None, None, None, False)
    assert resting(300.0, reload_s=100.0).unload_s() == 3000.0
    assert resting(300.0, reload_s=100.0, asked_s=200.0).unload_s() == 1200.0
    assert resting(300.0, 60.0, asked_s=0.0).due(1000.0) == "unload"
    for kept in (resting(-1.0), resting(300.0, asked_s=0.0, pinned=1)):
        assert (kept.due(1e9), kept.due_s()) == (None, None)


def test_quarantine_doubles_and_forgets() -> None:
    quarantine, now, spells = Quarantine(), 1000.0, []
    for _ in range(8):
        spell = quarantine.add("NPU", "hung", now)
        spells.append(spell)
        assert quarantine.avoided(now + spell - 0.1) == {"NPU": "hung"}
        assert quarantine.avoided(now + spell) == {}
        assert quarantine.end_s("NPU") == now + spell
        now += spell
    assert spells == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    now += LONGEST_S
    assert quarantine.add("NPU", "hung", now) == FIRST_S
    assert quarantine.add("NPU", "seen by another worker", now + 10) == FIRST_S - 10
    assert quarantine.avoided(now + 10) == {"NPU": "hung"}
    assert quarantine.end_s("GPU") == 0.0


def test_backoff_doubles_and_starts_over_after_a_token() -> None:
    recovery, waits = Recovery(Patience()), []
    for _ in range(11):
        recovery.failed(10.0, ready=True)
        waits.append(recovery.retry_at_s - 10.0)
    assert waits == pytest.approx([0.1 * 2**k for k in range(9)] + [30.0, 30.0])
    assert recovery.fallback
    assert not recovery.hopeless  # it was ready each time
    recovery.succeeded()
    assert not recovery.fallback
    recovery.failed(20.0, ready=False)
    assert recovery.retry_at_s == pytest.approx(20.1)
    for _ in range(4):
        recovery.failed(20.0, ready=False, outside=True)
    assert recovery.hopeless
    assert not recovery.fallback  # what was killed from outside says nothing about devices


@pytest.mark.parametrize(
    ("ended", "expected", "for_good"),
    [
        (Ended("", Failed("DeviceHungError", "", "NPU")), ["NPU"], False),
        (Ended("", Failed("DeviceFailedError", "", "CPU")), [], False),
        (Ended("", Failed("BundleError", "")), [], True),
        (Ended("", Failed("PlanError", "")), [], True),
        (Ended("", Failed("UnknownDeviceError", "")), [], True),
        (Ended("", Failed("DeviceFailedError", "")), [], False),
        (Ended("", Failed("KeyError", "no such class among ours")), [], False),
        (Ended("hung"), ["GPU", "NPU"], False),
        (Ended("SIGSEGV"), ["GPU", "NPU"], False),
        (Ended("SIGKILL", outside=True), [], False),
    ],
)
def test_who_is_to_blame(ended: Ended, expected: list[str], for_good: bool) -> None:
    assert culprits(ended, ["NPU", "CPU", "GPU"]) == expected
    assert lasting(ended) is for_good


def test_rates_over_the_last_seconds() -> None:
    meter = Meter()
    assert (meter.total(0.0), meter.rate(0.0)) == (None, None)
    for step in range(100):
        meter.add(1.0, step * 0.25)
    assert meter.rate(24.75) == pytest.approx(4.0, rel=0.1)
    assert meter.total(24.75) == pytest.approx(40, abs=3)
    assert meter.rate(100.0) is None


def test_slow_listeners_lose_the_oldest_events_and_block_nobody() -> None:
    async def scenario() -> None:
        log = EventLog()
        log.add("load", "m", "before anybody listened")
        slow = log.listen()
        gone = log.listen()
        await gone.aclose()
        for number in range(KEPT + 50):
            log.add("load", "m", f"event\n{number}")
        assert len(log.last()) == KEPT
        assert log.last()[-1].detail == f"event {KEPT + 49}"
        assert (await anext(slow)).detail == "event 50"
        log.close()
        rest = [event.number async for event in slow]
        assert rest == list(range(53, KEPT + 52))
        assert [event async for event in log.listen()] == []

    asyncio.run(scenario())

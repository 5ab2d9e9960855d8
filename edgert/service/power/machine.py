"""What the machine says about itself: power source, battery, heat, and whether somebody sits in front of it.

Linux: small files of /sys, and logind for the person; Windows: three calls. What neither tells is None, never a guess.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOT_S = 30.0  # counters of throttling come in bursts: for so long after one the machine still counts as hot
PERSON_S = 60.0  # logind's hint changes after minutes; asking it starts a process
_ACTIVE_S = 300.0  # Windows tells the last key or movement; desktops give their hint of idleness after 5 minutes, too
_ASK_LOGIND = ("loginctl", "show-session", "--property=IdleHint", "--value")  # of no session: of all of them


@dataclass(frozen=True)
class MachineState:
    """What is seen of the machine; each is None where it does not tell.

    Attributes:
        on_battery: whether the battery supplies it.
        battery_share: charge of all its batteries, 0 to 1.
        throttled: whether heat slows it, now or within the last half minute.
        user_active: whether somebody used it within the last minutes. Only looked for where it can matter: on battery,
            or throttled.
    """

    on_battery: bool | None = None
    battery_share: float | None = None
    throttled: bool | None = None
    user_active: bool | None = None


class MachineReader:
    """Reads the machine's state, every few seconds. A reading takes well below a millisecond, but once a minute on
    battery it waits for a process, for a second at most; so it is for a thread.

    Args:
        root: where `sys` is.
        ask_idle: whether all sessions are idle, None where nobody knows; None for logind.
    """

    def __init__(self, root: Path = Path("/"), ask_idle: Callable[[], bool | None] | None = None) -> None:
        self._supplies = root / "sys/class/power_supply"
        self._windows = root == Path("/") and sys.platform == "win32"
        self._ask_idle = ask_idle or logind_idle
        self._asked: tuple[float, bool | None] | None = None  # when, and whether somebody is there
        self._counters = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
        self._counts: list[float | None] | None = None
        self._hot_at_s: float | None = None
        self._trips = list(_passive_trips(root))

    def read(self, now_s: float) -> MachineState:
        """The state.

        Args:
            now_s: any clock that does not go backwards.
        """
        if sys.platform == "win32" and self._windows:
            return _windows()
        on_battery, share = self._power()
        throttled = self._throttled(now_s)
        active = self._person(now_s) if on_battery or throttled else None
        return MachineState(on_battery, share, throttled, active)

    def _power(self) -> tuple[bool | None, float | None]:
        """Whether the battery supplies the machine, and its charge.

        A mains adapter that says whether it is there is believed first, as UPower does: some batteries say
        `Discharging` while they are held at a charge below the full one.
        """
        online: list[bool] = []
        statuses: list[str | None] = []
        charges: list[float] = []
        weights: list[float] = []
        for folder in sorted(self._supplies.glob("*")):
            kind = _text(folder / "type")
            if _text(folder / "scope") == "Device":  # a mouse's
                continue
            if kind in ("Mains", "USB") and (plugged := _number(folder / "online")) is not None:
                online.append(plugged > 0)
            elif kind == "Battery" and _text(folder / "present") != "0":
                statuses.append(_text(folder / "status"))
                if (charge := _charge(folder)) is not None:
                    charges.append(charge[0])
                    weights.append(charge[1])
        share = sum(c * w for c, w in zip(charges, weights, strict=True)) / sum(weights) if weights else None
        if online:
            return bool(statuses) and not any(online), share
        if "Discharging" in statuses:
            return True, share
        return (False if {"Charging", "Full", "Not charging"} & set(statuses) else None), share

    def _throttled(self, now_s: float) -> bool | None:
        """Whether a count of thermal throttling has grown, or a zone is at the point where it is cooled passively.

        Counters: https://docs.kernel.org/admin-guide/thermal/intel_thermal_throttle.html. GPUs have flags of their own,
        but reading them wakes the GPU.
        """
        if not self._counters and not self._trips:
            return None
        counts = [_number(file) for file in self._counters]
        before, self._counts = self._counts, counts
        grown = before is not None and any(
            new is not None and old is not None and new > old for old, new in zip(before, counts, strict=True)
        )
        tripped = any((_number(file) or 0) >= limit for file, limit in self._trips)
        if grown or tripped:
            self._hot_at_s = now_s
        return self._hot_at_s is not None and now_s - self._hot_at_s < HOT_S

    def _person(self, now_s: float) -> bool | None:
        if self._asked is None or now_s - self._asked[0] >= PERSON_S:
            idle = self._ask_idle()
            self._asked = now_s, None if idle is None else not idle
        return self._asked[1]


def logind_idle() -> bool | None:
    """Whether every session of the machine is idle, as logind has it; None without logind.

    Desktops tell logind when nobody has touched them for some minutes; those that never do look busy for ever.
    """
    try:
        done = subprocess.run(_ASK_LOGIND, capture_output=True, timeout=1.0, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return {b"yes": True, b"no": False}.get(done.stdout.strip())


def _charge(folder: Path) -> tuple[float, float] | None:
    """A battery's charge, 0 to 1, and how much it counts beside others."""
    for kind in ("energy", "charge"):
        now, full = _number(folder / f"{kind}_now"), _number(folder / f"{kind}_full")
        if now is not None and full:
            return min(1.0, now / full), full
    percent = _number(folder / "capacity")
    return None if percent is None else (min(1.0, percent / 100), 1.0)


def _passive_trips(root: Path) -> Iterator[tuple[Path, float]]:
    """Files of temperatures, and those from which the kernel slows something down to cool it, in 1/1000 °C.

    The trip points of `x86_pkg_temp` are none of these: programs set them to be told of a temperature.
    """
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if _text(zone / "type") != "x86_pkg_temp":
            for file in zone.glob("trip_point_*_type"):
                limit = _number(zone / file.name.replace("_type", "_temp"))
                if _text(file) == "passive" and limit and limit > 0:
                    yield zone / "temp", limit


def _text(path: Path) -> str | None:
    try:
        return path.read_text("ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_bytes())
    except (OSError, ValueError):
        return None


if sys.platform == "win32":
    import ctypes

    class _PowerStatus(ctypes.Structure):
        """SYSTEM_POWER_STATUS of winbase.h."""

        _fields_ = (
            ("mains", ctypes.c_ubyte), ("battery", ctypes.c_ubyte), ("percent", ctypes.c_ubyte),
            ("saver", ctypes.c_ubyte), ("left_s", ctypes.c_uint32), ("full_s", ctypes.c_uint32),
        )  # fmt: skip

    class _LastInput(ctypes.Structure):
        """LASTINPUTINFO of winuser.h."""

        _fields_ = (("size", ctypes.c_uint32), ("tick_ms", ctypes.c_uint32))

    def _windows() -> MachineState:
        """GetSystemPowerStatus and GetLastInputInfo; Windows does not tell programs of throttling."""
        power, last = _PowerStatus(), _LastInput(ctypes.sizeof(_LastInput))
        on_battery = share = active = None
        if ctypes.windll.kernel32.GetSystemPowerStatus(ctypes.byref(power)):
            on_battery = {0: True, 1: False}.get(power.mains)
            share = power.percent / 100 if power.percent <= 100 and not power.battery & 128 else None
        if ctypes.windll.user32.GetLastInputInfo(ctypes.byref(last)):
            idle_ms = (ctypes.windll.kernel32.GetTickCount() - last.tick_ms) & 0xFFFFFFFF  # both wrap after 49 days
            active = idle_ms < _ACTIVE_S * 1000
        return MachineState(on_battery, share, None, active)

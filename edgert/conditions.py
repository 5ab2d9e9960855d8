"""What measurements depend on beside the model, and where a machine's own profile is kept.

A profile is found again by these conditions: another driver, another OpenVINO, battery instead of mains, and the old
numbers are about a machine that is no longer there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

import psutil

from edgert.device import DeviceInfo
from edgert.discovery import survey
from edgert.errors import DeviceError
from edgert.folders import cache_folder
from edgert.profile import Profile

ROOT = Path("/")


def conditions(devices: list[DeviceInfo] | None = None, root: Path = ROOT) -> dict[str, str]:
    """What a profile of this machine depends on, by name.

    Args:
        devices: those that are present; None to look.
        root: where `sys` is.
    """
    found = {"openvino": metadata.version("openvino"), "system": f"{platform.system()} {platform.release()}"}
    for info in survey()[0] if devices is None else devices:
        if info.emulated:
            continue
        facts = {"": info.full_name, **info.details}
        for name in ("", "cores", "memory", "driver", "compiler", "platform"):
            if name in facts:
                found[f"{info.name} {name}".strip()] = facts[name]
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    found["power"] = "mains" if battery is None or battery.power_plugged is not False else "battery"
    try:  # Linux; on Windows the power mode has no file
        found["governor"] = (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text("ascii").strip()
    except (OSError, ValueError):
        found["governor"] = "unknown"
    return found


def folder() -> Path:
    """Where profiles of this machine are."""
    return cache_folder() / "profiles"


def path_of(found: dict[str, str]) -> Path:
    """The file of the profile that was measured under these conditions; it may not be there."""
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"{key}.json"


def find_cached(found: dict[str, str] | None = None) -> Profile:
    """The profile that `edgert profile` measured on this machine as it is now.

    Args:
        found: `conditions()`, which are looked up unless they are given.

    Raises:
        DeviceError: there is none; where there is one of other conditions the message says what has changed.
    """
    now = conditions() if found is None else found
    path = path_of(now)
    if path.exists():
        return Profile.read(path)
    stale: list[tuple[int, str]] = []
    for other in sorted(folder().glob("*.json")):
        try:
            then = Profile.read(other).conditions
        except DeviceError:
            continue  # of an older edgert
        changes = [
            f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        stale.append((len(changes), ", ".join(changes)))
    if not stale:
        raise DeviceError("this machine has no profile yet: run `edgert profile BUNDLE`")
    raise DeviceError(f"this machine's profile is stale ({min(stale)[1]}): run `edgert profile BUNDLE` again")

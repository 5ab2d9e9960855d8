"""How a setting is written: sizes, durations, shares, lists. Files hold typed values, flags and environment hold text.

A `Rule` reads either and says what it expects; `show` gives the value as TOML, so that what is printed can be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.service.footprint import machine_bytes

NONE_WORDS = ("none", "never", "off")
FOREVER_WORDS = ("forever", "never", "-1")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")
_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SPANS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_MEASURE = re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Rule:
    """What one setting may be.

    Attributes:
        expects: in words, for messages and the documentation.
        read: the value out of text or a TOML value, paths relative to a folder; raises `ValueError` for any other.
        show: the value as TOML.
    """

    expects: str
    read: Callable[[Any, Path], Any]
    show: Callable[[Any], str]


def optional(rule: Rule, words: Sequence[str] = NONE_WORDS) -> Rule:
    """The rule, and `none` for None."""

    def read(value: Any, folder: Path) -> Any:
        return None if isinstance(value, str) and value.strip().lower() in words else rule.read(value, folder)

    return Rule(
        f"{rule.expects}, or {words[0]}", read, lambda value: quoted(words[0]) if value is None else rule.show(value)
    )


def whole(low: int, high: int) -> Rule:
    def read(value: Any, folder: Path) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return Rule(f"a whole number from {low} to {high}", read, str)


def number(low: float, *, unit: str) -> Rule:
    """A finite number above `low`."""

    def read(value: Any, folder: Path) -> float:
        found = _plain(value)
        if not low < found < math.inf:
            raise ValueError
        return found

    return Rule(f"{unit} above {low:g}", read, repr)


def size(low: int, high: int | None = None, *, of_memory: bool = False) -> Rule:
    """Bytes; with `of_memory` also a share of the machine's memory, such as `60 %`."""

    def read(value: Any, folder: Path) -> int:
        amount, unit = _measure(value)
        if unit == "%":
            if not of_memory or not 0 < amount <= 100:
                raise ValueError
            found = amount / 100 * machine_bytes()
        else:
            found = amount * (_SIZES[unit.lower()] if unit else 1)
        if not low <= found <= (high or 2**60):
            raise ValueError
        return int(found)

    share = ', or a share of the machine\'s memory such as "60 %"' if of_memory else ""
    most = f" to {brief(high)}" if high else ""
    return Rule(f'a size from {brief(low)}{most}, such as "512 MiB"{share}', read, _show_size)


def span(low: float, high: float, *, per_second: float = 1.0, forever: bool = False) -> Rule:
    """A time, kept in seconds; in milliseconds with `per_second=1000`. A bare number is in that unit too."""
    unit = "s" if per_second == 1.0 else "ms"

    def read(value: Any, folder: Path) -> float:
        if forever and str(value).strip().lower() in FOREVER_WORDS:
            return -1.0
        amount, given = _measure(value)
        found = amount * _SPANS[given.lower()] * per_second if given else amount
        if forever and found < 0:
            return -1.0
        if not low <= found <= high:
            raise ValueError
        return found

    def show(value: float) -> str:
        return quoted("forever") if forever and value < 0 else str(int(value)) if value == int(value) else repr(value)

    limits = f"from {low:g} {unit}" + (f" to {high:g} {unit}" if high < 10**9 else "")
    example = '90 or "5m"' if unit == "s" else '50 or "0.1s"'
    return Rule(f"a time {limits}, such as {example}{', or forever' if forever else ''}", read, show)


def choice(*words: str) -> Rule:
    def read(value: Any, folder: Path) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return Rule(f"one of {', '.join(words)}", read, quoted)


def switch() -> Rule:
    meanings = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

    def read(value: Any, folder: Path) -> bool:
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value.strip().lower() not in meanings:
            raise ValueError
        return meanings[value.strip().lower()]

    return Rule("true or false", read, lambda value: "true" if value else "false")


def path() -> Rule:
    def read(value: Any, folder: Path) -> Path:
        if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
            raise ValueError
        return (folder / Path(value).expanduser()).absolute()

    return Rule("a path", read, quoted)


def text(pattern: str, expects: str) -> Rule:
    def read(value: Any, folder: Path) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Rule(expects, read, quoted)


def several(rule: Rule, separator: str) -> Rule:
    """A list in a file or of repeated flags; text with a separator in the environment."""

    def read(value: Any, folder: Path) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part for part in value.split(separator) if part.strip()]
        if not isinstance(value, list | tuple):
            raise ValueError
        return tuple(rule.read(part, folder) for part in value)

    return Rule(
        f"a list, each {rule.expects}", read, lambda value: "[" + ", ".join(rule.show(part) for part in value) + "]"
    )


def watts() -> Rule:
    """`{CPU = 15}` in a file, `CPU=15,base=4` as text."""

    def read(value: Any, folder: Path) -> dict[str, float]:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            parts = [part for text in value for part in str(text).split(",") if part.strip()]
            value = dict(part.split("=", 1) for part in parts)
        if not isinstance(value, Mapping):
            raise ValueError
        found = {str(name).strip(): _plain(amount) for name, amount in value.items()}
        if not all(name and 0 < amount < math.inf for name, amount in found.items()):
            raise ValueError
        return found

    def show(value: Mapping[str, float]) -> str:
        return "{" + ", ".join(f"{quoted(name)} = {amount!r}" for name, amount in value.items()) + "}"

    return Rule("watts above 0 by device, such as CPU=15,base=4", read, show)


def quoted(value: object) -> str:
    """A TOML string; JSON's escapes are TOML's too, but for DEL, which TOML does not take raw."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def brief(count: float) -> str:
    """Bytes as people say them, e.g. `1.5 GiB`."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def _measure(value: Any) -> tuple[float, str]:
    """Number and unit; no unit is the empty text."""
    if isinstance(value, str):
        match = _MEASURE.fullmatch(value.strip())
        if match is None:
            raise ValueError
        known = match[2].lower() in _SIZES or match[2].lower() in _SPANS or match[2] in ("", "%")
        if not known or not math.isfinite(float(match[1])):
            raise ValueError
        return float(match[1]), match[2]
    return _plain(value), ""


def _plain(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    found = float(value)
    if not math.isfinite(found):
        raise ValueError
    return found


def _show_size(value: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor and value % factor == 0:
            return quoted(f"{value // factor} {unit}")
    return str(value)

"""JSON from strangers becomes dataclasses only where every field is what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from edgert.fields import build, schema
from edgert.profile import Profile


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    count: int


@dataclass(frozen=True)
class Thing:
    name: str
    size: int
    colour: Colour
    mode: Literal["a", "b"]
    tags: tuple[str, ...]
    weights: dict[str, int]
    rows: list[dict[str, Any]]
    note: str | None = None


GOOD: dict[str, Any] = {
    "name": "x", "size": 3, "colour": "red", "mode": "a", "tags": ["p", "q"], "weights": {"u4": 1}, "rows": [{"k": 1}],
}  # fmt: skip


def test_good() -> None:
    thing = build(Thing, GOOD, "thing")
    assert thing == Thing("x", 3, Colour.RED, "a", ("p", "q"), {"u4": 1}, [{"k": 1}])
    assert build(Thing, {**GOOD, "note": "n"}, "thing").note == "n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 5), ("name", None), ("size", "3"), ("size", 3.0), ("size", True), ("size", 10**400), ("size", None),
        ("colour", "green"), ("colour", []), ("mode", "c"), ("tags", "pq"), ("tags", [1]), ("tags", {"p": 1}),
        ("weights", [1]), ("weights", {"u4": 1.5}), ("rows", None), ("rows", ["x"]), ("rows", [[]]), ("note", 1),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"thing: {field}"):
        build(Thing, {**GOOD, field: value}, "thing")


def test_missing_and_unknown_fields() -> None:
    with pytest.raises(ValueError, match="no field 'count'"):
        build(Inner, {}, "inner")
    with pytest.raises(ValueError, match="unknown field 'more'"):
        build(Inner, {"count": 1, "more": 2}, "inner")
    for data in (None, [], "x", 1):
        with pytest.raises(ValueError, match="expected an object"):
            build(Inner, data, "inner")


def test_the_schema_says_what_is_taken() -> None:
    committed = json.loads((Path(__file__).parents[1] / "docs" / "profile.schema.json").read_text("utf-8"))
    assert committed == schema(Profile), "docs/profile.schema.json is out of date: write schema(Profile) there"
    assert committed["required"] == ["version", "machine", "devices"]
    model = committed["$defs"]["DeviceModel"]
    assert model["properties"]["active_w"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    assert model["properties"]["precision"] == {"enum": ["f32", "f16"]}
    assert model["additionalProperties"] is False

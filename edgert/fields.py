"""Dataclasses out of JSON that somebody else may have written: every field is there and is what its type says."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MAX_INTEGER = 2**53  # beyond it JSON readers disagree about integers; no size here comes near


def build(cls: type[T], data: Any, what: str) -> T:
    """An instance of a dataclass from a JSON object.

    Args:
        data: the object; lists become tuples where the field is one.
        what: what the object is, for the message.

    Raises:
        ValueError: a field is missing, unknown, or of another type; the message names it and its value.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is {_short(data)}, expected an object")
    hints = _hints(cls)  # type: ignore[arg-type]
    declared = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(declared))
    if unknown:
        raise ValueError(f"{what} has an unknown field {unknown[0]!r}")
    values = {}
    for name, declaration in declared.items():
        if name in data:
            values[name] = _convert(data[name], hints[name], f"{what}: {name}")
        elif declaration.default is MISSING and declaration.default_factory is MISSING:
            raise ValueError(f"{what} has no field {name!r}")
    return cls(**values)


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; Python compiles the text of each whenever it is asked."""
    return get_type_hints(cls)


def schema(cls: type) -> dict[str, Any]:
    """What `build` takes for a dataclass, as JSON Schema (https://json-schema.org/draft/2020-12)."""
    definitions: dict[str, Any] = {}
    _define(cls, definitions)
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__}
    return {**root, **definitions.pop(cls.__name__), "$defs": definitions}


def _define(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to a dataclass's schema, which is added to the definitions."""
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}  # one that contains itself ends here
        hints = _hints(cls)
        declared = fields(cls)
        needed = [f.name for f in declared if f.default is MISSING and f.default_factory is MISSING]
        definitions[cls.__name__] = {
            "type": "object",
            "properties": {f.name: _type(hints[f.name], definitions) for f in declared},
            "required": needed,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(a, definitions) for a in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (tuple, list):
        return {"type": "array", "items": _type(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1], definitions)}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"enum": [str(member) for member in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        return _define(kind, definitions)
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    return {"type": names[kind]} if kind in names else {}


def check_rows(rows: list[dict[str, Any]], columns: Mapping[str, type], what: str) -> None:
    """Raise `ValueError` unless every row has these columns, each of its type."""
    for row in rows:
        for name, kind in columns.items():
            _convert(row.get(name), kind, f"{what}: {name}")


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (tuple, list):
        if isinstance(value, (list, tuple)):
            return origin(_convert(item, arguments[0], where) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        if value in kind.__members__.values():
            return kind(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
            return value
    elif kind is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER
        if whole or isinstance(value, float):
            return float(value)
    elif isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, where)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"{where} is {_short(value)}, expected {_name(kind)}")


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "an integer beyond 2^53"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)) if not get_args(kind) else str(kind)

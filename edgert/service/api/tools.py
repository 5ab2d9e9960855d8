"""Calls of tools in what a model writes.

Models write calls as they were trained to; `_MARKERS` is the table of those ways that are read here. Where the client
asks for a call (`tool_choice` `required` or a name), the answer is held to a JSON schema instead, without markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgert.service.contract import Constraint

# How calls begin and how they end; None: with the text.
_MARKERS: dict[str, str | None] = {
    "<tool_call>": "</tool_call>",  # Hermes, Qwen: {"name": …, "arguments": {…}}
    "[TOOL_CALLS]": None,  # Mistral: [{"name": …, "arguments": {…}}, …], newer ones NAME[ARGS]{…}
    "<|python_tag|>": None,  # Llama 3.1: {"name": …, "parameters": {…}}; …
}
# Llama 3 writes the bare object; so do others where their tokenizer drops the marker as a special token.
_BARE = ('{"name":"', '[{"name":"')
_MISTRAL = re.compile(r"\s*([a-zA-Z0-9_.-]+)\[ARGS\]\s*")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A call, or a part of one.

    Attributes:
        name: of the function; None where this goes on with the arguments of the call before.
        arguments: JSON, or the next part of it.
    """

    name: str | None
    arguments: str


Found = list[str | Call]


class Reader(Protocol):
    """Takes text as it is generated and gives content and calls, in order.

    How the text is divided into pieces makes no difference to what comes out, joined.
    """

    def feed(self, text: str) -> Found: ...

    def finish(self) -> Found:
        """What is left when no text follows."""
        ...


class MarkedReader:
    """Calls among other text by the markers above, or as the whole of the text.

    What stands between markers and is no call is given as text. White space around calls is left out.

    Args:
        names: the functions there are; a bare object counts as a call only with one of these names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""  # not given away yet: it may belong to a call
        self._gap = ""  # white space before the call that is being read
        self._marker: str | None = None  # of the call that is being read
        self._fresh = True  # nothing but white space so far
        self._bare = False  # all of the text looks like a call
        self._called = False

    def feed(self, text: str) -> Found:
        self._held += text
        found: Found = []
        while self._step(found):
            pass
        return found

    def _step(self, found: Found) -> bool:
        """Whether there may be more to do with what is held."""
        if self._bare:
            return False
        if self._marker is not None:
            return self._read_call(found)
        if self._fresh:
            squeezed = "".join(self._held.split())
            self._bare = squeezed.startswith(_BARE)
            if self._bare or any(start.startswith(squeezed) for start in _BARE):
                return False
            self._fresh = False
        at, marker = min(((at, m) for m in _MARKERS if (at := self._held.find(m)) >= 0), default=(-1, None))
        if marker is not None:
            text = self._held[:at]
            self._gap = text[len(text.rstrip()) :]
            _give(found, text.rstrip())
            self._held, self._marker = self._held[at + len(marker) :], marker
            return True
        safe = len(self._held[: len(self._held) - _possible_start(self._held)].rstrip())
        _give(found, self._held[:safe])
        self._held = self._held[safe:]
        return False

    def _read_call(self, found: Found) -> bool:
        assert self._marker is not None
        end = _MARKERS[self._marker]
        at = self._held.find(end) if end is not None else -1
        if end is None or at < 0:
            return False
        inside, self._held = self._held[:at], self._held[at + len(end) :]
        self._give_calls(found, inside, end)
        return True

    def _give_calls(self, found: Found, inside: str, end: str) -> None:
        calls = _calls(inside)
        if calls is None:
            _give(found, f"{self._gap}{self._marker}{inside}{end}")
        else:
            found += calls
            self._called = True
        self._marker = None

    def finish(self) -> Found:
        found: Found = []
        if self._marker is not None:
            self._give_calls(found, self._held, "")
        elif self._bare and (calls := _calls(self._held)) and all(call.name in self._names for call in calls):
            found += calls
        elif not (self._called and self._held.isspace()):
            _give(found, self._held)
        self._held = ""
        return found


class ListReader:
    """All of the text is an array of calls, as `required_call` makes the model write it."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def feed(self, text: str) -> Found:
        self._parts.append(text)
        return []

    def finish(self) -> Found:
        text = "".join(self._parts)
        found: Found = []
        found += _calls(text) or ([text] if text else [])
        return found


class NamedReader:
    """All of the text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> Found:
        if not text:
            return []
        name, self._name = self._name, None
        return [Call(name, text)]

    def finish(self) -> Found:
        return []


def required_call(functions: Sequence[Mapping[str, Any]], *, parallel: bool) -> Constraint:
    """What holds a model to calling one or more of some functions: an array of names with arguments.

    Args:
        functions: `{"name": str, "parameters": JSON schema or None}`.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for number, function in enumerate(functions):
        key = f"tool{number}"
        definitions[key] = _moved(parameters(function), f"#/$defs/{key}")
        calls.append({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{key}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": definitions}
    if not parallel:
        schema["maxItems"] = 1
    return Constraint("json_schema", schema)


def parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments; without one it takes none (as OpenAI says)."""
    given: Mapping[str, Any] | None = function.get("parameters")
    return _NO_PARAMETERS if given is None else given


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it now stands inside another one."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(each, place) for each in schema] if isinstance(schema, list) else schema


def _calls(text: str) -> list[Call] | None:
    """The calls that a text consists of; None where it consists of anything else."""
    calls: list[Call] = []
    at = 0
    try:
        while at < len(text):
            if text[at].isspace() or text[at] in ",;":
                at += 1
                continue
            if text.startswith("[TOOL_CALLS]", at):  # Mistral repeats it
                at += len("[TOOL_CALLS]")
                continue
            name = _MISTRAL.match(text, at)
            value, at = _DECODER.raw_decode(text, at if name is None else name.end())
            if name is not None:
                value = {"name": name[1], "arguments": value}
            calls += [_call(each) for each in (value if isinstance(value, list) else [value])]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return calls or None


def _call(value: Any) -> Call:
    """A call of what a model wrote.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    name = value["name"]
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some write JSON in JSON
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError("no call")
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _possible_start(text: str) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = max(map(len, _MARKERS)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in _MARKERS):
            return size
    return 0


def _give(found: Found, text: str) -> None:
    if text:
        found.append(text)

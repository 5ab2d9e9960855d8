"""What an adaptation of transformers' code is; `tracing.py` has the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adaptation:
    """Something of transformers that is replaced while a model is traced.

    Attributes:
        name: short, for messages.
        reason: what fails without it, with the error.
        until: the upstream change that makes it unnecessary.
        applies: whether a model needs it, told by what it has rather than by its name.
        apply: puts it in force, and undoes it when the context ends.
    """

    name: str
    reason: str
    until: str
    applies: Callable[[PreTrainedModel], bool]
    apply: Callable[[PreTrainedModel], AbstractContextManager[None]]


@contextmanager
def replaced(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes, each `(owner, name, value)`, and put back what was there, or take away what was not."""
    missing = object()
    before = [
        (owner, name, {**vars(owner), **vars(owner).get("_modules", {})}.get(name, missing))
        for owner, name, _ in attributes
    ]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

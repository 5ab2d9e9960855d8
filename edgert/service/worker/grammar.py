"""Grammars that a text must follow: which tokens may come next. llguidance does the work.

Each token is chosen among those that keep the text on its way to a complete one. JSON is written with the spaces that
Python writes, and no others: a model that is not sure of itself may go on with white space for ever.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BundleError, MissingDependencyError, UsageError

KINDS = ("json", "json_schema", "regex", "lark", "choice")
MAX_CHARS = 2**20
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """One text on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._check()

    def allowed(self) -> NDArray[np.bool_]:
        """bool `[vocab_size]`: the tokens that may come next; those that end a text where it is complete.

        Raises:
            UsageError: there are none, or the grammar has become too complex.
        """
        raw = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.zeros(self._vocab_size, dtype=np.bool_)  # a model may have more logits than its tokenizer has ids
        bits = np.unpackbits(raw, count=min(8 * raw.size, self._vocab_size), bitorder="little")
        mask[: bits.size] = bits
        if not mask.any():
            raise UsageError("grammar: no token can come next, so no text follows it")
        return mask

    def take(self, token: int) -> None:
        """Go on after a token.

        Raises:
            UsageError: it is none of the allowed ones, or the grammar has become too complex.
        """
        if not self._matcher.consume_token(token):
            self._check()
            raise UsageError(f"grammar: token {token} does not follow it")
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"grammar: {_line(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for one tokenizer; may be used from several threads.

    Args:
        folder: the tokenizer's.
        vocab_size: of the model's logits.
        ends: tokens that end a text.
    """

    def __init__(self, folder: Path, vocab_size: int, ends: Sequence[int]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._ends = list(ends)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, kind: str, value: Any) -> Grammar:
        """A grammar at its beginning; `kind` and `value` as in `contract.Constraint`.

        Raises:
            UsageError: it is no grammar of that kind, or too large.
            MissingDependencyError: llguidance is not installed.
            BundleError: llguidance does not take the tokenizer.
        """
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError("grammars need llguidance: pip install edgert[serve]") from error
        source = _source(kind, value, llguidance.LLMatcher)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._open(llguidance.LLTokenizer)
        return Grammar(llguidance.LLMatcher(self._tokenizer, source, log_level=0), self._vocab_size)

    def _open(self, kind: Any) -> Any:
        try:
            text = (self._folder / "tokenizer.json").read_text("utf-8")
            return kind(text, eos_token=self._ends or None)
        except (OSError, ValueError) as error:
            raise BundleError(f"tokenizer {self._folder}: grammars cannot use it: {_line(str(error))}") from error


def _source(kind: str, value: Any, matcher: Any) -> str:
    """The grammar as llguidance takes it."""
    if kind not in KINDS:
        raise UsageError(f"grammar: kind {kind!r}, expected one of {', '.join(KINDS)}")
    if kind in ("json", "json_schema"):
        schema = {"type": "object"} if kind == "json" else value
        if not isinstance(schema, dict):
            raise UsageError(f"grammar: a JSON schema is an object, not a {type(schema).__name__}")
        _limit(len(json.dumps(schema)))
        try:
            return str(matcher.grammar_from_json_schema(schema, defaults=_JSON_STYLE))
        except ValueError as error:
            raise UsageError(f"grammar: {_line(str(error))}") from error
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise UsageError("grammar: a choice is a list of texts, one at least, none of them empty")
        value, kind = "|".join(re.escape(text) for text in value), "regex"
    if not isinstance(value, str) or not value:
        raise UsageError(f"grammar: of kind {kind} it is text that is not empty")
    _limit(len(value))
    return str(matcher.grammar_from_regex(value) if kind == "regex" else matcher.grammar_from_lark(value))


def _limit(chars: int) -> None:
    if chars > MAX_CHARS:
        raise UsageError(f"grammar: it has {chars} characters, at most {MAX_CHARS} allowed")


def _line(message: str) -> str:
    """A message of several lines, with a picture of the place, as one."""
    return " ".join(message.split())[:300]

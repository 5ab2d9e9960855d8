"""What the service writes down: a line an event, as `name=value` or as JSON. What people write stays out of it.

2026-11-21T20:15:03.120Z info request id=7 model=bookworm code=200 completion_tokens=12 ms=310.2
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, Literal

PRIVATE = ("prompt", "answer")  # facts of `event` that are people's own words
_LOGGER = logging.getLogger("edgert.service")
_LEVELS = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # sd-daemon(3)


def event(name: str, *, level: int = logging.INFO, **facts: object) -> None:
    """Write an event down.

    Args:
        name: of its kind, e.g. `request`.
        facts: what there is to say, None left out. Text of prompts and answers goes by `PRIVATE` names only, and is
            dropped unless `configure` was told to keep it.
    """
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, name, extra={"facts": {k: v for k, v in facts.items() if v is not None}})


def configure(form: Literal["text", "json"], *, prompts: bool = False, stream: Any = None) -> None:
    """Send every log record of this process to a stream, standard error if none is given."""
    handler = logging.StreamHandler(stream or sys.stderr)
    journal = stream is None and form == "text" and "JOURNAL_STREAM" in os.environ and not sys.stderr.isatty()
    handler.setFormatter(_Formatter(form, prompts=prompts, journal=journal))
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # uvicorn tells of its own start and end, which the service does itself, at the right moments
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def trace(exc_info: Any) -> str:
    """Where an exception comes from and of which class it is, without its text, which may quote what people write."""
    found: traceback.TracebackException | None = traceback.TracebackException(*exc_info, lookup_lines=False)
    lines = ["Traceback:"]
    while found is not None:
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in found.stack]
        lines.append(found.exc_type.__name__ if found.exc_type is not None else "an exception")
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\n".join(lines)


class Quiet(logging.Formatter):
    """For processes that write their log by themselves: no exception's text."""

    def formatException(self, ei: Any) -> str:
        return trace(ei)


class _Formatter(logging.Formatter):
    """One line a record. The journal has times of its own, and takes the level as `<6>` before the line."""

    def __init__(self, form: Literal["text", "json"], *, prompts: bool, journal: bool) -> None:
        super().__init__()
        self._form = form
        self._prompts = prompts
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        given: Mapping[str, Any] = getattr(record, "facts", {})
        facts = {k: v for k, v in given.items() if self._prompts or k not in PRIVATE}
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info) if self._prompts else trace(record.exc_info)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        level, message = record.levelname.lower(), record.getMessage()
        if self._form == "json":
            source = {} if record.name == _LOGGER.name else {"logger": record.name}
            line = {"at": moment, "level": level, "event": message, **source, **facts}
            return json.dumps(line, default=str, ensure_ascii=True)
        text = " ".join([_word(message, spaces=True), *(f"{k}={_word(_brief(v))}" for k, v in facts.items())])
        return f"<{_LEVELS.get(record.levelname, 6)}>{text}" if self._journal else f"{moment} {level} {text}"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _word(text: str, *, spaces: bool = False) -> str:
    """The text, quoted where it would be taken for more than one value or line: nobody can forge a line of the log."""
    plain = text.isprintable() and '"' not in text and "=" not in text and (spaces or " " not in text)
    return text if plain and text else json.dumps(text)

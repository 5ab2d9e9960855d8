"""What the service writes down, and what it keeps out of it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from edgert.service import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(form: Any, *, prompts: bool = False) -> str:
    stream = io.StringIO()
    logs.configure(form, prompts=prompts, stream=stream)
    logs.event("request", id=7, model="a b", code=200, ms=310.2345678, client=None, prompt="a secret")
    logs.event("load", level=logging.WARNING, detail='forged\n2026 "line" x=1')
    logging.getLogger("edgert.service.worker").info("from below")
    try:
        try:
            raise KeyError("a secret")
        except KeyError as error:
            raise ValueError("a secret in an error") from error
    except ValueError:
        logging.getLogger("other").exception("it failed")
    return stream.getvalue()


def test_text() -> None:
    request, load, below, failed = written("text").splitlines()
    assert request.endswith('Z info request id=7 model="a b" code=200 ms=310.2')
    assert load.endswith(r' warning load detail="forged\n2026 \"line\" x=1"')
    assert below.endswith(" info from below")
    assert r"in written\nValueError" in failed


def test_json() -> None:
    request, load, below, failed = map(json.loads, written("json").splitlines())
    assert {k: v for k, v in request.items() if k != "at"} == {
        "level": "info", "event": "request", "id": 7, "model": "a b", "code": 200, "ms": 310.2345678,
    }  # fmt: skip
    assert load["detail"] == 'forged\n2026 "line" x=1'
    assert below["logger"] == "edgert.service.worker"
    assert "in written\nValueError" in failed["error"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_people_write_is_kept_only_if_asked_for(form: str) -> None:
    assert "secret" not in written(form)
    assert "KeyError" in written(form)
    assert "a secret" in written(form, prompts=True)
    assert "ValueError: a secret in an error" in written(form, prompts=True)


def test_the_journal_gets_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure("text")
    logs.event("failure", level=logging.ERROR, model="m")
    assert stream.getvalue() == "<3>failure model=m\n"

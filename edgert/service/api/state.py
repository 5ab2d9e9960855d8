"""What the endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest

from edgert.service.contract import Request, Service, Usage
from edgert.service.settings import Settings

if TYPE_CHECKING:
    from edgert.service.api.metrics import Metrics

RECORD = "edgert.record"  # in a request's scope


@dataclass
class Record:
    """What is written down about one HTTP request.

    Attributes:
        model: its name, once the engine has accepted it.
        usage: by the number of the choice.
        body_bytes: of its body, as far as it has come.
        prompt, answer: text, only where the service logs it.
    """

    model: str | None = None
    usage: dict[int, Usage] = field(default_factory=dict)
    body_bytes: int = 0
    prompt: Any = None
    answer: list[str] | None = None


class State:
    """The service behind the endpoints.

    Attributes:
        started_s: when, in seconds since 1970.
        body_bytes: of all requests that are there now.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service = service
        self.settings = settings
        self.started_s = int(time.time())
        self.body_bytes = 0

    @cached_property
    def metrics(self) -> Metrics:
        from edgert.service.api.metrics import Metrics  # the first request loads what it needs

        return Metrics(self.service.status)

    def record(self, http: HttpRequest) -> Record:
        """Where it is written down what a request does."""
        record: Record = http.scope.setdefault(RECORD, Record())
        return record

    def write_down(self, http: HttpRequest, request: Request) -> None:
        """Keep what was asked for the log, where the service is told to."""
        if self.settings.log_prompts:
            record = self.record(http)
            from edgert.service.api.asking import without_media

            record.prompt = without_media(request.messages or ()) if request.prompt is None else request.prompt
            record.answer = []


def state_of(http: HttpRequest) -> State:
    state: State = http.app.state.edgert
    return state

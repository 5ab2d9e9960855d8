"""A service whose state is scripted, for looking at the dashboard: nothing is computed, all figures are made up.

python tests/dashboard_service.py [PORT]     serves it, for a person with a browser
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from fake_service import FakeService

from edgert.errors import UnknownModelError, WorkerError
from edgert.service.contract import ModelStatus, PlacedBlocks, PowerStatus, ServiceEvent, Status

NOW_S = 1_795_305_600.0  # 2026-11-22 00:00 UTC


def _runs(phase: str, *ends: tuple[int, str]) -> tuple[PlacedBlocks, ...]:
    """Runs of blocks up to each of the ends, half of them attention."""
    first, runs = 0, []
    for last, device in ends:
        kinds = {"attention": (last - first + 1) // 2, "ffn": (last - first + 2) // 2}
        runs.append(PlacedBlocks(phase, first, last, device, kinds))  # type: ignore[arg-type]
        first = last + 1
    return tuple(runs)


MODELS = (
    ModelStatus(
        "qwen3-1.7b", "decoder", "ready", pinned=True, plan="balanced: attention NPU, rest GPU and CPU",
        blocks=_runs("prefill", (35, "GPU@f16"), (55, "NPU@f16+static"))
        + _runs("decode", (15, "NPU@f16+static"), (39, "GPU@f16"), (55, "CPU@kernels")),
        devices=("NPU@f16+static", "GPU@f16", "CPU@kernels"), memory_bytes=1_840_000_000, kv_bytes=212_000_000,
        context_length=32768, running=3, waiting=1, tokens_per_second=41.6, watts=9.8, joules_per_token=0.236,
        energy_provenance="measured", loaded_s=8_130.0, idle_s=None, unload_in_s=None,
    ),
    ModelStatus(
        "bookworm", "decoder", "idle", plan="single device CPU@kernels", blocks=_runs("both", (23, "CPU@kernels")),
        devices=("CPU@kernels",), memory_bytes=61_000_000, kv_bytes=4_200_000, context_length=1024, loaded_s=412.0,
        idle_s=52.0, unload_in_s=248.0, restarts=1,
        warnings=("GPU.1 failed and is left alone for 2 min: the plan goes on without it",),
    ),
    ModelStatus("gemma-3-1b"),
    ModelStatus("minilm-embeddings"),
)  # fmt: skip
EVENTS = tuple(
    ServiceEvent(i + 1, NOW_S - 600 + 40 * i, kind, model, detail)
    for i, (kind, model, detail) in enumerate([
        ("load", "qwen3-1.7b", "ready after 3.4 s, pinned"),
        ("load", "bookworm", "ready after 0.4 s"),
        ("power", None, "balanced: on battery"),
        ("plan", "qwen3-1.7b", "fastest → balanced: attention NPU, rest GPU and CPU"),
        ("failure", "bookworm", "GPU.1 did not answer within 60 s; 2 requests go on from the tokens already sent"),
        ("quarantine", None, "GPU.1 for 2 min"),
        ("recovery", "bookworm", "ready after 0.4 s on CPU@kernels; all streams went on"),
    ])
)  # fmt: skip
EXAMPLE = Status(
    "0.9.0", 11_520.0, MODELS,
    PowerStatus("auto", "balanced", "on battery", True, 0.64, False, True, 15.0, 20_000.0, 8_412.0),
    EVENTS, 8_000_000_000, 1_901_000_000, 64, 0, {"GPU.1": "did not answer within 60 s; tried again in 2 min"},
)  # fmt: skip
EMPTY = Status("0.9.0", 12.0, (), PowerStatus())
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
HOSTILE_STATUS = replace(
    EXAMPLE,
    models=(
        replace(MODELS[0], name=HOSTILE, plan=HOSTILE, warnings=(HOSTILE,), blocks=_runs("both", (3, HOSTILE))),
        ModelStatus("a" * 128),
        ModelStatus("../../etc/passwd"),
    ),
    power=replace(EXAMPLE.power, reason=HOSTILE),
    events=(ServiceEvent(1, NOW_S, HOSTILE, HOSTILE, HOSTILE), ServiceEvent(2, 1e300, "load", None, "\u202etxt")),
    quarantined={HOSTILE: HOSTILE},
    version=HOSTILE,
)


class Scripted(FakeService):
    """Shows what it is told to, and notes what it is asked to do.

    Attributes:
        shown: the state.
        asked: how often that was looked at.
        listening: readers of events.
    """

    def __init__(self, shown: Status = EXAMPLE, *, lively: bool = False) -> None:
        super().__init__()
        self.shown, self.lively = shown, lively
        self.asked = self.listening = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def tell(self, event: ServiceEvent) -> None:
        """Something happens; from any thread, once somebody listens."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.news.put_nowait, event)

    async def load(self, model: str, *, pin: bool | None = None, keep_alive_s: float | None = None) -> ModelStatus:
        self.loaded.append((model, pin, keep_alive_s))
        if model == "minilm-embeddings":
            raise WorkerError("minilm-embeddings: 612 MB do not fit: 1.9 GB of 2.0 GB are taken, all of it pinned")
        found = self._find(model)
        if found.state == "unloaded":
            found = replace(MODELS[1], name=model, restarts=0, warnings=())
        return self._put(found if pin is None else replace(found, pinned=pin))

    async def unload(self, model: str) -> ModelStatus:
        self.unloaded.append(model)
        return self._put(ModelStatus(self._find(model).name))

    def models(self) -> tuple[ModelStatus, ...]:
        return self.shown.models

    def status(self) -> Status:
        self.asked += 1
        if self.lively:
            swing = math.sin(self.asked / 2.1) + 0.5 * math.sin(self.asked / 0.8)
            speed, watts = 41.6 + 3 * swing, 9.8 + 0.6 * swing
            first = replace(self.shown.models[0], tokens_per_second=speed, watts=watts, joules_per_token=watts / speed)
            self.shown = replace(self.shown, models=(first, *self.shown.models[1:]))
        return self.shown

    async def events(self) -> AsyncIterator[ServiceEvent]:
        self._loop = asyncio.get_running_loop()
        self.listening += 1
        try:
            async for event in super().events():
                yield event
        finally:
            self.listening -= 1

    def _find(self, name: str) -> ModelStatus:
        for model in self.shown.models:
            if model.name == name:
                return model
        raise UnknownModelError(f"no model {name!r}")

    def _put(self, model: ModelStatus) -> ModelStatus:
        models = tuple(model if each.name == model.name else each for each in self.shown.models)
        self.shown = replace(self.shown, models=models)
        return model


def lively() -> Scripted:
    """The example as of now, moving, and marked as one."""
    events = tuple(replace(event, at_s=time.time() - 400 + 40 * event.number) for event in EVENTS)
    return Scripted(replace(EXAMPLE, events=events, version="example, all figures are made up"), lively=True)


def take_picture(path: Path) -> None:
    """The picture in docs/: two minutes of the page, in a few seconds."""
    from chromium import Page
    from served import KEY, serving

    with tempfile.TemporaryDirectory() as folder, serving(lively()) as url, Page(Path(folder)) as page:
        faster = """const [set, now] = [setTimeout, performance.now.bind(performance)];
            window.setTimeout = (f, ms) => set(f, ms / 20); performance.now = () => 20 * now();"""
        page.send("Page.addScriptToEvaluateOnNewDocument", source=faster)
        page.open(f"{url}/#token={KEY.replace(' ', '%20')}")
        page.until("/^M[0-4][. ]/.test(document.querySelector('#speed-spark .line')?.getAttribute('d'))")
        page.size(1280, page.js("document.documentElement.scrollHeight"))
        page.screenshot(path)
        page.open("about:blank")


if __name__ == "__main__":
    import uvicorn

    from edgert.service.api.app import create_app
    from edgert.service.settings import Settings

    if sys.argv[1:2] == ["--picture"]:
        take_picture(Path(sys.argv[2]))
    else:
        port = int(sys.argv[1]) if len(sys.argv) > 1 else 11536
        uvicorn.run(create_app(lively(), Settings(), key=None), port=port, log_level="warning")

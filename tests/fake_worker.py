"""A worker without a model: it speaks the protocol, writes words that follow from the prompt, and fails on demand.

What it does is told by `fake.json` in its bundle's folder:

    delay_s         a step takes so long
    units           hardware of its plan; what must be avoided is replaced by the CPU
    plans           names of further plans that it offers
    faults          one of each of its processes, in the order of their starts: `[at, how]`. `at` is "load", "stop", or
                    the number of the token before which it happens; `how`: exit, kill, hang, failed, garbage, half, or,
                    while loading, never, refuse, exit
    watts, joules   of the machine, and of one token
    cached_bytes    of idle caches

A prompt with `poison` in it ends every worker that begins with it; `refuse` is refused; `nan` fails with unit NPU.
Each process writes a line to `log` in that folder for what it is asked to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from edgert.service.protocol import (
    Cancel,
    Drop,
    Dropped,
    Embed,
    Failed,
    Load,
    Message,
    Pace,
    Piece,
    Ping,
    PlanOffer,
    PlanUsed,
    Pong,
    Ready,
    Refused,
    Start,
    Started,
    Step,
    Stop,
    UsePlan,
    Vectors,
    decode,
    encode,
)

WORDS = ("the", "old", "cat", "sat", "by", "a", "warm", "fire", "and", "saw", "how", "rain", "fell", "on", "a", "roof")


def text(prompt: object, tokens: int) -> str:
    """What is written after a prompt."""
    return "".join(word(prompt, number)[1] for number in range(tokens))


def word(prompt: object, number: int) -> tuple[int, str]:
    """A token and its text."""
    digest = hashlib.sha256(f"{prompt}/{number}".encode()).digest()
    token = int.from_bytes(digest[:4], "little")
    return token, WORDS[token % len(WORDS)] + " "


class FakeWorker:
    def __init__(self, load: Load) -> None:
        self.folder = Path(load.bundle)
        self.load = load
        script = self.folder / "fake.json"
        self.script: dict[str, Any] = json.loads(script.read_text("utf-8")) if script.exists() else {}
        life = self._count()
        faults = self.script.get("faults", [])
        self.fault: list[Any] = faults[life] if life < len(faults) else [None, None]
        self.running: dict[int, tuple[Start, list[int]]] = {}
        self.sent = 0
        self.commands: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def run(self) -> None:
        self._log(f"load {self.load.device or 'any'} avoid={','.join(self.load.avoid)}")
        if self.fault[0] == "load":
            self._break(self.fault[1])
        offers = [self._offer(name) for name in (self._plan(), *self.script.get("plans", []))]
        send(Ready("decoder", 4096, offers[0].name, offers, self.script.get("sandbox", []), [], False))
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                command = self.commands.get(timeout=self.script.get("delay_s", 0.0) if self.running else None)
            except queue.Empty:
                self._step()
                continue
            if command is None:
                return
            self._obey(command)

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            message = decode(line)
            if isinstance(message, Stop):
                if self.fault[0] == "stop":
                    self._break(self.fault[1])
                break
            self.commands.put(message)
        self.commands.put(None)

    def _obey(self, command: Message) -> None:
        if isinstance(command, Start):
            prompt = command.prompt or json.dumps(command.messages)
            self._log(f"start {prompt} {len(command.generated)} seed={command.sampling.get('seed')}")
            if "poison" in prompt:
                os._exit(9)
            if "nan" in prompt and "NPU" not in self.load.avoid:
                self._break("failed")
            if "refuse" in prompt:
                send(Refused(command.id, "ContextOverflowError", "too long", 5000, 4096))
                return
            self.running[command.id] = (command, list(command.generated))
            send(Started(command.id, len(prompt), 1))
        elif isinstance(command, Embed):
            self._log(f"embed {len(command.texts)}")
            if any("poison" in each for each in command.texts):
                os._exit(9)
            send(Vectors(command.id, [[1.0, 0.0] for _ in command.texts], 7))
        elif isinstance(command, Cancel):
            self._log("cancel")
            self.running.pop(command.id, None)
        elif isinstance(command, Ping):
            cached = self.script.get("cached_bytes", 0)
            send(Pong(command.id, cached, cached, self.script.get("watts"), "measured"))
        elif isinstance(command, UsePlan):
            self._log(f"plan {command.name}")
            send(PlanUsed(command.name, "no memory" if command.name == "bad" else None))
        elif isinstance(command, Pace):
            self._log(f"pace {command.share}")
        elif isinstance(command, Drop):
            self._log(f"drop {command.park}")
            send(Dropped(1000, 1 if command.park else 0))

    def _step(self) -> None:
        pieces = []
        for number, (start, tokens) in list(self.running.items()):
            if self.fault[0] == self.sent:
                if pieces:
                    send(Step(pieces))
                self._break(self.fault[1])
            self.sent += 1
            token, written = word(start.prompt or json.dumps(start.messages), len(tokens))
            tokens.append(token)
            ended = len(tokens) >= start.sampling.get("max_tokens", 8)
            count = len(tokens) - len(start.generated)
            joules = self.script.get("joules")
            pieces.append(
                Piece(
                    number,
                    written,
                    token,
                    finish_reason="length" if ended else None,
                    prefill_us=10.0,
                    decode_us=1.0 * count,
                    joules=None if joules is None else joules * count,
                    joules_provenance="unavailable" if joules is None else "measured",
                )
            )
            if ended:
                del self.running[number]
        send(Step(pieces))

    def _break(self, how: str) -> None:
        if how == "exit":
            print("the driver fell over", file=sys.stderr, flush=True)
            os._exit(3)
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
        elif how in ("hang", "never"):
            threading.Event().wait()
        elif how == "failed":
            send(Failed("DeviceNonsenseError", "NPU@default failed: NaN", "NPU"))
        elif how == "refuse":
            send(Failed("BundleError", "model.bin has hash 12, expected 34"))
        elif how == "garbage":
            OUTPUT.write(b'{"is":"Step","pieces":[{"id":')
            OUTPUT.write(b"\n")
        elif how == "half":
            OUTPUT.write(encode(Step([Piece(number, "half", 5) for number in self.running]))[:-9])
            os._exit(0)
        threading.Event().wait()  # until it is killed

    def _plan(self) -> str:
        if self.load.device is not None:
            return f"single device {self.load.device}"
        return "+".join("CPU" if unit in self.load.avoid else unit for unit in self.script.get("units", ["CPU"]))

    def _offer(self, name: str) -> PlanOffer:
        units = [unit for unit in name.split("+") if unit.isupper()] or ["CPU"]
        block = {"phase": "both", "first": 0, "last": 3, "device": f"{units[0]}@default", "kinds": {"ffn": 2}}
        return PlanOffer(name, None, None, None, units, [block])

    def _log(self, line: str) -> None:
        with (self.folder / "log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _count(self) -> int:
        """How many processes there have been before this one."""
        log = self.folder / "log"
        return log.read_text("utf-8").count("load ") if log.exists() else 0


def send(message: Message) -> None:
    OUTPUT.write(encode(message))


if __name__ == "__main__":
    OUTPUT = os.fdopen(os.dup(1), "wb", buffering=0)
    FakeWorker(decode(sys.stdin.buffer.readline())).run()  # type: ignore[arg-type]

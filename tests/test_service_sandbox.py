"""What a worker can no longer do in its sandbox, and that it can still do its work. Each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgert.service.worker import sandbox
from edgert.session import Model

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
known = pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="edgert does not know its calls")

ATTEMPTS = """
import ctypes, json, os, socket, subprocess, sys
from pathlib import Path
from edgert.service.worker import sandbox, scheduling

bundle, outside, cache = map(Path, sys.argv[1:4])
held = sandbox.enter(bundle)

def clone(flags):
    code = ctypes.CDLL(None, use_errno=True).unshare(flags)
    if code:
        raise OSError(ctypes.get_errno(), "unshare")

attempts = {
    "internet": lambda: socket.socket().close(),
    "local socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "program": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    "read": lambda: outside.read_text(),
    "write": lambda: outside.with_name("new").write_text("x"),
    "change the bundle": lambda: (bundle / "new").write_text("x"),
    "namespace": lambda: clone(0x10000000),
    "signal": lambda: os.kill(os.getppid(), 0),
    "read the bundle": lambda: (bundle / "manifest.json").read_bytes(),
    "cache": lambda: (cache / "new").write_text("x"),
    "temporary": lambda: __import__("tempfile").NamedTemporaryFile().close(),
    "pipe": lambda: socket.socketpair(),
    "thread": lambda: __import__("threading").Thread(target=bool).start(),
    "background": lambda: scheduling.set_background(True),
}
results = {}
for name, attempt in attempts.items():
    try:
        attempt()
        results[name] = True
    except OSError as error:
        results[name] = False
print(json.dumps({"held": held, "can": results}))
"""


@linux
@known
def test_what_is_given_up(demo_path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("mine")
    cache = tmp_path / "cache"
    environ = {**os.environ, "EDGERT_CACHE": str(cache)}
    command = [sys.executable, "-P", "-c", ATTEMPTS, str(demo_path), str(outside), str(cache)]
    told = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    held, can = result["held"], result["can"]
    if any(text.startswith("without") for text in held):
        pytest.skip(f"this kernel has not all of it: {held}")
    assert can == {
        "internet": False, "local socket": False, "program": False, "read": False, "write": False,
        "change the bundle": False, "namespace": False, "signal": "signals" not in held[1], "read the bundle": True,
        "cache": True, "temporary": True, "pipe": True, "thread": True, "background": True,
    }  # fmt: skip


@linux
def test_the_model_still_runs(demo_path: Path, demo: Model, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edgert.service.worker import sandbox\n"
        "sandbox.enter(Path(sys.argv[1]))\n"
        "import edgert; print(edgert.load(sys.argv[1], device='CPU@f32').generate('Once', max_tokens=4).text)"
    )
    environ = {**os.environ, "EDGERT_CACHE": str(tmp_path)}
    command = [sys.executable, "-P", "-c", script, str(demo_path)]
    inside = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert inside == demo.generate("Once", max_tokens=4).text + "\n"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_by_number(machine: str) -> None:
    """The program, run as the kernel would."""
    column, arch = sandbox._MACHINES[machine]
    program = sandbox._filter(machine)

    def outcome(name: str, argument: int = 0, on: int = arch) -> int:
        return run_filter(program, sandbox._CALLS[name][column], on, argument)

    assert outcome("socket", 1) == outcome("execve") == outcome("ptrace") == sandbox._REFUSE
    assert outcome("clone3") == sandbox._ABSENT
    assert outcome("clone", 0x10000000) == sandbox._REFUSE
    assert outcome("clone", 0x003D0F00) == sandbox._ALLOW  # a thread
    assert outcome("ioprio_set") == sandbox._ALLOW
    assert outcome("socket", on=arch ^ 1) == sandbox._KILL
    if machine == "x86_64":
        assert run_filter(program, 0x40000000 | 41, arch, 0) == sandbox._KILL


def run_filter(program: bytes, number: int, machine: int, argument: int) -> int:
    """A classic BPF program of the few instructions that the filter uses."""
    steps = [program[i : i + 8] for i in range(0, len(program), 8)]
    data, at, register = {0: number, 4: machine, 16: argument}, 0, 0
    while True:
        code, then, otherwise = int.from_bytes(steps[at][:2], sys.byteorder), steps[at][2], steps[at][3]
        value = int.from_bytes(steps[at][4:], sys.byteorder)
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            register = data[value]
        else:
            assert code in (0x15, 0x45)
            at += then if (register == value if code == 0x15 else bool(register & value)) else otherwise


@pytest.mark.skipif(sys.platform == "linux", reason="where there is a sandbox, it is entered by children only")
def test_where_there_is_none() -> None:
    assert sandbox.enter(Path()) == [f"without sandbox: {sys.platform} has none that edgert knows"]


@linux
def test_background_and_back() -> None:
    script = (
        "import os; from edgert.service.worker import sandbox, scheduling; sandbox.first_to_go()\n"
        "for on in (True, False): scheduling.set_background(on); print(os.sched_getscheduler(0))\n"
        "print(open('/proc/self/oom_score_adj').read())"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    assert told[:3] == [str(os.SCHED_BATCH), str(os.SCHED_OTHER), "500"]

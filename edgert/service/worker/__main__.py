"""The worker's process: `python -m edgert.service.worker`, driven over its standard input and output.

Its first line, `Load`, is read before any library is loaded, so that the sandbox holds all of them. What libraries
print goes to standard error: the pipe to the server belongs to messages alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING

from edgert.errors import EdgertError
from edgert.service.logs import Quiet
from edgert.service.protocol import MAX_LINE_BYTES, Failed, Load, Message, decode, encode
from edgert.service.worker import sandbox

if TYPE_CHECKING:
    from edgert.service.worker.serving import Item

log = logging.getLogger("edgert")
BROKEN = 2  # exit code where the server speaks another language


class BrokenLineError(EdgertError):
    """A line is no message; of another version's server, as ours writes none such."""


def read(lines: IO[bytes]) -> Message | None:
    """The next message; None at the end.

    Raises:
        BrokenLineError: the line is none, or too long.
    """
    line = lines.readline(MAX_LINE_BYTES + 1)
    if not line:
        return None
    if len(line) > MAX_LINE_BYTES:
        raise BrokenLineError(f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        return decode(line)
    except ValueError as error:
        raise BrokenLineError("a line that is no message") from error  # without what it says: it may be a prompt


def run(lines: IO[bytes], out: IO[bytes]) -> int:
    """Serve until the lines end; the exit code."""

    def send(message: Message) -> None:
        out.write(encode(message))
        out.flush()

    try:
        load = read(lines)
        if load is None:
            return 0
        if not isinstance(load, Load):
            raise BrokenLineError(f"the first message is {type(load).__name__}, expected Load")
        sandbox.first_to_go()
        held = []
        if load.sandbox:
            folders = [] if load.park is None else [Path(load.park)]
            held = sandbox.enter(Path(load.bundle), writable=folders)
        from edgert.service.worker.serving import Broken, Serving, serve  # and with it all device libraries

        inbox: SimpleQueue[Item] = SimpleQueue()
        try:
            serving = Serving(load, send, inbox, held)
        except EdgertError as error:
            send(Failed(type(error).__name__, str(error), getattr(error, "unit", None)))
            return 1
        except Exception as error:  # a mistake of ours, or of a library: its own text may hold anything
            log.exception("the model cannot be loaded")
            send(Failed("WorkerError", f"{type(error).__name__} while the model was loaded"))
            return 1

        def listen() -> None:
            try:
                while (message := read(lines)) is not None:
                    serving.receive(message)
                serving.receive(None)
            except BrokenLineError as error:
                inbox.put(Broken(str(error)))

        threading.Thread(target=listen, daemon=True, name="commands").start()
        return serve(serving)
    except BrokenLineError as error:
        log.error("%s", error)
        return BROKEN
    except OSError as error:  # the server is gone
        log.error("the server cannot be reached: %s", error)
        return 1


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    handler = logging.StreamHandler()  # standard error
    handler.setFormatter(Quiet("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which drains; its end is the end of input
        signal.signal(number, signal.SIG_IGN)
    code = run(sys.stdin.buffer, out)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # a driver that hangs would hold an orderly end


if __name__ == "__main__":
    main()

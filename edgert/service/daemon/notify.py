"""What systemd wants to hear of a service, as sd_notify(3) says; where there is no systemd nothing happens."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping


class Notifier:
    """Tells systemd how the service is. Takes its variables out of the environment, which workers get too."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        period, process = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        mine = not process or process == str(os.getpid())
        self.watchdog_s: float | None = int(period) / 1e6 if mine and period.isdecimal() and int(period) > 0 else None
        """Within which time `WATCHDOG=1` must be said again; None where nobody waits for it."""

    def tell(self, *lines: str) -> bool:
        """Send lines such as `READY=1`; whether somebody took them."""
        if not self._address or sys.platform == "win32":
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(1.0)
                channel.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False
        return True

"""Where the service listens: sockets of its own, or those that systemd hands over (sd_listen_fds(3))."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import MutableMapping
from pathlib import Path

from edgert.errors import ServiceError
from edgert.folders import cache_folder
from edgert.service.settings import Settings

FIRST_FD = 3  # SD_LISTEN_FDS_START
BACKLOG = 128
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a lock is emptied, which must not happen to what a link leads to


class Lock:
    """Held by a service as long as it lives, so that two do not fight over a socket; its file says who holds it.

    Raises:
        ServiceError: another service holds it, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_folder(path)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
        except OSError as error:
            raise ServiceError(f"lock {path}: {error.strerror}") from error
        if not _lock(self._file):
            os.close(self._file)
            process = holder(path) or "unknown"
            raise ServiceError(f"another service runs already, as process {process} ({path}); `edgert stop` ends yours")
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Idempotent. The file stays: were it removed, two others could each lock one of that name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def lock_file(settings: Settings) -> Path | None:
    """The lock of a service that listens there; None where any number may run, each on a port of its own."""
    if settings.socket is not None:
        return settings.socket.with_name(settings.socket.name + ".lock")
    return cache_folder() / "run" / f"port-{settings.port}.lock" if settings.port else None


def holder(path: Path) -> int | None:
    """The process that holds a lock; None where nobody does."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if _lock(file):
            return None
        text = os.read(file, 32).strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file without waiting; whether that worked. The system unlocks it with the end of the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 64, os.SEEK_SET)  # behind the text, which others must be able to read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def inherited(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that systemd hands over; none where it does not. Takes the variables out of the environment.

    Raises:
        ServiceError: what is handed over is no listening stream socket.
    """
    process, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)  # a socket's own family and address say what it is for
    if sys.platform == "win32" or process != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for number in range(FIRST_FD, FIRST_FD + int(count)):
        try:
            taken = socket.socket(fileno=number)
            listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ServiceError(f"LISTEN_FDS={count}: descriptor {number}: {error.strerror}") from error
        if taken.type != socket.SOCK_STREAM or not listens:
            raise ServiceError(f"LISTEN_FDS={count}: descriptor {number} is no listening stream socket")
        taken.set_inheritable(False)  # or every worker would keep it open
        found.append(taken)
    return found


def unix_socket(path: Path) -> socket.socket:
    """A listening Unix socket that only this user can open, from its first moment on.

    Its folder is made, 0700, where it is missing. The caller holds a lock; so a socket file that nobody answers is what
    an earlier service left behind, and goes.

    Raises:
        ServiceError: somebody answers there, the folder is another user's, or the file cannot be made.
    """
    if sys.platform == "win32":
        raise ServiceError(f"socket {path}: Python knows no Unix sockets on Windows; use port")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(path)
        if path.is_socket() and _answers(path):
            raise ServiceError(f"socket {path}: another program answers there")
        if path.is_socket():
            path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError as error:
        raise ServiceError(f"socket {path}: {error.strerror}") from error
    return listener


def _check_folder(path: Path) -> None:
    """Nobody else may put something else in the place of a file: a socket that listens to what we are asked, or a link.

    Raises:
        ServiceError: the folder belongs to another user, or others may write to it (unless as in /tmp, where they
            cannot remove what is not theirs).
    """
    if sys.platform == "win32":  # where a user's folders are the user's
        return
    folder = path.parent.stat()
    if folder.st_uid != os.getuid():
        raise ServiceError(f"{path}: its folder belongs to user {folder.st_uid}, expected {os.getuid()}")
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        mode = f"{stat.S_IMODE(folder.st_mode):o}"
        raise ServiceError(f"{path}: others may write to its folder (mode {mode}); chmod 700 it")


def _answers(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # it is there, but too busy to take another one
            return True
    return True


def tcp_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any that is free.

    Raises:
        ServiceError: the address is none of this machine's, or taken.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform == "win32":  # there SO_REUSEADDR would let others listen too
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        hint = "; choose another one, or 0 for one that is free" if error.errno == errno.EADDRINUSE else ""
        raise ServiceError(f"port {port} of {host}: {error.strerror}{hint}") from error
    return listener

"""A stand-in for systemd's manager: one service, its notify socket, its fd store, its restarts.

What it does with the store is what systemd does with it (sd_notify(3), systemd.service(5)):

* messages count only if they come from the main process (NotifyAccess=main), which the kernel tells (SCM_CREDENTIALS)
* an open file that is kept already is dropped, whatever its name: kcmp(2)
* beyond ``limit`` (FileDescriptorStoreMax=) descriptors are dropped
* what is stored without FDPOLL=0 is dropped when it hangs up or fails
* FDSTOREREMOVE=1 drops everything of one name; the descriptor of BARRIER=1 is closed
* the next main process gets the listening sockets first, then the store, as LISTEN_FDS, with their names

The service is told nothing about what was dropped; tests find it in ``dropped``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

SYS_KCMP = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
KCMP_FILE = 0
#: beyond those that the launcher fills
FIRST_COPY = 400
_UCRED = struct.Struct("3i")

#: starts a program with the descriptors that $1 lists as 3, 4, ... of its own, and no others
LAUNCHER = """
next=3
for fd in $1; do eval "exec $next<&$fd $fd<&-"; next=$((next + 1)); done
export LISTEN_PID=$$ LISTEN_FDS=$((next - 3))
shift
exec "$@"
"""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Stored:
    name: str
    fd: int
    poll: bool


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors of this process are of one open file."""
    answer = _libc.syscall(SYS_KCMP, os.getpid(), os.getpid(), KCMP_FILE, one, other)
    if answer < 0:
        raise OSError(ctypes.get_errno(), "kcmp")
    return bool(answer == 0)


class Manager:
    """The manager of one service, ``command``. ``listening``: sockets of its socket units, by their names."""

    def __init__(
        self,
        directory: Path,
        command: Sequence[str],
        *,
        limit: int = 512,
        listening: Mapping[str, socket.socket] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = tuple(command)
        self.limit = limit
        self.log = directory / "service.log"
        self.listening = dict(listening or {})
        self.environment = dict(environment or {})
        #: names of descriptors that were dropped, by the reason: "duplicate", "full", "hung up"
        self.dropped: dict[str, list[str]] = {"duplicate": [], "full": [], "hung up": []}
        #: every message, in its order
        self.heard: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._address = str(directory / "notify")
        self._store: list[Stored] = []
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self._address)
        self._poll = select.epoll()
        self._poll.register(self._socket, select.EPOLLIN)
        self._stop, wake = os.pipe()
        self._wake = wake
        self._poll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="manager", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """`systemctl stop`, and the end of the manager."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.write(self._wake, b"x")
        self._thread.join()
        for stored in self._store:
            os.close(stored.fd)
        self._store.clear()
        self._poll.close()
        self._socket.close()
        os.close(self._stop)
        os.close(self._wake)

    # -- the service

    def start(self, timeout: float = 60) -> None:
        """Start the main process; returns when it is ready."""
        with self._changed:
            self.heard.clear()
            given = [(name, sock.fileno()) for name, sock in self.listening.items()]
            given += [(stored.name, stored.fd) for stored in self._store]
            copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_COPY) for _, fd in given]
        environment = {
            **os.environ,
            **self.environment,
            "NOTIFY_SOCKET": self._address,
            "LISTEN_FDNAMES": ":".join(name for name, _ in given),
        }
        try:
            with self.log.open("ab") as output:
                self.process = subprocess.Popen(
                    ["bash", "-c", LAUNCHER, "launcher", " ".join(map(str, copies)), *self.command],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, pass_fds=copies,
                )
        finally:
            for fd in copies:
                os.close(fd)
        self.starts += 1
        self.wait_for("READY=1", timeout)

    def kill(self, number: signal.Signals) -> int:
        """Send the main process ``number`` and wait for its end; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the service did not end after {number.name}:\n{self.log_tail()}")

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """`systemctl restart`, or what Restart=on-failure does after a crash."""
        status = self.kill(number)
        if number is signal.SIGTERM:
            assert status == 0, f"exit status {status}:\n{self.log_tail()}"
        self.start()

    def wait_for(self, start: str, timeout: float = 60) -> None:
        """Until the main process has sent a message that begins with ``start``, since it was started."""
        self.until(lambda: any(message.startswith(start) for message in self.heard), start, timeout)

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Until ``condition``, which depends on messages and on the store."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition():
                ended = self.process.poll()
                if ended is not None or time.monotonic() > deadline:
                    how = "in time" if ended is None else f"before it ended with {ended}"
                    pytest.fail(f"no {what} {how}; store: {self.names()}\n{self.log_tail()}")
                self._changed.wait(0.1)

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    # -- the store

    def names(self) -> list[str]:
        with self._changed:
            return [stored.name for stored in self._store]

    def roles(self) -> list[str]:
        """The last parts of the names, sorted."""
        return sorted(name.rpartition("/")[2] for name in self.names())

    def fd_of(self, role: str) -> int:
        """The descriptor, which stays the manager's, that is stored as ``role``."""
        with self._changed:
            return next(stored.fd for stored in self._store if stored.name.endswith(f"/{role}"))

    def until_hung_up(self, role: str, timeout: float = 60) -> None:
        """Until what was stored as ``role`` was dropped because it hung up; the service need not run."""
        with self._changed:
            dropped = self.dropped["hung up"]
            assert self._changed.wait_for(lambda: any(name.endswith(f"/{role}") for name in dropped), timeout)

    def forget(self, role: str) -> None:
        """Lose what is stored as ``role``, as a full store would have."""
        with self._changed:
            for stored in [stored for stored in self._store if stored.name.endswith(role)]:
                self._drop(stored)

    def _run(self) -> None:
        while True:
            for fd, flags in self._poll.poll():
                if fd == self._stop:
                    return
                with self._changed:
                    if fd == self._socket.fileno():
                        self._hear()
                    elif flags & (select.EPOLLHUP | select.EPOLLERR):
                        for stored in [stored for stored in self._store if stored.fd == fd]:
                            self.dropped["hung up"].append(stored.name)
                            self._drop(stored)
                    self._changed.notify_all()

    def _hear(self) -> None:
        room = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(_UCRED.size)
        data, ancillary, _, _ = self._socket.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        sender = 0
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(payload) // 4}i", payload)
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                sender = _UCRED.unpack(payload)[0]
        message = data.decode()
        if self.process is not None and sender == self.process.pid:
            self._obey(message, fds)
        for fd in fds:
            os.close(fd)

    def _obey(self, message: str, fds: list[int]) -> None:
        self.heard.append(message)
        lines = message.split("\n")
        fields = dict(line.partition("=")[::2] for line in lines)
        name = fields.get("FDNAME", "stored")
        if "BARRIER" in fields:
            assert lines == ["BARRIER=1"], "a barrier stands alone"
            assert len(fds) == 1
        elif fields.get("FDSTOREREMOVE") == "1":
            for stored in [stored for stored in self._store if stored.name == name]:
                self._drop(stored)
        elif fields.get("FDSTORE") == "1":
            assert 0 < len(name) < 256, name
            assert all(" " <= letter < "\x7f" and letter != ":" for letter in name), name
            for fd in list(fds):
                if self._keep(name, fd, fields.get("FDPOLL") != "0"):
                    fds.remove(fd)

    def _keep(self, name: str, fd: int, poll: bool) -> bool:
        if len(self._store) >= self.limit:
            self.dropped["full"].append(name)
            return False
        if any(same_file(stored.fd, fd) for stored in self._store):
            self.dropped["duplicate"].append(name)
            return False
        if poll:
            try:
                self._poll.register(fd, 0)  # hang-ups and errors are told anyway
            except PermissionError:  # it cannot be polled: a memory file
                poll = False
        self._store.append(Stored(name, fd, poll))
        return True

    def _drop(self, stored: Stored) -> None:
        self._store.remove(stored)
        if stored.poll:
            self._poll.unregister(stored.fd)
        os.close(stored.fd)

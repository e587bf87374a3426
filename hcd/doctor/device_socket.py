"""The socket of one device: is it there, does somebody listen, who is that, and who may connect.

Asking is a connection that says GET_FEATURES and hangs up: hcd answers unless a front end is connected, whom it
prefers. A socket unit of systemd starts its service by that, as QEMU would.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hcd.doctor.access import WRITE, Account, account, denial, describe
from hcd.doctor.findings import Finding, error, note, warning

__all__ = ["QEMU_ACCOUNTS", "Listener", "check", "probe", "qemu_accounts"]

#: under which accounts libvirt runs QEMU, by distribution
QEMU_ACCOUNTS = ("libvirt-qemu", "qemu")
GET_FEATURES = struct.pack("<III", 1, 1, 0)  # request, version 1, no payload
_HEADER = 12
_TIMEOUT = 3.0


@dataclass(frozen=True, slots=True)
class Listener:
    """What came of a connection: ``pid`` of who listens (0: not visible), and what was answered.

    ``state`` is one of "answers", "busy" (hung up on us), "silent", "strange" (something else), "refused", "denied".
    """

    state: str
    pid: int = 0
    program: str = ""


def probe(path: str, timeout: float = _TIMEOUT) -> Listener | None:
    """Connect and ask; None where there is no socket."""
    if not Path(path).is_socket():
        return None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            return Listener("refused")
        except BlockingIOError:  # the backlog is full: nobody accepts
            return Listener("silent")
        except OSError:
            return Listener("denied")
        pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return Listener(_ask(sock), pid, _program(pid))


def _ask(sock: socket.socket) -> str:
    try:
        sock.sendall(GET_FEATURES)
        said = sock.recv(_HEADER + 8)
    except TimeoutError:
        return "silent"
    except OSError:
        return "busy"
    if not said:
        return "busy"
    return "answers" if len(said) == _HEADER + 8 and said[:4] == GET_FEATURES[:4] else "strange"


def _program(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(os.fsdecode(word) for word in words[:3] if word)


def check(name: str, path: str, accounts: Iterable[Account], found: Listener | None) -> Iterator[Finding]:
    """The socket at ``path`` of the device ``name``; ``found`` is what came of asking there."""
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        yield _missing(name, file)
        return
    except OSError as exc:
        yield warning("socket-denied", f"{name}: you cannot see {path}", exc.strerror or "", "run hcd doctor as root")
        return
    if not stat.S_ISSOCK(mode):
        yield error("socket-type", f"{name}: {path} is not a socket", describe(file), "remove it, then start hcd")
        return
    if found is not None:
        yield from _listening(name, path, found)
    yield from _connectable(name, file, accounts)


def _missing(name: str, file: Path) -> Finding:
    if not file.parent.is_dir():
        return error("socket-directory", f"{name}: the directory {file.parent} does not exist",
                     todo="systemd-tmpfiles --create, or make it; then start hcd")
    others = ", ".join(sorted(p.name for p in file.parent.iterdir() if p.is_socket())) or "none"
    return error("socket-missing", f"{name}: nobody listens: {file} does not exist", f"sockets there: {others}",
                 "start hcd (systemctl start hcd, or hcd@NAME.socket), or correct the path")


def _listening(name: str, path: str, found: Listener) -> Iterator[Finding]:
    who = f"pid {found.pid}: {found.program}" if found.program else f"pid {found.pid}"
    if found.state == "refused":
        yield error("socket-stale", f"{name}: nobody listens: {path} was left behind by a process that is gone",
                    "connecting is refused", "start hcd; it removes such a file by itself")
    elif found.state == "denied":
        yield warning("socket-denied", f"{name}: you may not connect to {path}", describe(Path(path)),
                      "run hcd doctor as root, or as the account of QEMU")
    elif found.state == "silent":
        yield error("socket-silent", f"{name}: {path} takes connections and does not answer", who,
                    "look whether hcd hangs (systemctl status hcd, then its log); if this is a QMP socket, another "
                    "client is connected to it")
    elif found.state == "strange":
        yield error("socket-foreign", f"{name}: who listens at {path} does not speak vhost-user", who,
                    "find out what that program is; the path in the configuration may be another one's")
    elif found.state == "busy":
        yield note("socket-busy", f"{name}: a front end is connected, or the device refuses one", who,
                   "nothing, if that is your guest: a device serves one at a time")


def _connectable(name: str, file: Path, accounts: Iterable[Account]) -> Iterator[Finding]:
    """Connecting takes write permission for the socket, and search permission on the way."""
    accounts = list(accounts)
    if not accounts:
        yield note("socket-access", f"{name}: the account of QEMU is not known", describe(file),
                   f"it has to be in the group {file.group()}, or be root")
    for who in accounts:
        if why := denial(file, who, WRITE):
            yield error(
                "socket-permission", f"{name}: {who.name} may not connect to {file}", f"{why}; {describe(file)}",
                f"usermod -aG {file.group()} {who.name} and restart QEMU, or SocketGroup=, SocketMode= of the "
                "socket unit",
            )


def qemu_accounts() -> list[Account]:
    """The accounts under which a QEMU of libvirt would come, where they exist."""
    return [found for found in map(account, QEMU_ACCOUNTS) if found is not None]

"""Listening sockets: made by hcd, or inherited.

A socket that hcd makes is bound once for the life of the process. A file that a dead process left behind is
removed, but only when it is a socket and nobody answers on it; at the end the file goes, but only when it
is still ours. Inherited sockets (``--fd``) stay as they are: whoever made them owns their file, and may
share them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hcd.errors import ConfigError

if TYPE_CHECKING:
    import trio

__all__ = ["KINDS", "UnixListener", "adopt_fd", "close_all", "is_listening", "local_path", "peer_of",
           "received_fds"]

BACKLOG = 16

#: the type of a device's socket, by its transport
KINDS = {"vhost-user": socket.SOCK_STREAM, "kvm": socket.SOCK_SEQPACKET}


class UnixListener:
    """A listening unix socket of our own, of type ``kind``. ConfigError when ``path`` cannot be had.

    ``permit`` sets the permissions of its file, before anybody can connect; the umask does without it.
    """

    def __init__(
        self,
        path: str,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        permit: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        _remove_stale(path, kind)
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self.socket.bind(path)
            made = os.lstat(path)
            self._identity = (made.st_dev, made.st_ino)
            if permit is not None:
                self._permit(permit)
            self.socket.listen(BACKLOG)
        except OSError as exc:
            self.socket.close()
            raise ConfigError(f"cannot listen on {path}: {exc.strerror or exc}") from exc

    def _permit(self, permit: Callable[[str], None]) -> None:
        try:
            permit(self.path)
        except BaseException:
            os.unlink(self.path)
            raise

    def close(self) -> None:
        """Stop listening and unlink the file unless somebody else's stands there by now."""
        with contextlib.suppress(OSError):
            now = os.lstat(self.path)
            if (now.st_dev, now.st_ino) == self._identity:
                os.unlink(self.path)
        self.socket.close()


def adopt_fd(fd: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """An inherited unix socket of type ``kind``, listening or connected. ConfigError for anything else.

    vhost-user.rst, "Backend program conventions" does not say which of the two ``--fd`` is, and programs
    differ: :func:`is_listening` tells.
    """
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"file descriptor {fd} is not open") from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"file descriptor {fd} is not a socket")
    sock = socket.socket(fileno=fd)
    try:
        _check_kind(sock, fd, kind)
    except ConfigError:
        sock.detach()  # the descriptor is still the caller's
        raise
    sock.set_inheritable(False)
    return sock


def is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def local_path(sock: socket.socket) -> str:
    """The path that a unix socket is bound to; "@name" for an abstract one, "" for none."""
    name = sock.getsockname()
    if isinstance(name, bytes):
        return "@" + os.fsdecode(name[1:])
    return str(name)


def received_fds(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a recvmsg(2)."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def peer_of(sock: socket.socket | trio.socket.SocketType) -> tuple[int, int]:
    """Process and user id of who connected, or of who listens (unix(7), SO_PEERCRED). OSError where there is none."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _check_kind(sock: socket.socket, fd: int, kind: socket.SocketKind) -> None:
    if sock.family != socket.AF_UNIX:
        raise ConfigError(f"file descriptor {fd} is not a unix socket")
    if sock.type != kind:
        name = "stream" if kind == socket.SOCK_STREAM else "SOCK_SEQPACKET"
        raise ConfigError(f"file descriptor {fd} is not a {name} socket")
    if is_listening(sock):
        return
    try:
        sock.getpeername()
    except OSError as exc:
        raise ConfigError(f"file descriptor {fd} is neither listening nor connected") from exc


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    """Make room for a socket at ``path`` if only a dead process stands in the way."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(f"cannot listen on {path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)  # a full backlog answers EAGAIN: somebody is there
        try:
            probe.connect(path)
            pid = peer_of(probe)[0]
            holder = "this process does already" if pid == os.getpid() else f"another process does (pid {pid})"
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            holder = "another process does"
        except OSError as exc:
            if exc.errno != errno.EPROTOTYPE:
                raise ConfigError(f"cannot tell whether {path} is in use: {exc.strerror}") from exc
            holder = "another process has a socket of another type there"
    raise ConfigError(f"cannot listen on {path}: {holder}")

"""Listening sockets: made by hcd, or inherited.

A socket that hcd makes is bound once for the life of the process. A file that a dead process left behind is
removed, but only when it is a socket and nobody answers on it; at the end the file goes, but only when it
is still ours. Inherited sockets (``--fd``) stay as they are: whoever made them owns their file, and may
share them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from hcd.errors import ConfigError

__all__ = ["UnixListener", "adopt_fd", "is_listening", "local_path"]

BACKLOG = 16


class UnixListener:
    """A listening unix socket of our own. ConfigError when ``path`` cannot be had."""

    def __init__(self, path: str) -> None:
        self.path = path
        _remove_stale(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.bind(path)
            made = os.lstat(path)
            self._identity = (made.st_dev, made.st_ino)
            self.socket.listen(BACKLOG)
        except OSError as exc:
            self.socket.close()
            raise ConfigError(f"cannot listen on {path}: {exc.strerror}") from exc

    def close(self) -> None:
        """Stop listening and unlink the file unless somebody else's stands there by now."""
        with contextlib.suppress(OSError):
            now = os.lstat(self.path)
            if (now.st_dev, now.st_ino) == self._identity:
                os.unlink(self.path)
        self.socket.close()


def adopt_fd(fd: int) -> socket.socket:
    """An inherited unix stream socket, listening or connected. ConfigError for anything else.

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
        _check_kind(sock, fd)
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


def _check_kind(sock: socket.socket, fd: int) -> None:
    if sock.family != socket.AF_UNIX:
        raise ConfigError(f"file descriptor {fd} is not a unix socket")
    if sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"file descriptor {fd} is not a stream socket")
    if is_listening(sock):
        return
    try:
        sock.getpeername()
    except OSError as exc:
        raise ConfigError(f"file descriptor {fd} is neither listening nor connected") from exc


def _remove_stale(path: str) -> None:
    """Make room for a socket at ``path`` if only a dead process stands in the way."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(f"cannot listen on {path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog answers EAGAIN: somebody is there
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass
        except OSError as exc:
            raise ConfigError(f"cannot tell whether {path} is in use: {exc.strerror}") from exc
    raise ConfigError(f"cannot listen on {path}: another process does")

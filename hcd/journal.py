"""The journal's own protocol: fields instead of lines.

Theory of operation (systemd, "Native Journal Protocol"). One datagram to /run/systemd/journal/socket is one entry. A
field is "NAME=value\\n", or where the value holds newlines "NAME\\n", its length as 64 bits little-endian, the value,
"\\n". An entry that is too large for a datagram travels as a sealed memfd, whose descriptor is sent alone. journald
adds who sent it from the socket's credentials, so units and pids are right without our doing.

It is used where stderr ends in the journal anyway. Each entry is sent on its own, without waiting: if journald is away
or does not keep up, the line goes to stderr as before.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from typing import IO

from hcd.log_lines import printable, priority
from hcd.message_ids import MESSAGE_IDS

__all__ = ["SOCKET", "JournalHandler", "encode"]

SOCKET = "/run/systemd/journal/socket"

#: what journald wants of a memfd, so that nobody changes it while it is read
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
#: room for entries that journald has not read yet; the default is that of a small datagram
SEND_BUFFER = 8 << 20
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
#: lines about one queue begin so
_QUEUE = re.compile(r"queue (\d+):")


class JournalHandler(logging.StreamHandler[IO[str]]):
    """Sends records to the journal at ``path``; those that it does not take are written to ``stream``."""

    def __init__(self, stream: IO[str], path: str = SOCKET) -> None:
        super().__init__(stream)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(b"".join(encode(name, value) for name, value in self._fields(record)))
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        message = record.getMessage()
        queue = _QUEUE.match(message)
        if device := str(getattr(record, "device", "")):
            yield "HCD_DEVICE", device
            message = f"{device}: {message}"  # for people, whom journalctl shows no fields
        if record.exc_info:
            message += "\n" + (self.formatter or logging.Formatter()).formatException(record.exc_info)
        yield "MESSAGE", "\n".join(map(printable, message.splitlines()))
        yield "PRIORITY", str(priority(record.levelno))
        yield "SYSLOG_IDENTIFIER", "hcd"
        yield "CODE_FILE", record.pathname
        yield "CODE_LINE", str(record.lineno)
        yield "CODE_FUNC", record.funcName or ""
        yield "HCD_LOGGER", record.name
        if queue is not None:
            yield "HCD_QUEUE", queue[1]
        if (ident := MESSAGE_IDS.get(str(record.msg))) is not None:
            yield "MESSAGE_ID", ident

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, socket.MSG_DONTWAIT, self._path)
        except OSError as exc:
            if exc.errno not in _TOO_LARGE:
                raise
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        fd = os.memfd_create("hcd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(entry)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
            self._socket.sendmsg([], [rights], socket.MSG_DONTWAIT, self._path)
        finally:
            os.close(fd)


def encode(name: str, value: str) -> bytes:
    """One field. What cannot be encoded is replaced: an entry that is not quite right beats none."""
    data = value.encode(errors="backslashreplace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"

"""A small QMP client on trio: connect, ask, hang up.

QEMU serves one client of a QMP socket at a time, and does so from its main loop: limit the time, and don't stay.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

__all__ = ["QmpClient", "QmpError", "QmpRefused", "connect"]

_MAX_LINE = 4 << 20


class QmpError(Exception):
    """The conversation cannot go on: nobody there, not QMP, hung up."""


class QmpRefused(Exception):
    """QEMU answered one command with an error."""


class QmpClient:
    """One conversation: commands out, answers in, events skipped."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def greet(self) -> None:
        """Take the greeting and leave negotiation mode."""
        if "QMP" not in await self._receive():
            raise QmpError("whoever answers does not speak QMP")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: str) -> Any:
        """What ``command`` returns. QmpRefused when QEMU answers with an error."""
        line = json.dumps({"execute": command, "arguments": arguments}) + "\r\n"
        try:
            await self._stream.send_all(line.encode())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise QmpError("QEMU hung up") from exc
        while True:
            message = await self._receive()
            if "return" in message:
                return message["return"]
            if "error" in message:
                error = message["error"]
                description = error.get("desc") if isinstance(error, dict) else error
                raise QmpRefused(f"{command}: {description}")
            if "event" not in message:
                raise QmpError("QEMU sent something that is neither an answer nor an event")

    def peer_pid(self) -> int:
        """The process that made the socket; 0 where it is not visible."""
        try:
            raw = self._stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return 0
        return int(struct.unpack("3i", raw)[0])

    def peer_directory(self) -> str:
        """Where QEMU's relative paths start: its working directory; "" where that cannot be seen."""
        try:
            return os.readlink(f"/proc/{self.peer_pid()}/cwd")
        except OSError:
            return ""

    async def _receive(self) -> dict[str, Any]:
        line = await self._line()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise QmpError("whoever answers does not speak QMP") from exc
        if not isinstance(message, dict):
            raise QmpError("whoever answers does not speak QMP")
        return message

    async def _line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > _MAX_LINE:
                raise QmpError(f"an answer is longer than {_MAX_LINE} bytes")
            try:
                data = await self._stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise QmpError("QEMU hung up") from exc
            if not data:
                raise QmpError("QEMU hung up")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


@asynccontextmanager
async def connect(path: str) -> AsyncIterator[QmpClient]:
    """A client that is ready for commands; hangs up at the end."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as exc:
        raise QmpError(f"cannot connect: {exc.strerror or exc}") from exc
    async with stream:
        client = QmpClient(stream)
        await client.greet()
        yield client

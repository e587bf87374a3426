"""A small HTTP/1.1 server for one resource, /metrics, on TCP and on unix sockets.

It serves scrapers of the operator, but a port is open to whoever reaches it: a request has a limit of size
and of time, and the number of connections has one. GET and HEAD only; a body is refused. Connections are
kept alive, because Prometheus scrapes over one for hours.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import trio

from hcd.log import RateLimited

__all__ = ["CONTENT_TYPE", "BadRequest", "Head", "parse_head", "serve"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_HEAD = 8192
MAX_CONNECTIONS = 32
#: seconds for a request to arrive whole once it has begun, and for an answer to be taken
REQUEST_TIMEOUT = 10.0
#: seconds that a connection may wait between requests, once it has asked for something
IDLE_TIMEOUT = 150.0

#: what a connection may hold of an answer. Megabytes go out in fewer turns, and (TCP) stay in the processor's cache:
#: measured, half the time of the kernel's own choice. The kernel cuts it to net.core.wmem_max.
SEND_BUFFER = 208 << 10

#: a text in pieces; a piece may be a view that nobody changes while it is held
Pieces = Sequence[bytes | memoryview]

_METHODS = ("GET", "HEAD")
_log = RateLimited(logging.getLogger("hcd.metrics"))


class BadRequest(Exception):
    """The request is answered with ``status`` and the connection ends."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """What matters of a request."""

    method: str
    path: str
    keep_alive: bool


def parse_head(data: bytes) -> Head:
    """The request line and header fields, without the empty line at their end. BadRequest unless HTTP/1."""
    line, *fields = data.split(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not all(parts) or not data.isascii():
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    method, target, version = (part.decode("ascii") for part in parts)
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED if version[:5] == "HTTP/" else HTTPStatus.BAD_REQUEST)
    headers = dict(_field(field) for field in fields)
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    tokens = [token.strip().lower() for token in headers.get("connection", "").split(",")]
    keep_alive = "close" not in tokens if version == "HTTP/1.1" else "keep-alive" in tokens
    return Head(method, target.partition("?")[0], keep_alive)


async def serve(listeners: Sequence[trio.SocketListener], render: Callable[[], Pieces]) -> None:
    """Answer on every listener until cancelled. ``render`` makes the text of one scrape."""
    slots = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            slots.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            _log.warning("scrapers", "a scraper was turned away: %d connections are open", MAX_CONNECTIONS)
            return
        try:
            await _Connection(stream, render).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the scraper went away
        except Exception as exc:  # one scrape must not end the server
            _log.error("failed scrapes", "a scrape failed: %s: %s", type(exc).__name__, exc)
        finally:
            slots.release_on_behalf_of(stream)

    await trio.serve_listeners(handle, list(listeners))


class _Connection:
    def __init__(self, stream: trio.SocketStream, render: Callable[[], Pieces]) -> None:
        self._stream = stream
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._render = render
        self._buffer = bytearray()

    async def run(self) -> None:
        keep_alive = True
        patience = REQUEST_TIMEOUT
        while keep_alive:
            head = await self._read_head(patience)
            if head is None:
                return
            patience = IDLE_TIMEOUT
            with trio.move_on_after(REQUEST_TIMEOUT) as scope:
                keep_alive = await self._answer(head)
            if scope.cancelled_caught:
                return

    async def _read_head(self, patience: float) -> Head | BadRequest | None:
        """The next request; None when the scraper is done, or has asked nothing for ``patience`` seconds."""
        with trio.move_on_after(patience):
            await self._begin()
        if not self._buffer:
            return None
        with trio.move_on_after(REQUEST_TIMEOUT):
            try:
                return parse_head(await self._until_blank_line())
            except BadRequest as refused:
                return refused
            except trio.EndOfChannel:
                return None
        return BadRequest(HTTPStatus.REQUEST_TIMEOUT)

    async def _begin(self) -> None:
        """Return when a request has begun, or the scraper has hung up."""
        while not self._buffer:
            data = await self._stream.receive_some(MAX_HEAD)
            if not data:
                return
            self._buffer += data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines may stand before a request

    async def _until_blank_line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            data = await self._stream.receive_some(MAX_HEAD)
            if not data:
                raise trio.EndOfChannel
            self._buffer += data
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        if len(head) > MAX_HEAD:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return head

    async def _answer(self, head: Head | BadRequest) -> bool:
        """Send the response; returns whether the connection goes on."""
        body: Pieces
        if isinstance(head, BadRequest):
            await self._send(head.status, [_text(head.status)], keep_alive=False)
            return False
        if head.path != "/metrics":
            status, body = HTTPStatus.NOT_FOUND, [b"Not Found: the metrics are at /metrics\n"]
        elif head.method not in _METHODS:
            status, body = HTTPStatus.METHOD_NOT_ALLOWED, [_text(HTTPStatus.METHOD_NOT_ALLOWED)]
        else:
            status, body = HTTPStatus.OK, self._render()
        await self._send(status, body, keep_alive=head.keep_alive, with_body=head.method != "HEAD")
        return head.keep_alive

    async def _send(self, status: HTTPStatus, body: Pieces, *, keep_alive: bool, with_body: bool = True) -> None:
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {CONTENT_TYPE if status is HTTPStatus.OK else 'text/plain; charset=utf-8'}",
            f"Content-Length: {sum(map(len, body))}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
        ]
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append(f"Allow: {', '.join(_METHODS)}")
        head = "\r\n".join([*lines, "", ""]).encode("ascii")
        # The largest piece goes as it is: joining megabytes costs about what sending them does.
        await self._stream.send_all(head)
        for piece in body if with_body else ():
            await self._stream.send_all(piece)


def _field(field: bytes) -> tuple[str, str]:
    name, colon, value = field.partition(b":")
    if not colon or not name or name != name.strip():
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    return name.decode("ascii").lower(), value.strip().decode("ascii")


def _text(status: HTTPStatus) -> bytes:
    return f"{status.phrase}\n".encode("ascii")

"""A small HTTP/1.1 server for one resource, /metrics, on TCP and on unix sockets.

It serves scrapers of the operator, but a port is open to whoever reaches it: a request has a limit of size
and of time, and the number of connections has one. GET and HEAD only; a body is refused. Connections are
kept alive, because Prometheus scrapes over one for hours.
"""

from __future__ import annotations

import contextlib
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

#: after an accept that failed (seconds)
ACCEPT_PAUSE = 0.1

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


async def serve(listeners: Sequence[socket.socket], render: Callable[[], Pieces]) -> None:
    """Answer on every listener until cancelled. ``render`` makes the text of one scrape."""
    async with trio.open_nursery() as nursery:
        server = _Server(render, nursery)
        for listener in listeners:
            listener.setblocking(False)
            if listener.family != socket.AF_UNIX:  # what is accepted inherits it
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(_accept, listener, server)


async def _accept(listener: socket.socket, server: _Server) -> None:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            continue
        except OSError as error:
            # For want of fds or memory it fails until somebody gives some back; else the scraper was gone already.
            _log.warning("accept", "cannot accept a scraper: %s", error.strerror)
            await trio.sleep(ACCEPT_PAUSE)
            continue
        server.welcome(sock)


@dataclass(slots=True)
class _Server:
    """What the connections share."""

    render: Callable[[], Pieces]
    nursery: trio.Nursery
    connections: int = 0

    def welcome(self, sock: socket.socket) -> None:
        if self.connections == MAX_CONNECTIONS:
            sock.close()
            _log.warning("scrapers", "a scraper was turned away: %d connections are open", MAX_CONNECTIONS)
        else:
            self.connections += 1
            self.nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            await _Connection(sock, self.render).run()
        except _GoneError:
            pass
        except Exception as exc:  # one scrape must not end the server
            _log.error("failed scrapes", "a scrape failed: %s: %s", type(exc).__name__, exc)
        finally:
            self.connections -= 1


class _GoneError(Exception):
    """The scraper went away."""


class _Connection:
    """One scraper. The socket is used as it is: through a stream of trio the same takes twice the time."""

    def __init__(self, sock: socket.socket, render: Callable[[], Pieces]) -> None:
        self._sock = sock
        self._render = render
        self._buffer = bytearray()
        self._reading = False  # a request has begun, and is not there whole
        self._scope = trio.CancelScope()
        self._until = 0.0  # how long it may take what is going on now, on trio's clock

    async def run(self) -> None:
        """Serve the scraper until it is done, or has run out of time."""
        with self._sock:
            self._sock.setblocking(False)
            with self._scope:
                await self._serve()
            if self._scope.cancelled_caught and self._reading:
                with contextlib.suppress(OSError):
                    self._sock.sendmsg(_response(HTTPStatus.REQUEST_TIMEOUT, keep_alive=False))

    async def _serve(self) -> None:
        self._allow(REQUEST_TIMEOUT)
        while await self._answer_next():
            self._allow(IDLE_TIMEOUT)
            await self._let_others()

    async def _answer_next(self) -> bool:
        """Answer the next request; whether the connection goes on."""
        try:
            head = await self._read_head()
        except BadRequest as refused:
            self._reading = False
            self._allow(REQUEST_TIMEOUT)
            await self._send(_response(refused.status, keep_alive=False))
            return False
        if head is None:
            return False
        self._allow(REQUEST_TIMEOUT)
        await self._send(self._response_to(head))
        return head.keep_alive

    def _allow(self, seconds: float) -> None:
        self._until = trio.current_time() + seconds

    def _mind_time(self) -> None:
        """To be called before each wait; most scrapes never wait."""
        self._scope.deadline = self._until

    async def _let_others(self) -> None:
        """While data keep coming, nothing here would wait."""
        self._mind_time()
        await trio.lowlevel.checkpoint()

    async def _read_head(self) -> Head | None:
        """The next request; None when the scraper is done."""
        while not self._buffer:
            data = await self._receive()
            if not data:
                return None
            self._buffer += data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines may stand before a request
            if not self._buffer:
                await self._let_others()
        self._reading = True
        self._allow(REQUEST_TIMEOUT)
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            data = await self._receive()
            if not data:
                return None
            self._buffer += data
        self._reading = False
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        if len(head) > MAX_HEAD:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return parse_head(head)

    def _response_to(self, head: Head) -> Pieces:
        if head.path != "/metrics":
            text = b"Not Found: the metrics are at /metrics\n"
            return _response(HTTPStatus.NOT_FOUND, [text], keep_alive=head.keep_alive, head_only=head.method == "HEAD")
        if head.method not in _METHODS:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, keep_alive=head.keep_alive)
        return _response(HTTPStatus.OK, self._render(), keep_alive=head.keep_alive, head_only=head.method == "HEAD")

    async def _receive(self) -> bytes:
        """What has come; empty at the end."""
        while True:
            try:
                return self._sock.recv(MAX_HEAD)
            except BlockingIOError:
                self._mind_time()
                await trio.lowlevel.wait_readable(self._sock)
            except OSError as error:
                raise _GoneError from error

    async def _send(self, pieces: Pieces) -> None:
        """All of them, from where they lie: joining megabytes costs about what sending them does."""
        left = list(pieces)
        while left:
            try:
                sent = self._sock.sendmsg(left)
            except BlockingIOError:
                self._mind_time()
                await trio.lowlevel.wait_writable(self._sock)
                continue
            except OSError as error:
                raise _GoneError from error
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = memoryview(left[0])[sent:]


def _response(status: HTTPStatus, body: Pieces = (), *, keep_alive: bool, head_only: bool = False) -> Pieces:
    """The head and the body; without one the text of ``status``."""
    body = body or [f"{status.phrase}\n".encode("ascii")]
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {CONTENT_TYPE if status is HTTPStatus.OK else 'text/plain; charset=utf-8'}",
        f"Content-Length: {sum(map(len, body))}",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append(f"Allow: {', '.join(_METHODS)}")
    head = "\r\n".join([*lines, "", ""]).encode("ascii")
    return [head] if head_only else [head, *body]


def _field(field: bytes) -> tuple[str, str]:
    name, colon, value = field.partition(b":")
    if not colon or not name or name != name.strip():
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    return name.decode("ascii").lower(), value.strip().decode("ascii")

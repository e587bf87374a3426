"""A small HTTP/1.1 server for one resource, /metrics, on TCP and on unix sockets.

It serves scrapers of the operator, but a port is open to whoever reaches it: a request has a limit of size
and of time, and the number of connections has one. GET and HEAD only; a body is refused. Connections are
kept alive, because Prometheus scrapes over one for hours.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
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

#: what to await with a socket
Wait = Callable[[socket.socket], Awaitable[None]]

_METHODS = ("GET", "HEAD")
_END = b"\r\n\r\n"
#: may stand before a request (RFC 9112 2.2)
_EMPTY = b"\r\n"
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


@functools.lru_cache(maxsize=16)  # a scraper says the same each time
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
        """Serve one scraper. Most have asked already and take the answer at once: those need no task."""
        if self.connections == MAX_CONNECTIONS:
            sock.close()
            _log.warning("scrapers", "a scraper was turned away: %d connections are open", MAX_CONNECTIONS)
            return
        connection = _Connection(sock, self.render)
        if wait := _advance(connection):
            self.connections += 1
            self.nursery.start_soon(self._serve, connection, wait)
        else:
            connection.close()

    async def _serve(self, connection: _Connection, wait: Wait | None) -> None:
        try:
            with trio.CancelScope() as scope:
                while wait:
                    scope.deadline = connection.until
                    await wait(connection.sock)
                    wait = _advance(connection)
            if scope.cancelled_caught:
                connection.give_up()
        finally:
            connection.close()
            self.connections -= 1


def _advance(connection: _Connection) -> Wait | None:
    """:meth:`_Connection.advance`; None also when that failed: one scrape must not end the server."""
    try:
        return connection.advance()
    except _GoneError:
        pass
    except Exception as exc:
        _log.error("failed scrapes", "a scrape failed: %s: %s", type(exc).__name__, exc)
    return None


class _GoneError(Exception):
    """The scraper went away."""


class _Connection:
    """One scraper. Nothing here waits; whoever owns it does, until ``until`` on trio's clock at the longest.

    The socket is used as it is: through a stream of trio the same takes twice the time.
    """

    def __init__(self, sock: socket.socket, render: Callable[[], Pieces]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._render = render
        self._unread = bytearray()  # what came and is not answered
        self._untaken: list[bytes | memoryview] = []  # what is left of an answer
        self._last = False  # the connection ends with this answer
        self._allow(REQUEST_TIMEOUT)

    def advance(self) -> Wait | None:
        """Go on to the end of one answer, or until that takes waiting: for what, or None when the scraper is done.
        _GoneError when it is gone."""
        if not self._untaken and not self._answer_next():
            return trio.lowlevel.wait_readable
        if not self._send():
            return trio.lowlevel.wait_writable
        if self._last:
            return None
        self._allow(REQUEST_TIMEOUT if self._unread else IDLE_TIMEOUT)
        if self._unread:  # came with the one before: waits until others had their turn
            return trio.lowlevel.wait_writable
        self._acknowledge_at_once()
        return trio.lowlevel.wait_readable

    def give_up(self) -> None:
        """The time is over."""
        if self._unread and not self._untaken:
            with contextlib.suppress(OSError):
                self.sock.sendmsg(_response(HTTPStatus.REQUEST_TIMEOUT, keep_alive=False))

    def close(self) -> None:
        self.sock.close()

    def _acknowledge_at_once(self) -> None:
        """The next request. The answer would do that as well, but until it does the kernel has set a timer of 40 ms,
        and does not take it back: on a scraper's processor on this machine, which sleeps less well until it is over."""
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _allow(self, seconds: float) -> None:
        self.until = trio.current_time() + seconds

    def _answer_next(self) -> bool:
        """Make the answer to the next request; whether there is one."""
        try:
            data = self._next_head()
            if data is None:
                return False
            head = parse_head(data)
            self._untaken, self._last = list(self._response_to(head)), not head.keep_alive
        except BadRequest as refused:
            self._untaken, self._last = list(_response(refused.status, keep_alive=False)), True
        self._allow(REQUEST_TIMEOUT)
        return True

    def _next_head(self) -> bytes | None:
        """The next request without the empty line at its end, if it is there whole."""
        end = self._unread.find(_END)
        if end < 0 and self._receive():
            end = self._unread.find(_END)
        if (len(self._unread) if end < 0 else end) > MAX_HEAD:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if end < 0:
            return None
        head = bytes(self._unread[:end])
        self._unread = self._unread[end + len(_END) :].lstrip(_EMPTY)
        return head

    def _receive(self) -> bool:
        """Whether something came."""
        try:
            data = self.sock.recv(MAX_HEAD)
        except BlockingIOError:
            return False
        except OSError as error:
            raise _GoneError from error
        if not data:
            raise _GoneError
        if not self._unread and (data := data.lstrip(_EMPTY)):
            self._allow(REQUEST_TIMEOUT)
        self._unread += data
        return True

    def _response_to(self, head: Head) -> Pieces:
        if head.path != "/metrics":
            text = b"Not Found: the metrics are at /metrics\n"
            return _response(HTTPStatus.NOT_FOUND, [text], keep_alive=head.keep_alive, head_only=head.method == "HEAD")
        if head.method not in _METHODS:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, keep_alive=head.keep_alive)
        return _response(HTTPStatus.OK, self._render(), keep_alive=head.keep_alive, head_only=head.method == "HEAD")

    def _send(self) -> bool:
        """Whether all of the answer is taken. It goes out from where it lies: joining megabytes costs about what
        sending them does."""
        left = self._untaken
        while left:
            try:
                sent = self.sock.sendmsg(left)
            except BlockingIOError:
                return False
            except OSError as error:
                raise _GoneError from error
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = memoryview(left[0])[sent:]
        return True


def _response(status: HTTPStatus, body: Pieces = (), *, keep_alive: bool, head_only: bool = False) -> Pieces:
    """The head and the body; without one the text of ``status``."""
    body = body or [f"{status.phrase}\n".encode("ascii")]
    head = b"%bContent-Length: %d\r\n\r\n" % (_first_fields(status, keep_alive), sum(map(len, body)))
    return [head] if head_only else [head, *body]


@functools.cache
def _first_fields(status: HTTPStatus, keep_alive: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {CONTENT_TYPE if status is HTTPStatus.OK else 'text/plain; charset=utf-8'}",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append(f"Allow: {', '.join(_METHODS)}")
    return "\r\n".join([*lines, ""]).encode("ascii")


def _field(field: bytes) -> tuple[str, str]:
    name, colon, value = field.partition(b":")
    if not colon or not name or name != name.strip():
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    return name.decode("ascii").lower(), value.strip().decode("ascii")

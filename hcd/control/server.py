"""The daemon's end of the control socket.

Theory of operation. Whoever may connect may look; only root, the daemon's own account and the owner of the socket may
change something, or trace, which costs the traced device time. The kernel says who it is (SO_PEERCRED). A client is not
trusted to be sane: a line has a limit of size and of time, an answer one of time, connections one of number, for each
user apart, so that none can lock the administrator out. Snapshots have a pace, the slower the more there is to tell:
making one takes the interpreter's lock from the thread that serves the rings. Calls of one connection are carried out
in their order, one at a time; what has begun is carried out even if the client hangs up.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from hcd import sockets
from hcd.control.protocol import MAX_CALL, VERSION, Call, CallError, Lines, LineTooLong, encode, parse_call
from hcd.control.trace import Feed
from hcd.log import RateLimited
from hcd.version import VERSION as HCD_VERSION

__all__ = ["Pace", "serve"]

#: calls that change something, or slow it down
PRIVILEGED = frozenset({"reload", "resize", "trace"})
MAX_CONNECTIONS = 64
MAX_CONNECTIONS_OF_USER = 16
#: seconds for a line to arrive whole, and for an answer to be taken
LINE_TIMEOUT = 30.0
SEND_TIMEOUT = 10.0
#: seconds after which a tracer that takes no line any more is given up
TRACE_TIMEOUT = 60.0
#: how often (seconds) a trace without lines looks whether its reader is still there
HANGUP_PAUSE = 1.0
#: a second has so many snapshots at most, and making them takes such a part of it; a quiet time saves up so many
SNAPSHOT_RATE = 20.0
SNAPSHOT_SHARE = 0.05
SNAPSHOT_BURST = 5

_log = logging.getLogger("hcd.control")
_rare_log = RateLimited(_log)

Answer = Callable[[Call], Awaitable[Any]]
Trace = Callable[[Call], AbstractAsyncContextManager[Feed]]


class Pace:
    """Lets ``rate`` a second through, fewer where each takes long, and ``burst`` at once after a pause."""

    def __init__(self, rate: float, share: float, burst: int) -> None:
        self._least = self._gap = 1 / rate
        self._share = share
        self._burst = burst
        self._next = 0.0

    async def wait(self) -> None:
        """A checkpoint."""
        now = trio.current_time()
        self._next = max(self._next, now - self._burst * self._gap) + self._gap
        await trio.sleep(max(0.0, self._next - now))

    def took(self, seconds: float) -> None:
        """What came last took so long."""
        self._gap = max(self._least, seconds / self._share)


async def serve(listener: socket.socket, answer: Answer, trace: Trace) -> None:
    """Serve clients until cancelled. ``answer`` and ``trace`` may raise CallError."""
    server = _Server(listener, answer, trace)
    await trio.serve_listeners(server.handle, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


class _Server:
    def __init__(self, listener: socket.socket, answer: Answer, trace: Trace) -> None:
        self.answer = answer
        self.trace = trace
        self.pace = Pace(SNAPSHOT_RATE, SNAPSHOT_SHARE, SNAPSHOT_BURST)
        self.privileged = {0, os.geteuid(), _owner(listener)}
        self._open: Counter[int] = Counter()  # connections by user

    async def handle(self, stream: trio.SocketStream) -> None:
        try:
            pid, uid = sockets.peer_of(stream.socket)
        except OSError:
            return
        connection = _Connection(stream, self, pid, uid)
        self._open[uid] += 1
        try:
            if self._is_full(uid):
                _rare_log.warning("busy", "too many connections: pid %d of user id %d was turned away", pid, uid)
                await connection.refuse(CallError("busy", "too many connections to the control socket"))
            else:
                await connection.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client went away, or does not read
        except Exception as error:  # one client must not end the server
            _rare_log.error("failures", "serving a client (pid %d) failed: %s: %s", pid, type(error).__name__, error)
        finally:
            self._open[uid] -= 1
            self._open += Counter()  # forgets those without connections

    def _is_full(self, uid: int) -> bool:
        if self._open[uid] > MAX_CONNECTIONS_OF_USER:
            return True
        return self._open.total() > MAX_CONNECTIONS and uid not in self.privileged


def _owner(listener: socket.socket) -> int:
    path = sockets.local_path(listener)
    try:
        return os.stat(path).st_uid
    except OSError:
        return os.geteuid()


class _Connection:
    """One client."""

    def __init__(self, stream: trio.SocketStream, server: _Server, pid: int, uid: int) -> None:
        self._stream = stream
        self._server = server
        self._pid = pid
        self._uid = uid
        self._lines = Lines(MAX_CALL)

    async def run(self) -> None:
        await self._send(encode({"hcd": HCD_VERSION, "protocol": VERSION}))
        try:
            while (line := await self._next_line()) is not None:
                await self._handle(line)
        except LineTooLong:
            await self.refuse(CallError("request", f"a line of more than {MAX_CALL} bytes; nothing more is read"))

    async def refuse(self, error: CallError) -> None:
        """The last words. Whoever closes with something unread takes them away again, so that is read first."""
        await self._send(encode(_error(error)))
        await self._stream.send_eof()
        with trio.move_on_after(1.0):
            while await self._stream.receive_some(65536):
                pass

    async def _next_line(self) -> bytes | None:
        """None: the client has nothing more to ask, or takes too long over it."""
        with trio.move_on_after(LINE_TIMEOUT):
            while (line := self._lines.next_line()) is None:
                data = await self._stream.receive_some(65536)
                if not data:
                    return None
                self._lines.feed(data)
            return line
        return None

    async def _handle(self, line: bytes) -> None:
        ident: dict[str, Any] = {}
        try:
            call = parse_call(line)
            ident = {} if call.id is None else {"id": call.id}
            self._permit(call)
            if call.name == "trace":
                await self._trace(call, ident)
                return
            line = await self._answer(call, ident)
        except CallError as error:
            line = encode({**_error(error), **ident})
        except Exception as error:
            _log.exception("a call on the control socket failed")
            failure = CallError("failed", f"a defect of hcd: {type(error).__name__}: {error}")
            line = encode({**_error(failure), **ident})
        await self._send(line)

    async def _answer(self, call: Call, ident: dict[str, Any]) -> bytes:
        if call.name != "snapshot":
            return encode({"result": await self._server.answer(call), **ident})
        await self._server.pace.wait()
        result = await self._server.answer(call)
        began = trio.current_time()
        line = encode({"result": result, **ident})
        # to write it down takes about as long as to collect it, and collecting waits for others in between
        self._server.pace.took(2 * (trio.current_time() - began))
        return line

    def _permit(self, call: Call) -> None:
        if call.name not in PRIVILEGED:
            return
        if self._uid not in self._server.privileged:
            _rare_log.warning(
                ("refused", self._uid), "%s was refused to user id %d (pid %d)", call.name, self._uid, self._pid
            )
            raise CallError("permission", f"{call.name} is for root, the account of hcd and the owner of its socket")
        shown = " ".join(f"{key}={value}" for key, value in call.arguments.items())
        _log.info("%s asked for by user id %d (pid %d)", f"{call.name} {shown}".strip(), self._uid, self._pid)

    async def _send(self, line: bytes) -> None:
        with trio.fail_after(SEND_TIMEOUT):
            await self._stream.send_all(line)

    # -- a trace

    async def _trace(self, call: Call, ident: dict[str, Any]) -> None:
        async with self._server.trace(call) as feed, trio.open_nursery() as nursery:
            nursery.start_soon(self._until_hangup, nursery.cancel_scope)
            nursery.start_soon(self._feed, feed, ident, nursery.cancel_scope)

    async def _feed(self, feed: Feed, ident: dict[str, Any], scope: trio.CancelScope) -> None:
        try:
            while True:
                lines = b"".join(encode({"event": event, **ident}) for event in await feed.take())
                with trio.fail_after(TRACE_TIMEOUT):
                    await self._stream.send_all(lines)
        except (trio.BrokenResourceError, trio.TooSlowError):  # not raised: the nursery would make a group of it
            scope.cancel()

    async def _until_hangup(self, scope: trio.CancelScope) -> None:
        """Half of the connection may be closed: who only reads is still there."""
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), 0)
        while not poll.poll(0):  # noqa: ASYNC110 - nothing else tells of this
            await trio.sleep(HANGUP_PAUSE)
        scope.cancel()


def _error(error: CallError) -> dict[str, Any]:
    return {"error": {"kind": error.kind, "text": str(error)}}

"""One peer at a time: the accept loop that transports share.

A device has one listening socket for the life of the process. A second peer is refused while the first is really
there; one that comes while the last session is being torn down waits for that and is served.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from hcd import sockets
from hcd.errors import contained
from hcd.host import HostBase, Peer

__all__ = ["Session", "accept_one_at_a_time", "hung_up", "peer_of", "shown_pid"]

#: after an accept that failed for want of fds or memory (seconds)
ACCEPT_PAUSE = 0.1


class Session(Protocol):
    """One connection of a peer."""

    @property
    def over(self) -> trio.Event:
        """Set when everything of the session is released."""

    @property
    def peer(self) -> Peer: ...

    def hung_up(self) -> bool:
        """Whether the peer closed its end, even if hcd has not come round to it yet, or hcd is about to."""

    async def run(self) -> None:
        """Serve until the peer goes. Raises nothing."""


async def accept_one_at_a_time(
    host: HostBase,
    listener: socket.socket,
    make: Callable[[trio.socket.SocketType], Session],
    *,
    what: str,
    refuse: Callable[[trio.socket.SocketType], Awaitable[None]] | None = None,
    exit_on_disconnect: bool = False,
    session: Session | None = None,
) -> None:
    """Serve the peers (``what``: "front end", "VMM") that connect to ``listener`` until cancelled.

    ``refuse`` tells one that it is refused. ``exit_on_disconnect``: return when the first session has ended.
    ``session`` is one that is there already. Cancelling ``host.accept_scope()`` lets the session go on, and no other
    come.
    """
    accepting = trio.socket.from_stdlib_socket(listener)
    async with trio.open_nursery() as nursery:
        if session is not None:
            nursery.start_soon(_run_session, session, nursery if exit_on_disconnect else None)
        with host.accept_scope():
            while True:
                try:
                    sock, _ = await accepting.accept()
                except OSError as error:
                    if listener.fileno() < 0:
                        raise
                    host.rare_log.warning(error.errno, "cannot accept a %s: %s", what, error.strerror)
                    await trio.sleep(ACCEPT_PAUSE)
                    continue
                if session is not None and not session.over.is_set():
                    if not session.hung_up():
                        host.rare_log.warning(
                            f"a second {what}",
                            "a second %s was refused: one is connected already (pid %s)", what, shown_pid(session.peer),
                        )
                        nursery.start_soon(_refuse, sock, refuse)
                        continue
                    try:
                        await session.over.wait()
                    except BaseException:
                        sock.close()
                        raise
                try:
                    session = make(sock)
                except BaseException as error:  # the device, when it is asked what it is
                    sock.close()
                    host.device_failed(f"what it is asked when a {what} connects,", contained(error))
                    continue
                nursery.start_soon(_run_session, session, nursery if exit_on_disconnect else None)


async def _refuse(
    sock: trio.socket.SocketType, refuse: Callable[[trio.socket.SocketType], Awaitable[None]] | None
) -> None:
    with sock:
        if refuse is not None:
            await refuse(sock)


async def _run_session(session: Session, ends: trio.Nursery | None) -> None:
    await session.run()
    if ends is not None:
        ends.cancel_scope.cancel()


def hung_up(fd: int) -> bool:
    """Whether the peer of socket ``fd`` closed its end; True for no socket at all."""
    if fd < 0:
        return True
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(flags & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, flags in poll.poll(0))


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """The process at the other end when it connected."""
    try:
        pid = sockets.peer_of(sock)[0] or None
    except OSError:
        pid = None
    return Peer(pid, "" if pid is None else _command(pid), time.time())


def _command(pid: int) -> str:
    """The name of a process; "" where it is hidden (ProtectProc=)."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def shown_pid(peer: Peer) -> str:
    """For log lines."""
    return "?" if peer.pid is None else str(peer.pid)

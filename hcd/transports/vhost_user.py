"""Transport vhost-user: the sockets on which front ends come.

Each device has one listening socket for the life of the process. One front end at a time: a second is refused while the
first is really there; one that comes while the last session is being torn down waits for that and is served.
"""

from __future__ import annotations

import socket

import trio

from hcd.errors import contained
from hcd.handover.recovery import Handed
from hcd.host import DeviceHost
from hcd.transports.accept import accept_one_at_a_time
from hcd.transports.vhost_user_session import Session

__all__ = ["serve", "serve_connected"]


async def serve(
    host: DeviceHost,
    listener: socket.socket,
    *,
    exit_on_disconnect: bool = False,
    handed: dict[str, Handed] | None = None,
) -> None:
    """Serve front ends that connect to ``listener``, one at a time, until cancelled.

    ``exit_on_disconnect``: return when the first session has ended. ``handed``: sessions of an earlier process by
    their devices; that of this one is taken out and is the first.
    """
    qmp_path = _bound_path(listener) or host.spec.socket
    await accept_one_at_a_time(
        host,
        listener,
        lambda sock: Session(host, sock, qmp_path=qmp_path),
        what="front end",
        exit_on_disconnect=exit_on_disconnect,
        session=_session_of(handed.pop(host.spec.name, None) if handed else None, host, qmp_path),
    )


def _session_of(handed: Handed | None, host: DeviceHost, qmp_path: str) -> Session | None:
    if handed is None:
        return None
    connection = trio.socket.from_stdlib_socket(handed.connection())
    try:
        return Session(host, connection, qmp_path=qmp_path, handed=handed)
    except BaseException as error:
        connection.close()
        handed.close()
        host.stats.handovers_failed += 1
        host.device_failed("what it is asked when a front end is taken over,", contained(error))
        return None


async def serve_connected(host: DeviceHost, sock: socket.socket) -> None:
    """Serve the one front end at the other end of ``sock``; returns when it has gone."""
    connected = trio.socket.from_stdlib_socket(sock.dup())
    await Session(host, connected, qmp_path=_bound_path(sock) or host.spec.socket).run()


def _bound_path(sock: socket.socket) -> str:
    try:
        name = sock.getsockname()
    except OSError:
        return ""
    return name if isinstance(name, str) else ""

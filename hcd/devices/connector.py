"""Connecting to a unix socket of another program, which may start later than hcd, or come back."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from hcd.device import Handle, Lane

__all__ = ["Connector"]

#: seconds between two attempts
PAUSE = 1.0


class Connector:
    """Connects to ``path``, again each second while that fails; the first failure in a row is logged.

    ``connected`` gets each connection, non-blocking, on the lane's thread, and raises OSError where it cannot have it:
    a process may be out of descriptors for a while. ``label`` is what the log calls it.
    """

    def __init__(
        self,
        path: str,
        label: str,
        log: logging.LoggerAdapter[logging.Logger],
        connected: Callable[[socket.socket], None],
    ) -> None:
        self._path = path
        self._label = label
        self._log = log
        self._connected = connected
        self._lane: Lane
        self._timer: Handle | None = None
        self._stopped = False
        self._complained = False

    def start(self, lane: Lane) -> None:
        """Any thread, once."""
        self._lane = lane
        lane.post(self._connect)

    # -- on the lane's thread

    def again(self) -> None:
        """The connection was lost: make another one, in a second."""
        if not self._stopped:
            self._timer = self._lane.call_later(PAUSE, self._connect)

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _connect(self) -> None:
        self._timer = None
        if self._stopped:
            return
        try:
            self._make()
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._log.warning("%s: %s; trying again each second", self._label, error.strerror)
            self.again()
            return
        self._complained = False

    def _make(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
            self._connected(sock)
        except OSError:
            sock.close()
            raise

"""The host's end of a console port: what a port sees of it.

There are pseudo-terminals (:mod:`hcd.devices.console_pty`), unix sockets (:mod:`hcd.devices.console_sockets`), both on
:mod:`hcd.devices.console_stream`, and files (:mod:`hcd.devices.console_file`).

An end moves bytes straight between its descriptor and the buffers of a request: nothing is kept, so a slow reader
costs no memory. When the descriptor takes no more, :meth:`End.send` says so, and ``on_writable`` is called once it
takes more. An end is made, opened and closed on the main thread; everything else is on the lane's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hcd.device import Lane, Request

__all__ = ["End", "Log"]

Log = logging.LoggerAdapter[logging.Logger]


def _nothing() -> None:
    pass


class End:
    """Base of the ends. A port sets the callbacks before ``open``."""

    def __init__(self, path: str, log: Log) -> None:
        self.path = path
        self.log = log
        #: whether somebody is there to read and write
        self.connected = False
        #: columns and rows, of ends that have them
        self.size = (0, 0)
        self.on_change: Callable[[], None] = _nothing  # connected has changed
        self.on_size: Callable[[], None] = _nothing
        self.on_readable: Callable[[], None] = _nothing
        self.on_writable: Callable[[], None] = _nothing  # after send() returned False
        self.lane: Lane

    def open(self, lane: Lane) -> None:
        """ConfigError when it cannot be had."""
        self.lane = lane

    def close(self) -> None:
        """Release everything."""

    def watch_size(self, on: bool) -> None:
        """A front end came, or went: see to what no event tells of."""

    def want_input(self, wanted: bool, patient: bool) -> None:
        """Call ``on_readable`` while there is input, if ``wanted``. ``patient``: what was sent waits for the guest."""

    def has_input(self) -> bool:
        """Whether :meth:`receive` would find something."""
        return False

    def receive(self, request: Request) -> int:
        """Put what is there into ``request``; how many bytes. 0: there is nothing, now or for ever. GuestError."""
        return 0

    def send(self, request: Request) -> bool:
        """Put out what is left in ``request``, as much as goes; whether that was all. GuestError."""
        raise NotImplementedError

    def send_bytes(self, data: bytes) -> int:
        """The same for some bytes; returns how many went."""
        raise NotImplementedError

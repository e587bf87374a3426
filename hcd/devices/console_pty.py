"""A pseudo-terminal as the end of a console port.

It shows whether a program has it open, by HUP, but no event tells of the opening; nor does one of a window that changed
its size. Both are looked at once a second while a front end is connected.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import tty

from hcd.device import ConfigError, Handle, Lane
from hcd.devices.console_ends import Log
from hcd.devices.console_stream import StreamEnd

__all__ = ["PtyEnd"]

#: seconds between two looks
PAUSE = 1.0
#: where the system has pseudo-terminals
PLACE = "/dev/pts/"


class PtyEnd(StreamEnd):
    """A new pseudo-terminal. ``path``, if there is one, becomes a symbolic link to it, in the place of an older one."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._timer: Handle | None = None
        self._watching = False
        self.name = ""

    def open(self, lane: Lane) -> None:
        super().open(lane)
        try:
            master, slave = os.openpty()
        except OSError as error:
            raise ConfigError(f"no pseudo-terminal can be had: {error.strerror}") from error
        try:
            tty.setraw(slave)
            self.name = os.ttyname(slave)
            os.set_blocking(master, False)
            if self.path:
                self._link()
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        self.fd = master
        self.log.info("console on %s", self.path or self.name)

    def _link(self) -> None:
        try:
            if os.path.islink(self.path) and os.readlink(self.path).startswith(PLACE):
                os.unlink(self.path)
            os.symlink(self.name, self.path)
        except OSError as error:
            raise ConfigError(f"pty:{self.path}: {error.strerror}") from error

    def watch_size(self, on: bool) -> None:
        self._watching = on
        if on and self._timer is None:
            self._look()
        elif not on and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self.fd < 0:
            return
        if not self.connected and not self._is_hung_up():
            with contextlib.suppress(OSError):  # out of descriptors: the next look may find some
                self._attach(self.fd, select.epoll())
        rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(self.fd, termios.TIOCGWINSZ, bytes(8)))
        if (cols, rows) != self.size:
            self.size = (cols, rows)
            self.on_size()
        if self._watching:
            self._timer = self.lane.call_later(PAUSE, self._look)

    def _is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))

    def _after_loss(self) -> None:
        pass  # the same descriptor serves the next program

    def close(self) -> None:
        super().close()
        if self.path and self.name:
            with contextlib.suppress(OSError):
                if os.readlink(self.path) == self.name:
                    os.unlink(self.path)

    def _end(self) -> None:
        self.watch_size(False)
        super()._end()

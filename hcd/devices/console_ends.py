"""The host's end of a console port: a pseudo-terminal, a unix socket, a file.

Theory of operation.

* An end moves bytes straight between its descriptor and the buffers of a request: nothing is kept here, so a slow
  reader costs no memory. When the descriptor takes no more, :meth:`End.send` says so, and ``on_writable`` is called
  once it takes more.
* The lane waits for readability alone. So each connection has an epoll instance of its own, which is readable when
  any of the events that matter now is there: input (only while the guest has room for it), room for output (only
  while output waits), and the other side hanging up (always).
* Whoever hangs up may leave bytes behind. They are read first where the guest listens and is merely slow; where
  nobody listens in the guest they are dropped, or the next one could never connect.
* A pseudo-terminal shows whether a program has it open, by HUP, but no event tells of the opening; nor does one of a
  window that changed its size. Both are looked at once a second while a front end is connected.
* Regular files always take output, but may wait for the disk: a thread writes them, from a buffer with a limit.

An end is made, opened and closed on the main thread; everything else is on the lane's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import termios
import threading
import tty
from collections.abc import Callable

from hcd.device import ConfigError, Handle, Lane, Request

__all__ = ["BURST", "ConnectEnd", "End", "FileEnd", "ListenEnd", "PtyEnd"]

#: bytes that one turn moves at most: a guest may send a request of gigabytes, and others wait
BURST = 256 << 10
#: bytes that wait for the writer of a file
FILE_BUFFER = 256 << 10
#: seconds between two attempts to connect, and between two looks at a pseudo-terminal
PAUSE = 1.0
#: how long (seconds) a file that is being closed waits for its disk
PATIENCE = 5.0
HUNG_UP = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR

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


class StreamEnd(End):
    """An end with a descriptor that comes and goes with connections."""

    fd = -1

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._epoll: select.epoll | None = None
        self._watch: Handle | None = None
        self._wanted = self._patient = self._blocked = self._leaving = False

    # -- connections

    def _attach(self, fd: int) -> None:
        """``fd`` (ours, non-blocking) is connected from here on."""
        self.fd = fd
        self._blocked = self._leaving = False
        self._epoll = select.epoll()
        self._epoll.register(fd, self._events())
        self._watch = self.lane.watch(self._epoll.fileno(), self._happened)
        self.connected = True
        self.on_change()

    def _detach(self) -> None:
        """The connection is over; ``fd`` stays open."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        self.connected = False

    def _lost(self) -> None:
        if self.connected:
            self._detach()
            self._after_loss()
            self.on_change()

    def _after_loss(self) -> None:
        """Close the descriptor or keep it, and see to the next connection."""
        raise NotImplementedError

    # -- events

    def _events(self) -> int:
        events = 0 if self._leaving else select.EPOLLRDHUP
        return events | select.EPOLLIN * self._wanted | select.EPOLLOUT * self._blocked

    def _update(self) -> None:
        if self._epoll is None:
            return
        # HUP cannot be masked: who left bytes behind is not looked at until the guest wants them.
        with contextlib.suppress(FileNotFoundError):
            if self._leaving and not self._wanted:
                self._epoll.unregister(self.fd)
            else:
                self._epoll.modify(self.fd, self._events())
            return
        if not (self._leaving and not self._wanted):
            self._epoll.register(self.fd, self._events())

    def want_input(self, wanted: bool, patient: bool) -> None:
        if (wanted, patient) != (self._wanted, self._patient):
            self._wanted, self._patient = wanted, patient
            self._update()
            if self._leaving and not patient:
                self._lost()

    def _happened(self) -> None:
        if self._epoll is None:
            return
        events = dict(self._epoll.poll(0)).get(self.fd, 0)
        if events & select.EPOLLOUT:
            self._blocked = False
            self._update()
            self.on_writable()
        if events & (select.EPOLLIN | HUNG_UP) and self._wanted:
            self.on_readable()
        if events & HUNG_UP and self.connected:
            self._hung_up()

    def _hung_up(self) -> None:
        if not self.has_input() or not self._patient:
            self._lost()
        elif not self._leaving:
            self._leaving = True
            self._update()

    # -- data

    def has_input(self) -> bool:
        if self.fd < 0 or not self.connected:
            return False
        try:
            return bool(struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0])
        except OSError:
            return False

    def receive(self, request: Request) -> int:
        try:
            return request.preadv(self.fd, -1)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._failed(error)
            return 0

    def send(self, request: Request) -> bool:
        left = BURST
        try:
            while request.readable and left > 0:
                left -= request.pwritev(self.fd, -1, left)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)
            return False
        if request.readable:
            self._block()
        return not request.readable

    def send_bytes(self, data: bytes) -> int:
        try:
            sent = os.write(self.fd, data) if self.connected else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._failed(error)
            return 0
        if sent < len(data):
            self._block()
        return sent

    def _block(self) -> None:
        self._blocked = True
        self._update()

    def _failed(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            self.log.warning("%s: %s", self.path, error.strerror)
        self._lost()


class PtyEnd(StreamEnd):
    """A new pseudo-terminal. ``path``, if there is one, becomes a symbolic link to it."""

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
            if os.path.islink(self.path):
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
            self._attach(self.fd)
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
        self.lane.post(self._end)
        if self.path and self.name:
            with contextlib.suppress(OSError):
                if os.readlink(self.path) == self.name:
                    os.unlink(self.path)

    def _end(self) -> None:
        self.watch_size(False)
        self._detach()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SocketEnd(StreamEnd):
    """What the two kinds of sockets have in common."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"{path}: longer than the 107 bytes that a unix socket's path may have")
        self._closed = False

    def _after_loss(self) -> None:
        os.close(self.fd)
        self.fd = -1
        if not self._closed:
            self._await_next()

    def _await_next(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.lane.post(self._end)

    def _end(self) -> None:
        self._closed = True
        self._detach()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ListenEnd(SocketEnd):
    """Listens on ``path`` and serves one client after the other; the next ones wait in the backlog."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._listener: socket.socket | None = None
        self._accepting: Handle | None = None
        self._retry: Handle | None = None
        self._identity = (0, 0)

    def open(self, lane: Lane) -> None:
        super().open(lane)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._remove_stale()
            listener.bind(self.path)
            listener.listen(4)
            made = os.lstat(self.path)
        except OSError as error:
            listener.close()
            raise ConfigError(f"listen:{self.path}: {error.strerror}") from error
        except BaseException:
            listener.close()
            raise
        self._identity = (made.st_dev, made.st_ino)
        self._listener = listener
        lane.post(self._await_next)

    def _remove_stale(self) -> None:
        """A socket that a dead process left behind goes; nothing else does."""
        try:
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise ConfigError(f"listen:{self.path}: there is a file that is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except BlockingIOError:
                pass
            raise ConfigError(f"listen:{self.path}: another process listens there")

    def _await_next(self) -> None:
        if self._listener is not None and not self._closed:
            self._accepting = self.lane.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # it went away again
        except OSError as error:
            self.log.warning("listen:%s: %s", self.path, error.strerror)
            self._stop_accepting()
            self._retry = self.lane.call_later(PAUSE, self._await_next)
            return
        self._stop_accepting()
        client.setblocking(False)
        self._attach(client.detach())

    def _stop_accepting(self) -> None:
        for handle in (self._accepting, self._retry):
            if handle is not None:
                handle.cancel()
        self._accepting = self._retry = None

    def _end(self) -> None:
        super()._end()
        self._stop_accepting()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(OSError):
                now = os.lstat(self.path)
                if (now.st_dev, now.st_ino) == self._identity:
                    os.unlink(self.path)


class ConnectEnd(SocketEnd):
    """Connects to ``path``, again each second while nobody listens there."""

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._timer: Handle | None = None
        self._complained = False

    def open(self, lane: Lane) -> None:
        super().open(lane)
        lane.post(self._connect)

    def _await_next(self) -> None:
        self._timer = self.lane.call_later(PAUSE, self._connect)

    def _connect(self) -> None:
        self._timer = None
        if self._closed:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            if not self._complained:
                self._complained = True
                self.log.warning("connect:%s: %s; trying again each second", self.path, error.strerror)
            self._await_next()
            return
        self._complained = False
        self._attach(sock.detach())

    def _end(self) -> None:
        super()._end()
        if self._timer is not None:
            self._timer.cancel()


class FileEnd(End):
    """Appends to a file (or writes to whatever ``path`` is); there is no input."""

    def open(self, lane: Lane) -> None:
        super().open(lane)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            self._fd = os.open(self.path, flags, 0o640)
        except OSError as error:
            raise ConfigError(f"file:{self.path}: {error.strerror}") from error
        os.set_blocking(self._fd, True)
        self.connected = True
        self._buffer = bytearray()
        self._changed = threading.Condition()
        self._waiting = self._closing = False
        self._thread = threading.Thread(target=self._write, name="hcd-console", daemon=True)
        self._thread.start()

    def send(self, request: Request) -> bool:
        with self._changed:
            self._buffer += request.read(FILE_BUFFER - len(self._buffer))
            self._waiting = bool(request.readable)
            self._changed.notify()
        return not request.readable

    def send_bytes(self, data: bytes) -> int:
        with self._changed:
            taken = data[: FILE_BUFFER - len(self._buffer)]
            self._buffer += taken
            self._waiting = self._waiting or len(taken) < len(data)
            self._changed.notify()
        return len(taken)

    def _write(self) -> None:
        failed = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._buffer or self._closing)
                if not self._buffer:
                    break
                data, self._buffer = self._buffer, bytearray()
            try:
                while data:
                    del data[: os.write(self._fd, data)]
                failed = 0
            except OSError as error:
                if failed != error.errno:
                    self.log.error("file:%s: %s; output is lost", self.path, error.strerror)
                failed = error.errno or 0
            with self._changed:
                waiting, self._waiting = self._waiting, False
            if waiting:
                self.lane.post(self.on_writable)
        os.close(self._fd)

    def close(self) -> None:
        if not self.connected:
            return
        self.connected = False
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self.log.error("file:%s: writing hangs; its thread stays behind", self.path)

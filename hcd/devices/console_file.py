"""A file as the end of a console port. It always takes output, but may wait for the disk: a thread writes it, from a
buffer with a limit."""

from __future__ import annotations

import os
import threading

from hcd.device import ConfigError, Lane, Request
from hcd.devices.console_ends import End

__all__ = ["FileEnd"]

#: bytes that wait for the thread
FILE_BUFFER = 256 << 10
#: how long (seconds) a file that is being closed waits for its disk
PATIENCE = 5.0


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

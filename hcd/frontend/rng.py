"""Virtio-rng: buffers out, random bytes in (virtio 1.3, 5.4)."""

from __future__ import annotations

from hcd.frontend.memory import SharedMemory
from hcd.frontend.queue import Queue

__all__ = ["EntropyDriver"]


class EntropyDriver:
    """Draws bytes through one queue with one buffer at a time."""

    def __init__(self, memory: SharedMemory, queue: Queue, *, size: int = 4096, timeout: float = 20.0) -> None:
        self.memory = memory
        self.queue = queue
        self.timeout = timeout
        self._size = size
        self._buffer = memory.alloc(size)

    def draw(self, length: int) -> bytes:
        """One request for up to ``length`` bytes (at most the buffer's size); the device may give fewer."""
        length = min(length, self._size)
        token = self.queue.submit([], [(self._buffer, length)])
        written = self.queue.wait_for(token, self.timeout)
        return self.memory.read(self._buffer, min(written, length))

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes, in as many requests as it takes."""
        data = b""
        while len(data) < length:
            data += self.draw(length - len(data))
        return data

"""A front end that can do whole requests: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Sequence

from hcd.frontend.client import Frontend

__all__ = ["Driver", "cut"]


def cut(size: int, pieces: Sequence[int]) -> list[int]:
    """``size`` as a sum: ``pieces`` as far as they fit, then the rest."""
    sizes = []
    for piece in pieces:
        if not size:
            break
        sizes.append(min(piece, size))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


class Driver(Frontend):
    """A :class:`~hcd.frontend.client.Frontend` with whole requests on top. ``Driver.open(path)`` sets everything up."""

    def ask(
        self,
        data: bytes = b"",
        room: int = 0,
        *,
        queue: int = 0,
        pieces: Sequence[int] = (),
        indirect: bool = False,
    ) -> bytes:
        """One request of ``data`` with ``room`` bytes for the answer; returns what the device says it wrote.

        ``pieces`` cuts data and room into descriptors of these sizes, as drivers may. BackendError when the answer
        does not come in ``timeout`` seconds, or the back end hangs up.
        """
        readable = self.place(data, pieces)
        writable = self.make_room(room, pieces)
        token = self.queues[queue].submit(readable, writable, indirect)
        written = self.queues[queue].wait_for(token, self.timeout)
        answer = self.gather(writable)[:written]
        self.free(readable + writable)
        return answer

    def place(self, data: bytes, pieces: Sequence[int] = ()) -> list[tuple[int, int]]:
        """``data`` in guest memory, as buffers for ``Queue.submit``; each piece lies apart from the others."""
        buffers, at = [], 0
        for size in cut(len(data), pieces):
            gpa = self.memory.alloc(size)
            self.memory.write(gpa, data[at : at + size])
            buffers.append((gpa, size))
            at += size
        return buffers

    def make_room(self, size: int, pieces: Sequence[int] = (), fill: int = 0) -> list[tuple[int, int]]:
        """Buffers for ``size`` bytes of answer, each byte of which is ``fill``."""
        return self.place(bytes([fill]) * size, pieces)

    def gather(self, buffers: Sequence[tuple[int, int]]) -> bytes:
        """What the buffers hold."""
        return b"".join(self.memory.read(gpa, size) for gpa, size in buffers)

    def free(self, buffers: Sequence[tuple[int, int]]) -> None:
        """Give guest memory back. The device must be done with it."""
        for gpa, _ in buffers:
            self.memory.free(gpa)

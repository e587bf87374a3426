"""Mutations of a conversation that know where its messages begin."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["INTERESTING", "Heard", "chunks", "mutate"]

INTERESTING = tuple(
    value & (1 << 64) - 1
    for at in (0, 1, 2, 8, 12, 255, 256, 257, 4096, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
    for value in (at - 1, at, at + 1)
)


@dataclass(slots=True)
class Heard:
    """One message as it arrives."""

    data: bytes
    fds: int


def mutate(spoken: Sequence[tuple[bytes, int]], chance: random.Random, header: int) -> tuple[list[Heard], bool]:
    """The conversation with some things changed; and whether every header still tells its message's size.

    ``header``: bytes of a header whose last four are the size (of the payload, as in vhost-user).
    """
    said = [Heard(*one) for one in spoken]
    if chance.random() < 0.5:
        said = said[: chance.randrange(len(said)) + 1]
    framed = True
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        i = chance.randrange(len(said))
        what = chance.randrange(10)
        if what == 0:
            del said[i]
        elif what == 1:
            said.insert(chance.randrange(len(said) + 1), Heard(said[i].data, said[i].fds))
        elif what == 2:
            j = chance.randrange(len(said))
            said[i], said[j] = said[j], said[i]
        elif what == 3:
            said[i].fds = chance.choice((0, 1, 2, 3, 8, 9, 32))
        elif what == 4:
            framed &= _resize(said[i], chance, header)
        else:
            framed &= _overwrite(said[i], chance, header)
        if not said:
            break
    return said, framed


def _resize(one: Heard, chance: random.Random, header: int) -> bool:
    """Another length, which the header mostly tells."""
    size = chance.choice((0, 1, len(one.data) - 1, len(one.data) + 1, len(one.data) + 8, chance.randrange(5000)))
    one.data = one.data[:size] + chance.randbytes(max(0, size - len(one.data)))
    if size < header:
        return False
    if chance.random() < 0.2:
        return False
    one.data = one.data[: header - 4] + struct.pack("=I", size - header) + one.data[header:]
    return True


def _overwrite(one: Heard, chance: random.Random, header: int) -> bool:
    width = chance.choice((1, 1, 2, 4, 8))
    data = bytearray(one.data)
    if len(data) < width:
        return True
    at = chance.randrange(len(data) - width + 1)
    if chance.random() < 0.7:
        at -= at % width
    if chance.random() < 0.4:
        data[at] ^= 1 << chance.randrange(8)
    else:
        value = chance.choice(INTERESTING) if chance.random() < 0.8 else chance.getrandbits(64)
        data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    one.data = bytes(data)
    return at + width <= header - 4 or at >= header


def chunks(said: Sequence[Heard], chance: random.Random) -> list[Heard]:
    """The same bytes in other pieces, as a kernel may hand them out: descriptors come with the last message that
    begins in a piece, and a piece ends at the latest behind that message."""
    pieces: list[Heard] = []
    glued = b""
    for one in said:
        if not one.fds and chance.random() < 0.4:
            glued += one.data
            continue
        cuts = sorted(chance.randrange(len(one.data) + 1) for _ in range(chance.choice((0, 0, 1, 2, 5))))
        cuts = [0, *(place for place in cuts if place), len(one.data)]
        parts = [one.data[a:b] for a, b in pairwise(cuts) if a < b]
        if not parts:
            continue
        pieces.append(Heard(glued + parts[0], one.fds))
        pieces += [Heard(part, 0) for part in parts[1:]]
        glued = b""
    if glued:
        pieces.append(Heard(glued, 0))
    return pieces

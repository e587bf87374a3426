"""hcd's end of a doorbell connection, without a socket.

::

    HELLO ─► (HOLD ... until all are there) ─► event Attach
    welcome(), then remove(), add(), end() in any number  ─► for each message one event Answers
    CLOCK at any time after that ─► event ClockChanged; ERROR ─► event PeerError

One message that wants an answer is on its way at a time: the next leaves when the VMM has answered the last. So
neither side can block the other with full sockets, and never more than 253 descriptors are in flight.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hcd_protocols.doorbell.items import Capability, Held, Item, Outcome, Reference
from hcd_protocols.doorbell.layouts import MAX_ITEMS, VERSION
from hcd_protocols.doorbell.link import Link, Packet
from hcd_protocols.doorbell.messages import (
    Clock,
    End,
    Error,
    Hello,
    Message,
    Remove,
    Status,
    Table,
    Welcome,
    encode,
)

__all__ = ["MAX_HELD", "Answers", "Attach", "ClockChanged", "HostConnection", "HostEvent", "PeerError"]

#: more held items than any VMM has
MAX_HELD = 1 << 16


@dataclass(frozen=True, slots=True)
class Attach:
    """A VMM wants to be served. The descriptors of ``held`` are the receiver's."""

    name: str
    capabilities: Capability
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the VMM did with the items of one message. ``removed``: the message was a removal."""

    outcomes: tuple[Outcome, ...]
    removed: bool = False


@dataclass(frozen=True, slots=True)
class ClockChanged:
    """guest TSC = host TSC + ``tsc_offset``; ``tsc_khz`` 0: not known (any more)."""

    tsc_khz: int
    tsc_offset: int


@dataclass(frozen=True, slots=True)
class PeerError:
    """The VMM is about to close, and says why. ``code`` is an errno."""

    code: int
    text: str


HostEvent = Attach | Answers | ClockChanged | PeerError


@dataclass(frozen=True, slots=True)
class _Outgoing:
    message: Message
    fds: tuple[int, ...] = ()
    references: tuple[Reference, ...] = ()


class HostConnection(Link):
    """One VMM's connection. Input and output as in :class:`Link`; ``next_event`` raises ProtocolError for garbage."""

    def __init__(self) -> None:
        super().__init__()
        self._hello: Hello | None = None
        self._holding: list[Held] = []
        self._attached = False
        self._outgoing: deque[_Outgoing] = deque()
        self._asked: tuple[Reference, ...] = ()  # of the message that waits for its answer
        self._asked_to_remove = False

    @property
    def idle(self) -> bool:
        """Whether everything was sent and answered."""
        return not self._outgoing and not self._asked

    # -- in

    def next_event(self) -> HostEvent | None:
        """The next event, or None until more has come. ProtocolError ends the connection for good."""
        while (received := self._next_message()) is not None:
            message, fds = received
            event = self._take(message, fds)
            if event is not None:
                return event
        return None

    def take_unclaimed_fds(self) -> list[int]:
        self._unclaimed += [held.fd for held in self._holding]
        self._holding.clear()
        return super().take_unclaimed_fds()

    def _take(self, message: Message, fds: tuple[int, ...]) -> HostEvent | None:
        if isinstance(message, Error):
            return PeerError(message.code, message.text)
        if self._hello is None:
            return self._take_hello(message, fds)
        match message:
            case Table(hold=True) if not self._attached:
                return self._take_held(message, fds)
            case Status() if self._attached:
                return self._take_status(message)
            case Clock() if self._attached:
                return ClockChanged(message.tsc_khz, message.tsc_offset)
        raise self._refuse(fds, f"{type(message).__name__} {'after' if self._attached else 'before'} the VMM attached")

    def _take_hello(self, message: Message, fds: tuple[int, ...]) -> HostEvent | None:
        if not isinstance(message, Hello):
            raise self._refuse(fds, f"expected HELLO first, got {type(message).__name__}")
        if not message.lowest <= VERSION <= message.highest:
            raise self._refuse(
                fds, f"the VMM speaks versions {message.lowest} to {message.highest} of the protocol, not {VERSION}"
            )
        if message.held > MAX_HELD:
            raise self._refuse(fds, f"HELLO: {message.held} held items; expected {MAX_HELD} at most")
        self._hello = message
        return self._attach_when_complete()

    def _take_held(self, message: Table, fds: tuple[int, ...]) -> HostEvent | None:
        assert self._hello is not None
        seen = {held.item.reference for held in self._holding}
        new = [item.reference for item in message.items]
        if len(seen.union(new)) != len(seen) + len(new):
            raise self._refuse(fds, "HOLD: an item twice")
        if len(seen) + len(new) > self._hello.held:
            raise self._refuse(fds, f"HOLD: more items than the {self._hello.held} that HELLO announced")
        self._holding += [Held(item, fd) for item, fd in zip(message.items, fds, strict=True)]
        return self._attach_when_complete()

    def _attach_when_complete(self) -> Attach | None:
        assert self._hello is not None
        if len(self._holding) < self._hello.held:
            return None
        self._attached = True
        held, self._holding = tuple(self._holding), []
        return Attach(self._hello.name, self._hello.capabilities, held)

    def _take_status(self, message: Status) -> Answers:
        if not self._asked:
            raise self._refuse((), "STATUS: nothing was asked")
        if [entry.id for entry in message.entries] != [reference.id for reference in self._asked]:
            raise self._refuse((), "STATUS: expected the ids of the message that it answers, in their order")
        outcomes = tuple(
            Outcome(reference, entry.error, entry.value)
            for reference, entry in zip(self._asked, message.entries, strict=True)
        )
        self._asked = ()
        return Answers(outcomes, self._asked_to_remove)

    # -- out

    def welcome(self, device: str, *, doorbells: int, interrupts: int, memory: int) -> None:
        """Greet the VMM: the device's name, and how many items of each kind the table is going to bring."""
        self._outgoing.append(_Outgoing(Welcome(device, doorbells, interrupts, memory, VERSION)))

    def add(self, items: Sequence[Item], fds: Sequence[int | None]) -> None:
        """Send ``items``, all of one kind, in as many messages as it takes.

        ``fds``, one for each: the descriptor, or None for an item that the VMM holds and that stays valid. They must
        stay open until the answer is there.
        """
        for start, end in _parts(len(items)):
            part = fds[start:end]
            message = Table(tuple(items[start:end]), tuple(fd is None for fd in part))
            references = tuple(item.reference for item in message.items)
            self._outgoing.append(_Outgoing(message, tuple(fd for fd in part if fd is not None), references))

    def remove(self, references: Sequence[Reference]) -> None:
        """Tell the VMM to unregister and forget items."""
        for start, end in _parts(len(references)):
            part = tuple(references[start:end])
            self._outgoing.append(_Outgoing(Remove(part), (), part))

    def end(self) -> None:
        """The table, or the change to it, is complete with what was queued before."""
        self._outgoing.append(_Outgoing(End()))

    def send_error(self, text: str, code: int = errno.EPROTO) -> None:
        self._outgoing.clear()
        super().send_error(text, code)

    def data_to_send(self) -> list[Packet]:
        while self._outgoing and not self._asked:
            outgoing = self._outgoing.popleft()
            self._due.append((encode(outgoing.message), outgoing.fds))
            self._asked = outgoing.references
            self._asked_to_remove = isinstance(outgoing.message, Remove)
        return super().data_to_send()


def _parts(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, MAX_ITEMS):
        yield start, min(start + MAX_ITEMS, count)

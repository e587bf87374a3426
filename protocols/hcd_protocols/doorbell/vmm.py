"""The VMM's end of a doorbell connection, without a socket.

::

    made: HELLO, and HOLD for what it has from an earlier connection, are due at once
    WELCOME ─► event Welcomed
    then DOORBELLS, INTERRUPTS, MEMORY ─► event Added; REMOVE ─► event Removed: each wants answer()
    END ─► event TableComplete; ERROR ─► event Refused

A VMM that keeps the eventfds of a connection that ended offers them to the next one as ``held``. hcd confirms each item
that its table still has, unchanged (``Added`` with fd None: go on with yours), and removes the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hcd_protocols.doorbell.items import Capability, Held, Item, Kind, Reference
from hcd_protocols.doorbell.layouts import MAX_ITEMS, VERSION
from hcd_protocols.doorbell.link import Link
from hcd_protocols.doorbell.messages import (
    Clock,
    End,
    Error,
    Hello,
    Message,
    Remove,
    Status,
    StatusEntry,
    Table,
    Welcome,
    encode,
)

__all__ = ["Added", "Refused", "Removed", "TableComplete", "VmmConnection", "VmmEvent", "Welcomed"]


@dataclass(frozen=True, slots=True)
class Welcomed:
    """hcd serves us. How many items of each kind the table brings, held ones included."""

    device: str
    doorbells: int
    interrupts: int
    memory: int
    version: int


@dataclass(frozen=True, slots=True)
class Added:
    """Register ``items``, all of one kind, then :meth:`VmmConnection.answer`.

    ``fds``, one for each, are the receiver's; None: the VMM holds the item's descriptor already, and goes on with it.
    """

    items: tuple[Item, ...]
    fds: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """Unregister ``references``, close their descriptors, then :meth:`VmmConnection.answer`."""

    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class TableComplete:
    """The table, or a change to it, is complete."""


@dataclass(frozen=True, slots=True)
class Refused:
    """hcd is about to close, and says why. ``code`` is an errno (EBUSY: another VMM is attached)."""

    code: int
    text: str


VmmEvent = Welcomed | Added | Removed | TableComplete | Refused


class VmmConnection(Link):
    """A connection to hcd. ``name`` stands in hcd's log; ``held``'s descriptors stay the caller's."""

    def __init__(self, name: str, capabilities: Capability, held: Sequence[Held] = ()) -> None:
        super().__init__()
        self._welcomed = False
        self._asked: deque[tuple[int, ...]] = deque()
        self._unconfirmed = {one.item.reference: one.item for one in held}
        self._known: set[Reference] = set()
        self._due.append((encode(Hello(name, capabilities, len(held), VERSION, VERSION)), ()))
        for kind in Kind:
            of_kind = [one for one in held if one.item.reference.kind is kind]
            for start in range(0, len(of_kind), MAX_ITEMS):
                part = of_kind[start : start + MAX_ITEMS]
                message = Table(tuple(one.item for one in part), (False,) * len(part), hold=True)
                self._due.append((encode(message), tuple(one.fd for one in part)))

    # -- in

    def next_event(self) -> VmmEvent | None:
        """The next event, or None until more has come. ProtocolError ends the connection for good."""
        received = self._next_message()
        return None if received is None else self._take(*received)

    def _take(self, message: Message, fds: tuple[int, ...]) -> VmmEvent:
        match message:
            case Error():
                return Refused(message.code, message.text)
            case Welcome() if not self._welcomed:
                return self._take_welcome(message)
            case Table(hold=False) if self._welcomed:
                return self._take_table(message, fds)
            case Remove() if self._welcomed:
                return self._take_remove(message)
            case End() if self._welcomed:
                if self._unconfirmed:
                    raise self._refuse((), f"END: {len(self._unconfirmed)} held items neither confirmed nor removed")
                return TableComplete()
        when = "after" if self._welcomed else "before"
        raise self._refuse(fds, f"{type(message).__name__} {when} WELCOME")

    def _take_welcome(self, message: Welcome) -> Welcomed:
        if message.version != VERSION:
            raise self._refuse((), f"WELCOME: version {message.version}; expected {VERSION}")
        self._welcomed = True
        return Welcomed(message.device, message.doorbells, message.interrupts, message.memory, message.version)

    def _take_table(self, message: Table, fds: tuple[int, ...]) -> Added:
        references = [item.reference for item in message.items]
        if len(set(references)) != len(references):
            raise self._refuse(fds, f"{references[0].kind.name}: an item twice")
        for item, held in zip(message.items, message.held, strict=True):
            reference = item.reference
            if held and self._unconfirmed.get(reference) != item:
                raise self._refuse(fds, f"{reference} is said to be held, and is not")
            if not held and (reference in self._known or reference in self._unconfirmed):
                raise self._refuse(fds, f"{reference} is there already")
        for reference in references:
            self._unconfirmed.pop(reference, None)
            self._known.add(reference)
        self._asked.append(tuple(reference.id for reference in references))
        given = iter(fds)
        return Added(message.items, tuple(None if held else next(given) for held in message.held))

    def _take_remove(self, message: Remove) -> Removed:
        if len(set(message.references)) != len(message.references):
            raise self._refuse((), "REMOVE: an item twice")
        for reference in message.references:
            if reference not in self._known and reference not in self._unconfirmed:
                raise self._refuse((), f"REMOVE: there is no {reference}")
        for reference in message.references:
            self._known.discard(reference)
            self._unconfirmed.pop(reference, None)
        self._asked.append(tuple(reference.id for reference in message.references))
        return Removed(message.references)

    # -- out

    def answer(self, results: Sequence[int | tuple[int, int]]) -> None:
        """Answer the oldest ``Added`` or ``Removed`` that is not answered yet.

        ``results``, one for each item, in order: 0 or an errno, or (0, value): the guest-physical address of memory,
        the GSI of an interrupt. ValueError when nothing was asked, or of other size.
        """
        if not self._asked or len(self._asked[0]) != len(results):
            raise ValueError(f"{len(results)} answers; asked for {len(self._asked[0]) if self._asked else 'nothing'}")
        entries = []
        for number, result in zip(self._asked.popleft(), results, strict=True):
            error, value = result if isinstance(result, tuple) else (result, 0)
            entries.append(StatusEntry(number, error, value))
        self._due.append((encode(Status(tuple(entries))), ()))

    def set_clock(self, *, tsc_khz: int, tsc_offset: int) -> None:
        """Tell how the guest's TSC relates to the host's: guest = host + ``tsc_offset`` (KVM_VCPU_TSC_OFFSET).

        Only where both tick at the same rate, ``tsc_khz``. 0 takes it back. Without it stamps mean nothing to hcd.
        """
        self._due.append((encode(Clock(tsc_khz, tsc_offset)), ()))

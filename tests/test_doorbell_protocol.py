"""The doorbell socket protocol, without a socket: its bytes, both ends, garbage, and where descriptors go."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.doorbell import (
    MAX_ITEMS,
    MAX_MESSAGE,
    Added,
    Answers,
    Attach,
    Capability,
    ClockChanged,
    DoorbellItem,
    Held,
    HostConnection,
    InterruptItem,
    Item,
    Kind,
    MemoryItem,
    Outcome,
    PeerError,
    Place,
    ProtocolError,
    Reference,
    Refused,
    Removed,
    TableComplete,
    VmmConnection,
    Welcomed,
    layouts,
    messages,
)
from hcd_protocols.doorbell.messages import decode, encode
from hcd_protocols.doorbell.text import message_text
from hypothesis import given, settings
from hypothesis import strategies as st

RING = Reference(Kind.DOORBELL, 1)


def name(text: str, size: int = 32) -> bytes:
    return text.encode().ljust(size, b"\0")


#: every message, and its bytes as docs/doorbells.md has them
EXAMPLES: dict[str, tuple[messages.Message, bytes]] = {
    "HELLO": (
        messages.Hello("vmm", Capability.PIO | Capability.IRQFD, 3, 1, 2),
        struct.pack("<HHI", 1, 0, 64) + b"hcd-bell" + struct.pack("<HHIII", 1, 2, 0x41, 3, 0) + name("vmm"),
    ),
    "HOLD_DOORBELLS": (
        messages.Table((DoorbellItem(7, "d", Place.PIO, 0x510, 2, 5),), (False,), hold=True),
        struct.pack("<HHI", 2, 1, 72) + struct.pack("<IBBHQQII", 7, 1, 2, 1, 0x510, 5, 0, 0) + name("d"),
    ),
    "HOLD_INTERRUPTS": (
        messages.Table((InterruptItem(7, "i"),), (False,), hold=True),
        struct.pack("<HHI", 3, 1, 48) + struct.pack("<IHH", 7, 0, 0) + name("i"),
    ),
    "HOLD_MEMORY": (
        messages.Table((MemoryItem(1, 4096, 0),), (False,), hold=True),
        struct.pack("<HHI", 4, 1, 32) + struct.pack("<IHHQQ", 1, 0, 0, 4096, 0),
    ),
    "STATUS": (
        messages.Status((messages.StatusEntry(1, 17, 0), messages.StatusEntry(2, 0, 0xC0000000))),
        struct.pack("<HHI", 5, 2, 40) + struct.pack("<IiQIiQ", 1, 17, 0, 2, 0, 0xC0000000),
    ),
    "CLOCK": (
        messages.Clock(2_400_000, -5),
        struct.pack("<HHI", 6, 0, 24) + struct.pack("<IIq", 2_400_000, 0, -5),
    ),
    "ERROR": (
        messages.Error(16, "busy"),
        struct.pack("<HHI", 0x40, 0, 136) + struct.pack("<II", 16, 0) + name("busy", 120),
    ),
    "WELCOME": (
        messages.Welcome("echo", 3, 2, 1, 1),
        struct.pack("<HHI", 0x81, 0, 56) + struct.pack("<HHIII", 1, 0, 3, 2, 1) + name("echo"),
    ),
    "DOORBELLS": (
        messages.Table(
            (
                DoorbellItem(1, "any", Place.MMIO, 1 << 63, 0, None, 16),
                DoorbellItem(2, "hv", Place.HYPERV, 0xFFFFFF),
            ),
            (False, True),
        ),
        struct.pack("<HHI", 0x82, 2, 136)
        + struct.pack("<IBBHQQII", 1, 2, 0, 4, 1 << 63, 0, 16, 0) + name("any")
        + struct.pack("<IBBHQQII", 2, 3, 0, 2, 0xFFFFFF, 0, 0, 0) + name("hv"),
    ),
    "INTERRUPTS": (
        messages.Table((InterruptItem(9, "irq"),), (True,)),
        struct.pack("<HHI", 0x83, 1, 48) + struct.pack("<IHH", 9, 0, 2) + name("irq"),
    ),
    "MEMORY": (
        messages.Table((MemoryItem(1, 8192, 0xC0000000),), (False,)),
        struct.pack("<HHI", 0x84, 1, 32) + struct.pack("<IHHQQ", 1, 0, 0, 8192, 0xC0000000),
    ),
    "REMOVE": (
        messages.Remove((Reference(Kind.DOORBELL, 4), Reference(Kind.MEMORY, 1))),
        struct.pack("<HHI", 0x85, 2, 24) + struct.pack("<IHHIHH", 4, 1, 0, 1, 3, 0),
    ),
    "END": (messages.End(), struct.pack("<HHI", 0x86, 0, 8)),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_bytes(kind: str) -> None:
    """Each message is written and read exactly so."""
    message, data = EXAMPLES[kind]
    assert encode(message) == data
    assert decode(data) == message
    assert struct.unpack_from("<H", data)[0] == messages.Type[kind]


def test_every_type_has_an_example() -> None:
    assert set(EXAMPLES) == {kind.name for kind in messages.Type}


TEXTS = {
    "HELLO": 'HELLO "vmm"',
    "HOLD_DOORBELLS": "HOLD_DOORBELLS [7 d pio 0x510/2=0x5]",
    "HOLD_INTERRUPTS": "HOLD_INTERRUPTS [7 i]",
    "HOLD_MEMORY": "HOLD_MEMORY [1 size=4096 wanted=0x0]",
    "STATUS": "STATUS [1 EEXIST, 2 ok 0xc0000000]",
    "CLOCK": "CLOCK tsc_khz=2400000 tsc_offset=-5",
    "ERROR": 'ERROR EBUSY "busy"',
    "WELCOME": 'WELCOME "echo" version=1 doorbells=3 interrupts=2 memory=1',
    "DOORBELLS": "DOORBELLS [1 any mmio 0x8000000000000000 stamp=0x10, 2 hv hyperv 0xffffff held]",
    "INTERRUPTS": "INTERRUPTS [9 irq held]",
    "MEMORY": "MEMORY [1 size=8192 wanted=0xc0000000]",
    "REMOVE": "REMOVE [doorbell 4, memory 1]",
    "END": "END",
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_text(kind: str) -> None:
    """As hcd trace shows it."""
    _, data = EXAMPLES[kind]
    assert message_text(data).startswith(TEXTS[kind])
    assert message_text(data, 2) == f"{message_text(data)} fds=2"


def test_text_of_a_greeting_names_what_the_vmm_can_do() -> None:
    data = encode(messages.Hello("vmm", Capability.PIO | Capability.HYPERV | Capability(1 << 20), 2, 1, 3))
    assert message_text(data) == 'HELLO "vmm" versions=1-3 capabilities=0x100011 (PIO|HYPERV) held=2'


def test_text_of_a_long_table_ends() -> None:
    """253 doorbells are one line that can be read."""
    items = tuple(InterruptItem(i, f"i{i}") for i in range(1, 254))
    assert message_text(encode(messages.Table(items, (False,) * 253)), 253) == (
        "INTERRUPTS [1 i1, 2 i2, 3 i3, 4 i4, 5 i5, 6 i6, 7 i7, 8 i8, and 245 more] fds=253"
    )


@pytest.mark.parametrize("kind", EXAMPLES)
def test_text_of_what_is_wrong(kind: str) -> None:
    """Whatever comes is shown as far as it can be read."""
    _, data = EXAMPLES[kind]
    for size in range(len(data)):
        assert f"<{size} bytes>" in message_text(data[:size])
    assert message_text(data + b"x").startswith(f"{kind} <{len(data) + 1} bytes> ({kind}: expected ")
    assert message_text(struct.pack("<HHI", 0x77, 0, 8)) == "message 0x77 <8 bytes>"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_other_size_is_refused(kind: str) -> None:
    """Cut short anywhere, with bytes behind it, or with another size in the header."""
    _, data = EXAMPLES[kind]
    wrong = [data[:length] for length in range(len(data))]
    wrong += [data + b"\0", data[:4] + struct.pack("<I", len(data) + 1) + data[8:]]
    for packet in wrong:
        with pytest.raises(ProtocolError):
            decode(packet)


@pytest.mark.parametrize(
    ("kind", "offset", "value", "expected"),
    [
        ("HELLO", 0, b"\x07\0", "unknown message type 0x7"),
        ("HELLO", 2, b"\x01", "count of 0"),
        ("HELLO", 8, b"x", "magic"),
        ("HELLO", 16, b"\0", "versions 0 to 2"),
        ("HELLO", 16, b"\x03", "versions 3 to 2"),
        ("HELLO", 28, b"\x01", "reserved"),
        ("HELLO", 32, b"x" * 32, "NUL"),
        ("HELLO", 36, b"x", "NUL"),
        ("HELLO", 32, b"\xff", "UTF-8"),
        ("HELLO", 32, b"\x07", "control"),
        ("STATUS", 2, b"\0\0", "1 to 253 items"),
        ("STATUS", 12, b"\xff\xff\xff\xff", "below 0"),
        ("CLOCK", 12, b"\x01", "reserved"),
        ("REMOVE", 12, b"\x04", "4 is not a valid Kind"),
        ("REMOVE", 14, b"\x01", "reserved"),
        ("DOORBELLS", 8, b"\0\0\0\0", "id 0"),
        ("DOORBELLS", 12, b"\x09", "9 is not a valid Place"),
        ("DOORBELLS", 13, b"\x03", "width 3"),
        ("DOORBELLS", 14, b"\x05", "does not fit"),
        ("DOORBELLS", 14, b"\x08", "unknown flags 0x8"),
        ("DOORBELLS", 24, b"\x01", "without its flag"),
        ("DOORBELLS", 32, b"\x04", "multiple of 8"),
        ("DOORBELLS", 36, b"\x01", "reserved"),
        ("DOORBELLS", 40, b"a b", "expected letters"),
        ("HOLD_DOORBELLS", 14, b"\x03", "unknown flags 0x2"),
        ("HOLD_DOORBELLS", 16, b"\0\0\x01", "beyond"),
        ("HOLD_DOORBELLS", 24, b"\0\0\x01", "does not fit"),
        ("INTERRUPTS", 12, b"\x01", "reserved"),
        ("INTERRUPTS", 14, b"\x01", "unknown flags 0x1"),
        ("MEMORY", 16, b"\x01", "whole pages"),
        ("MEMORY", 24, b"\x01", "start of a page"),
    ],
)
def test_wrong_fields_are_named(kind: str, offset: int, value: bytes, expected: str) -> None:
    data = bytearray(EXAMPLES[kind][1])
    data[offset : offset + len(value)] = value
    with pytest.raises(ProtocolError, match=expected):
        decode(bytes(data))


@pytest.mark.parametrize(
    "fields",
    [
        (Place.PIO, 0xFFFF, 2),
        (Place.PIO, 0, 8),
        (Place.MMIO, (1 << 64) - 1, 2),
        (Place.HYPERV, 1 << 24, 0),
        (Place.HYPERV, 1, 4),
        (Place.XEN, 0, 0),
        (Place.XEN, 1 << 32, 0),
        (Place.PIO, 0, 1, 256),
        (Place.PIO, 0, 0, 0),
    ],
)
def test_doorbells_that_no_kernel_takes(fields: Sequence[Any]) -> None:
    with pytest.raises(ValueError, match='doorbell "d"'):
        DoorbellItem(1, "d", *fields)


# -- both ends together


class Ends:
    """Both ends, and a wire between them that can cut a conversation anywhere."""

    def __init__(self, held: Sequence[Held] = ()) -> None:
        self.host = HostConnection()
        self.vmm = VmmConnection("vmm", Capability.PIO, held)
        self.events: list[Any] = []
        self.refuse: dict[Reference, int] = {}

    def pump(self) -> None:
        """Carry packets until both ends are silent; the VMM answers by ``refuse``."""
        while self.to_host() + self.to_vmm():
            pass

    def to_host(self) -> int:
        packets = self.vmm.data_to_send()
        for packet in packets:
            self.host.receive_data(*packet)
        while (event := self.host.next_event()) is not None:
            self.events.append(event)
        return len(packets)

    def to_vmm(self) -> int:
        packets = self.host.data_to_send()
        for packet in packets:
            assert len(packet[0]) <= MAX_MESSAGE
            assert len(packet[1]) <= MAX_ITEMS
            self.vmm.receive_data(*packet)
        while (event := self.vmm.next_event()) is not None:
            self.events.append(event)
            match event:
                case Added(items=items):
                    self.vmm.answer([self.refuse.get(item.reference, 0) for item in items])
                case Removed(references=references):
                    self.vmm.answer([0] * len(references))
        return len(packets)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def doorbells(count: int) -> list[Item]:
    return [DoorbellItem(i, f"d{i}", Place.MMIO, 0x1000 * i, 4) for i in range(1, count + 1)]


def test_a_whole_conversation() -> None:
    """Table, answers, change, removal, clock: each arrives as it was sent, in its order."""
    ends = Ends()
    ends.pump()
    assert ends.events == [Attach("vmm", Capability.PIO, ())]
    ends.events.clear()
    ends.refuse[RING] = 17
    host = ends.host
    host.welcome("echo", doorbells=1, interrupts=1, memory=1)
    host.add([MemoryItem(1, 4096)], [50])
    host.add([InterruptItem(1, "irq")], [51])
    host.add(doorbells(1), [52])
    host.end()
    assert not host.idle
    ends.pump()
    assert host.idle
    assert ends.events == [
        Welcomed("echo", 1, 1, 1, 1),
        Added((MemoryItem(1, 4096),), (50,)),
        Answers((Outcome(Reference(Kind.MEMORY, 1)),)),
        Added((InterruptItem(1, "irq"),), (51,)),
        Answers((Outcome(Reference(Kind.INTERRUPT, 1)),)),
        Added(tuple(doorbells(1)), (52,)),
        Answers((Outcome(RING, 17),)),
        TableComplete(),
    ]
    ends.events.clear()
    host.remove([RING])
    host.end()
    ends.vmm.set_clock(tsc_khz=3, tsc_offset=-4)
    ends.pump()
    assert ends.events == [ClockChanged(3, -4), Removed((RING,)), Answers((Outcome(RING),), removed=True),
                           TableComplete()]
    assert host.take_unclaimed_fds() == ends.vmm.take_unclaimed_fds() == []


def test_values_travel() -> None:
    """Where memory is, and which GSI an interrupt became."""
    ends = Ends()
    ends.pump()
    ends.host.welcome("echo", doorbells=0, interrupts=0, memory=1)
    ends.host.add([MemoryItem(1, 4096)], [50])
    for packet in ends.host.data_to_send():
        ends.vmm.receive_data(*packet)
    assert isinstance(ends.vmm.next_event(), Welcomed)
    assert isinstance(ends.vmm.next_event(), Added)
    ends.vmm.answer([(0, 0xC0000000)])
    ends.to_host()
    assert ends.events[-1] == Answers((Outcome(Reference(Kind.MEMORY, 1), 0, 0xC0000000),))


def test_a_large_table_goes_one_part_at_a_time() -> None:
    """1000 doorbells are four messages, and each waits for the answer to the last."""
    ends = Ends()
    ends.pump()
    ends.host.welcome("echo", doorbells=1000, interrupts=0, memory=0)
    ends.host.add(doorbells(1000), list(range(1000)))
    assert [len(fds) for _, fds in ends.host.data_to_send()] == [0, 253]
    assert ends.host.data_to_send() == []
    ends = Ends()
    ends.pump()
    ends.host.welcome("echo", doorbells=1000, interrupts=0, memory=0)
    ends.host.add(doorbells(1000), list(range(1000)))
    ends.host.end()
    ends.pump()
    assert [len(added.items) for added in ends.of(Added)] == [253, 253, 253, 241]
    assert [fd for added in ends.of(Added) for fd in added.fds] == list(range(1000))
    assert sum(len(answers.outcomes) for answers in ends.of(Answers)) == 1000


def held_items(count: int) -> list[Held]:
    return [*(Held(item, 100 + item.id) for item in doorbells(count)), Held(InterruptItem(1, "irq"), 99)]


def test_holding_on() -> None:
    """What a VMM holds arrives whole, in parts; what the table confirms comes without a descriptor."""
    held = held_items(300)
    ends = Ends(held)
    ends.pump()
    (attach,) = ends.events
    assert set(attach.held) == set(held)
    ends.events.clear()
    ends.host.welcome("echo", doorbells=1, interrupts=1, memory=0)
    ends.host.remove([item.reference for item in doorbells(300)[1:]])
    ends.host.add([InterruptItem(1, "irq")], [None])
    ends.host.add([*doorbells(1), DoorbellItem(2, "new", Place.PIO, 1)], [None, 7])
    ends.host.end()
    ends.pump()
    assert [added.fds for added in ends.of(Added)] == [(None,), (None, 7)]
    assert sum(len(removed.references) for removed in ends.of(Removed)) == 299
    assert ends.events[-1] == TableComplete()


def carried(event: object) -> Iterator[int]:
    """The descriptors that an event hands over."""
    if isinstance(event, Attach):
        yield from (held.fd for held in event.held)
    if isinstance(event, Added):
        yield from (fd for fd in event.fds if fd is not None)


def drain(end: HostConnection | VmmConnection, fds: list[int] | None = None) -> None:
    """Take every event; their descriptors go to ``fds``."""
    while (event := end.next_event()) is not None:
        if fds is not None:
            fds += carried(event)


# -- rules: what each end refuses of the other


def attached() -> HostConnection:
    host = HostConnection()
    host.receive_data(encode(messages.Hello("vmm", Capability.PIO)))
    assert isinstance(host.next_event(), Attach)
    return host


HOLD = messages.Table((InterruptItem(1, "i"),), (False,), hold=True)
STATUS = messages.Status((messages.StatusEntry(1, 0, 0),))
HELLO = messages.Hello("vmm", Capability.PIO)
HELLO_HELD = messages.Hello("vmm", Capability.PIO, held=2)
REFUSED_BY_HOST: dict[str, tuple[list[messages.Message], str]] = {
    "clock first": ([messages.Clock(1, 1)], "expected HELLO first"),
    "our own kind": ([messages.Welcome("x", 0, 0, 0)], "expected HELLO first"),
    "hello twice": ([HELLO, HELLO], "after the VMM attached"),
    "newer version": ([messages.Hello("vmm", Capability.PIO, 0, 2, 3)], "speaks versions 2 to 3"),
    "too much held": ([messages.Hello("vmm", Capability.PIO, 1 << 20)], "expected 65536 at most"),
    "hold after all": ([HELLO, HOLD], "after the VMM attached"),
    "held twice": ([HELLO_HELD, HOLD, HOLD], "twice"),
    "more than announced": (
        [
            messages.Hello("vmm", Capability.PIO, held=1),
            messages.Table((InterruptItem(1, "i"), InterruptItem(2, "j")), (False, False), hold=True),
        ],
        "more items than the 1",
    ),
    "status while holding": ([HELLO_HELD, STATUS], "before the VMM attached"),
    "clock while holding": ([HELLO_HELD, messages.Clock(1, 1)], "before the VMM attached"),
    "status for nothing": ([HELLO, STATUS], "nothing was asked"),
    "table from the VMM": ([HELLO, messages.Table((InterruptItem(1, "i"),), (False,))], "after the VMM attached"),
    "end from the VMM": ([HELLO, messages.End()], "after the VMM attached"),
}


@pytest.mark.parametrize("case", REFUSED_BY_HOST)
def test_what_hcd_refuses(case: str) -> None:
    """The error says what was wrong, lasts, and no descriptor is lost."""
    conversation, expected = REFUSED_BY_HOST[case]
    host = HostConnection()
    fds = iter(range(1000))
    given: list[int] = []
    for message in conversation:
        count = message.held.count(False) if isinstance(message, messages.Table) else 0
        own = [next(fds) for _ in range(count)]
        given += own
        host.receive_data(encode(message), own)
    with pytest.raises(ProtocolError, match=expected):
        drain(host)
    host.receive_data(encode(HELLO), [777])
    with pytest.raises(ProtocolError, match=expected):
        host.next_event()
    assert sorted(host.take_unclaimed_fds()) == [*given, 777]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([(2, 0)], "in their order"),
        ([(1, 0), (2, 0)], "in their order"),
    ],
)
def test_answers_must_fit(entries: list[tuple[int, int]], expected: str) -> None:
    host = attached()
    host.add(doorbells(1), [5])
    assert host.data_to_send()
    host.receive_data(encode(messages.Status(tuple(messages.StatusEntry(n, error, 0) for n, error in entries))))
    with pytest.raises(ProtocolError, match=expected):
        host.next_event()


ONE = messages.Table((InterruptItem(1, "i"),), (False,))
HELD_ONE = messages.Table((InterruptItem(1, "i"),), (True,))
WELCOME = messages.Welcome("echo", 0, 1, 0)
REFUSED_BY_VMM: dict[str, tuple[list[messages.Message], str]] = {
    "table first": ([ONE], "before WELCOME"),
    "welcome twice": ([WELCOME, WELCOME], "after WELCOME"),
    "other version": ([messages.Welcome("echo", 0, 0, 0, 2)], "version 2"),
    "added twice": ([WELCOME, ONE, ONE], "there already"),
    "twice in one": ([WELCOME, messages.Table((InterruptItem(1, "i"),) * 2, (False, False))], "twice"),
    "held that is not": ([WELCOME, HELD_ONE], "is said to be held"),
    "unknown removed": ([WELCOME, messages.Remove((RING,))], "there is no doorbell 1"),
    "removed twice": ([WELCOME, ONE, messages.Remove((Reference(Kind.INTERRUPT, 1),) * 2)], "twice"),
    "our own kind": ([WELCOME, STATUS], "Status after WELCOME"),
}


@pytest.mark.parametrize("case", REFUSED_BY_VMM)
def test_what_a_vmm_refuses(case: str) -> None:
    conversation, expected = REFUSED_BY_VMM[case]
    vmm = VmmConnection("vmm", Capability.PIO)
    fds = iter(range(1000))
    given: list[int] = []
    delivered: list[int] = []
    for message in conversation:
        own = [next(fds) for _ in range(message.held.count(False))] if isinstance(message, messages.Table) else []
        given += own
        vmm.receive_data(encode(message), own)
    with pytest.raises(ProtocolError, match=expected):
        drain(vmm, delivered)
    assert sorted([*delivered, *vmm.take_unclaimed_fds()]) == given


def test_held_items_are_confirmed_or_removed() -> None:
    """hcd cannot forget one: the VMM would not know whether it is still good."""
    vmm = VmmConnection("vmm", Capability.PIO, [Held(InterruptItem(1, "i"), 5)])
    for message in (WELCOME, messages.End()):
        vmm.receive_data(encode(message))
    assert isinstance(vmm.next_event(), Welcomed)
    with pytest.raises(ProtocolError, match="neither confirmed nor removed"):
        vmm.next_event()


def test_a_changed_item_is_not_confirmed() -> None:
    """Same id, another name: the VMM's eventfd is registered for something else."""
    vmm = VmmConnection("vmm", Capability.PIO, [Held(InterruptItem(1, "other"), 5)])
    for message in (WELCOME, HELD_ONE):
        vmm.receive_data(encode(message))
    assert isinstance(vmm.next_event(), Welcomed)
    with pytest.raises(ProtocolError, match="is said to be held"):
        vmm.next_event()


@pytest.mark.parametrize("results", [[], [0, 0]])
def test_an_answer_of_other_size_is_our_own_mistake(results: list[int | tuple[int, int]]) -> None:
    vmm = VmmConnection("vmm", Capability.PIO)
    with pytest.raises(ValueError, match="asked for nothing"):
        vmm.answer([0])
    for message in (WELCOME, ONE):
        vmm.receive_data(encode(message), [1] * isinstance(message, messages.Table))
    assert isinstance(vmm.next_event(), Welcomed)
    assert isinstance(vmm.next_event(), Added)
    with pytest.raises(ValueError, match="asked for 1"):
        vmm.answer(results)


def test_errors_travel_both_ways() -> None:
    """The last words of either end, cut to what fits, without control characters."""
    ends = Ends()
    ends.to_host()
    ends.vmm.send_error("cannot\n" + "ä" * 200, 5)
    ends.host.send_error("busy", 16)
    ends.pump()
    (error,), (refused,) = ends.of(PeerError), ends.of(Refused)
    assert error.text == "cannot?" + "ä" * 56
    assert (error.code, refused) == (5, Refused(16, "busy"))


@pytest.mark.parametrize("surplus", [0, 2])
def test_descriptors_must_be_as_many_as_items(surplus: int) -> None:
    host = HostConnection()
    host.receive_data(encode(HELLO_HELD))
    host.receive_data(encode(HOLD), list(range(surplus)))
    with pytest.raises(ProtocolError, match=f"expected 1 file descriptors, got {surplus}"):
        host.next_event()
    assert host.take_unclaimed_fds() == list(range(surplus))


# -- garbage


def packets() -> st.SearchStrategy[bytes]:
    """Messages, messages with a few bytes changed, and noise."""
    samples = [data for _, data in EXAMPLES.values()]

    def change(drawn: tuple[bytes, list[tuple[int, int]]]) -> bytes:
        data = bytearray(drawn[0])
        for at, value in drawn[1]:
            data[at % len(data)] = value
        return bytes(data)

    edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3)
    changed = st.tuples(st.sampled_from(samples), edits).map(change)
    return st.one_of(st.sampled_from(samples), changed, st.binary(max_size=100))


@given(st.lists(st.tuples(packets(), st.integers(0, 3)), max_size=8), st.booleans())
@settings(max_examples=300)
def test_garbage_raises_protocol_errors_and_loses_no_descriptor(
    conversation: list[tuple[bytes, int]], to_host: bool
) -> None:
    end: HostConnection | VmmConnection = HostConnection() if to_host else VmmConnection("vmm", Capability.PIO)
    fds = iter(range(10_000))
    given_fds: list[int] = []
    seen: list[int] = []
    for data, count in conversation:
        own = [next(fds) for _ in range(count)]
        given_fds += own
        end.receive_data(data, own)
        with suppress(ProtocolError):
            drain(end, seen)
    assert sorted([*seen, *end.take_unclaimed_fds()]) == given_fds


@given(packets())
@settings(max_examples=500)
def test_what_can_be_read_is_written_the_same(data: bytes) -> None:
    """There is one way to write a message down."""
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert encode(message) == data


DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "doorbells.md"
#: layouts of docs/doorbells.md, and where their first field stands
DOCUMENTED = {
    "header": (layouts.HEADER, 0),
    "HELLO": (layouts.HELLO, 8),
    "WELCOME": (layouts.WELCOME, 8),
    "CLOCK": (layouts.CLOCK, 8),
    "ERROR": (layouts.ERROR, 8),
    "doorbell": (layouts.DOORBELL, 0),
    "interrupt": (layouts.INTERRUPT, 0),
    "memory": (layouts.MEMORY, 0),
    "status": (layouts.STATUS, 0),
    "reference": (layouts.REFERENCE, 0),
}


@pytest.mark.parametrize("title", DOCUMENTED)
def test_the_document_has_the_layouts(title: str) -> None:
    """Offset, size and name of every field, as construct has them."""
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"\n### {title}\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.MULTILINE)
    layout, offset = DOCUMENTED[title]
    expected = []
    for field in layout._codec.subcons:
        expected.append((str(offset), str(field.sizeof()), field.name))
        offset += field.sizeof()
    assert rows == expected


def test_the_document_has_the_types() -> None:
    rows = re.findall(r"^\| (0x[0-9a-f]+) \| (\w+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: int(value, 16) for value, name in rows} == {kind.name: int(kind) for kind in messages.Type}


def test_layouts_agree_with_their_sizes() -> None:
    """The sizes that messages are checked against are those that construct writes."""
    for layout, fields in (
        (layouts.DOORBELL, {"id": 1, "place": 1, "width": 1, "flags": 0, "address": 0, "datamatch": 0, "stamp": 0,
                            "name": bytes(32)}),
        (layouts.INTERRUPT, {"id": 1, "flags": 0, "name": bytes(32)}),
        (layouts.MEMORY, {"id": 1, "flags": 0, "size": 0, "wanted": 0}),
        (layouts.STATUS, {"id": 1, "error": 0, "value": 0}),
        (layouts.REFERENCE, {"id": 1, "kind": 1}),
    ):
        assert len(layout.build(**fields)) == layout.min_size

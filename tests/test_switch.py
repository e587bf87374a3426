"""The compiled Ethernet switch: virtqueues in one process, turns given by hand."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hcd_protocols.virtio.features import NetFeature, RingFeature
from hcd_protocols.virtio.net import HEADER, HEADER_LEGACY_BIG

from hcd.dataplane.switch import MAX_FRAME, FramePort, QueuePort, Switch
from hcd.dataplane.virtqueue import Request
from hcd.errors import GuestError
from hcd.frontend.local import LocalQueue, Scheduler, map_memory
from hcd.frontend.memory import SharedMemory
from hcd.frontend.net import NetDriver

V1 = int(RingFeature.VERSION_1)
MRG = int(NetFeature.MRG_RXBUF)
EVENT = int(RingFeature.EVENT_IDX)
PACKED = V1 | int(RingFeature.RING_PACKED)
IN_ORDER = int(RingFeature.IN_ORDER)
RINGS = {
    "legacy": 0,
    "legacy-mergeable": MRG,
    "split": V1,
    "split-event": V1 | EVENT,
    "mergeable": V1 | MRG,
    "packed": PACKED,
    "packed-event": PACKED | EVENT | MRG,
    "packed-in-order": PACKED | IN_ORDER | MRG,
    "split-in-order": V1 | IN_ORDER,
}
OPS = ("tx", "rx")
BROADCAST = b"\xff" * 6


def mac(n: int) -> bytes:
    return b"\x02\0\0\0" + n.to_bytes(2, "big")


def frame(to: bytes, sender: bytes, payload: bytes = b"payload" * 10) -> bytes:
    return to + sender + b"\x88\xb5" + payload


class Guest:
    """A driver with one queue pair (or more receive queues) on a port of the switch."""

    def __init__(
        self,
        switch: Switch | None,
        name: str,
        features: int = V1,
        *,
        size: int = 256,
        buffers: int = 32,
        buffer_size: int = 2048,
        big_endian: bool = False,
        receive_queues: int = 1,
        limit: int = MAX_FRAME,
    ) -> None:
        self.memory = SharedMemory.of_size(16 << 20)
        self.table = map_memory(self.memory)
        self.scheduler = Scheduler()
        self.port = QueuePort(name, limit=limit, rx_op=1, tx_op=0)
        if switch is not None:
            switch.add(self.port)

        def make(index: int) -> LocalQueue:
            return LocalQueue(
                self.memory,
                self.table,
                index,
                features=features,
                size=size,
                operations=OPS,
                scheduler=self.scheduler,
                big_endian=big_endian,
            )

        self.tx = make(1)
        self.receivers = [make(2 * i) for i in range(receive_queues)]
        self.drivers = [
            NetDriver(
                self.memory,
                rx.driver,
                self.tx.driver,
                features=features,
                buffers=buffers,
                buffer_size=buffer_size,
                big_endian=big_endian,
            )
            for rx in self.receivers
        ]
        self.rx = self.receivers[0]
        for rx in self.receivers:
            self.port.start(rx.device.index, rx.device)

    def send(self, *frames: bytes) -> None:
        """Put frames into the transmit ring and let the switch have all of them, turn by turn."""
        self.drivers[0].start(frames)
        while self.tx.turn(self.port.drain):
            pass
        self.drivers[0].send()

    def received(self) -> list[bytes]:
        self.scheduler.flush()
        return [data for driver in self.drivers for data in driver.pending()]

    def close(self) -> None:
        for queue in (self.tx, *self.receivers):
            queue.close()
        self.memory.close()


MakeGuest = Callable[..., Guest]


@pytest.fixture
def switch() -> Switch:
    return Switch("test")


@pytest.fixture
def guest(switch: Switch) -> Iterator[MakeGuest]:
    made: list[Guest] = []

    def make(name: str, features: int = V1, **options: Any) -> Guest:
        made.append(Guest(switch, name, features, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("sender", RINGS)
@pytest.mark.parametrize("receiver", RINGS)
def test_a_frame_arrives_whatever_the_two_rings_are(guest: MakeGuest, sender: str, receiver: str) -> None:
    a, b = guest("a", RINGS[sender]), guest("b", RINGS[receiver])
    frames = [frame(mac(2), mac(1), os.urandom(46 + i)) for i in range(20)]
    a.send(*frames)
    assert b.received() == frames
    answer = frame(mac(1), mac(2), os.urandom(1486))
    b.send(answer)
    assert a.received() == [answer]
    assert b.received() == []
    assert not a.tx.errors
    assert not b.rx.errors


@pytest.mark.parametrize("features", [0, MRG])
def test_legacy_big_endian_guest_sees_headers_in_its_own_order(guest: MakeGuest, features: int) -> None:
    a, b = guest("a", V1 | MRG), guest("b", features, big_endian=True, buffer_size=256)
    small = frame(mac(2), mac(1), b"x" * 60)
    a.send(small)
    assert b.received() == [small]
    large = frame(mac(2), mac(1), os.urandom(1000))  # several buffers: the count is read big-endian
    a.send(large)
    assert b.received() == ([large] if features else [])
    b.send(small)
    assert a.received() == [small]


def test_received_header_is_all_zero_but_the_number_of_buffers(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", V1, buffers=0)
    gpa = b.memory.alloc(2048)
    b.memory.write(gpa, b"\xff" * 2048)
    b.rx.driver.submit([], [(gpa, 2048)])
    a.send(frame(mac(2), mac(1)))
    b.scheduler.flush()
    (done,) = b.rx.driver.used()
    assert done.written == HEADER.size + len(frame(mac(2), mac(1)))
    assert HEADER.unpack(b.memory.read(gpa, HEADER.size)) == (0, 0, 0, 0, 0, 0, 1)
    assert b.memory.read(gpa + done.written, 4) == b"\xff" * 4


@pytest.mark.parametrize("features", [V1 | MRG, V1 | MRG | EVENT, PACKED | MRG, PACKED | MRG | IN_ORDER, MRG])
@pytest.mark.parametrize("size", [1500, 9000, MAX_FRAME])
def test_large_frames_span_the_buffers_of_a_mergeable_ring(guest: MakeGuest, features: int, size: int) -> None:
    a, b = guest("a"), guest("b", features, buffers=256, buffer_size=512)
    frames = [frame(mac(2), mac(1), os.urandom(size - 14)) for _ in range(2)]
    for each in frames:
        a.send(each)
        assert b.received() == [each]
    assert b.rx.stats.requests(1, 0) == 2 * -(-(size + 12) // 512)


def test_buffers_of_one_frame_become_visible_together(guest: MakeGuest) -> None:
    """More buffers than are shown to a driver at once otherwise: it must never see a part of a frame."""
    a, b = guest("a"), guest("b", V1 | MRG, buffers=128, buffer_size=64)
    b.rx.driver.ring.enable_interrupts()
    a.drivers[0].start([frame(mac(2), mac(1), os.urandom(4000))])
    a.tx.turn(a.port.drain)
    assert len(b.rx.driver.used()) in (0, -(-(4014 + 12) // 64))
    assert b.rx.stats.interrupts_sent + b.rx.stats.interrupts_suppressed <= 1


def test_one_publication_and_one_interrupt_decision_a_batch(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b")
    a.drivers[0].start([frame(mac(2), mac(1)) for _ in range(20)])
    a.tx.turn(a.port.drain)
    assert b.rx.driver.used() == []
    assert len(b.received()) == 20
    assert b.rx.stats.interrupts_sent == 1
    assert a.tx.stats.interrupts_sent == 1


def test_frames_too_large_for_the_buffers_are_dropped_and_the_buffers_stay(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", V1, buffers=1, buffer_size=256)
    a.send(frame(mac(2), mac(1), b"x" * 1000))
    assert b.received() == []
    assert (b.rx.stats.drops, b.port.drops) == (1, 1)
    fits = frame(mac(2), mac(1), b"y" * (256 - 12 - 14))
    a.send(fits)
    assert b.received() == [fits]
    assert b.rx.stats.drops == 1


@pytest.mark.parametrize("features", [V1 | MRG, PACKED | MRG, PACKED | MRG | IN_ORDER])
def test_frame_that_needs_more_buffers_than_there_are_puts_them_back(guest: MakeGuest, features: int) -> None:
    a, b = guest("a"), guest("b", features, buffers=3, buffer_size=256)
    for _ in range(3):
        a.send(frame(mac(2), mac(1), b"x" * 1000))
    assert b.rx.stats.drops == 3
    assert b.rx.device.inflight == 0
    fits = frame(mac(2), mac(1), os.urandom(3 * 256 - 12 - 14))
    a.send(fits)
    assert b.received() == [fits]


def test_without_buffers_frames_are_dropped_and_the_sender_goes_on(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", buffers=4)
    a.send(*[frame(mac(2), mac(1), bytes([i]) * 50) for i in range(10)])
    assert [data[14] for data in b.received()] == [0, 1, 2, 3]
    assert b.rx.stats.drops == 6
    assert a.tx.stats.requests(0, 0) == 10
    assert a.tx.stats.drops == 0


def test_port_limit_drops_what_the_guest_is_not_to_see(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", limit=100)
    a.send(frame(mac(2), mac(1), b"x" * 86), frame(mac(2), mac(1), b"x" * 87))
    assert [len(data) for data in b.received()] == [100]
    assert b.rx.stats.drops == 1


def test_link_that_is_down_counts_drops_for_addresses_known_there(guest: MakeGuest, switch: Switch) -> None:
    a, b, c = guest("a"), guest("b"), guest("c")
    b.send(frame(BROADCAST, mac(2)))
    b.port.stop(b.rx.device)
    assert not b.port.up
    a.received(), c.received()
    a.send(frame(mac(2), mac(1)), frame(BROADCAST, mac(1)))
    assert (b.rx.stats.drops, b.port.drops) == (1, 1)
    assert len(c.received()) == 1
    b.port.start(0, b.rx.device)
    a.send(frame(mac(2), mac(1)))
    assert len(b.received()) == 1


def test_known_addresses_get_their_frames_alone(guest: MakeGuest, switch: Switch) -> None:
    a, b, c = guest("a"), guest("b"), guest("c")
    a.send(frame(mac(2), mac(1)))  # unknown: to all
    assert (len(b.received()), len(c.received())) == (1, 1)
    b.send(frame(mac(1), mac(2)))
    assert (len(a.received()), len(c.received())) == (1, 0)
    a.send(frame(mac(2), mac(1)))
    assert (len(b.received()), len(c.received())) == (1, 0)
    assert (switch.forwarded, switch.flooded, switch.filtered) == (2, 1, 0)
    assert switch.addresses() == {mac(1): a.port, mac(2): b.port}


def test_broadcast_and_multicast_reach_all_but_their_sender(guest: MakeGuest) -> None:
    a, b, c = guest("a"), guest("b"), guest("c")
    for to in (BROADCAST, b"\x01\0\x5e\0\0\x01", b"\x33\x33\0\0\0\x01"):
        a.send(frame(to, mac(1)))
        assert [len(each.received()) for each in (a, b, c)] == [0, 1, 1]


def test_nothing_goes_back_where_it_came_from(guest: MakeGuest, switch: Switch) -> None:
    a, b = guest("a"), guest("b")
    a.send(frame(BROADCAST, mac(1)), frame(BROADCAST, mac(9)))
    b.received()
    a.send(frame(mac(9), mac(1)))
    assert (a.received(), b.received()) == ([], [])
    assert switch.filtered == 1


def test_address_that_moves_is_found_at_its_new_port(guest: MakeGuest) -> None:
    a, b, c = guest("a"), guest("b"), guest("c")
    b.send(frame(BROADCAST, mac(7)))
    c.send(frame(BROADCAST, mac(7)))
    a.received(), b.received(), c.received()
    a.send(frame(mac(7), mac(1)))
    assert (len(b.received()), len(c.received())) == (0, 1)


def test_group_and_zero_source_addresses_are_not_learned(guest: MakeGuest, switch: Switch) -> None:
    a, _ = guest("a"), guest("b")
    a.send(frame(mac(2), BROADCAST), frame(mac(2), bytes(6)))
    assert switch.addresses() == {}


def test_addresses_are_forgotten_after_their_time() -> None:
    switch = Switch(ageing=0)
    got: list[bytes] = []
    a, b = FramePort("a", got.append), FramePort("b", got.append)
    switch.add(a)
    switch.add(b)
    a.send(frame(mac(2), mac(1)))
    limit = 0
    while switch.addresses():  # within the second in which it was learned it is still known
        limit += 1
        assert limit < 10**7
    b.send(frame(mac(1), mac(2)))
    assert (switch.flooded, switch.forwarded) == (2, 0)


def test_table_is_bounded_and_invented_addresses_displace_their_own() -> None:
    switch = Switch(size=64)
    victim, flooder = FramePort("victim", bytes), FramePort("flooder", bytes)
    switch.add(victim)
    switch.add(flooder)
    for n in range(4):
        victim.send(frame(BROADCAST, mac(n)))
    for n in range(5000):
        flooder.send(frame(BROADCAST, mac(1000 + n)))
    known = switch.addresses()
    assert len(known) <= 64
    assert all(known.get(mac(n)) is victim for n in range(4))


def test_removed_port_is_forgotten_and_its_slot_used_again(guest: MakeGuest, switch: Switch) -> None:
    a, b = guest("a"), guest("b")
    b.send(frame(BROADCAST, mac(2)))
    switch.remove(b.port)
    switch.remove(b.port)
    assert switch.addresses() == {}
    c = guest("c")
    assert switch.ports == (a.port, c.port)
    a.received()
    a.send(frame(mac(2), mac(1)))
    assert (len(c.received()), len(b.received())) == (1, 0)
    b.send(frame(mac(1), mac(2)))  # into nowhere
    assert a.received() == []
    assert b.tx.stats.drops == 1


def test_port_cannot_be_in_two_switches(switch: Switch) -> None:
    port = FramePort("p", bytes)
    switch.add(port)
    with pytest.raises(ValueError, match="in switch test already"):
        Switch("other").add(port)


@pytest.mark.parametrize("features", [V1, PACKED, 0])
def test_bad_frames_are_refused_one_by_one_and_the_ring_goes_on(guest: MakeGuest, features: int) -> None:
    a, b = guest("a", features), guest("b")
    header = 12 if features & V1 else 10
    good = frame(mac(2), mac(1))
    bad = [
        b"\0",
        bytes(header),
        bytes(header) + good[:13],
        b"\x01" + bytes(header - 1) + good,  # asks for a checksum
        b"\0\x01" + bytes(header - 2) + good,  # asks for segmentation
        bytes(header) + bytes(MAX_FRAME + 1),
    ]
    for packet in [*bad, bytes(header) + good]:
        gpa = a.memory.alloc(len(packet))
        a.memory.write(gpa, packet)
        a.tx.driver.submit([(gpa, len(packet))], [])
        a.tx.turn(a.port.drain)
    assert b.received() == [good]
    assert len(a.tx.driver.used()) == len(bad) + 1
    assert a.tx.stats.guest_errors == a.tx.stats.drops == len(bad)
    assert (a.tx.stats.requests(0, 0), a.tx.stats.requests(0, 1)) == (1, len(bad))
    assert a.tx.device.broken == ""
    assert [type(error) for error in a.tx.errors] == [GuestError] * len(bad)
    assert "1 bytes to send are no frame" in str(a.tx.errors[0])


@pytest.mark.parametrize("features", [V1, PACKED])
def test_chains_cut_anywhere_carry_the_same_frame(guest: MakeGuest, features: int) -> None:
    """Header and addresses split over descriptors on both sides, direct and indirect."""
    features |= int(RingFeature.INDIRECT_DESC)
    a, b = guest("a", features), guest("b", features, buffers=0)
    packet = bytes(12) + frame(mac(2), mac(1), os.urandom(200))
    gpa = a.memory.alloc(len(packet))
    a.memory.write(gpa, packet)
    for cuts in ((1,), (12,), (5, 9, 13), (12, 18, 24, 26), (225,), tuple(range(1, 40))):
        for indirect in (False, True):
            b.rx.driver.submit([], pieces(b.memory.alloc(2048), (*cuts, 2048)), indirect)
            a.tx.driver.submit(pieces(gpa, (*cuts, len(packet))), [], indirect)
            assert a.tx.turn(a.port.drain) == 1
            b.scheduler.flush()
            (done,) = b.rx.driver.used()
            assert done.written == len(packet)
            a.tx.driver.used()
    assert b.rx.stats.bytes_to_guest == 12 * len(packet)
    assert b.rx.stats.drops == 0


def pieces(gpa: int, ends: tuple[int, ...]) -> list[tuple[int, int]]:
    starts = (0, *ends)
    return [(gpa + start, end - start) for start, end in zip(starts, ends, strict=False) if end > start]


def test_frame_written_into_cut_buffers_reads_back_whole(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", buffers=0)
    sent = frame(mac(2), mac(1), os.urandom(500))
    gpa = b.memory.alloc(1024)
    b.rx.driver.submit([], pieces(gpa, (3, 11, 12, 13, 30, 31, 200, 1024)))
    a.send(sent)
    b.scheduler.flush()
    (done,) = b.rx.driver.used()
    assert b.memory.read(gpa, done.written) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + sent


def test_buffer_without_room_for_a_frame_does_not_stop_the_ring(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", buffers=0)
    small, large = b.memory.alloc(64), b.memory.alloc(2048)
    tiny = b.rx.driver.submit([], [(small, 20)])
    useful = b.rx.driver.submit([], [(large, 2048)])
    a.send(frame(mac(2), mac(1)), frame(mac(2), mac(1)))
    b.scheduler.flush()
    assert [(done.token, done.written > 0) for done in b.rx.driver.used()] == [(tiny, False), (useful, True)]
    assert b.rx.stats.guest_errors == 1
    assert b.rx.stats.drops == 1


def test_receiver_whose_ring_breaks_harms_nobody_else(guest: MakeGuest) -> None:
    a, b, c = guest("a"), guest("b", buffers=0), guest("c")
    b.rx.driver.submit([], [(1 << 60, 2048)])
    a.send(frame(BROADCAST, mac(1)), frame(BROADCAST, mac(1)))
    assert len(c.received()) == 2
    assert "outside the guest memory" in b.rx.device.broken
    assert len(b.rx.errors) == 1
    assert b.rx.stats.drops == 2
    assert not a.tx.errors


def test_a_turn_ends_with_its_budget(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", buffers=200)
    a.drivers[0].start([frame(mac(2), mac(1)) for _ in range(150)])
    assert [a.tx.turn(a.port.drain) for _ in range(4)] == [64, 64, 22, 0]
    assert len(b.received()) == 150


def test_frames_of_one_flow_keep_their_queue_and_flows_are_spread(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", receive_queues=4, buffers=64)

    def packet(flow: int, n: int) -> bytes:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 48, n, 0, 64, 17, 0, b"\x0a\0\0\x01", b"\x0a\0\0\x02")
        return mac(2) + mac(1) + b"\x08\0" + ip + struct.pack(">HHHHI", 1000 + flow, 53, 12, 0, n)

    a.send(*[packet(flow, n) for n in range(5) for flow in range(16)])
    b.scheduler.flush()
    places: dict[int, int] = {}
    for index, driver in enumerate(b.drivers):
        got = driver.pending()
        for flow in {data[35] for data in got}:
            assert flow not in places, "one flow went to two queues"
            places[flow] = index
            assert [data[-1] for data in got if data[35] == flow] == [0, 1, 2, 3, 4]
    assert len(places) == 16
    assert len(set(places.values())) > 1


def test_receive_queues_that_do_not_run_are_passed_over(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", receive_queues=2)
    for rx in b.receivers:
        rx.device.set_enabled(False)
        a.send(*[frame(mac(2), mac(1), bytes([n]) * 46) for n in range(8)])
        assert len(b.received()) == 8
        rx.device.set_enabled(True)


def test_callback_ports_send_and_receive(guest: MakeGuest, switch: Switch) -> None:
    got: list[bytes] = []
    port = FramePort("callback", got.append)
    switch.add(port)
    a = guest("a")
    there, back = frame(mac(9), mac(1), os.urandom(700)), frame(mac(1), mac(9), os.urandom(60))
    a.send(there)
    assert got == [there]
    port.send(memoryview(back))
    assert a.received() == [back]
    for size in (0, 13, MAX_FRAME + 1):
        with pytest.raises(ValueError, match=f"a frame of {size} bytes"):
            port.send(bytes(size))


def test_callback_that_fails_is_not_the_senders_fault(
    guest: MakeGuest, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(data: bytes) -> None:
        raise RuntimeError("the callback's own trouble")

    port = FramePort("broken", fail)
    switch.add(port)
    a, b = guest("a"), guest("b")
    a.send(*[frame(BROADCAST, mac(1)) for _ in range(5)])
    assert len(b.received()) == 5
    assert port.drops == 5
    assert len(caplog.records) == 1


def test_injected_frame_comes_from_the_port(guest: MakeGuest, switch: Switch) -> None:
    a, b = guest("a"), guest("b")
    a.port.inject(frame(BROADCAST, mac(1)))
    assert (len(a.received()), len(b.received())) == (0, 1)
    assert switch.addresses() == {mac(1): a.port}


def test_forwarding_uses_request_objects_again(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b")

    def exchange() -> int:
        a.send(*[frame(mac(2), mac(1)) for _ in range(20)])
        assert len(b.received()) == 20
        return sum(isinstance(each, Request) for each in gc.get_objects())

    exchange()
    after_two = exchange()
    for _ in range(5):
        assert exchange() <= after_two


def test_received_count_of_a_legacy_big_endian_ring_is_swapped(guest: MakeGuest) -> None:
    a, b = guest("a"), guest("b", MRG, buffers=0, big_endian=True)
    gpa = b.memory.alloc(4096)
    for i in range(4):
        b.rx.driver.submit([], [(gpa + 256 * i, 256)])
    a.send(frame(mac(2), mac(1), os.urandom(500)))
    b.scheduler.flush()
    assert len(b.rx.driver.used()) == 3
    assert b.memory.read(gpa, 12) == HEADER_LEGACY_BIG.pack(0, 0, 0, 0, 0, 0) + b"\0\x03"


# -- files


def drain_packets(fd: int) -> list[bytes]:
    packets = []
    while True:
        try:
            packets.append(os.read(fd, 1 << 17))
        except BlockingIOError:
            return packets


@pytest.fixture
def packet_pair() -> Iterator[tuple[int, int]]:
    """Two ends that keep the borders of packets, non-blocking: what a tap is."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one.fileno(), other.fileno()


@pytest.mark.parametrize("header", [0, 10, 12])
@pytest.mark.parametrize("features", [0, V1, V1 | MRG, PACKED | MRG | IN_ORDER])
def test_packet_files_exchange_frames_with_a_ring(packet_pair: tuple[int, int], header: int, features: int) -> None:
    mine, theirs = packet_pair
    a = Guest(None, "a", features, limit=1518)
    frames = [frame(mac(2), mac(1), os.urandom(46 + 100 * i)) for i in range(10)]
    a.drivers[0].start(frames)
    assert a.tx.turn(lambda queue: a.port.send(queue, mine, header)) == 10
    assert drain_packets(theirs) == [bytes(header) + each for each in frames]
    for each in frames:
        os.write(theirs, b"\xee" * header + each)  # what stands in the header is not for the guest
    assert a.port.receive(0, mine, header) == (10, False)
    assert a.received() == frames
    assert a.rx.stats.requests(1, 0) == 10
    a.close()


@pytest.mark.parametrize("features", [V1, V1 | MRG, PACKED | MRG])
def test_packets_wait_in_the_file_while_there_are_no_buffers(packet_pair: tuple[int, int], features: int) -> None:
    mine, theirs = packet_pair
    a = Guest(None, "a", features, buffers=2, limit=1518)
    for n in range(3):
        os.write(theirs, frame(mac(2), mac(1), bytes([n]) * 50))
    assert a.port.receive(0, mine) == (2, True)
    assert [data[14] for data in a.received()] == [0, 1]  # gives the buffers back
    assert a.port.receive(0, mine) == (1, False)
    assert [data[14] for data in a.received()] == [2]
    assert a.rx.stats.drops == 0
    a.close()


def test_packets_too_large_too_short_or_for_no_queue_are_dropped(packet_pair: tuple[int, int]) -> None:
    mine, theirs = packet_pair
    a = Guest(None, "a", V1, buffer_size=1024, limit=2000)
    good = frame(mac(2), mac(1), os.urandom(1024 - 12 - 14))
    for packet in (b"short", good + b"x", bytes(2001), good):
        os.write(theirs, packet)
    assert a.port.receive(0, mine) == (4, False)
    assert a.received() == [good]
    assert a.rx.stats.drops == 3
    assert a.port.receive(2, mine) == (0, True)
    a.close()


@pytest.mark.parametrize("features", [V1 | MRG, PACKED | MRG | IN_ORDER])
def test_large_packet_is_read_into_several_buffers_and_the_rest_put_back(
    packet_pair: tuple[int, int], features: int
) -> None:
    mine, theirs = packet_pair
    a = Guest(None, "a", features, buffers=64, buffer_size=256, limit=9018)
    sizes = (60, 244, 245, 1500, 9018, 60)
    frames = [frame(mac(2), mac(1), os.urandom(size - 14)) for size in sizes]
    for each in frames:
        os.write(theirs, each)
        assert a.port.receive(0, mine, most=1) == (1, False)
        assert a.received() == [each]
    assert a.rx.stats.requests(1, 0) == sum(-(-(size + 12) // 256) for size in sizes)
    assert a.rx.device.inflight == 0
    a.close()


def test_file_that_fails_raises_and_full_one_drops(packet_pair: tuple[int, int]) -> None:
    mine, _ = packet_pair
    a = Guest(None, "a", V1)
    count = 0
    while not a.tx.stats.drops:
        a.drivers[0].start([frame(mac(2), mac(1), bytes(1400))])
        count += a.tx.turn(lambda queue: a.port.send(queue, mine))
        a.drivers[0].send()
        assert count < 10000
    assert a.tx.stats.requests(0, 1) == 1
    closed = os.open("/dev/null", os.O_RDONLY)
    a.drivers[0].start([frame(mac(2), mac(1))])
    with pytest.raises(OSError, match="Bad file descriptor"):
        a.tx.turn(lambda queue: a.port.send(queue, closed))
    os.close(closed)
    assert a.tx.device.inflight == 0  # the frame is lost, its request is not
    a.close()


# -- streams


def test_frames_from_a_stream_are_cut_by_their_lengths() -> None:
    a = Guest(None, "a", V1)
    frames = [frame(mac(2), mac(1), os.urandom(n)) for n in (46, 1000, 60)]
    data = b"".join(len(each).to_bytes(4, "big") + each for each in frames)
    for cut in range(len(data)):
        used, starved = a.port.feed(data[:cut])
        rest = data[used:]
        assert not starved
        assert a.port.feed(rest) == (len(rest), False)
        assert a.received() == frames
    a.close()


def test_stream_keeps_frames_that_find_no_buffers() -> None:
    a = Guest(None, "a", V1, buffers=2)
    one = frame(mac(2), mac(1))
    data = 3 * (len(one).to_bytes(4, "big") + one)
    used, starved = a.port.feed(data)
    assert (used, starved) == (2 * (4 + len(one)), True)
    assert len(a.received()) == 2
    assert a.port.feed(memoryview(data)[used:]) == (4 + len(one), False)
    assert a.rx.stats.drops == 0
    a.close()


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME + 1, 0xFFFFFFFF])
def test_length_that_no_frame_has_ends_the_stream(size: int) -> None:
    a = Guest(None, "a", V1)
    with pytest.raises(ValueError, match=f"a frame of {size} bytes"):
        a.port.feed(size.to_bytes(4, "big"))
    a.close()


def test_stream_that_is_full_holds_the_ring_back_and_loses_nothing() -> None:
    a = Guest(None, "a", V1)
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    frames = [frame(mac(2), mac(1), os.urandom(1400 + n)) for n in range(60)]
    a.drivers[0].start(frames)
    sent, received = 0, b""
    while sent < len(frames) or a.port.blocked:
        if a.port.flush_stream(mine.fileno()):
            sent += a.tx.turn(lambda queue: a.port.send_stream(queue, mine.fileno()))
        else:
            assert a.tx.turn(lambda queue: a.port.send_stream(queue, mine.fileno())) == 0
        if a.port.blocked:
            received += theirs.recv(1000)
    mine.close()
    with theirs:
        while chunk := theirs.recv(1 << 16):
            received += chunk
    assert received == b"".join(len(each).to_bytes(4, "big") + each for each in frames)
    assert a.tx.stats.requests(0, 0) == 60
    a.close()


@pytest.mark.parametrize("features", [V1, V1 | EVENT, PACKED, PACKED | EVENT])
def test_kicks_of_a_passive_queue_come_although_buffers_wait(features: int) -> None:
    """With an event index the driver kicks when it passes a place: that must be behind the buffers that wait."""
    a = Guest(None, "a", features, buffers=3)
    gpa = a.memory.alloc(2048)
    a.rx.device.disable_kicks()
    a.rx.driver.kicks = 0
    assert a.rx.device.enable_kicks()
    a.rx.driver.submit([], [(gpa, 2048)])
    assert a.rx.driver.kicks == 1
    a.close()

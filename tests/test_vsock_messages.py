"""Connections of type SEQPACKET, packet by packet: messages stay whole, whatever they are cut into on the way."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.vsock import HEADER_SIZE, MessageFlag, Op, Shutdown, SocketType

from hcd.device import ConfigError
from hcd.devices.vsock import Vsock
from hcd.devices.vsock_messages import MOST, Lengths
from hcd.frontend.vsock import VsockDriver
from hcd.testing import ServedDevice, serve

pytestmark = pytest.mark.usefixtures("no_leaks")

GUEST, PORT, BUFFER = 1024, 5000, 8192
EOM = MessageFlag.EOM
PAYLOAD = 4096 - HEADER_SIZE  # of the driver's receive buffers


@pytest.fixture
def paths(short_dir: Path) -> dict[str, str]:
    return {"uds-path": str(short_dir / "x"), "seqpacket-path": str(short_dir / "y")}


@pytest.fixture
def buffer() -> int:
    return BUFFER


@pytest.fixture
def served(paths: dict[str, str], buffer: int) -> Iterator[ServedDevice]:
    with serve(Vsock, {**paths, "buffer": buffer}) as device:
        yield device
        assert device.metrics().total("hcd_handler_errors_total") == 0
        assert device.crashes == []


class Messenger(VsockDriver):
    """A driver that speaks SEQPACKET on one connection."""

    key = (GUEST, PORT)

    def send(self, op: int, guest_port: int = 0, host_port: int = 0, data: bytes = b"", **fields: Any) -> None:
        super().send(op, *self.key, data, **{"type": SocketType.SEQPACKET, **fields})

    def say(self, *parts: bytes) -> None:
        """One message, in so many packets."""
        for part in parts[:-1]:
            self.send(Op.RW, data=part)
        self.send(Op.RW, data=parts[-1], flags=EOM)

    def hear(self) -> list[bytes]:
        """One message, by packets."""
        parts = []
        while True:
            header, data = self.expect(Op.RW)
            assert header.type == SocketType.SEQPACKET
            parts.append(data)
            if header.flags & EOM:
                return parts


@pytest.fixture
def driver(served: ServedDevice) -> Iterator[Messenger]:
    with served.driver() as front:
        yield Messenger(front)


def message_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    return sock


@pytest.fixture
def host(driver: Messenger, paths: dict[str, str]) -> Iterator[socket.socket]:
    """The host's end of a connection that the guest asked for."""
    with message_socket() as listener:
        listener.bind(f"{paths['uds-path']}_{PORT}")
        listener.listen()
        driver.send(Op.REQUEST)
        driver.expect(Op.RESPONSE)
        sock, _ = listener.accept()
    with sock:
        sock.settimeout(30)
        yield sock


def errors(served: ServedDevice) -> float:
    return served.metrics().total("hcd_guest_errors_total")


def test_messages_of_the_guest_arrive_whole_and_one_by_one(driver: Messenger, host: socket.socket) -> None:
    """However they are cut into packets; one of no bytes is left out."""
    driver.say(b"one")
    driver.say(b"t", b"", b"wo")
    driver.say(b"")
    driver.say(b"x" * 3000, b"y" * 3000, b"")
    assert [host.recv(1 << 16) for _ in range(3)] == [b"one", b"two", b"x" * 3000 + b"y" * 3000]


def test_a_message_that_is_not_whole_does_not_arrive(driver: Messenger, host: socket.socket) -> None:
    driver.say(b"whole")
    driver.send(Op.RW, data=b"begun")
    driver.send(Op.RST)
    assert host.recv(100) == b"whole"
    assert host.recv(100) == b""


def test_a_guest_has_credit_for_what_the_host_has_not_taken(
    driver: Messenger, host: socket.socket, served: ServedDevice
) -> None:
    """A socket that is full, and hcd's buffer behind it: then the guest waits, and everything arrives in order."""
    device: Any = served.device
    (channel,) = device._table._channels.values()
    sent = forwarded = 0
    while not served.run(lambda: channel._unsent):
        if sent - forwarded + 4000 > BUFFER:
            forwarded = driver.expect(Op.CREDIT_UPDATE)[0].fwd_cnt
        else:
            driver.say(b"%08d" % sent + bytes(1992), bytes(2000))
            sent += 4000
    assert sent > 3 * BUFFER
    for at in range(0, sent, 4000):
        message = host.recv(1 << 16)
        assert (len(message), message[:8]) == (4000, b"%08d" % at)
    driver.expect(Op.CREDIT_UPDATE)
    assert errors(served) == 0


def test_a_guest_in_the_middle_of_a_message_learns_of_all_its_credit(driver: Messenger, host: socket.socket) -> None:
    """It was not told of the first message, which took little, and cannot say the rest of the second without that."""
    driver.say(b"a" * 3000)
    assert host.recv(1 << 16) == b"a" * 3000
    driver.send(Op.RW, data=b"b" * (BUFFER - 3000))
    assert driver.expect(Op.CREDIT_UPDATE)[0].fwd_cnt == 3000
    driver.say(b"c" * 3000)
    assert host.recv(1 << 16) == b"b" * (BUFFER - 3000) + b"c" * 3000


def test_the_shortest_messages_take_little_room(driver: Messenger, host: socket.socket, served: ServedDevice) -> None:
    """A guest can have as many of them wait as its credit has bytes."""
    device: Any = served.device
    (channel,) = device._table._channels.values()
    sent = 0
    while not served.run(lambda: channel._unsent):
        driver.say(b"%d" % (sent % 10))
        sent += 1
    for _ in range(500):
        driver.say(b"%d" % (sent % 10))
        sent += 1
    assert served.run(lambda: sum(map(sys.getsizeof, (channel._buffer, channel._whole._packed)))) < 4000
    assert [host.recv(10) for _ in range(sent)] == [b"%d" % (number % 10) for number in range(sent)]


def test_lengths_come_out_as_they_went_in() -> None:
    numbers = [1, 127, 128, 16383, 16384, 1 << 24, 5]
    lengths = Lengths()
    for number in numbers:
        lengths.append(number)
    assert len(lengths) == 1 + 1 + 2 + 2 + 3 + 4 + 1
    for number in numbers:
        assert lengths.first == number
        lengths.popleft()
    assert not lengths


@pytest.mark.parametrize("buffer", [1 << 20])
def test_a_message_is_as_long_as_the_buffer_if_the_kernel_allows_it(
    driver: Messenger, host: socket.socket, buffer: int
) -> None:
    """A socket takes no message that is longer than its own buffer, of which the kernel has a largest size."""
    longest = min(buffer, int(Path("/proc/sys/net/core/wmem_max").read_text()))
    message = b"".join(b"%08d" % number for number in range(longest // 8))
    parts = [message[at : at + 60000] for at in range(0, len(message), 60000)]
    driver.say(*parts)
    assert host.recv(buffer) == message


@pytest.mark.parametrize("buffer", [16 << 20])
def test_a_message_that_no_socket_takes_ends_the_connection(driver: Messenger, host: socket.socket) -> None:
    driver.say(*[bytes(64000)] * 250)
    driver.expect(Op.RST)
    assert host.recv(100) == b""


def test_more_than_its_credit_ends_the_connection(
    driver: Messenger, host: socket.socket, served: ServedDevice
) -> None:
    """A message that is never whole, for one."""
    for _ in range(2):
        driver.send(Op.RW, data=bytes(4096))
    driver.send(Op.RW, data=b"x")
    driver.expect(Op.RST)
    assert host.recv(100) == b""
    assert errors(served) == 1


def test_messages_of_the_host_are_cut_into_packets(driver: Messenger, host: socket.socket) -> None:
    """By the guest's buffers; the last packet of each says so."""
    host.send(b"one")
    host.send(bytes(range(256)) * 40)
    host.send(b"x" * PAYLOAD)
    assert driver.hear() == [b"one"]
    parts = driver.hear()
    assert [len(part) for part in parts] == [PAYLOAD, PAYLOAD, 10240 - 2 * PAYLOAD]
    assert b"".join(parts) == bytes(range(256)) * 40
    assert driver.hear() == [b"x" * PAYLOAD]


def test_a_guest_without_room_gets_the_rest_later(driver: Messenger, host: socket.socket) -> None:
    driver.alloc = 1000
    driver.send(Op.CREDIT_UPDATE)
    host.send(b"a" * 900)
    host.send(b"b" * 300)
    assert driver.hear() == [b"a" * 900]
    header, data = driver.expect(Op.RW)
    assert (data, header.flags) == (b"b" * 100, 0)
    driver.expect(Op.CREDIT_REQUEST)
    driver.send(Op.CREDIT_UPDATE)
    assert driver.hear() == [b"b" * 200]


@pytest.mark.parametrize(("alloc", "size"), [(1000, 1001), (1 << 20, MOST + 1)])
def test_a_message_that_can_never_arrive_ends_the_connection(
    driver: Messenger, host: socket.socket, alloc: int, size: int
) -> None:
    driver.alloc = alloc
    driver.send(Op.CREDIT_UPDATE)
    host.send(bytes(size))
    driver.expect(Op.RST)
    assert host.recv(100) == b""


def test_the_longest_message_arrives(driver: Messenger, host: socket.socket) -> None:
    host.send(b"m" * MOST)
    assert b"".join(driver.hear()) == b"m" * MOST


def test_what_was_sent_before_a_hang_up_arrives(driver: Messenger, host: socket.socket) -> None:
    host.send(b"last words" * 1000)
    host.close()
    header, message = driver.next()
    while header.flags != Shutdown.RECEIVE | Shutdown.SEND or header.op != Op.SHUTDOWN:
        assert header.op in (Op.RW, Op.SHUTDOWN)
        header, data = driver.next()
        message += data
    assert message == b"last words" * 1000
    driver.send(Op.RST)


def test_half_closed_by_the_guest(driver: Messenger, host: socket.socket) -> None:
    driver.say(b"that is all")
    driver.send(Op.SHUTDOWN, flags=Shutdown.SEND)
    assert host.recv(100) == b"that is all"
    assert host.recv(100) == b""
    host.send(b"answer")
    assert driver.hear() == [b"answer"]


def test_the_host_reaches_a_guest(driver: Messenger, paths: dict[str, str]) -> None:
    with message_socket() as host:
        host.connect(paths["seqpacket-path"])
        host.send(b"CONNECT 1234\n")
        header, _ = driver.expect(Op.REQUEST)
        assert (header.type, header.dst_port) == (SocketType.SEQPACKET, 1234)
        driver.key = (1234, header.src_port)
        driver.send(Op.RESPONSE)
        assert host.recv(100) == b"OK %d\n" % header.src_port
        host.send(b"hello")
        assert driver.hear() == [b"hello"]
        driver.say(b"good ", b"morning")
        assert host.recv(100) == b"good morning"
        driver.send(Op.RST)


@pytest.mark.parametrize("greeting", [b"CONNECT 1234\nhello", b"HELLO\n", b"CONNECT 1234" + b" " * 40])
def test_a_greeting_is_a_message_of_its_own(driver: Messenger, paths: dict[str, str], greeting: bytes) -> None:
    """What is in the same message would be lost."""
    with message_socket() as host:
        host.connect(paths["seqpacket-path"])
        host.send(greeting)
        assert host.recv(100) == b""
    assert driver.silent()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_the_listener_decides_of_what_type_it_is_reached(
    driver: Messenger, paths: dict[str, str], kind: socket.SocketKind
) -> None:
    other = SocketType.STREAM if kind is socket.SOCK_SEQPACKET else SocketType.SEQPACKET
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(f"{paths['uds-path']}_{PORT}")
        listener.listen()
        driver.send(Op.REQUEST, type=other)
        assert driver.expect(Op.RST)[0].type == other


def test_a_packet_of_the_other_type_ends_the_connection(
    driver: Messenger, host: socket.socket, served: ServedDevice
) -> None:
    driver.send(Op.RW, data=b"x", type=SocketType.STREAM)
    driver.expect(Op.RST)
    assert host.recv(100) == b""
    assert errors(served) == 1


def test_a_path_that_cannot_be_leaves_nothing(paths: dict[str, str], short_dir: Path) -> None:
    with pytest.raises(ConfigError, match="/nowhere/y"):
        serve(Vsock, {**paths, "seqpacket-path": "/nowhere/y"}).__enter__()
    assert not (short_dir / "x").exists()

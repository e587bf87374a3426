"""The console device behind a real session: flow both ways, control messages, ends of every kind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.console import CONTROL, ConsoleConfig, ControlEvent, port_of_queue, queues_of_port
from hcd_protocols.virtio.features import ConsoleFeature

from hcd.device import ConfigError
from hcd.devices.console import Console
from hcd.frontend.errors import BackendError
from hcd.options import defaults
from hcd.testing import Driver, Exchange, ServedDevice, check_device, serve

pytestmark = pytest.mark.usefixtures("no_leaks")

Scarce = Callable[[str, str], list[OSError]]

RX, TX, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
READY, ADD, REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = ControlEvent


class Guest:
    """A driver with buffers in its receive queues, and what came into them."""

    def __init__(self, driver: Driver, buffers: int = 8, size: int = 1024) -> None:
        self.driver = driver
        self._rooms: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._size = size
        for queue in driver.queues:
            if queue % 2 == 0:
                for _ in range(buffers):
                    self.add_room(queue)

    def add_room(self, queue: int, size: int = 0) -> None:
        room = self.driver.make_room(size or self._size)
        self._rooms[queue, self.driver.queues[queue].submit([], room)] = room

    def take(self, queue: int, timeout: float = 20) -> list[bytes]:
        """At least one message out of ``queue``; each buffer goes back empty."""
        found = []
        for used in self.driver.queues[queue].wait(timeout):
            room = self._rooms.pop((queue, used.token))
            found.append(self.driver.gather(room)[: used.written])
            self.driver.free(room)
            self.add_room(queue)
        return found

    def receive(self, queue: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += b"".join(self.take(queue))
        return data

    def controls(self, count: int) -> list[tuple[int, int, int, bytes]]:
        found: list[bytes] = []
        while len(found) < count:
            found += self.take(CONTROL_RX)
        assert len(found) == count
        return [(*CONTROL.unpack(message[:8]), message[8:]) for message in found]

    def tell(self, port: int, event: int, value: int) -> None:
        self.driver.ask(CONTROL.pack(port, event, value), queue=CONTROL_TX)

    def send(self, data: bytes, queue: int = TX) -> None:
        assert self.driver.ask(data, queue=queue) == b""

    def start_send(self, data: bytes, queue: int = TX) -> int:
        return self.driver.queues[queue].submit(self.driver.place(data), [])

    def silent(self, queue: int) -> bool:
        """Whether nothing comes back on ``queue`` for a moment."""
        try:
            self.driver.queues[queue].wait(0.1)
        except BackendError:
            return True
        return False


@pytest.fixture
def console(short_dir: Path) -> Iterator[Callable[..., ServedDevice]]:
    """``console("listen:{dir}/a", ...)`` serves a device with these ports."""
    with contextlib.ExitStack() as stack:

        def start(*ports: str, **options: Any) -> ServedDevice:
            texts = [port.replace("{dir}", str(short_dir)) for port in ports]
            return stack.enter_context(serve("console", {"port": texts, **options}))

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[[Path], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def start(path: Path) -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(30)
            client.connect(str(path))
            return client

        yield start


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := client.recv(size - len(data))):
        data += part
    return data


def fill(client: socket.socket, chunk: bytes = b"h" * 4096) -> int:
    """Send until the other side takes no more; how many bytes."""
    client.setblocking(False)
    total = 0
    try:
        while total < 64 << 20:
            total += client.send(chunk)
    except BlockingIOError:
        pass
    client.settimeout(30)
    return total


def until(done: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def send_until_held(served: ServedDevice, guest: Guest, parts: list[bytes]) -> None:
    """More output than the socket takes while its client does not read: one request is held."""
    until(lambda: served.device.ports[0].end.connected)
    for part in parts:
        guest.start_send(part)
    until(lambda: served.metrics().total("hcd_requests_inflight", queue="1") == 1)


def total(served: ServedDevice, op: str) -> float:
    return served.metrics().total("hcd_requests_total", op=op)


# -- options


@pytest.mark.parametrize(
    ("ports", "text"),
    [
        (("tty",), r'port "tty": expected \[NAME=\]pty'),
        (("listen",), 'port "listen": expected'),
        (("=pty",), 'port "=pty": expected'),
        (("a=pty", "a=pty"), 'two ports have the name "a"'),
        ((), "0 ports"),
        (("pty",) * 32, "32 ports; expected 1 to 31"),
        ((f"listen:/{'x' * 107}",), "107 bytes"),
    ],
)
def test_ports_that_cannot_be(ports: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Console("con", defaults(Console.options) | {"port": ports})


def test_queues_of_ports() -> None:
    """virtio 1.3, 5.3.2."""
    assert [queues_of_port(port) for port in (0, 1, 2)] == [(0, 1), (4, 5), (6, 7)]
    assert [port_of_queue(queue) for queue in range(8)] == [0, 0, -1, -1, 1, 1, 2, 2]
    for ports, queues in ((("pty",), 2), (("a=pty",), 4), (("pty", "a=pty"), 6), (("pty",) * 31, 64)):
        assert Console("con", defaults(Console.options) | {"port": ports}).num_queues == queues


@pytest.mark.long
def test_conformance(short_dir: Path) -> None:
    """With one port and with several."""
    check_device("console", {"port": f"file:{short_dir}/log"}, exchanges=[Exchange(b"hello", queue=TX)])
    opened = Exchange(CONTROL.pack(1, OPEN, 1), queue=CONTROL_TX)
    ports = [f"listen:{short_dir}/tty", f"agent=listen:{short_dir}/agent"]
    check_device("console", {"port": ports}, exchanges=[Exchange(b"hello", queue=TX), opened])


# -- one port


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_bytes_go_both_ways(console: Callable[..., ServedDevice], connect: Any, short_dir: Path, packed: bool) -> None:
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver(packed=packed) as driver:
        guest = Guest(driver)
        for size in (1, 4096, 100_000):
            data = os.urandom(size)
            guest.send(data)
            assert read_exactly(client, size) == data
            client.sendall(data[:6000])
            assert guest.receive(RX, min(size, 6000)) == data[:6000]
        assert total(served, "tx") == 3
        assert total(served, "rx") > 3
        assert not served.host.stats.handler_errors


def test_what_nobody_reads_is_dropped_and_counted(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """As on a serial line without a terminal: the guest is not held up."""
    served = console("listen:{dir}/tty")
    with served.driver() as driver:
        guest = Guest(driver)
        for _ in range(100):
            guest.send(b"x" * 10_000)
        assert total(served, "dropped") == 100
        client = connect(short_dir / "tty")
        until(lambda: served.device.ports[0].end.connected)
        guest.send(b"now")
        assert read_exactly(client, 3) == b"now"


def test_slow_reader_holds_the_guest(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """Nothing is lost and nothing piles up: what the socket does not take stays in the guest."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        parts = [os.urandom(60_000) for _ in range(40)]
        send_until_held(served, guest, parts)
        assert total(served, "tx") < 20
        assert read_exactly(client, 40 * 60_000) == b"".join(parts)
        until(lambda: total(served, "tx") == 40)
        assert total(served, "dropped") == 0


def test_slow_reader_drop(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """Where the operator prefers a guest that never waits."""
    served = console("listen:{dir}/tty", **{"slow-reader": "drop"})
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        until(lambda: served.device.ports[0].end.connected)
        for _ in range(100):
            guest.send(b"x" * 60_000)
        assert total(served, "dropped") > 50
        assert total(served, "tx") > 0
        assert client.recv(1) == b"x"


def test_request_larger_than_a_turn(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """One request of megabytes goes out in parts, and whole."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        until(lambda: served.device.ports[0].end.connected)
        data = os.urandom(3 << 20)
        token = guest.start_send(data)
        assert read_exactly(client, len(data)) == data
        assert driver.queues[TX].wait_for(token) == 0


def test_queue_that_stops_while_its_output_waits(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """The held request goes back at once; what was left of it comes before what is sent later."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        parts = [os.urandom(50_000) for _ in range(30)]
        send_until_held(served, guest, parts)
        base = driver.stop_queue(TX)
        assert driver.queues[TX].ring.rewind() == base
        driver.hand_over(driver.queues[TX], base)
        assert read_exactly(client, 30 * 50_000) == b"".join(parts)


def test_held_request_is_dropped_when_its_reader_goes(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """The guest goes on, and so does the next reader."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        send_until_held(served, guest, [b"x" * 60_000] * 30)
        client.close()
        until(lambda: total(served, "dropped") > 0)
        until(lambda: served.metrics().total("hcd_requests_inflight", queue="1") == 0)
        again = connect(short_dir / "tty")
        until(lambda: served.device.ports[0].end.connected)
        guest.send(b"next")
        assert read_exactly(again, 4) == b"next"


def test_host_input_waits_for_buffers(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """Without buffers of the guest the socket is not read; afterwards everything arrives in order."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver, buffers=0)
        sent = fill(client, bytes(range(256)) * 16)
        assert sent < 4 << 20
        assert guest.silent(RX)
        for _ in range(8):
            guest.add_room(RX)
        got = guest.receive(RX, sent)
        assert got == (bytes(range(256)) * (sent // 256 + 1))[:sent]


def test_room_of_nothing_comes_back(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """A driver may put readable bytes into a receive queue; it gets them back and nothing else happens."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        token = driver.queues[RX].submit(driver.place(b"nonsense"), [])
        guest = Guest(driver)
        client.sendall(b"hi")
        assert driver.queues[RX].wait_for(token) == 0
        assert guest.receive(RX, 2) == b"hi"


def test_input_of_one_who_left_is_delivered(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """``echo hello | nc -U tty`` at a guest that is slow; the next client is served afterwards."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver, buffers=0)
        client.sendall(b"hello")
        client.close()
        assert guest.silent(RX)
        guest.add_room(RX)
        assert guest.receive(RX, 5) == b"hello"
        second = connect(short_dir / "tty")
        second.sendall(b"second")
        assert guest.receive(RX, 6) == b"second"


def test_clients_take_turns(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    served = console("listen:{dir}/tty")
    first, second = connect(short_dir / "tty"), connect(short_dir / "tty")
    with served.driver() as driver:
        guest = Guest(driver)
        until(lambda: served.device.ports[0].end.connected)
        guest.send(b"to the first")
        assert read_exactly(first, 12) == b"to the first"
        first.close()
        second.sendall(b"x")
        assert guest.receive(RX, 1) == b"x"
        guest.send(b"to the second")
        assert read_exactly(second, 13) == b"to the second"


def test_emergency_write(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """A guest that has no queues yet writes characters into the configuration space."""
    served = console("listen:{dir}/tty")
    client = connect(short_dir / "tty")
    with served.driver(queues=0) as driver:
        until(lambda: served.device.ports[0].end.connected)
        assert driver.features & ConsoleFeature.EMERG_WRITE
        for character in b"panic":
            driver.write_config(8, bytes([character, 0, 0, 0]))
        assert read_exactly(client, 5) == b"panic"
        with pytest.raises(BackendError):
            driver.write_config(0, b"\1\0")


# -- several ports


def set_up(guest: Guest, *, connected: int = 0) -> None:
    """What Linux does with a console and a channel named "agent"."""
    guest.tell(0, READY, 1)
    assert guest.controls(2) == [(0, ADD, 1, b""), (1, ADD, 1, b"")]
    guest.tell(0, PORT_READY, 1)
    assert guest.controls(2) == [(0, CONSOLE_PORT, 1, b""), (0, OPEN, 1, b"")]
    guest.tell(0, OPEN, 1)
    guest.tell(1, PORT_READY, 1)
    assert guest.controls(2) == [(1, NAME, 1, b"agent"), (1, OPEN, connected, b"")]


PORTS = ("listen:{dir}/tty", "agent=listen:{dir}/agent")


def test_ports_are_announced_and_opened(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    """Names, console ports, and who is connected; bytes go to the port they belong to."""
    served = console(*PORTS)
    with served.driver() as driver:
        assert driver.features & ConsoleFeature.MULTIPORT
        assert ConsoleConfig.from_bytes(driver.config(0, 12)).max_nr_ports == 2
        guest = Guest(driver)
        set_up(guest)
        client = connect(short_dir / "agent")
        assert guest.controls(1) == [(1, OPEN, 1, b"")]
        client.sendall(b"early")
        assert guest.silent(RX1), "the guest has not opened the port"
        guest.tell(1, OPEN, 1)
        assert guest.receive(RX1, 5) == b"early"
        guest.send(b"reply", TX1)
        assert read_exactly(client, 5) == b"reply"
        tty = connect(short_dir / "tty")
        tty.sendall(b"login")
        assert guest.receive(RX, 5) == b"login"
        client.close()
        assert guest.controls(1) == [(1, OPEN, 0, b"")]


def test_closed_port_is_not_read_and_its_leavers_are_forgotten(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """While nobody listens in the guest, a client that gave up must not keep the next one out."""
    served = console(*PORTS)
    with served.driver() as driver:
        guest = Guest(driver)
        set_up(guest)
        for _ in range(3):
            client = connect(short_dir / "agent")
            client.sendall(b"is anybody there?")
            assert guest.controls(1) == [(1, OPEN, 1, b"")]
            client.close()
            assert guest.controls(1) == [(1, OPEN, 0, b"")]
        last = connect(short_dir / "agent")
        guest.tell(1, OPEN, 1)
        last.sendall(b"hello")
        assert guest.receive(RX1, 5) == b"hello"
        guest.tell(1, OPEN, 0)
        last.sendall(b"and more")
        assert guest.controls(1) == [(1, OPEN, 1, b"")]
        assert guest.silent(RX1)


def test_driver_that_knows_one_port_only(console: Callable[..., ServedDevice], connect: Any, short_dir: Path) -> None:
    served = console(*PORTS)
    client = connect(short_dir / "tty")
    with served.driver(queues=2, device=0) as driver:
        guest = Guest(driver)
        client.sendall(b"in")
        assert guest.receive(RX, 2) == b"in"
        guest.send(b"out")
        assert read_exactly(client, 3) == b"out"


def test_senseless_control_messages(console: Callable[..., ServedDevice]) -> None:
    """Each is failed and counted; the device goes on."""
    served = console(*PORTS)
    with served.driver() as driver:
        guest = Guest(driver)
        bad = [b"", b"\0" * 7, CONTROL.pack(2, PORT_READY, 1), CONTROL.pack(0xFFFFFFFF, OPEN, 1),
               CONTROL.pack(0, NAME, 1), CONTROL.pack(1, 999, 1)]
        for message in bad:
            driver.ask(message or b"", room=0 if message else 8, queue=CONTROL_TX)
        guest.tell(0, READY, 0)
        guest.tell(1, PORT_READY, 0)
        assert served.host.stats.guest_errors == len(bad)
        assert served.host.stats.handler_errors == 0
        set_up(guest)


def test_questions_without_end_cost_no_memory(console: Callable[..., ServedDevice]) -> None:
    """A guest asks and never gives buffers; what waits for it is one message for each port and event."""
    served = console(*PORTS)
    with served.driver() as driver:
        guest = Guest(driver, buffers=0)
        guest.tell(0, READY, 1)
        for _ in range(300):
            guest.tell(0, PORT_READY, 1)
            guest.tell(1, PORT_READY, 1)
        for _ in range(8):
            guest.add_room(CONTROL_RX)
        assert len(guest.controls(6)) == 6
        assert guest.silent(CONTROL_RX)


def test_control_buffer_that_is_too_small(console: Callable[..., ServedDevice]) -> None:
    served = console(*PORTS)
    with served.driver() as driver:
        guest = Guest(driver, buffers=0)
        guest.add_room(CONTROL_RX, 7)
        guest.tell(0, READY, 1)
        assert guest.take(CONTROL_RX) == [b""]
        assert guest.controls(1) == [(1, ADD, 1, b"")]
        assert served.metrics().total("hcd_requests_total", op="control", status="error") == 1


def test_front_end_comes_back_with_its_guest_running(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path
) -> None:
    """The driver does not say DEVICE_READY again: its ports work at once, and it learns who is connected now."""
    served = console(*PORTS)
    with served.driver() as driver:
        guest = Guest(driver)
        set_up(guest)
        guest.tell(1, OPEN, 1)
        driver._hang_up()
        served.wait_disconnected()
        client = connect(short_dir / "agent")
        driver.reconnect()
        assert sorted(guest.controls(2)) == [(0, OPEN, 1, b""), (1, OPEN, 1, b"")]
        client.sendall(b"again")
        assert guest.receive(RX1, 5) == b"again"
        guest.send(b"here", TX1)
        assert read_exactly(client, 4) == b"here"


# -- ends


def test_pty(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    """A link to the terminal; raw, both ways; what nobody reads is dropped; the window's size reaches the guest."""
    served = console("pty:{dir}/vm.tty")
    link = short_dir / "vm.tty"
    assert os.readlink(link).startswith("/dev/pts/")
    with served.driver() as driver:
        driver.open_back_channel()
        guest = Guest(driver)
        guest.send(b"nobody sees this")
        fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
        try:
            until(lambda: served.device.ports[0].end.connected)
            data = bytes(range(256)) * 4
            guest.send(data)
            got = b""
            while len(got) < len(data):
                assert select.select([fd], [], [], 5)[0]
                got += os.read(fd, 4096)
            assert got == data
            os.write(fd, data)
            assert guest.receive(RX, len(data)) == data
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
            driver.wait_back_message()
            config = ConsoleConfig.from_bytes(driver.config(0, 12))
            assert (config.cols, config.rows) == (132, 50)
        finally:
            os.close(fd)
        until(lambda: not served.device.ports[0].end.connected)
        guest.send(b"nor this")
        assert total(served, "dropped") == 2
    served.wait_disconnected()


def test_resize_message(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    """A driver with several ports is told by message: rows, then columns."""
    served = console("pty:{dir}/vm.tty", "agent=listen:{dir}/agent")
    with served.driver() as driver:
        guest = Guest(driver)
        set_up(guest)
        fd = os.open(short_dir / "vm.tty", os.O_RDWR | os.O_NOCTTY)
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.close(fd)
        (resize,) = [message for message in guest.controls(1) if message[1] == RESIZE]
        assert resize == (0, RESIZE, 1, struct.pack("<HH", 24, 80))


def test_file(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    """Appended to; all of it is there when the device has been closed."""
    (short_dir / "log").write_bytes(b"before\n")
    data = os.urandom(5 << 20)
    with serve("console", {"port": f"file:{short_dir}/log"}) as served, served.driver() as driver:
        guest = Guest(driver)
        for at in range(0, len(data), 100_000):
            guest.send(data[at : at + 100_000])
    assert (short_dir / "log").read_bytes() == b"before\n" + data


def test_file_that_takes_nothing() -> None:
    """A full disk costs output, not the guest."""
    with serve("console", {"port": "file:/dev/full"}) as served, served.driver() as driver:
        guest = Guest(driver)
        for _ in range(30):
            guest.send(b"x" * 100_000)


def test_connect(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    """Tried again until somebody listens, and when the connection is lost."""
    served = console("connect:{dir}/peer")
    with served.driver() as driver, socket.socket(socket.AF_UNIX) as listener:
        guest = Guest(driver)
        listener.bind(str(short_dir / "peer"))
        listener.listen()
        listener.settimeout(30)
        for _ in range(2):
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"ping")
                assert guest.receive(RX, 4) == b"ping"
                guest.send(b"pong")
                assert read_exactly(peer, 4) == b"pong"


def test_the_link_to_a_terminal_takes_the_place_of_such_a_link_alone(
    console: Callable[..., ServedDevice], short_dir: Path
) -> None:
    """A process that was killed leaves one behind. Other links are somebody's."""
    link = short_dir / "vm.tty"
    link.symlink_to("/dev/pts/4711")
    console(f"pty:{link}")
    assert os.readlink(link) != "/dev/pts/4711"
    other = short_dir / "precious"
    other.symlink_to("somewhere")
    with pytest.raises(ConfigError, match=f"pty:{other}: File exists"):
        console(f"pty:{other}")
    assert os.readlink(other) == "somewhere"


@pytest.mark.parametrize("kind", ["connect", "listen", "pty"])
def test_a_process_that_is_out_of_descriptors_goes_on_later(
    console: Callable[..., ServedDevice], connect: Any, short_dir: Path, scarce: Scarce,
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:
    """A connection needs two, and there may be one, or none."""
    for module in ("connector", "console_sockets", "console_pty"):
        monkeypatch.setattr(f"hcd.devices.{module}.PAUSE", 0.01)
    path = short_dir / "peer"
    failures = [scarce(f"hcd.devices.console_{'pty' if kind == 'pty' else 'sockets'}.select", "epoll")]
    with contextlib.ExitStack() as stack:
        if kind == "connect":
            failures.append(scarce("hcd.devices.connector.socket", "socket"))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
        served = console(f"{kind}:{path}")
        stack.enter_context(served.driver())
        if kind == "listen":
            assert [connect(path).recv(1) for _ in range(2)] == [b"", b""]
            connect(path)
        elif kind == "pty":
            stack.callback(os.close, os.open(path, os.O_RDWR | os.O_NOCTTY))
        until(lambda: served.device.ports[0].end.connected)
    assert all(len(each) == 2 for each in failures)


def test_listen_takes_over_from_the_dead_alone(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    """A socket of a dead process is replaced; one that is served, or a file, is not touched."""
    path = short_dir / "tty"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        console("listen:{dir}/tty")
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConfigError, match="this process"):
            console("listen:{dir}/tty")
    console("listen:{dir}/tty")


def test_one_port_that_cannot_be_opened_leaves_nothing(console: Callable[..., ServedDevice], short_dir: Path) -> None:
    with pytest.raises(ConfigError, match="file:"):
        console("pty:{dir}/vm.tty", "log=file:/nowhere/log")
    assert not (short_dir / "vm.tty").is_symlink()

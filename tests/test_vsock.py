"""The socket device, driven packet by packet over its own session; programs of the host are plain sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.vsock import EVENT_QUEUE, RX_QUEUE, TX_QUEUE, Header, Op, Shutdown

from hcd import options
from hcd.device import ConfigError
from hcd.devices import vsock_host, vsock_table
from hcd.devices.vsock import Vsock
from hcd.devices.vsock_connection import BOTH
from hcd.frontend.errors import BackendError
from hcd.frontend.vsock import VsockDriver
from hcd.testing import ServedDevice, check_device, serve
from hcd.wrappers import RequestStack, parse_text

GUEST, PORT = 1024, 5000
ERRORS = "hcd_guest_errors_total"


@pytest.fixture
def path(short_dir: Path) -> str:
    return str(short_dir / "x.vsock")


@pytest.fixture
def served(path: str) -> Iterator[ServedDevice]:
    with serve(Vsock, {"uds-path": path, "max-connections": 8, "buffer": 8192}) as device:
        yield device
        assert device.metrics().total("hcd_handler_errors_total") == 0
        assert device.crashes == []


@pytest.fixture
def driver(served: ServedDevice) -> Iterator[VsockDriver]:
    with served.driver() as front:
        yield VsockDriver(front)


@pytest.fixture
def listen(path: str) -> Iterator[Callable[..., socket.socket]]:
    """``listen(port)``: a program of the host that the guest can reach."""
    with contextlib.ExitStack() as stack:

        def start(port: int = PORT, backlog: int = 16) -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(30)
            sock.bind(f"{path}_{port}")
            sock.listen(backlog)
            return sock

        yield start


def call(path: str, line: bytes = b"CONNECT 1234\n") -> socket.socket:
    """A program of the host that wants to reach the guest."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(path)
    with contextlib.suppress(BrokenPipeError):  # who is turned away at once
        sock.sendall(line)
    return sock


def turned_away(sock: socket.socket) -> bool:
    """Whether it was closed without a word, with or without what it said having been read."""
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


def from_guest(driver: VsockDriver, listener: socket.socket, guest_port: int = GUEST) -> socket.socket:
    """An open connection that the guest asked for."""
    driver.send(Op.REQUEST, guest_port, PORT)
    driver.expect(Op.RESPONSE)
    sock, _ = listener.accept()
    sock.settimeout(30)
    return sock


def from_host(driver: VsockDriver, path: str) -> tuple[socket.socket, int]:
    """An open connection to port 1234 of the guest, and the host's port."""
    sock = call(path)
    header, _ = driver.expect(Op.REQUEST)
    assert (header.src_cid, header.dst_cid, header.dst_port) == (2, 3, 1234)
    driver.send(Op.RESPONSE, 1234, header.src_port)
    assert sock.recv(100) == b"OK %d\n" % header.src_port
    return sock, header.src_port


def fill(driver: VsockDriver) -> int:
    """Send until neither the host's socket nor hcd takes more; returns how many bytes that were."""
    sent, forwarded = 0, 0
    while sent - forwarded < 8192:
        driver.send(Op.RW, GUEST, PORT, b"a" * 4096)
        sent += 4096
        with contextlib.suppress(BackendError):
            if sent - forwarded == 8192:
                forwarded = driver.expect(Op.CREDIT_UPDATE, timeout=0.2)[0].fwd_cnt
    return sent


def counted(served: ServedDevice, name: str, **labels: str) -> float:
    return served.metrics().total(f"hcd_device_vsock_{name}", **labels)


# -- what it is


def test_declaration(path: str) -> None:
    device = Vsock("v", options.defaults(Vsock.options) | {"uds_path": path, "guest_cid": 77})
    assert device.config() == (77).to_bytes(8, "little")
    assert (device.virtio_id, device.num_queues, device.features) == (19, 3, 3)


@pytest.mark.parametrize(("given", "text"), [(None, '"uds-path" is missing'), ("/" + "x" * 97, "longer than the 107")])
def test_paths_that_cannot_be_are_refused(given: str | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Vsock("v", options.defaults(Vsock.options) | {"uds_path": given})


def test_it_keeps_the_contract(path: str) -> None:
    check_device(Vsock, {"uds-path": path, "seqpacket-path": f"{path}.seqpacket"})


def test_a_socket_in_use_is_not_taken_away(path: str) -> None:
    """One that a dead process left is; and ours is gone in the end."""
    with serve(Vsock, {"uds-path": path}), pytest.raises(ConfigError, match="this process does already"):
        serve(Vsock, {"uds-path": path}).__enter__()
    assert not os.path.exists(path)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    with serve(Vsock, {"uds-path": path}) as served, served.driver() as front:
        from_host(VsockDriver(front), path)[0].close()


# -- both directions


def test_a_guest_reaches_the_host(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    with from_guest(driver, listen()) as host:
        driver.send(Op.RW, GUEST, PORT, b"hello")
        assert host.recv(100) == b"hello"
        host.sendall(b"good morning")
        assert driver.read(GUEST, PORT, 12) == b"good morning"
        assert counted(served, "accepted_total", by="guest") == counted(served, "connections") == 1
        assert counted(served, "payload_bytes_total", to="host") == 5
        assert counted(served, "payload_bytes_total", to="guest") == 12


def test_the_host_reaches_a_guest(driver: VsockDriver, served: ServedDevice, path: str) -> None:
    """What follows the greeting is for the guest, also when it comes at once."""
    with call(path, b"CONNECT 1234\nhello") as host:
        header, _ = driver.expect(Op.REQUEST)
        assert driver.silent()
        driver.send(Op.RESPONSE, 1234, header.src_port)
        assert driver.read(1234, header.src_port, 5) == b"hello"
        assert host.recv(100) == b"OK %d\n" % header.src_port
        driver.send(Op.RW, 1234, header.src_port, b"good morning")
        assert host.recv(100) == b"good morning"
        assert counted(served, "accepted_total", by="host") == 1


def test_the_greeting_may_come_in_pieces(driver: VsockDriver, path: str) -> None:
    with call(path, b"CONN") as host:
        for part in (b"ECT 1", b"234", b"\n"):
            assert driver.silent()
            host.sendall(part)
        driver.expect(Op.REQUEST)


@pytest.mark.parametrize(
    "line", [b"\n", b"HELLO\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"CONNECT 1 2\n", b"C" * 32]
)
def test_who_does_not_say_where_to_is_turned_away(
    line: bytes, driver: VsockDriver, served: ServedDevice, path: str
) -> None:
    with call(path, line) as host:
        assert turned_away(host)
    assert driver.silent()
    assert counted(served, "refused_total", by="host") == 1


def test_who_says_nothing_is_turned_away_in_the_end(
    driver: VsockDriver, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is who has hung up before."""
    monkeypatch.setattr(vsock_host, "_GREETING_TIME", 0.05)
    with call(path, b"CONNECT") as host:
        assert turned_away(host)
    call(path, b"CONNECT").close()
    assert driver.silent()


def test_nobody_is_let_in_without_a_guest(served: ServedDevice, path: str) -> None:
    with call(path) as host:
        assert turned_away(host)


def test_a_guest_may_refuse_or_not_answer(
    driver: VsockDriver, served: ServedDevice, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with call(path) as host:
        header, _ = driver.expect(Op.REQUEST)
        driver.send(Op.RST, 1234, header.src_port)
        assert host.recv(100) == b""
    monkeypatch.setattr(vsock_table, "ANSWER_TIME", 0.05)
    with call(path) as host:
        driver.expect(Op.REQUEST)
        driver.expect(Op.RST)
        assert host.recv(100) == b""
    assert counted(served, "refused_total", by="host") == 2
    assert counted(served, "connections") == 0


def test_a_host_that_gives_up_while_it_waits_takes_its_request_back(driver: VsockDriver, path: str) -> None:
    host = call(path)
    driver.expect(Op.REQUEST)
    host.close()
    driver.expect(Op.RST)


def test_a_port_where_nobody_listens_is_refused(driver: VsockDriver, served: ServedDevice) -> None:
    driver.send(Op.REQUEST, GUEST, PORT)
    header, _ = driver.expect(Op.RST)
    assert (header.src_port, header.dst_port) == (PORT, GUEST)
    assert counted(served, "refused_total", by="guest") == 1


# -- flow control


def transfer(driver: VsockDriver, host: socket.socket, port: tuple[int, int], size: int) -> None:
    """``size`` bytes each way at once, each side as fast as the other's credit lets it."""
    data = random.Random(size).randbytes(size)
    got = bytearray()

    def read_all() -> None:
        while len(got) < size:
            got.extend(host.recv(65536))

    threads = [threading.Thread(target=read_all), threading.Thread(target=host.sendall, args=(data,))]
    for thread in threads:
        thread.start()
    sent, forwarded, alloc, back = 0, 0, 8192, bytearray()
    while sent < size or len(back) < size:
        room = min(alloc - (sent - forwarded), 3000, size - sent)
        if room:
            driver.send(Op.RW, *port, data[sent : sent + room])
            sent += room
            if driver.silent():
                continue
        header, part = driver.next()
        forwarded, alloc = header.fwd_cnt, header.buf_alloc
        back += part
        if header.op == Op.CREDIT_REQUEST or len(back) % 5 == 0:
            driver.send(Op.CREDIT_UPDATE, *port)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert bytes(back) == data
    assert bytes(got) == data


def test_bytes_arrive_whole_both_ways_under_small_windows(
    driver: VsockDriver, listen: Callable[..., socket.socket]
) -> None:
    driver.alloc = 10_000
    with from_guest(driver, listen()) as host:
        transfer(driver, host, (GUEST, PORT), 300_000)


def test_a_host_that_does_not_read_holds_the_guest_back(
    driver: VsockDriver, listen: Callable[..., socket.socket]
) -> None:
    """hcd keeps what the guest has credit for, and tells it when there is more."""
    with from_guest(driver, listen()) as host:
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent, forwarded = 0, 0
        while True:
            while room := min(8192 - (sent - forwarded), 4096):
                driver.send(Op.RW, GUEST, PORT, bytes([sent >> 12 & 0xFF]) * room)
                sent += room
            try:
                forwarded = driver.expect(Op.CREDIT_UPDATE, timeout=0.2)[0].fwd_cnt
            except BackendError:
                break  # the socket is full, and so is hcd's buffer
        assert sent - forwarded == 8192
        got = bytearray()
        while len(got) < sent:
            got += host.recv(65536)
        assert got == b"".join(bytes([at >> 12 & 0xFF]) * 4096 for at in range(0, sent, 4096))
        forwarded = driver.expect(Op.CREDIT_UPDATE)[0].fwd_cnt
        assert sent - forwarded < 8192


def test_a_guest_that_does_not_read_holds_the_host_back(
    driver: VsockDriver, listen: Callable[..., socket.socket]
) -> None:
    """No byte beyond its room; it is asked for more, once."""
    driver.alloc = 1000
    with from_guest(driver, listen()) as host:
        host.sendall(bytes(range(250)) * 10)
        assert driver.read(GUEST, PORT, 1000) == bytes(range(250)) * 4
        driver.expect(Op.CREDIT_REQUEST)
        with pytest.raises(BackendError, match="nothing used in time"):
            driver.next(timeout=0.1)
        driver.send(Op.CREDIT_UPDATE, GUEST, PORT)
        assert driver.read(GUEST, PORT, 1000) == bytes(range(250)) * 4
        driver.expect(Op.CREDIT_REQUEST)
        driver.send(Op.CREDIT_UPDATE, GUEST, PORT)
        assert driver.read(GUEST, PORT, 500) == bytes(range(250)) * 2


def test_nothing_is_read_from_the_host_without_receive_buffers(
    served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """It waits in the socket, and comes when the guest gives one."""
    with served.driver() as front:
        driver = VsockDriver(front, buffers=1, refill=False)
        buffer = next(iter(driver._waiting.values()))
        with from_guest(driver, listen()) as host:
            host.sendall(b"wait")
            served.run(lambda: None)
            assert driver.silent()
            driver.give(buffer)
            assert driver.read(GUEST, PORT, 4) == b"wait"


# -- the end of connections


def test_a_guest_that_says_no_more_still_hears(driver: VsockDriver, listen: Callable[..., socket.socket]) -> None:
    """Half-close: the host sees the end of the file, and answers after it."""
    with from_guest(driver, listen()) as host:
        driver.send(Op.RW, GUEST, PORT, b"question")
        driver.send(Op.SHUTDOWN, GUEST, PORT, flags=Shutdown.SEND)
        assert host.recv(100) == b"question"
        assert host.recv(100) == b""
        host.sendall(b"answer")
        assert driver.read(GUEST, PORT, 6) == b"answer"
        host.close()
        header, _ = driver.expect(Op.SHUTDOWN)
        if header.flags != BOTH:
            header, _ = driver.expect(Op.SHUTDOWN)
        assert header.flags == BOTH
        driver.send(Op.RST, GUEST, PORT)


def test_a_host_that_says_no_more_still_hears(
    driver: VsockDriver, served: ServedDevice, path: str
) -> None:
    host, port = from_host(driver, path)
    with host:
        host.sendall(b"question")
        host.shutdown(socket.SHUT_WR)
        assert driver.read(1234, port, 8) == b"question"
        assert driver.expect(Op.SHUTDOWN)[0].flags == Shutdown.SEND
        driver.send(Op.RW, 1234, port, b"answer")
        assert host.recv(100) == b"answer"
        driver.send(Op.SHUTDOWN, 1234, port, flags=BOTH)
        driver.expect(Op.RST)
        assert host.recv(100) == b""
    assert counted(served, "connections") == 0


def test_what_a_host_said_before_it_closed_arrives(driver: VsockDriver, listen: Callable[..., socket.socket]) -> None:
    """Also when it closed before the connection was open for the guest."""
    listener = listen()
    with listener:
        driver.send(Op.REQUEST, GUEST, PORT)
        host, _ = listener.accept()
        host.sendall(b"banner")
        host.close()
        driver.expect(Op.RESPONSE)
        data, ended = b"", Shutdown(0)
        while ended != BOTH:
            header, part = driver.next()
            data += part
            if header.op == Op.SHUTDOWN:
                ended = Shutdown(header.flags)
        assert data == b"banner"


def test_a_host_that_takes_no_more_says_so(driver: VsockDriver, listen: Callable[..., socket.socket]) -> None:
    with from_guest(driver, listen()) as host:
        host.shutdown(socket.SHUT_RD)
        driver.send(Op.RW, GUEST, PORT, b"x")
        assert driver.expect(Op.SHUTDOWN)[0].flags == Shutdown.RECEIVE
        driver.send(Op.RW, GUEST, PORT, b"on its way")  # sent before the guest knew
        host.sendall(b"still here")
        assert driver.read(GUEST, PORT, 10) == b"still here"


def test_what_a_guest_said_before_it_went_arrives(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """Its port is free at once; the host reads the rest when it likes."""
    listener = listen()
    with from_guest(driver, listener) as host:
        sent = fill(driver)
        driver.send(Op.SHUTDOWN, GUEST, PORT, flags=BOTH)
        driver.expect(Op.RST)
        assert counted(served, "connections") == 0
        with from_guest(driver, listener) as again:
            driver.send(Op.RW, GUEST, PORT, b"b")
            assert again.recv(10) == b"b"
        got = b""
        while part := host.recv(65536):
            got += part
        assert got == b"a" * sent
    served.run(lambda: None)


# -- guests without manners


def raw(served: ServedDevice, driver: VsockDriver, data: bytes, errors: int) -> None:
    driver.send_raw(data)
    assert served.metrics().total(ERRORS) == errors


def test_packets_that_are_none_are_the_guests_errors(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """Too short, from somebody else, longer than they are: counted, dropped, and the next one is served."""
    good = Header(3, 2, GUEST, PORT, 0, 1, Op.REQUEST, 0, 1000, 0)
    raw(served, driver, b"x", 1)
    raw(served, driver, good.to_bytes()[:43], 2)
    raw(served, driver, b"\4" + good.to_bytes()[1:], 3)
    raw(served, driver, Header(3, 2, GUEST, PORT, 11, 1, Op.RW).to_bytes() + b"ten bytes.", 4)
    raw(served, driver, Header(3, 2, GUEST, PORT, 0xFFFFFFFF, 1, Op.RW).to_bytes(), 5)
    assert driver.silent()
    with from_guest(driver, listen()) as host:
        driver.send(Op.RW, GUEST, PORT, b"hello")
        assert host.recv(100) == b"hello"


@pytest.mark.parametrize(
    "fields", [{"type": 2}, {"type": 0}, {"type": 65535}, {"dst_cid": 1}, {"dst_cid": 3}, {"dst_cid": 1 << 63}]
)
def test_packets_for_nobody_are_refused(
    fields: dict[str, Any], driver: VsockDriver, listen: Callable[..., socket.socket]
) -> None:
    """With an answer that the asker can tell is meant for it."""
    with listen():
        driver.send(Op.REQUEST, GUEST, PORT, **fields)
        header, _ = driver.expect(Op.RST)
        assert header.type == fields.get("type", 1)
        assert header.src_cid == fields.get("dst_cid", 2)
        driver.send(Op.RST, GUEST, PORT, **fields)
        driver.send(Op.RST, GUEST + 1, PORT)
        assert driver.silent()  # an RST is never answered


@pytest.mark.parametrize("op", [0, Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 8, 65535])
def test_packets_without_a_connection_are_refused(op: int, driver: VsockDriver) -> None:
    driver.send(op, GUEST, PORT)
    driver.expect(Op.RST)


def test_a_guest_that_overruns_its_credit_loses_that_connection(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """And no other. The host gets what came before."""
    listener = listen()
    with from_guest(driver, listener) as host, from_guest(driver, listener, GUEST + 1) as other:
        driver.size = 4096
        with contextlib.suppress(BackendError):
            for _ in range(1000):  # until neither the socket nor hcd takes more
                driver.send(Op.RW, GUEST, PORT, bytes(4096))
                if served.metrics().total(ERRORS):
                    break
        assert served.metrics().total(ERRORS) == 1
        while True:
            header, _ = driver.next()
            if header.op == Op.RST:
                break
        assert header.dst_port == GUEST
        driver.send(Op.RW, GUEST + 1, PORT, b"hello")
        assert other.recv(100) == b"hello"
        size = 0
        while part := host.recv(65536):
            size += len(part)
        assert size % 4096 == 0
        assert size > 8192


def test_connections_have_a_limit(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket], path: str
) -> None:
    """In both directions together; one that ends makes room."""
    listener = listen()
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(from_guest(driver, listener, GUEST + n)) for n in range(8)]
        driver.send(Op.REQUEST, GUEST + 8, PORT)
        driver.expect(Op.RST)
        with call(path) as ninth:
            assert turned_away(ninth)
        assert counted(served, "connections") == 8
        driver.send(Op.RST, GUEST, PORT)
        assert hosts[0].recv(1) == b""
        stack.enter_context(from_guest(driver, listener, GUEST + 8))


def test_a_guest_that_takes_no_answers_is_not_listened_to(served: ServedDevice) -> None:
    """What waits for it does not grow; when it takes them all goes on."""
    with served.driver(size=256) as front:
        driver = VsockDriver(front, buffers=0)
        memory, queue = front.memory, front.queues[TX_QUEUE]
        buffer = memory.alloc(44)
        memory.write(buffer, Header(3, 2, GUEST, PORT, 0, 1, Op.RW).to_bytes())
        for _ in range(200):
            queue.ring.add([(buffer, 44)], [])
        queue.publish()
        done = 0
        while done < vsock_table.MAX_STRAYS:
            done += len(queue.wait())
        served.run(lambda: None)
        assert not queue.used()
        assert done == vsock_table.MAX_STRAYS
        for _ in range(16):
            driver.give(memory.alloc(4096))
        for _ in range(200):
            driver.expect(Op.RST)
        while done < 200:
            done += len(queue.wait())


def test_receive_buffers_without_room_are_the_guests_error(served: ServedDevice) -> None:
    with served.driver() as front:
        driver = VsockDriver(front, buffers=0)
        queue = front.queues[RX_QUEUE]
        tokens = [queue.submit([], [(front.memory.alloc(44), 44)]) for _ in range(2)]
        driver.send(Op.RW, GUEST, PORT)
        assert [queue.wait_for(token) for token in tokens] == [0, 0]
        assert served.metrics().total(ERRORS) == 2
        driver.give(front.memory.alloc(4096))
        driver.expect(Op.RST)


@pytest.mark.parametrize("seed", range(6))
def test_random_packets_hurt_nobody(
    seed: int, served: ServedDevice, listen: Callable[..., socket.socket], no_leaks: None
) -> None:
    """Any op, port, size and credit; what the device holds stays small, and it works afterwards."""
    rng = random.Random(seed)
    listener = listen()
    listener.setblocking(False)
    hosts: list[socket.socket] = []
    with served.driver() as front:
        driver = VsockDriver(front)
        for _ in range(400):
            size = rng.choice([0, 0, 1, 100, 5000])
            driver.send(
                rng.choice([1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8]), GUEST + rng.randrange(4), PORT + rng.randrange(10) // 9,
                rng.randbytes(size), flags=rng.randrange(8), buf_alloc=rng.choice([0, 1, 10**5, 0xFFFFFFFF]),
                fwd_cnt=rng.choice([0, 1, rng.getrandbits(32)]),
            )
            with contextlib.suppress(BlockingIOError):
                hosts.append(listener.accept()[0])
            if hosts and rng.random() < 0.3:
                host = hosts[rng.randrange(len(hosts))]
                with contextlib.suppress(OSError):
                    host.setblocking(False)
                    action = rng.randrange(3)
                    if action:
                        host.send(bytes(3000)) if action == 1 else host.recv(9999)
                    else:
                        host.close()
            driver.silent()
            driver._arrived.clear()
    for host in hosts:
        host.close()
    served.wait_disconnected()
    with served.driver() as front:
        driver = VsockDriver(front)
        driver.send(Op.REQUEST, 99, PORT)
        driver.expect(Op.RESPONSE)
    listener.close()


# -- front ends that come and go


def test_a_front_end_that_goes_ends_connections(
    served: ServedDevice, listen: Callable[..., socket.socket], path: str
) -> None:
    with served.driver() as front:
        driver = VsockDriver(front)
        guest_asked, (host_asked, _) = from_guest(driver, listen()), from_host(driver, path)
        half_greeted = call(path, b"CONN")
    for sock in (guest_asked, host_asked, half_greeted):
        assert turned_away(sock)
        sock.close()
    served.wait_disconnected()
    assert counted(served, "connections") == 0


def test_what_a_guest_said_before_its_front_end_went_arrives(
    served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """A machine that is switched off after its programs have said what they had to say."""
    with served.driver() as front:
        driver = VsockDriver(front)
        host = from_guest(driver, listen())
        sent = fill(driver)
    served.wait_disconnected()
    assert counted(served, "connections") == 0
    with host:
        got = b""
        while part := host.recv(65536):
            got += part
        assert got == b"a" * sent


@pytest.mark.parametrize("packed", [False, True])
def test_a_pause_ends_nothing(
    packed: bool, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """Queues stop and go on where they were; what came meanwhile is there then."""
    with served.driver(packed=packed) as front:
        driver = VsockDriver(front)
        with from_guest(driver, listen()) as host:
            bases = {index: front.stop_queue(index) for index in front.queues}
            host.sendall(b"meanwhile")
            for index, base in bases.items():
                front.hand_over(front.queues[index], base)
            assert driver.read(GUEST, PORT, 9) == b"meanwhile"
            driver.send(Op.RW, GUEST, PORT, b"hello")
            assert host.recv(100) == b"hello"


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_that_starts_anew_has_no_connections(
    packed: bool, served: ServedDevice, listen: Callable[..., socket.socket]
) -> None:
    """Its rings stand at their beginning again, on the same front end: QEMU, whose guest reboots."""
    with served.driver(packed=packed) as front:
        with from_guest(VsockDriver(front), listen()) as host:
            for index in (RX_QUEUE, TX_QUEUE):
                front.stop_queue(index)
                front.queues.pop(index).close()
            for index in (RX_QUEUE, TX_QUEUE):
                front.start_queue(index, 64)
            assert host.recv(100) == b""
        assert VsockDriver(front).silent()


def test_a_request_replaces_the_connection_of_the_same_ports(
    driver: VsockDriver, listen: Callable[..., socket.socket]
) -> None:
    """A guest that asks again has forgotten the first one."""
    listener = listen()
    with from_guest(driver, listener) as first, from_guest(driver, listener) as second:
        assert first.recv(1) == b""
        driver.send(Op.RW, GUEST, PORT, b"x")
        assert second.recv(1) == b"x"


@pytest.mark.parametrize("packed", [False, True])
def test_a_driver_that_goes_on_is_told_that_its_connections_are_gone(packed: bool, served: ServedDevice) -> None:
    """By an event; a new driver is told nothing."""
    with served.driver(packed=packed) as front:
        driver = VsockDriver(front)
        driver.send(Op.RW, GUEST, PORT)
        driver.expect(Op.RST)
        room = front.memory.alloc(4)
        front.memory.write(room, b"\xff" * 4)
        events = front.queues[EVENT_QUEUE]
        events.submit([], [(room, 4)])
        served.run(lambda: None)
        assert not events.used()
        front.reconnect()
        assert [used.written for used in events.wait()] == [4]
        assert front.memory.read(room, 4) == bytes(4)
        events.submit([], [(room, 4)])
        served.run(lambda: None)
        assert not events.used()


def test_ports_of_another_process_are_hardly_met_again(path: str) -> None:
    """A driver may believe that it still has connections with them."""
    ports = set()
    for _ in range(3):
        with serve(Vsock, {"uds-path": path}) as served, served.driver() as front:
            sock, port = from_host(VsockDriver(front), path)
            sock.close()
            ports.add(port)
    assert len(ports) == 3
    assert all(vsock_table.FIRST_PORT <= port <= vsock_table.LAST_PORT for port in ports)


def test_connections_leave_descriptors_for_others(
    driver: VsockDriver, served: ServedDevice, listen: Callable[..., socket.socket], path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that is short of them refuses connections of guests before anything else."""
    with from_guest(driver, listen()) as host:
        limit = host.fileno() + vsock_table.RESERVED_FDS
        monkeypatch.setattr(vsock_table.resource, "getrlimit", lambda _: (limit, limit))
        driver.send(Op.REQUEST, GUEST + 1, PORT)
        driver.expect(Op.RST)
        with call(path) as refused:
            assert turned_away(refused)
        driver.send(Op.RW, GUEST, PORT, b"x")
        assert host.recv(1) == b"x"


def test_the_wrapper_log_decodes_packets(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also what is none; buffers that come back unused are no trouble for it."""
    caplog.set_level(logging.INFO, "hcd")
    with serve(Vsock, {"uds-path": path}) as served:
        host = served.host
        host.wrapping = RequestStack([parse_text("log")], served.device, host.lane, host.log)
        with served.driver() as front:
            driver = VsockDriver(front)
            driver.send(Op.REQUEST, GUEST, PORT)
            driver.expect(Op.RST)
            driver.send(77, GUEST, PORT, b"abc", dst_cid=9)
            driver.expect(Op.RST)
            driver.send_raw(b"short")
            from_host(driver, path)[0].close()
    assert f"request from port {GUEST} to 2:{PORT}, 0 bytes" in caplog.text
    assert f"op 77 from port {GUEST} to 9:{PORT}, 3 bytes" in caplog.text
    assert "5 bytes, room for 0 (GuestError: " in caplog.text

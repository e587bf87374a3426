"""The network device on a reactor: hub, tap (in a network namespace of its own) and stream, through real rings."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hcd_protocols.virtio.features import NetFeature, RingFeature
from hcd_protocols.virtio.net import NetConfig

from hcd.dataplane.switch import MAX_FRAME
from hcd.device import ConfigError, DeviceError
from hcd.devices import net_tap
from hcd.devices.net import Net
from hcd.frontend.local import LocalDevice, LocalLane
from hcd.frontend.net import NetDriver

T = TypeVar("T")

V1 = int(RingFeature.VERSION_1)
MRG = int(NetFeature.MRG_RXBUF)
RINGS = {
    "legacy": 0,
    "split": V1 | MRG,
    "split-event": V1 | int(RingFeature.EVENT_IDX),
    "packed": V1 | MRG | int(RingFeature.RING_PACKED) | int(RingFeature.EVENT_IDX),
    "packed-in-order": V1 | int(RingFeature.RING_PACKED) | int(RingFeature.IN_ORDER),
}
BROADCAST = b"\xff" * 6
RX, TX = 1, 0


def mac(n: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([n])


def frame(to: bytes, sender: bytes, payload: bytes = b"payload" * 10) -> bytes:
    return to + sender + b"\x88\xb5" + payload


def net(name: str = "net0", **options: Any) -> Net:
    return Net(name, {option.key: option.default for option in Net.options} | options)


class Card:
    """A device with its driver."""

    def __init__(self, device: Net, lane: LocalLane, features: int, buffers: int = 32) -> None:
        self.net = device
        self.local = LocalDevice(device, lane, features=features)
        self.drivers: list[NetDriver] = []
        for pair in range(device.num_queues // 2):
            rx, tx = (self.local.start_queue(2 * pair + side) for side in (0, 1))
            self.drivers.append(NetDriver(self.local.memory, rx.driver, tx.driver, features=features, buffers=buffers))
        self.driver = self.drivers[0]

    @property
    def rx_drops(self) -> int:
        return self.local.queues[0].stats.drops

    @property
    def tx_drops(self) -> int:
        return self.local.queues[1].stats.drops


MakeCard = Callable[..., Card]


@pytest.fixture
def lane() -> Iterator[LocalLane]:
    lane = LocalLane()
    yield lane
    lane.close()
    assert lane.errors == []


@pytest.fixture
def card(lane: LocalLane) -> Iterator[MakeCard]:
    made: list[Card] = []

    def make(device: Net, features: int = V1 | MRG, *, on: LocalLane = lane, buffers: int = 32) -> Card:
        made.append(Card(device, on, features, buffers))
        return made[-1]

    yield make
    for each in made:
        assert all(not queue.errors for queue in each.local.queues)
        each.local.close()


# -- options, features, configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mac": "52:54:00:12:34"}, "expected a station address"),
        ({"mac": "01:00:5e:00:00:01"}, "expected a station address"),
        ({"mac": "nonsense"}, "expected a station address"),
        ({"mac": "00:00:00:00:00:00"}, "expected a station address"),
        ({"ifname": "tap0"}, '"ifname" is for backend "tap"'),
        ({"stream": "/x"}, '"stream" is for backend "stream"'),
        ({"backend": "tap", "hub": "h", "ifname": "tap0"}, '"hub" is for backend "hub"'),
        ({"backend": "tap"}, 'one of the options "ifname" and "tap-fd"'),
        ({"backend": "tap", "ifname": "tap0", "tap_fd": 3}, 'one of the options "ifname" and "tap-fd"'),
        ({"backend": "tap", "ifname": "sixteen-bytes-xx"}, "1 to 15 bytes"),
        ({"backend": "stream"}, 'needs the option "stream"'),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net(**options)


def test_features_and_configuration_follow_the_options() -> None:
    plain = net()
    assert plain.features == NetFeature.STATUS | NetFeature.MRG_RXBUF
    assert plain.num_queues == 2
    full = net(mac="52:54:00:12:34:56", mtu=9000, queue_pairs=4, mrg_rxbuf=False)
    assert full.features == NetFeature.STATUS | NetFeature.MAC | NetFeature.MTU | NetFeature.MQ
    assert full.num_queues == 8
    config = NetConfig.from_bytes(full.config())
    assert (config.mac.hex(":"), config.mtu, config.max_virtqueue_pairs) == ("52:54:00:12:34:56", 9000, 4)
    assert config.status == 1


def test_mtu_of_the_front_end_limits_frames_until_it_goes(lane: LocalLane, card: MakeCard) -> None:
    a, b = card(net("a")), card(net("b", mtu=2000))
    for mtu in (67, 2001, 65536):
        with pytest.raises(DeviceError, match=f"an MTU of {mtu}"):
            b.net.set_mtu(mtu)
    b.net.set_mtu(100)
    a.driver.send(frame(mac(2), mac(1), b"x" * 109), frame(mac(2), mac(1), b"x" * 108))
    assert len(b.driver.receive()) == 122
    assert b.rx_drops == 1
    lane.run(b.net.disconnect)
    a.driver.send(frame(mac(2), mac(1), b"x" * 1900))
    assert len(b.driver.receive()) == 1914


# -- hub


@pytest.mark.parametrize("features", RINGS)
def test_devices_of_one_hub_reach_each_other(card: MakeCard, features: str) -> None:
    a, b = card(net("a"), RINGS[features]), card(net("b"))
    for size in (46, 500, 1486):
        there, back = frame(mac(2), mac(1), os.urandom(size)), frame(mac(1), mac(2), os.urandom(size))
        a.driver.send(there)
        assert b.driver.receive() == there
        b.driver.send(back)
        assert a.driver.receive() == back
    for each in (a, b):
        assert each.local.queues[0].stats.requests(RX, 0) == 3
        assert each.local.queues[1].stats.requests(TX, 0) == 3


def test_many_frames_arrive_whole_and_in_order(card: MakeCard) -> None:
    a, b = card(net("a"), RINGS["packed"], buffers=128), card(net("b"), RINGS["split-event"], buffers=128)
    sent = [frame(mac(2), mac(1), n.to_bytes(4, "big") + os.urandom(60)) for n in range(2000)]
    got: list[bytes] = []
    for start in range(0, len(sent), 100):
        a.driver.send(*sent[start : start + 100])
        while len(got) < start + 100:
            got.append(b.driver.receive())
    assert got == sent
    assert b.rx_drops == 0


def test_hubs_of_other_names_and_other_lanes_are_other_hubs(lane: LocalLane, card: MakeCard) -> None:
    other = LocalLane()
    try:
        a, b = card(net("a")), card(net("b", hub="hub0"))
        far = [card(net("c", hub="hub1")), card(net("d"), on=other)]
        a.driver.send(frame(BROADCAST, mac(1)))
        assert b.driver.receive() == frame(BROADCAST, mac(1))
        for each in far:
            each.local.lane.run(lambda: None)
            assert each.driver.pending() == []
            each.local.close()
    finally:
        other.close()
    assert not other.errors


def test_hub_goes_with_its_last_device(lane: LocalLane) -> None:
    a, b = net("a", hub="h"), net("b", hub="h")
    for device in (a, b):
        device.open(lane)
    (hubs,) = lane.shared.values()
    assert set(hubs) == {"h"}
    a.close()
    assert len(hubs["h"].ports) == 1
    b.close()
    assert hubs == {}


def test_receive_ring_full_of_buffers_lets_the_reactor_sleep(lane: LocalLane, card: MakeCard) -> None:
    a, b = card(net("a")), card(net("b"))
    a.driver.send(frame(mac(2), mac(1)))
    b.driver.receive()
    lane.run(lambda: None)
    before = lane.reactor.beats
    for _ in range(5):
        lane.run(lambda: None)
    assert lane.reactor.beats - before < 50


def test_several_queue_pairs_send_and_receive(card: MakeCard) -> None:
    a, b = card(net("a", queue_pairs=4)), card(net("b"))
    for n, driver in enumerate(a.drivers):
        driver.send(frame(mac(9), mac(n + 1)))
        assert b.driver.receive() == frame(mac(9), mac(n + 1))
    b.driver.send(*[frame(mac(1), mac(9), bytes([n]) * 50) for n in range(8)])
    got: list[bytes] = []
    while len(got) < 8:
        got += [data for driver in a.drivers for data in driver.pending()]
    assert [data[14] for data in got] == list(range(8))


def test_announcement_teaches_the_hub_where_the_address_is(lane: LocalLane, card: MakeCard) -> None:
    a, b = card(net("a")), card(net("b"))
    lane.run(lambda: a.net.announce(mac(1)))
    rarp = b.driver.receive()
    assert rarp[:14] == BROADCAST + mac(1) + b"\x80\x35"
    assert rarp[14:42] == struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 3, mac(1), bytes(4), mac(1), bytes(4))
    assert len(rarp) == 60
    (hubs,) = lane.shared.values()
    assert mac(1) in hubs["hub0"].addresses()


# -- stream


class Peer:
    """The other side of a stream: a listening unix socket, as ``-netdev stream,server=on`` or passt have it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(10)
        self.connections: list[socket.socket] = []

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(10)
        self.connections.append(connection)
        return connection

    def close(self) -> None:
        for each in (self._listener, *self.connections):
            each.close()


def packed_frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def read_frame(sock: socket.socket) -> bytes:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = sock.recv(count - len(data))
            assert chunk, "the device closed the stream"
            data += chunk
        return data

    return exactly(int.from_bytes(exactly(4), "big"))


class LinkChanges:
    """Waits for the status that the guest sees."""

    def __init__(self, device: Net) -> None:
        self._device = device
        self._changed = threading.Condition()
        device.notify_config_change = self._notify

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait(self, up: bool) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: bool(NetConfig.from_bytes(self._device.config()).status) == up, timeout=10
            )


@pytest.fixture
def peer(short_dir: Path) -> Iterator[Peer]:
    peer = Peer(short_dir / "s")
    yield peer
    peer.close()


def stream_to(peer: Peer) -> Net:
    return net(backend="stream", stream=str(peer.path))


@pytest.mark.parametrize("features", RINGS)
def test_stream_carries_frames_with_their_length(card: MakeCard, peer: Peer, features: str) -> None:
    a = card(stream_to(peer), RINGS[features])
    sock = peer.accept()
    for size in (46, 1486):
        there, back = frame(mac(2), mac(1), os.urandom(size)), frame(mac(1), mac(2), os.urandom(size))
        a.driver.send(there)
        assert read_frame(sock) == there
        sock.sendall(packed_frame(back))
        assert a.driver.receive() == back
    pieces = packed_frame(frame(mac(1), mac(2)))
    for n in range(len(pieces)):
        sock.sendall(pieces[n : n + 1])
    assert a.driver.receive() == frame(mac(1), mac(2))


def test_link_follows_the_peer_and_comes_back(card: MakeCard, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcd.devices.connector.PAUSE", 0.01)
    device = stream_to(peer)
    changes = LinkChanges(device)
    a = card(device)
    sock = peer.accept()
    changes.wait(up=True)
    sock.close()
    changes.wait(up=False)
    a.driver.send(frame(mac(2), mac(1)))  # dropped, or sent if the new connection is there already
    sock = peer.accept()
    changes.wait(up=True)
    a.driver.send(frame(mac(3), mac(1)))
    got = read_frame(sock)
    assert got[:6] == (mac(3) if a.tx_drops else mac(2))


def test_peer_that_comes_later_is_found(card: MakeCard, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcd.devices.connector.PAUSE", 0.01)
    device = net(backend="stream", stream=str(short_dir / "s"))
    changes = LinkChanges(device)
    a = card(device)
    a.driver.send(frame(mac(2), mac(1)))
    assert a.tx_drops == 1
    assert NetConfig.from_bytes(device.config()).status == 0
    peer = Peer(short_dir / "s")
    sock = peer.accept()
    changes.wait(up=True)
    a.driver.send(frame(mac(3), mac(1)))
    assert read_frame(sock)[:6] == mac(3)
    peer.close()


def test_a_process_that_is_out_of_descriptors_connects_later(
    card: MakeCard, peer: Peer, scarce: Callable[[str, str], list[OSError]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One for the socket is there, and none for what waits until it is writable."""
    monkeypatch.setattr("hcd.devices.connector.PAUSE", 0.01)
    failures = scarce("hcd.devices.net_stream.select", "epoll")
    a = card(stream_to(peer))
    for _ in range(2):
        assert peer.accept().recv(1) == b""
    sock = peer.accept()
    sock.sendall(packed_frame(frame(mac(1), mac(2))))
    assert a.driver.receive() == frame(mac(1), mac(2))
    assert len(failures) == 2
    assert caplog.text.count("Too many open files; trying again each second") == 1


@pytest.mark.parametrize("length", [0, 13, MAX_FRAME + 1, 0xFFFFFFFF])
def test_peer_out_of_step_is_hung_up_on(
    card: MakeCard, peer: Peer, length: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hcd.devices.connector.PAUSE", 0.01)
    a = card(stream_to(peer))
    sock = peer.accept()
    sock.sendall(packed_frame(frame(mac(1), mac(2))) + length.to_bytes(4, "big") + b"more")
    assert sock.recv(1) == b""
    assert f"a frame of {length} bytes" in caplog.text
    assert a.driver.receive() == frame(mac(1), mac(2))
    sock = peer.accept()
    sock.sendall(packed_frame(frame(mac(1), mac(3))))
    assert a.driver.receive() == frame(mac(1), mac(3))


@pytest.mark.parametrize("features", RINGS)
def test_slow_peer_holds_the_guest_back_and_gets_everything(card: MakeCard, peer: Peer, features: str) -> None:
    a = card(stream_to(peer), RINGS[features])
    sock = peer.accept()
    sent = [frame(mac(2), mac(1), os.urandom(1400)) for _ in range(800)]
    for start in range(0, len(sent), 100):
        a.driver.start(sent[start : start + 100])
        if start == 0:
            continue  # let the second batch find the socket full, at the latest the third
        for each in sent[start - 100 : start]:
            assert read_frame(sock) == each
        while len(a.driver._sending) > 100:
            a.driver._reap(a.driver.tx.wait())
    for each in sent[-100:]:
        assert read_frame(sock) == each
    a.driver.send()
    assert a.tx_drops == 0


def test_socket_that_is_full_stops_the_queue_and_goes_on(lane: LocalLane, card: MakeCard, peer: Peer) -> None:
    a = card(stream_to(peer))
    sock = peer.accept()
    sent: list[bytes] = []
    queue = a.local.queues[1]
    while not lane.run(lambda: queue.device.passive):
        sent.append(frame(mac(2), mac(1), os.urandom(1400)))
        a.driver.start(sent[-1:])
        if len(a.driver._sending) > 200:
            a.driver._reap(a.driver.tx.used())
    sent.append(frame(mac(2), mac(1), b"announced no more than others"))
    a.driver.start(sent[-1:])
    lane.run(lambda: a.net.announce(mac(1)))  # given up: the peer does not read
    for each in sent:
        assert read_frame(sock) == each
    a.driver.send()
    assert not lane.run(lambda: queue.device.passive)
    lane.run(lambda: a.net.announce(mac(1)))
    assert read_frame(sock)[12:14] == b"\x80\x35"
    assert a.tx_drops == 0


def test_peer_that_leaves_a_full_socket_releases_the_guest(lane: LocalLane, card: MakeCard, peer: Peer) -> None:
    a = card(stream_to(peer))
    sock = peer.accept()
    queue = a.local.queues[1]
    while not lane.run(lambda: queue.device.passive):
        a.driver.start([frame(mac(2), mac(1), bytes(1400))])
        if len(a.driver._sending) > 200:
            a.driver._reap(a.driver.tx.used())
    sock.close()
    a.driver.send()
    assert not lane.run(lambda: queue.device.passive)


@pytest.mark.parametrize("features", RINGS)
def test_guest_without_buffers_holds_the_peer_back_and_gets_everything(
    card: MakeCard, peer: Peer, features: str
) -> None:
    a = card(stream_to(peer), RINGS[features], buffers=2)
    sock = peer.accept()
    sent = [frame(mac(1), mac(2), n.to_bytes(4, "big") * 12) for n in range(50)]
    sock.sendall(b"".join(map(packed_frame, sent)))
    assert [a.driver.receive() for _ in sent] == sent
    assert a.rx_drops == 0


# -- tap


def in_namespace(function: Callable[[], T]) -> T:
    """Run ``function`` on a thread in a network namespace of its own; needs root."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET, this thread alone
                raise OSError(ctypes.get_errno(), "unshare")
            outcome.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]


class Host:
    """The host's side of a tap interface. Made in its namespace; its sockets stay there."""

    def __init__(self, name: str, mtu: int = 1500) -> None:
        self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
        self._ioctl(0x8922, struct.pack("16si20x", name.encode(), mtu))  # SIOCSIFMTU
        self._name = name
        self._packets.settimeout(10)
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._index = socket.if_nametoindex(name)

    def up(self) -> None:
        """After the device has opened the interface: one that gets its carrier later drops what is sent meanwhile."""
        self._ioctl(0x8914, struct.pack("16sH22x", self._name.encode(), 1))  # SIOCSIFFLAGS, IFF_UP
        self._packets.bind((self._name, 0x88B5))

    def _ioctl(self, request: int, data: bytes) -> None:
        fcntl.ioctl(self._packets, request, data)

    def send(self, *frames: bytes) -> None:
        for each in frames:
            self._packets.send(each)

    def receive(self) -> bytes:
        return self._packets.recv(1 << 17)

    def delete(self) -> None:
        """RTM_DELLINK: the interface goes away under whoever has it open."""
        self._netlink.send(struct.pack("IHHIIBxHiII", 32, 17, 5, 1, 0, 0, 0, self._index, 0, 0))
        (error,) = struct.unpack_from("i", self._netlink.recv(4096), 16)
        assert error == 0

    def close(self) -> None:
        self._packets.close()
        self._netlink.close()


@pytest.fixture
def need_namespaces() -> None:
    try:
        in_namespace(lambda: os.close(os.open("/dev/net/tun", os.O_RDWR)))
    except OSError as error:
        reason = f"no network namespace with /dev/net/tun: {error}"
        if os.environ.get("HCD_REQUIRE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


MakeTap = Callable[..., tuple[Card, Host]]


@pytest.fixture
def tap(need_namespaces: None, card: MakeCard) -> Iterator[MakeTap]:
    """A device on a new interface: made by the device, or handed over as an fd."""
    hosts: list[Host] = []

    def make(
        features: int = V1 | MRG, *, inherited: int | None = None, buffers: int = 32, mtu: int = 1500, **options: Any
    ) -> tuple[Card, Host]:
        def build() -> tuple[Card, Host]:
            if inherited is None:
                device = net(backend="tap", ifname="tap7", **options)
                # The interface's MTU counts from the moment of opening: make it first.
                keep = open_tap("tap7", net_tap.IFF_VNET_HDR | (0x100 if options.get("queue_pairs") else 0))
                fcntl.ioctl(keep, 0x400454CB, 1)  # TUNSETPERSIST
                os.close(keep)
                host = Host("tap7", mtu)
            else:
                fd = open_tap("tap7", inherited)
                host = Host("tap7", mtu)
                device = net(backend="tap", tap_fd=fd, **options)
            hosts.append(host)
            made = card(device, features, buffers=buffers)
            host.up()
            return made, host

        return in_namespace(build)

    yield make
    for host in hosts:
        host.close()


def open_tap(name: str, flags: int) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, net_tap.TUNSETIFF, struct.pack("16sH22x", name.encode(), 0x1002 | flags))
    return fd


def next_of(driver: NetDriver) -> bytes:
    """The next frame of the test: the host's own IPv6 chatter comes in between."""
    while True:
        data = driver.receive()
        if data[12:14] == b"\x88\xb5":
            return data


@pytest.mark.parametrize("features", RINGS)
def test_tap_carries_frames_both_ways(tap: MakeTap, features: str) -> None:
    a, host = tap(RINGS[features])
    for size in (46, 1486):
        there, back = frame(mac(2), mac(1), os.urandom(size)), frame(mac(1), mac(2), os.urandom(size))
        a.driver.send(there)
        assert host.receive() == there
        host.send(back)
        assert next_of(a.driver) == back


@pytest.mark.parametrize("flags", [0, net_tap.IFF_VNET_HDR])
def test_inherited_tap_with_and_without_header(tap: MakeTap, flags: int) -> None:
    a, host = tap(inherited=flags)
    a.driver.send(frame(mac(2), mac(1)))
    assert host.receive() == frame(mac(2), mac(1))
    host.send(frame(mac(1), mac(2)))
    assert next_of(a.driver) == frame(mac(1), mac(2))


def test_large_frames_of_a_tap_span_buffers(tap: MakeTap) -> None:
    a, host = tap(mtu=9000)
    for size in (8986, 60, 4000):
        sent = frame(mac(1), mac(2), os.urandom(size))
        host.send(sent)
        assert next_of(a.driver) == sent
        a.driver.send(sent)
        assert host.receive() == sent


@pytest.mark.parametrize("features", RINGS)
def test_frames_wait_in_the_interface_for_a_guest_without_buffers(tap: MakeTap, features: str) -> None:
    a, host = tap(RINGS[features], buffers=2)
    sent = [frame(mac(1), mac(2), bytes([n]) * 60) for n in range(60)]
    host.send(*sent)
    assert [next_of(a.driver) for _ in sent] == sent
    assert a.rx_drops == 0


def test_queue_pairs_have_an_fd_each(tap: MakeTap) -> None:
    a, host = tap(queue_pairs=2)
    for driver in a.drivers:
        driver.send(frame(mac(2), mac(1)))
        assert host.receive() == frame(mac(2), mac(1))
    host.send(frame(mac(1), mac(2)))
    got: list[bytes] = []
    while frame(mac(1), mac(2)) not in got:
        got += [data for driver in a.drivers for data in driver.pending()]


def test_deleted_interface_takes_the_link_down(tap: MakeTap, lane: LocalLane, caplog: pytest.LogCaptureFixture) -> None:
    a, host = tap()
    changes = LinkChanges(a.net)
    a.driver.send(frame(mac(2), mac(1)))
    assert host.receive() == frame(mac(2), mac(1))

    host.delete()
    changes.wait(up=False)
    drops = a.tx_drops
    a.driver.send(frame(mac(2), mac(1)))
    assert a.tx_drops == drops + 1
    assert caplog.text.count("the link is down") == 1
    lane.run(lambda: a.net.announce(mac(1)))


def test_fds_that_are_no_tap_are_refused(lane: LocalLane, need_namespaces: None) -> None:
    with open("/dev/null", "rb", buffering=0) as null:
        device = net(backend="tap", tap_fd=os.dup(null.fileno()))
        with pytest.raises(ConfigError, match="expected a tap interface"):
            device.open(lane)

    def tun() -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, net_tap.TUNSETIFF, struct.pack("16sH22x", b"tun8", 0x1001))
        with pytest.raises(ConfigError, match="found a tun interface"):
            net(backend="tap", tap_fd=fd).open(lane)

    in_namespace(tun)


def test_interface_in_use_is_refused_by_name(lane: LocalLane, need_namespaces: None) -> None:
    def body() -> None:
        fd = open_tap("tap8", net_tap.IFF_VNET_HDR)
        with pytest.raises(ConfigError, match='"tap8": it is in use'):
            net(backend="tap", ifname="tap8").open(lane)
        os.close(fd)

    in_namespace(body)

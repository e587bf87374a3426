"""Network device (virtio 1.3, 5.1): queue pairs of a guest, and one of several places for its frames.

Frames are moved by compiled code (:mod:`hcd.dataplane.switch`); here are the options, the features, the configuration
space and the choice of the link. No offloads are offered: frames are whole, with their checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hcd_protocols.virtio.features import NetFeature
from hcd_protocols.virtio.ids import DeviceId
from hcd_protocols.virtio.net import LinkStatus, NetConfig

from hcd.dataplane.switch import MAX_FRAME, QueuePort
from hcd.device import ConfigError, Device, DeviceError, Lane, Option, Virtqueue
from hcd.devices.net_link import HubLink, Link
from hcd.devices.net_stream import StreamLink
from hcd.devices.net_tap import OVERHEAD, TapLink

__all__ = ["Net"]

#: vhost-user protocol features: SEND_RARP and NET_SET_MTU (vhost-user.rst, "Protocol features")
PROTOCOL_RARP, PROTOCOL_MTU = 1 << 2, 1 << 4
#: what IPv4 asks of every link at least, and what the configuration space has room for (5.1.4.1)
MIN_MTU, MAX_MTU = 68, 65535
MAX_PAIRS = 8
#: which option belongs to which backend
BACKEND_OPTIONS = {"hub": "hub", "ifname": "tap", "tap_fd": "tap", "stream": "stream"}
TX, RX = 0, 1


class Net(Device):
    """A network card. Even queues receive, odd ones transmit."""

    virtio_id = DeviceId.NET
    description = "network card on a hub, a tap interface or a stream socket"
    operations = ("tx", "rx")
    in_order = True
    vhost_user_type = "net"
    options = (
        Option("backend", "str", "where frames go", "hub", choices=("hub", "tap", "stream")),
        Option("hub", "str", "hub: its name; devices of this process on one hub reach each other (default hub0)"),
        Option("ifname", "str", "tap: the interface to open, or to make"),
        Option("tap-fd", "fd", "tap: an inherited fd of the interface instead"),
        Option("stream", "path", "stream: the unix socket to connect to (QEMU -netdev stream, passt)"),
        Option("mac", "str", "MAC address that the guest is told"),
        Option("mtu", "int", "MTU that the guest is told", minimum=MIN_MTU, maximum=MAX_MTU),
        Option("queue-pairs", "int", "pairs of queues", 1, minimum=1, maximum=MAX_PAIRS),
        Option("mrg-rxbuf", "bool", "let large frames span several receive buffers", True),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._mac = _parse_mac(self.option["mac"]) if self.option["mac"] is not None else None
        self._mtu: int | None = self.option["mtu"]
        self._pairs: int = self.option["queue_pairs"]
        self._check_options()
        self.port = QueuePort(name, limit=_limit(self._mtu), rx_op=RX, tx_op=TX)
        self.link = self._make_link()
        self._largest = self.port.limit  # while no front end says less

    def _check_options(self) -> None:
        backend = self.option["backend"]
        for key, owner in BACKEND_OPTIONS.items():
            if self.option[key] is not None and owner != backend:
                raise ConfigError(f'option "{key.replace("_", "-")}" is for backend "{owner}", not "{backend}"')
        if backend == "tap" and (self.option["ifname"] is None) == (self.option["tap_fd"] is None):
            raise ConfigError('backend "tap" needs one of the options "ifname" and "tap-fd"')
        ifname = self.option["ifname"]
        if ifname is not None and not 1 <= len(ifname.encode()) <= 15:
            raise ConfigError(f'option "ifname": expected 1 to 15 bytes, found "{ifname}"')
        if backend == "stream" and self.option["stream"] is None:
            raise ConfigError('backend "stream" needs the option "stream"')

    def _make_link(self) -> Link:
        common = (self.port, self.log, lambda: self.notify_config_change())
        option = self.option
        if option["backend"] == "tap":
            return TapLink(option["ifname"], option["tap_fd"], *common)
        if option["backend"] == "stream":
            return StreamLink(option["stream"], *common)
        return HubLink(option["hub"] or "hub0", *common)

    # -- what it is

    @property
    def num_queues(self) -> int:
        return 2 * self._pairs

    @property
    def features(self) -> int:
        features = NetFeature.STATUS
        if self._mac is not None:
            features |= NetFeature.MAC
        if self._mtu is not None:
            features |= NetFeature.MTU
        if self.option["mrg_rxbuf"]:
            features |= NetFeature.MRG_RXBUF
        if self._pairs > 1:
            features |= NetFeature.MQ  # the control queue that goes with it is the front end's
        return int(features)

    @property
    def protocol_features(self) -> int:
        return PROTOCOL_RARP | PROTOCOL_MTU

    def config(self) -> bytes:
        return NetConfig(
            mac=self._mac or bytes(6),
            status=int(LinkStatus.LINK_UP) if self.link.up else 0,
            max_virtqueue_pairs=self._pairs,
            mtu=self._mtu or 0,
        ).to_bytes()

    def set_mtu(self, mtu: int) -> None:
        """The front end tells the guest ``mtu``: larger frames are not for it."""
        highest = self._mtu or MAX_MTU
        if not MIN_MTU <= mtu <= highest:
            raise DeviceError(f"an MTU of {mtu}; expected {MIN_MTU} to {highest}")
        self.port.limit = min(self._largest, _limit(mtu))

    def announce(self, mac: bytes) -> None:
        """Tell the network that ``mac`` is here now: a reverse ARP request of its own (RFC 903)."""
        self.link.announce(_rarp(mac))

    # -- its life

    def open(self, lane: Lane) -> None:
        self.link.open(lane, self._pairs)
        self._largest = self.port.limit

    def close(self) -> None:
        self.link.close()

    def disconnect(self) -> None:
        self.port.limit = self._largest

    def start_queue(self, queue: Virtqueue) -> None:
        if queue.index % 2 == 0:
            self.link.start_receiving(queue)

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index % 2 == 0:
            self.link.stop_receiving(queue)
        else:
            self.link.stop_sending(queue)

    def process(self, queue: Virtqueue) -> None:
        if queue.index % 2:
            self.link.transmit(queue)
        else:
            self.link.refilled(queue)


def _limit(mtu: int | None) -> int:
    """Bytes of the largest frame under ``mtu``."""
    return MAX_FRAME if mtu is None else min(mtu + OVERHEAD, MAX_FRAME)


def _parse_mac(text: str) -> bytes:
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError(f'option "mac": expected a station address such as 52:54:00:12:34:56, found "{text}"')
    return mac


def _rarp(mac: bytes) -> bytes:
    """Broadcast from ``mac``: Ethernet and IPv4 (1, 0x0800, 6, 4), request reverse (3), for itself."""
    body = bytes.fromhex("0001 0800 06 04 0003") + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + b"\x80\x35" + body).ljust(60, b"\0")

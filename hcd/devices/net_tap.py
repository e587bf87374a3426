"""A tap interface of the host as the other end of the guest's cable (Linux, Documentation/networking/tuntap.rst).

Theory of operation.

* The interface carries a virtio header before each frame (IFF_VNET_HDR), always 12 bytes here, little-endian and
  empty: no offload is offered to the guest, so none is asked of the kernel. The rings' own headers are made anew.
* Frames are read straight into receive buffers. Without buffers the fd is not watched: frames wait in the interface's
  queue, where the kernel drops what is too much, and a kick of the receive queue starts it again.
* With several queue pairs there is one fd for each (IFF_MULTI_QUEUE), and the kernel spreads the flows. An inherited fd
  is one; its frames go to the first pair. It must have been opened with IFF_NO_PI.
* Writing does not wait: what the interface cannot take is dropped, as on any network.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Any

from hcd.device import ConfigError, Handle, Lane, Virtqueue
from hcd.devices.net_link import Link

__all__ = ["OVERHEAD", "TapLink"]

#: bytes of a frame beside the MTU: addresses, type and two VLAN tags
OVERHEAD = 22

HEADER = 12
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
TUNSETIFF, TUNGETIFF = 0x400454CA, 0x800454D2
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
SIOCGIFMTU = 0x8921
#: struct ifreq: name, then flags or MTU, 40 bytes in all
IFREQ_FLAGS = struct.Struct("16sH22x")
IFREQ_MTU = struct.Struct("16si20x")


class TapLink(Link):
    """``ifname``: the interface to open or make. ``fd``: an inherited fd instead, ours from now on."""

    def __init__(self, ifname: str | None, fd: int | None, *common: Any) -> None:
        super().__init__(*common)
        self._ifname = ifname
        self._inherited = fd
        self._fds: list[int] = []
        self._headers: list[int] = []
        self._watches: dict[int, Handle] = {}
        self._lane: Lane

    def open(self, lane: Lane, pairs: int) -> None:
        self._lane = lane
        try:
            if self._inherited is not None:
                self._adopt(self._inherited)
            else:
                assert self._ifname is not None
                for _ in range(pairs):
                    self._attach(self._ifname, pairs > 1)
        except BaseException:
            self.close()
            raise

    def _attach(self, ifname: str, multi_queue: bool) -> None:
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"/dev/net/tun: {error.strerror}") from None
        self._fds.append(fd)
        self._headers.append(HEADER)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi_queue else 0)
        try:
            name = fcntl.ioctl(fd, TUNSETIFF, IFREQ_FLAGS.pack(ifname.encode(), flags))[:16]
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
            fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
            self._limit(name)
        except OSError as error:
            raise ConfigError(f'tap interface "{ifname}": {_reason(error)}') from None

    def _adopt(self, fd: int) -> None:
        self._fds.append(fd)
        try:
            name, flags = IFREQ_FLAGS.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ_FLAGS.size)))
            # Packet information cannot be told: TUNGETIFF has another meaning for the bit of IFF_NO_PI (IFF_NOFILTER).
            if not flags & IFF_TAP:
                raise ConfigError(f"tap-fd {fd}: expected a tap interface, found a tun interface")
            if flags & IFF_VNET_HDR:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
                fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
            self._headers.append(HEADER if flags & IFF_VNET_HDR else 0)
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
            self._limit(name)
        except OSError as error:
            raise ConfigError(f"tap-fd {fd}: expected a tap interface: {_reason(error)}") from None

    def _limit(self, name: bytes) -> None:
        """Receive buffers are taken for the largest frame that the interface can have for us."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
            try:
                answer = fcntl.ioctl(asker, SIOCGIFMTU, IFREQ_MTU.pack(name, 0))
            except OSError as error:
                # The fd may have come from another network namespace: then the guest's own limit stands.
                if error.errno != errno.ENODEV:
                    raise
                return
        self.port.limit = min(self.port.limit, IFREQ_MTU.unpack(answer)[1] + OVERHEAD)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._headers.clear()

    # -- to the guest

    def start_receiving(self, queue: Virtqueue) -> None:
        super().start_receiving(queue)
        self.refilled(queue)

    def stop_receiving(self, queue: Virtqueue) -> None:
        self._unwatch(queue)
        super().stop_receiving(queue)

    def refilled(self, queue: Virtqueue) -> None:
        pair = queue.index // 2
        if self.up and pair < len(self._fds) and pair not in self._watches:
            self._watches[pair] = self._lane.watch(self._fds[pair], lambda: self._receive(queue))

    def _receive(self, queue: Virtqueue) -> None:
        pair = queue.index // 2
        try:
            if not self._read(queue, pair):
                return
            queue.enable_kicks()
            if self._read(queue, pair):  # buffers may have come just before kicks were asked for
                self._unwatch(queue)
        except OSError as error:
            self._fail(error)

    def _read(self, queue: Virtqueue, pair: int) -> bool:
        """Whether the guest has too few buffers for a frame."""
        return self.port.receive(queue.index, self._fds[pair], self._headers[pair])[1]

    def _unwatch(self, queue: Virtqueue) -> None:
        if watch := self._watches.pop(queue.index // 2, None):
            watch.cancel()

    # -- from the guest

    def transmit(self, queue: Virtqueue) -> None:
        if not self.up:
            super().transmit(queue)
            return
        pair = queue.index // 2 % len(self._fds)
        try:
            self.port.send(queue, self._fds[pair], self._headers[pair])
        except OSError as error:
            self._fail(error)

    def announce(self, frame: bytes) -> None:
        if self.up:
            try:
                os.write(self._fds[0], bytes(self._headers[0]) + frame)
            except OSError as error:
                self.log.warning("the announcement was not sent: %s", error.strerror)

    def _fail(self, error: OSError) -> None:
        """The interface is gone for good: somebody deleted it."""
        self.log.error("the tap interface fails: %s; the link is down", error.strerror)
        for watch in self._watches.values():
            watch.cancel()
        self._watches.clear()
        self.up = False
        self.changed()


def _reason(error: OSError) -> str:
    hints = {
        errno.EPERM: "no permission (CAP_NET_ADMIN, or an interface made for this user)",
        errno.EBUSY: "it is in use by another process",
        errno.EINVAL: "not a tap interface, or made with other flags (multi_queue, vnet_hdr)",
    }
    return hints.get(error.errno or 0, error.strerror or str(error))

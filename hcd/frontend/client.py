"""A vhost-user front end: negotiates, shares memory, runs queues.

The order of messages follows QEMU's: features, protocol features, owner, features back, status, memory,
rings, enable. Every step is a method of its own, so a test can leave one out, repeat it or do it too early;
``Frontend.open`` does them all. With ``acks`` and a back end that has REPLY_ACK, each message asks for a
status, so an error surfaces at the call that caused it; without, ``sync()`` makes sure that the back end has
seen everything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple, Self

from hcd_protocols.vhost_user import (
    BackChannelPeer,
    BackendRequest,
    MemoryRegion,
    ProtocolFeature,
    TransportFeature,
)

from hcd.frontend.errors import BackendError
from hcd.frontend.link import Link
from hcd.frontend.memory import Region, SharedMemory
from hcd.frontend.queue import Queue
from hcd.frontend.ring import DriverRing
from hcd.frontend.ring_packed import PackedRing
from hcd.frontend.ring_split import SplitRing

__all__ = ["DEVICE_FEATURES", "PROTOCOL_FEATURES", "Frontend", "InflightRegion"]

#: bits that belong to the device type, not to rings or transport (virtio 1.3, 2.2)
DEVICE_FEATURES = (1 << 24) - 1
#: what this front end understands and so accepts where offered
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CROSS_ENDIAN
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

#: device status bits, virtio 1.3 2.1
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8


class InflightRegion(NamedTuple):
    """What GET_INFLIGHT_FD brought; SET_INFLIGHT_FD carries the same. Sizes in bytes."""

    fd: int
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class Frontend:
    """One connection to a back end, and the queues on it.

    ``address`` is the path of the back end's socket, or a connected socket (then there is no ``reconnect``).
    ``timeout`` in seconds bounds each wait for the back end. Closing it closes the socket and the eventfds;
    the memory is closed too if the front end made it.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | socket.socket,
        *,
        memory: SharedMemory | None = None,
        memory_size: int = 16 << 20,
        timeout: float = 20.0,
        acks: bool = True,
    ) -> None:
        self.timeout = timeout
        self._acks = acks
        self._address = address
        self._owns_memory = memory is None
        self.memory = SharedMemory.of_size(memory_size) if memory is None else memory
        self.features = 0
        self.protocol_features = 0
        #: how many queues the back end has, as far as it said
        self.max_queues = 1
        #: how many regions it takes
        self.max_regions = 8
        self.queues: dict[int, Queue] = {}
        self._shared: list[Region] = []
        self._back_channel: socket.socket | None = None
        #: where the back end records requests in flight, if it was asked to; outlives connections
        self.inflight: InflightRegion | None = None
        try:
            self.link = self._connect()
        except BaseException:
            if self._owns_memory:
                self.memory.close()
            raise

    @classmethod
    def open(
        cls,
        address: str | os.PathLike[str] | socket.socket,
        *,
        queues: int = 1,
        size: int = 128,
        memory: SharedMemory | None = None,
        memory_size: int = 16 << 20,
        timeout: float = 20.0,
        acks: bool = True,
        version_1: bool = True,
        packed: bool = False,
        event_idx: bool = True,
        in_order: bool = False,
        device: int = DEVICE_FEATURES,
        protocol: int = PROTOCOL_FEATURES,
        first_kick: int = 0,
        inflight: bool = False,
    ) -> Self:
        """Connect, negotiate, share the memory and start ``queues`` queues of ``size`` entries.

        ``inflight``: have the back end record requests in flight, for the one that comes after it.
        """
        self = cls(address, memory=memory, memory_size=memory_size, timeout=timeout, acks=acks)
        try:
            self.negotiate(
                version_1=version_1,
                packed=packed,
                event_idx=event_idx,
                in_order=in_order,
                device=device,
                protocol=protocol,
            )
            if inflight:
                self.request_inflight(queues, size)
            self.share_memory()
            for index in range(queues):
                self.start_queue(index, size, first_kick=first_kick)
            self.driver_ok()
        except BaseException:
            self.close()
            raise
        return self

    def _connect(self) -> Link:
        if isinstance(self._address, socket.socket):
            return Link(self._address, timeout=self.timeout, acks=self._acks)
        return Link.connect(os.fspath(self._address), timeout=self.timeout, acks=self._acks)

    def close(self) -> None:
        """Hang up without a word, as a front end that dies does, and release everything."""
        self._hang_up()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        self._drop_inflight()
        if self._owns_memory:
            self.memory.close()

    def _hang_up(self) -> None:
        self.link.close()
        self._shared.clear()
        if self._back_channel is not None:
            self._back_channel.close()
            self._back_channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- negotiation

    def negotiate(
        self,
        *,
        version_1: bool = True,
        packed: bool = False,
        event_idx: bool = True,
        in_order: bool = False,
        device: int = DEVICE_FEATURES,
        protocol: int = PROTOCOL_FEATURES,
    ) -> None:
        """Agree on features. VERSION_1, RING_PACKED and IN_ORDER are required where asked for, the rest is
        taken if it is offered.

        ``device`` masks the device type's own bits, ``protocol`` the protocol features. Without protocol
        features (0, or not offered) the rings are enabled from the start.
        """
        offered = self.offered_features()
        need = TransportFeature.VERSION_1 * version_1
        need |= TransportFeature.RING_PACKED * packed | TransportFeature.IN_ORDER * in_order
        if need & ~offered:
            missing = TransportFeature(need & ~offered)
            raise BackendError(f"the back end does not offer {missing.name or hex(missing)}")
        take = TransportFeature.INDIRECT_DESC | TransportFeature.EVENT_IDX * event_idx
        take |= TransportFeature.PROTOCOL_FEATURES * bool(protocol)
        features = int(need | offered & (take | device & DEVICE_FEATURES))
        if features & TransportFeature.PROTOCOL_FEATURES:
            self._negotiate_protocol(protocol)
        self.link.tell(self.link.connection.set_owner)
        self.set_features(features)

    def offered_features(self) -> int:
        """GET_FEATURES."""
        return self.link.ask(self.link.connection.get_features).value

    def _negotiate_protocol(self, mask: int) -> None:
        connection = self.link.connection
        offered = self.link.ask(connection.get_protocol_features).value
        self.protocol_features = offered & mask
        self.link.tell(connection.set_protocol_features, self.protocol_features)
        if self.has(ProtocolFeature.MQ):
            self.max_queues = self.link.ask(connection.get_queue_num).value
        if self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.max_regions = self.link.ask(connection.get_max_mem_slots).value

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature was negotiated."""
        return bool(self.protocol_features & feature)

    def set_features(self, features: int) -> None:
        """SET_FEATURES, and the status that follows it."""
        self.features = features
        self.link.tell(self.link.connection.set_features, features)
        if self.has(ProtocolFeature.STATUS):
            self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)

    # -- status, configuration, the back channel

    def driver_ok(self) -> None:
        """The driver is ready. Without STATUS there is nobody to tell."""
        if self.has(ProtocolFeature.STATUS):
            self.set_status(self.status() | DRIVER_OK)

    def status(self) -> int:
        return self.link.ask(self.link.connection.get_status).value

    def set_status(self, status: int) -> None:
        self.link.tell(self.link.connection.set_status, status)

    def config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the configuration space. BackendError when the back end cannot give them."""
        reply = self.link.ask(self.link.connection.get_config, offset, size)
        data = reply.config
        if data is None:
            raise BackendError(f"the back end has no configuration bytes {offset} to {offset + size}")
        return data

    def write_config(self, offset: int, data: bytes) -> None:
        self.link.tell(self.link.connection.set_config, offset, data)

    def open_back_channel(self) -> None:
        """Give the back end a socket for its own requests."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.link.tell(self.link.connection.set_backend_req_fd, theirs.fileno())
        ours.settimeout(self.timeout)
        self._back_channel, self._peer = ours, BackChannelPeer()

    def wait_back_message(self) -> BackendRequest:
        """The next request of the back end, answered with success if it wants an answer."""
        if self._back_channel is None:
            raise ValueError("open_back_channel() first")
        while (message := self._peer.next_message()) is None:
            try:
                data = self._back_channel.recv(4096)
            except TimeoutError as error:
                raise BackendError("nothing came on the back channel") from error
            if not data:
                raise BackendError("the back end closed the back channel")
            self._peer.receive_data(data)
        self._back_channel.sendall(self._peer.reply(message))
        return message.request

    def sync(self) -> None:
        """Return when the back end has handled every message before this one."""
        self.link.ask(self.link.connection.get_features)

    # -- memory

    def share_memory(self, memory: SharedMemory | None = None) -> None:
        """Tell the back end of the regions of ``memory`` (from now on), or of ``self.memory`` as it is now.

        By memory slots where negotiated (only what changed is sent), else as a whole table.
        """
        if memory is not None:
            self.memory, self._owns_memory = memory, False
        wanted = self.memory.regions
        connection = self.link.connection
        if not self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            regions = [_wire_region(region) for region in wanted]
            self.link.tell(connection.set_mem_table, regions, [region.fd for region in wanted])
        else:
            for region in [region for region in self._shared if region not in wanted]:
                self.link.tell(connection.rem_mem_reg, _wire_region(region))
            for region in [region for region in wanted if region not in self._shared]:
                self.link.tell(connection.add_mem_reg, _wire_region(region), region.fd)
        self._shared = list(wanted)

    # -- requests in flight

    def request_inflight(self, queues: int, size: int) -> None:
        """Ask for a region that records the requests in flight of ``queues`` queues of ``size`` entries, and hand it
        over as the back end's. BackendError where it is not negotiated or not made.
        """
        if not self.has(ProtocolFeature.INFLIGHT_SHMFD):
            raise BackendError("the back end does not offer INFLIGHT_SHMFD")
        reply = self.link.ask(self.link.connection.get_inflight_fd, queues, size)
        if len(reply.fds) != 1:
            raise BackendError("the back end made no in-flight region")
        self._drop_inflight()
        self.inflight = InflightRegion(reply.fds[0], *reply.inflight)
        self.hand_over_inflight()

    def hand_over_inflight(self) -> None:
        """SET_INFLIGHT_FD with the region as it is."""
        region = self.inflight
        assert region is not None, "request_inflight() first"
        self.link.tell(
            self.link.connection.set_inflight_fd,
            region.mmap_size,
            region.mmap_offset,
            region.num_queues,
            region.queue_size,
            region.fd,
        )

    def _drop_inflight(self) -> None:
        if self.inflight is not None:
            os.close(self.inflight.fd)
            self.inflight = None

    # -- queues

    def start_queue(
        self,
        index: int,
        size: int = 128,
        *,
        region: int | None = None,
        big_endian: bool = False,
        first_kick: int = 0,
        enable: bool = True,
    ) -> Queue:
        """Make a ring of the negotiated kind in the shared memory and hand it over.

        ``region`` is the index of the memory region that holds it. ``first_kick`` is the count in the kick
        eventfd at hand-over. ``big_endian`` needs CROSS_ENDIAN and a legacy driver.
        """
        ring = self.make_ring(size, region=region, big_endian=big_endian)
        queue = Queue(index, ring, first_kick=first_kick)
        self.queues[index] = queue
        if big_endian:
            self.link.tell(self.link.connection.set_vring_endian, index, True)
        self.hand_over(queue, ring.initial_base, enable=enable)
        return queue

    def make_ring(self, size: int, *, region: int | None = None, big_endian: bool = False) -> DriverRing:
        """A ring of the negotiated kind, known to nobody yet."""
        event_idx = bool(self.features & TransportFeature.EVENT_IDX)
        in_order = bool(self.features & TransportFeature.IN_ORDER)
        if self.features & TransportFeature.RING_PACKED:
            return PackedRing(self.memory, size, event_idx=event_idx, in_order=in_order, region=region)
        return SplitRing(
            self.memory, size, event_idx=event_idx, in_order=in_order, big_endian=big_endian, region=region
        )

    def hand_over(self, queue: Queue, base: int, *, enable: bool = True) -> None:
        """Tell the back end everything about ``queue``; it starts at ``base``. Also after ``stop_queue``."""
        connection, index, ring = self.link.connection, queue.index, queue.ring
        queue.watch_fd = self.link.sock.fileno()
        self.link.tell(connection.set_vring_num, index, ring.size)
        self.link.tell(connection.set_vring_base, index, base)
        self.set_ring_address(queue)
        self.link.tell(connection.set_vring_err, index, queue.err_fd)
        self.link.tell(connection.set_vring_call, index, queue.call_fd)
        self.link.tell(connection.set_vring_kick, index, queue.kick_fd)
        if enable and self.features & TransportFeature.PROTOCOL_FEATURES:
            self.enable_queue(index)

    def set_ring_address(self, queue: Queue) -> None:
        user, ring = self.memory.user_addr, queue.ring
        self.link.tell(
            self.link.connection.set_vring_addr,
            queue.index,
            user(ring.desc),
            user(ring.device),
            user(ring.driver),
        )

    def enable_queue(self, index: int, on: bool = True) -> None:
        self.link.tell(self.link.connection.set_vring_enable, index, on)

    def stop_queue(self, index: int) -> int:
        """Stop the ring; returns the base at which it can go on. The ring and its eventfds stay."""
        return self.link.ask(self.link.connection.get_vring_base, index).vring_base

    # -- after a break

    def reconnect(self) -> None:
        """Connect again with the features of before and hand over every queue where the ring stands.

        Chains that the last back end had taken and not finished are served again: where it recorded requests in
        flight, exactly those; else see ``DriverRing.rewind``.
        """
        if isinstance(self._address, socket.socket):
            raise ValueError("there is no address to connect to again")
        self._hang_up()
        self.link = self._connect()
        self.offered_features()
        if self.protocol_features:
            self._negotiate_protocol(self.protocol_features)
        self.link.tell(self.link.connection.set_owner)
        self.set_features(self.features)
        if self.inflight is not None:
            self.hand_over_inflight()
        self.share_memory()
        for queue in self.queues.values():
            self.hand_over(queue, queue.ring.rewind())
        self.driver_ok()

    # -- for hostile tests

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are; see :meth:`Link.send_raw`."""
        self.link.send_raw(data, fds)

    def wait_hangup(self, timeout: float | None = None) -> bytes:
        """Wait until the back end has closed the connection; see :meth:`Link.wait_hangup`."""
        return self.link.wait_hangup(timeout)


def _wire_region(region: Region) -> MemoryRegion:
    return MemoryRegion(region.gpa, region.size, region.user_addr, region.mmap_offset)

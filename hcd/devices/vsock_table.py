"""Every connection of a guest: who is meant by a packet, who may speak next, and how many there may be.

* Connections that have something to say stand in a queue and speak by turns, one packet each, as long as the guest
  has receive buffers. Nothing is taken from a socket before there is one.
* Packets that belong to no connection are answered with RST. Those answers are the only packets that are kept as
  such; when too many wait the guest's transmit queue is not looked at until it has taken some.
* What a guest does wrong raises GuestError after its connection was ended.
"""

from __future__ import annotations

import random
import resource
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from hcd_protocols.virtio.vsock import HEADER_SIZE, HOST_CID, Header, Op, SocketType

from hcd.device import Counter, Gauge, GuestError, Lane, Request, Virtqueue
from hcd.devices.vsock_channel import Channel
from hcd.devices.vsock_connection import Broken, Connection, State, reset_of
from hcd.devices.vsock_host import Greeting, Poller
from hcd.devices.vsock_messages import MessageChannel

__all__ = ["Counts", "Table"]

#: ports of the host's ends of connections that the host asked for
FIRST_PORT, LAST_PORT = 1 << 30, (1 << 31) - 1
#: answers to packets without a connection that may wait for the guest to take them
MAX_STRAYS = 64
#: packets for the guest in a row: then it is the turn of other devices
BURST = 64
#: seconds in which a guest accepts a connection or refuses it
ANSWER_TIME = 20.0

#: descriptors of the process that no guest's connections get: they are for front ends, scrapers, other devices
RESERVED_FDS = 128

_ROOM = bytes(HEADER_SIZE)
#: sockets of the host by the type of a connection
_KINDS = {SocketType.STREAM: socket.SOCK_STREAM, SocketType.SEQPACKET: socket.SOCK_SEQPACKET}


class Counts(Protocol):
    """What is counted, see :mod:`hcd.devices.vsock`."""

    open: Gauge
    to_guest: Counter
    to_host: Counter

    def accepted(self, by: str) -> None: ...

    def refused(self, by: str) -> None: ...


class Table:
    """The connections of guest ``guest_cid``. Everything is for the lane's thread."""

    def __init__(
        self,
        guest_cid: int,
        *,
        limit: int,
        buffer: int,
        reach: Callable[[int, socket.SocketKind], socket.socket],
        counts: Counts,
    ) -> None:
        self.poller = Poller()
        self._guest_cid = guest_cid
        self._limit = limit
        self._buffer = buffer
        self._reach = reach
        self._counts = counts
        self._lane: Lane
        self._channels: dict[tuple[int, int], Channel] = {}
        self._lingering: set[Channel] = set()
        self._greetings: set[Greeting] = set()
        self._speakers: deque[Channel] = deque()
        self._strays: deque[Header] = deque()
        self._rx: Virtqueue | None = None
        self._held: Virtqueue | None = None  # the transmit queue, while strays wait
        # Not where an earlier process began: a driver may still hold its connections, and ignores requests on them.
        self._next_port = random.randint(FIRST_PORT, LAST_PORT)

    def start(self, lane: Lane) -> None:
        self._lane = lane
        self.poller.start(lane)

    def __len__(self) -> int:
        """Sockets of the host that are in use."""
        return len(self._channels) + len(self._lingering) + len(self._greetings)

    def reset(self) -> None:
        """The guest has no connections any more."""
        for channel in [*self._channels.values()]:
            channel.leave()
            self._review(channel)
        for greeting in [*self._greetings]:
            self._dismiss(greeting)
        self._strays.clear()
        self._speakers.clear()

    def close(self) -> None:
        """End everything, also what the host has not read yet."""
        self.reset()
        for channel in self._lingering:
            channel.end()
        self._lingering.clear()
        self.poller.close()

    # -- the guest's queues

    def start_receiving(self, queue: Virtqueue) -> None:
        queue.passive = True
        self._rx = queue
        self.pump()

    def stop_receiving(self) -> None:
        self._rx = None

    def stop_transmitting(self) -> None:
        self._held = None

    def transmit(self, queue: Virtqueue) -> None:
        """Take the packets of this turn. GuestError for one that is wrong; it is taken."""
        try:
            for request in queue:
                self._take(request)
                request.complete(0)
                if len(self._strays) >= MAX_STRAYS:
                    queue.passive = True
                    self._held = queue
                    break
        finally:
            self.pump()

    def pump(self) -> None:
        """Say what there is to be said, as long as the guest has buffers for it."""
        for _ in range(BURST):
            if self._rx is None or not (self._strays or self._speakers):
                break
            request = self._rx.pop()
            if request is not None:
                self._fill(request)
            elif not self._rx.enable_kicks():  # or it has buffers now
                break
        else:
            if self._rx is not None:
                self._rx.schedule()
        if self._held is not None and len(self._strays) < MAX_STRAYS:
            self._held.passive = False
            self._held.schedule()
            self._held = None

    def _fill(self, request: Request) -> None:
        queue = request.queue
        if request.writable_size <= HEADER_SIZE:
            request.status = 1
            request.complete(0)
            queue.stats.guest_errors += 1
        elif not self._say(request):
            queue.unpop(request)

    def _say(self, request: Request) -> bool:
        """The next packet into ``request``; False when there is none after all."""
        if self._strays:
            request.write(self._strays.popleft().to_bytes())
            request.complete()
            return True
        request.write(_ROOM)
        while self._speakers:
            channel = self._speakers.popleft()
            channel.queued = False
            size = channel.speak(request)
            self._review(channel)
            if size is not None:
                self._counts.to_guest.inc(size)
                return True
        return False

    # -- packets of the guest

    def _take(self, request: Request) -> None:
        try:
            header = Header.from_bytes(request.read(HEADER_SIZE))
        except ValueError as error:
            raise GuestError(str(error)) from None
        if header.src_cid != self._guest_cid:
            raise GuestError(f"a packet from CID {header.src_cid}; the guest is {self._guest_cid}")
        if header.len > request.readable:
            raise GuestError(f"a packet of {header.len} bytes with {request.readable} bytes of payload")
        channel = self._channels.get((header.src_port, header.dst_port))
        if header.dst_cid != HOST_CID or header.type not in _KINDS:
            self._refuse(header)
        elif header.op == Op.REQUEST:
            if channel is not None:  # it knows nothing of that one: a guest that was restarted
                channel.leave()
                self._review(channel)
            self._accept(header)
        elif channel is None:
            self._refuse(header)
        else:
            self._hand_on(channel, header, request)

    def _hand_on(self, channel: Channel, header: Header, request: Request) -> None:
        connection = channel.connection
        if connection.ending and header.op != Op.RST:
            return
        asking = connection.state is State.ASKING
        try:
            connection.receive(header)
        except Broken as broken:
            connection.abort()
            self._review(channel)
            raise GuestError(f"port {header.src_port} to {header.dst_port}: {broken}") from None
        if header.op == Op.RW:
            channel.deliver(request, header)
            self._counts.to_host.inc(header.len)
        elif asking and connection.state is State.OPEN:
            self._counts.accepted("host")
            channel.opened()
        elif asking:
            self._counts.refused("host")
        channel.settle()
        self._review(channel)

    def _refuse(self, header: Header) -> None:
        if header.op != Op.RST:
            self._strays.append(reset_of(header))

    def _accept(self, header: Header) -> None:
        """The guest wants to reach a port of the host."""
        try:
            sock = self._admitted(self._reach(header.dst_port, _KINDS[SocketType(header.type)]))
        except OSError:
            self._counts.refused("guest")
            self._refuse(header)
            return
        channel = self._add(sock, header.src_port, header.dst_port, State.ACCEPTING)
        channel.connection.learn_credit(header)
        self._counts.accepted("guest")
        self._review(channel)

    # -- the host's side

    def enter(self, sock: socket.socket) -> None:
        """Somebody on the host wants to reach the guest."""
        try:
            if self._rx is None:
                sock.close()
                raise ConnectionRefusedError
            self._admitted(sock)
        except OSError:
            self._counts.refused("host")
            return
        self._greetings.add(Greeting(sock, self._lane, self.poller, self._greeted))

    def _greeted(self, greeting: Greeting, port: int | None) -> None:
        if port is None or self._rx is None:
            self._counts.refused("host")
            self._dismiss(greeting)
            return
        self._greetings.discard(greeting)
        channel = self._add(greeting.socket, port, self._free_port(port), State.ASKING)
        channel.timer = self._lane.call_later(ANSWER_TIME, lambda: self._give_up(channel))
        self._review(channel)
        self.pump()

    def _dismiss(self, greeting: Greeting) -> None:
        self._greetings.discard(greeting)
        greeting.stop()
        greeting.socket.close()

    def _give_up(self, channel: Channel) -> None:
        if channel.connection.state is State.ASKING:
            self._counts.refused("host")
            channel.connection.abort()
            self._review(channel)
            self.pump()

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = self._next_port
            self._next_port = FIRST_PORT if port == LAST_PORT else port + 1
            if (guest_port, port) not in self._channels:
                return port

    def _admitted(self, sock: socket.socket) -> socket.socket:
        """``sock``, or ConnectionRefusedError where that is one too many for the device or for the process."""
        if len(self) >= self._limit or sock.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FDS:
            sock.close()
            raise ConnectionRefusedError
        return sock

    # -- channels

    def _add(self, sock: socket.socket, guest_port: int, host_port: int, state: State) -> Channel:
        messages = sock.type is socket.SOCK_SEQPACKET
        kind = SocketType.SEQPACKET if messages else SocketType.STREAM
        connection = Connection(self._guest_cid, guest_port, host_port, state, self._buffer, kind)
        channel = (MessageChannel if messages else Channel)(connection, sock, self.poller, self._changed)
        self._channels[connection.key] = channel
        self._counts.open.set(len(self._channels))
        return channel

    def _changed(self, channel: Channel) -> None:
        self._review(channel)
        self.pump()

    def _review(self, channel: Channel) -> None:
        """Put ``channel`` where it belongs now."""
        connection = channel.connection
        if connection.state is not State.ASKING and channel.timer is not None:
            channel.timer.cancel()
            channel.timer = None
        if connection.state is not State.GONE:
            if channel.wants_to_speak and not channel.queued:
                channel.queued = True
                self._speakers.append(channel)
            return
        if self._channels.get(connection.key) is channel:
            del self._channels[connection.key]
            self._counts.open.set(len(self._channels))
        if channel.over:
            self._lingering.discard(channel)
        else:
            self._lingering.add(channel)

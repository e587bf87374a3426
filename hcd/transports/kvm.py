"""Transport kvm: the sockets on which VMMs come for raw doorbells.

Theory of operation.

* KVM takes registrations for a virtual machine from the process that owns it and from no other. So hcd makes the
  eventfds, and the VMM, connected to the device's socket, registers them (docs/doorbells.md has the protocol).
* The eventfds belong to the connection. hcd's copies are closed with it, so the next VMM gets its own: an eventfd can
  back one irqfd only. A VMM that kept its copies offers them again, and those that still fit are adopted.
* Interrupts and memory are there before the first doorbell, and rings are looked at only when the whole table is
  answered and the device is connected. Those that came before wait in their eventfds.
* When the VMM goes, what it rang until then is still counted and handled. When hcd goes, it stays in the eventfds: a
  VMM that holds on to them brings it to the next hcd.
"""

from __future__ import annotations

import array
import errno
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio
from hcd_protocols.doorbell import (
    MAX_ITEMS,
    MAX_MESSAGE,
    Answers,
    Attach,
    ClockChanged,
    HostConnection,
    HostEvent,
    Item,
    PeerError,
)

from hcd import sockets
from hcd.attachment import Attachment
from hcd.dataplane.virtqueue import Virtqueue
from hcd.doorbell_host import DoorbellHost, HostedDoorbell
from hcd.errors import ProtocolError
from hcd.host import RingState
from hcd.transports.accept import accept_one_at_a_time, hung_up, peer_of, shown_pid

__all__ = ["HELLO_TIMEOUT", "serve", "serve_connected"]

#: a VMM that has connected says hello within this time (seconds), or makes room for another
HELLO_TIMEOUT = 10.0
#: how long (seconds) the last message of a connection may take to be sent and read
LAST_TIMEOUT = 1.0

_Observe = Callable[[str, bytes, int], None]
_Change = tuple[Sequence[HostedDoorbell], Sequence[HostedDoorbell]]


async def serve(host: DoorbellHost, listener: socket.socket, *, exit_on_disconnect: bool = False) -> None:
    """Serve VMMs that connect to ``listener``, one at a time, until cancelled.

    ``exit_on_disconnect``: return when the first session has ended.
    """
    await accept_one_at_a_time(
        host,
        listener,
        lambda sock: _Session(host, sock),
        what="VMM",
        refuse=_say_busy,
        exit_on_disconnect=exit_on_disconnect,
    )


async def serve_connected(host: DoorbellHost, sock: socket.socket) -> None:
    """Serve the one VMM at the other end of ``sock``; returns when it has gone."""
    await _Session(host, trio.socket.from_stdlib_socket(sock.dup())).run()


async def _say_busy(sock: trio.socket.SocketType) -> None:
    refusal = HostConnection()
    refusal.send_error("another VMM is attached to this device", errno.EBUSY)
    await _send_last(sock, refusal, lambda direction, data, fds: None)


class _HungUp(Exception):
    """The VMM is gone."""


class _Session:
    """One connection of a VMM."""

    def __init__(self, host: DoorbellHost, sock: trio.socket.SocketType) -> None:
        self.host = host
        self.over = trio.Event()
        self.peer = peer_of(sock)
        self._sock = sock
        self._conn = HostConnection()
        self._sending = trio.Lock()
        self._name = ""
        self._attachment: Attachment | None = None
        self._lost = False
        self._last_words: tuple[str, int] | None = None
        token = trio.lowlevel.current_trio_token()
        report, self._changes = trio.open_memory_channel[_Change](math.inf)
        self._report_change = lambda added, gone: token.run_sync_soon(report.send_nowait, (added, gone))

    def hung_up(self) -> bool:
        return self._lost or hung_up(self._sock.fileno())

    # -- what may be told of it: it has no virtqueues

    features = 0
    protocol_features = 0
    can_notify = False

    def rings(self) -> Sequence[RingState]:
        return ()

    def queues(self) -> Sequence[Virtqueue]:
        return ()

    # -- life

    async def run(self) -> None:
        """Serve until the VMM goes, breaks the protocol, or this is cancelled. Raises nothing else."""
        self.host.session = self
        self.host.tell_observers("connected")
        try:
            await self._serve()
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            await self._until_it_ends(self._converse, nursery)
        if self._last_words is not None:
            # Descriptors first: one of them may be the VMM's own end of this socket.
            sockets.close_all(self._conn.take_unclaimed_fds())
            self._conn.send_error(*self._last_words)
            await _send_last(self._sock, self._conn, self.host.observe)

    async def _until_it_ends(self, part: Callable[[trio.Nursery], Awaitable[None]], nursery: trio.Nursery) -> None:
        """Run one of the two tasks of the connection; the other ends with it.

        Errors stay in here: one that left the nursery would keep itself and us in a cycle of references.
        """
        try:
            await part(nursery)
        except _HungUp:
            self.host.rare_log.log(logging.INFO, "VMMs that go", "VMM %s disconnected", self._shown())
        except ProtocolError as error:
            self.host.stats.protocol_errors += 1
            self.host.rare_log.error(
                "protocol errors", "the VMM %s broke the protocol: %s; its connection ends", self._shown(), error
            )
            self._last_words = (str(error), errno.EPROTO)
        except OSError as error:
            self.host.rare_log.warning(
                "failed connections", "the connection of the VMM %s failed: %s", self._shown(), error
            )
            self._last_words = (str(error), errno.EIO)
        self._lost = True
        nursery.cancel_scope.cancel()

    async def _converse(self, nursery: trio.Nursery) -> None:
        with trio.move_on_after(HELLO_TIMEOUT) as patience:
            while self._attachment is None:
                await self._receive()
                await self._handle_all()
        if patience.cancelled_caught:
            raise ProtocolError(f"no whole greeting within {HELLO_TIMEOUT:g} s")
        nursery.start_soon(self._until_it_ends, self._tell_changes, nursery)
        while True:
            await self._receive()
            await self._handle_all()

    def _shown(self) -> str:
        pid = f"(pid {shown_pid(self.peer)})"
        return f'"{self._name}" {pid}' if self._name else pid

    async def _close(self) -> None:
        attachment = self._attachment
        self.host.on_change = None
        if attachment is not None:
            if self._lost:
                await attachment.finish()
            await self.host.lane.run(attachment.disconnect)
            attachment.close()
        self._sock.close()
        sockets.close_all(self._conn.take_unclaimed_fds())
        self.host.tell_observers("disconnected")
        self.host.session = None
        self.over.set()

    # -- packets

    async def _receive(self) -> None:
        """Take one packet off the socket and hand it to the connection."""
        try:
            data, ancillary, flags, _ = await self._sock.recvmsg(
                MAX_MESSAGE, socket.CMSG_SPACE(MAX_ITEMS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # it went without reading what was sent to it
            raise _HungUp from None
        fds = sockets.received_fds(ancillary)
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            sockets.close_all(fds)
            if not data:
                raise _HungUp
            raise ProtocolError("a message that is too long, or more descriptors than this process may open")
        self.host.observe("in", data, len(fds))
        self._conn.receive_data(data, fds)

    async def _send(self) -> None:
        async with self._sending:
            for data, fds in self._conn.data_to_send():
                self.host.observe("out", data, len(fds))
                try:
                    await _send_packet(self._sock, data, fds)
                except (BrokenPipeError, ConnectionResetError):
                    raise _HungUp from None

    # -- events

    async def _handle_all(self) -> None:
        while (event := self._conn.next_event()) is not None:
            await self._handle(event)
        await self._send()
        attachment = self._attachment
        if attachment is not None and self._conn.idle and not attachment.connected:
            await self.host.lane.run(attachment.connect)
            say = self.host.rare_log.log
            say(logging.INFO, "VMMs that attach", "VMM %s attached: %s", self._shown(), attachment.summary())
            if attachment.untimed:
                say(logging.INFO, "rings without time", "rings are not timed: the VMM gave no TSC offset")

    async def _handle(self, event: HostEvent) -> None:
        if isinstance(event, Attach):
            await self._attach(event)
            return
        if isinstance(event, PeerError):
            self.host.rare_log.warning("VMMs that give up", "the VMM %s gives up: %s", self._shown(), event.text)
            raise _HungUp
        attachment = self._attachment
        assert attachment is not None
        await self.host.lane.run(lambda: _take_effect(event, attachment))

    async def _attach(self, event: Attach) -> None:
        host = self.host
        self._name = event.name or "?"
        attachment = self._attachment = Attachment(host, event.capabilities)
        doorbells = await host.lane.run(lambda: self._begin(attachment))
        groups: list[list[Item]] = [
            [] if host.memory is None else [host.memory],
            [one.item for one in host.interrupts.values()],
            [one.item for one in doorbells],
        ]
        adopted, stale = attachment.adopt(event.held, [item for group in groups for item in group])
        if event.held:
            host.rare_log.log(
                logging.INFO, "VMMs that are back", "the VMM %s is back: %d of its %d descriptors are good",
                self._shown(), len(adopted), len(event.held),
            )
        memory, interrupts, bells = map(len, groups)
        self._conn.welcome(host.spec.name, doorbells=bells, interrupts=interrupts, memory=memory)
        self._conn.remove(stale)
        for group in groups:
            self._conn.add(group, attachment.make_fds(group, adopted))
        self._conn.end()

    def _begin(self, attachment: Attachment) -> list[HostedDoorbell]:
        """On the lane: the doorbells as they are now; from now on changes are told."""
        self.host.on_change = self._report_change
        doorbells = list(self.host.doorbells.values())
        attachment.expect(doorbells)
        return doorbells

    async def _tell_changes(self, nursery: trio.Nursery) -> None:
        """The device changed its doorbells: tell the VMM."""
        attachment = self._attachment
        assert attachment is not None
        async for added, gone in self._changes:
            items = [one.item for one in added]
            await self.host.lane.run(lambda added=added: attachment.expect(added))  # type: ignore[misc]
            self._conn.remove([one.item.reference for one in gone])
            self._conn.add(items, attachment.make_fds(items))
            self._conn.end()
            await self._send()


def _take_effect(event: Answers | ClockChanged, attachment: Attachment) -> None:
    match event:
        case Answers(outcomes=outcomes, removed=False):
            attachment.settle(outcomes)
        case Answers(outcomes=outcomes):
            attachment.forget(outcome.reference for outcome in outcomes)
        case ClockChanged():
            attachment.set_clock(event.tsc_khz, event.tsc_offset)


async def _send_packet(sock: trio.socket.SocketType, data: bytes, fds: Sequence[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    await sock.sendmsg([data], ancillary)


async def _send_last(sock: trio.socket.SocketType, conn: HostConnection, observe: _Observe) -> None:
    """The last words of a connection, if the peer still takes them.

    A socket that is closed with packets unread makes the peer's next read fail, with the last words behind it. So what
    comes is read and dropped (the kernel closes descriptors that nobody asks for) until the peer hangs up.
    """
    with trio.move_on_after(LAST_TIMEOUT):
        try:
            for data, fds in conn.data_to_send():
                observe("out", data, len(fds))
                await _send_packet(sock, data, fds)
            sock.shutdown(socket.SHUT_WR)
            while await sock.recv(1):
                pass
        except OSError:
            return

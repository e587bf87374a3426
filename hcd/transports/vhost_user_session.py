"""One connection of a vhost-user front end, from its first message to its end.

Theory of operation.

* Messages are taken off the socket whole (message_socket.py). They take effect on the device's lane, one at a time, in
  their order (vhost_user_messages.py), and are answered after that.
* Around each message the session is kept for the next process (hcd/handover), where a service manager does that.
* The end waits for the requests in flight, ``drain_timeout`` at most: what a guest wrote should reach the disk.
* Nothing in here may stand in a cycle of references when the session is over. An idle daemon collects no garbage, and
  what a session holds on to is the memory of a guest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import trio
from hcd_protocols.vhost_user import BackendConnection
from hcd_protocols.vhost_user.features import ProtocolFeature

from hcd.backend import Backend
from hcd.dataplane.virtqueue import Virtqueue
from hcd.errors import ProtocolError
from hcd.handover.keeping import Keeping
from hcd.handover.record import Record
from hcd.handover.recovery import Handed
from hcd.handover.resume import resume
from hcd.host import DeviceHost, RingState
from hcd.sockets import close_all
from hcd.transports.accept import peer_of, shown_pid
from hcd.transports.message_socket import HungUp, MessageSocket
from hcd.transports.offered import offered_features, offered_protocol_features
from hcd.transports.ring_path import PathFinder
from hcd.transports.vhost_user_messages import Countdown, Messages

__all__ = ["Session"]


class Session:
    """One connection of a front end: ``sock``, which becomes its own. ``qmp_path`` is what QEMU calls its socket."""

    def __init__(
        self, host: DeviceHost, sock: trio.socket.SocketType, *, qmp_path: str, handed: Handed | None = None
    ) -> None:
        self.host = host
        self.over = trio.Event()
        self.peer = peer_of(sock)
        config_size = host.config_size()
        self._conn = BackendConnection(
            features=offered_features(host),
            protocol_features=offered_protocol_features(host, bool(config_size)),
            num_queues=host.device.num_queues,
            max_queue_size=host.device.max_queue_size,
            config_size=config_size,
        )
        self._link = MessageSocket(sock, self._conn, host.observe)
        self._path = PathFinder(host, qmp_path)
        self._handed = handed
        keeper, config = (handed.keeper, handed.record.config) if handed is not None else (None, b"")
        self._keeping = Keeping(host, self._conn, self._link, keeper, config)
        self._backend: Backend | None = None
        self._messages: Messages | None = None
        self._leaving = False
        self._gone = False  # the front end is, or is to be
        self._idle = trio.CancelScope()

    def hung_up(self) -> bool:
        """Whether the front end closed its end, even if hcd has not come round to it yet."""
        return self._link.hung_up()

    # -- what may be told of it

    @property
    def features(self) -> int:
        return self._conn.features

    @property
    def protocol_features(self) -> int:
        return self._conn.protocol_features

    @property
    def can_notify(self) -> bool:
        messages = self._messages
        return messages is not None and messages.has_back_channel and bool(
            self.protocol_features & ProtocolFeature.CONFIG
        )

    def rings(self) -> Sequence[RingState]:
        return [] if self._backend is None else self._backend.rings()

    def queues(self) -> Sequence[Virtqueue]:
        return [] if self._backend is None else self._backend.queues

    # -- life

    async def run(self) -> None:
        """Serve until the front end goes, breaks the protocol, or this is cancelled. Raises nothing else."""
        handed, self._handed = self._handed, None
        try:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery, handed)
                nursery.cancel_scope.cancel()
        finally:
            if handed is not None:
                handed.settle()
            with trio.CancelScope(shield=True):
                await self._close()

    async def _serve(self, nursery: trio.Nursery, handed: Handed | None) -> None:
        host = self.host
        try:
            backend = await host.lane.run(self._open)
            host.connected = True
            host.tell_observers("connected")
            messages = self._messages = Messages(
                host, self._conn, backend, self._keeping, partial(self._path.ask, nursery)
            )
            nursery.start_soon(self._watch_memory, backend.alarm, nursery.cancel_scope)
            if handed is None:
                host.rare_log.log(logging.INFO, "connections", "front end connected (pid %s)", shown_pid(self.peer))
                await self._keeping.begin(self, backend)
            elif await self._resume(handed, backend, messages):
                await self._catch_up(handed.record, nursery)
            else:
                return
            while await self._message_is_there():
                await self._take_message(messages)
            return
        except HungUp as end:
            if end.middle:
                self._protocol_error("the front end hung up in the middle of a message")
            else:
                host.rare_log.log(logging.INFO, "disconnections", "front end disconnected")
        except ProtocolError as error:
            self._protocol_error(str(error))
            await self._link.send_last()
        except OSError as error:
            host.rare_log.warning(
                "failed connections", "connection to the front end failed: %s", error.strerror or error
            )
        except Exception as error:  # the device in connect, start_queue ...: it ends this connection, nothing else
            host.device_failed("a method that the connection cannot go on without", error)
        self._gone = True

    def _open(self) -> Backend:
        """On the lane, and seen there at once: a wrapper that comes now finds the queues, or they find it."""
        self._backend = Backend(self.host)
        self.host.session = self
        return self._backend

    async def _message_is_there(self) -> bool:
        """Wait for one; False when this process is to leave first."""
        if not self._leaving:
            with trio.CancelScope() as self._idle:
                await self._link.wait()
                return True
        return False

    async def _take_message(self, messages: Messages) -> None:
        """Take one message, let it take effect and answer it. Dying in here ends the session."""
        self._keeping.message_comes()
        await self._link.receive()
        if (event := self._conn.next_event()) is not None:
            self._keeping.take(event)
            await messages.handle(event)
        await self._keeping.answer(self._conn.data_to_send())

    async def _watch_memory(self, alarm: int, session: trio.CancelScope) -> None:
        """End the session when the front end truncates the memory that it shared."""
        await trio.lowlevel.wait_readable(alarm)
        self._protocol_error("it truncated the memory that it shared")
        self._gone = True
        session.cancel()

    def _protocol_error(self, text: str) -> None:
        self.host.stats.protocol_errors += 1
        self.host.rare_log.error("protocol errors", "the front end (pid %s) broke the protocol: %s; its connection "
                                 "ends", shown_pid(self.peer), text)

    # -- the end

    async def _close(self) -> None:
        """Whatever goes wrong, descriptors are closed, and the next front end is let in."""
        host = self.host
        host.device.notify_config_change = lambda: None
        try:
            if self._backend is not None:
                await self._drain(self._backend)
                await host.lane.run(self._backend.close)
                await trio.to_thread.run_sync(self._backend.release_memory)
                await host.lane.run(self._path.give_up)
        finally:
            self._keeping.stop(leave=host.leaving and not self._gone)
            self._link.close()
            if self._messages is not None:
                self._messages.close()
            close_all(self._conn.take_unclaimed_fds())
            host.tell_observers("disconnected")
            host.session = None
            host.connected = False
            self.over.set()

    async def _drain(self, backend: Backend) -> None:
        drained = Countdown()
        busy = await self.host.lane.run(lambda: backend.begin_close(drained.from_any_thread))
        with trio.move_on_after(self.host.drain_timeout):
            await drained.wait(busy)

    # -- the next process, and the one before

    def leave(self) -> None:
        """End between two messages; the next process goes on. See :mod:`hcd.handover`."""
        self._leaving = True
        self._idle.cancel()

    async def _resume(self, handed: Handed, backend: Backend, messages: Messages) -> bool:
        """Go on with the session of an earlier process; whether that worked."""
        host, record, size = self.host, handed.record, self._conn.config_size
        try:
            if record.config and len(record.config) != size:
                raise ValueError(f"its configuration space had {len(record.config)} bytes, now {size}")
            channel = handed.take(record.channel)
            if channel >= 0:
                messages.open_back_channel(channel)
            await resume(handed, self._conn, backend)
        except Exception as error:
            self._gone = True
            host.stats.handovers_failed += 1
            host.log.warning("the session of an earlier process ends: %s", error)
            if not isinstance(error, ValueError | ProtocolError | OSError):
                host.device_failed("a method that the connection cannot go on without", error)
            return False
        else:
            host.kept = self
            host.stats.handovers_resumed += 1
            host.log.info("went on with the front end (pid %s) of an earlier process", shown_pid(self.peer))
            return True
        finally:
            handed.settle()

    async def _catch_up(self, record: Record, nursery: trio.Nursery) -> None:
        """What the process before this one did not get round to, and what has changed since."""
        await self._keeping.catch_up()
        if record.session.features:
            self._path.ask(nursery, record.session.features)
        if record.config:
            config = await self.host.lane.run(lambda: self.host.read_config(self._conn.config_size))
            if config and config != record.config:
                self.host.device.notify_config_change()

"""Transport vhost-user: the sockets on which front ends come.

Theory of operation.

* Each device has one listening socket for the life of the process. One front end at a time: a second is refused while
  the first is really there; one that comes while the last session is being torn down waits for that and is served.
* Messages are taken off the socket whole (message_socket.py). They take effect on the device's lane, one at a time, in
  their order, and are answered after that.
* GET_VRING_BASE waits for the requests in flight, and so does the end of a session: what a guest wrote should reach
  the disk. Both wait ``drain_timeout`` at most, because QEMU's main thread waits for the answer.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence

import trio
from hcd_protocols.vhost_user import BackChannel, BackendConnection, events
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.messages import describe

from hcd import qmp
from hcd.backend import Backend
from hcd.dataplane.memory import MemoryTable, Region
from hcd.dataplane.virtqueue import Inflight, Virtqueue
from hcd.doorbell import Path, PathSource
from hcd.errors import DeviceError, ProtocolError
from hcd.handover.fdstore import StoreError
from hcd.handover.keeper import Keeper
from hcd.handover.record import Record, fingerprint
from hcd.handover.recovery import Handed
from hcd.handover.resume import resume
from hcd.host import DeviceHost, RingState
from hcd.transports.accept import accept_one_at_a_time, peer_of, shown_pid
from hcd.transports.message_socket import Answers, HungUp, MessageSocket, close_all

__all__ = ["offered_features", "offered_protocol_features", "serve", "serve_connected"]

#: QEMU answers QMP only once its machine is built, which may take as long as other devices of it take
QMP_ATTEMPTS = 3
#: QEMU may open its QMP socket after it connects here (seconds)
QMP_PAUSE = 2.0


def offered_features(host: DeviceHost) -> int:
    """The feature bits that GET_FEATURES answers for the device of ``host``."""
    ring = (
        TransportFeature.ANY_LAYOUT
        | TransportFeature.INDIRECT_DESC
        | TransportFeature.EVENT_IDX
        | TransportFeature.PROTOCOL_FEATURES
        | TransportFeature.VERSION_1
        | TransportFeature.RING_PACKED
    )
    if host.device.in_order:
        ring |= TransportFeature.IN_ORDER
    return host.device.features | int(ring)


def offered_protocol_features(host: DeviceHost) -> int:
    """The protocol features that GET_PROTOCOL_FEATURES answers for the device of ``host``."""
    common = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CROSS_ENDIAN
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
    )
    if host.device.serves_config:
        common |= ProtocolFeature.CONFIG
    return host.device.protocol_features | int(common)


async def serve(
    host: DeviceHost,
    listener: socket.socket,
    *,
    exit_on_disconnect: bool = False,
    handed: dict[str, Handed] | None = None,
) -> None:
    """Serve front ends that connect to ``listener``, one at a time, until cancelled.

    ``exit_on_disconnect``: return when the first session has ended. ``handed``: sessions of an earlier process by
    their devices; that of this one is taken out and is the first.
    """
    qmp_path = _bound_path(listener) or host.spec.socket
    await accept_one_at_a_time(
        host,
        listener,
        lambda sock: _Session(host, sock, qmp_path=qmp_path),
        what="front end",
        exit_on_disconnect=exit_on_disconnect,
        session=_session_of(handed.pop(host.spec.name, None) if handed else None, host, qmp_path),
    )


def _session_of(handed: Handed | None, host: DeviceHost, qmp_path: str) -> _Session | None:
    if handed is None:
        return None
    connection = trio.socket.from_stdlib_socket(handed.connection())
    try:
        return _Session(host, connection, qmp_path=qmp_path, handed=handed)
    except Exception as error:
        connection.close()
        handed.close()
        handed.settled.set()
        host.handovers_failed += 1
        host.device_failed("what it is asked when a front end is taken over", error)
        return None


async def serve_connected(host: DeviceHost, sock: socket.socket) -> None:
    """Serve the one front end at the other end of ``sock``; returns when it has gone."""
    connected = trio.socket.from_stdlib_socket(sock.dup())
    await _Session(host, connected, qmp_path=_bound_path(sock) or host.spec.socket).run()


def _bound_path(sock: socket.socket) -> str:
    try:
        name = sock.getsockname()
    except OSError:
        return ""
    return name if isinstance(name, str) else ""


class _Session:
    """One connection of a front end."""

    def __init__(
        self, host: DeviceHost, sock: trio.socket.SocketType, *, qmp_path: str, handed: Handed | None = None
    ) -> None:
        self.host = host
        self.over = trio.Event()
        self.peer = peer_of(sock)
        self._qmp_path = qmp_path
        self._told_migration = False
        self._back_channel: socket.socket | None = None
        self._backend: Backend | None = None
        self._offered_inflight: Inflight | None = None
        self._path_scope: trio.CancelScope | None = None
        self._config_size = len(host.device.config()) if host.device.serves_config else 0
        self._conn = BackendConnection(
            features=offered_features(host),
            protocol_features=offered_protocol_features(host),
            num_queues=host.device.num_queues,
            max_queue_size=host.device.max_queue_size,
            config_size=self._config_size,
        )
        self._link = MessageSocket(sock, self._conn, host.observe)
        self._handed = handed
        self._keeper = handed.keeper if handed is not None else None
        self._config = handed.record.config if handed is not None else b""  # as the front end read it last
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
        return self._back_channel is not None and bool(self.protocol_features & ProtocolFeature.CONFIG)

    def rings(self) -> Sequence[RingState]:
        return [] if self._backend is None else self._backend.rings()

    def queues(self) -> Sequence[Virtqueue]:
        return [] if self._backend is None else self._backend.queues

    # -- life

    async def run(self) -> None:
        """Serve until the front end goes, breaks the protocol, or this is cancelled. Raises nothing else."""
        host = self.host
        handed, self._handed = self._handed, None
        backend = await host.lane.run(self._open)
        host.connected = True
        host.tell_observers("connected")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_memory, backend.alarm, nursery.cancel_scope)
                if handed is None:
                    host.rare_log.log(logging.INFO, "connections", "front end connected (pid %s)", shown_pid(self.peer))
                    await self._begin_keeping()
                    await self._serve(nursery)
                elif await self._resume(handed):
                    await self._serve(nursery, handed.record)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    def _open(self) -> Backend:
        """On the lane, and seen there at once: a wrapper that comes now finds the queues, or they find it."""
        self._backend = Backend(self.host)
        self.host.session = self
        return self._backend

    async def _serve(self, nursery: trio.Nursery, earlier: Record | None = None) -> None:
        host = self.host
        try:
            if earlier is not None:
                await self._catch_up(earlier, nursery)
            while await self._message_is_there():
                await self._take_message(nursery)
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
            host.log.warning("connection to the front end failed: %s", error.strerror or error)
        except Exception as error:  # the device in connect, start_queue ...: it ends this connection, nothing else
            host.device_failed("a method that the connection cannot go on without", error)
        self._gone = True

    async def _message_is_there(self) -> bool:
        """Wait for one; False when this process is to leave first."""
        if not self._leaving:
            with trio.CancelScope() as self._idle:
                await self._link.wait()
                return True
        return False

    async def _take_message(self, nursery: trio.Nursery) -> None:
        """Take one message, let it take effect and answer it. Dying in here ends the session."""
        if self._keeper is not None:
            self._keeper.busy = True
        await self._link.receive()
        if (event := self._conn.next_event()) is not None:
            await self._keep(lambda keeper: keeper.take(event))
            await self._handle(event, nursery)
        await self._answer(self._conn.data_to_send())

    async def _answer(self, answers: Answers) -> None:
        """Keep what the session is now, then answer. Dying between the two leaves the answer to the next process."""
        if any(fds for _, fds in answers):  # but an answer with descriptors cannot be left to it
            await self._commit()
            await self._link.send(answers)
            answers = ()
        else:
            await self._commit(b"".join(data for data, _ in answers))
        if self._keeper is None:
            await self._link.send(answers)
        else:
            self._keeper.busy = False
            await self._link.send_file(*self._keeper.unsent(), answers)

    async def _watch_memory(self, alarm: int, session: trio.CancelScope) -> None:
        """End the session when the front end truncates the memory that it shared."""
        await trio.lowlevel.wait_readable(alarm)
        self._protocol_error("it truncated the memory that it shared")
        self._gone = True
        session.cancel()

    def _protocol_error(self, text: str) -> None:
        self.host.protocol_errors += 1
        self.host.rare_log.error("protocol errors", "the front end (pid %s) broke the protocol: %s; its connection "
                                 "ends", shown_pid(self.peer), text)

    async def _close(self) -> None:
        host = self.host
        backend = self._backend
        host.device.notify_config_change = lambda: None
        if backend is not None:
            await self._drain_all(backend)
            await host.lane.run(backend.close)
            await host.lane.run(self._give_up_path)
        self._stop_keeping(leave=host.leaving and not self._gone)
        self._link.close()
        self._forget_offered()
        if self._back_channel is not None:
            self._back_channel.close()
        close_all(self._conn.take_unclaimed_fds())
        host.tell_observers("disconnected")
        host.session = None
        host.connected = False
        self.over.set()

    async def _drain_all(self, backend: Backend) -> None:
        drained = _Countdown()
        busy = await self.host.lane.run(lambda: backend.begin_close(drained.from_any_thread))
        with trio.move_on_after(self.host.drain_timeout):
            await drained.wait(busy)

    # -- the next process, and the one before

    def leave(self) -> None:
        """End between two messages; the next process goes on. See :mod:`hcd.handover`."""
        self._leaving = True
        self._idle.cancel()

    async def _begin_keeping(self) -> None:
        host = self.host
        if host.store is None or not host.store.usable:
            return
        backend = self._backend
        assert backend is not None
        try:
            self._keeper = Keeper.begin(host.store, host.spec.name, fingerprint(host.spec), self._link.fileno())
            area = Inflight.create(host.device.num_queues, host.device.max_queue_size)
            await host.lane.run(lambda: backend.set_inflight(area, own=True))
            self._keeper.take_own_inflight(area)
        except (StoreError, OSError) as error:
            self._cannot_keep(error)
            return
        host.kept = self
        await self._commit()
        if self._keeper is not None:
            self._keeper.busy = False

    async def _resume(self, handed: Handed) -> bool:
        """Go on with the session of an earlier process; whether that worked."""
        host, backend = self.host, self._backend
        assert backend is not None
        record = handed.record
        try:
            if record.config and len(record.config) != self._config_size:
                raise ValueError(f"its configuration space had {len(record.config)} bytes, now {self._config_size}")
            channel = handed.take(record.channel)
            if channel >= 0:
                self._open_back_channel(channel)
            await resume(handed, self._conn, backend)
        except Exception as error:
            self._gone = True
            host.handovers_failed += 1
            host.log.warning("the session of an earlier process ends: %s", error)
            if not isinstance(error, ValueError | ProtocolError | OSError):
                host.device_failed("a method that the connection cannot go on without", error)
            return False
        else:
            host.kept = self
            host.handovers_resumed += 1
            host.log.info("went on with the front end (pid %s) of an earlier process", shown_pid(self.peer))
            return True
        finally:
            handed.settled.set()
            close_all(fd for name in list(handed.fds) for fd in handed.fds.pop(name))

    async def _catch_up(self, record: Record, nursery: trio.Nursery) -> None:
        """What the process before this one did not get round to, and what has changed since."""
        await self._commit()
        if self._keeper is not None:
            await self._link.send_file(*self._keeper.unsent())
        if record.session.features:
            self._ask_for_path(record.session.features, nursery)
        if record.config and await self.host.lane.run(self.host.device.config) != record.config:
            self.host.device.notify_config_change()

    async def _keep(self, action: Callable[[Keeper], None]) -> None:
        if self._keeper is not None:
            try:
                action(self._keeper)
            except StoreError as error:
                self._cannot_keep(error)

    async def _commit(self, answer: bytes = b"") -> None:
        """The next process would go on from here."""
        if self._keeper is not None and not self._conn.failed:
            try:
                await self._keeper.commit(self._conn.save(), self._config, answer)
            except StoreError as error:
                self._cannot_keep(error)

    def _cannot_keep(self, error: StoreError | OSError) -> None:
        self.host.rare_log.warning("not kept", "a restart of hcd will end this connection: %s", error)
        self._stop_keeping(leave=False)

    def _stop_keeping(self, *, leave: bool) -> None:
        """``leave``: the next process goes on with the session. It does not if this one was in a message."""
        self.host.kept = None
        if self._keeper is not None:
            if leave:
                self._keeper.leave()
            else:
                self._keeper.end()
            self._keeper = None

    # -- messages

    async def _handle(self, event: events.Event, nursery: trio.Nursery) -> None:
        """Let ``event`` take effect and queue its answer."""
        match event:
            case events.GetVringBase():
                self._conn.reply_vring_base(event, await self._stop_ring(event.index))
            case events.GetConfig():
                self._conn.reply_config(event, await self._read_config(event))
            case events.GetStatus():
                self._conn.reply_status(event, self._conn.status)
            case events.SetConfig() | events.NetSetMtu() | events.SendRarp():
                accepted = await self._ask_device(event)
                if accepted and self._keeper is not None:
                    self._keeper.accepted(event)
                self._conn.ack(event, accepted)
            case events.GetInflightFd():
                self._offer_inflight(event)
            case events.SetMemTable() | events.AddMemReg() | events.RemMemReg():
                await self._change_memory(event)
                self._conn.ack(event)
            case _:
                await self._on_lane(event, nursery)
                self._conn.ack(event)

    async def _on_lane(self, event: events.Event, nursery: trio.Nursery) -> None:
        backend = self._backend
        assert backend is not None
        run = self.host.lane.run
        if isinstance(event, events.SetVringNum | events.SetVringBase) and await run(
            lambda: backend.is_idle_but_started(event.index)
        ):
            await self._stop_ring(event.index)  # user-mode Linux sets a ring up again without GET_VRING_BASE
        match event:
            case events.SetFeatures(features=features):
                enable_all = not features & TransportFeature.PROTOCOL_FEATURES
                await run(lambda: backend.set_features(features, enable_all=enable_all))
                self._ask_for_path(features, nursery)
            case events.SetProtocolFeatures():
                self._tell_migration()
            case events.SetVringNum(index=index, num=num):
                await run(lambda: backend.set_num(index, num))
            case events.SetVringBase(index=index, base=base):
                await run(lambda: backend.set_base(index, base))
            case events.SetVringEndian(index=index, big=big):
                await run(lambda: backend.set_endian(index, big))
            case events.SetVringAddr(index=index, desc=desc, avail=avail, used=used):
                await run(lambda: backend.set_addresses(index, desc, avail, used))
            case events.SetVringKick(index=index, fd=fd):
                spurious = await run(lambda: backend.set_kick(index, fd))
                if self._keeper is not None:
                    self._keeper.set_spurious(index, spurious)
            case events.SetVringCall(index=index, fd=fd):
                await run(lambda: backend.set_call(index, fd))
            case events.SetVringErr(index=index, fd=fd):
                await run(lambda: backend.set_err(index, fd))
            case events.SetVringEnable(index=index, enable=enable):
                await run(lambda: backend.set_enable(index, enable))
            case events.SetInflightFd(fd=fd, mmap_size=size, mmap_offset=offset, num_queues=queues, queue_size=most):
                area = Inflight.map(fd, offset, size, queues, most)
                await run(lambda: backend.set_inflight(area))
            case events.SetBackendReqFd(fd=fd):
                self._open_back_channel(fd)
            case events.ResetDevice() | events.ResetOwner():
                await run(backend.reset)
            case events.SetOwner() | events.SetStatus():
                pass
            case _:
                close_all(event.fds_carried)
                raise ProtocolError(f"{describe(event.request)} was never offered")

    async def _stop_ring(self, index: int) -> int:
        backend = self._backend
        assert backend is not None
        drained = _Countdown()
        if not await self.host.lane.run(lambda: backend.begin_stop(index, drained.from_any_thread)):
            with trio.move_on_after(self.host.drain_timeout):
                await drained.wait(1)
        return await self.host.lane.run(lambda: backend.finish_stop(index))

    # -- memory: mapped here, because mapping may take long, and handed to the lane as a whole

    async def _change_memory(self, event: events.Event) -> None:
        backend = self._backend
        assert backend is not None
        table = _new_table(backend.memory, event)
        await self.host.lane.run(lambda: backend.set_memory(table))

    def _offer_inflight(self, event: events.GetInflightFd) -> None:
        """Make a region for the record of requests in flight, which the front end keeps and hands back with rings."""
        self._forget_offered()
        area = self._offered_inflight = Inflight.create(event.num_queues, event.queue_size)
        self._conn.reply_inflight(event, area.size, area.offset, area.num_queues, area.queue_size, area.fd)

    def _forget_offered(self) -> None:
        if self._offered_inflight is not None:
            self._offered_inflight.close()
            self._offered_inflight = None

    # -- the device

    async def _read_config(self, event: events.GetConfig) -> bytes:
        """What the device has there; empty, which is the error form, when it returns something else."""
        try:
            config = await self.host.lane.run(self.host.device.config)
            if not isinstance(config, bytes) or len(config) != self._config_size:
                raise ValueError(f"{_size_of(config)} for a configuration space of {self._config_size} bytes")
        except Exception as error:
            self.host.device_failed("config()", error)
            return b""
        self._config = config
        return config[event.offset : event.offset + event.size]

    async def _ask_device(self, event: events.Event) -> bool:
        """What the device may refuse. A refusal is an answer, not the end of the connection."""
        device = self.host.device
        call: Callable[[], None]
        match event:
            case events.SetConfig(offset=offset, data=data):
                call = lambda: device.write_config(offset, data)  # noqa: E731
            case events.NetSetMtu(mtu=mtu):
                call = lambda: device.set_mtu(mtu)  # noqa: E731
            case events.SendRarp(mac=mac):
                call = lambda: device.announce(mac)  # noqa: E731
            case _:
                raise AssertionError(event)
        try:
            await self.host.lane.run(call)
        except DeviceError as error:
            self.host.rare_log.warning("refusals", "%s refused: %s", describe(event.request), error)
            return False
        except Exception as error:
            self.host.device_failed(f"{describe(event.request)}, which is refused now,", error)
            return False
        return True

    def _open_back_channel(self, fd: int) -> None:
        try:
            channel = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(f"the back channel's descriptor is no socket: {error.strerror}") from None
        channel.setblocking(False)
        if self._back_channel is not None:
            self._back_channel.close()
        self._back_channel = channel
        messages = BackChannel()
        token = trio.lowlevel.current_trio_token()

        def notify() -> None:
            message = messages.config_change()
            try:
                channel.send(message, socket.MSG_NOSIGNAL)
            except OSError as error:
                self.host.log.warning("the front end was not told of a configuration change: %s", error.strerror)
            else:
                token.run_sync_soon(self.host.observe, "back", message)

        self.host.device.notify_config_change = notify

    def _tell_migration(self) -> None:
        if not self._told_migration:
            self._told_migration = True
            self.host.rare_log.log(logging.INFO, "migration", "live migration is not offered yet: QEMU will refuse "
                                   "to migrate this guest")

    # -- paths

    def _ask_for_path(self, features: int, nursery: trio.Nursery) -> None:
        if self.host.asks_qemu:
            if self._path_scope is not None:
                self._path_scope.cancel()
            self._path_scope = trio.CancelScope()
            nursery.start_soon(self._find_path, features, self._path_scope)

    async def _find_path(self, features: int, scope: trio.CancelScope) -> None:
        host = self.host
        assert host.spec.qmp is not None
        answer: qmp.PathAnswer | None = None
        with scope:
            for attempt in range(QMP_ATTEMPTS):
                if attempt:
                    await trio.sleep(QMP_PAUSE)
                answer = await qmp.find_path(host.spec.qmp, self._qmp_path, features=features, log=host.log)
                if answer is not None:
                    break
            with trio.CancelScope(shield=True):
                await host.lane.run(lambda: self._take_answer(answer, features))

    def _take_answer(self, answer: qmp.PathAnswer | None, features: int) -> None:
        host = self.host
        if answer is None:
            if host.path_is_open:
                host.set_negotiated_path(features)
            return
        conflict = answer.conflict(host.spec.path)
        host.path_conflict = bool(conflict)
        if conflict:
            host.log.warning("%s", conflict)
        elif host.path_is_open:
            host.log.info("rings come by %s: %s (%s)", answer.path, answer.device, answer.kind)
            host.set_path(answer.path, PathSource.QMP, answer.kind, answer.place)
        else:
            host.set_place(answer.place)

    def _give_up_path(self) -> None:
        """Rings that were counted aside for an answer that never came belong to no known path."""
        if any(doorbell.pending for doorbell in self.host.doorbells):
            self.host.set_path(Path.UNKNOWN, PathSource.NONE)


class _Countdown:
    """Waits until something has happened so many times, on whatever thread."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._happened = trio.Semaphore(0)

    def from_any_thread(self) -> None:
        self._token.run_sync_soon(self._happened.release)

    async def wait(self, times: int) -> None:
        for _ in range(times):
            await self._happened.acquire()


def _size_of(config: object) -> str:
    return f"{len(config)} bytes" if isinstance(config, bytes) else type(config).__name__


def _new_table(old: MemoryTable, event: events.Event) -> MemoryTable:
    """The memory table after ``event``; its fds are closed, whatever happens."""
    try:
        match event:
            case events.SetMemTable(regions=regions, fds=fds):
                return MemoryTable([_map(region, fd) for region, fd in zip(regions, fds, strict=True)])
            case events.AddMemReg(region=region, fd=fd):
                return old.with_region(_map(region, fd))
            case events.RemMemReg(region=region):
                return old.without_region(region.guest_addr, region.size, region.user_addr)
    except LookupError as error:
        raise ProtocolError(f"{describe(event.request)}: {error}") from None
    finally:
        close_all(event.fds_carried)
    raise AssertionError(event)


def _map(region: events.MemoryRegion, fd: int) -> Region:
    return Region(region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd)

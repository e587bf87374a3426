"""What the messages of a front end do: each takes effect on the device's lane, and is answered after that.

GET_VRING_BASE waits for the requests in flight, ``drain_timeout`` at most, because QEMU's main thread waits for the
answer. Memory is mapped in trio, because that may take long, and handed to the lane as a whole. Another thread unmaps
it: that takes time for what was touched, and neither lane nor loop should wait.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import trio
from hcd_protocols.vhost_user import BackendConnection, events
from hcd_protocols.vhost_user.features import TransportFeature
from hcd_protocols.vhost_user.messages import describe

from hcd.backend import Backend
from hcd.dataplane.memory import MemoryTable, Region
from hcd.dataplane.virtqueue import Inflight
from hcd.errors import DeviceError, ProtocolError
from hcd.handover.keeping import Keeping
from hcd.host import DeviceHost
from hcd.sockets import close_all
from hcd.transports.back_channel import open_back_channel

__all__ = ["Countdown", "Messages"]


class Messages:
    """Carries out the messages of one session. ``on_features`` hears what a driver acknowledged, once that took
    effect."""

    def __init__(
        self,
        host: DeviceHost,
        connection: BackendConnection,
        backend: Backend,
        keeping: Keeping,
        on_features: Callable[[int], None],
    ) -> None:
        self._host = host
        self._conn = connection
        self._backend = backend
        self._keeping = keeping
        self._on_features = on_features
        self._told_migration = False
        self._offered_inflight: Inflight | None = None
        self._back_channel: socket.socket | None = None

    @property
    def has_back_channel(self) -> bool:
        return self._back_channel is not None

    def close(self) -> None:
        """Release what messages brought and the back end does not own; after that."""
        self._forget_offered()
        if self._back_channel is not None:
            self._back_channel.close()

    async def handle(self, event: events.Event) -> None:
        """Let ``event`` take effect, and queue its answer.

        ProtocolError when it cannot, OSError when hcd lacks something, and whatever the device raises in ``connect``
        and ``start_queue``. Descriptors of ``event`` are owned here or closed in any case.
        """
        match event:
            case events.GetVringBase():
                self._conn.reply_vring_base(event, await self._stop_ring(event.index))
            case events.GetConfig():
                self._conn.reply_config(event, await self._read_config(event))
            case events.GetStatus():
                self._conn.reply_status(event, self._conn.status)
            case events.SetConfig() | events.NetSetMtu() | events.SendRarp():
                accepted = await self._ask_device(event)
                if accepted:
                    self._keeping.accepted(event)
                self._conn.ack(event, accepted)
            case events.GetInflightFd():
                self._offer_inflight(event)
            case events.SetMemTable() | events.AddMemReg() | events.RemMemReg():
                await self._change_memory(event)
                self._conn.ack(event)
            case _:
                await self._on_lane(event)
                self._conn.ack(event)

    async def _on_lane(self, event: events.Event) -> None:
        backend, run = self._backend, self._host.lane.run
        if isinstance(event, events.SetVringNum | events.SetVringBase) and await run(
            lambda: backend.is_idle_but_started(event.index)
        ):
            await self._stop_ring(event.index)  # user-mode Linux sets a ring up again without GET_VRING_BASE
        match event:
            case events.SetFeatures(features=features):
                enable_all = not features & TransportFeature.PROTOCOL_FEATURES
                await run(lambda: backend.set_features(features, enable_all=enable_all))
                self._on_features(features)
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
                self._keeping.set_spurious(index, await run(lambda: backend.set_kick(index, fd)))
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
                self.open_back_channel(fd)
            case events.ResetDevice() | events.ResetOwner():
                await run(backend.reset)
            case events.SetOwner() | events.SetStatus():
                pass
            case _:
                close_all(event.fds_carried)
                raise ProtocolError(f"{describe(event.request)} was never offered")

    async def _stop_ring(self, index: int) -> int:
        backend = self._backend
        drained = Countdown()
        if not await self._host.lane.run(lambda: backend.begin_stop(index, drained.from_any_thread)):
            with trio.move_on_after(self._host.drain_timeout):
                await drained.wait(1)
        base = await self._host.lane.run(lambda: backend.finish_stop(index))
        if backend.has_old_memory:
            await trio.to_thread.run_sync(backend.release_memory)
        return base

    # -- memory

    async def _change_memory(self, event: events.Event) -> None:
        backend = self._backend
        table = _new_table(backend.memory, event)
        await self._host.lane.run(lambda: backend.set_memory(table))
        await trio.to_thread.run_sync(backend.release_memory)

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
        config = await self._host.lane.run(lambda: self._host.read_config(self._conn.config_size))
        if not config:
            return b""
        self._keeping.config = config
        return config[event.offset : event.offset + event.size]

    async def _ask_device(self, event: events.Event) -> bool:
        """What the device may refuse. A refusal is an answer, not the end of the connection."""
        device = self._host.device
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
            await self._host.lane.run(call)
        except DeviceError as error:
            self._host.rare_log.warning("refusals", "%s refused: %s", describe(event.request), error)
            return False
        except Exception as error:
            self._host.device_failed(f"{describe(event.request)}, which is refused now,", error)
            return False
        return True

    def open_back_channel(self, fd: int) -> None:
        """``fd`` becomes ours. ProtocolError when it is no socket."""
        before, self._back_channel = self._back_channel, open_back_channel(self._host, fd)
        if before is not None:
            before.close()

    def _tell_migration(self) -> None:
        if not self._told_migration:
            self._told_migration = True
            self._host.rare_log.log(logging.INFO, "migration", "live migration is not offered yet: QEMU will refuse "
                                   "to migrate this guest")


class Countdown:
    """Waits until something has happened so many times, on whatever thread."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._happened = trio.Semaphore(0)

    def from_any_thread(self) -> None:
        self._token.run_sync_soon(self._happened.release)

    async def wait(self, times: int) -> None:
        for _ in range(times):
            await self._happened.acquire()


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

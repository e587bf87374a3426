"""Set a session up again as an earlier process left it, without a word from the front end.

What a front end says in the course of a connection, the record says at once, and it takes effect in the same way and
order: features, memory, rings. Only what a message would be answered with is left out.
"""

from __future__ import annotations

from hcd_protocols.vhost_user import BackendConnection, SavedVring

from hcd.backend import Backend
from hcd.dataplane.memory import MemoryTable, Region
from hcd.dataplane.virtqueue import Inflight
from hcd.handover.record import RingRecord
from hcd.handover.recovery import Handed
from hcd.sockets import close_all

__all__ = ["resume"]


async def resume(handed: Handed, connection: BackendConnection, backend: Backend) -> None:
    """Make ``connection`` and ``backend``, which are new, those of ``handed``.

    ValueError if the device is another one now; ProtocolError if its memory cannot be mapped any more; and whatever
    the device raises in ``connect`` and ``start_queue``.
    """
    connection.restore(handed.record.session)
    table = _map(handed)
    area = _map_inflight(handed)
    await backend.host.lane.run(lambda: _restore(handed, backend, table, area))


def _map(handed: Handed) -> MemoryTable:
    record = handed.record
    fds = [handed.take(name) for name in record.region_names]
    try:
        return MemoryTable(
            [
                Region(region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd)
                for region, fd in zip(record.session.regions, fds, strict=True)
            ]
        )
    finally:
        close_all(fds)


def _map_inflight(handed: Handed) -> Inflight | None:
    found = handed.record.inflight
    if found is None:
        return None
    fd = handed.take(found.name)
    return Inflight.map(fd, found.mmap_offset, found.mmap_size, found.num_queues, found.queue_size)


def _restore(handed: Handed, backend: Backend, table: MemoryTable, area: Inflight | None) -> None:
    """On the lane. The device first: what it was told decides how requests are served."""
    record = handed.record
    device = backend.device
    for offset, data in sorted(record.config_writes.items()):
        device.write_config(offset, data)
    if record.session.features:
        backend.set_features(record.session.features, enable_all=False)
    if record.mtu is not None:
        device.set_mtu(record.mtu)
    if area is not None and record.inflight is not None:
        backend.set_inflight(area, own=record.inflight.own, resume=True)
    if table.regions:
        backend.set_memory(table)
    for index, (saved, ring) in enumerate(zip(record.session.vrings, record.rings, strict=True)):
        _restore_ring(handed, backend, index, saved, ring)


def _restore_ring(handed: Handed, backend: Backend, index: int, saved: SavedVring, ring: RingRecord) -> None:
    if not saved.started:
        backend.begin_anew(index)
    if saved.num:
        backend.set_num(index, saved.num)
    backend.set_base(index, saved.base)  # where it began; where it stands is in the record of requests in flight
    backend.set_endian(index, saved.big_endian)
    if saved.addr is not None:
        _, desc, used, avail, _ = saved.addr
        backend.set_addresses(index, desc, avail, used)
    if ring.err:
        backend.set_err(index, handed.take(ring.err))
    if ring.kick:
        # A spurious first ring is read as soon as the ring runs.
        spurious = ring.spurious and not (saved.started and saved.enabled)
        backend.set_kick(index, handed.take(ring.kick), spurious=spurious)
    backend.set_enable(index, saved.enabled)
    if saved.started:
        backend.owe_interrupt(index)
    if ring.call:
        backend.set_call(index, handed.take(ring.call))

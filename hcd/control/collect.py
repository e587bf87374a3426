"""A snapshot of a running daemon.

Taken in trio while the reactor goes on: each number is read at once (under the GIL), but two of them may be a request
apart. Nothing here touches a ring.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.virtio.features import BlkFeature, NetFeature, RingFeature
from hcd_protocols.virtio.ids import DeviceId

from hcd.control.snapshot import DeviceState, DoorbellState, Errors, PeerState, QueueState, Times
from hcd.dataplane.stats import DoorbellStats, Histogram, QueueStats
from hcd.doorbell import Doorbell, Path, PathSource, Registry
from hcd.host import DeviceHost, HostBase, RingState, SessionView

__all__ = ["collect_devices", "feature_names"]

_OF_DEVICE: Mapping[int, type[enum.IntFlag]] = {DeviceId.BLOCK: BlkFeature, DeviceId.NET: NetFeature}


def collect_devices(hosts: Sequence[HostBase], doorbells: Registry) -> list[DeviceState]:
    """The state of every device, in the order of ``hosts``."""
    bells: dict[str, list[Doorbell]] = {}
    for bell in doorbells:
        bells.setdefault(bell.device, []).append(bell)
    return [_device(host, bells.get(host.spec.name, [])) for host in hosts]


def _device(host: HostBase, bells: Iterable[Doorbell]) -> DeviceState:
    session = host.session
    virtio = host if isinstance(host, DeviceHost) else None
    virtio_id = 0 if virtio is None else int(type(virtio.device).virtio_id)
    return DeviceState(
        name=host.spec.name,
        type=host.spec.type,
        transport=host.transport,
        lane="trio" if host.is_async else "reactor",
        socket=host.spec.socket,
        peer=None if session is None else _peer(session, virtio_id),
        path_conflict=bool(host.stats.path_conflict),
        errors=Errors(host.stats.protocol_errors, host.stats.guest_errors, host.stats.handler_errors),
        capacity=None if virtio is None else virtio.storage_size(),
        limits={key: value for key, value in asdict(host.spec.limits).items() if value},
        stuck_after=host.spec.stuck_after,
        queues=[] if virtio is None else _queues(virtio, session),
        doorbells=[state for bell in bells for state in _doorbells(bell)],
    )


def _peer(session: SessionView, virtio_id: int) -> PeerState:
    peer = session.peer
    return PeerState(
        pid=peer.pid,
        command=peer.command,
        since=peer.since,
        features=feature_names(session.features, virtio_id),
        protocol_features=_names(session.protocol_features, (ProtocolFeature,)),
        can_notify=session.can_notify,
    )


def feature_names(features: int, virtio_id: int = 0) -> list[str]:
    """The names of feature bits, lowest first; "bit 21" where none is known."""
    known = (TransportFeature, RingFeature, *((_OF_DEVICE[virtio_id],) if virtio_id in _OF_DEVICE else ()))
    return _names(features, known)


def _names(bits: int, known: Sequence[type[enum.IntFlag]]) -> list[str]:
    names = {int(flag): flag.name for kind in known for flag in kind}
    return [names.get(1 << at) or f"bit {at}" for at in range(bits.bit_length()) if bits >> at & 1]


# -- queues


def _queues(host: DeviceHost, session: SessionView | None) -> list[QueueState]:
    rings = {} if session is None else {ring.index: ring for ring in session.rings()}
    return [_queue(index, stats, rings.get(index)) for index, stats in enumerate(host.queue_stats)]


def _queue(index: int, stats: QueueStats, ring: RingState | None) -> QueueState:
    operations = [
        (name, [stats.requests(op, status) for status in range(3)]) for op, name in enumerate(stats.operations)
    ]
    latency = Histogram()
    for op in range(len(operations)):
        latency.merge(stats.latency(op))
    set_up = ring is not None and bool(ring.size)
    return QueueState(
        index=index,
        state=_state(ring),
        broken="" if ring is None else ring.broken,
        format=None if ring is None or not set_up else "packed" if ring.packed else "split",
        size=None if ring is None or not set_up else ring.size,
        inflight=stats.inflight,
        oldest=stats.oldest_ns() / 1e9,
        requests={name: counts for name, counts in operations if any(counts)},
        found_by_ring=stats.found_by_ring,
        found_by_poll=stats.found_by_poll,
        bytes_from_guest=stats.bytes_from_guest,
        bytes_to_guest=stats.bytes_to_guest,
        interrupts=stats.interrupts_sent,
        interrupts_suppressed=stats.interrupts_suppressed,
        drops=stats.drops,
        throttled=stats.throttled_ns / 1e9,
        guest_errors=stats.guest_errors,
        handler_errors=stats.handler_errors,
        latency=_times(latency),
    )


def _state(ring: RingState | None) -> str:
    if ring is None:
        return "none"
    if ring.broken:
        return "broken"
    if ring.draining:
        return "draining"
    if not ring.started:
        return "stopped"
    return "running" if ring.enabled else "disabled"


def _doorbells(bell: Doorbell) -> Iterator[DoorbellState]:
    """One for each path that rings were counted under, the current one first."""
    yield _doorbell(bell, bell.path, bell.stats)
    for path, stats in bell.by_path.items():
        if stats is not bell.stats and (stats.rings or stats.dispatch.count):
            yield _doorbell(bell, path, stats)


def _doorbell(bell: Doorbell, path: Path, stats: DoorbellStats) -> DoorbellState:
    current = stats is bell.stats
    return DoorbellState(
        name=bell.queue,
        path=path.value,
        current=current,
        source=bell.source.value if current else PathSource.NONE.value,
        kind=bell.kind,
        transport=bell.transport,
        address=bell.address if current else "",
        registered=bell.registered,
        rings=stats.rings,
        wakeups=stats.wakeups,
        dispatch=_times(stats.dispatch),
        response=_times(stats.response),
        ring=_times(stats.ring),
    )


def _times(histogram: Histogram) -> Times:
    count = histogram.count
    if not count:
        return Times()
    return Times(
        count=count,
        sum=histogram.sum_ns / 1e9,
        p50=histogram.quantile(0.5) / 1e9,
        p99=histogram.quantile(0.99) / 1e9,
        buckets=histogram.cumulative(),
    )

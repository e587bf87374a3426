"""``hcd bench blk``: block requests against any vhost-user-blk back end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hcd_protocols.virtio.features import BlkFeature

from hcd.bench.load import MIX, READ, WRITE_ALL, BlkLoad
from hcd.bench.peer import Peer
from hcd.errors import ConfigError
from hcd.frontend.blk import BLOCK_FEATURES, read_config
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError
from hcd.frontend.memory import SharedMemory

__all__ = ["BlkCase", "BlkResult", "loading", "run", "start"]

RW = {"read": READ, "write": WRITE_ALL, "mix": MIX}
SECTOR = 512
#: before the measurement, so that caches are hot and the back end's polling has found its pace (seconds)
WARM_UP = 0.3


@dataclass(frozen=True, slots=True)
class BlkCase:
    """What to load with. ``size`` and ``span`` in bytes; ``span`` 0 is the whole disk."""

    socket: str
    depth: int = 32
    queues: int = 1
    size: int = 4096
    rw: str = "read"
    span: int = 0
    seconds: float = 3.0
    ring_size: int = 0
    packed: bool = False
    event_idx: bool = True
    poll: bool = False
    verify: bool = False


@dataclass(frozen=True, slots=True)
class BlkResult:
    """What came out. Latencies in seconds; ``longest_gap`` the longest time (seconds) in which no request was done;
    ``cpu_per_million`` the back end's processor seconds per million requests, nan where its process cannot be looked
    at."""

    requests: int
    seconds: float
    per_second: float
    p50: float
    p99: float
    p999: float
    longest_gap: float
    kicks_per_request: float
    calls_per_request: float
    errors: int
    mismatches: int
    cpu_per_million: float
    peak_memory: int


def ring_size(case: BlkCase) -> int:
    """Room for three descriptors a request; at least QEMU's default of 128."""
    if case.ring_size:
        return case.ring_size
    size = 128
    while size < 3 * case.depth:
        size *= 2
    return size


def run(case: BlkCase, memory: SharedMemory | None = None) -> BlkResult:
    """Load the back end at ``case.socket``. BackendError and TimeoutError when it fails; ConfigError for a case
    that it cannot take. ``memory`` is the guest's; None: as much as needed, in one region."""
    with loading(case, memory) as load:
        return load()


@contextmanager
def loading(case: BlkCase, memory: SharedMemory | None = None) -> Iterator[Callable[[], BlkResult]]:
    """Like :func:`run`, in one session for as many measurements as wanted: each call makes one. Errors and mismatches
    are those of the session so far."""
    if case.size % SECTOR or case.size <= 0:
        raise ConfigError(f"requests of {case.size} bytes: expected a multiple of {SECTOR}")
    size = ring_size(case)
    if size < 3 * case.depth:
        raise ConfigError(f"depth {case.depth} needs a ring of {3 * case.depth} entries, not {size}")
    memory_size = (4 << 20) + case.queues * (case.depth * (case.size + 8192) + size * 64)
    with Frontend(case.socket, memory=memory, memory_size=memory_size) as frontend:
        frontend.negotiate(packed=case.packed, event_idx=case.event_idx, device=int(BLOCK_FEATURES))
        start(frontend, case.queues, size)
        with naming_the_dead(frontend):
            load, peer = _prepare(case, frontend), Peer(frontend.link.sock)
            yield lambda: _measure(case, load, peer)


def start(frontend: Frontend, queues: int, size: int) -> None:
    """Everything between negotiation and load. ConfigError when the back end has fewer queues."""
    if queues > frontend.max_queues:
        raise ConfigError(f"the back end has {frontend.max_queues} queue(s), not {queues}")
    frontend.share_memory()
    for index in range(queues):
        try:
            frontend.start_queue(index, size)
        except BackendError as error:
            raise BackendError(f"queue {index} of {size} entries cannot be started: {error}") from error
    frontend.driver_ok()


@contextmanager
def naming_the_dead(frontend: Frontend, name: str = "the back end") -> Iterator[None]:
    """BackendError when it is gone at the end. Such a one answers nothing either, so it is told from a silent one; and
    where another sends what it should receive, nobody waits for it."""
    gone = BackendError(f"{name} hung up under load")
    try:
        yield
    except TimeoutError as error:
        if frontend.link.hung_up():
            raise gone from error
        raise
    if frontend.link.hung_up():
        raise gone


def _prepare(case: BlkCase, frontend: Frontend) -> BlkLoad:
    """The load, warmed up."""
    config = read_config(frontend)
    disk = config.capacity * SECTOR
    span = min(case.span or disk, disk) // case.size * case.size
    if span == 0:
        where = f"a span of {case.span}" if case.span and case.span < disk else f"a disk of {disk}"
        raise ConfigError(f"{where} bytes is too small for requests of {case.size}")
    if (case.rw != "read" or case.verify) and frontend.features & BlkFeature.RO:
        raise ConfigError("the disk is read-only")
    queues = [frontend.queues[i] for i in range(case.queues)]
    load = BlkLoad(queues, case.depth, case.size, span, RW[case.rw], case.poll, case.verify)
    if case.verify:
        load.sweep(WRITE_ALL)
    load.run(min(WARM_UP, case.seconds))
    return load


def _measure(case: BlkCase, load: BlkLoad, peer: Peer) -> BlkResult:
    load.forget()
    before = peer.cpu_seconds()
    load.run(case.seconds)
    cpu = peer.cpu_seconds() - before
    result = _result(case, load, cpu, peer.peak_memory())
    if case.verify:
        load.sweep(READ)
        counts = load.counts()
        result = dataclasses.replace(result, errors=counts["errors"], mismatches=counts["mismatches"])
    return result


def _result(case: BlkCase, load: BlkLoad, cpu: float, memory: int) -> BlkResult:
    counts = load.counts()
    requests = counts["requests"] or 1
    return BlkResult(
        requests=counts["requests"],
        seconds=case.seconds,
        per_second=counts["requests"] / case.seconds,
        p50=load.quantile(0.5),
        p99=load.quantile(0.99),
        p999=load.quantile(0.999),
        longest_gap=load.longest_gap(),
        kicks_per_request=counts["kicks"] / requests,
        calls_per_request=counts["calls"] / requests,
        errors=counts["errors"],
        mismatches=counts["mismatches"],
        cpu_per_million=cpu / requests * 1e6,
        peak_memory=memory,
    )

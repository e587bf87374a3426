"""``hcd bench net``: frames against any vhost-user-net back end, from one of its ports to another."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from hcd_protocols.virtio.net import header_size

from hcd.bench.blk import WARM_UP, naming_the_dead, start
from hcd.bench.netload import NetLoad
from hcd.bench.peer import Peer
from hcd.errors import ConfigError
from hcd.frontend.client import Frontend
from hcd.frontend.net import NET_FEATURES

__all__ = ["NetCase", "NetResult", "run"]

#: the stations at the two ends
FIRST, SECOND = b"\x02\0\0\0\xbe\x01", b"\x02\0\0\0\xbe\x02"
RX, TX = 0, 1
SMALLEST, LARGEST = 60, 65535


@dataclass(frozen=True, slots=True)
class NetCase:
    """What to load with. ``socket`` sends, ``peer`` receives ("": nobody looks; the same socket: the back end is to
    send frames back). ``size`` in bytes without the virtio header; ``depth`` frames may be on their way."""

    socket: str
    peer: str = ""
    depth: int = 128
    size: int = 64
    seconds: float = 3.0
    ring_size: int = 256
    packed: bool = False
    event_idx: bool = True
    poll: bool = False
    verify: bool = False
    duplex: bool = False


@dataclass(frozen=True, slots=True)
class NetResult:
    """What came out, summed over both directions. ``latency`` between sending and arrival, in seconds; 0 without a
    peer. ``wrong``: frames out of order, twice, or (with verify) changed. ``cpu_per_million``: see BlkResult."""

    sent: int
    received: int
    dropped: int
    wrong: int
    strangers: int
    seconds: float
    sent_per_second: float
    received_per_second: float
    p50: float
    p99: float
    p999: float
    kicks_per_frame: float
    calls_per_frame: float
    cpu_per_million: float
    peak_memory: int


def run(case: NetCase) -> NetResult:
    """Load the back end. BackendError and TimeoutError when it fails; ConfigError for a case that it cannot take."""
    _check(case)
    with contextlib.ExitStack() as stack:
        near = stack.enter_context(_connect(case, case.socket))
        far = near
        if case.peer not in ("", case.socket):
            far = stack.enter_context(_connect(case, case.peer))
            stack.enter_context(naming_the_dead(far, f"the back end at {case.peer}"))
        stack.enter_context(naming_the_dead(near, f"the back end at {case.socket}"))
        return _load(case, near, far)


def _check(case: NetCase) -> None:
    if not SMALLEST <= case.size <= LARGEST:
        raise ConfigError(f"frames of {case.size} bytes: expected {SMALLEST} to {LARGEST}")
    if case.depth > case.ring_size:
        raise ConfigError(f"depth {case.depth} needs a ring of as many entries, not {case.ring_size}")
    if case.duplex and case.peer in ("", case.socket):
        raise ConfigError("both directions need a second port: --peer")


def _connect(case: NetCase, socket: str) -> Frontend:
    frontend = Frontend(socket, memory_size=(4 << 20) + 2 * case.ring_size * (case.size + 4096))
    try:
        frontend.negotiate(packed=case.packed, event_idx=case.event_idx, device=int(NET_FEATURES))
        start(frontend, 2, case.ring_size)
    except BaseException:
        frontend.close()
        raise
    return frontend


def _load(case: NetCase, near: Frontend, far: Frontend) -> NetResult:
    peer = Peer(near.link.sock)
    flows = [(near.queues[TX], far.queues[RX] if case.peer else None, SECOND, FIRST)]
    if far is not near:
        flows.append((far.queues[TX], near.queues[RX], FIRST, SECOND))
    load = NetLoad(flows, case.depth, case.size, header_size(near.features), case.poll, case.verify)
    if far is not near:
        load.send_some(1, 1)  # a switch learns where the second station is
    used = len(flows) if case.duplex else 1
    load.run(min(WARM_UP, case.seconds), used)
    load.forget()
    before = peer.cpu_seconds()
    load.run(case.seconds, used)
    cpu = peer.cpu_seconds() - before
    return _result(case, load, used, cpu, peer.peak_memory())


def _result(case: NetCase, load: NetLoad, flows: int, cpu: float, memory: int) -> NetResult:
    each = [load.counts(i) for i in range(flows)]
    total = {key: sum(counts[key] for counts in each) for key in each[0]}
    frames = total["sent"] or 1
    return NetResult(
        sent=total["sent"],
        received=total["received"],
        dropped=total["dropped"],
        wrong=total["wrong"],
        strangers=total["strangers"],
        seconds=case.seconds,
        sent_per_second=total["sent"] / case.seconds,
        received_per_second=total["received"] / case.seconds,
        p50=load.quantile(0.5),
        p99=load.quantile(0.99),
        p999=load.quantile(0.999),
        kicks_per_frame=total["kicks"] / frames,
        calls_per_frame=total["calls"] / frames,
        cpu_per_million=cpu / frames * 1e6,
        peak_memory=memory,
    )

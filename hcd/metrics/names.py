"""Every metric family of hcd, in one table.

*Hot* families are counted and rendered by the compiled data plane (:mod:`hcd.dataplane.stats`), the others by
:mod:`hcd.metrics.cold`. A test compares both with this table, so a name, a type or a HELP text is changed
here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_NAME", "FAMILIES", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its full name (counters with ``_total``), type, HELP and labels."""

    name: str
    type: str
    help: str
    labels: tuple[str, ...]
    hot: bool


_DOORBELL = ("device", "queue", "path")
_QUEUE = ("device", "queue")

FAMILIES = (
    Family(
        "hcd_doorbell_rings_total",
        "counter",
        "Rings by the guest: the sum of the kick eventfd's values, less the spurious first one of QEMU.",
        _DOORBELL,
        True,
    ),
    Family(
        "hcd_doorbell_wakeups_total",
        "counter",
        "Times that rings woke hcd. Rings that come while hcd is awake share a wake-up.",
        _DOORBELL,
        True,
    ),
    Family(
        "hcd_doorbell_dispatch_seconds",
        "histogram",
        "From the wake-up by a ring to the entry of the device's handler.",
        _DOORBELL,
        True,
    ),
    Family(
        "hcd_doorbell_response_seconds",
        "histogram",
        "From the wake-up by a ring to the interrupt that answers the first request it brought.",
        _DOORBELL,
        True,
    ),
    Family(
        "hcd_doorbell_ring_seconds",
        "histogram",
        "From the guest's own stamp to the wake-up; only where the guest stamps its rings.",
        _DOORBELL,
        True,
    ),
    Family(
        "hcd_requests_total",
        "counter",
        "Requests completed, by operation and status.",
        (*_QUEUE, "op", "status"),
        True,
    ),
    Family(
        "hcd_requests_found_total",
        "counter",
        "Requests taken from the ring, by how they were found: after a ring, or by polling. Polling and "
        "EVENT_IDX suppress rings, so rings are fewer than requests.",
        (*_QUEUE, "by"),
        True,
    ),
    Family(
        "hcd_request_bytes_total",
        "counter",
        "Bytes of completed requests, headers included: from_guest is the readable part, to_guest what was written.",
        (*_QUEUE, "direction"),
        True,
    ),
    Family(
        "hcd_request_latency_seconds",
        "histogram",
        "From taking a request off the ring to its completion, by operation, from the first one on.",
        (*_QUEUE, "op"),
        True,
    ),
    Family(
        "hcd_requests_inflight",
        "gauge",
        "Requests taken from the ring and not completed yet.",
        _QUEUE,
        True,
    ),
    Family(
        "hcd_oldest_request_seconds",
        "gauge",
        "Age of the oldest request in flight; 0 without one.",
        _QUEUE,
        True,
    ),
    Family(
        "hcd_throttled_seconds_total",
        "counter",
        "How long the limits of the device held the queue back while its driver had requests.",
        _QUEUE,
        True,
    ),
    Family(
        "hcd_interrupts_total",
        "counter",
        "Interrupt decisions after completions: sent, suppressed by the driver, pending (one is due "
        "already), absent (the front end gave no call fd).",
        (*_QUEUE, "outcome"),
        True,
    ),
    Family(
        "hcd_doorbell_info",
        "gauge",
        "Always 1: the path of each doorbell, how hcd knows it (source), its kind, transport and address.",
        (*_DOORBELL, "source", "kind", "transport", "address"),
        False,
    ),
    Family(
        "hcd_doorbell_registered",
        "gauge",
        "1 while the VMM that is attached has the doorbell registered, 0 where it could not or nobody is attached.",
        _DOORBELL,
        False,
    ),
    Family(
        "hcd_connected",
        "gauge",
        "1 while a front end is connected to the device.",
        ("device",),
        True,
    ),
    Family(
        "hcd_handovers_total",
        "counter",
        "Sessions of the process before this one that were gone on with (resumed), or had to end (failed).",
        ("device", "outcome"),
        True,
    ),
    Family(
        "hcd_handover_ready",
        "gauge",
        "1 while the connected front end would not notice a restart of hcd: the service manager keeps its session.",
        ("device",),
        True,
    ),
    Family(
        "hcd_protocol_errors_total",
        "counter",
        "Connections that ended because the front end broke the protocol.",
        ("device",),
        True,
    ),
    Family(
        "hcd_guest_errors_total",
        "counter",
        "Rings and requests refused because the driver in the guest broke the rules.",
        ("device",),
        True,
    ),
    Family(
        "hcd_handler_errors_total",
        "counter",
        "Mistakes of the device: exceptions that escaped it, requests that it did not complete in time.",
        ("device",),
        True,
    ),
    Family(
        "hcd_slow_steps_total",
        "counter",
        "Times that code of the device ran for more than 50 ms without a break and held up all devices of its lane.",
        ("device",),
        True,
    ),
    Family(
        "hcd_stuck_requests",
        "gauge",
        "Requests in flight for longer than stuck_after.",
        ("device",),
        True,
    ),
    Family(
        "hcd_path_conflicts",
        "gauge",
        "1 while the path that QEMU reports is another one than the declared path.",
        ("device",),
        True,
    ),
    Family(
        "hcd_path_cost_seconds",
        "gauge",
        "Round trip of one ring over this path, as measured by the path experiment on this machine.",
        ("path", "kind"),
        False,
    ),
    Family(
        "hcd_build_info",
        "gauge",
        "Always 1: the versions of hcd and of Python.",
        ("version", "python"),
        False,
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}

"""What is wrong at first sight: the present, not the history; that is in the counters, and in Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from hcd.control.snapshot import DeviceState, QueueState, Snapshot
from hcd.views.text import time_ago

__all__ = ["find_problems"]


def find_problems(snapshot: Snapshot) -> list[str]:
    """One line for each; none when all is well."""
    return list(_find(snapshot))


def _find(snapshot: Snapshot) -> Iterator[str]:
    if not snapshot.answers:
        yield "the thread that serves the rings does not answer: a handler blocks it, and every device waits"
    for name in snapshot.unserved:
        yield f"{name}: is in the configuration and is not served: it could not be opened again (see the log)"
    last = snapshot.reload
    if last is not None and not last.ok:
        reason = "; ".join(last.text.splitlines())
        yield f"the last reload, {time_ago(snapshot.now - last.at)} ago, was refused; all is as before: {reason}"
    for device in snapshot.devices:
        for problem in _of_device(device):
            yield f"{device.name}: {problem}"


def _of_device(device: DeviceState) -> Iterator[str]:
    for queue in device.queues:
        for problem in _of_queue(queue, device.stuck_after):
            yield f"queue {queue.index}: {problem}"
    if device.path_conflict:
        yield "QEMU says another path than the configuration (path, bus)"
    for bell in device.doorbells:
        if bell.registered is False:
            yield f"doorbell {bell.name}: the VMM could not register it (see the log)"


def _of_queue(queue: QueueState, stuck_after: float) -> Iterator[str]:
    if queue.state == "broken":
        yield f"{queue.broken}; no requests are taken until the guest sets the queue up again"
    if stuck_after and queue.oldest >= stuck_after:
        yield f"a request has been in flight for {time_ago(queue.oldest)}; {queue.inflight} are in flight"
    if queue.state == "draining":
        yield f"is being stopped and waits for {queue.inflight} requests in flight"

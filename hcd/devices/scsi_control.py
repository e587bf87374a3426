"""The control and event queues of a SCSI host (virtio 1.3, 5.6.6.2 and 5.6.6.3).

Task management. What a disk's worker has begun cannot be taken back, so a function that ends tasks waits for them: the
disk is *gated*, commands that come for it meanwhile are held, and the answer goes out when nothing of it is in flight
any more. Drivers wait for the answer before they send the next.

Events go into buffers that the driver has left for them. One that finds none is lost, and the next buffer says that
something was: the driver then looks at everything again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hcd_protocols.virtio.scsi import (
    AN,
    AN_RESPONSE,
    EVENT,
    TMF,
    ControlType,
    Event,
    Response,
    TaskFunction,
    parse_lun,
)

from hcd.device import GuestError, Request, Virtqueue
from hcd.devices import scsi_reply
from hcd.devices.scsi_disk import OP_EVENT, OP_TASK, Disk

__all__ = ["Events", "Gate", "TaskManager"]

ENDING = frozenset(
    (
        *(TaskFunction.ABORT_TASK, TaskFunction.ABORT_TASK_SET, TaskFunction.CLEAR_TASK_SET),
        *(TaskFunction.LOGICAL_UNIT_RESET, TaskFunction.I_T_NEXUS_RESET),
        *(TaskFunction.QUERY_TASK, TaskFunction.QUERY_TASK_SET),
    )
)
#: buffers for events that are looked at in one turn
BURST = 64
RESETS = frozenset((TaskFunction.LOGICAL_UNIT_RESET, TaskFunction.I_T_NEXUS_RESET))


@dataclass(slots=True)
class _Function:
    """A task management function, and how many disks it waits for."""

    request: Request
    number: int
    left: int

    def end_for(self, disk: Disk) -> None:
        if self.number in RESETS:
            disk.reset(tell=True)
        self.left -= 1
        if not self.left and not self.request.completed:
            _answer(self.request, Response.OK)


class Gate:
    """Commands that wait until the tasks of one disk have ended, and the functions that wait for that."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.functions: deque[_Function] = deque()
        self.commands: deque[tuple[Request, bytes]] = deque()

    def hold(self, request: Request, cdb: bytes) -> None:
        request.hold()
        self.commands.append((request, cdb))

    def settle(self) -> bool:
        """Open it if nothing of the disk is in flight: answer, then carry out what waits. Whether anything did."""
        if not self.functions or self.disk.busy:
            return False
        while self.functions:
            self.functions.popleft().end_for(self.disk)
        self._release()
        return True

    def _release(self) -> None:
        while self.commands:
            request, cdb = self.commands.popleft()
            self.disk.execute(request, cdb)

    def give_back(self, queue: Virtqueue) -> None:
        """``queue`` stops: what is held of it goes back."""
        for function in self.functions:
            if function.request.queue is queue and not function.request.completed:
                _answer(function.request, Response.FAILURE)
        for request, _ in [held for held in self.commands if held[0].queue is queue]:
            scsi_reply.fail(request, Response.BUSY)
        self.functions = deque(held for held in self.functions if not held.request.completed)
        self.commands = deque(held for held in self.commands if not held[0].completed)
        if not self.functions:
            self._release()  # nobody is left for whom they wait


def _answer(request: Request, response: Response) -> None:
    request.write(bytes([response]))
    request.complete()


class TaskManager:
    """Takes the requests of the control queue. ``find`` gives the gates of a target, or of one unit of it."""

    def __init__(self, find: Callable[[int, int | None], Sequence[Gate]]) -> None:
        self._find = find

    def take(self, request: Request) -> None:
        """GuestError for what has no type or no room for an answer."""
        request.op = OP_TASK
        kind = request.u32(0)
        if kind == ControlType.TMF:
            self._manage(request)
        elif kind in (ControlType.AN_QUERY, ControlType.AN_SUBSCRIBE):
            if request.readable_size < AN.size or request.writable_size < AN_RESPONSE.size:
                raise GuestError("an asynchronous notification request without room")
            request.write(AN_RESPONSE.pack(0, Response.OK))  # there are none to subscribe to
            request.complete()
        else:
            raise GuestError(f"control request type {kind} is not known")

    def _manage(self, request: Request) -> None:
        if request.readable_size < TMF.size or request.writable_size < 1:
            raise GuestError("a task management request without room")
        _, function, lun, _ = TMF.unpack(request.read(TMF.size))
        place = parse_lun(lun)
        if function not in ENDING:
            request.status = 2
            _answer(request, Response.FUNCTION_REJECTED)
        elif place is None or not self._find(place[0], None):
            request.status = 1
            _answer(request, Response.BAD_TARGET)
        elif function == TaskFunction.I_T_NEXUS_RESET:
            self._end(request, function, self._find(place[0], None))
        elif gates := self._find(*place):
            self._end(request, function, gates)
        else:
            request.status = 1
            _answer(request, Response.INCORRECT_LUN)

    def _end(self, request: Request, function: int, gates: Sequence[Gate]) -> None:
        request.hold()
        shared = _Function(request, function, len(gates))
        for gate in gates:
            gate.functions.append(shared)
        for gate in gates:
            gate.settle()


class Events:
    """What the driver is told without having asked."""

    def __init__(self) -> None:
        self._queue: Virtqueue | None = None
        self._missed = False

    def start(self, queue: Virtqueue) -> None:
        queue.passive = True
        self._queue = queue

    def stop(self) -> None:
        self._queue = None
        self._missed = False

    def refilled(self, queue: Virtqueue) -> None:
        queue.passive = True
        if self._missed:
            self.report(Event.NO_EVENT, bytes(8), 0)

    def report(self, event: Event, lun: bytes, reason: int) -> None:
        queue = self._queue
        if queue is None:
            return
        for _ in range(BURST):
            request = queue.pop()
            if request is None:
                if queue.enable_kicks():  # one came just before the driver was asked to ring
                    continue
                self._missed = True
                return
            request.op = OP_EVENT
            if request.writable < EVENT.size:
                request.status = 1
                request.complete(0)
                continue
            request.write(EVENT.pack(event | (Event.EVENTS_MISSED if self._missed else 0), lun, reason))
            request.complete()
            self._missed = False
            return
        self._missed = True
        queue.schedule()  # a driver that goes on giving buffers that are too small does not hold up others

"""SCSI host (virtio 1.3, 5.6) with disks.

Here are the options, the queues, and which logical unit a command is for. What a disk does is in
:mod:`hcd.devices.scsi_disk`; task management and events are in :mod:`hcd.devices.scsi_control`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hcd_protocols.virtio.features import ScsiFeature
from hcd_protocols.virtio.ids import DeviceId
from hcd_protocols.virtio.scsi import (
    COMMAND_HEADER,
    COMMAND_SIZE,
    CONTROLQ,
    EVENTQ,
    FIRST_REQUESTQ,
    RESPONSE_SIZE,
    ControlType,
    Event,
    ResetReason,
    Response,
    ScsiConfig,
    TaskFunction,
    pack_lun,
    parse_lun,
)

from hcd.device import ConfigError, Device, DeviceError, GuestError, Handle, Lane, Option, Request, Virtqueue
from hcd.devices import scsi_pages, scsi_reply
from hcd.devices.scsi_cdb import COMMANDS, Op, Refused, Sense, extent, fixed_sense, parameter_room
from hcd.devices.scsi_control import Events, Gate, TaskManager
from hcd.devices.scsi_disk import OPERATIONS, Disk
from hcd.devices.scsi_images import SHAPE, DiskSpec, open_store, parse_disks

__all__ = ["Scsi"]

#: where the CDB begins
CDB = COMMAND_HEADER.size
#: a driver that took one of these looks at events. QEMU 7.2 keeps CHANGE to itself, though it offers it.
LISTENS = ScsiFeature.HOTPLUG | ScsiFeature.CHANGE
#: seconds between two log lines about one kind of failure
LOG_INTERVAL = 60.0


class Scsi(Device):
    """``scsi``. Queue 0 is control, 1 events, the others take commands."""

    virtio_id = DeviceId.SCSI
    description = "SCSI host with disks: files, block devices or memory"
    vhost_user_type = "scsi"
    operations = OPERATIONS
    options = (
        Option("disk", "list", f"{SHAPE}; again for more", default=()),
        Option("num-queues", "int", "request queues", default=1, minimum=1, maximum=64),
        Option("force-raw", "bool", "serve an image that looks like qcow2, vmdk, vhdx, luks... as raw", default=False),
    )

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self._specs = parse_disks(self.option["disk"])
        self._gates: dict[DiskSpec, Gate] = {}
        self._by_lun: dict[bytes, Gate] = {}
        self._watches: dict[DiskSpec, Handle] = {}
        self._leaving: dict[DiskSpec, Gate] = {}
        self._tasks = TaskManager(self._find)
        self._events = Events()
        self._features = 0
        self._logged: dict[tuple[str, int], float] = {}
        self._lane: Lane

    # -- what it is

    @property
    def num_queues(self) -> int:
        return FIRST_REQUESTQ + int(self.option["num_queues"])

    @property
    def features(self) -> int:
        return int(LISTENS)

    def config(self) -> bytes:
        return ScsiConfig(num_queues=self.option["num_queues"]).to_bytes()

    def write_config(self, offset: int, data: bytes) -> None:
        """Sizes of sense data and CDBs (5.6.4): a driver may ask for those that they have anyway."""
        if offset not in (20, 24) or len(data) != 4 or self.config()[offset : offset + 4] != data:
            raise DeviceError("sense_size and cdb_size stay as they are")

    def storage_size(self) -> int:
        return sum(gate.disk.store.size for gate in list(self._gates.values()))

    # -- its life

    def open(self, lane: Lane) -> None:
        self._lane = lane
        try:
            for spec in self._specs:
                if not spec.later or os.path.exists(spec.path):
                    self._add(spec, self._open_disk(spec, None))
        except BaseException:
            for gate in self._gates.values():
                gate.disk.store.close()
            self._gates.clear()
            raise
        lane.post(self._start_watches)

    def _open_disk(self, spec: DiskSpec, patience: float | None) -> Disk:
        store = open_store(spec, self.log, force_raw=self.option["force_raw"], patience=patience)
        serial = spec.serial or f"{self.name}-{spec.target}-{spec.unit}".encode()[-36:]
        return Disk(spec.target, spec.unit, store, spec.block_size, serial, lambda: self._units(spec.target))

    def _add(self, spec: DiskSpec, disk: Disk) -> None:
        disk.store.on_error = lambda request, error: self._log_failure(disk, request, error)
        gate = self._gates[spec] = Gate(disk)
        self._by_lun[pack_lun(spec.target, spec.unit)] = gate
        flat = bytes([1, spec.target, 0x40 | spec.unit >> 8, spec.unit & 0xFF, 0, 0, 0, 0])
        self._by_lun[flat] = gate  # what Linux sends for any unit

    def _start_watches(self) -> None:
        for spec in self._gates:
            self._watch(spec)

    def _watch(self, spec: DiskSpec) -> None:
        gate = self._gates[spec]
        if gate.disk.store.fileno() >= 0:
            self._watches[spec] = self._lane.watch(gate.disk.store.fileno(), lambda: self._reap(spec, gate))

    def close(self) -> None:
        if not self._gates and not self._leaving:
            return
        stopped = threading.Event()

        def stop() -> None:
            for watch in self._watches.values():
                watch.cancel()
            self._watches.clear()
            stopped.set()

        self._lane.post(stop)
        stopped.wait(1.0)
        for gate in (*self._gates.values(), *self._leaving.values()):
            if not gate.disk.store.close():
                self.log.error("I/O of disk %s hangs; its thread stays behind", gate.disk.name)
        self._gates.clear()
        self._leaving.clear()

    def connect(self, features: int) -> None:
        self._features = features

    def disconnect(self) -> None:
        for gate in self._gates.values():
            gate.disk.reset()

    def start_queue(self, queue: Virtqueue) -> None:
        if queue.index == EVENTQ:
            self._events.start(queue)

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == EVENTQ:
            self._events.stop()
        for gate in (*self._gates.values(), *self._leaving.values()):
            gate.give_back(queue)
            gate.disk.store.submit()

    # -- requests

    def process(self, queue: Virtqueue) -> None:
        if queue.index >= FIRST_REQUESTQ:
            self._process_commands(queue)
        elif queue.index == CONTROLQ:
            for request in queue:
                self._tasks.take(request)
            self._submit()
        else:
            self._events.refilled(queue)

    def _process_commands(self, queue: Virtqueue) -> None:
        by_lun = self._by_lun
        try:
            for request in queue:
                head = request.read(COMMAND_SIZE)
                if len(head) < COMMAND_SIZE or request.writable < RESPONSE_SIZE:
                    raise GuestError(f"a command of {len(head)} bytes with {request.writable} for its response")
                gate = by_lun.get(head[:8])
                if gate is None:
                    self._nowhere(request, head)
                elif gate.functions:
                    gate.hold(request, head[CDB:])
                else:
                    gate.disk.execute(request, head[CDB:])
        finally:
            self._submit()

    def _submit(self) -> None:
        for gate in self._gates.values():
            gate.disk.store.submit()

    def _nowhere(self, request: Request, head: bytes) -> None:
        """There is no such logical unit; its target may have others, and tells of them (SPC-4, 6.4.2)."""
        place, cdb = parse_lun(head[:8]), head[CDB:]
        units = self._units(place[0]) if place else []
        if not units:
            scsi_reply.fail(request, Response.BAD_TARGET)
        elif cdb[0] == Op.INQUIRY and not cdb[1] & 0x03 and not cdb[2]:
            scsi_reply.data(request, scsi_pages.NO_UNIT, parameter_room(cdb))
        elif cdb[0] == Op.REPORT_LUNS:
            scsi_reply.data(request, scsi_pages.report_luns(units), parameter_room(cdb))
        elif cdb[0] == Op.REQUEST_SENSE:
            scsi_reply.data(request, fixed_sense(Sense.NO_SUCH_UNIT), parameter_room(cdb))
        else:
            scsi_reply.check(request, Sense.NO_SUCH_UNIT)

    def _units(self, target: int) -> list[tuple[int, int]]:
        return sorted((spec.target, spec.unit) for spec in self._gates if spec.target == target)

    def _find(self, target: int, unit: int | None) -> Sequence[Gate]:
        return [
            gate for spec, gate in self._gates.items() if spec.target == target and unit in (None, spec.unit)
        ]

    def _reap(self, spec: DiskSpec, gate: Gate) -> None:
        gate.disk.store.reap()
        if gate.settle():
            gate.disk.store.submit()
        if spec in self._leaving and not gate.disk.busy:
            self._let_go(spec)

    def describe(self, request: Request) -> str:
        if request.queue.index == EVENTQ:
            return f"room for an event of {request.writable_size} bytes"
        if request.queue.index == CONTROLQ:
            return _describe_control(request)
        lun = bytes(request.u8(at) for at in range(8))
        cdb = bytes(request.u8(at) for at in range(CDB, COMMAND_SIZE))
        return f"{_describe_place(lun)}: {_describe_cdb(cdb)}"

    def fail_request(self, request: Request, status: int) -> None:
        if request.queue.index >= FIRST_REQUESTQ and request.writable_size >= RESPONSE_SIZE:
            scsi_reply.fail(request, Response.TARGET_FAILURE)
        else:
            super().fail_request(request, status)

    # -- disks that grow, come and go

    def resize(self, size: int | None) -> int:
        """Look at the images: disks that are larger now, and those marked "later" that have come or gone."""
        if size is not None and len(self._gates) != 1:
            raise DeviceError("it has several disks: make an image larger, then resize it without a size")
        for spec in self._specs:
            if spec.later:
                self._look_for(spec)
        for gate in self._gates.values():
            before = gate.disk.store.size
            if gate.disk.grow(size) != before and self._features & LISTENS:
                sense = Sense.CAPACITY_CHANGED
                self._events.report(Event.PARAM_CHANGE, _lun(gate.disk), sense.asc | sense.ascq << 8)
        return self.storage_size()

    def _look_for(self, spec: DiskSpec) -> None:
        there = os.path.exists(spec.path)
        if there and spec not in self._gates and spec not in self._leaving:
            try:
                disk = self._open_disk(spec, 0.0)
            except ConfigError as error:
                raise DeviceError(str(error)) from error
            self._add(spec, disk)
            self._watch(spec)
            self._tell_of(disk, ResetReason.RESCAN)
        elif not there and spec in self._gates:
            gate = self._gates.pop(spec)
            self._by_lun = {lun: other for lun, other in self._by_lun.items() if other is not gate}
            self._leaving[spec] = gate
            self._tell_of(gate.disk, ResetReason.REMOVED)
            if not gate.disk.busy:
                self._let_go(spec)

    def _tell_of(self, disk: Disk, reason: ResetReason) -> None:
        self.log.info("disk %s %s", disk.name, "is gone" if reason == ResetReason.REMOVED else "is there now")
        if self._features & ScsiFeature.HOTPLUG:
            self._events.report(Event.TRANSPORT_RESET, _lun(disk), reason)
        for gate in self._find(disk.target, None):
            gate.disk.attend(Sense.LUNS_CHANGED)

    def _let_go(self, spec: DiskSpec) -> None:
        gate = self._leaving.pop(spec)
        if watch := self._watches.pop(spec, None):
            watch.cancel()
        if not gate.disk.store.close(0.5):
            self.log.error("disk %s: its threads do not end; they stay behind", gate.disk.name)

    def _log_failure(self, disk: Disk, request: Request, error: Exception) -> None:
        """The first of its kind in a minute."""
        key = (disk.name, getattr(error, "errno", 0) or 0)
        now = time.monotonic()
        if now - self._logged.get(key, -LOG_INTERVAL) >= LOG_INTERVAL:
            self._logged[key] = now
            self.log.error("disk %s: %s failed: %s", disk.name, OPERATIONS[request.op], error)


def _lun(disk: Disk) -> bytes:
    return pack_lun(disk.target, disk.unit)


def _describe_place(lun: bytes) -> str:
    place = parse_lun(lun)
    return f"{place[0]}:{place[1]}" if place else f"lun {lun.hex()}"


def _describe_cdb(cdb: bytes) -> str:
    command = COMMANDS.get(cdb[0])
    if command is None:
        return f"opcode {cdb[0]:#04x}"
    if command.name in ("read", "write", "verify", "synchronize_cache", "write_same"):
        with contextlib.suppress(Refused):
            where = extent(cdb)
            return f"{command.name} block {where.lba}, {where.blocks} blocks"
    return command.name


def _describe_control(request: Request) -> str:
    if request.u32(0) != ControlType.TMF:
        return f"control type {request.u32(0)}"
    function = request.u32(4)
    name = TaskFunction(function).name.lower() if function in set(TaskFunction) else f"function {function}"
    return f"{name} of {_describe_place(bytes(request.u8(at) for at in range(8, 16)))} tag {request.u64(16):#x}"

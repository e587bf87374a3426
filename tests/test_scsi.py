"""The SCSI host behind a real session: commands with their data, task management, events, disks that change."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hcd_protocols.virtio.scsi import (
    AN,
    COMMAND_HEADER,
    COMMAND_SIZE,
    EVENT,
    RESPONSE_HEADER,
    RESPONSE_SIZE,
    TMF,
    Event,
    ResetReason,
    Response,
    ScsiConfig,
    TaskFunction,
    pack_lun,
)

from hcd.demo.hcd_process import HcdProcess
from hcd.device import ConfigError, DeviceError
from hcd.devices.scsi import Scsi
from hcd.devices.scsi_cdb import Op, Sense, SenseCode
from hcd.devices.scsi_control import Events
from hcd.devices.scsi_disk import Disk
from hcd.frontend.errors import BackendError
from hcd.options import defaults
from hcd.testing import Driver, Exchange, ServedDevice, check_device, serve

CONTROLQ, EVENTQ, REQUESTQ = 0, 1, 2
INVALID_FIELD, NO_SENSE = Sense.INVALID_FIELD, Sense.NO_SENSE
CHECK = 2


class Answer(NamedTuple):
    """What became of a command."""

    data: bytes
    status: int
    response: int
    residual: int
    sense: SenseCode
    field: int = -1


def command(cdb: bytes, data: bytes = b"", target: int = 0, unit: int = 0) -> bytes:
    return COMMAND_HEADER.pack(pack_lun(target, unit), 1, 0, 0, 0) + cdb.ljust(32, b"\0") + data


class Initiator:
    """A driver that speaks SCSI."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def run(self, cdb: bytes, room: int = 0, data: bytes = b"", target: int = 0, unit: int = 0) -> Answer:
        whole = command(cdb, data, target, unit)
        raw = self.driver.ask(whole, RESPONSE_SIZE + room, queue=REQUESTQ, pieces=(COMMAND_SIZE, RESPONSE_SIZE))
        length, residual, _, status, response = RESPONSE_HEADER.unpack(raw[: RESPONSE_HEADER.size])
        sense = raw[RESPONSE_HEADER.size : RESPONSE_SIZE][:length]
        code, field = NO_SENSE, -1
        if sense:
            code = SenseCode(sense[2] & 0x0F, sense[12], sense[13])
            field = int.from_bytes(sense[16:18], "big") if sense[15] & 0x80 else -1
        return Answer(raw[RESPONSE_SIZE:], status, response, residual, code, field)

    def good(self, cdb: bytes, room: int = 0, data: bytes = b"", **where: int) -> bytes:
        answer = self.run(cdb, room, data, **where)
        assert (answer.status, answer.response, answer.sense) == (0, 0, NO_SENSE), answer
        return answer.data

    def refused(self, sense: SenseCode, cdb: bytes, room: int = 0, data: bytes = b"", **where: int) -> Answer:
        answer = self.run(cdb, room, data, **where)
        assert (answer.status, answer.response, answer.sense) == (CHECK, 0, sense), answer
        return answer

    def manage(self, function: int, target: int = 0, unit: int = 0) -> int:
        (answer,) = self.driver.ask(TMF.pack(0, function, pack_lun(target, unit), 1), 1, queue=CONTROLQ)
        return answer

    def event(self) -> tuple[int, bytes, int]:
        """The next event, with a buffer for it."""
        room = self.driver.make_room(EVENT.size)
        token = self.driver.queues[EVENTQ].submit([], room)
        assert self.driver.queues[EVENTQ].wait_for(token) == EVENT.size
        event, lun, reason = EVENT.unpack(self.driver.gather(room))
        return event, lun, reason


def read10(lba: int, blocks: int, op: int = Op.READ_10, flags: int = 0) -> bytes:
    return struct.pack(">BBIxH", op, flags, lba, blocks)


def read16(lba: int, blocks: int, op: int = Op.READ_16, flags: int = 0) -> bytes:
    return struct.pack(">BBQI", op, flags, lba, blocks)


@pytest.fixture
def host() -> Iterator[Callable[..., Initiator]]:
    """``host("ram:1M", ...)`` serves a host with these disks and connects to it."""
    with ExitStack() as stack:

        def start(*disks: str) -> Initiator:
            served = stack.enter_context(serve("scsi", {"disk": list(disks)}))
            initiator = Initiator(stack.enter_context(served.driver()))
            initiator.served = served  # type: ignore[attr-defined]
            return initiator

        yield start


def served_by(initiator: Initiator) -> ServedDevice:
    return initiator.served  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Path]:
    def make(size: int, name: str = "disk.img") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    return make


# -- options


@pytest.mark.parametrize(
    ("disks", "text"),
    [
        ((), "at least one option disk"),
        (("ram:0",), "a size such as ram:64M"),
        (("ram:1X",), "a size such as ram:64M"),
        (("256=ram:1M",), "targets go up to 255"),
        (("1:16384=ram:1M",), "logical units up to 16383"),
        (("1=ram:1M", "1:0=ram:1M"), "there is a disk 1:0 already"),
        (("ram:1M,read-only",), "a disk in memory is none of read-only"),
        (("/x,block-size=513",), '"block-size=513" is not understood'),
        (("/x,serial=",), '"serial=" is not understood'),
        (("/x,faster",), '"faster" is not understood'),
        ((",",), "expected "),
    ],
)
def test_disks_that_cannot_be(disks: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Scsi("host", defaults(Scsi.options) | {"disk": disks})


def test_a_disk_that_cannot_be_opened(image: Callable[..., Path]) -> None:
    """The text names the option and the path; the other disks are closed again."""
    good = image(1 << 20)
    with pytest.raises(ConfigError, match="disk /nowhere/disk: No such file"), serve(
        "scsi", {"disk": [str(good), "/nowhere/disk"]}
    ):
        pass
    with serve("scsi", {"disk": str(good)}):
        pass


@pytest.mark.long
@pytest.mark.parametrize("where", ["ram:1M", "{image}"])
def test_conformance(where: str, image: Callable[..., Path]) -> None:
    exchanges = [
        Exchange(command(bytes([Op.INQUIRY, 0, 0, 0, 36, 0])), RESPONSE_SIZE + 36, queue=REQUESTQ),
        Exchange(command(read10(0, 1)), RESPONSE_SIZE + 512, bytes(RESPONSE_SIZE + 512), queue=REQUESTQ),
        Exchange(command(read10(8, 1, Op.WRITE_10), b"x" * 512), RESPONSE_SIZE, bytes(RESPONSE_SIZE), queue=REQUESTQ),
        Exchange(TMF.pack(0, TaskFunction.ABORT_TASK, pack_lun(0, 0), 7), 1, b"\0", queue=CONTROLQ),
    ]
    check_device("scsi", {"disk": where.replace("{image}", str(image(1 << 20)))}, exchanges=exchanges)


def test_configuration_space(host: Callable[..., Initiator]) -> None:
    driver = host("ram:1M").driver
    assert ScsiConfig.from_bytes(driver.config(0, 36)).num_queues == 1
    driver.write_config(20, struct.pack("<I", 96))
    with pytest.raises(BackendError):
        driver.write_config(24, struct.pack("<I", 16))


# -- data


@pytest.mark.parametrize("where", ["ram:1M", "{image}"])
@pytest.mark.parametrize(
    ("write", "read"),
    [
        (read10(16, 8, Op.WRITE_10), read10(16, 8)),
        (read16(16, 8, Op.WRITE_16, 0x08), read16(16, 8)),
        (struct.pack(">BBII", Op.WRITE_12, 0, 16, 8), struct.pack(">BBII", Op.READ_12, 0, 16, 8)),
        (bytes([Op.WRITE_6, 0, 0, 16, 8, 0]), bytes([Op.READ_6, 0, 0, 16, 8, 0])),
    ],
    ids=["10", "16-fua", "12", "6"],
)
def test_what_was_written_is_read(
    host: Callable[..., Initiator], image: Callable[..., Path], where: str, write: bytes, read: bytes
) -> None:
    path = image(1 << 20)
    initiator = host(where.replace("{image}", str(path)))
    data = os.urandom(4096)
    initiator.good(write, data=data)
    assert initiator.good(read, 4096) == data
    initiator.good(read10(0, 0, Op.SYNCHRONIZE_CACHE_10))
    if where == "{image}":
        assert path.read_bytes()[8192 : 8192 + 4096] == data
    metrics = served_by(initiator).metrics()
    for operation in ("read", "write", "flush"):
        assert metrics.total("hcd_requests_total", op=operation, status="ok") == 1


def test_large_blocks(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    path = image(1 << 20)
    initiator = host(f"{path},block-size=4096")
    assert initiator.good(bytes([Op.READ_CAPACITY_10]), 8) == struct.pack(">II", 255, 4096)
    initiator.good(read10(255, 1, Op.WRITE_10), data=b"e" * 4096)
    assert path.read_bytes()[-4096:] == b"e" * 4096
    initiator.refused(Sense.LBA_OUT_OF_RANGE, read10(256, 1), 4096)


def test_the_driver_has_too_little_or_too_much_room(host: Callable[..., Initiator]) -> None:
    """Too little is an overrun and nothing happens; what is left over is told."""
    initiator = host("ram:1M")
    assert initiator.run(read10(0, 2), 512).response == Response.OVERRUN
    assert initiator.run(read10(0, 2, Op.WRITE_10), data=b"x" * 512).response == Response.OVERRUN
    assert initiator.good(read10(0, 1), 512) == bytes(512)
    assert initiator.run(read10(0, 1), 2048).residual == 1536
    assert initiator.run(read10(0, 1, Op.WRITE_10), data=b"x" * 1024).residual == 512
    assert initiator.run(bytes([Op.INQUIRY, 0, 0, 0, 255]), 100).residual == 64
    assert initiator.run(bytes([Op.INQUIRY, 0, 0, 0, 5]), 5).data == bytes([0, 0, 6, 0x12, 31])
    assert initiator.run(bytes([Op.INQUIRY, 0, 0, 0, 36]), 35).response == Response.OVERRUN


def test_past_the_end(host: Callable[..., Initiator]) -> None:
    initiator = host("ram:1M")
    for cdb in (read10(2048, 1), read10(2047, 2), read16(1 << 63, 1), read16(0, 0xFFFFFFFF)):
        initiator.refused(Sense.LBA_OUT_OF_RANGE, cdb, 1024)
    initiator.refused(Sense.LBA_OUT_OF_RANGE, read10(2048, 1, Op.WRITE_10), data=bytes(512))
    initiator.refused(Sense.LBA_OUT_OF_RANGE, read10(2049, 0, Op.VERIFY_10))


def test_read_only_disk(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    initiator = host(f"{image(1 << 20)},read-only")
    assert initiator.good(bytes([Op.MODE_SENSE_6, 0, 0x3F, 0, 255]), 255)[2] & 0x80
    for cdb in (read10(0, 1, Op.WRITE_10), read10(0, 1, Op.WRITE_SAME_10)):
        initiator.refused(Sense.WRITE_PROTECTED, cdb, data=bytes(512))
    initiator.good(read10(0, 0, Op.SYNCHRONIZE_CACHE_10))


@pytest.mark.parametrize("where", ["ram:1M", "{image}"])
def test_unmap_and_write_same(host: Callable[..., Initiator], image: Callable[..., Path], where: str) -> None:
    """Both give space back."""
    path = image(1 << 20)
    initiator = host(where.replace("{image}", str(path)))
    data = b"d" * (64 << 10)
    initiator.good(read10(0, 128, Op.WRITE_10), data=data)
    descriptor = struct.pack(">HH4xQI4x", 22, 16, 8, 8)
    initiator.good(struct.pack(">BB5xH", Op.UNMAP, 0, len(descriptor)), data=descriptor)
    initiator.good(read16(32, 8, Op.WRITE_SAME_16, 0x08), data=bytes(512))
    initiator.good(read16(48, 8, Op.WRITE_SAME_16, 0x01))
    initiator.good(read10(64, 8, Op.WRITE_SAME_10), data=bytes(512))
    expected = bytearray(data)
    for block in (8, 32, 48, 64):
        expected[block * 512 : (block + 8) * 512] = bytes(4096)
    assert initiator.good(read10(0, 128), 64 << 10) == bytes(expected)
    outside = struct.pack(">HH4xQI4x", 22, 16, 2047, 2)
    initiator.refused(Sense.LBA_OUT_OF_RANGE, struct.pack(">BB5xH", Op.UNMAP, 0, 24), data=outside)
    assert initiator.run(struct.pack(">BB5xH", Op.UNMAP, 0, 24), data=outside[:8]).response == Response.OVERRUN
    assert initiator.good(read10(0, 128), 64 << 10) == bytes(expected)


STORES = ["ram:4M,block-size={size}", "{image},block-size={size}", "{image},direct,block-size={size}"]


@pytest.mark.parametrize("store", STORES, ids=["ram", "file", "direct"])
@pytest.mark.parametrize("size", [512, 4096])
def test_write_same_with_any_pattern(
    host: Callable[..., Initiator], image: Callable[..., Path], store: str, size: int
) -> None:
    """More than the worker writes at once, from a place that is no multiple of that; what is beside it stays. In memory
    as much as is allowed."""
    initiator = host(store.format(image=image(4 << 20), size=size))
    one = bytes(n * 7 % 251 for n in range(size))
    blocks = (1 << 20) // size if store.startswith("ram") else (2 << 20) // size + 1
    initiator.good(read10(3, blocks, Op.WRITE_SAME_10, 0x08), data=one)
    expected = bytes(3 * size) + one * blocks + bytes(3 * size)
    assert initiator.good(read10(0, blocks + 6), len(expected)) == expected
    initiator.good(read16((4 << 20) // size - 2, 0, Op.WRITE_SAME_16), data=one)  # 0: up to the end
    assert initiator.good(read10((4 << 20) // size - 3, 3), 3 * size) == bytes(size) + 2 * one
    assert initiator.run(read10(0, 1, Op.WRITE_SAME_10), data=one[1:]).response == Response.OVERRUN
    initiator.refused(Sense.LBA_OUT_OF_RANGE, read10((4 << 20) // size - 1, 2, Op.WRITE_SAME_10), data=one)


@pytest.mark.parametrize("store", STORES, ids=["ram", "file", "direct"])
def test_verify_compares(host: Callable[..., Initiator], image: Callable[..., Path], store: str) -> None:
    """Every byte counts; a difference is a miscompare, which is neither an error of the disk nor of the guest."""
    initiator = host(store.format(image=image(4 << 20), size=512))
    data = bytes(n // 512 + n & 0xFF for n in range(300 << 10))
    blocks = len(data) // 512
    initiator.good(read10(5, blocks, Op.WRITE_10), data=data)
    for op in (Op.VERIFY_10, Op.VERIFY_16):
        cdb = (read10 if op == Op.VERIFY_10 else read16)(5, blocks, op, 0x02)
        initiator.good(cdb, data=data)
        for at in (0, 100_000, len(data) - 1):
            other = bytearray(data)
            other[at] ^= 1
            initiator.refused(Sense.MISCOMPARE, cdb, data=bytes(other))
        assert initiator.run(cdb, data=data[1:]).response == Response.OVERRUN
    initiator.good(read10(5, blocks, Op.VERIFY_10))
    initiator.good(read10(5, 0, Op.VERIFY_10, 0x02))
    initiator.refused(INVALID_FIELD, read10(5, 1, Op.VERIFY_10, 0x06), data=data[:512])
    metrics = served_by(initiator).metrics()
    assert metrics.total("hcd_requests_total", op="verify", status="ok") == 4
    assert metrics.total("hcd_guest_errors_total") == 0


# -- what disks tell


def test_pages_and_capacities(host: Callable[..., Initiator]) -> None:
    """As sg_inq, sg_vpd, sg_readcap, sg_modes and sg_opcodes ask for them."""
    initiator = host("ram:1M,serial=S-1")
    initiator.good(bytes([Op.TEST_UNIT_READY]))
    assert initiator.good(bytes([Op.INQUIRY, 0, 0, 0, 96]), 96)[8:32] == b"HCD     VIRTUAL DISK    "
    assert initiator.good(bytes([Op.INQUIRY, 1, 0x80, 0, 255]), 255) == b"\x00\x80\x00\x03S-1"
    assert initiator.good(bytes([Op.INQUIRY, 1, 0xB0, 0, 64]), 64)[1] == 0xB0
    initiator.refused(INVALID_FIELD, bytes([Op.INQUIRY, 1, 0x99, 0, 64]), 64)
    assert initiator.refused(INVALID_FIELD, bytes([Op.INQUIRY, 0, 0x80, 0, 64]), 64).field == 2
    assert initiator.good(bytes([Op.READ_CAPACITY_10]), 8) == struct.pack(">II", 2047, 512)
    cdb = struct.pack(">BB8xI", Op.SERVICE_ACTION_IN_16, 0x10, 32)
    assert initiator.good(cdb, 32)[:12] == struct.pack(">QI", 2047, 512)
    assert len(initiator.good(struct.pack(">BBB4xH", Op.MODE_SENSE_10, 0, 0x3F, 255), 255)) == 48
    codes = initiator.good(struct.pack(">BBBBHI", Op.MAINTENANCE_IN, 0x0C, 1, Op.READ_10, 0, 64), 64)
    assert codes[:4] == bytes([0, 3, 0, 10])
    assert initiator.good(bytes([Op.REQUEST_SENSE, 0, 0, 0, 18]), 18)[2] == 0


def test_units_and_targets(host: Callable[..., Initiator]) -> None:
    """A missing unit of a target that is there says so in SCSI; a missing target in virtio."""
    initiator = host("ram:1M", "0:5=ram:2M", "7=ram:3M")
    flat = COMMAND_HEADER.pack(bytes([1, 0, 0x40, 5, 0, 0, 0, 0]), 1, 0, 0, 0) + bytes(32)
    assert initiator.driver.ask(flat, RESPONSE_SIZE, queue=REQUESTQ) == bytes(RESPONSE_SIZE)
    luns = initiator.good(struct.pack(">B5xI", Op.REPORT_LUNS, 64), 64)
    assert luns == struct.pack(">I4x", 16) + bytes(8) + bytes([0, 5, 0, 0, 0, 0, 0, 0])
    assert initiator.good(bytes([Op.READ_CAPACITY_10]), 8, unit=5) == struct.pack(">II", 4095, 512)
    assert initiator.good(bytes([Op.READ_CAPACITY_10]), 8, target=7) == struct.pack(">II", 6143, 512)
    assert initiator.good(bytes([Op.INQUIRY, 0, 0, 0, 36]), 36, unit=1)[0] == 0x7F
    assert initiator.good(struct.pack(">B5xI", Op.REPORT_LUNS, 64), 64, unit=1) == luns
    assert initiator.good(bytes([Op.REQUEST_SENSE, 0, 0, 0, 18]), 18, unit=1)[12] == 0x25
    initiator.refused(Sense.NO_SUCH_UNIT, bytes([Op.TEST_UNIT_READY]), unit=1)
    assert initiator.run(bytes([Op.INQUIRY, 0, 0, 0, 36]), 36, target=1).response == Response.BAD_TARGET


def test_commands_that_are_not_there(host: Callable[..., Initiator]) -> None:
    """PERSISTENT RESERVE IN and OUT among them."""
    initiator = host("ram:1M")
    for opcode in (0x5E, 0x5F, 0x04, 0xFF):
        initiator.refused(Sense.INVALID_OPCODE, bytes([opcode]), 64)
    assert served_by(initiator).metrics().total("hcd_requests_total", op="command", status="unsupported") == 4


def test_write_cache_is_switched(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    """MODE SELECT as Linux sends it; everything else in the page must stay as it is. A new driver finds it on."""
    initiator = host(str(image(1 << 20)))
    sense = initiator.good(bytes([Op.MODE_SENSE_6, 0x08, 0x08, 0, 255]), 255)
    page = bytearray(sense[4:])
    page[2] &= ~0x04
    initiator.good(bytes([Op.MODE_SELECT_6, 0x10, 0, 0, 4 + len(page)]), data=bytes(4) + bytes(page))
    assert not initiator.good(bytes([Op.MODE_SENSE_6, 0x08, 0x08, 0, 255]), 255)[6] & 0x04
    initiator.good(read10(0, 1, Op.WRITE_10), data=bytes(512))
    page[3] = 1
    cdb = bytes([Op.MODE_SELECT_6, 0x10, 0, 0, 4 + len(page)])
    initiator.refused(Sense.INVALID_PARAMETER, cdb, data=bytes(4) + bytes(page))
    initiator.refused(Sense.PARAMETER_LENGTH, bytes([Op.MODE_SELECT_6, 0x10, 0, 0, 3]), data=bytes(3))
    initiator.refused(Sense.PARAMETER_LENGTH, bytes([Op.MODE_SELECT_6, 0x10, 0, 0, 8]), data=bytes(4) + bytes(page[:4]))
    initiator.refused(INVALID_FIELD, bytes([Op.MODE_SELECT_6, 0x11, 0, 0, 0]))
    served = served_by(initiator)
    initiator.driver.close()
    served.wait_disconnected()
    with served.driver() as driver:
        assert Initiator(driver).good(bytes([Op.MODE_SENSE_6, 0x08, 0x08, 0, 255]), 255)[6] & 0x04


def test_stopped_disk(host: Callable[..., Initiator]) -> None:
    initiator = host("ram:1M")
    initiator.good(bytes([Op.START_STOP_UNIT, 0, 0, 0, 0]))
    initiator.refused(Sense.NOT_READY_STOPPED, bytes([Op.TEST_UNIT_READY]))
    initiator.refused(Sense.NOT_READY_STOPPED, read10(0, 1), 512)
    initiator.good(bytes([Op.INQUIRY, 0, 0, 0, 36]), 36)
    initiator.good(bytes([Op.START_STOP_UNIT, 0, 0, 0, 1]))
    initiator.good(read10(0, 1), 512)


# -- task management and events


def test_task_management(host: Callable[..., Initiator]) -> None:
    """A reset is told by a unit attention, once; functions that are not there are rejected."""
    initiator = host("ram:1M", "0:1=ram:1M")
    assert initiator.manage(TaskFunction.ABORT_TASK) == Response.OK
    initiator.good(bytes([Op.TEST_UNIT_READY]))
    assert initiator.manage(TaskFunction.LOGICAL_UNIT_RESET) == Response.OK
    initiator.good(bytes([Op.INQUIRY, 0, 0, 0, 36]), 36)
    initiator.refused(Sense.RESET, bytes([Op.TEST_UNIT_READY]))
    initiator.good(bytes([Op.TEST_UNIT_READY]))
    initiator.good(bytes([Op.TEST_UNIT_READY]), unit=1)
    assert initiator.manage(TaskFunction.I_T_NEXUS_RESET) == Response.OK
    for unit in (0, 1):
        initiator.refused(Sense.RESET, bytes([Op.TEST_UNIT_READY]), unit=unit)
    assert initiator.manage(TaskFunction.CLEAR_ACA) == Response.FUNCTION_REJECTED
    assert initiator.manage(77) == Response.FUNCTION_REJECTED
    assert initiator.manage(TaskFunction.ABORT_TASK, unit=9) == Response.INCORRECT_LUN
    assert initiator.manage(TaskFunction.ABORT_TASK, target=9) == Response.BAD_TARGET
    assert initiator.driver.ask(AN.pack(1, pack_lun(0, 0), 2), 5, queue=CONTROLQ) == bytes(5)


def test_a_function_waits_for_what_is_in_flight(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    """Writes, an abort and more writes at once: every one is answered, and the answers are good."""
    initiator = host(str(image(4 << 20)))
    driver = initiator.driver
    for _ in range(5):
        sent = []
        for number in range(8):
            data = driver.place(command(read10(number * 128, 128, Op.WRITE_10), bytes([number]) * 65536))
            sent.append(driver.queues[REQUESTQ].ring.add(data, driver.make_room(RESPONSE_SIZE)))
        driver.queues[REQUESTQ].publish()
        answer = driver.make_room(1, fill=9)
        lun = TMF.pack(0, TaskFunction.ABORT_TASK_SET, pack_lun(0, 0), 0)
        token = driver.queues[CONTROLQ].submit(driver.place(lun), answer)
        assert driver.queues[CONTROLQ].wait_for(token) == 1
        assert driver.gather(answer) == b"\0"
        for each in sent:
            assert driver.queues[REQUESTQ].wait_for(each) == RESPONSE_SIZE
        for number in range(8):
            assert set(initiator.good(read10(number * 128, 128), 65536)) == {number}


@pytest.mark.parametrize("leaves", [False, True])
def test_commands_that_wait_for_a_function_whose_queue_stops_are_carried_out(
    host: Callable[..., Initiator], image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """The function fails; nobody is left who would let them go on later. Also on a disk that is about to be gone."""
    path = image(1 << 20)
    initiator = host("ram:1M", f"0:1={path},later")
    driver, served = initiator.driver, served_by(initiator)
    device: Any = served.device
    monkeypatch.setattr(Disk, "busy", True)
    answer, room = driver.make_room(1, fill=9), driver.make_room(RESPONSE_SIZE, fill=9)
    lun = TMF.pack(0, TaskFunction.ABORT_TASK_SET, pack_lun(0, 1), 0)
    function = driver.queues[CONTROLQ].submit(driver.place(lun), answer)
    until(lambda: served.metrics().total("hcd_requests_inflight", queue=str(CONTROLQ)) == 1)
    write = command(read10(0, 1, Op.WRITE_10), b"x" * 512, unit=1)
    held = driver.queues[REQUESTQ].submit(driver.place(write), room)
    until(lambda: served.metrics().total("hcd_requests_inflight", queue=str(REQUESTQ)) == 1)
    if leaves:
        path.unlink()
        served.run(lambda: device.resize(None))
    driver.stop_queue(CONTROLQ)
    assert driver.queues[CONTROLQ].wait_for(function) == 1
    assert driver.gather(answer) == bytes([Response.FAILURE])
    assert driver.queues[REQUESTQ].wait_for(held) == RESPONSE_SIZE
    assert driver.gather(room) == bytes(RESPONSE_SIZE)


def test_bad_requests_harm_nobody(host: Callable[..., Initiator]) -> None:
    """Short ones, without room, with types that do not exist: counted and given back."""
    initiator = host("ram:1M")
    driver = initiator.driver
    whole = command(bytes([Op.TEST_UNIT_READY]))
    for data, room, queue in (
        (whole[:-1], RESPONSE_SIZE, REQUESTQ),
        (whole, RESPONSE_SIZE - 1, REQUESTQ),
        (b"", RESPONSE_SIZE, REQUESTQ),
        (b"\0" * 3, 1, CONTROLQ),
        (TMF.pack(0, 0, bytes(8), 0)[:-1], 1, CONTROLQ),
        (TMF.pack(0, 0, bytes(8), 0), 0, CONTROLQ),
        (struct.pack("<I", 3) + bytes(20), 8, CONTROLQ),
    ):
        driver.ask(data, room, queue=queue)
    assert served_by(initiator).host.stats.guest_errors == 7
    assert served_by(initiator).host.stats.handler_errors == 0
    initiator.good(bytes([Op.TEST_UNIT_READY]))


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_disk_grows(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    """The driver gets an event and, with its next command, a unit attention."""
    path = image(1 << 20)
    initiator = host(str(path))
    served = served_by(initiator)
    device: Any = served.device
    room = initiator.driver.make_room(EVENT.size)
    token = initiator.driver.queues[EVENTQ].submit([], room)
    os.truncate(path, 3 << 20)
    assert served.run(lambda: device.resize(None)) == 3 << 20 == device.storage_size()
    assert initiator.driver.queues[EVENTQ].wait_for(token) == EVENT.size
    assert EVENT.unpack(initiator.driver.gather(room)) == (Event.PARAM_CHANGE, pack_lun(0, 0), 0x092A)
    initiator.refused(Sense.CAPACITY_CHANGED, bytes([Op.TEST_UNIT_READY]))
    assert initiator.good(bytes([Op.READ_CAPACITY_10]), 8) == struct.pack(">II", 6143, 512)
    initiator.good(read10(6143, 1, Op.WRITE_10), data=b"e" * 512)
    assert served.run(lambda: device.resize(4 << 20)) == 4 << 20 == path.stat().st_size
    with pytest.raises(DeviceError, match="does not shrink"):
        served.run(lambda: device.resize(1 << 20))


def test_a_missed_event_is_made_up_for(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    """Without a buffer an event is lost; the first buffer that comes says so, a buffer that is too small does not."""
    path = image(1 << 20)
    initiator = host(str(path))
    device: Any = served_by(initiator).device
    os.truncate(path, 2 << 20)
    served_by(initiator).run(lambda: device.resize(None))
    small = initiator.driver.queues[EVENTQ].submit([], initiator.driver.make_room(EVENT.size - 1))
    assert initiator.driver.queues[EVENTQ].wait_for(small) == 0
    assert initiator.event()[0] == Event.EVENTS_MISSED
    room = initiator.driver.make_room(EVENT.size)
    token = initiator.driver.queues[EVENTQ].submit([], room)
    os.truncate(path, 3 << 20)
    served_by(initiator).run(lambda: device.resize(None))
    assert initiator.driver.queues[EVENTQ].wait_for(token) == EVENT.size
    assert EVENT.unpack(initiator.driver.gather(room))[0] == Event.PARAM_CHANGE


def test_buffers_without_room_for_an_event_do_not_hold_up_others() -> None:
    """However many a driver gives, as fast as they are taken: what is left is for another turn."""

    class Ring:
        turns = 0
        passive = False

        def pop(self) -> Any:
            return SimpleNamespace(writable=EVENT.size - 1, complete=lambda _: None)

        def schedule(self) -> None:
            self.turns += 1

    events, ring = Events(), Ring()
    events.start(cast(Any, ring))
    events.report(Event.PARAM_CHANGE, bytes(8), 0)
    events.refilled(cast(Any, ring))
    assert ring.turns == 2


def test_a_disk_comes_and_goes(host: Callable[..., Initiator], image: Callable[..., Path], tmp_path: Path) -> None:
    """One marked "later" is there once its file is, and gone once that is; the other one stays."""
    initiator = host("ram:1M", f"0:1={tmp_path}/late.img,later")
    served = served_by(initiator)
    device: Any = served.device
    events = [initiator.driver.make_room(EVENT.size) for _ in range(2)]
    tokens = [initiator.driver.queues[EVENTQ].submit([], room) for room in events]
    initiator.refused(Sense.NO_SUCH_UNIT, bytes([Op.TEST_UNIT_READY]), unit=1)
    path = image(1 << 20, "late.img")
    served.run(lambda: device.resize(None))
    initiator.refused(Sense.LUNS_CHANGED, bytes([Op.TEST_UNIT_READY]))
    initiator.refused(Sense.LUNS_CHANGED, bytes([Op.TEST_UNIT_READY]), unit=1)
    initiator.good(read10(0, 1, Op.WRITE_10), data=b"x" * 512, unit=1)
    path.unlink()
    served.run(lambda: device.resize(None))
    initiator.refused(Sense.NO_SUCH_UNIT, bytes([Op.TEST_UNIT_READY]), unit=1)
    for token in tokens:
        initiator.driver.queues[EVENTQ].wait_for(token)
    found = [EVENT.unpack(initiator.driver.gather(room)) for room in events]
    assert found == [
        (Event.TRANSPORT_RESET, pack_lun(0, 1), ResetReason.RESCAN),
        (Event.TRANSPORT_RESET, pack_lun(0, 1), ResetReason.REMOVED),
    ]
    image(1 << 20, "late.img")
    assert served.run(lambda: device.resize(None)) == 2 << 20
    with pytest.raises(DeviceError, match="several disks"):
        served.run(lambda: device.resize(4 << 20))


def test_file_that_fails(host: Callable[..., Initiator], image: Callable[..., Path]) -> None:
    """An image that was cut short behind our back: a medium error, and the disk goes on."""
    path = image(4 << 20)
    initiator = host(str(path))
    os.truncate(path, 1 << 20)
    initiator.refused(Sense.READ_ERROR, read10(4096, 8), 4096)
    assert initiator.good(read10(0, 8), 4096) == bytes(4096)


# -- killed and started again


@pytest.mark.long
def test_killed_in_the_middle_of_writes(short_dir: Path, start_hcd: Callable[..., HcdProcess]) -> None:
    """kill -9 with writes in flight, three times: a front end that connects again loses none that was answered."""
    path = short_dir / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    config = f'[[device]]\nname = "host"\ntype = "scsi"\nsocket = "{{dir}}/s"\n[device.options]\ndisk = "{path}"\n'
    hcd = start_hcd(config)
    with Driver.open(short_dir / "s", queues=3, memory_size=64 << 20) as driver:
        ring = driver.queues[REQUESTQ]
        number = 0
        for _ in range(3):
            sent: dict[int, tuple[int, list[tuple[int, int]], list[tuple[int, int]]]] = {}
            for _ in range(16):
                data = driver.place(command(read10(number * 64, 64, Op.WRITE_10), bytes([number + 1]) * 32768))
                room = driver.make_room(RESPONSE_SIZE, fill=0xEE)
                sent[ring.ring.add(data, room)] = (number, data, room)
                number += 1
            ring.publish()
            hcd.kill()
            hcd = start_hcd(config)
            driver.reconnect()
            while sent:
                for used in ring.wait(20):
                    _, data, room = sent.pop(used.token)
                    assert driver.gather(room) == bytes(RESPONSE_SIZE)
                    driver.free(data + room)
        initiator = Initiator(driver)
        initiator.good(read10(0, 0, Op.SYNCHRONIZE_CACHE_10))
    image = path.read_bytes()
    for each in range(number):
        assert set(image[each * 32768 : (each + 1) * 32768]) == {each + 1}, each

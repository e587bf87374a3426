"""Answers to SCSI commands: they stand at the beginning of the writable part, data behind them."""

from __future__ import annotations

from hcd_protocols.virtio.scsi import RESPONSE_HEADER, RESPONSE_SIZE, SENSE_SIZE, Response

from hcd.device import Request
from hcd.devices.scsi_cdb import SenseCode, Status, fixed_sense

__all__ = ["GOOD", "check", "data", "fail", "overrun", "prepare"]

GOOD = bytes(RESPONSE_SIZE)


def _response(residual: int, status: int = Status.GOOD, response: int = Response.OK, sense: bytes = b"") -> bytes:
    head = RESPONSE_HEADER.pack(len(sense), min(residual, 0xFFFFFFFF), 0, status, response)
    return head + sense.ljust(SENSE_SIZE, b"\0")


def _buffered(request: Request) -> int:
    """Bytes of data that the driver has buffers for, in either direction."""
    return max(0, request.writable_size - RESPONSE_SIZE) + request.readable


def prepare(request: Request, moved: int = 0) -> None:
    """Write the answer of success in advance, ``moved`` bytes of data being moved; the cursor stands behind it then."""
    residual = _buffered(request) - moved
    request.write(_response(residual) if residual else GOOD)


def data(request: Request, answer: bytes, room: int) -> None:
    """Success, with as much of ``answer`` as the allocation length ``room`` allows."""
    part = answer[:room]
    if len(part) > request.writable_size - RESPONSE_SIZE:
        overrun(request)
        return
    request.write_at(0, _response(_buffered(request) - len(part)))
    request.write_at(RESPONSE_SIZE, part)
    request.complete(RESPONSE_SIZE + len(part))


def check(request: Request, sense: SenseCode, field: int = -1) -> None:
    """CHECK CONDITION."""
    answer = _response(_buffered(request), Status.CHECK_CONDITION, Response.OK, fixed_sense(sense, field))
    request.status = 2 if sense.key == 5 else 1
    request.write_at(0, answer)
    request.complete(RESPONSE_SIZE)


def fail(request: Request, response: Response) -> None:
    """The command never reached a logical unit, or the device failed."""
    request.status = 1
    request.write_at(0, _response(_buffered(request), response=response))
    request.complete(RESPONSE_SIZE)


def overrun(request: Request) -> None:
    """The CDB asks for more data than the driver has buffers for."""
    fail(request, Response.OVERRUN)

"""Front ends that come and go by the hundred, in the middle of everything: a real hcd process holds what it held.

HCD_SOAK is how many of each kind (500), e.g. ``HCD_SOAK=20000 make test PYTEST_ARGS=tests/hostile/test_soak.py``.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hcd_protocols.virtio.blk import RequestType
from tables import table

from hcd.demo.hcd_process import HcdProcess, Resources
from hcd.frontend.blk import BLOCK_FEATURES, BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.frontend.errors import FrontendError
from hcd.frontend.memory import SharedMemory
from tests.fuzz.conversations import front_end

pytestmark = pytest.mark.long

TIMES = int(os.environ.get("HCD_SOAK", "500"))
#: before anything is compared: caches, pools and the allocator have had their share
WARM_UP = 60
#: resident bytes that may come and go with the moment: allocators keep some, whatever the number of rounds
SLACK = 4 << 20
#: mappings of the allocator (arenas of threads, large blocks) that come and go likewise
MAPPING_SLACK = 8

DEVICES = table("disk", "blk", blk_file="{dir}/disk.img", num_queues=2) + table("ram", "blk", ram="1M")

ExpectSettled = Callable[[HcdProcess, Resources], None]


@dataclass
class Size:
    """How much of the machine a process takes."""

    mappings: int
    resident: int

    @classmethod
    def of(cls, pid: int) -> Size:
        proc = Path(f"/proc/{pid}")
        found = re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())
        assert found
        return cls(len((proc / "maps").read_text().splitlines()), int(found[1]) * 1024)


@pytest.fixture
def hcd(start_hcd: Callable[..., HcdProcess], short_dir: Path) -> HcdProcess:
    (short_dir / "disk.img").write_bytes(bytes(1 << 20))
    return start_hcd(DEVICES, daemon="drain_timeout = 2.0")


def soak(hcd: HcdProcess, expect_settled: ExpectSettled, once: Callable[[int], None]) -> None:
    """``once`` WARM_UP times, then TIMES times: descriptors, threads, mappings and memory are as between the two."""
    for number in range(WARM_UP):
        once(number)
    expect_settled(hcd, hcd.resources())
    resources, size = hcd.resources(), Size.of(hcd.process.pid)
    for number in range(WARM_UP, WARM_UP + TIMES):
        once(number)
    expect_settled(hcd, resources)
    after = Size.of(hcd.process.pid)
    assert after.mappings <= size.mappings + MAPPING_SLACK, (size, after)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which keeps what was freed, to see late uses
        assert after.resident <= size.resident + SLACK, (size, after)
    assert "Traceback" not in hcd.log_text


def use(path: Path) -> None:
    """Verified I/O."""
    with Frontend.open(path, device=BLOCK_FEATURES) as frontend:
        disk = BlockDriver(frontend.memory, frontend.queues[0])
        data = os.urandom(512)
        disk.write(3, data)
        assert disk.read(3, 512) == data


def test_hundreds_of_front_ends_that_hang_up_in_the_middle_of_a_message(
    hcd: HcdProcess, short_dir: Path, expect_settled: ExpectSettled
) -> None:
    """A conversation with descriptors, cut off at a random byte: mid-header, mid-payload, between messages."""
    with SharedMemory.of_size(1 << 20) as memory:
        fd = memory.regions[0].fd

        def once(number: int) -> None:
            chance = random.Random(number)
            conversation = front_end()[chance.randrange(len(front_end()))]
            with Frontend(short_dir / ("disk.sock", "ram.sock")[number % 2]) as frontend, suppress(FrontendError):
                for data, count in conversation[: chance.randrange(len(conversation))]:
                    frontend.send_raw(data, [fd] * count)
                data, count = chance.choice(conversation)
                frontend.send_raw(data[: chance.randrange(1, len(data))], [fd] * count)
                if chance.getrandbits(1):  # half a hang-up, after which hcd hangs up too
                    frontend.link.sock.shutdown(socket.SHUT_WR)
                    frontend.wait_hangup()

        soak(hcd, expect_settled, once)
    use(short_dir / "disk.sock")
    use(short_dir / "ram.sock")


def test_hundreds_of_front_ends_that_hang_up_in_the_middle_of_io(
    hcd: HcdProcess, short_dir: Path, expect_settled: ExpectSettled
) -> None:
    """Reads, writes and flushes are in flight on two queues of a file, or one of memory, when the connection ends."""
    kinds = (RequestType.IN, RequestType.OUT, RequestType.FLUSH)

    def once(number: int) -> None:
        chance = random.Random(number)
        name = ("disk", "ram")[number % 2]
        packed = bool(chance.getrandbits(1))
        queues = 2 if name == "disk" else 1
        with Frontend.open(
            short_dir / f"{name}.sock", device=BLOCK_FEATURES, queues=queues, packed=packed, memory_size=1 << 20
        ) as frontend:
            for queue in frontend.queues.values():
                disk = BlockDriver(frontend.memory, queue)
                for n in range(chance.randrange(1, 16)):
                    kind = chance.choice(kinds)
                    data = bytes(4096) if kind is RequestType.OUT else b""
                    length = 4096 if kind is RequestType.IN else 0
                    disk.add(BlockRequest(kind, 8 * n, data, length))
                queue.publish()

    soak(hcd, expect_settled, once)
    use(short_dir / "disk.sock")
    use(short_dir / "ram.sock")

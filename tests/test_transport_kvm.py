"""The transport for raw doorbells over real sockets: hcd on one side, a VMM without a virtual machine on the other."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from hcd_protocols.doorbell import DoorbellItem, Held, Item, Kind, Place, Reference, TableComplete
from tsc import measure_tsc

from hcd.config import DeviceSpec
from hcd.dataplane.stats import HotText
from hcd.device import Bell, DoorbellDecl, DoorbellDevice, InterruptDecl
from hcd.device import Path as RingPath
from hcd.devices.echo import Echo
from hcd.devices.nullio import NullIo
from hcd.doorbell import PathSource, Registry
from hcd.doorbell_host import DoorbellHost
from hcd.errors import ConfigError, PluginError
from hcd.lanes import open_lanes
from hcd.metrics import cold
from hcd.testing.vmm import Gone, Vmm
from hcd.transports import kvm

T = TypeVar("T")

PAGE = 4096
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "doorbells.md"


class Counter(DoorbellDevice):
    """Counts and answers; "bad" raises. Notes what happens to it."""

    def __init__(self, name: str = "dev", options: dict[str, Any] | None = None, *, bells: int = 2) -> None:
        super().__init__(name, options or {})
        self.bells = bells
        self.rings: dict[str, int] = {}
        self.calls: list[str] = []
        self.changed = trio.Event()

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        made = [DoorbellDecl(f"d{i}", RingPath.MMIO, 0x1000 + 4 * i, 4, stamp=8 * i) for i in range(self.bells)]
        return [*made, DoorbellDecl("bad", RingPath.PIO, 0x510, 2, 7)]

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return [InterruptDecl("irq")]

    @property
    def memory_size(self) -> int:
        return -(-8 * self.bells // PAGE) * PAGE

    def connect(self) -> None:
        self.calls.append("connect")

    def disconnect(self) -> None:
        self.calls.append("disconnect")

    def ring(self, doorbell: Bell, count: int) -> Any:
        self.handle(doorbell, count)

    def handle(self, doorbell: Bell, count: int) -> None:
        if doorbell.name == "bad":
            raise ZeroDivisionError("asked to raise")
        self.rings[doorbell.name] = self.rings.get(doorbell.name, 0) + count
        self.interrupt("irq", doorbell)


class AsyncCounter(Counter):
    """The same in trio."""

    async def ring(self, doorbell: Bell, count: int) -> None:
        await trio.lowlevel.checkpoint()
        self.handle(doorbell, count)


LANES = [Counter, AsyncCounter]


class Served:
    """A device that is served, and what a test needs of it."""

    def __init__(self, host: DoorbellHost, path: str, hot: HotText, registry: Registry) -> None:
        self.host = host
        self.path = path
        self.device: Any = host.device
        self._hot = hot
        self._registry = registry

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function)

    def stats(self, name: str) -> Any:
        return self.host.doorbells[name].doorbell.stats

    def metrics(self) -> str:
        return b"".join(cold.Renderer(self._hot, self._registry)()).decode()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110  (what is awaited has no event)
                await trio.sleep(0.001)

    async def until_free(self) -> None:
        """Wait until the last session is over: hcd comes to the next peer only then, and this one says nothing."""
        def knock() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(20)
                sock.connect(self.path)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1000) == b""

        await self.in_thread(knock)
        assert not self.host.connected


@asynccontextmanager
async def served(device: DoorbellDevice, directory: Path) -> AsyncIterator[Served]:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        try:
            async with serving(device, path, listener) as s:
                yield s
        finally:
            os.unlink(path)


@asynccontextmanager
async def serving(device: DoorbellDevice, path: str, listener: socket.socket) -> AsyncIterator[Served]:
    hot, registry = HotText(), Registry()
    async with open_lanes() as lanes:
        host = DoorbellHost(
            DeviceSpec(name="dev", type="counter", socket=path), device, lanes=lanes, registry=registry, hot=hot
        )
        await host.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kvm.serve, host, listener)
            yield Served(host, path, hot, registry)
            nursery.cancel_scope.cancel()
        await host.close()


#: after every test: no descriptor, thread or mapping stays
pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("kind", LANES)
async def test_rings_are_counted_and_answered(kind: type[Counter], short_dir: Path) -> None:
    """Each ring is counted, handed to the device and answered by the interrupt; times are observed."""
    async with served(kind(), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                assert vmm.welcome is not None
                assert (vmm.welcome.device, vmm.welcome.doorbells, vmm.welcome.interrupts) == ("dev", 3, 1)
                for _ in range(50):
                    vmm.ring("d0")
                    vmm.wait_interrupt("irq")
                vmm.ring("d1", 1000)
                vmm.wait_interrupt("irq")

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 50, "d1": 1000}
        assert (s.stats("d0").rings, s.stats("d0").wakeups) == (50, 50)
        assert (s.stats("d1").rings, s.stats("d1").wakeups) == (1000, 1)
        assert s.stats("d0").dispatch.count == s.stats("d0").response.count == 50
        assert s.stats("d0").ring.count == 0  # nobody gave a clock
        assert s.device.calls == ["connect", "disconnect"]
        assert 'hcd_interrupts_total{device="dev",queue="irq",outcome="sent"} 51' in s.metrics()


async def test_what_a_vmm_rang_before_it_died_is_counted(short_dir: Path) -> None:
    """Rings are exact also when the VMM goes right behind them."""
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            for _ in range(20):
                with Vmm(s.path) as vmm:
                    for _ in range(25):
                        vmm.ring("d0", 4)

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 2000}
        assert s.stats("d0").rings == 2000


@pytest.mark.parametrize("kind", LANES)
async def test_a_handler_that_raises_is_counted_and_the_device_goes_on(
    kind: type[Counter], short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(kind(), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                vmm.ring("bad")
                vmm.ring("d0")
                vmm.wait_interrupt("irq")

        await s.in_thread(drive)
        await s.until_free()
        assert s.host.stats.handler_errors == 1
        assert s.stats("bad").rings == 1
        assert "the handler of" in caplog.text
        assert "asked to raise" in caplog.text


async def test_outcomes_are_told_per_doorbell(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the VMM could not register is said with its errno, shown in the metrics, and gone with the VMM."""
    caplog.set_level("INFO")
    async with served(Counter(), short_dir) as s:
        errors = {"d1": errno.EEXIST, "bad": errno.EOPNOTSUPP}

        def attach() -> Vmm:
            return Vmm(s.path, register=lambda item: errors.get(getattr(item, "name", ""), 0))

        vmm = await s.in_thread(attach)
        await s.until(lambda: "1 of 3 doorbells and 1 of 1 interrupts registered" in caplog.text)
        text = s.metrics()
        assert 'hcd_doorbell_registered{device="dev",path="mmio",queue="d0"} 1.0' in text
        assert 'hcd_doorbell_registered{device="dev",path="mmio",queue="d1"} 0.0' in text
        assert 'hcd_doorbell_registered{device="dev",path="pio",queue="bad"} 0.0' in text
        info = next(line for line in text.splitlines() if line.startswith("hcd_doorbell_info") and '"bad"' in line)
        for label in ('source="registered"', 'transport="kvm"', 'address="0x510/2=0x7"', 'kind="ioeventfd"'):
            assert label in info
        assert "doorbell d1 (mmio 0x1004/4) is not registered: EEXIST" in caplog.text
        assert "doorbell bad (pio 0x510/2=0x7) is not registered: EOPNOTSUPP" in caplog.text
        vmm.close()
        await s.until_free()
        assert 'hcd_doorbell_registered{device="dev",path="mmio",queue="d0"} 0.0' in s.metrics()


async def test_an_interrupt_that_is_not_registered_is_absent(short_dir: Path) -> None:
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            errors = {Kind.INTERRUPT: errno.EBUSY}
            with Vmm(s.path, register=lambda item: errors.get(item.reference.kind, 0)) as vmm:
                vmm.ring("d0")

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 1}
        assert s.host.interrupts["irq"].line.stats.absent == 1


async def test_more_doorbells_than_one_message_carries(short_dir: Path) -> None:
    """A table of 600 doorbells comes in parts; all of them ring."""
    async with served(Counter(bells=600), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                assert sum(reference.kind is Kind.DOORBELL for reference in vmm.fds) == 601
                for i in range(600):
                    vmm.ring(f"d{i}", i + 1)

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {f"d{i}": i + 1 for i in range(600)}


async def test_one_vmm_at_a_time(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second VMM is told that it is refused; the first goes on; the next after it is served."""
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                with pytest.raises(Gone, match="another VMM is attached"):
                    Vmm(s.path)
                vmm.ring("d0")
                vmm.wait_interrupt("irq")
            with Vmm(s.path) as vmm:
                vmm.ring("d0")
                vmm.wait_interrupt("irq")

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 2}
        assert "a second VMM was refused" in caplog.text


async def test_an_eventfd_serves_one_vmm_only(short_dir: Path) -> None:
    """The next VMM gets eventfds of its own: what the last one still holds rings nothing."""
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            old = Vmm(s.path).keep()
            with Vmm(s.path) as vmm:
                for held in old:
                    if held.item.reference.kind is Kind.DOORBELL:
                        os.eventfd_write(held.fd, 100)
                vmm.ring("d0")
                vmm.wait_interrupt("irq")
            for held in old:
                os.close(held.fd)

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 1}


async def test_reattaching_after_a_restart_of_hcd(short_dir: Path) -> None:
    """The VMM keeps its eventfds, rings while nobody is there, and the next hcd counts that too. Memory stays."""
    async with served(Counter(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path))
        await s.until(lambda: s.host.connected)
        with vmm.map_memory() as memory:
            memory[PAGE - 8 :] = b"the same"
    with pytest.raises(Gone):
        vmm.until(TableComplete)
    vmm.ring("d0", 5)
    vmm.ring("d1", 6)
    held = vmm.keep()
    async with served(Counter(), short_dir) as s:
        def again() -> Vmm:
            with Vmm(s.path, held=held) as vmm:
                assert len(vmm.adopted) == len(held) == 5
                assert vmm.removed == []
                vmm.wait_interrupt("irq")
                vmm.ring("d0")
                with vmm.map_memory() as memory:
                    assert memory[PAGE - 8 :] == b"the same"
            return vmm

        await s.in_thread(again)
        await s.until_free()
        assert s.device.rings == {"d0": 6, "d1": 6}
        assert s.stats("d0").rings == 6


async def test_reattaching_to_another_table(short_dir: Path) -> None:
    """What changed is removed and comes new under its id; what is gone is removed; the rest stays."""
    async with served(Counter(), short_dir) as s:
        held = await s.in_thread(lambda: Vmm(s.path).keep())
        await s.until_free()

        def moved(one: Held) -> Held:
            item = one.item
            if isinstance(item, DoorbellItem) and item.name == "d1":
                return Held(DoorbellItem(item.id, "d1", Place.MMIO, 0x9000, 4, None, item.stamp), one.fd)
            return one

        def drive() -> None:
            extra = Held(DoorbellItem(99, "gone", Place.PIO, 1), os.eventfd(0))
            with Vmm(s.path, held=[*map(moved, held), extra]) as vmm:
                d1 = vmm.reference("d1")
                assert set(vmm.removed) == {Reference(Kind.DOORBELL, 99), d1}
                assert d1 not in vmm.adopted
                d1_item = vmm.items[d1]
                assert isinstance(d1_item, DoorbellItem)
                assert d1_item.address == 0x1004
                vmm.ring("d0")
                vmm.ring("d1")

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 1, "d1": 1}


async def test_a_held_descriptor_that_is_no_eventfd(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served(Counter(), short_dir) as s:
        held = await s.in_thread(lambda: Vmm(s.path).keep())
        await s.until_free()

        def drive() -> None:
            with open(os.devnull) as null:
                wrong = [Held(one.item, os.dup(null.fileno())) if one.item.reference.kind is Kind.INTERRUPT else one
                         for one in held]
            with pytest.raises(Gone, match="no eventfd"):
                Vmm(s.path, held=wrong)
            for old, new in zip(held, wrong, strict=True):
                if old is not new:
                    os.close(old.fd)

        await s.in_thread(drive)
        await s.until_free()
        assert s.host.stats.protocol_errors == 1


async def test_unsealed_memory_is_not_adopted(short_dir: Path) -> None:
    """Memory that the VMM could truncate under hcd is replaced by memory of hcd's own."""
    async with served(Counter(), short_dir) as s:
        held = await s.in_thread(lambda: Vmm(s.path).keep())
        await s.until_free()

        def unsealed(one: Held) -> Held:
            if one.item.reference.kind is not Kind.MEMORY:
                return one
            os.close(one.fd)
            fd = os.memfd_create("unsealed")
            os.ftruncate(fd, PAGE)
            return Held(one.item, fd)

        def drive() -> None:
            with Vmm(s.path, held=[unsealed(one) for one in held]) as vmm:
                assert vmm.removed == [Reference(Kind.MEMORY, 1)]
                with vmm.map_memory(), pytest.raises(OSError, match="not permitted"):
                    os.ftruncate(vmm.fds[Reference(Kind.MEMORY, 1)], 0)

        await s.in_thread(drive)
        await s.until_free()


@pytest.mark.parametrize("kind", LANES)
async def test_doorbells_come_and_go(kind: type[Counter], short_dir: Path) -> None:
    """A device adds and removes doorbells while a VMM is attached; counters of a name go on."""
    async with served(kind(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path))
        await s.until(lambda: s.host.connected)
        new = DoorbellDecl("new", RingPath.PIO, 0x600)
        for rings in (3, 6):
            await s.host.lane.run(lambda: s.device.add_doorbells([new]))
            await s.in_thread(lambda: vmm.until(TableComplete))
            await s.in_thread(lambda: (vmm.ring("new", 3), vmm.wait_interrupt("irq")))
            assert s.device.rings == {"new": rings}
            old = vmm.reference("new")
            await s.host.lane.run(lambda: s.device.remove_doorbells(["new"]))
            await s.in_thread(lambda: vmm.until(TableComplete))
            assert vmm.removed[-1] == old
        assert 'hcd_doorbell_rings_total{device="dev",queue="new",path="pio"} 6' in s.metrics()
        with pytest.raises(ConfigError, match="have the same place"):
            await s.host.lane.run(lambda: s.device.add_doorbells([DoorbellDecl("x", RingPath.MMIO, 0x1000, 4)]))
        with pytest.raises(KeyError):
            await s.host.lane.run(lambda: s.device.remove_doorbells(["new"]))
        vmm.close()
        await s.until_free()


async def test_changes_without_a_vmm(short_dir: Path) -> None:
    """A doorbell that was added while nobody was attached is in the next VMM's table."""
    async with served(Counter(), short_dir) as s:
        await s.host.lane.run(lambda: s.device.add_doorbells([DoorbellDecl("new", RingPath.PIO, 0x600)]))
        await s.host.lane.run(lambda: s.device.remove_doorbells(["d0"]))

        def drive() -> None:
            with Vmm(s.path) as vmm:
                vmm.ring("new")
                with pytest.raises(KeyError):
                    vmm.reference("d0")

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"new": 1}


GARBAGE = {
    "noise": b"GET / HTTP/1.1\r\n\r\n",
    "one byte": b"\x01",
    "wrong magic": struct.pack("<HHI8sHHIII32s", 1, 0, 64, b"abcdefgh", 1, 1, 0, 0, 0, b"x"),
    "wrong version": struct.pack("<HHI8sHHIII32s", 1, 0, 64, b"hcd-bell", 2, 9, 0, 0, 0, b"x"),
    "status first": struct.pack("<HHIIiQ", 5, 1, 24, 1, 0, 0),
    "too long": b"\x01" * 100_000,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_ends_its_connection(data: bytes, short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage is answered with a reason, said in the log, its descriptors closed; the next VMM is served."""
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(20)
                sock.connect(s.path)
                socket.send_fds(sock, [data], [sock.fileno()] * 3)
                answer = sock.recv(1000)
                assert answer[:2] == b"\x40\0"
                assert answer[16:].strip(b"\0").decode().isprintable()
                assert sock.recv(1000) == b""
            with Vmm(s.path) as vmm:
                vmm.ring("d0")
                vmm.wait_interrupt("irq")

        await s.in_thread(drive)
        await s.until_free()
        assert s.host.stats.protocol_errors == 1
        assert "broke the protocol" in caplog.text


async def test_garbage_after_attaching(short_dir: Path) -> None:
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            vmm = Vmm(s.path)
            vmm.ring("d0")
            vmm.sock.send(struct.pack("<HHIIiQ", 5, 1, 24, 1, 0, 0))
            with pytest.raises(Gone, match="nothing was asked"):
                vmm.until(TableComplete)
            vmm.close()

        await s.in_thread(drive)
        await s.until_free()
        assert s.device.rings == {"d0": 1}


async def test_a_vmm_that_says_nothing_makes_room(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "HELLO_TIMEOUT", 0.05)
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
                mute.settimeout(20)
                mute.connect(s.path)
                assert b"no whole greeting" in mute.recv(1000)
                assert mute.recv(1) == b""
                Vmm(s.path).close()

        await s.in_thread(drive)


async def test_killed_in_the_middle_of_attaching(short_dir: Path) -> None:
    """A VMM that dies before it answered leaves nothing behind; the device never saw it."""
    async with served(Counter(bells=600), short_dir) as s:
        class Dead(Exception):
            pass

        def die(item: Item) -> int:
            if item.reference == Reference(Kind.DOORBELL, 300):
                raise Dead
            return 0

        def drive() -> None:
            for _ in range(5):
                with pytest.raises(Dead):
                    Vmm(s.path, register=die)

        await s.in_thread(drive)
        await s.in_thread(lambda: Vmm(s.path).close())
        await s.until(lambda: s.device.calls == ["connect", "disconnect"])


@pytest.mark.skipif(
    "constant_tsc" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"),
    reason="the kernel does not call this machine's TSC constant",
)
async def test_stamps_are_timed_by_the_clock_of_the_vmm(short_dir: Path) -> None:
    """Single rings behind a fresh stamp are observed, with a plausible time; others are not."""
    async with served(Counter(), short_dir) as s:
        offset = -123_456_789
        observed = s.stats("d0").ring

        def drive() -> int:
            with Vmm(s.path) as vmm, vmm.map_memory() as memory:
                def ring(count: int, *, stamp: bool = True) -> None:
                    if stamp:
                        struct.pack_into("<Q", memory, 0, tsc() + offset)
                    vmm.ring("d0", count)
                    vmm.wait_interrupt("irq")

                tsc_khz, tsc = measure_tsc()
                for _ in range(10):
                    ring(1)
                assert observed.count == 0  # without a clock a stamp means nothing
                vmm.conn.set_clock(tsc_khz=tsc_khz, tsc_offset=offset)
                vmm.send()
                limit = time.monotonic() + 20
                while observed.count == 0 and time.monotonic() < limit:  # clock and rings take different ways
                    ring(1)
                before = observed.count
                assert before
                for count in (1, 1, 1, 7):
                    ring(count)
                ring(1, stamp=False)  # the stamp is an old one
                return int(before)

        before = await s.in_thread(drive)
        await s.until_free()
        assert observed.count == before + 3
        assert s.stats("d1").ring.count == 0
        assert 0 < observed.quantile(0.5) < 5e9


async def test_the_device_sees_the_shared_memory(short_dir: Path) -> None:
    """What the guest writes the device reads, at the address that the VMM gave; afterwards it is gone."""
    async with served(Counter(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path))
        await s.until(lambda: s.host.connected)
        with vmm.map_memory() as memory:
            memory[100:105] = b"hello"
            assert bytes(s.device.memory[100:105]) == b"hello"
        assert s.device.memory_address == 0xD0000000
        vmm.close()
        await s.until_free()
        await s.until(lambda: s.device.memory is None)


def mapped() -> bool:
    """Whether shared memory of a doorbell device is mapped here."""
    return "hcd-doorbell" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("other", [None, "nothing"])
async def test_a_device_that_puts_something_else_in_the_place_of_its_memory(short_dir: Path, other: Any) -> None:
    """The connection ends as others do, with its memory given back, and the next one is served."""
    async with served(Counter(), short_dir) as s:
        for _ in range(2):
            vmm = await s.in_thread(lambda: Vmm(s.path))
            await s.until(lambda: s.host.connected)
            assert mapped()
            s.device.memory = other
            vmm.close()
            await s.until_free()
            assert s.device.memory is None
            assert not mapped()


async def test_the_device_of_the_document(short_dir: Path) -> None:
    """The example of docs/doorbells.md is a device as it stands there."""
    names: dict[str, Any] = {}
    exec(DOCUMENT.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0], names)
    async with served(names["Lamp"]("lamp", {}), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                vmm.ring("switch")
                assert vmm.wait_interrupt("done") == 1

        await s.in_thread(drive)


# -- the devices in tree


async def test_nullio(short_dir: Path) -> None:
    options = {"ports": "0x510/2=7, 0x514", "gpas": "0xfee00000", "any_gpas": "0xfee01000", "connections": "3"}
    async with served(NullIo("dev", options), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                for name in ("pio0", "pio1", "mmio0", "any0", "hyperv0"):
                    vmm.ring(name, 10)

        await s.in_thread(drive)
        await s.until_free()
        text = s.metrics()
        for name, path in (("pio0", "pio"), ("pio1", "pio"), ("mmio0", "mmio"), ("any0", "mmio"),
                           ("hyperv0", "hypercall")):
            assert f'hcd_doorbell_rings_total{{device="dev",queue="{name}",path="{path}"}} 10' in text
            assert s.host.doorbells[name].doorbell.source is PathSource.REGISTERED
        kinds = {name: hosted.doorbell.kind for name, hosted in s.host.doorbells.items()}
        assert kinds == {"pio0": "ioeventfd", "pio1": "ioeventfd", "mmio0": "ioeventfd", "any0": "any-length",
                         "hyperv0": "hyperv"}


@pytest.mark.parametrize("stamps", [False, True])
async def test_echo(stamps: bool, short_dir: Path) -> None:
    """Each doorbell's rings come back by its interrupt; with stamps their number stands in the memory before."""
    async with served(Echo("dev", {"ports": "0x510 0x514", "stamps": stamps}), short_dir) as s:
        def drive() -> None:
            for _ in range(2):
                with Vmm(s.path) as vmm:
                    for i in range(1, 50):
                        vmm.ring("pio1")
                        assert vmm.wait_interrupt("pio1") == 1
                        if stamps:
                            with vmm.map_memory() as memory:
                                assert struct.unpack_from("<QQ", memory, 16) == (0, i)
                    vmm.ring("pio0")
                    vmm.wait_interrupt("pio0")

        await s.in_thread(drive)
        await s.until_free()
        assert s.stats("pio1").response.count == 98


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "no doorbells"),
        ({"ports": "0x510/3"}, "width 3"),
        ({"ports": "0x10000"}, "beyond"),
        ({"ports": "banana"}, "is not ADDRESS"),
        ({"ports": "010"}, "is not ADDRESS"),
        ({"ports": "9" * 5000}, "is not ADDRESS"),
        ({"gpas": "0x1000=08"}, "is not ADDRESS"),
        ({"ports": "1/1=256"}, "does not fit"),
        ({"any_gpas": "0x1000=5"}, "does not fit"),
        ({"ports": "1,1"}, "the same place"),
        ({"connections": "0x1000000"}, "beyond"),
        ({"ports": "1", "stamps": True, "memory_at": 5}, "start of a page"),
    ],
)
async def test_options_that_cannot_be(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        await open_alone(lambda: NullIo("dev", options))


async def open_alone(make: Callable[[], DoorbellDevice]) -> None:
    """Make and open a device; raises what that raises."""
    failure: Exception | None = None
    async with open_lanes() as lanes:
        try:
            spec = DeviceSpec("dev", "bad", "/none")
            host = DoorbellHost(spec, make(), lanes=lanes, registry=Registry(), hot=HotText())
            await host.open()
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


async def test_declarations_that_cannot_be() -> None:
    """What a plug-in gets wrong is the plug-in's fault, and said before anything is served."""

    class Bad(Counter):
        declared: Sequence[DoorbellDecl] = ()

        @property
        def doorbells(self) -> Sequence[DoorbellDecl]:
            return self.declared

    one = DoorbellDecl("a", RingPath.PIO, 1)
    for declared, expected in (
        ([one, DoorbellDecl("a", RingPath.PIO, 2)], '"a" twice'),
        ([DoorbellDecl("a", RingPath.DIRECT, 2)], "expected pio, mmio, or hypercall"),
        ([DoorbellDecl("a", RingPath.HYPERCALL, 2)], "expected pio, mmio, or hypercall"),
        ([DoorbellDecl("a", RingPath.PIO, 2, stamp=PAGE)], "not in the shared memory"),
    ):
        device = Bad()
        device.declared = declared
        with pytest.raises(PluginError, match=expected):
            await open_alone(partial(lambda device: device, device))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("doorbells", SystemExit(3), "SystemExit: 3"),
        ("interrupts", ZeroDivisionError("none"), "ZeroDivisionError: none"),
        ("memory_wanted", KeyboardInterrupt(), "KeyboardInterrupt: "),
        ("doorbells", None, "TypeError"),
        ("interrupts", ["done"], "AttributeError"),
        ("memory_size", "4K", "TypeError"),
    ],
)
async def test_a_device_that_cannot_say_what_it_is_is_refused(name: str, value: object, expected: str) -> None:
    """Also with what is for programs: the daemon that is told to reload goes on with the others."""

    def say(device: Counter) -> object:
        if isinstance(value, BaseException):
            raise value
        return value

    kind = type("Odd", (Counter,), {name: property(say)})
    with pytest.raises(PluginError, match=f"Odd, asked what it is: {expected}"):
        await open_alone(kind)


class Slow(AsyncCounter):
    """Handles "d0" only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = trio.Event()

    async def ring(self, doorbell: Bell, count: int) -> None:
        if doorbell.name == "d0":
            await self.go.wait()
        await super().ring(doorbell, count)


async def test_what_was_rung_while_an_async_handler_ran_is_counted(short_dir: Path) -> None:
    """The VMM is gone before the handler has ended, and before hcd has looked at the eventfd again."""
    async with served(Slow(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path))
        vmm.ring("d0")
        await s.until(lambda: s.stats("d0").rings == 1)
        vmm.ring("d0", 5)
        vmm.close()
        await s.until(lambda: s.host.on_change is None)  # the session ends
        await trio.testing.wait_all_tasks_blocked()
        s.device.go.set()
        await s.until_free()
        assert s.device.rings == {"d0": 6}
        assert s.host.stats.handler_errors == 0


async def test_a_handler_that_does_not_end_holds_up_no_other_doorbell(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled after drain_timeout, which is said and counted; what others were rung is handled."""
    async with served(Slow(), short_dir) as s:
        s.host.drain_timeout = 0.05
        vmm = await s.in_thread(lambda: Vmm(s.path))
        vmm.ring("d0")
        await s.until(lambda: s.stats("d0").rings == 1)
        vmm.ring("d1", 7)
        vmm.close()
        await s.until_free()
        assert s.device.rings == {"d1": 7}
        assert s.host.stats.handler_errors == 1
        assert "doorbell d0: the handler of Slow did not end within 0.05 s" in caplog.text
        assert s.device.calls == ["connect", "disconnect"]


async def test_a_vmm_that_gives_up_is_hung_up_on(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ERROR is the last message of a connection: what comes behind it is not read, nor logged."""
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            with Vmm(s.path) as vmm:
                for _ in range(50):
                    vmm.conn.send_error("no more of this", errno.EIO)
                    try:
                        vmm.send()
                    except (BrokenPipeError, ConnectionResetError):
                        break
                with pytest.raises((Gone, ConnectionResetError)):
                    vmm.until(TableComplete)

        await s.in_thread(drive)
        await s.until_free()
        assert caplog.text.count("gives up: no more of this") == 1
        assert s.host.stats.protocol_errors == 0


@pytest.mark.parametrize("kind", LANES)
async def test_a_doorbell_that_was_removed_is_not_heard_any_more(kind: type[Counter], short_dir: Path) -> None:
    """Not even while the VMM does not know it yet, nor when it registers one that was gone before it could."""
    async with served(kind(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path))
        await s.until(lambda: s.host.connected)
        new = DoorbellDecl("new", RingPath.PIO, 0x600)
        old = s.stats("d1")
        await s.host.lane.run(lambda: s.device.remove_doorbells(["d1"]))
        await s.host.lane.run(lambda: s.device.add_doorbells([new]))
        await s.host.lane.run(lambda: s.device.remove_doorbells(["new"]))
        vmm.ring("d1", 7)
        await s.until(lambda: old.rings == 7)

        def settle() -> None:
            for _ in range(3):
                vmm.until(TableComplete)
            vmm.ring("d0")
            vmm.wait_interrupt("irq")

        await s.in_thread(settle)
        vmm.close()
        await s.until_free()
        assert s.device.rings == {"d0": 1}
        assert s.host.stats.handler_errors == 0


async def test_a_doorbell_that_could_not_be_registered_and_is_gone_is_no_problem(short_dir: Path) -> None:
    """It is not told of for ever."""
    async with served(Counter(), short_dir) as s:
        vmm = await s.in_thread(lambda: Vmm(s.path, register=lambda item: 17 * (getattr(item, "name", "") == "d1")))
        d1 = s.host.doorbells["d1"].doorbell
        await s.until(lambda: s.host.connected)
        assert d1.registered is False
        await s.host.lane.run(lambda: s.device.remove_doorbells(["d1"]))
        await s.in_thread(lambda: vmm.until(TableComplete))
        await s.until(lambda: d1.registered is None)
        vmm.close()
        await s.until_free()


async def test_vmms_that_come_and_go_do_not_fill_the_log(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever they cannot register: a line each, five times a minute."""
    caplog.set_level("INFO")
    async with served(Counter(), short_dir) as s:
        def drive() -> None:
            for _ in range(50):
                Vmm(s.path, register=lambda item: errno.ENOSPC).close()

        await s.in_thread(drive)
        await s.until_free()
        said = [record for record in caplog.records if record.name == "hcd.session"]
        assert 10 < len(said) < 50
        assert sum("doorbell d1 (mmio 0x1004/4) is not registered: ENOSPC" in one.getMessage() for one in said) == 5

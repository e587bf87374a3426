"""The test as the guest: QEMU's qtest protocol drives a virtio device register by register, so that every ring is
known exactly.

The processor only halts (a firmware of three instructions); the protocol's port and memory accesses go through the same
dispatch as a vCPU's. Register layouts: virtio 1.3, 4.1.4 (PCI), 4.1.4.10 (legacy PCI) and 4.2.4 (legacy MMIO).
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

RAM = 64 << 20
RING = 0x100000
RING_SIZE = 128
PCI_SLOT = 5
LEGACY_PORTS, NOTIFY_PORT, BAR4 = 0xC000, 0xC100, 0xFE000000
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8


class QtestVm:
    """QEMU with a halted processor, and this process as the guest."""

    def __init__(self, directory: Path, machine: str, devices: Sequence[str]) -> None:
        firmware = directory / "halt.bin"
        image = bytearray(65536)
        image[0xFFF0:0xFFF4] = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to hlt
        firmware.write_bytes(image)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "qtest.sock"))
        listener.listen()
        listener.settimeout(20)
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-M", machine, "-accel", "tcg", "-m", f"{RAM >> 20}", "-nodefaults", "-display",
             "none", "-object", f"memory-backend-memfd,id=ram,size={RAM},share=on", "-machine", "memory-backend=ram",
             "-bios", str(firmware), "-qtest", f"unix:{directory / 'qtest.sock'}", "-qtest-log", "none",
             "-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off", *devices],
            stdin=subprocess.DEVNULL,
        )
        with listener:
            self.socket, _ = listener.accept()
        self.socket.settimeout(20)
        self._answers = self.socket.makefile("rb")

    def __enter__(self) -> QtestVm:
        return self

    def __exit__(self, *exc: object) -> None:
        # Not SIGTERM: QEMU 7.2 waits for ever (in monitor_cleanup) if hcd asks it by QMP just then.
        self.process.kill()
        self.process.wait(20)
        self._answers.close()
        self.socket.close()

    def say(self, command: str) -> int:
        """One command of the protocol and its answer's value, 0 where it has none."""
        self.socket.sendall(command.encode() + b"\n")
        words = self._answers.readline().split()
        assert words[:1] == [b"OK"], f"{command}: {words}"
        return int(words[1], 0) if len(words) > 1 else 0

    def write(self, address: int, data: bytes) -> None:
        self.say(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def pci(self, register: int, value: int | None = None) -> int:
        """Read or write a 32-bit register of the device's PCI configuration."""
        self.say(f"outl 0xcf8 {0x80000000 | PCI_SLOT << 11 | register:#x}")
        return self.say("inl 0xcfc") if value is None else self.say(f"outl 0xcfc {value:#x}")

    # -- bringing a device up: each returns the command that rings queue 0

    def start_legacy_pci(self) -> str:
        self.pci(0x10, LEGACY_PORTS)
        self.pci(0x04, 7)
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.say(f"outb {LEGACY_PORTS + 18:#x} {status}")
        self.say(f"outl {LEGACY_PORTS + 4:#x} 0")
        self.say(f"outw {LEGACY_PORTS + 14:#x} 0")
        self.say(f"outl {LEGACY_PORTS + 8:#x} {RING >> 12:#x}")
        self.say(f"outb {LEGACY_PORTS + 18:#x} {ACKNOWLEDGE | DRIVER | DRIVER_OK}")
        return f"outw {LEGACY_PORTS + 16:#x} 0"

    def start_modern_pci(self, *, by_port: bool) -> str:
        self.pci(0x20, BAR4)
        self.pci(0x24, 0)
        if by_port:
            self.pci(0x18, NOTIFY_PORT)
        self.pci(0x04, 7)
        ready = ACKNOWLEDGE | DRIVER | FEATURES_OK
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.say(f"writeb {BAR4 + 0x14:#x} {status}")
        for half, bits in ((0, 0), (1, 1)):
            self.say(f"writel {BAR4 + 0x08:#x} {half}")
            self.say(f"writel {BAR4 + 0x0C:#x} {bits}")  # VERSION_1 alone
        self.say(f"writeb {BAR4 + 0x14:#x} {ready}")
        self.say(f"writew {BAR4 + 0x16:#x} 0")
        for offset, address in ((0x20, RING), (0x28, RING + 0x1000), (0x30, RING + 0x2000)):
            self.say(f"writel {BAR4 + offset:#x} {address:#x}")
            self.say(f"writel {BAR4 + offset + 4:#x} 0")
        self.say(f"writew {BAR4 + 0x1C:#x} 1")
        self.say(f"writeb {BAR4 + 0x14:#x} {ready | DRIVER_OK}")
        return f"outw {NOTIFY_PORT:#x} 0" if by_port else f"writew {BAR4 + 0x3000:#x} 0"

    def start_legacy_mmio(self) -> str:
        base = next(slot for slot in range(0xFEB00000, 0xFEB00000 + 512 * 24, 512) if self.say(f"readl {slot + 8:#x}"))
        for register, value in (
            (0x70, 0), (0x70, ACKNOWLEDGE), (0x70, ACKNOWLEDGE | DRIVER), (0x24, 0), (0x20, 0), (0x28, 4096),
            (0x30, 0), (0x38, RING_SIZE), (0x3C, 4096), (0x40, RING >> 12), (0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK),
        ):
            self.say(f"writel {base + register:#x} {value:#x}")
        return f"writel {base + 0x50:#x} 0"

    # -- a ring of the legacy layout: descriptors, then the available ring

    def offer(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Make the chain that begins at descriptor 0 available, as the first one."""
        self.write(RING, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors))
        self.write(RING + 16 * RING_SIZE, struct.pack("<HHH", 0, 1, 0))


def wait_until(condition: object, seconds: float = 10) -> None:
    """Return when ``condition()`` is true; AssertionError when it stays false."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)

"""User-mode Linux's own virtio_console driver on hcd's console device: consoles, channels, sizes, slow readers.

No QEMU before 10.2 has a front end for consoles; user-mode Linux has one for any virtio id.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.demo import jobs, uml
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

Boot = Callable[..., Guest]
Start = Callable[..., HcdProcess]
Settled = Callable[[HcdProcess, Resources], None]

CONSOLE = """
[[device]]
name = "con"
type = "console"
socket = "{dir}/con.sock"
path = "direct"
[device.options]
port = PORTS
"""

OPEN_CONSOLE = """
until_true 10 test -c /dev/hvc0
exec 3<>/dev/hvc0
stty raw -echo <&3
"""


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def connect(path: Path, timeout: float = 30) -> socket.socket:
    """A client of a port that listens, as soon as it does."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(timeout)
    client.connect(str(path))
    return client


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    try:
        while len(data) < size and (part := client.recv(size - len(data))):
            data += part
    except TimeoutError:
        raise AssertionError(f"{len(data)} bytes of {size}") from None
    return bytes(data)


def test_console_both_ways(
    short_dir: Path, start_hcd: Start, boot_uml: Boot, expect_rings: Callable[..., None], expect_settled: Settled
) -> None:
    """64 KiB each way through /dev/hvc0, on a unix socket that hcd listens on."""
    hcd = start_hcd(CONSOLE.replace("PORTS", '"listen:{dir}/tty.sock"'))
    before = hcd.resources()
    client = connect(short_dir / "tty.sock")
    job = OPEN_CONSOLE + """
    dd if=/dev/urandom of=/tmp/out bs=1k count=64 2>/dev/null
    say "sent=$(hash_of /tmp/out)"
    cat /tmp/out >&3
    say "ready=1"
    head -c 65536 <&3 >/tmp/in
    say "got=$(hash_of /tmp/in)"
    """
    guest = boot_uml(job, [(short_dir / "con.sock", uml.CONSOLE_ID)], jobs.CONSOLE)
    from_guest = read_exactly(client, 1 << 16)
    guest.wait_for("ready")
    to_guest = random.Random(1).randbytes(1 << 16)
    client.sendall(to_guest)
    said = guest.wait()
    assert sha(from_guest) == said["sent"]
    assert sha(to_guest) == said["got"]
    expect_rings(hcd, "con", "direct", "declared")
    assert hcd.metrics().total("hcd_requests_total", device="con", op="dropped") == 0
    client.close()
    expect_settled(hcd, before)


def test_terminal_and_its_size(short_dir: Path, start_hcd: Start, boot_uml: Boot) -> None:
    """A pseudo-terminal on the host: a line each way; a window that changes its size changes the guest's."""
    start_hcd(CONSOLE.replace("PORTS", '"pty:{dir}/vm.tty"'))
    fd = os.open(short_dir / "vm.tty", os.O_RDWR | os.O_NOCTTY)
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        job = OPEN_CONSOLE + """
        sized() { [ "$(stty size <&3)" = "$1" ]; }
        until_true 20 sized "40 100"
        say "size=$(stty size <&3)"
        until_true 20 sized "50 132"
        say "resized=$(stty size <&3)"
        echo "question" >&3
        read -r answer <&3
        say "answer=$answer"
        """
        guest = boot_uml(job, [(short_dir / "con.sock", uml.CONSOLE_ID)], jobs.CONSOLE)
        assert guest.wait_for("size") == "40 100"
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
        assert guest.wait_for("resized") == "50 132"
        assert read_line(fd) == b"question\n"
        os.write(fd, b"forty-two\n")
        assert guest.wait()["answer"] == "forty-two"
    finally:
        os.close(fd)


def read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([fd], [], [], 30)[0], line
        line += os.read(fd, 1)
    return line


MULTIPORT = '["pty", "org.hcd.agent=listen:{dir}/agent.sock", "log=file:{dir}/guest.log", "go=listen:{dir}/go.sock"]'

#: the channel is found by its name, as udev would make a link for it
FIND_PORTS = """
port_named() { grep -lx "$1" /sys/class/virtio-ports/*/name | cut -d/ -f5; }
found() { [ -n "$(port_named "$1")" ]; }
until_true 10 found org.hcd.agent
until_true 10 found log
agent=/dev/$(port_named org.hcd.agent)
log=/dev/$(port_named log)
until_true 10 test -c $agent
"""


def test_channels_by_name(
    short_dir: Path, start_hcd: Start, boot_uml: Boot, expect_rings: Callable[..., None], expect_settled: Settled
) -> None:
    """A console and two channels: who is connected, megabytes each way, a file."""
    hcd = start_hcd(CONSOLE.replace("PORTS", MULTIPORT))
    before = hcd.resources()
    job = FIND_PORTS + """
    until_true 10 test -c /dev/hvc0
    say "before=$(head -c 1 $agent | wc -c)"
    echo "said to the log" >$log
    exec 3<>$agent
    received() { head -c $(( 2097152 - $(stat -c %s /tmp/in) )) <&3 >>/tmp/in; [ $(stat -c %s /tmp/in) = 2097152 ]; }
    touch /tmp/in
    until_true 60 received
    say "got=$(hash_of /tmp/in)"
    dd if=/dev/urandom of=/tmp/out bs=1k count=2048 2>/dev/null
    say "sent=$(hash_of /tmp/out)"
    cat /tmp/out >&3
    # A guest that is switched off takes along what is still in its queues.
    say "arrived=$(head -c 1 <&3)"
    """
    guest = boot_uml(job, [(short_dir / "con.sock", uml.CONSOLE_ID)], jobs.CONSOLE)
    # Nobody is connected: a read ends at once, as the driver was told.
    assert guest.wait_for("before") == "0"
    with connect(short_dir / "agent.sock") as client:
        to_guest = random.Random(2).randbytes(2 << 20)
        client.sendall(to_guest)
        from_guest = read_exactly(client, 2 << 20)
        client.sendall(b"!")
        said = guest.wait()
    assert sha(to_guest) == said["got"]
    assert sha(from_guest) == said["sent"]
    expect_rings(hcd, "con", "direct", "declared")
    expect_settled(hcd, before)
    hcd.stop()
    assert (short_dir / "guest.log").read_text() == "said to the log\n"


def test_slow_reader_and_slow_guest(short_dir: Path, start_hcd: Start, boot_uml: Boot) -> None:
    """8 MiB each way while the other side does not read: they wait where they came from, then all arrive."""
    hcd = start_hcd(CONSOLE.replace("PORTS", MULTIPORT))
    client = connect(short_dir / "agent.sock")
    size = 8 << 20
    job = FIND_PORTS + f"""
    go_on() {{ [ "$(head -c 1 /dev/$(port_named go))" = g ]; }}
    exec 3<>$agent
    dd if=/dev/urandom of=/tmp/out bs=64k count={size >> 16} 2>/dev/null
    say "sent=$(hash_of /tmp/out)"
    cat /tmp/out >&3
    until_true 10 found go
    until_true 60 go_on
    head -c {size} <&3 | sha256sum >/tmp/sum
    say "got=$(cut -d' ' -f1 /tmp/sum)"
    """
    guest = boot_uml(job, [(short_dir / "con.sock", uml.CONSOLE_ID)], jobs.CONSOLE)
    to_guest = random.Random(3).randbytes(size)
    sender = threading.Thread(target=client.sendall, args=(to_guest,))
    sender.start()
    guest.wait_for("sent")
    memory = resident(hcd)
    await_held_output(hcd)
    assert hcd.metrics().total("hcd_request_bytes_total", device="con", direction="from_guest") < size / 4
    assert hcd.metrics().total("hcd_request_bytes_total", device="con", direction="to_guest") < size / 4
    assert sender.is_alive()
    assert resident(hcd) - memory < 4 << 20
    from_guest = read_exactly(client, size)
    with connect(short_dir / "go.sock") as go:
        go.sendall(b"g")
        sender.join()
    said = guest.wait()
    assert sha(from_guest) == said["sent"]
    assert sha(to_guest) == said["got"]
    client.close()


def resident(hcd: HcdProcess) -> int:
    pages = Path(f"/proc/{hcd.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def await_held_output(hcd: HcdProcess) -> None:
    """Return when the transmit queue of port 1 holds a request and does not move."""
    last, deadline = -1.0, time.monotonic() + 30
    while True:
        metrics = hcd.metrics()
        done = metrics.total("hcd_requests_total", device="con", queue="5")
        held = metrics.total("hcd_requests_inflight", device="con", queue="5")
        if held and done == last:
            return
        assert time.monotonic() < deadline, (held, done)
        last = done
        time.sleep(0.05)

"""Runs inside the guest, as root, started by a unit: does what an operator and QEMU would do, and says what came of it.

A line ``HCD: step=JSON`` on the console for each step; the test on the host judges them. The front ends are hcd's own,
in this process.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, "/usr/lib/hcd")

from hcd.frontend.blk import BlockDriver
from hcd.frontend.client import Frontend
from hcd.frontend.rng import EntropyDriver

#: seconds; an emulated processor beside other work is slow
PATIENCE = 60.0
RUN, ETC, STATE = Path("/run/hcd"), Path("/etc/hcd"), Path("/var/lib/hcd")
#: the stuck device (plugin.py) blocks once for each time that this file is made
BLOCK = Path("/run/hcd/sticky/block")

Result = dict[str, Any]
STEPS: list[Callable[[], Result]] = []
step = STEPS.append


# -- systemd


def systemctl(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def show(unit: str, *properties: str) -> dict[str, str]:
    lines = systemctl("show", unit, *(f"--property={name}" for name in properties)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def until(unit: str, **expected: str) -> dict[str, str]:
    """The named properties of a unit once they match these patterns. Without D-Bus there is nobody who would tell."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = show(unit, *expected)
        if all(re.fullmatch(pattern, found[name]) for name, pattern in expected.items()):
            return found
        if time.monotonic() > deadline:
            raise RuntimeError(f"{unit}: {found}, expected {expected}")
        time.sleep(0.1)


def journal(unit: str) -> list[str]:
    command = ["journalctl", f"--unit={unit}", "--output=cat", "--no-pager"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


# -- front ends


class Disk:
    """A front end of a block device, with one request after the other on a thread of its own, until it is stopped."""

    def __init__(self, path: Path) -> None:
        self.frontend = Frontend.open(path, timeout=PATIENCE, inflight=True)
        self.driver = BlockDriver(self.frontend.memory, self.frontend.queues[0], timeout=PATIENCE)
        self.done = 0
        self.error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def _load(self) -> None:
        try:
            while not self._stop.is_set():
                self._write_and_read()
                self.done += 1
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _write_and_read(self) -> None:
        data = self.done.to_bytes(8, "little") * 512
        self.driver.write(self.done % 64 * 8, data)
        if self.driver.read(self.done % 64 * 8, len(data)) != data:
            raise ValueError("other data came back than was written")

    def goes_on(self) -> bool:
        """Whether requests end that began only now."""
        target = self.done + 2
        deadline = time.monotonic() + PATIENCE
        while self.done < target and not self.error and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.done >= target

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.frontend.close()


def entropy(path: Path) -> int:
    """How many bytes a new front end gets of the entropy device there."""
    with Frontend.open(path, timeout=PATIENCE) as frontend:
        return len(EntropyDriver(frontend.memory, frontend.queues[0], timeout=PATIENCE).read(64))


def attempt(path: Path, groups: list[str]) -> str:
    """What becomes of a connection by somebody who is only in these groups."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([grp.getgrnam(name).gr_gid for name in groups])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
            os.write(writer, b"connected")
        except OSError as error:
            os.write(writer, str(error.strerror).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        answer = said.read()
    os.waitpid(pid, 0)
    return answer


# -- the steps

TABLE = '[[device]]\nname = "{name}"\ntype = "{type}"\nsocket = "/run/hcd/{name}.sock"\n[device.options]\n{options}\n'
IMAGE = 'blk-file = "/var/lib/hcd/{name}.raw"'
held: Disk


def configure(file: str, *devices: tuple[str, str, str]) -> None:
    text = "".join(TABLE.format(name=name, type=kind, options=options) for name, kind, options in devices)
    (ETC / file).write_text(text)


def disk(name: str) -> tuple[str, str, str]:
    """Its table: the image is in the directory of the service."""
    return name, "blk", IMAGE.format(name=name)


def make_image(name: str) -> None:
    """As the manual says: it belongs to the account of the service."""
    STATE.mkdir(exist_ok=True)
    path = STATE / f"{name}.raw"
    path.write_bytes(bytes(1 << 20))
    account = pwd.getpwnam("hcd")
    for owned in (STATE, path):
        os.chown(owned, account.pw_uid, account.pw_gid)


@step
def accounts() -> Result:
    """systemd-sysusers and systemd-tmpfiles ran at boot, with what hcd installs for them."""
    status = RUN.stat()
    return {
        "home": pwd.getpwnam("hcd").pw_dir,
        "mode": oct(status.st_mode & 0o7777),
        "owner": pwd.getpwuid(status.st_uid).pw_name,
        "group": grp.getgrgid(status.st_gid).gr_name,
    }


@step
def start() -> Result:
    ETC.mkdir()
    make_image("disk0")
    configure("hcd.toml", disk("disk0"))
    systemctl("start", "hcd-metrics.socket", "hcd.service")
    return show("hcd.service", "ActiveState", "StatusText", "Type")


@step
def confined() -> Result:
    """What the kernel says of the process."""
    pid = show("hcd.service", "MainPID")["MainPID"]
    lines = (Path("/proc") / pid / "status").read_text().splitlines()
    status = dict(re.split(r":\s*", line, maxsplit=1) for line in lines)
    own = os.readlink("/proc/self/ns/net")
    return {
        "user": pwd.getpwuid(int(status["Uid"].split()[0])).pw_name,
        "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
        "no_new_privileges": status["NoNewPrivs"],
        "seccomp": status["Seccomp"],
        "network_of_its_own": os.readlink(f"/proc/{pid}/ns/net") != own,
    }


@step
def permissions() -> Result:
    path = RUN / "disk0.sock"
    return {"group": attempt(path, ["kvm"]), "others": attempt(path, [])}


@step
def request() -> Result:
    global held
    held = Disk(RUN / "disk0.sock")
    return {"served": held.goes_on(), **until("hcd.service", StatusText=".* 1 connected: disk0")}


@step
def snapshot() -> Result:
    """As the operator asks: over the control socket in /run/hcd."""
    command = ["/usr/bin/hcd", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    return {
        "devices": [one["name"] for one in found["devices"]],
        "pid": found["pid"],
        "main": int(show("hcd.service", "MainPID")["MainPID"]),
        "group": attempt(RUN / "control.sock", ["kvm"]),
    }


@step
def metrics() -> Result:
    """From systemd's TCP socket: the service has no network."""
    with urllib.request.urlopen("http://127.0.0.1:9847/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    counts = re.findall(r'^hcd_requests_total\{.*status="ok".*\} (\S+)$', text, flags=re.M)
    return {"requests": sum(map(float, counts))}


@step
def reload() -> Result:
    configure("hcd.toml", disk("disk0"), ("rng1", "rng", ""))
    systemctl("reload", "hcd.service")
    status = until("hcd.service", StatusText="2 devices, .*", ActiveState="active")
    return {"drawn": entropy(RUN / "rng1.sock"), "served": held.goes_on(), **status}


@step
def bad_reload() -> Result:
    configure("hcd.toml", disk("disk0"), ("rng1", "rgn", ""))
    systemctl("reload", "hcd.service")
    wait_for_line("hcd.service", "not reloaded, all is as before")
    configure("hcd.toml", disk("disk0"), ("rng1", "rng", ""))
    return {"served": held.goes_on(), **until("hcd.service", ActiveState="active", StatusText="2 devices, .*")}


def wait_for_line(unit: str, text: str) -> str:
    """The first line of a unit's journal that has ``text``."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for line in journal(unit):
            if text in line:
                return line
        time.sleep(0.2)
    raise RuntimeError(f"{unit} never logged {text!r}")


@step
def restart() -> Result:
    """The manager keeps the descriptors of the connection, and gives them to the next process."""
    before = until("hcd.service", MainPID="[1-9].*", NFileDescriptorStore="[1-9].*")
    systemctl("restart", "hcd.service")
    after = until("hcd.service", ActiveState="active", MainPID="[1-9].*", StatusText=".* 1 connected: disk0")
    return {
        "stored": int(before["NFileDescriptorStore"]),
        "served": held.goes_on(),
        "error": held.error,
        "another": after["MainPID"] != before["MainPID"],
        "drawn": entropy(RUN / "rng1.sock"),
    }


@step
def crash() -> Result:
    """The same for a process that is killed, most probably with a request in flight."""
    pid = show("hcd.service", "MainPID")["MainPID"]
    os.kill(int(pid), signal.SIGKILL)
    until("hcd.service", NRestarts="1", ActiveState="active", MainPID="[1-9].*", StatusText=".* 1 connected: disk0")
    return {"served": held.goes_on(), "error": held.error}


@step
def log() -> Result:
    """Entries of one device, by its field in the journal."""
    command = ["journalctl", "--unit=hcd.service", "HCD_DEVICE=disk0", "--output=json", "--no-pager"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "messages": [entry["MESSAGE"] for entry in entries],
        "priorities": sorted({entry["PRIORITY"] for entry in entries}),
    }


@step
def activation() -> Result:
    """hcd@disk1 is started by the first connection to its socket."""
    make_image("disk1")
    configure("disk1.toml", disk("disk1"))
    systemctl("start", "hcd@disk1.socket")
    before = show("hcd@disk1.service", "ActiveState")["ActiveState"]
    allowed = {"group": attempt(RUN / "disk1.sock", ["kvm"]), "others": attempt(RUN / "disk1.sock", [])}
    client = Disk(RUN / "disk1.sock")
    served = client.goes_on()
    systemctl("restart", "hcd@disk1.service")
    restarted = client.goes_on()
    client.close()
    after = show("hcd@disk1.service", "ActiveState", "StatusText")
    systemctl("stop", "hcd@disk1.service")
    return {
        "before": before,
        **allowed,
        "served": served,
        "restarted": restarted,
        **after,
        "socket": (RUN / "disk1.sock").is_socket(),
    }


@step
def watchdog() -> Result:
    """A device that blocks the thread which serves the rings: the event loop is well, yet it is killed."""
    configure("sticky.toml", ("sticky", "sticky", ""))
    systemctl("start", "hcd@sticky.socket")
    first = entropy(RUN / "sticky.sock")
    before = until("hcd@sticky.service", ActiveState="active", MainPID="[1-9].*")
    BLOCK.write_text("")
    frontend = Frontend.open(RUN / "sticky.sock", timeout=PATIENCE)
    driver = EntropyDriver(frontend.memory, frontend.queues[0], timeout=0.1)
    stuck = ""
    try:
        driver.draw(64)
    except Exception as error:
        stuck = str(error)
    restarted = until("hcd@sticky.service", NRestarts="1", ActiveState="active", MainPID="[1-9].*")
    frontend.close()
    return {
        "stuck": stuck,
        "said": wait_for_line("hcd@sticky.service", "Watchdog timeout"),
        "result": wait_for_line("hcd@sticky.service", "result"),
        "another": restarted["MainPID"] != before["MainPID"],
        "drawn": [first, entropy(RUN / "sticky.sock")],
    }


@step
def stop() -> Result:
    held.close()
    systemctl("stop", "hcd.service")
    log = journal("hcd.service")
    return {
        **show("hcd.service", "ActiveState", "Result", "NRestarts"),
        "error": held.error,
        "went_on": sum("went on with the front end" in line for line in log),
        "traces": [line for line in log if "Traceback" in line],
        "connections": sum("disk0: front end connected" in line for line in log),
        "sockets": sorted(path.name for path in RUN.glob("*.sock")),
    }


def run(console: IO[str]) -> int:
    """Every step until one fails; 0 if none did."""
    for one in STEPS:
        began = time.monotonic()
        try:
            result = one()
        except Exception:
            print(traceback.format_exc(), file=console, flush=True)
            show_log = ["journalctl", "--lines=200", "--no-pager", "--output=short-monotonic"]
            subprocess.run(show_log, stdout=console, check=False)
            return 1
        result["seconds"] = round(time.monotonic() - began, 1)
        print(f"\nHCD: {one.__name__}={json.dumps(result)}", file=console, flush=True)
    return 0


if __name__ == "__main__":
    with open("/dev/console", "w") as terminal:
        print(f"\nHCD: status={run(terminal)}", file=terminal, flush=True)
    os.sync()
    systemctl("poweroff", "--force", "--force", check=False)

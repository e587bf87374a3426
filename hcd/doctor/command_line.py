"""QEMU's command line: of a process that runs, or of one that does not start.

It is the one place where the spelling of ``reconnect`` can be seen, and it says what was meant where QMP says what
became of it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcd.doctor.findings import Finding, error, note, warning
from hcd.qemu.devices import GENERIC, TABLE, FrontEnd, Version
from hcd.qemu.version import MILLISECONDS, reconnect
from hcd.qmp import is_at

__all__ = ["CommandLine", "Option", "check", "front_of", "mismatch", "of_process", "parse", "qemus_at"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option with a value: ``-name head,key=value,...``."""

    name: str
    head: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CommandLine:
    options: tuple[Option, ...]
    directory: str  # where relative paths begin; "" if that is not known

    def named(self, name: str) -> list[Option]:
        return [option for option in self.options if option.name == name]

    def path_of(self, chardev: Option) -> str:
        return os.path.join(self.directory, chardev.values.get("path", ""))

    def leads_to(self, chardev: Option, path: str) -> bool:
        """Whether ``chardev`` connects to ``path``; QEMU may have left the directory in which it was started."""
        return is_at({"type": "unix", "path": chardev.values.get("path", "")}, path, self.directory)


def parse(words: Sequence[str], directory: str = "") -> CommandLine:
    """Understand the words after the program. Options without a value are skipped."""
    options = []
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-") and value and not value.startswith("-"):
            options.append(_option(word.lstrip("-"), value))
    return CommandLine(tuple(options), directory)


def _option(name: str, value: str) -> Option:
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    pairs = [part.partition("=") for part in parts]
    head = pairs[0][0] if not pairs[0][1] else ""
    return Option(name, head, {key: text if equals else "on" for key, equals, text in pairs if equals or key != head})


def of_process(pid: int, proc: Path = Path("/proc")) -> CommandLine | None:
    """The command line of a QEMU that runs; None where it cannot be seen."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        directory = os.readlink(proc / str(pid) / "cwd")
    except OSError:
        return None
    return parse([os.fsdecode(word) for word in words[1:]], directory)


def qemus_at(path: str, proc: Path = Path("/proc")) -> Iterator[tuple[int, str, CommandLine]]:
    """(pid, program, command line) of every QEMU that was told to connect to ``path``."""
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            program = os.readlink(process / "exe")
        except OSError:
            continue
        line = of_process(int(process.name), proc) if os.path.basename(program).startswith("qemu") else None
        if line and any(line.leads_to(option, path) for option in line.named("chardev")):
            yield int(process.name), program, line


def front_of(driver: str) -> FrontEnd | None:
    """The row of the table that a device of QEMU belongs to; None for what is no vhost-user device of it."""
    stem = re.sub(r"(-pci)?(-non-transitional|-transitional)?$", "", driver)
    for front in (*TABLE.values(), GENERIC):
        names = front.names.values()
        if stem in names or f"{stem}-pci" in names or f"{stem}-device" in names:
            return front
    return None


def check(line: CommandLine, version: Version | None, sockets: Mapping[str, str]) -> Iterator[Finding]:
    """``sockets``: names of configured devices by the path of their socket. ``version`` None: not known."""
    chardevs = {option.values.get("id", ""): option for option in line.named("chardev") if option.head == "socket"}
    devices = list(_devices(line))
    if not devices:
        yield error("qemu-no-device", "QEMU's command line has no vhost-user device", todo="see hcd qemu-args CONFIG")
    else:
        yield from _memory(line)
    for driver, ident, label in devices:
        chardev = chardevs.get(label)
        if chardev is None:
            yield error("qemu-chardev", f"{driver} {ident}: there is no -chardev socket with id={label}",
                        todo="see hcd qemu-args CONFIG")
            continue
        yield from _reconnect(chardev, driver, version)
        yield from _path(line, chardev, sockets)


def _devices(line: CommandLine) -> Iterator[tuple[str, str, str]]:
    """(driver, id, label of the chardev) of each vhost-user device."""
    netdevs = {
        option.values.get("id", ""): option.values.get("chardev", "")
        for option in line.named("netdev")
        if option.head == "vhost-user"
    }
    for option in line.named("device"):
        driver = option.head or option.values.get("driver", "")
        label = netdevs.get(option.values.get("netdev", ""), "" if "netdev" in option.values else None)
        if driver.startswith("vhost-user-"):
            yield driver, option.values.get("id", ""), option.values.get("chardev", "")
        elif label:
            yield driver, option.values.get("id", ""), label


def _memory(line: CommandLine) -> Iterator[Finding]:
    todo = "-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram"
    objects = [option for option in line.named("object") if option.head.startswith("memory-backend")]
    backends = {option.values.get("id", ""): option for option in objects}
    used = [option.values["memory-backend"] for option in line.named("machine") + line.named("M")
            if "memory-backend" in option.values]
    used += [option.values["memdev"] for option in line.named("numa") if "memdev" in option.values]
    if not used:
        if not any(option.values.get("share") in ("on", "yes", "true") for option in backends.values()):
            yield error("memory-not-shared", "guest memory is QEMU's own: no memory-backend is named", todo=todo)
        return
    for ident in used:
        backend = backends.get(ident)
        if backend is not None and backend.values.get("share", "off") not in ("on", "yes", "true"):
            yield error("memory-not-shared", f"guest memory {ident} is not shared: hcd cannot see it",
                        f"-object {backend.head},id={ident} has no share=on", todo)


def _reconnect(chardev: Option, driver: str, version: Version | None) -> Iterator[Finding]:
    label = chardev.values.get("id", "")
    seconds, milliseconds = "reconnect" in chardev.values, "reconnect-ms" in chardev.values
    shown = f"QEMU {version[0]}.{version[1]}" if version else "QEMU"
    front = front_of(driver)
    if version and milliseconds and version < MILLISECONDS:
        yield error("reconnect-spelling", f"chardev {label}: {shown} does not know reconnect-ms and does not start",
                    todo=f"write {reconnect(version)}")
    elif version and seconds and version >= MILLISECONDS:
        yield warning("reconnect-spelling", f"chardev {label}: {shown} drops reconnect in favour of reconnect-ms",
                      todo=f"write {reconnect(version)}")
    if (seconds or milliseconds) and front and version and version < front.reconnects:
        yield error("reconnect-unsupported", f"chardev {label}: {driver} of {shown} cannot have reconnect",
                    "it does not wait for its connection: \"Failed to set msg fds\"", "leave it out for this device")
    elif not (seconds or milliseconds) and front and version and version >= front.reconnects:
        yield note("reconnect-missing", f"chardev {label}: the guest loses {driver} when hcd is restarted",
                   todo=f"add {reconnect(version)}")


def _path(line: CommandLine, chardev: Option, sockets: Mapping[str, str]) -> Iterator[Finding]:
    if chardev.values.get("server", "off") in ("on", "yes", "true"):
        yield error("chardev-server", f"chardev {chardev.values.get('id')}: QEMU listens there, and so does hcd",
                    todo="leave out server=on")
    elif sockets and not any(line.leads_to(chardev, path) for path in sockets):
        yield mismatch(chardev.values.get("id", ""), line.path_of(chardev), sockets)


def mismatch(label: str, path: str, sockets: Mapping[str, str]) -> Finding:
    """``path``, to which the chardev ``label`` of QEMU connects (or ""), is not one of ``sockets``."""
    close = difflib.get_close_matches(path, sockets, n=1, cutoff=0.4)
    hint = f"; the nearest is {close[0]} of {sockets[close[0]]}" if close else ""
    who = f"chardev {label}: " if label else ""
    return error("path-mismatch", f"{who}no configured device has the socket {path}",
                 f"configured: {', '.join(f'{name} at {known}' for known, name in sockets.items())}{hint}",
                 "make the path of the chardev and the key socket of the device the same")

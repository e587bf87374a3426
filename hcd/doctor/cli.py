"""``hcd doctor [SOCKET|QMP]`` and ``hcd doctor -- QEMU ...``."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Sequence

from hcd.device import Device, DeviceBase
from hcd.doctor import command_line, configuration, device_socket, host, labels, machine
from hcd.doctor.access import Account, account_of_process
from hcd.doctor.daemon import check_version
from hcd.doctor.findings import Finding, report, report_json, status
from hcd.errors import ConfigError
from hcd.qemu.devices import Version
from hcd.qemu.version import version_of

__all__ = ["DESCRIPTION", "TAKES_COMMAND", "add_arguments", "run"]

TAKES_COMMAND = True

DESCRIPTION = (
    "Look for the usual reasons why a guest does not get its device. Nothing is changed. "
    "With -- COMMAND at the end, a QEMU command line is read, not run."
)
DEFAULT_CONFIG = "/etc/hcd/hcd.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="SOCKET|QMP",
                        help="a device's socket, or the QMP socket of a QEMU; default: all of the configuration")
    parser.add_argument("--config", metavar="FILE", help=f"default {DEFAULT_CONFIG}, if it is there")
    parser.add_argument("--json", action="store_true", help="print findings for programs")


def run(arguments: argparse.Namespace) -> int:
    """0: nothing keeps a device from working as far as one can see; 1: something does."""
    visit = _Visit(arguments.config)
    if arguments.command:
        visit.look_at_command(arguments.command)
    elif arguments.target is not None:
        visit.look_at(arguments.target.removeprefix("unix:"))
    else:
        visit.look_at_everything()
    text = report_json if arguments.json else report
    print(text(visit.findings, visit.looked_at))
    return status(visit.findings)


class _Visit:
    """One run: what was found and looked at so far."""

    def __init__(self, file: str | None) -> None:
        self.findings: list[Finding] = []
        self.looked_at: list[str] = []
        self.loaded = configuration.Loaded(file or DEFAULT_CONFIG)
        self._lines_read: set[int] = set()
        self._guests: dict[str, Account] = {}  # accounts of QEMUs that were asked, by path of the device's socket
        if file is not None or os.path.exists(DEFAULT_CONFIG):
            self._saw(self.loaded.file)
            self.loaded, problems = configuration.read(self.loaded.file)
            self.findings += problems

    def _saw(self, what: str) -> None:
        self.looked_at.append(what)

    @property
    def devices(self) -> dict[str, tuple[str, DeviceBase]]:
        """Name and device by the path of the socket."""
        made = self.loaded.devices
        return {spec.socket: (spec.name, made[spec.name]) for spec in self.loaded.specs if spec.name in made}

    # -- what to look at

    def look_at_everything(self) -> None:
        if not self.loaded.specs and not self.findings:
            raise ConfigError(f"there is no {DEFAULT_CONFIG}: say --config FILE, or which socket to look at")
        for path in dict.fromkeys(spec.qmp for spec in self.loaded.specs if spec.qmp is not None):
            self._machine(path)
        listener = 0
        for spec in self.loaded.specs:
            listener = self._socket(spec.socket) or listener
        self._host(listener)

    def look_at(self, target: str) -> None:
        """A device's socket where the configuration has it; else whoever greets as QMP does is QEMU."""
        sockets = {os.path.realpath(path) for path in self.devices}
        known = {os.path.realpath(spec.qmp) for spec in self.loaded.specs if spec.qmp is not None}
        real = os.path.realpath(target)
        if real not in known and (real in sockets or not self._greets(target)):
            self._host(self._socket(target))
        else:
            self._machine(target)

    def look_at_command(self, command: Sequence[str]) -> None:
        """A command line that need not run. ConfigError when the program does not tell its version."""
        program, *words = command
        self._saw(f"the command line of {program}")
        self._check_line(command_line.parse(words, os.getcwd()), version_of(program))

    def _greets(self, path: str) -> bool:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return False
            machine.look(path, timeout=3)
        except (OSError, *machine.Problems):
            return False
        return True

    # -- looking

    def _machine(self, path: str) -> None:
        self._saw(f"QEMU at {path}")
        try:
            found = machine.look(path)
        except machine.Problems as exc:
            self.findings.append(machine.unreachable(path, exc))
            return
        self.findings += machine.check(found, self.devices)
        account = account_of_process(found.pid)
        for chardev in found.chardevs:
            if account is not None:
                self._guests[os.path.realpath(os.path.join(found.directory, chardev.path))] = account
            if chardev.driver:
                self.findings += labels.check_apparmor(found.pid, chardev.path)
        if (line := command_line.of_process(found.pid)) is not None:
            self._lines_read.add(found.pid)
            self._check_line(line, found.version)

    def _check_line(self, line: command_line.CommandLine, version: Version | None) -> None:
        """What QMP has found already is not said twice."""
        sockets = {path: name for path, (name, _) in self.devices.items()}
        said = {finding.check for finding in self.findings}
        self.findings += [f for f in command_line.check(line, version, sockets) if f.check not in said]

    def _socket(self, path: str) -> int:
        """Returns the pid of who listens; 0 when that is not known."""
        self._saw(path)
        name, device = next(
            (pair for socket, pair in self.devices.items() if os.path.realpath(socket) == os.path.realpath(path)),
            ("", None),
        )
        if device is None and self.loaded.specs:
            known = {socket: name for socket, (name, _) in self.devices.items()}
            self.findings.append(command_line.mismatch("", path, known))
        guest = self._guests.get(os.path.realpath(path))
        accounts = [guest] if guest is not None else device_socket.qemu_accounts()
        for pid, program, line in command_line.qemus_at(path):
            if pid not in self._lines_read:
                self._saw(f"the command line of QEMU (pid {pid})")
                self._check_line(line, _version_of(program))
        found = device_socket.probe(path) if device is None or isinstance(device, Device) else None
        self.findings += device_socket.check(name or "the socket", path, accounts, found)
        if found is None or not found.pid:
            return 0
        self.findings += labels.check_selinux(found.pid)
        return found.pid

    def _host(self, listener: int) -> None:
        self._saw("this host")
        pairs = [(spec, self.loaded.devices[spec.name]) for spec in self.loaded.specs
                 if spec.name in self.loaded.devices]
        virtio = [(spec, device) for spec, device in pairs if isinstance(device, Device)]
        daemon = account_of_process(listener) if listener > 1 else None
        self.findings += configuration.check_files(self.loaded, daemon)
        self.findings += host.check_limits(virtio, listener if listener > 1 else None)
        self.findings += host.check_kvm()
        if self.loaded.config is not None and self.loaded.config.metrics is not None:
            self.findings += check_version(self.loaded.config.metrics)


def _version_of(program: str) -> Version | None:
    try:
        return version_of(program)
    except ConfigError:  # it was replaced or removed since; what does not depend on the version is still seen
        return None

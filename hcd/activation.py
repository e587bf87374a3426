"""Which inherited socket belongs to what: sockets that systemd bound, matched with the configuration.

A socket named like a device (FileDescriptorName= of the socket unit) is that device's; ``metrics`` is the address of
/metrics, of which there may be several; a single unnamed one belongs to a single device. What the configuration says
must agree: the manager's idea of who may connect where is not silently replaced by another one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from hcd import plugins, sockets
from hcd.config import Address, DaemonConfig, DeviceSpec
from hcd.errors import ConfigError
from hcd.systemd import Inherited

__all__ = ["METRICS", "Activation", "adopt"]

#: the name of a socket on which /metrics is served
METRICS = "metrics"


@dataclass(slots=True)
class Activation:
    """The inherited sockets of one process, for as long as it lives."""

    devices: dict[str, socket.socket] = field(default_factory=dict)  # by the device's name; "" for an unnamed one
    metrics: list[socket.socket] = field(default_factory=list)

    def close(self) -> None:
        for sock in (*self.devices.values(), *self.metrics):
            sock.close()

    def of(self, spec: DeviceSpec) -> socket.socket | None:
        """The listening socket of device ``spec``, if it was handed over, by name or by path."""
        for sock in self.devices.values():
            if _same_path(sockets.local_path(sock), spec.socket):
                return sock
        return None

    def check(self, config: DaemonConfig, *, strict: bool = True) -> None:
        """ConfigError where ``config`` contradicts what was handed over.

        Not ``strict``: a socket may be left without its device; it may have been removed by a reload.
        """
        specs = {spec.name: spec for spec in config.devices}
        for name, sock in self.devices.items():
            spec = specs.get(name)
            if name == "" and len(specs) == 1:
                spec = config.devices[0]
            elif name == "" and strict:
                raise ConfigError(
                    f"{len(specs)} devices and one unnamed socket ({sockets.local_path(sock)}): name it after its "
                    "device (FileDescriptorName=)"
                )
            if spec is None and strict:
                raise ConfigError(
                    f'a socket named "{name}" was handed over ({sockets.local_path(sock)}); expected the name of a '
                    f'device ({", ".join(specs)}) or "{METRICS}"'
                )
            if spec is not None and not _same_path(sockets.local_path(sock), spec.socket):
                raise ConfigError(
                    f'device "{spec.name}": its socket is configured as {spec.socket}, but the one that was handed '
                    f"over is {sockets.local_path(sock)}"
                )
        self._check_metrics(config.metrics)

    def _check_metrics(self, wanted: Address | None) -> None:
        if wanted is None or not self.metrics:
            return
        bound = [_address(sock) for sock in self.metrics]
        for one in bound:
            if (one.host, one.port) == (wanted.host, wanted.port) and _same_path(one.path, wanted.path):
                return
        raise ConfigError(
            f"[daemon] metrics: configured as {wanted}, but the socket that was handed over is "
            f"{', '.join(map(str, bound))}; leave the key out"
        )


def adopt(config: DaemonConfig, inherited: Sequence[Inherited]) -> Activation:
    """Take ``inherited`` over for ``config``. ConfigError for what is no listening socket, or contradicts it."""
    made = Activation()
    kinds = _kinds(config) if inherited else {}
    try:
        for one in inherited:
            if one.name == METRICS:
                made.metrics.append(_adopt_metrics(one))
            elif one.name in made.devices:
                raise ConfigError(f"{one}: a second socket of the same name")
            else:
                made.devices[one.name] = _adopt_listener(one, kinds.get(one.name, socket.SOCK_STREAM))
        made.check(config)
    except ConfigError:
        made.close()
        raise
    return made


def _adopt_listener(one: Inherited, kind: socket.SocketKind) -> socket.socket:
    sock = sockets.adopt_fd(one.fd, kind)
    if not sockets.is_listening(sock):
        sock.close()
        raise ConfigError(f"{one} is a connection; expected a listening socket (Accept=no)")
    return sock


def _kinds(config: DaemonConfig) -> dict[str, socket.SocketKind]:
    """The type of socket that each device needs, by name; "" for the only device."""
    kinds = {spec.name: sockets.KINDS[plugins.load(spec.type).transport] for spec in config.devices}
    if len(kinds) == 1:
        kinds[""] = next(iter(kinds.values()))
    return kinds


def _adopt_metrics(one: Inherited) -> socket.socket:
    try:
        sock = socket.socket(fileno=one.fd)
    except OSError as exc:
        raise ConfigError(f"{one} is not a socket") from exc
    if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"{one} is neither a TCP socket nor a unix stream socket")
    if not sockets.is_listening(sock):
        raise ConfigError(f"{one} is not listening")
    return sock


def _address(sock: socket.socket) -> Address:
    if sock.family == socket.AF_UNIX:
        return Address(path=sockets.local_path(sock))
    host, port = sock.getsockname()[:2]
    return Address(host=host, port=port)


def _same_path(one: str, other: str) -> bool:
    """Whether two names of a unix socket mean the same; /var/run is /run, but abstract names are just names."""
    return one == other or (bool(one) and bool(other) and os.path.realpath(one) == os.path.realpath(other))

"""The daemon that runs: its version, as /metrics has it."""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator

from hcd.config import Address
from hcd.doctor.findings import Finding, note, warning
from hcd.version import VERSION

__all__ = ["check_version"]

_TIMEOUT = 5.0
_VERSION = re.compile(r'^hcd_build_info\{[^}]*\bversion="([^"]+)"', re.MULTILINE)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(self._path)


def check_version(address: Address) -> Iterator[Finding]:
    """Compare the daemon behind ``address`` with the hcd that is installed."""
    where = str(address)
    try:
        text = _get(address)
    except (OSError, http.client.HTTPException) as exc:
        yield warning("metrics-unreachable", f"the metrics of the daemon cannot be read at {where}",
                      str(exc), "start hcd; if it runs, it has another configuration or does not let you connect")
        return
    match = _VERSION.search(text)
    if match is None:
        yield warning("metrics-foreign", f"what is served at {where} is not hcd's metrics")
    elif match[1] != VERSION:
        yield warning("version", f"the daemon is hcd {match[1]}, installed is {VERSION}",
                      todo="systemctl restart hcd, so that the new one runs")
    else:
        yield note("version", f"the daemon is hcd {VERSION}, the one that is installed")


def _get(address: Address) -> str:
    connection: http.client.HTTPConnection
    if address.path:
        connection = _UnixConnection(address.path)
    else:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read(1 << 24).decode(errors="replace")
    finally:
        connection.close()

"""What the process at the other end of a socket costs: its processor time and its memory, from /proc."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

__all__ = ["Peer"]


class Peer:
    """The process that listened on the socket when it was connected to (unix(7), SO_PEERCRED)."""

    def __init__(self, sock: socket.socket) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", raw)[0]
        self._proc = Path("/proc") / str(self.pid)

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far; nan when it cannot be read."""
        try:
            fields = (self._proc / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """Bytes of its largest resident set, shared guest memory included; 0 when it cannot be read."""
        return self._status("VmHWM")

    def _status(self, key: str) -> int:
        try:
            lines = (self._proc / "status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)

"""What the process at the other end of a socket costs: its processor time and its memory, from /proc."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

__all__ = ["Peer", "cpu_seconds", "status"]


class Peer:
    """The process that listened on the socket when it was connected to (unix(7), SO_PEERCRED)."""

    def __init__(self, sock: socket.socket) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", raw)[0]

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def peak_memory(self) -> int:
        """Bytes of its largest resident set, shared guest memory included; 0 when it cannot be read."""
        return status(self.pid, "VmHWM") * 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far; nan when it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status(pid: int, key: str) -> int:
    """One number of /proc/PID/status, as it stands there (kB for memory); 0 when it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)

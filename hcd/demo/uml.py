"""User-mode Linux as a guest: Linux's own virtio drivers on a front end that is not QEMU.

The kernel runs as a plain process and writes the kick eventfd itself: no exit, the path is ``direct``. Its
root is a directory of the host (hostfs) with the same init script as the other guests have. Debian's
user-mode-linux package brings kernel and modules.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from hcd.demo import jobs
from hcd.demo.packages import GuestFiles, MissingToolError

__all__ = ["BLOCK_ID", "CONSOLE_ID", "NET_ID", "RNG_ID", "SCSI_ID", "VSOCK_ID", "command", "guest_files"]

#: device ids of the virtio specification, as ``virtio_uml.device`` takes them
NET_ID, BLOCK_ID, CONSOLE_ID, RNG_ID, SCSI_ID, VSOCK_ID = 1, 2, 3, 4, 8, 19

_MODULES = Path("/usr/lib/uml/modules")


def guest_files() -> GuestFiles:
    """The installed kernel, its modules, the host's busybox. MissingToolError names what is absent."""
    kernel, busybox = shutil.which("linux.uml"), shutil.which("busybox")
    releases = sorted(_MODULES.glob("*/modules.builtin"))
    if kernel is None or not releases:
        raise MissingToolError("linux.uml is missing (Debian package user-mode-linux)")
    if busybox is None:
        raise MissingToolError("busybox is missing (Debian package busybox-static)")
    return GuestFiles("um", Path(kernel), releases[-1].parent, Path(busybox))


def command(
    root: Path,
    job: str,
    devices: Sequence[tuple[Path | str, int]],
    *,
    modules: Sequence[str] = jobs.BLOCK,
    memory_mib: int = 128,
) -> list[str]:
    """Fill the empty directory ``root`` with the guest's files; the command line that boots from it.

    ``devices`` are (socket, virtio id). A socket's path must not contain a colon.
    """
    files = guest_files()
    jobs.base_tree(files, modules).write_to(root)
    jobs.job_tree(job).write_to(root)
    words = [str(files.kernel), f"mem={memory_mib}M", "con=null", "con0=null,fd:1", "ssl=null"]
    words += [f"virtio_uml.device={socket}:{virtio_id}" for socket, virtio_id in devices]
    words += [
        "root=/dev/root",
        "rootfstype=hostfs",
        f"rootflags={root}",
        "rw",
        "init=/init",
        "quiet",
        "panic=1",
    ]
    return words

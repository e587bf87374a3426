"""Opening a disk image safely: the right kind of file, locked, and not one that only looks raw.

Two writers on one image destroy it, so the file is locked with flock(2): exclusively, or shared for readers. The lock
is also the guard against a killed predecessor whose last writes are still in the kernel: the file stays locked until
they are done, so a busy lock is waited for, for a while.

A qcow2 image that is served as raw lets the guest write a header of its own that names any file of the host as backing
file; whoever opens the image by its magic next reads that file. So containers are refused unless the operator insists.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import time

from hcd.device import ConfigError

__all__ = ["LOCK_TIMEOUT", "container_format", "open_image"]

#: seconds that a busy lock is waited for
LOCK_TIMEOUT = 10.0
LOCK_POLL = 0.05

#: offset, magic, name
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"LUKS\xba\xbe", "luks"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)

Log = logging.LoggerAdapter[logging.Logger]


def open_image(
    path: str,
    *,
    read_only: bool,
    force_raw: bool,
    log: Log,
    direct_block: int = 0,
    option: str = "blk-file",
    patience: float | None = None,
) -> int:
    """A locked descriptor of the file or block device at ``path``. ConfigError when it cannot or should not be used.

    ``direct_block``: if not 0, go past the page cache, in blocks of so many bytes. Blocks while the lock is busy, up to
    ``patience`` (seconds; None: LOCK_TIMEOUT). ``option`` named the path, for messages.
    """
    what = f"{option} {path}"
    # O_NONBLOCK: a FIFO in the place of the image must not hang us
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError as e:
        raise ConfigError(f"{what}: {e.strerror}") from e
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{what}: expected a file or a block device")
        os.set_blocking(fd, True)
        kind = fcntl.LOCK_SH if read_only else fcntl.LOCK_EX
        _lock(fd, what, kind, log, LOCK_TIMEOUT if patience is None else patience)
        _refuse_container(fd, what, force_raw, log)
        if direct_block:
            _go_direct(fd, what, direct_block)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, what: str, kind: int, log: Log, patience: float) -> None:
    deadline = time.monotonic() + patience
    waiting = False
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise ConfigError(f"{what}: cannot be locked: {e.strerror}") from e
            log.warning("%s: its file system has no locks; nothing keeps others from writing to it", what)
            return
        if not waiting and patience:
            log.warning("%s is in use by another process or device; waiting up to %g s for it", what, patience)
            waiting = True
        if time.monotonic() >= deadline:
            raise ConfigError(f"{what}: in use by another process or device")
        time.sleep(LOCK_POLL)


def _refuse_container(fd: int, what: str, force_raw: bool, log: Log) -> None:
    try:
        name = container_format(os.pread(fd, 512, 0))
    except OSError as e:
        raise ConfigError(f"{what}: cannot be read: {e.strerror}") from e
    if not name:
        return
    if not force_raw:
        raise ConfigError(f"{what}: a {name} image, which would be served as raw bytes; convert it, or say "
                          "force-raw if that is what you want")
    log.warning("%s looks like a %s image and is served as raw bytes", what, name)


def _go_direct(fd: int, what: str, block: int) -> None:
    """Set O_DIRECT, and try one block: a disk may have larger sectors than the guest is told of."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as e:
        raise ConfigError(f"{what}: direct: its file system cannot do it: {e.strerror}") from e
    with mmap.mmap(-1, block) as page_aligned:
        try:
            os.preadv(fd, [page_aligned], 0)
        except OSError as e:
            raise ConfigError(f"{what}: direct: blocks of {block} bytes cannot be read: {e.strerror}; a disk "
                              "of 4096-byte sectors needs block-size 4096") from e


def container_format(head: bytes) -> str:
    """The image format that the first 512 bytes of a file show, "" for none that is known."""
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return ""

"""Who may do what with a path, by owner, group and mode of it and of the directories on the way.

This is asked for other accounts than one's own (QEMU's, the daemon's), so access(2) does not help. Access control
lists are not judged; where one is set the answer is "not known".
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Account", "account", "account_of_process", "denial", "describe", "owner"]

SEARCH, READ, WRITE = 1, 4, 2


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks: a name for messages, a user id and all group ids."""

    name: str
    uid: int
    gids: frozenset[int]


def account(name: str) -> Account | None:
    """The account called ``name``; None where there is none."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Account(name, entry.pw_uid, frozenset(os.getgrouplist(name, entry.pw_gid)))


def account_of_process(pid: int, proc: Path = Path("/proc")) -> Account | None:
    """The account under which ``pid`` accesses files; None where that cannot be seen."""
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    try:
        uid = int(fields["Uid"].split()[3])  # the one for files
        gids = {int(fields["Gid"].split()[3]), *map(int, fields["Groups"].split())}
    except (KeyError, ValueError, IndexError):
        return None
    return Account(_user(uid), uid, frozenset(gids))


def denial(path: Path, who: Account, want: int) -> str:
    """Why ``who`` may not have ``want`` (READ and WRITE) of ``path``; "" if nothing stands in the way."""
    if who.uid == 0:
        return ""
    for step in [*reversed(path.absolute().parents), path.absolute()]:
        needed = want if step == path.absolute() else SEARCH
        try:
            status = step.stat()
        except OSError:
            return ""  # another check's business
        if not _granted(status, who, needed) and not _has_acl(step):
            verb = "may not search" if needed == SEARCH else "has no access to"
            return f"{who.name} {verb} {step} ({describe(step)})"
    return ""


def describe(path: Path) -> str:
    """Mode, owner and group, as ls(1) shows them."""
    status = path.stat()
    return f"{stat.filemode(status.st_mode)} {owner(path)}"


def owner(path: Path) -> str:
    """ "user:group" of ``path``."""
    status = path.stat()
    return f"{_user(status.st_uid)}:{_group(status.st_gid)}"


def _granted(status: os.stat_result, who: Account, needed: int) -> bool:
    shift = 6 if status.st_uid == who.uid else 3 if status.st_gid in who.gids else 0
    return (status.st_mode >> shift) & needed == needed


def _has_acl(path: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"group {gid}"

"""Where the control socket is, and who may use it.

::

    [control]
    path = "/run/hcd/control.sock"  # "": none; absent: the default place
    mode = "0660"                   # of the socket; whoever may write to it may connect
    owner = "root"                  # absent: the account of the daemon
    group = "adm"                   # absent: the group of the daemon

The default place is the first of these that applies: $HCD_CONTROL; the runtime directory that systemd gave the
service; /run/hcd, if it can be written to (root makes it); the directory hcd in $XDG_RUNTIME_DIR; a directory of the
user's own in /tmp.
"""

from __future__ import annotations

import glob
import grp
import os
import pwd
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hcd.errors import ConfigError
from hcd.sockets import UnixListener

__all__ = ["DEFAULT_MODE", "ControlSpec", "bind", "candidates", "default_path", "find_instances", "parse_mode"]

DEFAULT_MODE = 0o660
FILE = "control.sock"
SYSTEM_DIRECTORY = "/run/hcd"
#: where systemd/drop-ins/control.conf puts it
DROP_IN_DIRECTORY = "/run/hcd-control"
TEMPORARY = "/tmp"
#: names the socket, for daemons without one in their configuration and for clients; "" is none
VARIABLE = "HCD_CONTROL"

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ControlSpec:
    """``path`` None: the default place, if it can be had. "" there: no control socket."""

    path: str | None = None
    mode: int | None = None
    owner: str | None = None
    group: str | None = None


def parse_mode(text: str) -> int:
    """Permissions from "0660". ValueError otherwise."""
    if not re.fullmatch(r"0?[0-7]{3}", text, re.ASCII):
        raise ValueError(f'expected permissions such as "0660", found "{text}"')
    return int(text, 8)


# -- the daemon's side


def default_path(environment: Environment = os.environ) -> str:
    """Where a daemon that was not told listens; "" for nowhere."""
    if VARIABLE in environment:
        return environment[VARIABLE]
    if given := environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        return f"{given}/{FILE}"
    if os.geteuid() == 0 or os.access(SYSTEM_DIRECTORY, os.W_OK | os.X_OK):
        return f"{SYSTEM_DIRECTORY}/{FILE}"
    return _of_user(environment)


def _of_user(environment: Environment) -> str:
    home = environment.get("XDG_RUNTIME_DIR")
    return f"{home}/hcd/{FILE}" if home else f"{TEMPORARY}/hcd-{os.geteuid()}/{FILE}"


def bind(spec: ControlSpec, path: str) -> UnixListener:
    """Listen at ``path`` with the permissions of ``spec``. ConfigError when that cannot be."""
    owner, group = _account(spec.owner), _group(spec.group)
    if spec.path is None:
        _make_directory(os.path.dirname(path))

    def permit(made: str) -> None:
        if owner is not None or group is not None:
            os.chown(made, -1 if owner is None else owner, -1 if group is None else group)
        mode = DEFAULT_MODE if spec.mode is None else spec.mode
        if group is None and spec.mode is None and not _belongs_to_our_group(made):
            mode &= ~0o070  # the directory is set-group-id: its group was let in for something else
        os.chmod(made, mode)

    try:
        return UnixListener(path, socket.SOCK_STREAM, permit)
    except ConfigError as exc:
        raise ConfigError(f"[control] path: {exc}") from exc


def _make_directory(path: str) -> None:
    """ConfigError also where somebody else made it, who could put another socket into it: /tmp is everybody's."""
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        found = os.lstat(path)
    except OSError as exc:
        raise ConfigError(f"[control]: cannot make the directory {path}: {exc.strerror}") from exc
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o002
    if os.path.dirname(path) == TEMPORARY and not ours:
        raise ConfigError(f"[control]: {path} belongs to somebody else")


def _belongs_to_our_group(path: str) -> bool:
    """Make it so, where that is allowed (the units do not allow it)."""
    if os.lstat(path).st_gid == os.getegid():
        return True
    try:
        os.chown(path, -1, os.getegid())
    except OSError:
        return False
    return True


def _account(name: str | None) -> int | None:
    try:
        return None if name is None else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(f'[control] owner: there is no account "{name}"') from None


def _group(name: str | None) -> int | None:
    try:
        return None if name is None else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f'[control] group: there is no group "{name}"') from None


# -- the client's side


def candidates(given: str | None, environment: Environment = os.environ) -> list[str]:
    """Where a daemon may be, likeliest first. ``given``: a path, or the name of an instance of hcd@.service."""
    if given:
        return [given if "/" in given else f"{SYSTEM_DIRECTORY}/{given}/{FILE}"]
    if environment.get(VARIABLE):
        return [environment[VARIABLE]]
    places = [f"{SYSTEM_DIRECTORY}/{FILE}"]
    if os.path.isdir(DROP_IN_DIRECTORY):
        places.append(f"{DROP_IN_DIRECTORY}/{FILE}")
    if os.geteuid() != 0:
        places.append(_of_user(environment))
    return places


def find_instances() -> Iterator[str]:
    """The names of instances of hcd@.service that have a control socket."""
    for path in sorted(glob.glob(f"{SYSTEM_DIRECTORY}/*/{FILE}")):
        yield os.path.basename(os.path.dirname(path))


"""Sockets of our own: a dead process's file makes room, everything else stays, and only ours is unlinked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hcd.errors import ConfigError
from hcd.sockets import UnixListener, adopt_fd, is_listening, local_path

LISTENS = """
import socket, sys
listener = socket.socket(socket.AF_UNIX, int(sys.argv[2]))
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
input()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d.sock"


def answers(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_a_listener_listens_and_leaves_nothing(path: Path) -> None:
    listener = UnixListener(str(path))
    assert answers(path)
    assert is_listening(listener.socket)
    assert not listener.socket.get_inheritable()
    listener.close()
    assert not os.path.lexists(path)


def test_the_socket_of_a_dead_process_makes_room(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    listener = UnixListener(str(path))
    assert answers(path)
    listener.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_somebody_answers_on_stays(path: Path, kind: socket.SocketKind) -> None:
    """Whoever it is: here we are, there a child."""
    first = UnixListener(str(path), kind)
    with pytest.raises(ConfigError, match=f"cannot listen on {path}: this process does already"):
        UnixListener(str(path), kind)
    assert answers(path, kind)
    first.close()
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, path, str(int(kind))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(ConfigError, match=rf"another process does \(pid {other.pid}\)"):
            UnixListener(str(path), kind)
        other.communicate(b"\n")


def test_a_socket_whose_backlog_is_full_is_in_use(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ConfigError, match="another process does"):
            UnixListener(str(path))
        assert path.exists()


def test_a_socket_of_another_type_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ConfigError, match="another process has a socket of another type there"):
            UnixListener(str(path))
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link to nothing"])
def test_what_is_not_a_socket_is_left_alone(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="it exists and is not a socket"):
        UnixListener(str(path))
    assert os.path.lexists(path)


def test_a_directory_that_is_missing_is_said(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on .*d\.sock: No such file or directory"):
        UnixListener(str(path / "d.sock"))
    path.write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        UnixListener(str(path / "d.sock"))


def test_somebody_elses_file_is_not_unlinked_at_the_end(path: Path) -> None:
    mine = UnixListener(str(path))
    path.unlink()
    yours = UnixListener(str(path))
    mine.close()
    assert answers(path)
    yours.close()


def test_a_file_that_is_gone_already_is_no_error_at_the_end(path: Path) -> None:
    listener = UnixListener(str(path))
    path.unlink()
    listener.close()


def test_the_path_of_an_inherited_socket_is_known(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound, socket.socket(socket.AF_UNIX) as abstract:
        bound.bind(str(path))
        bound.listen()
        abstract.bind(f"\0hcd-test-{os.getpid()}")
        abstract.listen()
        assert local_path(bound) == str(path)
        assert local_path(abstract) == f"@hcd-test-{os.getpid()}"
        with adopt_fd(os.dup(bound.fileno())) as adopted:
            assert is_listening(adopted)
            assert local_path(adopted) == str(path)

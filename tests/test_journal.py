"""The log in the journal: fields, large entries, fallback; against a stand-in for journald and against itself."""

from __future__ import annotations

import ast
import fcntl
import io
import json
import logging
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcd import log
from hcd.journal import SEALS, JournalHandler, encode
from hcd.message_ids import MESSAGE_IDS

ROOT = Path(__file__).parent.parent


def decode(entry: bytes) -> dict[str, str]:
    """What journald reads from an entry."""
    fields = {}
    while entry:
        line, entry = entry.split(b"\n", 1)
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", entry[:8])
            value, end, entry = entry[8 : 8 + size], entry[8 + size : 9 + size], entry[9 + size :]
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Journald:
    """A socket where journald's is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(10)

    def entry(self) -> dict[str, str]:
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, 4)
        if not fds:
            return decode(data)
        (fd,) = fds
        assert data == b""
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            return decode(file.read())


@pytest.fixture
def journald(short_dir: Path) -> Iterator[Journald]:
    made = Journald(short_dir / "socket")
    yield made
    made.socket.close()


@pytest.fixture
def stderr() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(journald: Journald, stderr: io.StringIO) -> Iterator[logging.Logger]:
    handler = JournalHandler(stderr, str(journald.path))
    handler.setFormatter(log.Formatter(journal=True))
    logger = logging.Logger("hcd.session")
    logger.addHandler(handler)
    yield logger
    handler.close()


def here() -> int:
    """The line of the caller."""
    return sys._getframe(1).f_lineno


def test_an_entry_has_the_fields_of_its_record(journald: Journald, logger: logging.Logger, stderr: io.StringIO) -> None:
    logging.LoggerAdapter(logger, {"device": "disk0"}).warning("queue %d: a %s", 3, "broken\x1b ring"); line = here()  # noqa: E702
    entry = journald.entry()
    assert entry == {
        "MESSAGE": "disk0: queue 3: a broken\\x1b ring",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "hcd",
        "CODE_FILE": __file__,
        "CODE_LINE": str(line),
        "CODE_FUNC": "test_an_entry_has_the_fields_of_its_record",
        "HCD_LOGGER": "hcd.session",
        "HCD_DEVICE": "disk0",
        "HCD_QUEUE": "3",
    }
    assert stderr.getvalue() == ""


def test_the_place_is_that_of_who_speaks_also_through_limits(journald: Journald, logger: logging.Logger) -> None:
    rare = log.RateLimited(logger)
    device = log.DeviceLog("hcd.device", "disk0")
    device.logger = device._limit._logger.logger = logger
    lines = []
    rare.warning("key", "one"); lines.append(here())  # noqa: E702
    rare.log(logging.INFO, "key", "two"); lines.append(here())  # noqa: E702
    device.error("three"); lines.append(here())  # noqa: E702
    device.info("four"); lines.append(here())  # noqa: E702
    entries = [journald.entry() for _ in lines]
    assert [(entry["CODE_FILE"], int(entry["CODE_LINE"])) for entry in entries] == [(__file__, line) for line in lines]


def test_a_traceback_is_part_of_the_entry(journald: Journald, logger: logging.Logger) -> None:
    """A value with newlines is sent with its length; a line in it that looks like a field is none."""
    try:
        raise RuntimeError("first\nPRIORITY=0\nlast")
    except RuntimeError:
        logger.exception("it failed")
    entry = journald.entry()
    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE"].startswith("it failed\nTraceback (most recent call last):\n")
    assert entry["MESSAGE"].endswith("RuntimeError: first\nPRIORITY=0\nlast")


def test_an_entry_that_is_too_large_for_a_datagram_goes_as_a_sealed_file(
    journald: Journald, logger: logging.Logger
) -> None:
    before = os.listdir("/proc/self/fd")
    text = "\n".join(["x" * 1000] * 20_000)
    logger.error("%s", text)
    assert journald.entry()["MESSAGE"] == text
    assert os.listdir("/proc/self/fd") == before


def test_what_cannot_be_encoded_is_replaced() -> None:
    assert encode("A", "\udcff") == b"A=\\udcff\n"
    assert encode("A", "a\nb") == b"A\n\3\0\0\0\0\0\0\0a\nb\n"


def test_known_messages_have_their_id(journald: Journald, logger: logging.Logger) -> None:
    logger.info("ready: %s", "disk0")
    assert journald.entry()["MESSAGE_ID"] == MESSAGE_IDS["ready: %s"]


def test_ids_are_those_of_messages_that_are_written_somewhere() -> None:
    nodes = (node for file in (ROOT / "hcd").rglob("*.py") if file.name != "message_ids.py"
             for node in ast.walk(ast.parse(file.read_text())))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(MESSAGE_IDS) <= texts
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)
    assert all(re.fullmatch("[0-9a-f]{32}", ident) for ident in MESSAGE_IDS.values())


def test_the_id_in_the_manual_is_one_of_them() -> None:
    (ident,) = re.findall(r"MESSAGE_ID=(\w+)", (ROOT / "docs" / "operations.md").read_text())
    assert [text for text, known in MESSAGE_IDS.items() if known == ident and "in flight" in text]


def test_without_journald_the_line_goes_to_stderr(
    journald: Journald, logger: logging.Logger, stderr: io.StringIO
) -> None:
    """Away, there again: each entry is sent on its own."""
    journald.socket.close()
    logger.warning("one")
    journald.path.unlink()
    logger.warning("two")
    assert stderr.getvalue() == "<4>one\n<4>two\n"
    again = Journald(journald.path)
    logger.warning("three")
    assert again.entry()["MESSAGE"] == "three"
    again.socket.close()


def test_a_journald_that_does_not_keep_up_holds_nobody_up(
    journald: Journald, logger: logging.Logger, stderr: io.StringIO
) -> None:
    count = 5000
    for _ in range(count):
        logger.info("%s", "x" * 100)
    kept = stderr.getvalue().count("\n")
    assert 0 < kept < count
    for _ in range(count - kept):
        journald.entry()
    journald.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        journald.entry()


def test_the_journal_is_chosen_where_stderr_ends_in_it(
    journald: Journald, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    before, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        try:
            monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
            log.setup("info", stream, str(journald.path))
            logging.getLogger("hcd.x").info("to stderr")
            monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
            log.setup("info", stream, str(journald.path))
            logging.getLogger("hcd.x").info("to the journal")
        finally:
            for handler in set(root.handlers) - set(before):
                handler.close()
            root.handlers[:] = before
            root.setLevel(level)
            logging.raiseExceptions = raising
    assert journald.entry()["MESSAGE"] == "to the journal"
    assert (tmp_path / "stderr").read_text() == "hcd: info: to stderr\n"


# -- the real one

CONFIG = """
[[device]]
name = "rng0"
type = "rng"
socket = "{dir}/rng0.sock"
"""
CLIENT = """
import sys, time
from hcd.testing import Driver
with Driver.open(sys.argv[1]) as driver:
    driver.ask(b"", 16)
"""
#: journald on a /run of its own, then a shell script with its stderr in the journal, then what the journal holds
SCRIPT = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
{journald} >/run/journald.log 2>&1 &
journald=$!
trap 'kill $journald' EXIT
until [ -S /run/systemd/journal/socket ] && [ -S /run/systemd/journal/stdout ]; do
    kill -0 $journald
    sleep 0.05
done
systemd-cat --identifier=lines --level-prefix=true sh -c '
    export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)
    exec {python} -m hcd run {config}' &
hcd=$!
until grep -q {dir}/rng0.sock /proc/net/unix; do kill -0 $hcd; sleep 0.05; done
{python} -c '{client}' {dir}/rng0.sock
kill $hcd
wait $hcd
journalctl --sync >/dev/null 2>&1 || true
journalctl --directory=/run/log/journal --no-pager --output=json SYSLOG_IDENTIFIER=hcd
"""


@pytest.mark.long
def test_the_real_journald_takes_what_a_daemon_says(short_dir: Path, need: Callable[..., None]) -> None:
    """In a mount namespace of its own; hcd finds it by JOURNAL_STREAM, as under systemd."""
    need("unshare", "systemd-cat", "journalctl")
    journald = Path("/usr/lib/systemd/systemd-journald")
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if not journald.exists() or subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "/run"]).returncode:
        from conftest import skip_or_fail

        skip_or_fail("needs systemd-journald and the right to mount")
    (short_dir / "hcd.toml").write_text(CONFIG.replace("{dir}", str(short_dir)))
    python, config = shlex.quote(sys.executable), short_dir / "hcd.toml"
    script = SCRIPT.format(journald=journald, python=python, config=config, dir=short_dir, client=CLIENT)
    done = subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    by_message = {entry["MESSAGE"]: entry for entry in entries}
    assert "ready: rng0" in by_message, done.stdout + done.stderr
    ready = by_message["ready: rng0"]
    assert ready["MESSAGE_ID"] == MESSAGE_IDS["ready: %s"]
    assert (ready["PRIORITY"], ready["_TRANSPORT"]) == ("6", "journal")
    assert ready["CODE_FILE"].endswith("hcd/daemon.py")
    (connected,) = [entry for message, entry in by_message.items() if message.startswith("rng0: front end connected")]
    assert connected["HCD_DEVICE"] == "rng0"
    assert connected["_PID"] == ready["_PID"]
    assert "SIGTERM: ending" in by_message

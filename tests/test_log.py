"""The log: who reads it decides its form, and nobody can flood it."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcd import log


@pytest.fixture(autouse=True)
def _untouched_root() -> Iterator[None]:
    """What ``log.setup`` does to the root logger is undone."""
    root = logging.getLogger()
    before, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.raiseExceptions = raising


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def logger(lines: Lines) -> logging.Logger:
    logger = logging.Logger("under test")
    logger.addHandler(lines)
    return logger


def formatted(journal: bool, level: int, message: str, device: str = "", exc: BaseException | None = None) -> str:
    info = (type(exc), exc, exc.__traceback__) if exc else None
    record = logging.LogRecord("hcd", level, "file", 1, message, (), info)
    if device:
        record.device = device
    return log.Formatter(journal=journal).format(record)


@pytest.mark.parametrize(
    ("level", "journal", "terminal"),
    [
        (logging.DEBUG, "<7>", "hcd: debug: "),
        (logging.INFO, "<6>", "hcd: info: "),
        (logging.WARNING, "<4>", "hcd: warning: "),
        (logging.ERROR, "<3>", "hcd: error: "),
        (logging.CRITICAL, "<2>", "hcd: critical: "),
    ],
)
def test_a_line_starts_with_its_level(level: int, journal: str, terminal: str) -> None:
    assert formatted(True, level, "text") == journal + "text"
    assert formatted(False, level, "text") == terminal + "text"


def test_a_line_names_its_device() -> None:
    assert formatted(True, logging.INFO, "text", "disk0") == "<6>disk0: text"
    assert formatted(False, logging.INFO, "text", "disk0") == "hcd: info: disk0: text"


def test_every_line_of_a_traceback_has_the_prefix() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError as exc:
        text = formatted(True, logging.ERROR, "it failed", "disk0", exc)
    assert len(text.splitlines()) > 4
    assert all(line.startswith("<3>disk0: ") for line in text.splitlines())


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert formatted(False, logging.INFO, "serial \x1b[2J\x07 of the guest") == (
        "hcd: info: serial \\x1b[2J\\x07 of the guest"
    )


def test_an_empty_message_is_a_line() -> None:
    assert formatted(True, logging.INFO, "") == "<6>"


def test_the_journal_is_recognised_by_device_and_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "journal", "w") as stream:
        status = os.fstat(stream.fileno())
        assert not log.journal_reads(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert log.journal_reads(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert not log.journal_reads(stream), "stderr was redirected after systemd set it up"
    assert not log.journal_reads(stream), "closed"
    assert not log.journal_reads(io.StringIO()), "no descriptor"


def test_setup_twice_says_everything_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.setup("info", first)
    log.setup("warning", second)
    adapter = logging.LoggerAdapter(logging.getLogger("hcd.device"), {"device": "rng0"})
    adapter.info("quiet")
    adapter.warning("loud")
    assert first.getvalue() == ""
    assert second.getvalue() == "hcd: warning: rng0: loud\n"


def test_a_broken_stderr_does_not_raise() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log.setup("info", Broken())
    logging.getLogger("hcd").error("lost")


def test_a_key_is_silent_after_its_limit_and_tells_how_many_were_kept_back(
    logger: logging.Logger, lines: Lines
) -> None:
    clock = Clock()
    limited = log.RateLimited(logger, limit=2, period=60, clock=clock)
    said = [limited.warning("bad chain", "bad chain %d", n) for n in range(5)]
    assert said == [True, True, False, False, False]
    assert lines.lines == ["bad chain 0", "bad chain 1"]
    clock.now += 60
    limited.warning("bad chain", "bad chain %d", 5)
    assert lines.lines[2:] == ["3 more lines about bad chain were suppressed", "bad chain 5"]


def test_keys_do_not_silence_each_other(logger: logging.Logger, lines: Lines) -> None:
    limited = log.RateLimited(logger, limit=1, period=60, clock=Clock())
    limited.warning(("q0", "x"), "first")
    limited.error(("q1", "x"), "second")
    limited.warning(("q0", "x"), "third")
    assert lines.lines == ["first", "second"]


def test_flush_tells_what_was_kept_back_once(logger: logging.Logger, lines: Lines) -> None:
    limited = log.RateLimited(logger, limit=1, period=60, clock=Clock())
    for _ in range(4):
        limited.warning(("q0", "x"), "again")
    limited.flush()
    limited.flush()
    assert lines.lines == ["again", "3 more lines about this were suppressed"]


def test_keys_without_end_do_not_fill_memory(logger: logging.Logger, lines: Lines) -> None:
    limited = log.RateLimited(logger, limit=1, period=60, clock=Clock())
    for n in range(5000):
        limited.warning(n, "key %d", n)
    assert len(limited._keys) <= 1024
    assert not limited.warning(4999, "the newest are remembered")


def test_a_guest_cannot_fill_the_log_through_its_device(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings that repeat are counted, each kind for itself; what a device says at info is not limited."""
    device = log.DeviceLog("hcd.under.test", "disk0")
    with caplog.at_level(logging.INFO):
        for n in range(20):
            device.warning("port %d: nonsense", n)
            device.info("block %d", n)
        device.error("another thing")
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "port" in line] == [f"port {n}: nonsense" for n in range(5)]
    assert sum("block" in line for line in said) == 20
    assert said[-1] == "another thing"
    assert all(getattr(record, "device", "") == "disk0" for record in caplog.records)

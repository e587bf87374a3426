"""The commands that go on: ``hcd top`` and ``hcd trace``. On a terminal or into a pipe.

``top`` connects for each frame, so it survives a restart of the daemon and holds no connection in between.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hcd.control.client import NoDaemonError, connect, take_snapshot
from hcd.views.text import cut, printable
from hcd.views.top import top
from hcd.views.trace import trace_line

__all__ = ["run_top", "run_trace"]

#: the other screen, without a cursor; and back (ECMA-48, xterm)
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
#: to the corner; what is right of a line, what is below the last one
_HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
#: the first frame of --once shows so many seconds
_FIRST = 1.0


def run_top(control: str | None, *, interval: float, once: bool) -> int:
    """Frames until "q" or Ctrl-C. NoDaemonError when there is no daemon in the beginning."""
    before = take_snapshot(control)
    if once:
        time.sleep(min(interval, _FIRST))
        print("\n".join(top(before, take_snapshot(control))))
        return 0
    on_terminal = sys.stdout.isatty()
    with _screen(on_terminal) as keys:
        _show(top(None, before, _room(on_terminal)), on_terminal)
        while not _quit(keys, interval):
            try:
                now = take_snapshot(control)
            except NoDaemonError as error:
                _show([printable(line) for line in str(error).splitlines()], on_terminal)
                continue
            _show(top(before, now, _room(on_terminal)), on_terminal)
            before = now
    return 0


def run_trace(control: str | None, device: str, *, rate: int | None, as_json: bool) -> int:
    """Lines until Ctrl-C, or until the daemon or the reader of our output ends. NoDaemonError, CallError."""
    given = {} if rate is None else {"rate": rate}
    with suppress(KeyboardInterrupt, _ReaderGone), connect(control) as client:
        client.on_wait = _wait_or_break
        for event in client.stream("trace", device=device, **given):
            print(json.dumps(event) if as_json else trace_line(event), flush=True)
    return 0


def _wait_or_break(fd: int) -> None:
    """Return when ``fd`` is readable. _ReaderGone when nobody reads our output any more, as with ``| head``."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sys.stdout.fileno(), 0)
    if fd not in [ready for ready, _ in poll.poll()]:
        raise _ReaderGone


class _ReaderGone(Exception):
    """No OSError: those are the daemon's."""


@contextmanager
def _screen(on_terminal: bool) -> Iterator[int]:
    """The terminal for us, keys one by one; the descriptor that they come on or -1. Afterwards all is as before."""
    keys = sys.stdin.fileno() if on_terminal and sys.stdin.isatty() else -1
    saved = termios.tcgetattr(keys) if keys >= 0 else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if keys >= 0:
            tty.setcbreak(keys)
        if on_terminal:
            sys.stdout.write(_ENTER)
        yield keys
    except KeyboardInterrupt:
        pass
    finally:
        if on_terminal:
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
        if saved is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, saved)


def _show(lines: list[str], on_terminal: bool) -> None:
    if on_terminal:
        lines = _fit(lines)
        sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\r\n" for line in lines[:-1]))
        sys.stdout.write(f"{lines[-1]}{_CLEAR_LINE}{_CLEAR_REST}")
    else:
        sys.stdout.write("\n".join([*lines, "", ""]))
    sys.stdout.flush()


def _fit(lines: list[str]) -> list[str]:
    """What the terminal has columns for: a line that goes on in the next one pushes the frame off the screen."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return lines
    return [cut(line, columns) for line in lines] if columns else lines


def _room(on_terminal: bool) -> int | None:
    """Lines of the terminal; None where there is none, or one that does not know (serial lines say 0)."""
    if not on_terminal:
        return None
    try:
        lines = os.get_terminal_size(sys.stdout.fileno()).lines
    except OSError:
        return None
    return max(lines, 3) if lines else None


def _quit(keys: int, interval: float) -> bool:
    """Wait for the next frame; whether "q" was typed meanwhile."""
    deadline = time.monotonic() + interval
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([keys] if keys >= 0 else [], [], [], left)
        if readable and os.read(keys, 1) in (b"q", b"Q", b""):
            return True
    return False


"""``hcd`` and ``python -m hcd``."""

from __future__ import annotations

import os
import sys
import threading

from hcd.cli import main as run_cli

__all__ = ["main"]


def main() -> None:
    _fill_gaps()
    status = run_cli(sys.argv[1:])
    if threading.active_count() > 1:
        from hcd.deadline import leave_threads

        leave_threads(status)
    sys.exit(status)


def _fill_gaps() -> None:
    """Whoever started hcd may have closed these. What is written there is lost; no socket gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


if __name__ == "__main__":
    main()

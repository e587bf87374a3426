"""``hcd`` and ``python -m hcd``."""

from __future__ import annotations

import sys
import threading

from hcd.cli import main as run_cli

__all__ = ["main"]


def main() -> None:
    status = run_cli(sys.argv[1:])
    if threading.active_count() > 1:
        from hcd.deadline import leave_threads

        leave_threads(status)
    sys.exit(status)


if __name__ == "__main__":
    main()

"""``hcd`` and ``python -m hcd``."""

from __future__ import annotations

import sys

from hcd.cli import main as run_cli

__all__ = ["main"]


def main() -> None:
    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""``python -m hcd.bench.scraper SOCKET``: reads /metrics ten times a second until standard input ends.

Prints an empty line after the first scrape, and at the end how long each took, in seconds, as JSON.
"""

from __future__ import annotations

import json
import select
import sys
import time
from pathlib import Path

from hcd.demo.hcd_process import fetch

PERIOD = 0.1


def main() -> None:
    times: list[float] = []
    fetch(Path(sys.argv[1]), "/metrics")
    print(flush=True)
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        began = time.monotonic()
        fetch(Path(sys.argv[1]), "/metrics")
        times.append(time.monotonic() - began)
        due += PERIOD
    print(json.dumps(times))


if __name__ == "__main__":
    main()

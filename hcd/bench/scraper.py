"""``python -m hcd.bench.scraper PORT``: reads /metrics of 127.0.0.1 ten times a second until standard input ends.

Prints an empty line after the first scrape; at the end, as JSON, how long each took in seconds, its own processor
seconds per scrape and the bytes of the last one. It reads and throws away: parsing is paid for by Prometheus.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

PERIOD = 0.1
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200"


def scrape(port: int, buffer: bytearray) -> int:
    """One scrape; the bytes of the answer. ConnectionError unless the status is 200."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(REQUEST)
        total = got = sock.recv_into(buffer)
        if not buffer.startswith(OK):
            raise ConnectionError(f"port {port} answered {bytes(buffer[:80])!r}")
        while got:
            got = sock.recv_into(buffer)
            total += got
    return total


def main() -> None:
    times: list[float] = []
    buffer = bytearray(1 << 20)
    port = int(sys.argv[1])
    size = scrape(port, buffer)
    print(flush=True)
    due, spent = time.monotonic(), time.process_time()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        began = time.monotonic()
        size = scrape(port, buffer)
        times.append(time.monotonic() - began)
        due += PERIOD
    print(json.dumps({"times": times, "cpu": (time.process_time() - spent) / max(1, len(times)), "bytes": size}))


if __name__ == "__main__":
    main()

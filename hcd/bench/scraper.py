"""``python -m hcd.bench.scraper PORT``: reads /metrics of 127.0.0.1 ten times a second while it is told to.

Each line on standard input names how, and the next line, whatever it says, ends that:

- ``kept``: over one connection, as Prometheus does.
- ``new``: over a new connection each time.
- ``none``: opens and closes a socket and asks for nothing, which is what a load beside it is compared with.

It prints an empty line when it is ready and, at the end of each, a line of JSON: how long each scrape took in seconds,
its own processor seconds per scrape and the bytes of the last one. It reads and throws away: parsing is paid for by
Prometheus.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable

PERIOD = 0.1
END = b"\r\n\r\n"
LENGTH = b"\r\nContent-Length: "


class Scraper:
    """One of 127.0.0.1 ``port``. ConnectionError unless the status is 200."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._buffer = bytearray(1 << 20)
        self._kept: socket.socket | None = None

    def kept(self) -> int:
        """Over a connection that stays; the bytes of the answer."""
        if self._kept is None:
            self._kept = self._connect()
        return self._ask(self._kept, "keep-alive")

    def new(self) -> int:
        """Over one that ends with the answer."""
        with self._connect() as sock:
            return self._ask(sock, "close")

    def none(self) -> int:
        """Nothing but a socket."""
        socket.socket().close()
        return 0

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=10)

    def _ask(self, sock: socket.socket, connection: str) -> int:
        sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n".encode("ascii"))
        total = sock.recv_into(self._buffer)
        head, found, _ = bytes(self._buffer[: min(total, 1024)]).partition(END)
        if not found or not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"port {self._port} answered {head[:80]!r}")
        left = len(head) + len(END) + int(head.partition(LENGTH)[2].partition(b"\r\n")[0]) - total
        while left > 0:
            got = sock.recv_into(self._buffer)
            if not got:
                raise ConnectionError(f"port {self._port} hung up, {left} bytes before the end")
            left -= got
            total += got
        return total


def repeat(scrape: Callable[[], int]) -> dict[str, object]:
    """Until there is something to read on standard input."""
    times: list[float] = []
    size = 0
    due, spent = time.monotonic(), time.process_time()
    while not select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
        began = time.monotonic()
        size = scrape()
        times.append(time.monotonic() - began)
        due += PERIOD
    return {"times": times, "cpu": (time.process_time() - spent) / max(1, len(times)), "bytes": size}


def read_line() -> str:
    """Unbuffered, so that select(2) sees what is left; "" at the end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return ""
        line += byte
    return line.decode("ascii").strip()


def main() -> None:
    scraper = Scraper(int(sys.argv[1]))
    kinds = {"kept": scraper.kept, "new": scraper.new, "none": scraper.none}
    scraper.kept()
    print(flush=True)
    while kind := read_line():
        found = repeat(kinds[kind])
        read_line()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""hcd without a garbage collector: ``python without_gc.py SOCKET hcd-arguments...``

Whoever connects to SOCKET is told, as JSON, how many objects of each class of hcd there are. Nothing but reference
counts gets rid of them, except the one collection after a reload.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import threading
from collections import Counter
from pathlib import Path

from hcd.cli import main

_ROOTS = ("hcd.", "hcd_protocols.")


def count() -> dict[str, int]:
    gc.unfreeze()  # frozen objects are in no list
    names = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    return {name: number for name, number in names.items() if name.startswith(_ROOTS)}


def answer(listener: socket.socket) -> None:
    while True:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(json.dumps(count()).encode())


if __name__ == "__main__":
    gc.disable()
    Path(sys.argv[1]).unlink(missing_ok=True)  # of the process before this one
    where = socket.socket(socket.AF_UNIX)
    where.bind(sys.argv[1])
    where.listen()
    threading.Thread(target=answer, args=(where,), name="objects", daemon=True).start()
    sys.exit(main(sys.argv[2:]))

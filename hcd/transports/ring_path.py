"""Over which path the guest of one session rings: asked of QEMU by QMP, once a driver has acknowledged its features."""

from __future__ import annotations

import logging

import trio

from hcd import qmp
from hcd.doorbell import Path, PathSource
from hcd.host import DeviceHost

__all__ = ["PathFinder"]

#: QEMU answers QMP only once its machine is built, which may take as long as other devices of it take
QMP_ATTEMPTS = 3
#: QEMU may open its QMP socket after it connects here (seconds)
QMP_PAUSE = 2.0


class PathFinder:
    """Finds the path for the device of ``host``, whose front end connected to ``socket``."""

    def __init__(self, host: DeviceHost, socket: str) -> None:
        self._host = host
        self._socket = socket
        self._question: trio.CancelScope | None = None

    def ask(self, nursery: trio.Nursery, features: int) -> None:
        """A driver acknowledged ``features``. An earlier question, if one is open, is asked no more."""
        if self._host.asks_qemu:
            if self._question is not None:
                self._question.cancel()
            self._question = trio.CancelScope()
            nursery.start_soon(self._find, features, self._question)

    async def _find(self, features: int, question: trio.CancelScope) -> None:
        host = self._host
        assert host.spec.qmp is not None
        answer: qmp.PathAnswer | None = None
        with question:
            for attempt in range(QMP_ATTEMPTS):
                if attempt:
                    await trio.sleep(QMP_PAUSE)
                answer = await qmp.find_path(host.spec.qmp, self._socket, features=features, log=host.rare_log)
                if answer is not None:
                    break
            with trio.CancelScope(shield=True):
                await host.lane.run(lambda: self._take(answer, features))

    def _take(self, answer: qmp.PathAnswer | None, features: int) -> None:
        host = self._host
        if answer is None:
            if host.path_is_open:
                host.set_negotiated_path(features)
            return
        conflict = answer.conflict(host.spec.path)
        host.stats.path_conflict = bool(conflict)
        if conflict:
            host.rare_log.warning(("path", host.spec.path), "%s", conflict)
        elif host.path_is_open:
            host.rare_log.log(logging.INFO, "the path", "rings come by %s: %s (%s)", answer.path, answer.device,
                              answer.kind)
            host.set_path(answer.path, PathSource.QMP, answer.kind, answer.place)
        else:
            host.set_place(answer.place)

    def give_up(self) -> None:
        """On the lane: rings that were counted aside for an answer that never came belong to no known path."""
        if any(doorbell.pending for doorbell in self._host.doorbells):
            self._host.set_path(Path.UNKNOWN, PathSource.NONE)

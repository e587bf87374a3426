"""Does a device keep its contract? A run of rules against one that is served by hcd's own session code.

Theory of operation. The check knows nothing of the device but what it declares. It plays a driver that is legal and
inconvenient: it cuts requests into odd descriptors, fills rings, stops queues while they are busy, hangs up, comes
back. Requests come from the author (:class:`Exchange`: what to send, and what must come back) and, for every queue,
from the check itself (*probes*: bytes without a meaning). A device may fail a probe and may hold it until the queue
stops (receive queues do); it must not raise, forget it, or hold it for longer.

With doorbell devices it plays VMMs and their guests alike (:mod:`hcd.testing.ring_rules`).

What goes wrong shows in the answers, in the counters of the host, in the log of hcd, and in what the process holds.
Each finding names the rule that was broken; ``docs/devices.md`` explains them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from hcd import declaration
from hcd.demo.hcd_process import Resources
from hcd.device import DoorbellDevice
from hcd.errors import PluginError, shown
from hcd.frontend.errors import FrontendError
from hcd.testing import ring_rules, rules
from hcd.testing.exchanges import Exchange
from hcd.testing.ring_rules import Ring, RingRun
from hcd.testing.rules import LAYOUTS, Run
from hcd.testing.scene import Broken, MisfitError, Scene
from hcd.testing.serving import DoorbellSource, Served, ServedDevice, ServedDoorbells, Source, make_device, serve
from hcd.testing.settle import settled_growth

__all__ = ["ConformanceError", "Exchange", "Finding", "check_device", "find_faults"]

#: a step of the device that takes longer (nanoseconds) is a finding; it warns in the log from 50 ms on
SLOW_NS = 200_000_000
#: how long (seconds) hcd waits for requests of a queue that stops; the daemon's default is 5
DRAIN_TIMEOUT = 0.5

#: the rule to which a line of hcd's log belongs
RULE_BY_TEXT = (
    ("never completed", "complete"),
    ("did not end within", "stop"),
    ("were in flight when", "stop"),
    ("the handler of", "handler"),
    ("callback raised", "callback"),
    ("keeps a view of the shared memory", "memory"),
    ("config() raised", "config"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule: its name, what happened, and in which variants of the run."""

    rule: str
    text: str
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({', '.join(self.where)})" if self.where else ""
        return f"{self.rule}: {self.text}{where}"


class ConformanceError(AssertionError):
    """A device broke rules; ``findings`` has them, the message shows them."""

    def __init__(self, device: str, findings: Sequence[Finding]) -> None:
        lines = "\n".join(f"  {finding}" for finding in findings)
        super().__init__(f"{device} breaks {len(findings)} of the rules that docs/devices.md names:\n{lines}")
        self.findings = tuple(findings)


def check_device(
    device: Source | DoorbellSource,
    options: Mapping[str, Any] | None = None,
    *,
    exchanges: Sequence[Exchange] | Sequence[Ring] = (),
    skip: Collection[str] = (),
    timeout: float = 5.0,
) -> None:
    """Raise ConformanceError unless ``device`` keeps the contract of :mod:`hcd.device`.

    ``device`` and ``options`` as for :func:`hcd.testing.serve`. ``exchanges``: requests that must work, each with its
    answer where that is known, or rings and how they are answered; the more are given, the more is found. ValueError
    for such that are about what the device does not have.
    ``skip``: rules whose findings do not count. ``timeout``: how long (seconds) an exchange may take.
    """
    made = make_device(device, options)
    if findings := find_faults(made, exchanges=exchanges, skip=skip, timeout=timeout):
        raise ConformanceError(type(made).__name__, findings)


def find_faults(
    device: Source | DoorbellSource,
    options: Mapping[str, Any] | None = None,
    *,
    exchanges: Sequence[Exchange] | Sequence[Ring] = (),
    skip: Collection[str] = (),
    timeout: float = 5.0,
) -> list[Finding]:
    """The same, as a list."""
    made = make_device(device, options)
    wanted = Ring if isinstance(made, DoorbellDevice) else Exchange
    if not all(isinstance(one, wanted) for one in exchanges):
        raise TypeError(f"exchanges of {type(made).__name__} are instances of hcd.testing.{wanted.__name__}")
    check = _RingCheck if isinstance(made, DoorbellDevice) else _RequestCheck
    return check(made, exchanges, skip, timeout).run()


@dataclass(slots=True)
class _Check:
    """One run over all rules."""

    device: Any
    exchanges: Sequence[Any]
    skip: Collection[str]
    timeout: float
    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        found = self.found.items()
        return [Finding(rule, text, tuple(where)) for (rule, text), where in found if rule not in self.skip]

    def add(self, rule: str, text: str, where: str = "") -> None:
        places = self.found.setdefault((rule, text), [])
        if where and where not in places:
            places.append(where)

    def run(self) -> list[Finding]:
        for text in declaration.faults(type(self.device)):
            self.add("declaration", text)
        if not self.found:  # what is declared wrongly cannot be served
            self.serve()
        return self.findings()

    def serve(self) -> None:
        before = Resources()
        opened = False
        try:
            with _LogWatch() as log, serve(self.device, drain_timeout=DRAIN_TIMEOUT) as served:
                opened = True
                for text in declaration.faults_when_open(self.device):
                    self.add("declaration", text)
                if not self.found:
                    self.run_rules(served, log)
            for error in served.crashes:
                self.add("life", f"close() raised {shown(error)}")
        except MisfitError:
            raise
        except PluginError as error:
            self.add("declaration", str(error))
        except (Exception, SystemExit) as error:
            self.add("life", shown(error) if opened else f"open() raised {shown(error)}")
        if growth := settled_growth(before, Resources):
            self.add("leaks", f"after close() this process still holds {growth}")

    def run_rules(self, served: Any, log: _LogWatch) -> None:
        raise NotImplementedError

    def play(
        self, served: Served, log: _LogWatch, name: str, rule: Callable[[Any], None], scene: Scene, where: str = ""
    ) -> None:
        """One rule, and what hcd noticed meanwhile."""
        served.run(served.host.rare_log.flush)
        errors = served.host.stats.handler_errors
        try:
            rule(scene)
        except Broken as broken:
            self.add(broken.rule or name, str(broken), where)
        except FrontendError as error:
            self.add(name, f"{scene.step}: {error}", where)
        finally:
            scene.close()
        served.wait_disconnected()
        self.collect(served, log, name, where, served.host.stats.handler_errors - errors)

    def collect(self, served: Served, log: _LogWatch, name: str, where: str, errors: int) -> None:
        """Turn what hcd noticed into findings."""
        noticed = False
        for text in log.take():
            rule = next((rule for part, rule in RULE_BY_TEXT if part in text), "life")
            self.add(rule, text, where)
            noticed = True
        for error in served.crashes:
            text = f"a method of the device raised {shown(error)} and took the connection along"
            self.add("life", text, where)
        if errors and not noticed:
            self.add("handler", f"the handler failed {errors} times during the rule {name}", where)
        for what, ns in served.slow_steps:
            if ns > SLOW_NS:
                self.add("blocking", f"{what} kept every device of the process waiting for "
                         f"{'more than a second' if ns > 1e9 else 'over 200 ms'}", where)
        served.crashes.clear()
        served.slow_steps.clear()


class _RequestCheck(_Check):
    """Of a virtio device, in every layout."""

    def run_rules(self, served: ServedDevice, log: _LogWatch) -> None:
        holding: set[int] = set()  # queues that hold requests until they stop
        for exchange in self.exchanges:
            if not 0 <= exchange.queue < self.device.num_queues:
                raise MisfitError(f"{exchange}: the device has {self.device.num_queues}, the first one is queue 0")
        layouts = [*LAYOUTS, *(rules.IN_ORDER_LAYOUTS if self.device.in_order else ())]
        for name, rule in rules.RULES.items():
            known = len(self.found)
            for layout in layouts[:1] if name in rules.ONCE else layouts:
                run = Run(served, layout, self.exchanges, self.timeout, holding)
                self.play(served, log, name, rule, run, layout.name)
                if len(self.found) > known:
                    break  # one kind of ring is enough to see it, and what fails tends to take long


class _RingCheck(_Check):
    """Of a doorbell device."""

    def run_rules(self, served: ServedDoorbells, log: _LogWatch) -> None:
        for name, rule in ring_rules.RULES.items():
            run = RingRun(served, self.exchanges, self.timeout)
            self.play(served, log, name, rule, run)
        served.after_close = partial(self.listen, run)

    async def listen(self, run: RingRun) -> None:
        """The device is closed, and its lane goes on."""
        before = run.signals()
        await trio.sleep(ring_rules.PATIENCE)
        if run.signals() > before:
            self.add("late", "the device interrupts after close()")


class _LogWatch(logging.Handler):
    """Collects what hcd itself reports as an error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def __enter__(self) -> _LogWatch:
        logging.getLogger("hcd").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("hcd").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name == "hcd.device" or text.startswith("traceback of") or text.endswith("were suppressed"):
            return  # the device's own lines; what is told once more
        if record.levelno >= logging.ERROR or "were in flight when" in text:
            cause = record.exc_info[1] if record.exc_info else None
            self._texts.append(f"{text}: {shown(cause)}" if cause is not None and record.name == "hcd.lanes" else text)

    def take(self) -> list[str]:
        texts, self._texts = self._texts, []
        return texts


"""For the tests of device plug-ins: a device served in this process, a driver for it, and a conformance check.

::

    from hcd.testing import check_device, serve

    def test_greets():
        with serve(Greeter) as served, served.driver() as driver:
            assert driver.ask(b"world", 64) == b"hello world"

    def test_keeps_the_contract():
        check_device(Greeter)

The device runs under hcd's own session, lanes and back end, behind a real unix socket; only the machine is missing.
Everything here is synchronous: tests need neither trio nor a virtual machine.
"""

from __future__ import annotations

from hcd.frontend.errors import BackendError, DeviceRingError, FrontendError, RequestFailed
from hcd.frontend.memory import MemorySlot, SharedMemory
from hcd.frontend.queue import Queue
from hcd.frontend.ring import Used
from hcd.testing.conformance import ConformanceError, Exchange, Finding, check_device, find_faults
from hcd.testing.driver import Driver
from hcd.testing.ring_rules import Ring
from hcd.testing.serving import ServedDevice, ServedDoorbells, serve
from hcd.testing.vmm import Vmm

__all__ = [
    "BackendError",
    "ConformanceError",
    "DeviceRingError",
    "Driver",
    "Exchange",
    "Finding",
    "FrontendError",
    "MemorySlot",
    "Queue",
    "RequestFailed",
    "Ring",
    "ServedDevice",
    "ServedDoorbells",
    "SharedMemory",
    "Used",
    "Vmm",
    "check_device",
    "find_faults",
    "serve",
]

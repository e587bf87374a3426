"""Fixtures for the tests of device plug-ins, for everybody who has hcd and pytest installed.

pytest loads this module in every run of the environment, so it imports nothing until a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, overload

import pytest

if TYPE_CHECKING:
    from hcd.testing import ServedDevice, ServedDoorbells
    from hcd.testing.serving import DoorbellSource, Source

__all__ = ["Serve", "hcd_packed", "hcd_serve"]


class Serve(Protocol):
    """The type of the fixture ``hcd_serve``: :func:`hcd.testing.serve`, without the ``with``."""

    @overload
    def __call__(self, device: Source, options: dict[str, Any] | None = None, **settings: Any) -> ServedDevice: ...
    @overload
    def __call__(
        self, device: DoorbellSource, options: dict[str, Any] | None = None, **settings: Any
    ) -> ServedDoorbells: ...


@pytest.fixture
def hcd_serve() -> Iterator[Serve]:
    """``hcd_serve(device)`` serves a device until the test ends; arguments as for ``hcd.testing.serve``."""
    from hcd.testing import serve

    with ExitStack() as stack:

        def start(device: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
            return stack.enter_context(serve(device, options, **settings))

        yield start


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def hcd_packed(request: pytest.FixtureRequest) -> bool:
    """Runs the test twice: ``served.driver(packed=hcd_packed)``."""
    packed: bool = request.param
    return packed

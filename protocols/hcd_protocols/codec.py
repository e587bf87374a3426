"""construct behind typed functions: the one place where the rest of the package meets it.

construct is right for control messages and configuration spaces (a parse costs some 25 us). Headers on the
data path are plain ``struct.Struct`` constants beside the layouts. construct's ``compile()`` is not for
untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from construct import Construct, ConstructError

from hcd_protocols.errors import ProtocolError

__all__ = ["Layout"]


class Layout:
    """One layout with the range of sizes that it may have on the wire, in bytes."""

    __slots__ = ("_codec", "max_size", "min_size", "name")

    def __init__(self, name: str, codec: Construct, min_size: int, max_size: int | None = None) -> None:
        self.name = name
        self._codec = codec
        self.min_size = min_size
        self.max_size = min_size if max_size is None else max_size

    def parse(self, data: bytes) -> Mapping[str, Any]:
        """The fields of ``data``; bytes behind the layout are ignored. ProtocolError when it is too short."""
        try:
            fields: Mapping[str, Any] = self._codec.parse(data, size=len(data))
        except ConstructError as error:
            raise ProtocolError(f"{self.name}: expected {self.min_size} bytes, got {len(data)}") from error
        return fields

    def build(self, **fields: object) -> bytes:
        """The bytes of ``fields``. ValueError for values that do not fit: a mistake of the caller."""
        try:
            return bytes(self._codec.build(fields))
        except (ConstructError, KeyError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def __repr__(self) -> str:
        return f"Layout({self.name})"

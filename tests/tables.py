"""Configurations of tests: ``[[device]]`` tables. "{dir}" in them stands for the test's directory."""

from __future__ import annotations

import json

__all__ = ["table"]


def table(name: str, kind: str, *lines: str, socket: str = "", **options: str | float | list[str]) -> str:
    """A table: ``table("disk", "blk", 'path = "pio"', blk_file="{dir}/disk.img")``.

    ``lines`` are further keys of it, ``options`` those of ``[device.options]``. It listens on {dir}/NAME.sock unless
    ``socket`` says otherwise.
    """
    socket = socket or f"{{dir}}/{name}.sock"
    rows = ["[[device]]", f'name = "{name}"', f'type = "{kind}"', f'socket = "{socket}"', *lines]
    if options:
        # strings, numbers, truth values and lists of strings are the same in JSON and TOML
        rows += ["[device.options]", *(f"{key.replace('_', '-')} = {json.dumps(to)}" for key, to in options.items())]
    return "\n".join([*rows, "", ""])

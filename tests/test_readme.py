"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_places() -> list[tuple[str, str]]:
    """(file, name) of everything in "Follow one kick"."""
    section = README.partition("## Follow one kick")[2].partition("\n## ")[0]
    places = []
    for part in re.findall(r"`(hcd/[\w/.]+)`: ((?:`[\w.]+`(?:, )?)+)", section):
        places += [(part[0], name) for name in re.findall(r"`([\w.]+)`", part[1])]
    return places


def test_follow_one_kick_names_what_exists() -> None:
    """Each file has the class and the function that the README names in it."""
    places = named_places()
    assert len(places) >= 15
    for file, name in places:
        owner, _, function = name.rpartition(".")
        text = (ROOT / file).read_text(encoding="utf-8")
        if owner:
            assert re.search(rf"^(cdef )?class {owner}\b", text, re.MULTILINE), f"{file} has no class {owner}"
        assert re.search(rf"^ *(async )?(c|cp)?def .*\b{function}\(", text, re.MULTILINE), f"{file}: no {name}"


def test_make_targets_exist() -> None:
    """Every make target that the README names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

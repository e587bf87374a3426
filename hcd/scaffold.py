"""``hcd new-device NAME``: a package with a device type that works, to be changed into another one.

The templates are whole files; ``$name`` (the type), ``$module`` and ``$class_name`` are filled in. The device is an
entropy device that is none: every guest has a driver for it, and a guest that reads a text knows where it came from.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Template

from hcd import plugins
from hcd.errors import ConfigError

__all__ = ["files", "write"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", re.ASCII)
_MAX_NAME = 40

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "hcd-$name"
version = "0.1.0"
description = "Device type $name for hcd"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["hcd"]

[project.optional-dependencies]
test = ["pytest", "mypy", "ruff"]

[project.entry-points."hcd.devices"]
$name = "$module:$class_name"

[tool.setuptools]
package-dir = { "" = "src" }
packages = ["$module"]

[tool.setuptools.package-data]
$module = ["py.typed"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["src"]
filterwarnings = ["error"]

[tool.mypy]
strict = true
files = ["src", "tests"]

[tool.ruff]
line-length = 120

[tool.ruff.lint]
select = ["E", "F", "W", "I", "B", "UP", "RUF"]
"""

_DEVICE = '''\
"""Device type "$name" of hcd: hands out a text where a guest expects entropy."""

from collections.abc import Mapping
from typing import Any

from hcd.device import Device, Option, Virtqueue


class $class_name(Device):
    """Fills every request with the text, over and over. A guest reads it from /dev/hwrng."""

    virtio_id = 4  # entropy (virtio 1.3, 5.4): every guest has a driver for it
    vhost_user_type = "rng"
    description = "hands out a text where a guest expects entropy"
    operations = ("read",)
    options = (Option("text", "str", "what guests read", default="hello from $name\\n"),)

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        self.text: bytes = self.option["text"].encode() or b"\\n"

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            room = min(request.writable, 4096)
            request.write((self.text * (room // len(self.text) + 1))[:room])
            request.complete()
'''

_TESTS = '''\
"""The device type "$name", without a virtual machine."""

from hcd.testing import Exchange, check_device, serve

from $module import $class_name


def test_a_driver_reads_the_text_over_and_over() -> None:
    with serve($class_name, {"text": "abc"}) as served, served.driver() as driver:
        assert driver.ask(room=7) == b"abcabca"


def test_requests_are_counted() -> None:
    with serve($class_name) as served, served.driver() as driver:
        driver.ask(room=100)
        assert served.metrics().total("hcd_requests_total", op="read", status="ok") == 1


def test_the_device_keeps_the_contract() -> None:
    check_device($class_name, {"text": "abc"}, exchanges=[Exchange(room=7, answer=b"abcabca")])
'''

_README = """\
# hcd-$name

Device type `$name` for [hcd](https://pypi.org/project/hcd/): hands out a text where a guest expects entropy.

Install it for development, and run its tests, which need no virtual machine:

```sh
pip install -e '.[test]'
pytest && mypy && ruff check .
```

What hcd knows of it:

```sh
hcd devices --dump $name
```

In a virtual machine; `head -c 64 /dev/hwrng` in the guest shows the text:

```sh
hcd device $name -- qemu-system-x86_64 -m 256M \\
    -machine q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=256M,share=on \\
    -chardev socket,id=$name,path={socket} -device vhost-user-rng-pci,chardev=$name \\
    -drive file=guest.qcow2,if=virtio
```

QEMU has no front end for most devices. From 10.2 on `vhost-user-test-device-pci` is one for any; `hcd qemu-args`
says how it is told what the device is.

The device is `src/$module/__init__.py`; the contract that it keeps is hcd's `docs/devices.md`.
"""

_FILES = {
    "pyproject.toml": _PYPROJECT,
    "README.md": _README,
    ".gitignore": "__pycache__/\n*.egg-info/\nbuild/\ndist/\n.*_cache/\n",
    "src/$module/__init__.py": _DEVICE,
    "src/$module/py.typed": "",
    "tests/test_$module.py": _TESTS,
}


def files(name: str) -> dict[str, str]:
    """The files of the package for type ``name``: path and text. ConfigError for a name that cannot be one."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ConfigError(f'a device type is called something like "my-device" ({_MAX_NAME} characters), not "{name}"')
    words = {
        "name": name,
        "module": f"hcd_{name.replace('-', '_')}",
        "class_name": "".join(word.capitalize() for word in name.split("-")),
    }
    return {
        Template(path).substitute(words): Template(text).substitute(words) for path, text in _FILES.items()
    }


def write(name: str, parent: Path | str = ".") -> str:
    """Write the package into the directory hcd-``name`` of ``parent``; returns its path. ConfigError if that fails."""
    wanted = files(name)
    if name in plugins.names():
        raise ConfigError(f'a device type "{name}" is installed already')
    directory = os.path.join(parent, f"hcd-{name}") if str(parent) != "." else f"hcd-{name}"
    try:
        os.mkdir(directory)
        for path, text in wanted.items():
            file = Path(directory, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    return directory

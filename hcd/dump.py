"""``hcd devices --dump NAME``: what a script may want to know of a device type, one key=value a line.

Keys stay; new ones may come. Values stand as they are but for newlines and backslashes, which are "\\n" and "\\\\";
lists are separated by commas.
"""

from __future__ import annotations

from collections.abc import Iterator

from hcd import options as opt
from hcd import plugins
from hcd.device import API_VERSION, Device

__all__ = ["dump"]


def dump(name: str) -> Iterator[str]:
    """The lines for type ``name``. ConfigError when there is no such type, PluginError when it cannot be used."""
    for line in _lines(name):
        yield line.replace("\\", "\\\\").replace("\n", "\\n")


def _lines(name: str) -> Iterator[str]:
    cls = plugins.load(name)
    distribution, version = plugins.distribution(name)
    yield f"name={name}"
    yield f"description={cls.description}"
    yield f"distribution={distribution}"
    yield f"version={version}"
    yield f"class={cls.__module__}:{cls.__qualname__}"
    yield f"api_version={cls.api_version}"
    yield f"hcd_api_version={API_VERSION}"
    yield f"transport={cls.transport}"
    yield f"lane={'trio' if cls.is_async() else 'reactor'}"
    if issubclass(cls, Device):
        yield f"virtio_id={int(cls.virtio_id)}"
        yield f"vhost_user_type={cls.vhost_user_type}"
        yield f"max_queue_size={cls.max_queue_size}"
        yield f"in_order={'yes' if cls.in_order else 'no'}"
        yield f"operations={','.join(cls.operations)}"
    yield f"options={','.join(option.name for option in cls.options)}"
    for option in cls.options:
        yield f"option.{option.name}.kind={option.kind}"
        yield f"option.{option.name}.default={'' if option.default is None else _shown(option.default)}"
        yield f"option.{option.name}.expected={opt.describe(option)}"
        yield f"option.{option.name}.help={option.help}"
    yield f"metrics={','.join(metric.name for metric in cls.metrics)}"
    for metric in cls.metrics:
        yield f"metric.{metric.name}.kind={metric.kind}"
        yield f"metric.{metric.name}.labels={','.join(metric.labels)}"
        yield f"metric.{metric.name}.help={metric.help}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

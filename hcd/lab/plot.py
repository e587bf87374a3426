"""The distributions as a picture. matplotlib is an optional extra: ``pip install 'hcd[plot]'``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from hcd.errors import ConfigError
from hcd.lab.results import EXIT, RING, TRIP, Row

__all__ = ["draw", "need_matplotlib"]


def need_matplotlib() -> Any:
    """matplotlib's pyplot, drawing into files. ConfigError when it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("--plot needs matplotlib (pip install 'hcd[plot]')") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(rows: Sequence[Row], file: str, title: str) -> None:
    """Write quantiles of every row that has some, a panel for each measure. ConfigError when ``file`` is no good."""
    pyplot = need_matplotlib()
    measures = [m for m in (EXIT, RING, TRIP) if any(row.measure == m and row.quantiles for row in rows)]
    figure, panels = pyplot.subplots(1, max(1, len(measures)), figsize=(6 * max(1, len(measures)), 5), squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=False):
        for row in rows:
            if row.measure == measure and row.quantiles:
                times = [seconds * 1e6 for seconds in row.quantiles.values()]
                panel.plot(times, [float(q) for q in row.quantiles], marker=".", label=f"{row.path} {row.kind}")
        panel.set(xscale="log", xlabel="microseconds", ylabel="share of rings at or below", title=measure)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=9)
    try:
        figure.savefig(file, bbox_inches="tight")
    except (OSError, ValueError) as exc:  # ValueError: an unknown kind of picture
        raise ConfigError(f"cannot write {file}: {exc}") from exc
    finally:
        pyplot.close(figure)

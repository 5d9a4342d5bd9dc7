"""Plots of what `moe-serve place` found, as PNG files. Needs matplotlib (extra `study`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.errors import ConfigError
from moe_serve.study.place import Placed
from moe_serve.study.plots import DPI, PANEL_INCHES, figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(
    placed: Mapping[str, Placed], pareto: Sequence[Mapping[str, float]], folder: Path
) -> list[Path]:
    """Write the traffic matrices, and traffic against balance; return the files.

    Raises ConfigError where nothing can be written.
    """
    figures = {"traffic": _traffic(placed), "pareto": _pareto(placed, pareto)}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            written.append(path)
    except OSError as error:
        raise ConfigError(f"plots {folder}: cannot be written ({error.strerror})") from error
    return written


def _traffic(placed: Mapping[str, Placed]) -> Figure:
    width, height = PANEL_INCHES
    figure = figure_class()(figsize=(width * len(placed), height), layout="constrained")
    highest = max(float(one.judged["held out"].traffic.max()) for one in placed.values())
    for index, (name, one) in enumerate(placed.items(), 1):
        axes = figure.add_subplot(1, len(placed), index)
        image = axes.imshow(one.judged["held out"].traffic, vmin=0, vmax=highest)
        axes.set(title=f"{name}: rows a token", xlabel="rank of the expert", ylabel="home rank")
        figure.colorbar(image, ax=axes)
    return figure


def _pareto(placed: Mapping[str, Placed], pareto: Sequence[Mapping[str, float]]) -> Figure:
    figure = figure_class()(figsize=PANEL_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [point["imbalance"] for point in pareto],
        [point["ranks_per_token"] for point in pareto],
        marker=".",
        label="joint, by weight of balance",
    )
    for name, one in placed.items():
        judged = one.judged["held out"]
        axes.plot([judged.imbalance], [judged.ranks_per_token], "o", label=name)
    axes.set(title="held out", xlabel="imbalance, (max - mean) / mean", ylabel="ranks a token")
    axes.legend(fontsize="small")
    return figure

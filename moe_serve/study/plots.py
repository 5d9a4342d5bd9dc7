"""Plots of what `moe-serve simulate` found, as PNG files. Needs matplotlib (extra `study`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
DPI = 80
PANEL_INCHES = (4.6, 3.4)


def check_available() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    figure_class()


def figure_class() -> type[Figure]:
    """Return matplotlib's Figure. Raises ConfigError where it is not installed."""
    try:
        from matplotlib.figure import Figure  # an optional library
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed; install the extra: "
            "pip install 'moe-serve[study]'"
        ) from error
    return Figure


def write_plots(result: Mapping[str, Any], trace: Trace, folder: Path) -> list[Path]:
    """Write a plot for each kind of figure in `result`; return the files.

    misses: against slots, with both Beladys; clock: time of a token; guesses: recall, precision and
    cover against distance; experts: how often each was used. Raises ConfigError where nothing can
    be written.
    """
    rows = result["rows"]
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(rows, result.get("predictions", ()), trace):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            written.append(path)
    except OSError as error:
        raise ConfigError(f"plots {folder}: cannot be written ({error.strerror})") from error
    return written


def _figures(
    rows: Sequence[Row], predictions: Sequence[Row], trace: Trace
) -> Iterator[tuple[str, Figure]]:
    for scope in dict.fromkeys(row["scope"] for row in rows):
        chosen = [row for row in rows if row["scope"] == scope]
        plain = [row for row in chosen if row["predictor"] is None]
        suffix = "" if scope == "layer" else f"-{scope}"
        yield f"misses{suffix}", _by_batch(plain, _draw_misses)
        timed = [row for row in chosen if row["ms_per_token"] is not None]
        if timed:
            yield f"clock{suffix}", _by_batch(timed, _draw_times)
    if predictions:
        yield "guesses", _guesses(predictions)
    yield "experts", _heat_map(trace)


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    width, height = PANEL_INCHES
    figure = figure_class()(figsize=(width * count, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(1, count)))


def _by_batch(rows: Sequence[Row], draw: Callable[[Axes, Sequence[Row]], None]) -> Figure:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = _panels(len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        draw(axes, [row for row in rows if row["batch"] == batch])
        axes.set_title("as recorded" if batch is None else f"batch {batch}")
        axes.set_xlabel("slots a layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _draw_misses(axes: Axes, rows: Sequence[Row]) -> None:
    first = rows[0]["policy"]
    bound = sorted((row["slots"], row["belady"]) for row in rows if row["policy"] == first)
    forced = sorted((row["slots"], row["belady_forced"]) for row in rows if row["policy"] == first)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        if policy != "belady":  # it is the line of the forced bound
            points = sorted((row["slots"], row["miss"]) for row in rows if row["policy"] == policy)
            axes.plot(*zip(*points, strict=True), marker=".", label=policy)
    axes.plot(*zip(*forced, strict=True), "k--", label="Belady, forced admission")
    axes.plot(*zip(*bound, strict=True), "k-", label="Belady")
    axes.set_ylabel("misses / (tokens x top_k x layers)")


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    for pair in dict.fromkeys((row["policy"], row["predictor"]) for row in rows):
        chosen = [row for row in rows if (row["policy"], row["predictor"]) == pair]
        points = sorted((row["slots"], row["ms_per_token"]) for row in chosen)
        style = "--" if pair[1] is None else "-"
        label = f"{pair[0]}, {pair[1] or 'no guesses'}"
        axes.plot(*zip(*points, strict=True), style, marker=".", label=label)
    axes.set_ylabel("ms a token, virtual clock")


def _guesses(rows: Sequence[Row]) -> Figure:
    """Draw one batch and one number of slots: the first; of ranges of tokens, the last."""
    same = {name: rows[0][name] for name in ("batch", "slots")}
    same["first_token"] = rows[-1]["first_token"]
    chosen = [row for row in rows if all(row[name] == value for name, value in same.items())]
    figure, panels = _panels(3)
    for axes, name in zip(panels, ("recall", "precision", "cover"), strict=True):
        # a predictor that issued nothing has no precision, and the others keep their colours
        for index, predictor in enumerate(dict.fromkeys(row["predictor"] for row in chosen)):
            points = [
                (row["distance"], row[name])
                for row in chosen
                if row["predictor"] == predictor and row[name] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), f"C{index}.-", label=predictor)
        axes.set_title(f"{name}, batch {rows[0]['batch']}, {rows[0]['slots']} slots")
        axes.set_xlabel("layers ahead (0: before the first)")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small")
    return figure


def _heat_map(trace: Trace) -> Figure:
    """Draw how often each expert of each layer was used, over the mean of a layer."""
    counts = np.stack(
        [
            np.bincount(trace.ids[:, layer].ravel(), minlength=trace.num_experts)
            for layer in range(trace.num_layers)
        ]
    )
    share = counts / max(1.0, counts.mean())  # [num_layers, num_experts]
    figure, (axes,) = _panels(1)
    image = axes.imshow(share, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_title(f"uses of each expert / mean, {trace.name}")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    figure.colorbar(image)
    return figure

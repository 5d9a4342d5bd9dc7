"""Figures as rows of results, as tables, and beside the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.kernels.step import StepFigure
from benchmarks.kernels.timing import Figure
from benchmarks.results import Row

GOAL = 0.85  # of read bandwidth, of oneDNN's rate, of a step's active bytes over bandwidth
GOAL_OUTSIDE = 0.10  # of a step at one request
FEW_ROWS, MANY_ROWS = 8, 256

_COLUMNS = "{:<32} {:>10} {:>9} {:>8} {:>9} {:>9}  {:<20} {:>6} {:>8} {:>8}"


def kernel_rows(figure: Figure) -> list[Row]:
    """Return a case's figure, the same without its call, and torch's.

    The ratio of the first two is to the limit, torch's is ours over it.
    """
    name = f"{figure.table}: {figure.name}"
    limit = statistics.median(figure.limit_rates)
    rows = [
        Row.of(
            f"{name}, over {figure.limit_name}",
            figure.rates,
            figure.unit,
            limit=limit,
            ratio=figure.ratio,
        )
    ]
    without_call = figure.rates_without_call
    if without_call is not None:
        name_without = f"{name}, without the call, over {figure.limit_name}"
        ratio = figure.ratio_without_call
        rows.append(Row.of(name_without, without_call, figure.unit, limit=limit, ratio=ratio))
    if figure.torch_seconds is not None:
        name_torch = f"{name}, torch; ours over torch's"
        rates = figure.rates_of(figure.torch_seconds)
        rows.append(Row.of(name_torch, rates, figure.unit, limit=limit, ratio=figure.torch_ratio))
    return rows


def step_rows(figure: StepFigure) -> list[Row]:
    """Return the time of a decode step over its limit, and the share of it outside kernels."""
    name = f"decode step, {figure.num_requests} requests"
    rows = [
        Row.of(
            f"{name}, active bytes / read over it",
            [1e3 * seconds for seconds in figure.seconds],
            "ms",
            limit=1e3 * statistics.median(figure.limit_seconds),
            ratio=figure.ratio,
        )
    ]
    if figure.outside:
        shares = [100 * share for share in figure.outside]
        rows.append(Row.of(f"{name}, outside kernels", shares, "%"))
    return rows


def table_header(table: str) -> str:
    """Return a table's title and the names of its columns."""
    names = ("us", "us/row", "GB/s", "GFLOP/s", "limit", "", "ratio", "no call", "/ torch")
    return "\n" + _COLUMNS.format(table, *names)


def table_line(figure: Figure) -> str:
    """Return a case as one line: medians. "no call" is the ratio without an empty call's time."""
    seconds = statistics.median(figure.seconds)
    limit = statistics.median(figure.limit_rates)
    return _COLUMNS.format(
        figure.name,
        f"{1e6 * seconds:.1f}",
        f"{1e6 * seconds / figure.num_rows:.2f}",
        f"{figure.num_bytes / seconds / 1e9:.1f}",
        f"{figure.flop / seconds / 1e9:.1f}" if figure.flop else "",
        f"{limit:.1f}",
        f"{figure.unit} {figure.limit_name}",
        f"{figure.ratio:.2f}",
        _ratio(figure.ratio_without_call),
        _ratio(figure.torch_ratio),
    ).rstrip()


def step_line(figure: StepFigure) -> str:
    """Return a step's time, its limit and where the time went."""
    parts = [
        f"{figure.num_requests:>3} requests: {1e3 * statistics.median(figure.seconds):.2f} ms",
        f"limit {1e3 * statistics.median(figure.limit_seconds):.2f} ms (read)",
        f"ratio {figure.ratio:.2f}",
    ]
    if figure.outside:
        parts.append(f"outside kernels {100 * statistics.median(figure.outside):.1f} %")
    spent = sorted(figure.native_seconds.items(), key=lambda item: -item[1])
    parts += [f"{name} {1e3 * seconds:.3f} ms" for name, seconds in spent]
    return ", ".join(parts)


def goal_lines(figures: Sequence[Figure], steps: Sequence[StepFigure]) -> Iterator[str]:
    """Yield a line for each goal that this run has figures for."""
    for table in ("linear", "moe"):
        mine = [figure for figure in figures if figure.table == table]
        few = [figure for figure in mine if figure.num_rows <= FEW_ROWS]
        many = [figure for figure in mine if figure.num_rows >= MANY_ROWS]
        if few:
            yield _goal(f"{table}, 1 to {FEW_ROWS} rows, of read bandwidth", few)
        if many:
            yield _goal(f"{table}, {MANY_ROWS} rows and more, of torch.mm in bf16", many)
    for step in steps:
        if step.num_requests != 1:
            continue
        met = _met(step.ratio >= GOAL)
        yield f"{met}  decode step at one request: {_percent(step.ratio)} of its limit, goal 85 %"
        if step.outside:
            share = statistics.median(step.outside)
            met = _met(share < GOAL_OUTSIDE)
            yield f"{met}  decode step at one request: {_percent(share)} outside kernels, goal 10 %"


def _goal(what: str, figures: Sequence[Figure]) -> str:
    """Return the least and the median share of the limit, as called and without the call."""
    least = min(figures, key=lambda figure: figure.ratio)
    middle = statistics.median(figure.ratio for figure in figures)
    line = (
        f"{_met(least.ratio >= GOAL)}  {what}: least {_percent(least.ratio)} "
        f"({least.name}), median {_percent(middle)}, goal {_percent(GOAL)}"
    )
    without = [figure.ratio_without_call for figure in figures]
    net = [ratio for ratio in without if ratio is not None]
    if len(net) == len(figures):
        line += (
            f"; without the call: least {_percent(min(net))}, "
            f"median {_percent(statistics.median(net))}"
        )
    return line


def _met(is_met: bool) -> str:
    return "met    " if is_met else "NOT MET"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

"""The results of `moe-serve simulate` as tables for people; the JSON has the same and more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def tables(result: Mapping[str, Any]) -> str:
    """Return all that `simulate` gave: misses, the virtual clock, guesses, and their costs."""
    rows = result["rows"]
    parts = [f"trace {result['trace']}", _misses([row for row in rows if not row["predictor"]])]
    timed = [row for row in rows if row["ms_per_token"] is not None]
    if timed:
        parts.append(_clock(timed))
    if result.get("predictions"):
        parts.append(_predictions(result["predictions"]))
    parts.append(_costs(rows, result.get("predictions", ())))
    return "\n\n".join(parts)


def _misses(rows: Iterable[Row]) -> str:
    return table(
        "misses: blocks moved / (tokens x top_k x layers); r: an event's union over the slots; "
        "row belady: forced",
        (
            "policy", "scope", "slots", "batch", "split", "miss", "belady", "forced", "gap closed",
            "r", "r > 1", "MB/token",
        ),
        (
            (
                row["policy"], row["scope"], _int(row["slots"]), _batch(row), row["split"],
                f"{row['miss']:.3f}", f"{row['belady']:.3f}", f"{row['belady_forced']:.3f}",
                _share(row["gap_closed"]), f"{row['union_over_slots']:.2f}",
                _share(row["over_slots_share"]), f"{row['bytes_per_token'] / 1e6:.1f}",
            )
            for row in rows
        ),
    )  # fmt: skip


def _clock(rows: Iterable[Row]) -> str:
    return table(
        "virtual clock: counts are per 1,000 tokens",
        (
            "policy", "predictor", "scope", "slots", "batch", "split", "ms/token", "stall", "miss",
            "issued", "useful", "late", "wasted", "MB/token",
        ),
        (
            (
                row["policy"], row["predictor"] or "none", row["scope"], _int(row["slots"]),
                _batch(row), row["split"], f"{row['ms_per_token']:.2f}",
                f"{row['stall_ms_per_token']:.2f}", f"{row['miss']:.3f}",
                *(_per_thousand(row, name) for name in ("issued", "useful", "late", "wasted")),
                f"{row['bytes_per_token'] / 1e6:.1f}",
            )
            for row in rows
        ),
    )  # fmt: skip


def _predictions(rows: Sequence[Row]) -> str:
    return table(
        "guesses: recall of the experts used; issued: of those not resident, above the threshold",
        (
            "predictor", "slots", "batch", "split", "tokens", "ahead", "recall@k", "recall@2k",
            "issued", "precision", "cover",
        ),
        (
            (
                row["predictor"], _int(row["slots"]), _batch(row), row["split"],
                f"{row['first_token']}-{row['last_token'] or 'end'}",
                _int(row["distance"]) if row["distance"] else "start",
                f"{row['recall']:.3f}", f"{row['recall_twice']:.3f}", _int(row["issued"]),
                "-" if row["precision"] is None else f"{row['precision']:.3f}",
                f"{row['cover']:.3f}",
            )
            for row in rows
        ),
    )  # fmt: skip


def _costs(rows: Sequence[Row], predictions: Sequence[Row]) -> str:
    """Return the time and memory of each policy and predictor, by batch size."""
    lines: dict[tuple[Any, ...], list[tuple[float, int, int]]] = {}
    for row in rows:
        if row["predictor"] is None:
            cost = (row["us_per_event"], row["held_bytes"], row["state_bytes"])
            lines.setdefault(("policy", row["policy"], _batch(row)), []).append(cost)
    for row in predictions:
        time_us = row["observe_us"] + row["predict_us"]
        cost = (time_us, row["held_bytes"], row["state_bytes"])
        lines.setdefault(("predictor", row["predictor"], _batch(row)), []).append(cost)
    return table(
        "costs: of a policy with the cache, mean; of a predictor, one look and one guess, medians",
        ("kind", "name", "batch", "us/event", "holds kB", "saves kB"),
        (
            (
                *key,
                f"{sum(cost[0] for cost in costs) / len(costs):.1f}",
                f"{max(cost[1] for cost in costs) / 1e3:.1f}",
                f"{max(cost[2] for cost in costs) / 1e3:.1f}",
            )
            for key, costs in lines.items()
        ),
    )


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines as wide as their widest cells; the first column and words lie to the left."""
    cells = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [_is_number(column) for column in zip(*cells[1:], strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([title, *lines])


def _is_number(column: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell.startswith("-") or cell == "rec." for cell in column)


def _int(value: int) -> str:
    return str(value)


def _batch(row: Row) -> str:
    return str(row["batch"] or "rec.")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _per_thousand(row: Row, name: str) -> str:
    tokens = row["num_tokens"]
    return f"{1000 * row[name] / tokens:.0f}"

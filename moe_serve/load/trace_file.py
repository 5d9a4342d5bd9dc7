"""Arrivals and lengths of real requests: a CSV with the columns of Azure's LLM inference trace.

TIMESTAMP (2023-11-16 18:17:03.9799600, digits of the second as many as there are), ContextTokens
and GeneratedTokens; other columns are passed over. Times count from the first row.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_serve.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MAX_TOKENS = 10**7


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request: when it came, after the first, and its lengths in tokens."""

    offset_s: float
    input_len: int
    output_len: int


def read_trace_file(path: Path, limit: int | None = None) -> list[TraceRow]:
    """Return the first `limit` rows. Raises ConfigError that names line and column."""
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            places = _places(path, next(reader, []))
            start_s: float | None = None
            last_s = 0.0
            for cells in reader:
                if limit is not None and len(rows) == limit:
                    break
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                time_s = _time_s(_cell(cells, places, 0, where), where)
                start_s = time_s if start_s is None else start_s
                offset_s = time_s - start_s
                if offset_s < last_s:
                    raise ConfigError(
                        f"{where}: TIMESTAMP is {last_s - offset_s:.6g} s before that of the line "
                        "above; sort the file by time"
                    )
                last_s = offset_s
                rows.append(
                    TraceRow(
                        offset_s,
                        _count(_cell(cells, places, 1, where), COLUMNS[1], where),
                        _count(_cell(cells, places, 2, where), COLUMNS[2], where),
                    )
                )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start} of a block") from error
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: has no rows below its header")
    return rows


def _places(path: Path, header: Sequence[str]) -> list[int]:
    names = [name.strip() for name in header]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(
            f"{path}:1: has no column {' nor '.join(missing)}; it needs {', '.join(COLUMNS)}"
        )
    return [names.index(name) for name in COLUMNS]


def _cell(cells: Sequence[str], places: Sequence[int], which: int, where: str) -> str:
    if places[which] >= len(cells):
        raise ConfigError(f"{where}: column {COLUMNS[which]} is missing: it has {len(cells)} cells")
    return cells[places[which]].strip()


def _time_s(text: str, where: str) -> float:
    whole, _, fraction = text.partition(".")
    try:
        if fraction and not (fraction.isascii() and fraction.isdigit()):
            raise ValueError
        moment = datetime.datetime.strptime(whole, "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise ConfigError(
            f"{where}: TIMESTAMP is {text!r:.60}; write 2023-11-16 18:17:03.9799600"
        ) from None
    since = moment - datetime.datetime(2000, 1, 1)
    return since.total_seconds() + float(f"0.{fraction or 0}")


def _count(text: str, column: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= _MAX_TOKENS):
        raise ConfigError(
            f"{where}: {column} is {text!r:.60}; it must be a whole number up to {_MAX_TOKENS}"
        )
    return int(text)

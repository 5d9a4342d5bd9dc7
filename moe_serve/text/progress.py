"""A progress bar on stderr, and none where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """Counts what is done."""

    def advance(self, num_tokens: int) -> None:
        """Count one more request, which gave `num_tokens`."""


class _Silent:
    def advance(self, num_tokens: int) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(
    num_requests: int | None, *, num_done: int = 0, is_shown: bool | None = None
) -> Iterator[ProgressBar]:
    """Give a bar for `num_requests` (None: how many is not known), of which some are done.

    is_shown: None means when stderr is a terminal.
    """
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        yield _Silent()
        return
    with _RichBar(num_requests, num_done) as bar:
        yield bar


class _RichBar:
    def __init__(self, num_requests: int | None, num_done: int) -> None:
        from rich.console import Console  # a tenth of a second, and only a terminal needs it
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[num_tokens]} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._num_tokens = 0
        self._task = self._progress.add_task(
            "", total=num_requests, completed=num_done, num_tokens=0
        )

    def __enter__(self) -> _RichBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._progress.update(self._task, advance=1, num_tokens=self._num_tokens)

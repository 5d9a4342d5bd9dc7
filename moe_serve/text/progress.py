"""A progress bar on stderr, and none where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
    """Give a bar for `num_requests`, of which some are done; None: how many is not known.

    is_shown: None means when stderr is a terminal.
    """
    if not _is_wanted(is_shown):
        yield _Silent()
        return
    with _RichBar(num_requests, num_done) as bar:
        yield bar


@contextmanager
def loading_bar(is_shown: bool | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """Give what is to be called with (bytes read, bytes in all), or None where nobody looks.

    On a terminal the bar is gone when all is read. is_shown: None means when stderr is a terminal.
    """
    if not _is_wanted(is_shown):
        yield None
        return
    from rich.console import Console  # a tenth of a second, and only a terminal needs it
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("", total=None, visible=False)

        def show(num_done: int, num_bytes: int) -> None:
            progress.update(task, completed=num_done, total=num_bytes, visible=True)

        yield show


def _is_wanted(is_shown: bool | None) -> bool:
    if is_shown is None:
        return sys.stderr is not None and sys.stderr.isatty()  # None: it was closed at the start
    return is_shown


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

"""Ctrl-C that waits for the end of what must not be cut in two."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class HeldInterrupt:
    """Hold SIGINT back inside a `with`, and raise KeyboardInterrupt at its end; a second one
    raises at once.

    Does nothing in other threads, where no signal arrives, nor where the handler of SIGINT is not
    Python's own. One inside another leaves the signal to the outer one.
    """

    def __init__(self) -> None:
        self._is_holding = False
        self._is_pending = False

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._is_holding = True
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_holding:
            self._is_holding = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._is_pending:
                raise KeyboardInterrupt

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._is_pending:
            raise KeyboardInterrupt
        self._is_pending = True

"""What can go wrong, as the caller sees it.

    MoeServeError
    +-- ConfigError(ValueError)     an option or a flag that cannot be; exit code 2
    +-- RequestError(ValueError)    a request that cannot be served as it stands; exit code 2
    |   +-- CapacityError           it, or the model, asks for more than there is; exit code 2
    +-- CheckpointError             a model folder that is missing, broken or unknown; exit code 3
    +-- TraceError                  a file of routing, or of what was learned from it; exit code 3
    +-- StoreError                  expert records that cannot be read or written; exit code 3
    +-- CommError                   ranks, or a server, that disagree or do not answer; exit code 3

Every message names the value seen, the limit, and the way out. Our own mistakes are assertions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real


class MoeServeError(Exception):
    """The root of all errors that a caller may want to catch."""

    exit_code = 1


class ConfigError(MoeServeError, ValueError):
    """An option that does not exist, or a value that it cannot have."""

    exit_code = 2


class RequestError(MoeServeError, ValueError):
    """A request that cannot be served as it stands."""

    exit_code = 2


class CapacityError(RequestError):
    """More was asked for than this engine can ever hold."""


class CheckpointError(MoeServeError):
    """A model folder that is missing, incomplete, inconsistent or of an unknown kind."""

    exit_code = 3


class TraceError(MoeServeError):
    """A trace, a usage profile or a predictor's file that is broken, or of another model."""

    exit_code = 3


class StoreError(MoeServeError):
    """Expert records that cannot be written, read, or trusted."""

    exit_code = 3


class CommError(MoeServeError):
    """Ranks that disagree, or one, or a server, that does not answer."""

    exit_code = 3


# What a step can fail of that is its own and its machine's: its requests end, and the next step is
# run. What is not among these is a mistake of ours, after which no books are trusted.
STEP_FAULTS = (RuntimeError, MemoryError, ArithmeticError, ValueError, MoeServeError)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Return a value as an error shows it, short."""
    try:
        # NumPy's numbers as plain ones: their repr names the type
        text = str(value) if isinstance(value, Real) else repr(value)
    except ValueError:  # Python writes no integer of more than some thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."

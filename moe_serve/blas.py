"""How many threads numpy's products take: one, while a step runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give numpy's products one thread within a block, whoever loaded numpy first.

    A step multiplies small matrices of statistics between the kernels: with two threads it took 1.8
    times as long, as each product then waits for cores that the kernels and the disk have.
    """
    before = [blas.get() for blas in _blas()]
    for blas in _blas():
        blas.set(1)
    try:
        yield
    finally:
        for blas, count in zip(_blas(), before, strict=True):
            blas.set(count)


class _Blas(NamedTuple):
    """A library's functions for its number of threads."""

    get: Callable[[], int]
    set: Callable[[int], None]


@functools.cache
def _blas() -> list[_Blas]:
    """Find the OpenBLAS that numpy has loaded; none where it uses another, or hides its files."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line}
    found = []
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            for prefix, suffix in itertools.product(("scipy_openblas", "openblas"), ("64_", "")):
                get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    found.append(_Blas(get, put))
    return found

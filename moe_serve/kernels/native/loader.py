"""The native kernels: find the library that the installation built, choose an instruction set.

The library has a C ABI and is called by ctypes. It must be loaded after torch, whose OpenMP it
uses: one pool of threads, not two. Knows nothing of what the functions do.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # brings the OpenMP that the library uses

from moe_serve.errors import ConfigError

# what `ms_abi` must answer: raised with every change of a function's arguments, of a packed form,
# or of any bit of a result
ABI = 3
ISAS = ("avx512_bf16", "plain")  # best first

_TYPES: dict[str, Any] = {
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "p": ctypes.c_void_p,
    "": None,
}


class NotBuilt(Exception):
    """There is no native library that can be used; the text says why and what to do."""


class Native:
    """The kernels of one instruction set."""

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._library = library

    def function(self, name: str, codes: str, result: str = "") -> Callable[..., Any]:
        """Return the C function ms_<name>_<isa>.

        codes: a letter for each argument, result: one or none: i int32, l int64, f float, d double,
        p pointer (an int, or None for null). It runs without the interpreter's lock.
        """
        return self._typed(f"ms_{name}_{self.isa}", codes, result)

    def machine_function(self, name: str, codes: str, result: str = "") -> Callable[..., Any]:
        """Return ms_<name>, which is the same for every instruction set."""
        return self._typed(f"ms_{name}", codes, result)

    def _typed(self, symbol: str, codes: str, result: str) -> Callable[..., Any]:
        try:
            function = self._library[symbol]
        except AttributeError as error:
            raise NotBuilt(f"the native library has no {symbol}; install again") from error
        function.argtypes = [_TYPES[code] for code in codes]
        function.restype = _TYPES[result]
        return function


def built_path() -> Path | None:
    """Return the library of this installation, or None."""
    folder = Path(__file__).parent.parent
    paths = (folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def open_library(path: Path | None = None) -> ctypes.CDLL:
    """Load the library at `path`, or else this installation's. Raises NotBuilt."""
    if path is None:
        path = built_path()
        if path is None:
            raise NotBuilt(
                "the native library is not built; install a C++ compiler (g++) and install again"
            )
        if _is_stale(path):
            raise NotBuilt(f"{path.name} is older than its sources; install again (make install)")
    if not _is_whole(path):
        raise NotBuilt(f"{path.name} is cut off; install again")
    try:
        library = ctypes.CDLL(str(path))
        abi = library.ms_abi()
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"{path.name} cannot be loaded ({error}); install again") from error
    if abi != ABI:
        raise NotBuilt(f"{path.name} is of another version ({abi}, not {ABI}); install again")
    return library


def _is_stale(path: Path) -> bool:
    """Tell whether a source that lies here is newer: in a checkout, as a wheel has none."""
    built_ns = path.stat().st_mtime_ns
    sources = (p for pattern in ("*.cpp", "*.h") for p in Path(__file__).parent.glob(pattern))
    return any(source.stat().st_mtime_ns > built_ns for source in sources)


def _is_whole(path: Path) -> bool:
    """Tell whether an ELF file goes on to the end of its section table, which comes last.

    The loader maps what the file says it holds; what is not there would end the process. Other
    kinds of file are the loader's to refuse.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return True
    offset, size, count = struct.unpack_from("<40xQ10xHH", header)
    return bool(path.stat().st_size >= offset + size * count)


def supported_isas(library: ctypes.CDLL) -> tuple[str, ...]:
    """List the instruction sets that library and processor both have, the best first."""
    try:
        return tuple(isa for isa in ISAS if isa == "plain" or library[f"ms_has_{isa}"]())
    except AttributeError as error:
        raise NotBuilt(f"the native library is another one ({error}); install again") from error


def load(isa: str = "auto", path: Path | None = None) -> Native:
    """Return the kernels of `isa`, or of the best one here.

    Raises NotBuilt without a library, ConfigError for an instruction set that is not to be had.
    """
    library = open_library(path)
    supported = supported_isas(library)
    if isa == "auto":
        return Native(library, supported[0])
    if isa not in supported:
        known = "this processor" if isa in ISAS else "moe-serve"
        raise ConfigError(f"isa is {isa!r}; {known} has: auto, {', '.join(supported)}")
    return Native(library, isa)

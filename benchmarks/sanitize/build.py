"""The native library with AddressSanitizer and UndefinedBehaviorSanitizer in it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MASKED_ACCESS = Path(__file__).parent / "masked_access.h"

# optimised little, so that a report's lines are those of the source
_FLAGS = (
    "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
)  # fmt: skip
# what touches memory and is not instrumented, unless masked_access.h names it
_INTRINSIC = re.compile(r"_mm\d*_(?:maskz?_\w*(?:load|store)|stream|i32gather|i32scatter)\w*")


def build(folder: Path, compiler: str) -> Path:
    """Compile the library of this tree into `folder` and return its path.

    Raises ValueError for an intrinsic that the sanitizer would not see, CalledProcessError when
    the compiler fails.
    """
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (extension,) = tool["setuptools"]["ext-modules"]
    check_intrinsics([ROOT / name for name in extension["sources"] + extension["depends"]])
    flags = [flag for flag in extension["extra-compile-args"] if flag not in ("-O3", "-g0")]

    def compile_one(name: str) -> str:
        target = str(folder / f"{Path(name).stem}.o")
        own = [*_FLAGS, "-include", str(MASKED_ACCESS)]
        command = [compiler, *flags, *own, "-c", str(ROOT / name), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, extension["sources"]))
    library = folder / "_cpu.so"
    # as in pyproject.toml, OpenMP is torch's
    link = [compiler, "-shared", "-fsanitize=address,undefined", "-o", str(library), *objects]
    subprocess.run(link, check=True)
    return library


def check_intrinsics(sources: list[Path]) -> None:
    """Raise ValueError for an intrinsic whose addresses nothing would check."""
    known = MASKED_ACCESS.read_text()
    for path in sources:
        for name in _INTRINSIC.findall(path.read_text()):
            if f"#define {name}(" not in known:
                raise ValueError(
                    f"{path.name} uses {name}, into which no sanitizer looks; "
                    f"check its addresses in {MASKED_ACCESS.name}"
                )


def environment(compiler: str) -> dict[str, str]:
    """Return the variables of a process that loads the library: Python itself is not sanitized."""

    def runtime(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # bytes of 255 are NaN in every dtype: what a kernel leaves unwritten shows in its result
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

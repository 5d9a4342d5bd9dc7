"""Everything that is measured on a GPU, in parts that each take less than ten minutes.

    PYTHONPATH=. python3 -m benchmarks.gpu [PART...] [--trace FILE.npz ...] [--save]

Needs torch, triton, numpy, safetensors and msgspec, and nothing installed: see docs/gpu.md. With
DRY=1 (or --dry) every step of every part is walked on a CPU, at tiny shapes, in Triton's
interpreter: its figures say nothing, and none is kept. Each part runs in a process of its own, so
that one that fails takes no other down; COMMIT names the commit where the tree has no .git.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.figures import Figure, told
from benchmarks.gpu.outcome import PARTS, Outcome, summary

_GRACE_S = 60.0
_NEEDED = ("torch", "numpy", "safetensors", "msgspec")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what cannot be ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}")
    dry = os.environ.get("DRY", "")
    if dry not in ("", "0", "1"):
        parser.error(f"DRY is {dry!r}; it must be 1, 0 or empty")
    parser.add_argument(
        "--dry", action="store_true", default=dry == "1", help="on a CPU, at tiny shapes"
    )
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], help="recorded routing; may be repeated"
    )
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="of each part at most (%(default)s)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for packed experts; default: temporary"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="of a part, what has it in its name, in letters of any case; ceilings and peers have "
        "all they have",
    )
    parser.add_argument("--save", action="store_true", help="keep the figures")
    parser.add_argument("--folder", type=Path, help="where; default: benchmarks/results")
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)  # of one part, as JSON
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts or list(PARTS)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; there are: {', '.join(PARTS)}")
    if not arguments.seconds > 0:
        parser.error(f"--seconds is {arguments.seconds}; it must be above 0")
    if arguments.dry and arguments.save:
        parser.error("a dry run measures nothing that could be kept; leave out --save")
    if arguments.folder is not None and not arguments.save:
        parser.error("--folder says where figures are kept, with --save; give that, too")
    for trace in arguments.trace:
        if not trace.is_file():
            parser.error(f"--trace {trace}: there is no such file")
    return arguments


def why_not(is_dry: bool) -> str | None:
    """Return what is missing here for anything to run, or None."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} has no {', '.join(missing)}; install them, or name a Python that "
            "has them (PYTHON=... with make)"
        )
    # torch is first imported here: it may be what is missing
    from benchmarks.gpu.setting import kernels_here

    try:
        kernels_here(is_dry)
    except RuntimeError as error:
        return str(error)
    return None


def run_here(part: str, arguments: argparse.Namespace) -> Outcome:
    """Run a part in this process, and print its figures as they come."""
    outcome = Outcome(part=part, is_dry=arguments.dry)
    start_s = time.perf_counter()
    print(f"\n== {part}", flush=True)
    try:
        _measure(part, arguments, outcome, start_s + arguments.seconds)
    except Exception as error:
        traceback.print_exc()
        outcome.error = told(error)
    outcome.seconds = time.perf_counter() - start_s
    gc.collect()
    return outcome


def _measure(part: str, arguments: argparse.Namespace, outcome: Outcome, latest_s: float) -> None:
    import torch  # see why_not

    from benchmarks.gpu.setting import card_slug, describe, find_setting

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.scratch or Path(scratch)
        setting = find_setting(
            arguments.dry, tuple(arguments.trace), folder, arguments.seconds, arguments.only
        )
        figures = importlib.import_module(PARTS[part]).run(setting)
        try:
            for found in figures:
                if isinstance(found, Figure):
                    print(found.line(arguments.dry), flush=True)
                outcome.add(found)
                if time.perf_counter() > latest_s:
                    outcome.error = f"stopped after {arguments.seconds:g} s; the rest is missing"
                    break
        finally:
            figures.close()
            outcome.is_spared = not setting.has_wanted
            outcome.kernels = setting.kernels
            outcome.environment = describe(setting.device)
            outcome.card = card_slug(setting.device)


def run_apart(part: str, argv: Sequence[str], seconds: float) -> Outcome:
    """Run a part in a process of its own; one that dies, or does not end, is an outcome too."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "outcome.json"
        command = [sys.executable, "-m", "benchmarks.gpu", part, *argv, "--outcome", str(path)]
        start_s = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=seconds + _GRACE_S, check=False).returncode
            error = f"its process ended with status {code}"
        except subprocess.TimeoutExpired:
            error = f"its process did not end within {seconds + _GRACE_S:g} s"
        if path.is_file():
            return Outcome.read(json.loads(path.read_text()))
        return Outcome(part=part, error=error, seconds=time.perf_counter() - start_s)


def options_of(arguments: argparse.Namespace) -> list[str]:
    """Return the options that a process of one part is given."""
    options = ["--seconds", str(arguments.seconds)]
    for trace in arguments.trace:
        options += ["--trace", str(trace)]
    if arguments.only:
        options += ["--only", arguments.only]
    if arguments.scratch is not None:
        options += ["--scratch", str(arguments.scratch)]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; the status is 1 where one of them failed."""
    arguments = parse_arguments(argv)
    if arguments.outcome is not None:
        (part,) = arguments.parts
        outcome = run_here(part, arguments)
        arguments.outcome.write_text(json.dumps(outcome.document()))
        return 0
    if (lack := why_not(arguments.dry)) is not None:
        print(lack, file=sys.stderr)
        return 2
    outcomes = []
    for part in arguments.parts:
        if arguments.dry or len(arguments.parts) == 1:
            outcome = run_here(part, arguments)
        else:
            outcome = run_apart(part, options_of(arguments), arguments.seconds)
        outcomes.append(outcome)
        if arguments.save and outcome.figures:
            print(f"written: {outcome.save(arguments)}", flush=True)
    print(summary(outcomes))
    if all(outcome.is_spared for outcome in outcomes):
        print(f"nothing has {arguments.only!r} in its name; without --only all names are printed")
        return 1
    return int(any(outcome.errors for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

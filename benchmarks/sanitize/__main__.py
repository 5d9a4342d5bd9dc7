"""Hypothesis: no kernel, whatever its shapes, touches memory that is not its own.

python -m benchmarks.sanitize --seconds 600

Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer, shows that calls
which are wrong on purpose are reported, then calls every kernel with random shapes until the time
is up. Exit code 0: nothing was reported. Needs g++ with its sanitizers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.sanitize.build import ROOT, build, environment
from benchmarks.sanitize.wrong_calls import WRONG_CALLS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of random shapes")
    parser.add_argument("--seed", type=int, default=0, help="of the shapes")
    parser.add_argument("--compiler", default="g++")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name), options.compiler)
        variables = environment(options.compiler)

        def command(module: str, *arguments: str) -> list[str]:
            return [sys.executable, "-m", f"benchmarks.sanitize.{module}", str(library), *arguments]

        for call in WRONG_CALLS:
            done = subprocess.run(
                command("wrong_calls", call),
                cwd=ROOT,
                env=variables,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0 or "ERROR: AddressSanitizer" not in done.stderr:
                print(f"{call}: no report, so this check is worth nothing\n{done.stderr}")
                return 1
            print(f"{call}: reported, as it must be", flush=True)
        random_calls = command("random_calls", str(options.seconds), str(options.seed))
        return subprocess.run(random_calls, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())

"""The one form in which figures are kept: benchmarks/results/<date>-<name>-<machine>.json.

Whoever runs a file's `command` at its `commit` gets its figures again; `dirty` says that the tree
held more than the commit did. No host name is written, only what the machine is.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_serve.figures import Row as Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1

_VENDORS = ("amd epyc", "amd ryzen", "intel xeon", "intel core", "neoverse", "apple")
# The best first: the instruction set that decides how fast a matrix product can be.
_FLAGS = (
    ("amx_bf16", "amxbf16"),
    ("avx512_bf16", "avx512bf16"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("bf16", "armbf16"),
    ("asimd", "neon"),
)


def describe_machine(cpuinfo: str, num_cores: int) -> str:
    """Return a short description, such as "amd-epyc-2c-avx512bf16", of a /proc/cpuinfo text."""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    words = re.sub(r"\((r|tm)\)", "", model.group(1).lower()) if model else "cpu"
    name = next((vendor for vendor in _VENDORS if vendor in words), words.split("@")[0])
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    best = next((label for flag, label in _FLAGS if flag in flags), None)
    return "-".join(part for part in (name, f"{num_cores}c", best) if part)


def this_machine(accelerator: str | None = None) -> str:
    """Describe the machine that runs this; `accelerator` is a device's name, as CUDA gives it."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:  # not Linux
        cpuinfo = ""
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        num_cores = os.cpu_count() or 1
    cpu = describe_machine(cpuinfo, num_cores)
    return f"{re.sub(r'[^a-z0-9]+', '-', accelerator.lower())}-{cpu}" if accelerator else cpu


def source_state(root: Path = ROOT) -> tuple[str, bool]:
    """Return the commit of the tree, and whether it holds more than that (results do not count).

    Where there is no .git: what COMMIT names, in the environment or in a file of the tree's root.
    """
    if not (root / ".git").exists() and (named := _named_commit(root)):
        return named, False
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(changed.strip())


def _named_commit(root: Path) -> str:
    path = root / "COMMIT"
    return os.environ.get("COMMIT") or (path.read_text().strip() if path.is_file() else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


def recorded_command(module: str, arguments: Sequence[str]) -> str:
    """Return the line that runs `module` of this tree again, as a shell in its root takes it.

    No path of this machine is kept: an absolute one within the tree is written relative to it, one
    outside as FOLDER and its last part, for the reader to put in.
    """
    return shlex.join(["python", "-m", module, *map(_portable, arguments)])


def _portable(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    if not Path(value).is_absolute():
        return argument
    path = Path(os.path.normpath(value))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path("FOLDER", path.name)
    return f"{flag}{equals}{shown}"


def write_results(
    name: str,
    rows: Iterable[Row],
    *,
    command: str,
    numerics_id: str | None = None,
    machine: str | None = None,
    folder: Path = RESULTS,
    today: datetime.date | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write rows as <yyyymmdd>-<name>-<machine>.json and return the path.

    name: lower-case words and hyphens; with "peers" in it when other systems took part, with "gpu"
    when a GPU did. numerics_id: what the engine under test calls its numerics; None when no engine
    ran. environment: what else figures depend on, such as a card's driver. A second run on one day
    replaces the first. Raises ValueError for a name that is no slug.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"name is {name!r}; use lower-case words joined by hyphens")
    machine = machine or this_machine()
    commit, dirty = source_state()
    document = {
        "schema": SCHEMA,
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "machine": machine,
        "numerics_id": numerics_id,
        "rows": [asdict(row) for row in rows],
    }
    if environment is not None:
        document["environment"] = dict(environment)
    day = (today or datetime.date.today()).strftime("%Y%m%d")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}-{name}-{machine}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path

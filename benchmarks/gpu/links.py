"""Whether the links in moe_serve/ are there: a tree that travels may have lost them."""

from __future__ import annotations

import importlib
import os

from benchmarks.results import ROOT

LINKED = ("experts", "comm", "predictors", "launch")
RESTORE = (
    "(cd moe_serve && for name in " + " ".join(LINKED) + "; "
    "do rm -rf $name; ln -s ../$name $name; done)"
)


def told() -> list[str]:
    """Return a line for each link: where it leads, and whether what it names can be imported."""
    lines = []
    for name in LINKED:
        path = ROOT / "moe_serve" / name
        where = f"-> {os.readlink(path)}" if path.is_symlink() else "is no link"
        try:
            importlib.import_module(f"moe_serve.{name}")
        except ImportError as error:
            lines.append(f"moe_serve/{name} {where}; NOT imported: {error}")
        else:
            lines.append(f"moe_serve/{name} {where}; imported")
    if not are_whole():
        lines.append(f"to make the links again: {RESTORE}")
    return lines


def are_whole() -> bool:
    """Tell whether all links lead where they should."""
    paths = [(ROOT / "moe_serve" / name, ROOT / name) for name in LINKED]
    return all(path.is_symlink() and path.resolve() == target for path, target in paths)

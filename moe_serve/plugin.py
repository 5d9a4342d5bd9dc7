"""Folders of alternatives: one file each, and the file's name is the flag's value."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from moe_serve.errors import ConfigError, nearest


def names(package: str) -> tuple[str, ...]:
    """List the alternatives in `package`, sorted: its modules but `base` and "_private" ones."""
    path = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return tuple(sorted(name for name in found if name != "base" and not name.startswith("_")))


def load(package: str, name: str, option: str | None = None) -> ModuleType:
    """Import `package`.`name`; an unknown name is an error that lists the known ones.

    option: the one that has the name; default: the package.
    """
    known = names(package)
    if name not in known:
        kind = option or package.rpartition(".")[2]
        raise ConfigError(
            f"{kind}: there is no {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
        )
    return importlib.import_module(f"{package}.{name}")

"""Find the folder that a model's name stands for, and download it where the name is a hub's.

Decides nothing about what is in the folder: `models/` reads and checks it.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from moe_serve.config import EMBEDDED_MODEL
from moe_serve.errors import CheckpointError, nearest
from moe_serve.models.checkpoint_folder import INDEX_FILE, SINGLE_FILE
from moe_serve.models.hf_config import CONFIG_FILE, require_folder
from moe_serve.models.strict_json import read_object

# Data only: no pickles, no Python. A "*" also matches "/", so folders are named to be left out, as
# are the second copies of the weights that some publishers add.
WANTED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
UNWANTED_FILES = ("*/*", "consolidated*", "adapter_*", "*.py", "*.bin")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return the folder of model `name`: demo-moe, a folder, or a name on the hub.

    A hub name is taken from the local cache when it is complete there, else downloaded (safetensors
    and what goes with them only). Raises CheckpointError where there is no such model or no way to
    fetch it. A folder called demo-moe is given as ./demo-moe.
    """
    if name == EMBEDDED_MODEL:
        return embedded_model()
    if not name:
        raise CheckpointError("the model's name is empty; give a folder, a hub name or demo-moe")
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path) or not _HUB_NAME.fullmatch(name):
        require_folder(path)
        return path
    return _downloaded(name, revision)


def resolve_config(name: str, revision: str | None = None) -> Path:
    """Return a folder with the config.json of model `name`: as `resolve_model`, but no weights."""
    path = Path(os.path.expanduser(name))
    if name in ("", EMBEDDED_MODEL) or os.path.lexists(path) or not _HUB_NAME.fullmatch(name):
        return resolve_model(name)
    return _downloaded(name, revision, (CONFIG_FILE,))


def embedded_model() -> Path:
    """Return the folder of the model that comes with the package."""
    folder = Path(str(importlib.resources.files("moe_serve"))) / "assets" / EMBEDDED_MODEL
    require_folder(folder)
    return folder


def _downloaded(name: str, revision: str | None, wanted: tuple[str, ...] = WANTED_FILES) -> Path:
    """Return the folder of a hub model, from the cache or the network."""
    # an optional library as far as folders go, and one that takes time to import
    from huggingface_hub import snapshot_download

    try:
        cached = _cached(name, revision)
        if cached is not None and _has_all(cached, wanted):
            return cached
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except CheckpointError:
        raise
    # Whatever it is: besides its own errors (a name that no hub model can have is one) the library
    # lets those of its HTTP client through.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name}: no folder here, not in the local cache, and not to be had from the hub"
            f"{f' at revision {revision}' if revision else ''} "
            f"({reason[0] if reason else type(error).__name__}); give a folder, or check the name "
            f"and the network{nearest(name, [EMBEDDED_MODEL])}"
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model that was downloaded before, all of it or some."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _has_all(folder: Path, wanted: tuple[str, ...]) -> bool:
    """Return whether a cached snapshot has a config and, where wanted, all weights, not only some.

    wanted: WANTED_FILES, or the config alone.
    """
    if not (folder / CONFIG_FILE).exists():
        return False
    if wanted == (CONFIG_FILE,):
        return True
    if (folder / SINGLE_FILE).exists():
        return True
    if not (folder / INDEX_FILE).exists():
        return False
    weight_map = read_object(folder / INDEX_FILE).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return all(isinstance(file, str) and (folder / file).exists() for file in files)

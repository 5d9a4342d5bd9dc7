"""Faults on demand, in processes that have this folder on their PYTHONPATH: for tests alone.

Python imports this at its start. When a module below is loaded, its function is wrapped: each call
looks for a file with the site's name in FAULTS_FOLDER, and where there is one, and it says so, the
call fails. `tests.serving.faults` writes these files. The package itself knows nothing of it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = Path(os.environ["FAULTS_FOLDER"])
# of a fault's name, so that no request's text can be taken for one
MESSAGE = "a fault of a test"
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        RuntimeError, MemoryError, ArithmeticError, ValueError, AssertionError, KeyError
    )
}  # fmt: skip
# site: where it is, "module:function". Several sites may be of one function.
SITES = {
    "forward": ["moe_serve.engine.model_runner:ModelRunner.run"],
    "hidden": ["moe_serve.engine.model_runner:ModelRunner._forward"],
    "dispatch": ["moe_serve.engine.rank_parts:Progress.dispatch"],
    "combine": ["moe_serve.engine.rank_parts:Progress.combine"],
    "experts": [
        "moe_serve.experts.executor:ResidentExperts.run",
        "moe_serve.experts.offload:OffloadedExperts.run",
    ],
    "logits": ["moe_serve.engine.sampler:Sampler.launch"],
    "kv": ["moe_serve.engine.kv_cache:KVCacheManager.extend"],
    "add": ["moe_serve.engine.scheduler:Scheduler.add"],
    "read": ["moe_serve.experts.transfer:StoreSource.read_chunk"],
    "copy": ["moe_serve.experts.transfer:EmulatedLink.read_chunk"],
    "tokenise": ["moe_serve.text.tokenizer:Tokenizer.encode"],
    "template": ["moe_serve.text.chat_template:ChatTemplate.render"],
    "detokenise": ["moe_serve.text.detokenizer:ByteLevelDetokenizer.push"],
    "answer": ["moe_serve.text.openai_form:response_object"],
    "event": ["moe_serve.server.event_stream:_Choice.news"],
    "host-says": ["moe_serve.channel:Mailbox.send"],
    "front-says": ["moe_serve.server.engine_client:EngineClient.flush"],
}


def is_due(site: str, arguments: Sequence[Any]) -> str | None:
    """Return the kind of fault that this call is to have; None: none."""
    path = _FOLDER / site
    try:
        data = path.read_text()
    except OSError:
        return None
    fault = json.loads(data)
    if "prompt" in fault:  # of every step that has a request with this first token
        step = arguments[1]
        is_hit = any(one.request.prompt_ids[0] == fault["prompt"] for one in step.sequences)
        return fault["kind"] if is_hit else None
    counted = _CALLS.get(site, ("", 0))
    num_before = counted[1] if counted[0] == data else 0
    _CALLS[site] = data, num_before + 1
    if num_before < fault["skip"]:
        return None
    try:
        path.unlink()
    except FileNotFoundError:  # another process was quicker
        return None
    (_FOLDER / f"{site}.done").touch()
    kind: str = fault["kind"]
    return kind


_CALLS: dict[str, tuple[str, int]] = {}


def fail(site: str, kind: str, arguments: Sequence[Any]) -> None:
    """Raise, or spoil what the call is given."""
    if kind == "NaN":
        arguments[1][0].fill_(float("nan"))
    elif kind == "garbage":
        said = struct.pack("<I", 3) + b"\xc1no"
        if site == "host-says":
            arguments[0]._unsent += said
        else:
            arguments[0]._outgoing += said
    else:
        raise _KINDS[kind](f"{MESSAGE} ({site})")


def wrapped(site: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        kind = is_due(site, arguments)
        if kind is not None and site != "hidden":
            fail(site, kind, arguments)
        given = function(*arguments, **named)
        if kind is not None and site == "hidden":
            fail(site, kind, (None, given[0]))
        return given

    return call


def wrap(module: ModuleType) -> None:
    for site, places in SITES.items():
        for place in places:
            name, _, path = place.partition(":")
            if name == module.__name__:
                *owners, last = path.split(".")
                owner: Any = module
                for part in owners:
                    owner = getattr(owner, part)
                setattr(owner, last, wrapped(site, getattr(owner, last)))
    if module.__name__ == "moe_serve.experts.native_transfer":  # so that records go through Python
        module.open_transfers = lambda source, records, num_slots, num_threads: (  # type: ignore[attr-defined]
            module.TransferQueue(source, records, num_threads)
        )


class Loader(importlib.abc.Loader):
    """Loads a module as it would be, and wraps it."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        wrap(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the sites."""

    _names = frozenset(p.partition(":")[0] for places in SITES.values() for p in places) | {
        "moe_serve.experts.native_transfer"
    }

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())

"""TensorRT-LLM's expert load balancer: YAML of num_slots and the expert in each slot.

    initial_global_assignments:
      3: [0, 5, 1, 5]
    layer_updates_per_iter: 0
    num_slots: 4

Slots are rank by rank; layers have the model's numbers (its examples/wide_ep/ep_load_balancer).
Read is this form, as its generate_eplb_config.py writes it, and the same in braces; no other YAML
(lists of lines with dashes, quotes, anchors): no YAML reader is among the engine's packages.
layer_updates_per_iter, which is not of the placement, is written as 0: the placement stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Placement
from moe_serve.experts.placement_formats.base import Known, from_physical, to_physical

_ASSIGNMENTS, _UPDATES, _SLOTS = "initial_global_assignments", "layer_updates_per_iter", "num_slots"
_TOKEN = re.compile(r"\s*(?:([{}\[\],])|(\d{1,9})(?![\w.])|([a-z_]+)(?=\s*:))|\s*(:)(?=\s)")
_LINE = re.compile(r"( *)(\w+):(?: +(.*))?")


def recognises(data: bytes) -> bool:
    """Say whether a line, or what is in braces, has the assignments, without quotes."""
    return re.search(rb"(?m)(^|[{,])\s*initial_global_assignments\s*:", data) is not None


def decode(data: bytes, known: Known) -> Placement:
    """See `base`."""
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not in the form of TensorRT-LLM: {error}") from error
    numbers, assignments = _Reader(_in_braces(text)).document()
    if not assignments:
        raise ConfigError(f"{_ASSIGNMENTS} has no layer")
    for layer, slots in assignments.items():
        if len(slots) != numbers[_SLOTS]:
            raise ConfigError(
                f"layer {layer} has {len(slots)} slots, but {_SLOTS} is {numbers[_SLOTS]}"
            )
    layers = sorted(assignments)
    if known.layer_ids is not None and layers != list(known.layer_ids):
        raise ConfigError(
            f"it has layers {layers[0]} to {layers[-1]}, {len(layers)} in all, but the model has "
            f"experts in {len(known.layer_ids)}, {known.layer_ids[0]} to {known.layer_ids[-1]}"
        )
    physical = np.array([assignments[layer] for layer in layers])
    return from_physical(physical, known.ranks(), known.num_experts)


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError where ranks hold different numbers of experts."""
    physical = to_physical(placement)
    rows = "".join(
        f"  {layer}: {row.tolist()}\n" for layer, row in zip(layer_ids, physical, strict=True)
    )
    return f"{_ASSIGNMENTS}:\n{rows}{_UPDATES}: 0\n{_SLOTS}: {physical.shape[1]}\n".encode()


def _in_braces(text: str) -> str:
    """Return the mapping of lines as one in braces; what is in braces already stays as it is."""
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line and line != "---"]
    if lines and lines[0].lstrip().startswith("{"):
        return " ".join(lines)
    entries: list[str] = []
    inner: list[str] | None = None  # entries of the mapping below the last key
    indent = depth = 0
    for line in lines:
        if depth:  # a list goes on
            (entries if inner is None else inner)[-1] += f" {line.strip()}"
        else:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(f"not in the form of TensorRT-LLM: {line.strip()[:60]!r}")
            key, value = match[2], match[3] or ""
            if not match[1]:
                _close(entries, inner)
                inner = None if value else []
                indent = 0
                entries.append(f"{key}: {value}")
            elif inner is None or (indent and len(match[1]) != indent):
                raise ConfigError(f"not in the form of TensorRT-LLM: {line[:60]!r} is too far in")
            else:
                indent = len(match[1])
                inner.append(f"{key}: {value}")
        depth += sum(line.count(sign) for sign in "[{") - sum(line.count(sign) for sign in "]}")
    _close(entries, inner)
    return f"{{{', '.join(entries)}}}"


def _close(entries: list[str], inner: list[str] | None) -> None:
    if inner is not None and entries:
        entries[-1] += f"{{{', '.join(inner)}}}"


class _Reader:
    """Reads {name: number, name: {number: [number]}}, and nothing else."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        place = 0
        text = text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise ConfigError(
                    f"not in the form of TensorRT-LLM: {text[place : place + 40].strip()!r}"
                )
            self._tokens.append(match[0].strip())
            place = match.end()
        self._place = 0

    def document(self) -> tuple[dict[str, int], dict[int, list[int]]]:
        """Return the numbers by name and the slots by layer. Raises ConfigError."""
        numbers: dict[str, int] = {}
        assignments: dict[int, list[int]] | None = None
        for _ in self._items("{", "}"):
            name = self._next()
            self._expect(":")
            if name in numbers or (name == _ASSIGNMENTS and assignments is not None):
                raise ConfigError(f"{name} is there twice")
            if name == _ASSIGNMENTS:
                assignments = self._assignments()
            elif name in (_SLOTS, _UPDATES):
                numbers[name] = self._number()
            else:
                raise ConfigError(
                    f"{name!r} is none of {_ASSIGNMENTS}, {_UPDATES} and {_SLOTS}, which is all "
                    "that TensorRT-LLM's file has"
                )
        if self._place < len(self._tokens):
            raise ConfigError(f"more after the end: {self._tokens[self._place]!r}")
        if assignments is None or _SLOTS not in numbers:
            raise ConfigError(f"{_ASSIGNMENTS} and {_SLOTS} are needed")
        return numbers, assignments

    def _assignments(self) -> dict[int, list[int]]:
        layers: dict[int, list[int]] = {}
        for _ in self._items("{", "}"):
            layer = self._number()
            self._expect(":")
            if layer in layers:
                raise ConfigError(f"layer {layer} is there twice")
            layers[layer] = [self._number() for _ in self._items("[", "]")]
        return layers

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Stop before each item, for the caller to read it, and take the signs between them."""
        self._expect(opening)
        while self._peek() != closing:
            yield
            if self._peek() != closing:
                self._expect(",")
        self._next()

    def _number(self) -> int:
        token = self._next()
        if not token.isdigit():
            raise ConfigError(f"not in the form of TensorRT-LLM: {token!r} is no whole number")
        return int(token)

    def _expect(self, token: str) -> None:
        if (found := self._next()) != token:
            raise ConfigError(f"not in the form of TensorRT-LLM: {found!r} where {token!r} belongs")

    def _next(self) -> str:
        token = self._peek()
        self._place += 1
        return token

    def _peek(self) -> str:
        if self._place >= len(self._tokens):
            raise ConfigError("not in the form of TensorRT-LLM: it ends too early")
        return self._tokens[self._place]

"""The experts of outputs' tokens, put together from what steps told of them."""

from __future__ import annotations

import math

from moe_serve.types import RoutedExperts

_ID_BYTES = 2  # of `RoutedExperts.ids`


class PromptRouting:
    """What all outputs of a request share. shape: layers, and experts of a token."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.shape = (0, 0)
        self.ids = bytearray()


class OutputRouting:
    """Of one output. What comes again, of a request that went on in another engine, is the same."""

    def __init__(self, prompt: PromptRouting) -> None:
        self._prompt = prompt
        self._ids = bytearray()  # of its own tokens

    def keep(self, routed: RoutedExperts) -> None:
        """Keep the experts of some tokens; those of the tokens before must have come."""
        prompt = self._prompt
        prompt.shape = routed.shape[1:]
        size = _ID_BYTES * math.prod(prompt.shape)
        num_shared = max(0, prompt.num_tokens - routed.first) * size
        _write(prompt.ids, routed.first * size, routed.ids[:num_shared])
        first = max(0, routed.first - prompt.num_tokens)
        _write(self._ids, first * size, routed.ids[num_shared:])

    def together(self) -> RoutedExperts | None:
        """Return those of all tokens so far; None: there are none."""
        ids = bytes(self._prompt.ids + self._ids)
        if not ids:
            return None
        num_layers, top_k = self._prompt.shape
        return RoutedExperts(
            0, ids, (len(ids) // (_ID_BYTES * num_layers * top_k), num_layers, top_k)
        )


def _write(buffer: bytearray, begin: int, data: bytes) -> None:
    if data:
        assert begin <= len(buffer), "the experts of tokens between are missing"
        buffer[begin : begin + len(data)] = data

"""Which transfers are under way, and which have ended: what all that copy by streams keep alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from moe_serve.errors import StoreError
from moe_serve.experts.transfer import Awaited, Transfer


class _OnItsWay(Protocol):
    @property
    def transfer(self) -> Transfer: ...


One = TypeVar("One", bound=_OnItsWay)


class TransferBooks(ABC, Generic[One]):
    """The part of `Transfers` that says what is known; who moves anything builds on it."""

    def __init__(self) -> None:
        self._of_expert: dict[tuple[int, int], One] = {}
        self._ended: list[One] = []
        self._num_guesses = 0
        self._is_open = True

    def is_known(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._of_expert or any(
            one.transfer.is_of(layer, expert) for one in self._ended
        )

    def arrivals(self, layer: int, experts: Sequence[int]) -> Awaited | None:
        return None

    @property
    def is_busy(self) -> bool:
        self._move_on()
        return bool(self._of_expert)

    @property
    def num_guesses(self) -> int:
        return self._num_guesses

    def _forget_all(self) -> None:
        self._of_expert.clear()
        self._ended.clear()
        self._num_guesses = 0

    @abstractmethod
    def _move_on(self) -> None:
        """Take note of what is done, and ask for more."""

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreError("experts are asked for after the end; the engine was closed")

    def _keep(self, one: One) -> One:
        """Note what is under way from now on."""
        key = (one.transfer.layer, one.transfer.expert)
        assert key not in self._of_expert, key
        self._of_expert[key] = one
        self._num_guesses += not one.transfer.is_urgent
        return one

    def _needed(self, layer: int, expert: int) -> One | None:
        """Return what brings an expert that is needed now, also if it was given up, and say so.

        One that was given up and has ended, uncollected, is under way again: see `_begin_again`.
        """
        one = self._of_expert.get((layer, expert))
        if one is None and self._is_open:
            for ended in self._ended:
                if ended.transfer.is_given_up and ended.transfer.is_of(layer, expert):
                    self._ended.remove(ended)
                    one = self._keep(ended)
                    self._begin_again(one)
                    break
        if one is not None:
            self._num_guesses -= not one.transfer.is_urgent
            one.transfer.is_urgent = True
            one.transfer.is_given_up = False
        return one

    @abstractmethod
    def _begin_again(self, one: One) -> None:
        """Prepare one that had been given up for its second way."""

    def _to_give_up(self, layer: int, expert: int) -> One | None:
        """Return the guess that is of no use any more, and say so. None: there is none to stop."""
        one = self._of_expert.get((layer, expert))
        if one is None or one.transfer.is_urgent or one.transfer.is_given_up:
            return None
        one.transfer.is_given_up = True
        return one

    def _end(self, one: One) -> None:
        """Note that nothing more happens to one; `at`, `is_whole` and `error` are settled."""
        transfer = one.transfer
        transfer.is_given_up = not transfer.is_whole and transfer.error is None
        self._num_guesses -= not transfer.is_urgent
        del self._of_expert[transfer.layer, transfer.expert]
        self._ended.append(one)

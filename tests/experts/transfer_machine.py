"""Any calls in any order on any `Transfers`, beside a model of what must come of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from torch import Tensor

from moe_serve.experts.transfer import Transfer, Transfers

STEPS = pytest.mark.parametrize(
    "num_steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["ci", "long"]
)


def collect(transfers: Transfers, count: int) -> list[Transfer]:
    ended: list[Transfer] = []
    while len(ended) < count:
        found = transfers.ended(wait=True)
        assert found, f"only {len(ended)} of {count} ended, and nothing is under way"
        ended += found
    return ended


class Machine:
    """What may be called in any order, beside a model of what must come of it."""

    def __init__(
        self,
        transfers: Transfers,
        records: Tensor,
        chance: random.Random,
        names: list[tuple[int, int]],
    ) -> None:
        """records: the slots; names: (layer, expert) of all that may be asked for."""
        self.transfers = transfers
        self.records = records
        self.chance = chance
        self.names = names
        self.free = list(range(len(records)))
        self.slots: dict[tuple[int, int], int] = {}
        self.urgent: set[tuple[int, int]] = set()
        self.stopped: set[tuple[int, int]] = set()
        self.counts = {"whole": 0, "failed": 0, "given up": 0}

    def empty(self, slot: int) -> None:
        """Remove what was in a slot, as nobody needs it."""
        self.records[slot] = 0

    def act(self, check: Callable[[Transfer], None]) -> None:
        action = self.chance.choice(("start", "start", "hurry", "give up", "collect", "wait"))
        if action == "start":
            key = self.chance.choice(self.names)
            if self.free and key not in self.slots:
                self.slots[key] = slot = self.free.pop(self.chance.randrange(len(self.free)))
                self.empty(slot)
                if self.chance.random() < 0.5:
                    self.urgent.add(key)
                    self.transfers.demand(key[0], [(key[1], slot)])
                else:
                    self.transfers.guess(*key, slot)
        elif action in ("hurry", "give up") and self.slots:
            key = self.chance.choice(list(self.slots))
            if action == "hurry":
                self.transfers.hurry(*key)
                self.urgent.add(key)
                self.stopped.discard(key)
            elif self.transfers.give_up(*key):
                assert key not in self.urgent
                self.stopped.add(key)
        elif action in ("collect", "wait"):
            self.collect(check, action == "wait")

    def collect(self, check: Callable[[Transfer], None], is_waiting: bool) -> None:
        ended = self.transfers.ended(wait=is_waiting)
        assert ended or not (is_waiting and self.slots)
        for transfer in ended:
            key = (transfer.layer, transfer.expert)
            assert self.slots.pop(key) == transfer.slot, "lost, or ended twice"
            assert not transfer.is_given_up or key in self.stopped
            kind = "whole" if transfer.is_whole else "failed" if transfer.error else "given up"
            self.counts[kind] += 1
            check(transfer)
            self.free.append(transfer.slot)
            self.urgent.discard(key)
            self.stopped.discard(key)

    def run(self, num_steps: int, check: Callable[[Transfer], None]) -> None:
        for _ in range(num_steps):
            self.act(check)
        while self.slots:
            self.collect(check, is_waiting=True)
        assert not self.transfers.is_busy
        assert self.transfers.num_guesses == 0

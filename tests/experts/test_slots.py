"""Slots: what is in them stays where it is, and what is given back is gone."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.experts.slots import DeviceSlots, FixedSlots, GrowingSlots


def test_growing_slots_are_taken_and_given_back() -> None:
    slots = GrowingSlots(2, 5, 8192)
    assert slots.records.shape == (5, 8192)
    slots.records[:2] = 3
    slots.resize(4)
    assert not slots.records[2:4].any()
    slots.resize(1)
    slots.resize(5)
    assert bool(slots.records[0].eq(3).all())
    assert not slots.records[1:].any()
    fixed = FixedSlots(torch.zeros(9, 4096, dtype=torch.uint8), 4)
    fixed.resize(2)
    assert fixed.records.shape == (9, 4096)


def test_slots_of_a_device_stay_and_say_where_there_is_no_room() -> None:
    slots = DeviceSlots(3, 4096, torch.device("cpu"))
    assert slots.records.shape == (3, 4096)
    assert slots.most_slots == 3
    slots.records[2] = 9
    slots.resize(1)
    assert bool(slots.records[2].eq(9).all())
    with pytest.raises(CapacityError, match="no memory on cpu for 1073741824 expert slots of 10"):
        DeviceSlots(2**30, 2**30, torch.device("cpu"))

"""Rotation and cache writes."""

from __future__ import annotations

import pytest
import torch

from moe_serve.kernels.rope import reference
from moe_serve.layers.rope import RopeSpec, rope_table


@pytest.mark.usefixtures("poisoned_empty")
def test_rotation_is_a_complex_product() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 3, 8)
    angles = torch.rand(5, 1, 4) * 6
    got = reference.rope(rows, torch.cos(angles), torch.sin(angles))
    wide = rows.double()
    turned = torch.complex(wide[..., :4], wide[..., 4:]) * torch.polar(
        torch.ones(5, 1, 4, dtype=torch.float64), angles.double()
    )
    torch.testing.assert_close(
        got.double(), torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-6
    )


def test_a_score_depends_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    cos, sin = (t.unsqueeze(1) for t in rope_table(RopeSpec(theta=1e4), 32, 300))
    query, key = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(at: int, seen: int) -> float:
        turned = (
            reference.rope(r, cos[p : p + 1], sin[p : p + 1]) for r, p in ((query, at), (key, seen))
        )
        first, second = turned
        return float((first * second).sum())

    assert abs(score(10, 3) - score(250, 243)) < 1e-3
    assert abs(score(10, 3) - score(10, 4)) > 1e-3


@pytest.mark.usefixtures("poisoned_empty")
def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    cos, sin = torch.ones(3, 1, 4), torch.zeros(3, 1, 4)
    keys, values = torch.full((2, 2, 10, 8), 7.0).unbind(0)
    slots = torch.tensor([9, 2, 4])
    out = reference.rope_write_kv(query, key, value, cos, sin, keys, values, slots)
    torch.testing.assert_close(out, query)
    torch.testing.assert_close(keys[:, slots], key.transpose(0, 1))
    torch.testing.assert_close(values[:, slots], value.transpose(0, 1))
    rest = [slot for slot in range(10) if slot not in slots.tolist()]
    assert bool((keys[:, rest] == 7).all())
    assert bool((values[:, rest] == 7).all())

"""A usage profile: how often each expert was used, kept from run to run to warm the next start.

What was used longer ago counts less: every run halves what the runs before it left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.experts.array_file import Array, read_arrays, write_arrays
from moe_serve.experts.output_file import output_path
from moe_serve.kernels.moe.base import ExpertTable

_KIND = "usage profile 1"
_DECAY = 0.5
_POLICY = "policy."


@dataclass(frozen=True, slots=True)
class UsageProfile:
    """uses: float64 [num_layers, num_experts], tokens; policy_state: of the policy so named."""

    model_id: str
    uses: Array
    policy: str = ""
    policy_state: Mapping[str, Array] = field(default_factory=dict)

    def hottest(self) -> list[tuple[int, int]]:
        """Return (layer, expert) of all that were used, each layer's first before any second."""
        order = np.argsort(-self.uses, axis=1, kind="stable")  # [num_layers, num_experts]
        return [
            (layer, int(order[layer, rank]))
            for rank in range(order.shape[1])
            for layer in range(order.shape[0])
            if self.uses[layer, order[layer, rank]] > 0
        ]


class ProfileKeeper:
    """Writes, at the end of a run, the profile that the next one starts from."""

    def __init__(self, path: Path, before: UsageProfile, policy: str) -> None:
        """before: what this run started from; policy: the name of the eviction policy."""
        self.path = path
        self.before = before
        self._policy = policy

    def write(
        self, layers: Mapping[int, ExpertTable], policy_state: Mapping[str, Array] | None = None
    ) -> None:
        """Add this run's uses, which the kernels counted, by layer. Raises TraceError."""
        uses = self.before.uses * _DECAY
        for index, layer in enumerate(sorted(layers)):
            counted = layers[layer].uses.cpu().numpy()
            uses[index, : len(counted)] += counted
        policy, state = self._policy, policy_state
        if state is None:  # none ran: what an earlier one learned is kept
            policy, state = self.before.policy, self.before.policy_state
        write_profile(self.path, UsageProfile(self.before.model_id, uses, policy, state))


def read_profile(path: Path, model_id: str, num_layers: int, num_experts: int) -> UsageProfile:
    """Read a profile, or make an empty one where there is no file.

    Raises TraceError for a file that is none, or of another model.
    """
    if not os.path.lexists(output_path(path)):
        return UsageProfile(model_id, np.zeros((num_layers, num_experts)))
    arrays, told = read_arrays(path, _KIND)
    uses = arrays.pop("uses", np.empty(0))
    if told.get("model_id") != model_id or uses.shape != (num_layers, num_experts):
        raise TraceError(
            f"{path}: a usage profile of another model ({told.get('model_id')}, "
            f"{list(uses.shape)} experts), not of this one ({model_id}, "
            f"{[num_layers, num_experts]}); give another file"
        )
    if not np.issubdtype(uses.dtype, np.floating) or not (np.isfinite(uses) & (uses >= 0)).all():
        raise TraceError(f"{path}: uses must be finite numbers from 0 on; remove the file")
    state = {name.removeprefix(_POLICY): array for name, array in arrays.items()}
    return UsageProfile(model_id, uses, told.get("policy", ""), state)


def write_profile(path: Path, profile: UsageProfile) -> None:
    """Write a profile. Raises TraceError."""
    arrays = {"uses": profile.uses}
    arrays |= {f"{_POLICY}{name}": array for name, array in profile.policy_state.items()}
    told = {"model_id": profile.model_id, "policy": profile.policy}
    write_arrays(path, _KIND, arrays, told)

"""Where a model's tensors are, for a device that is not here: what is mixed is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_serve.kernels import suite
from moe_serve.models.decoder import build_decoder
from moe_serve.models.dummy import dummy_weights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import ForwardBatch
from tests.models import tiny
from tests.models.elsewhere import ELSEWHERE, launches

pytest.importorskip("triton")


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_all_of_a_model_is_on_its_device(model_type: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, model_type)
    spec = read_spec(HFConfig.read(tmp_path))
    with launches() as taken, torch.inference_mode():
        kernels = suite.load("triton")
        assert kernels.device == ELSEWHERE
        decoder = build_decoder(
            spec,
            torch.bfloat16,
            kernels,
            64,
            lambda into: dummy_weights(spec, torch.bfloat16, device=kernels.device, into=into),
        )
        caches = decoder.allocate_caches((4,) * len(decoder.groups), 16)
        batch = _batch(len(decoder.groups)).on(ELSEWHERE)
        hidden = decoder.forward(batch, caches)
        logits = decoder.logits(hidden[batch.sample_rows])
    assert hidden.device == logits.device == ELSEWHERE
    assert {"_attend", "_linear"} <= taken.names
    assert batch.sequence_ids.device.type == "cpu"


def _batch(num_groups: int) -> ForwardBatch:
    """Return a decode after 4 tokens, and a prompt of 3."""
    tokens = torch.tensor([5, 6, 7, 8])
    positions = torch.tensor([4, 0, 1, 2])
    return ForwardBatch(
        token_ids=tokens,
        positions=positions,
        sequence_ids=torch.tensor([0, 1, 1, 1]),
        query_lens=(1, 3),
        context_lens=(5, 3),
        prompt_lens=(4, 3),
        slot_mapping=(positions + 16,) * num_groups,
        block_tables=(torch.tensor([[1], [2]], dtype=torch.int32),) * num_groups,
        block_size=16,
        sample_rows=torch.tensor([0, 3]),
    )

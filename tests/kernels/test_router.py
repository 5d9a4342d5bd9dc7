"""Router recipes against transformers' own routers, and their ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from moe_serve.kernels.router import reference
from moe_serve.types import RouterRecipe
from tests.kernels.row_independence import same_bits, subsets

HIDDEN = 48


def _compare(router: Any, recipe: RouterRecipe, bias: Tensor | None = None) -> None:
    """Give both the same tokens; experts must be the same sets, weights equal to 1e-6."""
    torch.manual_seed(1)
    with torch.no_grad():
        router.weight.normal_()
        hidden = torch.randn(500, HIDDEN)
        logits, weights, ids = router(hidden)
        ours = reference.route(logits.float(), recipe, bias)
    dense = torch.zeros(500, recipe.num_experts)
    want = dense.scatter(1, ids, weights)
    got = dense.scatter(1, ours.expert_ids, ours.weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert bool((ours.weights[:, :-1] >= ours.weights[:, 1:]).all()), "heaviest first"


@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_then_top_k(renormalise: bool) -> None:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN, num_experts=60, num_experts_per_tok=4, norm_topk_prob=renormalise
    )
    recipe = RouterRecipe(num_experts=60, top_k=4, renormalise=renormalise)
    _compare(Qwen2MoeTopKRouter(config), recipe)


def test_mixtral_renormalises() -> None:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    _compare(MixtralTopKRouter(config), RouterRecipe(num_experts=8, top_k=2, renormalise=True))


@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (8, 3), (4, 1)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_sigmoid_with_bias_and_groups(
    num_groups: int, top_k_groups: int, renormalise: bool
) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=num_groups,
        topk_group=top_k_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    bias = torch.randn(64) * 0.2
    router.e_score_correction_bias.copy_(bias)
    recipe = RouterRecipe(
        num_experts=64,
        top_k=6,
        score="sigmoid",
        has_selection_bias=True,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        renormalise=renormalise,
        renormalise_eps=1e-20,
        scale=2.5,
    )
    _compare(router, recipe, bias)


def test_softmax_after_top_k() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=32, num_experts_per_tok=4)
    router = GptOssTopKRouter(config)
    with torch.no_grad():
        router.bias.normal_()
    recipe = RouterRecipe(num_experts=32, top_k=4, score="softmax_after_top_k")
    _compare(router, recipe)


def test_square_root_of_softplus() -> None:
    logits = torch.tensor([[0.0, 3.0, -40.0, 90.0]])
    recipe = RouterRecipe(num_experts=4, top_k=4, score="sqrt_softplus")
    got = reference.route(logits, recipe)
    assert got.expert_ids.tolist() == [[3, 1, 0, 2]]
    want = torch.nn.functional.softplus(logits.double()).sqrt()[0, [3, 1, 0, 2]]
    torch.testing.assert_close(got.weights[0].double(), want, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(3, 64)
    logits[1, 50] = 1.0
    got = reference.route(logits, RouterRecipe(num_experts=64, top_k=4))
    assert got.expert_ids.tolist() == [[0, 1, 2, 3], [50, 0, 1, 2], [0, 1, 2, 3]]


def test_a_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    recipe = RouterRecipe(num_experts=4, top_k=2, score="sigmoid", has_selection_bias=True)
    got = reference.route(logits, recipe, bias)
    assert got.expert_ids.tolist() == [[0, 3]]
    torch.testing.assert_close(got.weights[0], torch.sigmoid(torch.tensor([2.0, -1.0])))


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(300, 60), torch.randn(60)
    recipe = RouterRecipe(
        num_experts=60, top_k=6, score="sigmoid", has_selection_bias=True, num_groups=6,
        top_k_groups=2, renormalise=True,
    )  # fmt: skip
    whole = reference.route(logits, recipe, bias)
    for rows, threads in subsets(300, seed=3, count=30):
        torch.set_num_threads(threads)
        part = reference.route(logits[rows], recipe, bias)
        assert torch.equal(part.expert_ids, whole.expert_ids[rows])
        assert same_bits(part.weights, whole.weights[rows])

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
from moe_serve.types import RouterRecipe, RouterScore, Routing
from tests.kernels.host_sync import no_host_sync
from tests.kernels.implementations import (
    DTYPES,
    EACH_EXACT,
    EACH_ON_A_GPU,
    INTERPRETED,
    TRITON,
    each_exact_with,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

HIDDEN = 48
SCORES: tuple[RouterScore, ...] = ("softmax", "sigmoid", "softmax_after_top_k", "sqrt_softplus")


def _compare(name: str, router: Any, recipe: RouterRecipe, bias: Tensor | None = None) -> None:
    """Give both the same tokens; experts must be the same sets, weights equal to 1e-6."""
    torch.manual_seed(1)
    num_tokens = 50 if name in INTERPRETED else 500
    with torch.no_grad():
        router.weight.normal_()
        hidden = torch.randn(num_tokens, HIDDEN)
        logits, weights, ids = router(hidden)
        ours = kernels(name).route(logits.float(), recipe, bias)
    dense = torch.zeros(num_tokens, recipe.num_experts)
    want = dense.scatter(1, ids, weights)
    got = dense.scatter(1, ours.expert_ids, ours.weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert bool((ours.weights[:, :-1] >= ours.weights[:, 1:]).all()), "heaviest first"


@EACH_EXACT
@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_then_top_k(name: str, renormalise: bool) -> None:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN, num_experts=60, num_experts_per_tok=4, norm_topk_prob=renormalise
    )
    recipe = RouterRecipe(num_experts=60, top_k=4, renormalise=renormalise)
    _compare(name, Qwen2MoeTopKRouter(config), recipe)


@EACH_EXACT
def test_mixtral_renormalises(name: str) -> None:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    _compare(
        name, MixtralTopKRouter(config), RouterRecipe(num_experts=8, top_k=2, renormalise=True)
    )


@EACH_EXACT
@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (8, 3), (4, 1)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_sigmoid_with_bias_and_groups(
    name: str, num_groups: int, top_k_groups: int, renormalise: bool
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
    _compare(name, router, recipe, bias)


@EACH_EXACT
def test_softmax_after_top_k(name: str) -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=32, num_experts_per_tok=4)
    router = GptOssTopKRouter(config)
    with torch.no_grad():
        router.bias.normal_()
    recipe = RouterRecipe(num_experts=32, top_k=4, score="softmax_after_top_k")
    _compare(name, router, recipe)


@EACH_EXACT
def test_square_root_of_softplus(name: str) -> None:
    logits = torch.tensor([[0.0, 3.0, -40.0, 90.0]])
    recipe = RouterRecipe(num_experts=4, top_k=4, score="sqrt_softplus")
    got = kernels(name).route(logits, recipe)
    assert got.expert_ids.tolist() == [[3, 1, 0, 2]]
    want = torch.nn.functional.softplus(logits.double()).sqrt()[0, [3, 1, 0, 2]]
    torch.testing.assert_close(got.weights[0].double(), want, rtol=1e-5, atol=1e-6)


@EACH_EXACT
def test_ties_go_to_the_lower_id(name: str) -> None:
    logits = torch.zeros(3, 64)
    logits[1, 50] = 1.0
    got = kernels(name).route(logits, RouterRecipe(num_experts=64, top_k=4))
    assert got.expert_ids.tolist() == [[0, 1, 2, 3], [50, 0, 1, 2], [0, 1, 2, 3]]


@EACH_EXACT
def test_a_bias_chooses_but_does_not_weigh(name: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    recipe = RouterRecipe(num_experts=4, top_k=2, score="sigmoid", has_selection_bias=True)
    got = kernels(name).route(logits, recipe, bias)
    assert got.expert_ids.tolist() == [[0, 3]]
    torch.testing.assert_close(got.weights[0], torch.sigmoid(torch.tensor([2.0, -1.0])))


def _recipes(num_experts: int, top_k: int, num_groups: int = 1) -> list[RouterRecipe]:
    """Return one recipe for each score, renormalised and not; those with a bias have groups."""
    return [
        RouterRecipe(
            num_experts=num_experts,
            top_k=top_k,
            score=score,
            has_selection_bias=has_bias,
            num_groups=num_groups if has_bias else 1,
            top_k_groups=max(1, num_groups // 2) if has_bias else 1,
            renormalise=has_bias,
            renormalise_eps=1e-20,
            scale=2.5 if has_bias else 1.0,
        )
        for score in SCORES
        for has_bias in (False, True)
    ]


def _route(name: str, logits: Tensor, recipe: RouterRecipe, bias: Tensor) -> Routing:
    return kernels(name).route(logits, recipe, bias if recipe.has_selection_bias else None)


@EACH_EXACT
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups"),
    [
        (1, 1, 1), (2, 2, 1), (7, 3, 7), (16, 1, 4), (33, 8, 3), (60, 4, 6), (256, 8, 8),
        (512, 32, 1), (1000, 31, 10),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_integers")
def test_equals_the_reference_in_float64(
    name: str, num_experts: int, top_k: int, num_groups: int
) -> None:
    torch.manual_seed(0)
    # far apart, so that no choice is decided by rounding
    levels = torch.linspace(-8, 8, num_experts)
    logits = torch.stack([levels[torch.randperm(num_experts)] for _ in range(9)])
    bias = torch.randn(num_experts)
    for recipe in _recipes(num_experts, top_k, num_groups):
        for count in (0, 1, 9):
            got = _route(name, logits[:count], recipe, bias)
            assert got.weights.dtype == torch.float32
            assert got.expert_ids.shape == got.weights.shape == (count, top_k)
            wide = bias.double() if recipe.has_selection_bias else None
            want = reference.route(logits[:count].double(), recipe, wide)
            assert torch.equal(got.expert_ids, want.expert_ids), recipe
            # float32 holds 1 + e^x only to 6e-8, of which the square root is taken
            atol = 1e-5 if recipe.score == "sqrt_softplus" else 1e-7
            torch.testing.assert_close(got.weights.double(), want.weights, rtol=1e-5, atol=atol)


@each_exact_with("num_experts", [64, 256, 1024, 2048], interpreted=[64])
def test_rows_do_not_see_each_other(name: str, num_experts: int) -> None:
    torch.manual_seed(0)
    # a few distinct logits: ties in plenty, and sums that round
    logits = torch.randint(-30, 30, (100, num_experts)) / 7 + torch.randn(100, 1)
    bias = torch.randn(num_experts)
    recipes = _recipes(num_experts, 6, 8)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        found = [_route(name, logits[rows], recipe, bias) for recipe in recipes]
        # ids are small: as float64 they are themselves
        return tuple(part for f in found for part in (f.weights, f.expert_ids.double()))

    check_rows(name, 100, num_experts, run)


@EACH_EXACT
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(name: str, bad: float) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(9, 40), torch.randn(40)
    broken = logits.clone()
    broken[2, 7] = bad
    broken[5] = bad
    sound = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    for recipe in _recipes(40, 4, 4):
        got, want = (_route(name, rows, recipe, bias) for rows in (broken, logits))
        assert same_bits(got.weights[sound], want.weights[sound])
        assert torch.equal(got.expert_ids[sound], want.expert_ids[sound])
        # such a token still goes to experts that there are, to each but once
        for ids in got.expert_ids.tolist():
            assert len(set(ids)) == 4
            assert all(0 <= expert < 40 for expert in ids)


@EACH_EXACT
def test_strides_do_not_matter(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 40)
    recipe = RouterRecipe(num_experts=40, top_k=4)
    got = kernels(name).route(logits.t().contiguous().t(), recipe)
    want = kernels(name).route(logits, recipe)
    assert same_bits(got.weights, want.weights)
    counts, rows, places = kernels(name).sort_pairs(got.expert_ids.t().contiguous().t(), 40)
    for found, expected in zip(
        (counts, rows, places), kernels(name).sort_pairs(want.expert_ids, 40), strict=True
    ):
        assert torch.equal(found, expected)


@EACH_EXACT
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [
        (0, 2, 5), (1, 1, 1), (1, 8, 9), (7, 3, 64), (300, 8, 17), (40, 1, 1), (5, 4, 300),
        (512, 8, 9), (4097, 1, 3), (700, 6, 40),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_integers")
def test_pairs_are_sorted_by_expert_then_token(
    name: str, num_tokens: int, top_k: int, num_experts: int
) -> None:
    torch.manual_seed(0)
    # experts at the end, and some others, have no tokens
    ids = [torch.randperm(max(top_k, num_experts * 3 // 4))[:top_k] for _ in range(num_tokens)]
    expert_ids = torch.stack(ids) if ids else torch.zeros(0, top_k, dtype=torch.int64)
    counts, row_of_pair, pair_of_choice = kernels(name).sort_pairs(expert_ids, num_experts)
    assert counts.tolist() == [int((expert_ids == e).sum()) for e in range(num_experts)]
    pairs = sorted((int(expert_ids[t, c]), t) for t in range(num_tokens) for c in range(top_k))
    assert row_of_pair.tolist() == [token for _, token in pairs]
    assert pair_of_choice.shape == (num_tokens, top_k)
    for token in range(num_tokens):
        for choice in range(top_k):
            place = int(pair_of_choice[token, choice])
            assert pairs[place] == (int(expert_ids[token, choice]), token)


PADDED = pytest.mark.parametrize("name", ["reference", *TRITON[:1]])


@PADDED
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "top_k", "num_experts"),
    [(1, 0, 2, 5), (7, 3, 3, 64), (8, 8, 2, 4), (300, 277, 17, 20), (300, 0, 17, 20)],
)
@pytest.mark.usefixtures("poisoned_integers")
def test_rows_that_only_pad_are_not_counted_and_go_nowhere(
    name: str, num_tokens: int, num_rows: int, top_k: int, num_experts: int
) -> None:
    torch.manual_seed(0)
    device = kernels(name).device
    ids = [torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]
    expert_ids = torch.stack(ids).to(device)
    rows = torch.tensor([num_rows], dtype=torch.int32, device=device)
    sort_pairs = kernels(name).sort_pairs
    counts, row_of_pair, pair_of_choice = (
        part.cpu() for part in sort_pairs(expert_ids, num_experts, rows)
    )
    want = kernels("reference").sort_pairs(expert_ids[:num_rows].cpu(), num_experts)
    assert torch.equal(counts, want[0])
    assert torch.equal(row_of_pair[: num_rows * top_k], want[1])
    assert torch.equal(pair_of_choice[:num_rows], want[2])
    assert not pair_of_choice[num_rows:].any()


@EACH_EXACT
@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 7), (17, 33), (5, 100), (40, 1000)])
@pytest.mark.usefixtures("poisoned_empty")
def test_shared_weights_equal_float64(name: str, dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(0)
    hidden, gate = torch.randn(rows, size).to(dtype), torch.randn(size) * size**-0.5
    got = kernels(name).shared_weights(hidden, gate)
    want = torch.sigmoid((hidden.double() * gate.double()).sum(-1))
    assert got.dtype == torch.float32
    assert got.shape == (rows,)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@DTYPES
@each_exact_with("size", [64, 256, 1024, 2048], interpreted=[64, 2048])
def test_shared_weights_do_not_see_other_rows(name: str, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(100, size) * 10 ** (torch.rand(100, size) * 4 - 2)).to(dtype)
    hidden[7, 3] = float("nan")
    gate = torch.randn(size) / 50
    check_rows(name, 100, size, lambda rows: (kernels(name).shared_weights(hidden[rows], gate),))
    assert kernels(name).shared_weights(hidden, gate).isnan().nonzero().tolist() == [[7]]


@EACH_ON_A_GPU
def test_never_waits_for_the_device(name: str) -> None:
    torch.manual_seed(0)
    logits, bias, hidden = torch.randn(5, 32), torch.randn(32), torch.randn(5, 48)
    expert_ids = torch.randint(0, 3, (4200, 1))  # more than one kernel sorts
    with no_host_sync():
        for recipe in _recipes(32, 4, 4):
            _route(name, logits, recipe, bias)
        kernels(name).sort_pairs(expert_ids[:9], 3)
        kernels(name).sort_pairs(expert_ids, 3)
        kernels(name).shared_weights(hidden, hidden[0])

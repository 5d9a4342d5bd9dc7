"""From a router's logits to experts and weights, by recipe, in plain torch and float32.

Equal scores go to the lower expert id. Experts come out heaviest first, which is the order in which
`combine` adds them up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_serve.types import RouterRecipe, Routing


def sigmoid(values: Tensor) -> Tensor:
    # torch.sigmoid's vector body and scalar tail differ in the last bit: a row's place would show
    return 1.0 / (1.0 + torch.exp(-values))


def scores_of(logits: Tensor, recipe: RouterRecipe) -> Tensor:
    """Return the score that weighs each expert, float32 [num_tokens, num_experts]."""
    match recipe.score:
        case "softmax":
            return torch.softmax(logits, dim=-1)
        case "sigmoid":
            return sigmoid(logits)
        case "sqrt_softplus":
            # log(1 + e^x) without overflow
            softplus = logits.clamp_min(0) + torch.log(1.0 + torch.exp(-logits.abs()))
            return torch.sqrt(softplus)
        case "softmax_after_top_k":
            return logits


def route(logits: Tensor, recipe: RouterRecipe, selection_bias: Tensor | None = None) -> Routing:
    """Choose and weigh each token's experts.

    logits: float32 [num_tokens, num_experts]; selection_bias: float32 [num_experts], only for the
    choice. Groups and bias as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
    """
    scores = scores_of(logits, recipe)
    choice = scores if selection_bias is None else scores + selection_bias
    if recipe.top_k_groups < recipe.num_groups:
        choice = _mask_groups(choice, recipe)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : recipe.top_k]
    weights = scores.gather(1, ids)
    if recipe.score == "softmax_after_top_k":
        weights = torch.softmax(weights, dim=-1)
    if choice is not scores:
        # a bias may choose in another order than the weights have
        weights, order = torch.sort(weights, dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    if recipe.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + recipe.renormalise_eps)
    if recipe.scale != 1.0:
        weights = weights * recipe.scale
    return Routing(ids, weights)


def _mask_groups(choice: Tensor, recipe: RouterRecipe) -> Tensor:
    """Set the choice of all experts outside the best groups to -inf."""
    grouped = choice.view(-1, recipe.num_groups, recipe.num_experts // recipe.num_groups)
    top = torch.sort(grouped, dim=-1, descending=True).values[..., : recipe.group_score_top]
    group_scores = top.sum(-1)  # [num_tokens, num_groups]
    best = torch.sort(group_scores, dim=-1, descending=True, stable=True).indices
    is_kept = F.one_hot(best[:, : recipe.top_k_groups], recipe.num_groups).sum(1).bool()
    return grouped.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).view_as(choice)


def sort_pairs(
    expert_ids: Tensor, num_experts: int, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs (token, choice) of `expert_ids`, [num_tokens, top_k], by expert.

    Within an expert the tokens keep their order. Returns counts [num_experts], row_of_pair
    [num_pairs], the token of each sorted pair, and pair_of_choice [num_tokens, top_k], where each
    choice went; all int64. num_rows: int32 [1], the tokens behind the first so many only pad a
    batch: they are not counted, their pairs come last, and pair_of_choice is 0.
    """
    if num_rows is not None:
        is_padding = torch.arange(len(expert_ids), device=expert_ids.device) >= num_rows
        padded = expert_ids.masked_fill(is_padding[:, None], num_experts)
        counts, row_of_pair, pair_of_choice = sort_pairs(padded, num_experts + 1)
        return counts[:-1], row_of_pair, pair_of_choice.masked_fill(is_padding[:, None], 0)
    flat = expert_ids.flatten()
    order = torch.sort(flat, stable=True).indices  # [num_pairs]
    pair_of_choice = torch.empty_like(order)
    pair_of_choice[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.bincount(flat, minlength=num_experts)
    return counts, order // expert_ids.shape[1], pair_of_choice.view_as(expert_ids)


def shared_weights(hidden: Tensor, gate: Tensor) -> Tensor:
    """Return the sigmoid of each row's product with `gate`, float32 [num_rows] (Qwen2-MoE).

    hidden: [num_rows, size]; gate: float32 [size]. A plain sum over the row, which does not depend
    on other rows.
    """
    return sigmoid((hidden.float() * gate).sum(-1))

"""Memory layers in plain float64 PyTorch.

Sources: Memory Layers at Scale, arXiv 2412.09764, section 3; product keys, arXiv 1907.05242, section 3.2; PEER, arXiv
2407.04153, section 2. Where the papers leave room (ties, non-finite scores), the rules stated below are the contract.

Notation used in every docstring: T tokens, H heads, n keys of a half, D head dimension of a query, K entries of a
token, W width of a row.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["expert_lookup", "memory_lookup", "product_key_scores", "product_key_topk", "product_key_weights"]


def product_key_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Score of every one of the ``n * n`` keys: ``dot(query[:D/2], keys[h, 0, i]) + dot(query[D/2:], keys[h, 1, j])``.

    Args:
        query: ``[T, H, D]``, any floating dtype.
        keys: ``[H, 2, n, D / 2]``.

    Returns:
        float64 ``[T, H, n * n]``, pair ``(i, j)`` at ``i * n + j``. Differentiable.
    """
    halves = query.double().unflatten(-1, (2, keys.shape[-1]))
    half_scores = torch.einsum("thsd,hsnd->thsn", halves, keys.double())
    return (half_scores[:, :, 0, :, None] + half_scores[:, :, 1, None, :]).flatten(2)


def product_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best of all ``n * n`` keys (arXiv 2412.09764, section 3.1), by looking at every one.

    Three separate promises:

    Membership. The ``top_k`` highest scores of all pairs. A NaN half score ranks as +inf; a sum of opposite infinities
    ranks as -inf. Indices never repeat.

    Ties. Of equal scores, the lower index ``i * n + j`` is preferred.

    Order. Scores descend; of equal ones the lower index comes first.

    Args:
        query: ``[T, H, D]``, any floating dtype.
        keys: ``[H, 2, n, D / 2]``.
        top_k: keys per token and head, 1 to ``n * n``.

    Returns:
        float64 ``scores [T, H, top_k]``, differentiable, and int64 ``indices [T, H, top_k]``.
    """
    halves = query.double().unflatten(-1, (2, keys.shape[-1]))
    half_scores = torch.einsum("thsd,hsnd->thsn", halves, keys.double())
    ranked_halves = torch.where(half_scores.isnan(), torch.inf, half_scores)
    ranking = (ranked_halves[:, :, 0, :, None] + ranked_halves[:, :, 1, None, :]).flatten(2)
    ranking = torch.where(ranking.isnan(), -torch.inf, ranking)
    indices = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return product_key_scores(query, keys).gather(-1, indices), indices


def product_key_weights(
    query: Tensor,
    keys: Tensor,
    top_k: int,
    query_norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_norm: bool = False,
    score_activation: str = "softmax",
    temperature: float = 1.0,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What a memory layer makes of its queries: rows of the table and their weights, in this order of steps.

    1. Each half of a query is normalised: ``"rms"`` divides it by the root of its mean square, ``"layer"`` subtracts
       its mean and divides by its standard deviation (the biased one); then ``* norm_weight + norm_bias``.
    2. Channels are multiplied by ``query_mask``: 0 where dropped, ``1 / (1 - p)`` elsewhere.
    3. With ``key_norm`` each half key is scaled to length 1.
    4. :func:`product_key_topk`, of scores as they are.
    5. Scores are divided by ``temperature``. ``"softmax"``: the rows of a head share a weight of 1. ``"relu"``: each
       weighs its score where that is positive, else 0 (Memory Layers at Scale, arXiv 2412.09764, section 3, without
       the competition of its softmax).

    Args:
        query: ``[T, H, D]``, any floating dtype.
        keys: ``[H, 2, n, D / 2]``.
        top_k: rows per token and head.
        query_norm: ``"rms"``, ``"layer"`` or None.
        norm_weight: ``[D / 2]``; ones if None.
        norm_bias: ``[D / 2]``; zeros if None.
        query_mask: ``[T, H, D]``; ones if None.
        key_norm: whether half keys are scaled to length 1.
        score_activation: ``"softmax"`` or ``"relu"``.
        temperature: positive.
        norm_eps: added to mean squares and variances.

    Returns:
        int64 ``indices`` and float64 ``weights``, both ``[T, H, top_k]``.
    """
    halves = query.double().unflatten(-1, (2, keys.shape[-1]))
    if query_norm == "layer":
        halves = halves - halves.mean(dim=-1, keepdim=True)
    if query_norm is not None:
        halves = halves / (halves.square().mean(dim=-1, keepdim=True) + norm_eps).sqrt()
    if norm_weight is not None:
        halves = halves * norm_weight.double()
    if norm_bias is not None:
        halves = halves + norm_bias.double()
    query = halves.flatten(-2)
    if query_mask is not None:
        query = query * query_mask.double()
    keys = keys.double()
    if key_norm:
        keys = keys / keys.square().sum(dim=-1, keepdim=True).sqrt()
    scores, indices = product_key_topk(query, keys, top_k)
    scores = scores / temperature
    return indices, scores.softmax(dim=-1) if score_activation == "softmax" else scores.clamp(min=0)


def memory_lookup(
    values: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """Weighted sums of table rows, ``sum_k weights[t, k] * values[indices[t, k]]`` (arXiv 2412.09764, section 3.2).

    Args:
        values: ``[rows, W]``, any floating dtype.
        indices: ``[T, K]``, integers from 0 to ``rows - 1``; a row may stand several times in a bag. ``[E]`` with
            ``offsets``.
        weights: of the shape of ``indices``, any floating dtype; ones if None.
        offsets: ``[T]``, where each bag begins, the last one ending with the entries; None where all have K entries.
        mode: ``"sum"``, or ``"mean"``: a bag's sum by the number of its entries, 0 where it has none.
        padding_idx: entries that name this row, counted from the end where negative, are left out of their bags.
        include_last_offset: ``offsets`` is ``[T + 1]``, with the end of the last bag.

    Returns:
        float64 ``[T, W]``, differentiable.
    """
    values = values.double()
    factors = torch.ones(indices.shape, device=values.device) if weights is None else weights
    if offsets is None and mode == "sum" and padding_idx is None:
        return (values[indices.long()] * factors.double().unsqueeze(-1)).sum(dim=1)
    num_bags, bag_size = indices.shape if offsets is None else (len(offsets), 0)
    bounds = [bag * bag_size for bag in range(num_bags + 1)] if offsets is None else offsets.tolist()
    if offsets is not None and not include_last_offset:
        bounds.append(len(indices))
    rows, factors = indices.reshape(-1).long(), factors.double().reshape(-1, 1)
    padding_row = None if padding_idx is None else padding_idx % len(values)
    sums = [values[:0]]
    for first, end in pairwise(bounds):
        kept = [entry for entry in range(first, end) if rows[entry] != padding_row]
        total = (values[rows[kept]] * factors[kept]).sum(dim=0, keepdim=True)
        sums.append(total / max(len(kept), 1) if mode == "mean" else total)
    return torch.cat(sums)


def quantized_rows(values: Tensor, scales: Tensor) -> Tensor:
    """The rows that a table in 8 bits stands for, ``scales[i, d // group_size] * values[i, d]``.

    Args:
        values: ``[rows, W]``, int8 or float8_e4m3fn.
        scales: ``[rows, groups]``; the number of groups divides W.

    Returns:
        float64 ``[rows, W]``, for :func:`memory_lookup`.
    """
    return values.double() * scales.double().repeat_interleave(values.size(1) // scales.size(1), dim=1)


def expert_lookup(
    x: Tensor, values_in: Tensor, values_out: Tensor, indices: Tensor, weights: Tensor, activation: str = "gelu"
) -> Tensor:
    """Experts of one neuron, ``sum_k weights * act(dot(x, values_in[i])) * values_out[i]`` (PEER, arXiv 2407.04153).

    Args:
        x: ``[T, D]``, any floating dtype.
        values_in: ``[rows, D]``.
        values_out: ``[rows, W]``.
        indices: ``[T, K]``, integers from 0 to ``rows - 1``.
        weights: ``[T, K]``.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"identity"``.

    Returns:
        float64 ``[T, W]``, differentiable.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "identity": torch.clone,
    }
    hidden = (values_in.double()[indices.long()] * x.double().unsqueeze(1)).sum(dim=-1)
    return memory_lookup(values_out, indices, functions[activation](hidden) * weights.double())

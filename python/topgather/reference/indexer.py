"""The trained indexer of block attention in plain float64 PyTorch: its choice of blocks and the loss that trains it.

Sources: MiniMax Sparse Attention, arXiv 2606.13392 (a block scores what the best of its keys does; the loss draws the
indexer's distribution to the attention's); DeepSeek-V3.2, arXiv 2512.02556, section 2.1 (sums of ReLU over index heads,
dense warm-up and sparse stage). Where the papers leave room, the rules stated below are the contract.

Notation: B batch, Hi index heads, Hk index key heads (index head h reads key head ``h // (Hi // Hk)``), Hc choices
(choice c has the index heads from ``c * Hi // Hc`` on), Nq query tokens, Nk key tokens, Di dimension of an index head,
num_blocks = ceil(Nk / block_size).
"""

import torch
from torch import Tensor

__all__ = ["index_loss", "index_route", "index_scores"]


def index_scores(
    index_query: Tensor,
    index_key: Tensor,
    block_size: int,
    reduction: str = "max",
    is_causal: bool = True,
    num_choices: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score of every block for every query (arXiv 2606.13392; sums of ReLU: arXiv 2512.02556, equation 1).

    Args:
        index_query: ``[B, Hi, Nq, Di]``, any floating dtype.
        index_key: ``[B, Hk, Nk, Di]``.
        block_size: keys of a block, at least 1.
        reduction: ``"max"`` or ``"mean"`` of the products with the block's visible keys, or ``"relu_sum"``: the sum
            of their ReLU over the keys and the index heads of a choice.
        is_causal: whether query i, at position ``i + Nk - Nq``, sees only keys up to its own position.
        num_choices: Hc; Hi if None, and for ``"max"`` and ``"mean"`` always.
        weights: ``[B, Hi, Nq]``, factors of each index head's sum.

    Returns:
        Scores, float64 ``[B, Hc, Nq, num_blocks]``, and which blocks each query sees a key of, bool
        ``[Nq, num_blocks]``; the scores of other blocks are unspecified. Differentiable by plain autograd.
    """
    num_queries, num_keys = index_query.shape[2], index_key.shape[2]
    num_blocks = -(-num_keys // block_size)
    device = index_query.device
    key = index_key.double().repeat_interleave(index_query.shape[1] // index_key.shape[1], dim=1)
    products = index_query.double() @ key.transpose(-2, -1)
    position = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    last = position if is_causal else torch.full_like(position, num_keys)
    columns = torch.arange(num_blocks * block_size, device=device)
    is_visible = (columns <= last) & (columns < num_keys)
    is_visible = is_visible.unflatten(1, (num_blocks, block_size)) if num_blocks else is_visible[:, None]
    padded = torch.nn.functional.pad(products, (0, num_blocks * block_size - num_keys))
    padded = padded.unflatten(3, (num_blocks, block_size)) if num_blocks else padded[..., None, :]
    sees = is_visible.any(-1)[:, :num_blocks]
    if num_blocks == 0:
        return products.new_zeros((*products.shape[:3], 0)), sees
    if reduction == "max":
        lowest = torch.where(sees[..., None], -torch.inf, 0.0)
        scores = torch.where(is_visible, padded, lowest).amax(-1)
    elif reduction == "mean":
        scores = torch.where(is_visible, padded, 0.0).sum(-1) / is_visible.sum(-1).clamp(min=1)
    else:
        scores = torch.where(is_visible, padded.relu(), 0.0).sum(-1)
        if weights is not None:
            scores = weights.double()[..., None] * scores
        if num_choices is not None:
            scores = scores.unflatten(1, (num_choices, -1)).sum(2)
    return scores, sees


def index_route(
    index_query: Tensor,
    index_key: Tensor,
    block_size: int,
    top_k: int,
    reduction: str = "max",
    is_causal: bool = True,
    force_first: int = 0,
    force_last: int = 1,
    num_choices: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Blocks that the indexer chooses (arXiv 2606.13392). No gradient flows through the choice.

    Membership. A query may choose the blocks of which it sees a key. Where those are at most ``top_k`` it chooses all
    of them. Otherwise the first ``force_first`` and the newest ``force_last`` of them are chosen whatever they score,
    and of the others the highest-scoring ones. A NaN score ranks as +inf.

    Ties. Of equal scores, the lower block number is preferred.

    Order. Numbers ascend, and -1 fills the unused slots at the end.

    Args:
        index_query: ``[B, Hi, Nq, Di]``, any floating dtype.
        index_key: ``[B, Hk, Nk, Di]``.
        block_size: keys of a block, at least 1.
        top_k: slots per query, at least ``force_first + force_last``; may exceed num_blocks.
        reduction, is_causal, num_choices, weights: as in :func:`index_scores`.
        force_first: how many of the first blocks are always chosen.
        force_last: how many of the newest visible blocks are; without ``is_causal`` none is the newest.

    Returns:
        int32 ``[B, Hc, Nq, top_k]``.
    """
    scores, sees = index_scores(
        index_query.detach(), index_key.detach(), block_size, reduction, is_causal, num_choices, weights
    )
    num_blocks = scores.shape[-1]
    force_last = force_last if is_causal else 0
    chosen = torch.full((*scores.shape[:3], top_k), -1, dtype=torch.int32)
    scores = torch.where(scores.isnan(), torch.inf, scores).cpu()
    for query in range(scores.shape[2]):
        num_visible = int(sees[query].sum()) if num_blocks else 0
        blocks = list(range(num_visible))
        first = blocks[:force_first]
        last = blocks[max(num_visible - force_last, 0) :]
        others = [block for block in blocks if block not in first and block not in last]
        for batch in range(scores.shape[0]):
            for choice in range(scores.shape[1]):
                row = scores[batch, choice, query].tolist()
                best = [block for _, block in sorted((-row[block], block) for block in others)]
                taken = blocks if num_visible <= top_k else [*first, *best[: top_k - len(first) - len(last)], *last]
                chosen[batch, choice, query, : len(taken)] = torch.tensor(sorted(taken), dtype=torch.int32)
    return chosen.to(index_query.device)


def index_loss(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_indices: Tensor | None,
    block_size: int,
    reduction: str = "max",
    is_causal: bool = True,
    scale: float | None = None,
    index_scale: float | None = None,
    num_choices: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL divergence from the attention's mass by block to the indexer's distribution (arXiv 2606.13392).

    Of each choice and query, over the blocks that stand in ``block_indices`` and hold a visible key (all that hold one
    if it is None): the target is the share of each block in the weights ``exp(scale * dot(query, key) - lse)`` of the
    visible keys, averaged over the choice's query heads and normalised to 1; the indexer's distribution is the softmax
    of ``index_scale`` times the scores. A query without such a block, or whose weights are all 0, counts as 0.

    Args:
        index_query, index_key, block_size, reduction, is_causal, num_choices, weights: as in :func:`index_scores`.
        query: ``[B, Hq, Nq, D]``, of the attention; a choice has ``Hq // Hc`` neighbouring query heads.
        key: ``[B, Hkv, Nk, D]``.
        lse: ``[B, Hq, Nq]``, log of the sum of exponentials of the attention's scaled scores.
        block_indices: int ``[B, Hc, Nq, k]``, -1 for unused slots, or None.
        scale: factor on the attention's scores; ``D ** -0.5`` if None.
        index_scale: factor on the indexer's scores; ``Di ** -0.5`` if None.

    Returns:
        float64, the mean over batch, choices and queries. Plain autograd differentiates it with respect to index_query,
        index_key and weights; the target is a constant.
    """
    if block_indices is not None:
        num_choices = block_indices.shape[1]
    scores, sees = index_scores(index_query, index_key, block_size, reduction, is_causal, num_choices, weights)
    num_blocks, num_keys = scores.shape[-1], key.shape[2]
    if num_blocks == 0 or scores.numel() == 0:
        return scores.sum()
    with torch.no_grad():
        key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query.double() @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        position = torch.arange(query.shape[2], device=query.device)[:, None] + (num_keys - query.shape[2])
        is_late = torch.arange(num_keys, device=query.device) > position
        logits = logits.masked_fill(is_late, -torch.inf) if is_causal else logits
        mass = torch.where(logits == -torch.inf, 0.0, (logits - lse.double()[..., None]).exp())
        mass = torch.nn.functional.pad(mass, (0, num_blocks * block_size - num_keys))
        mass = mass.unflatten(3, (num_blocks, block_size)).sum(-1).unflatten(1, (scores.shape[1], -1)).mean(2)
        is_there = sees.expand_as(scores)
        if block_indices is not None:
            # One spare column takes the unused slots.
            slots = torch.where(block_indices >= 0, block_indices, num_blocks).long()
            is_chosen = torch.zeros((*scores.shape[:3], num_blocks + 1), dtype=torch.bool, device=scores.device)
            is_there = is_there & is_chosen.scatter(-1, slots, True)[..., :num_blocks]
        mass = torch.where(is_there, mass, 0.0)
        total = mass.sum(-1, keepdim=True)
        counts = is_there.any(-1) & (total[..., 0] > 0)
        target = torch.where(total > 0, mass / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    index_scale = index_query.shape[-1] ** -0.5 if index_scale is None else index_scale
    # Finite stand-ins for rows without a block: log_softmax of them would be NaN, and so would its gradient.
    predicted = torch.where(is_there, index_scale * scores, torch.where(counts[..., None], -torch.inf, 0.0))
    log_ratio = torch.where(target > 0, target.clamp(min=1e-300).log() - predicted.log_softmax(-1), 0.0)
    return torch.where(counts, (target * log_ratio).sum(-1), 0.0).mean()

"""Block attention (MoBA) in plain float64 PyTorch.

Source: MoBA, arXiv 2502.13189, section 2 (block partition, mean-pooled routing, current-block rule);
FlashMoBA, arXiv 2511.11571 (the same routing at small block sizes). Where the papers leave room (alignment of
unequal lengths, ties, short last blocks, non-finite scores), the rules stated below are the contract.

Notation used in every docstring: B batch, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv;
query head h reads key head ``h // (Hq // Hkv)``), Nq query tokens, Nk key tokens, D head dimension of query
and key, Dv head dimension of value, num_blocks = ceil(Nk / block_size).
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["block_centroids", "block_scores", "moba_attention", "moba_route"]


def block_centroids(
    key: Tensor, block_size: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> Tensor:
    """Mean key of each block (MoBA, arXiv 2502.13189, section 2.2).

    Args:
        key: ``[B, Hkv, Nk, D]``, any floating dtype; with ``cu_seqlens`` packed ``[total, Hkv, D]``.
        block_size: tokens in a block, at least 1. The last block may be short; its mean is over the tokens it
            has.
        cu_seqlens: ``[num_sequences + 1]``, boundaries of packed sequences, each of which has blocks of its own.
        max_seqlen: at least the longest of them.

    Returns:
        float64 ``[B, Hkv, num_blocks, D]``; packed ``[num_sequences, Hkv, ceil(max_seqlen / block_size), D]``, zeros
        past a sequence's last block. Differentiable: each token receives its block's gradient divided by the number of
        tokens in that block.
    """
    key = key.double()
    if cu_seqlens is not None:
        assert max_seqlen is not None
        num_blocks = -(-max_seqlen // block_size)
        packed = [key.new_zeros((0, key.shape[1], num_blocks, key.shape[2]))]
        for first, last in pairwise(cu_seqlens.tolist()):
            centroids = block_centroids(key[first:last].transpose(0, 1)[None], block_size)
            padding = key.new_zeros((1, key.shape[1], num_blocks - centroids.shape[2], key.shape[2]))
            packed.append(torch.cat([centroids, padding], dim=2))
        return torch.cat(packed)
    num_full_blocks = key.shape[2] // block_size
    full_blocks = key[:, :, : num_full_blocks * block_size].unflatten(2, (num_full_blocks, block_size))
    short_block = key[:, :, num_full_blocks * block_size :]
    centroids = full_blocks.mean(dim=3)
    if short_block.shape[2]:
        centroids = torch.cat([centroids, short_block.mean(dim=2, keepdim=True)], dim=2)
    return centroids


def block_scores(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Routing score of every block for every query: ``dot(query_i, centroid_j)``, unscaled and unmasked.

    Args:
        query: ``[B, Hq, Nq, D]``, any floating dtype.
        key: ``[B, Hkv, Nk, D]``.
        block_size: tokens in a block, at least 1.

    Returns:
        float64 ``[B, Hq, Nq, num_blocks]``.
    """
    centroids = _expand_heads(block_centroids(key, block_size), query.shape[1])
    return query.double() @ centroids.transpose(-2, -1)


def moba_route(
    query: Tensor,
    key: Tensor,
    block_size: int,
    top_k: int,
    is_causal: bool = True,
    force_first: int = 0,
    force_last: int = 1,
) -> Tensor:
    """Blocks each query attends to (MoBA, arXiv 2502.13189, section 2.2). No gradient flows through the
    choice.

    Positions are aligned bottom-right: query i stands at position ``p = i + Nk - Nq`` among the keys. Three
    separate promises:

    Membership. Causal: the query's own block ``p // block_size`` always counts as one of the ``top_k``; the
    others are the ``top_k - 1`` highest-scoring of the blocks wholly before it, and no later block is ever
    chosen. A query at a negative position selects nothing. Not causal: the ``top_k`` highest-scoring of all
    blocks, the own block not forced. Where fewer blocks are eligible than ``top_k``, all of them are chosen,
    a score of -inf included. A NaN score ranks as +inf.

    Forced blocks. The first ``force_first`` blocks, as far as they are eligible, and, causal, the ``force_last`` newest
    ones up to the own count as of the ``top_k`` whatever their scores; of ``force_last`` 1 that is the own block. One
    that is both counts once.

    Ties. Of equal scores, the lower block index is preferred.

    Order. Indices ascend, and -1 fills the unused slots at the end.

    Args:
        query: ``[B, Hq, Nq, D]``, any floating dtype.
        key: ``[B, Hkv, Nk, D]``.
        block_size: tokens in a block, at least 1.
        top_k: slots per query, at least 1; may exceed num_blocks.
        is_causal: whether a query sees only keys at or before its position.
        force_first: how many of the first blocks are forced.
        force_last: how many of the newest blocks are forced, at least 1; not looked at unless causal.

    Returns:
        int32 ``[B, Hq, Nq, top_k]``.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    device = query.device
    scores = block_scores(query.detach(), key.detach(), block_size)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    num_blocks = scores.shape[-1]
    block_idx = torch.arange(num_blocks, device=device)

    if is_causal:
        position = torch.arange(num_queries, device=device) + (num_keys - num_queries)
        own_block = torch.div(position, block_size, rounding_mode="floor")
        is_eligible = (block_idx <= own_block[:, None]) & (position >= 0)[:, None]
        is_forced = is_eligible & (block_idx > own_block[:, None] - force_last)
    else:
        is_eligible = torch.ones(num_queries, num_blocks, dtype=torch.bool, device=device)
        is_forced = torch.zeros_like(is_eligible)
    is_forced = is_forced | (is_eligible & (block_idx < force_first))

    # Two stable sorts, the less significant key first: eligibility cannot be folded into the score, because
    # an eligible block may itself score -inf. Stability is what sends ties to the lower index.
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = (is_eligible.int() + is_forced.int()).expand_as(scores)
    by_rank = rank.gather(-1, by_score).sort(dim=-1, descending=True, stable=True).indices
    preferred = by_score.gather(-1, by_rank)[..., :top_k]

    chosen = torch.where(is_eligible.expand_as(scores).gather(-1, preferred), preferred, num_blocks)
    chosen = chosen.sort(dim=-1).values
    chosen = torch.where(chosen < num_blocks, chosen, -1)
    padding = chosen.new_full((*chosen.shape[:-1], top_k - chosen.shape[-1]), -1)
    return torch.cat([chosen, padding], dim=-1).to(torch.int32)


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over exactly the keys it sees (MoBA, arXiv 2502.13189, section 2).

    Query i sees key t if ``t // block_size`` is among its ``block_indices`` and, when causal, ``t <= i + Nk -
    Nq``: the token-level causal mask always holds, so a routed block after the query's own contributes
    nothing. With a window it also sees the keys at its position and the ``window - 1`` before it. A key that is
    not seen has no influence, whatever its value; NaN and inf behave as in dense attention over the keys that
    are seen.

    A query that sees no key gives out 0, lse -inf and gradients 0. A query that sees keys whose scores are
    all -inf gives NaN, as plain softmax does.

    Args:
        query: ``[B, Hq, Nq, D]``, any floating dtype.
        key: ``[B, Hkv, Nk, D]``.
        value: ``[B, Hkv, Nk, Dv]``.
        block_indices: ``[B, H, Nq, k]``, integer, in any order, -1 for an unused slot. H divides Hq; query head h goes
            by the choices of head ``h // (Hq // H)``.
        block_size: tokens in a block, at least 1.
        is_causal: whether a query sees only keys at or before its position.
        scale: factor on the scores, any finite float; None means ``D ** -0.5``.
        softcap: positive; scaled scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118,
            section 2). None leaves them as they are.
        sinks: ``[Hq]``, any floating dtype: a logit per head that joins the softmax's sum and has no value (gpt-oss,
            arXiv 2508.10925; attention sinks, arXiv 2309.17453). lse does not count it.
        window: how many keys up to its own a query sees whatever its blocks, at least 1, causal only; None for none.

    Returns:
        out, float64 ``[B, Hq, Nq, Dv]``, and lse, the natural log of the sum of exponentials of the scaled and
        capped scores seen, float64 ``[B, Hq, Nq]``. Both are differentiable in query, key, value and sinks by
        plain autograd.
    """
    num_heads = query.shape[1]
    query = query.double()
    key = _expand_heads(key.double(), num_heads)
    value = _expand_heads(value.double(), num_heads)
    if scale is None:
        scale = query.shape[-1] ** -0.5

    visible = visible_keys(_expand_heads(block_indices, num_heads), key.shape[2], block_size, is_causal, window)
    sees_any = visible.any(dim=-1, keepdim=True)

    scores = _scores(query, key, visible) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(visible, scores, -torch.inf)
    # Finite stand-ins for rows that see nothing: softmax of an all -inf row is NaN, and so is its gradient.
    scores = torch.where(sees_any, scores, 0.0)
    logits = scores
    if sinks is not None:
        # A row that sees nothing has weights of 0 in any case, and a finite stand-in for its sink as well.
        logits = torch.cat([scores, torch.where(sees_any, sinks.double()[:, None, None], 0.0)], dim=-1)
    weights = torch.where(visible, logits.softmax(dim=-1)[..., : scores.shape[-1]], 0.0)
    out = _weighted_values(weights, value, visible)
    if key.shape[2] == 0:
        lse = scores.sum(dim=-1) - torch.inf
    else:
        lse = torch.where(sees_any[..., 0], scores.logsumexp(dim=-1), -torch.inf)
    return out, lse


def visible_keys(
    block_indices: Tensor, num_keys: int, block_size: int, is_causal: bool, window: int | None = None
) -> Tensor:
    """Dense mask of the keys each query sees.

    Args:
        block_indices: ``[B, Hq, Nq, k]``, integer, in any order, -1 for an unused slot.
        num_keys: Nk.
        block_size: tokens in a block, at least 1.
        is_causal: whether a query sees only keys at or before its position.
        window: how many keys up to its own a query sees whatever its blocks, causal only; None for none.

    Returns:
        bool ``[B, Hq, Nq, Nk]``.
    """
    num_queries = block_indices.shape[2]
    device = block_indices.device
    num_blocks = -(-num_keys // block_size)
    # One spare column past the last block takes the unused slots.
    slots = torch.where(block_indices >= 0, block_indices, num_blocks).long()
    is_chosen = torch.zeros(*slots.shape[:3], num_blocks + 1, dtype=torch.bool, device=device)
    is_chosen = is_chosen.scatter(-1, slots, True)

    key_position = torch.arange(num_keys, device=device)
    visible = is_chosen[..., key_position // block_size]
    if is_causal:
        query_position = torch.arange(num_queries, device=device) + (num_keys - num_queries)
        if window is not None:
            visible = visible | (key_position > query_position[:, None] - window)
        visible = visible & (key_position <= query_position[:, None])
    return visible


def _expand_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads so that query head h finds its own at index h."""
    return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1) if num_heads else tensor[:, :0]


def _scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """``query @ key^T``; entries not visible are unspecified."""
    if query.isfinite().all() and key.isfinite().all():
        return query @ key.transpose(-2, -1)
    # A matrix product would spread a NaN, through 0 * NaN, to pairs that do not see each other (in its
    # backward).
    seen_key = torch.where(visible[..., None], key[:, :, None], 0.0)
    seen_query = torch.where(visible[..., None], query[:, :, :, None], 0.0)
    return (seen_query * seen_key).sum(dim=-1)


def _weighted_values(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """``weights @ value`` in which a value that is not visible adds nothing, NaN and inf included."""
    if weights.isfinite().all() and value.isfinite().all():
        return weights @ value
    seen_value = torch.where(visible[..., None], value[:, :, None], 0.0)
    seen_weights = torch.where(visible, weights, 0.0)
    return (seen_weights[..., None] * seen_value).sum(dim=-2)

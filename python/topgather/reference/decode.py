"""Decoding in plain float64 PyTorch: rows of block attention over whole sequences.

Source: MoBA, arXiv 2502.13189, section 2; what a query sees and which blocks it chooses is
:func:`topgather.reference.moba_attention`'s and :func:`topgather.reference.moba_route`'s, query ``i`` of a sequence of
``L`` tokens, ``n`` of them new, standing at position ``L - n + i``.
"""

import torch
from torch import Tensor

from .moba import moba_attention, moba_route

__all__ = ["moba_decode", "moba_decode_route"]


def moba_decode_route(
    query: Tensor,
    key: Tensor,
    seq_lens: Tensor,
    block_size: int,
    top_k: int,
    num_tokens: Tensor | None = None,
    force_first: int = 0,
    force_last: int = 1,
) -> Tensor:
    """Blocks that the newest queries of each sequence choose.

    Args:
        query: ``[B, Hq, M, D]``, any floating dtype; the new tokens of each sequence, padded at the end.
        key: ``[B, Hkv, N, D]``, whole sequences, padded at the end.
        seq_lens: ``[B]``, integer, tokens of each sequence, the new ones included.
        block_size: tokens in a block, at least 1.
        top_k: slots per query, at least 1.
        num_tokens: ``[B]``, integer, how many of the M queries each sequence has; None for all.
        force_first, force_last: as in :func:`topgather.reference.moba_route`.

    Returns:
        int32 ``[B, Hq, M, top_k]``: ascending, -1 for unused slots and for queries that are padding.
    """
    chosen = torch.full((*query.shape[:3], top_k), -1, dtype=torch.int32, device=query.device)
    for b, (length, count) in enumerate(_lengths(query, seq_lens, num_tokens)):
        rows = moba_route(
            query[b : b + 1, :, :count], key[b : b + 1, :, :length], block_size, top_k, True, force_first, force_last
        )
        chosen[b, :, :count] = rows[0]
    return chosen


def moba_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    seq_lens: Tensor,
    block_size: int,
    num_tokens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest queries of each sequence over the blocks they chose.

    Args:
        query: ``[B, Hq, M, D]``, any floating dtype; the new tokens of each sequence, padded at the end.
        key: ``[B, Hkv, N, D]``, whole sequences, padded at the end.
        value: ``[B, Hkv, N, Dv]``.
        block_indices: ``[B, H, M, k]``, integer, in any order, -1 for an unused slot.
        seq_lens: ``[B]``, integer, tokens of each sequence, the new ones included.
        block_size: tokens in a block, at least 1.
        num_tokens: ``[B]``, integer, how many of the M queries each sequence has; None for all.
        scale: factor on the scores, any finite float; None means ``D ** -0.5``.
        softcap, sinks, window: as in :func:`topgather.reference.moba_attention`.

    Returns:
        out, float64 ``[B, Hq, M, Dv]``, and lse, float64 ``[B, Hq, M]``: 0 and -inf for queries that are padding or
        stand before the first token.
    """
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=query.device)
    for b, (length, count) in enumerate(_lengths(query, seq_lens, num_tokens)):
        rows = moba_attention(
            query[b : b + 1, :, :count],
            key[b : b + 1, :, :length],
            value[b : b + 1, :, :length],
            block_indices[b : b + 1, :, :count],
            block_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
        )
        out[b, :, :count], lse[b, :, :count] = rows[0][0], rows[1][0]
    return out, lse


def _lengths(query: Tensor, seq_lens: Tensor, num_tokens: Tensor | None) -> list[tuple[int, int]]:
    counts = [query.shape[2]] * query.shape[0] if num_tokens is None else num_tokens.tolist()
    return list(zip(seq_lens.tolist(), counts, strict=True))

"""The packed-sequence functions of the published MoBA packages, under their names and argument orders.

All pass on to :func:`topgather.moba_attention_varlen`; new code is better off calling that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import checks
from ..ops import BlockRouting, moba_attention_varlen

__all__ = ["flash_moba_attn_varlen_func", "flash_moba_varlen_func", "moba_attn_varlen", "parallel_moba"]


def flash_moba_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    moba_chunk_size: int,
    moba_topk: int,
    causal: bool = True,
) -> Tensor:
    """Drop-in for the function of that name in FlashMoBA (arXiv 2511.11571).

    ``flash_moba_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, chunk, topk, causal)`` is
    ``topgather.moba_attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, block_size=chunk, top_k=topk,
    is_causal=causal)``.

    Args:
        q: ``[total_q, Hq, D]``, float32, bfloat16, float16, or float64 (CPU only).
        k: ``[total_k, Hkv, D]`` of the same dtype; ``Hq`` a multiple of ``Hkv``.
        v: ``[total_k, Hkv, Dv]`` of the same dtype.
        cu_seqlens_q: int32 or int64 ``[num_sequences + 1]``, where each sequence's queries start and end.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: at least the longest sequence's queries, in tokens.
        max_seqlen_k: at least the longest sequence's keys, in tokens.
        moba_chunk_size: keys per block, at least 1.
        moba_topk: blocks per query, the own one included where ``causal``, at least 1.
        causal: whether later keys are hidden.

    Returns:
        ``[total_q, Hq, Dv]`` in the dtype of ``q``, differentiable once.

    Raises:
        TypeError, ValueError: as :func:`topgather.moba_attention_varlen`, in whose terms the errors speak:
            ``query``, ``key`` and ``value`` for ``q``, ``k`` and ``v``, ``block_size`` for
            ``moba_chunk_size``, ``top_k`` for ``moba_topk``, ``is_causal`` for ``causal``.
    """
    return moba_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        block_size=moba_chunk_size,
        top_k=moba_topk,
        is_causal=causal,
    )


def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Drop-in for the causal self-attention of that name in the code published with MoBA (arXiv 2502.13189).

    The one difference that matters: with ``moba_topk = 1`` the original runs full attention, while this
    attends to each query's own block, as ``top_k = 1`` means everywhere in topgather. For full attention call
    torch's, or give a ``moba_topk`` of at least the number of blocks.

    Args:
        q: ``[total, Hq, D]``, float32, bfloat16, float16, or float64 (CPU only).
        k: ``[total, Hkv, D]`` of the same dtype; ``Hq`` a multiple of ``Hkv``.
        v: ``[total, Hkv, Dv]`` of the same dtype.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where each sequence starts and ends.
        max_seqlen: at least the longest sequence, in tokens.
        moba_chunk_size: keys per block, at least 1.
        moba_topk: blocks per query, the own one included, at least 1.

    Returns:
        ``[total, Hq, Dv]`` in the dtype of ``q``, differentiable once.

    Raises:
        TypeError, ValueError: as :func:`topgather.moba_attention_varlen`, in whose terms the errors speak
            (see :func:`flash_moba_varlen_func`).
    """
    return flash_moba_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, moba_chunk_size, moba_topk, causal=True
    )


def flash_moba_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    moba_col_offsets: Tensor,
    moba_col_nnz: Tensor,
    moba_row_indices: Tensor,
    lg_block_m: int = 64,
    lg_block_n: int = 64,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Drop-in for the function of that name in FlashMoBA (arXiv 2511.11571): attention over blocks chosen elsewhere.

    The choice comes by columns: for each block of keys, the queries that attend to it. It is turned into one by
    queries, which :func:`topgather.moba_attention_varlen` takes as ``routing``; on CUDA that waits once, for the most
    blocks that a query has.

    Args:
        q: ``[total_q, Hq, D]``, float32, bfloat16, float16, or float64 (CPU only).
        k: ``[total_k, Hkv, D]`` of the same dtype; ``Hq`` a multiple of ``Hkv``.
        v: ``[total_k, Hkv, Dv]`` of the same dtype.
        cu_seqlens_q: int32 or int64 ``[num_sequences + 1]``, where each sequence's queries start and end.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: at least the longest sequence's queries, in tokens.
        max_seqlen_k: at least the longest sequence's keys, in tokens.
        moba_col_offsets: int64 or int32 ``[num_sequences, Hq, columns]``, where the queries of each block start in
            ``moba_row_indices``. Columns beyond a sequence's blocks are padding.
        moba_col_nnz: int32 or int64 of the same shape, how many there are.
        moba_row_indices: int32 or int64 ``[entries]``, queries counted from their sequence's first.
        lg_block_m: queries per tile there; nothing depends on it here.
        lg_block_n: keys per block, at least 1.
        dropout_p: 0, for there is no dropout here.
        softmax_scale: factor on the scores; ``D ** -0.5`` if None.
        causal: whether later keys are hidden, the last query being aligned with the last key.
        softcap: 0, for there is none here.
        alibi_slopes: None, for there are none here.
        deterministic: whether gradients are the same bits every time.
        return_attn_probs: whether to return ``lse`` too.

    Returns:
        ``[total_q, Hq, Dv]`` in the dtype of ``q``, differentiable once; with ``return_attn_probs`` also ``lse [Hq,
        total_q]``, and None in the place of the probabilities that the original returns for tests of its dropout.

    Raises:
        NotImplementedError: a ``dropout_p``, ``softcap`` or ``alibi_slopes`` that asks for something.
        TypeError, ValueError, IndexError: as :func:`topgather.moba_attention_varlen`, in whose terms the errors speak;
            also for a choice whose shapes, dtypes or numbers do not fit.
    """
    for name, value, is_unused in (
        ("dropout_p", dropout_p, dropout_p == 0),
        ("softcap", softcap, softcap == 0),
        ("alibi_slopes", alibi_slopes, alibi_slopes is None),
    ):
        if not is_unused:
            raise NotImplementedError(f"flash_moba_attn_varlen_func has no {name} in topgather, got {value!r}")
    checks.check_flag("return_attn_probs", return_attn_probs)
    checks.check_count("lg_block_n", lg_block_n)
    columns = (moba_col_offsets, moba_col_nnz, moba_row_indices)
    routing = _routing_of_columns(q, cu_seqlens_q, cu_seqlens_k, *columns, lg_block_n)
    options: dict[str, Any] = {"block_size": lg_block_n, "is_causal": causal, "scale": softmax_scale}
    out, lse = moba_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **options,
        return_lse=True,
        routing=routing,
        # False asks for nothing: torch.use_deterministic_algorithms holds here too.
        deterministic=deterministic or None,
    )
    return (out, lse, None) if return_attn_probs else out


def _routing_of_columns(
    q: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    offsets: Tensor,
    counts: Tensor,
    rows: Tensor,
    block_size: int,
) -> BlockRouting:
    """The choice by queries, from the one by blocks."""
    named = {"moba_col_offsets": offsets, "moba_col_nnz": counts, "moba_row_indices": rows}
    for name, tensor in named.items():
        checks.check_tensor(name, tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {tensor.dtype}")
        checks.check_same_device(name, tensor, "q", q)
    checks.check_tensor("q", q)
    checks.check_ndim("q", q, 3, "[tokens, heads, head_dim]")
    checks.check_tensor("cu_seqlens_q", cu_seqlens_q)
    checks.check_tensor("cu_seqlens_k", cu_seqlens_k)
    checks.check_ndim("moba_row_indices", rows, 1, "[entries]")
    num_tokens, num_heads = q.shape[:2]
    for name in ("moba_col_offsets", "moba_col_nnz"):
        checks.check_ndim(name, named[name], 3, "[sequences, heads, columns]")
        checks.check_size(name, named[name], 0, cu_seqlens_q.numel() - 1, "sequences of cu_seqlens_q")
        checks.check_size(name, named[name], 1, num_heads, "heads of q")
    checks.check_size("moba_col_nnz", counts, 2, offsets.size(2), "columns of moba_col_offsets")

    num_columns = offsets.size(2)
    blocks = torch.arange(num_columns, device=q.device)
    num_blocks = -(-cu_seqlens_k.diff().long() // block_size)
    counts = torch.where(blocks < num_blocks[:, None, None], counts.long(), 0)
    ends = offsets.long() + counts
    if bool(((counts < 0) | ((counts > 0) & ((offsets < 0) | (ends > rows.numel())))).any()):
        raise IndexError(f"moba_col_offsets and moba_col_nnz must lie within the {rows.numel()} moba_row_indices")
    # One entry for each query of each block.
    column = torch.repeat_interleave(counts.flatten())
    first = counts.flatten().cumsum(0) - counts.flatten()
    place = torch.arange(column.numel(), device=q.device) - first[column] + offsets.flatten().long()[column]
    row, sequence = rows.long()[place], column // (num_heads * num_columns)
    starts = cu_seqlens_q.long()
    if bool(((row < 0) | (row >= starts.diff()[sequence])).any()):
        raise IndexError("moba_row_indices must be at least 0 and below the queries of their sequence")
    query = column // num_columns % num_heads * num_tokens + starts[sequence] + row
    # The entries of a query side by side, in order of their blocks.
    query, order = query.sort(stable=True)
    per_query = torch.bincount(query, minlength=num_heads * num_tokens)
    most = int(per_query.max()) if per_query.numel() > 0 else 0
    slot = torch.arange(query.numel(), device=q.device) - (per_query.cumsum(0) - per_query)[query]
    block_indices = torch.full((num_heads * num_tokens, max(most, 1)), -1, dtype=torch.int32, device=q.device)
    block_indices[query, slot] = (column % num_columns)[order].to(torch.int32)
    return BlockRouting(block_indices.view(num_heads, num_tokens, -1), block_size)


def parallel_moba(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, chunk_size: int, topk: int
) -> Tensor:
    """Drop-in for the causal self-attention of that name in flash-linear-attention.

    ``topk`` counts the query's own block there as here. With ``topk = 1`` the original attends to everything before,
    and so does this: it passes on a ``top_k`` of all blocks then. From 2 on the numbers are the same.

    Args:
        q: ``[B, T, Hq, D]``, float32, bfloat16, float16, or float64 (CPU only); B is 1 with ``cu_seqlens``.
        k: ``[B, T, Hkv, D]`` of the same dtype; ``Hq`` a multiple of ``Hkv``.
        v: ``[B, T, Hkv, Dv]`` of the same dtype.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where each sequence starts and ends; one sequence for each
            of the batch if None.
        max_seqlen: at least the longest sequence, in tokens.
        chunk_size: keys per block, at least 1.
        topk: blocks per query, the own one included, at least 1; 1 means all.

    Returns:
        ``[B, T, Hq, Dv]`` in the dtype of ``q``, differentiable once.

    Raises:
        ValueError: a wrong number of dimensions, or ``cu_seqlens`` with a batch above 1.
        TypeError, ValueError: as :func:`topgather.moba_attention_varlen`, in whose terms the errors speak.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor)
        checks.check_ndim(name, tensor, 4, "[batch, tokens, heads, head_dim]")
        checks.check_size(name, tensor, 0, q.size(0), "batch of q")
    checks.check_count("max_seqlen", max_seqlen, 0)
    checks.check_count("chunk_size", chunk_size)
    checks.check_count("topk", topk)
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        max_seqlen = max(max_seqlen, length)
    elif batch != 1:
        raise ValueError(f"q must have a batch of 1 with cu_seqlens, got shape {tuple(q.shape)}")
    top_k = max(-(-max_seqlen // chunk_size), 1) if topk == 1 else topk
    out = moba_attn_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, max_seqlen, chunk_size, top_k)
    return out.unflatten(0, (batch, length))

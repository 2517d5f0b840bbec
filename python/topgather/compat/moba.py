"""The packed-sequence functions of the published MoBA packages, under their names and argument orders.

Both pass straight on to :func:`topgather.moba_attention_varlen`; new code is better off calling that.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import moba_attention_varlen

__all__ = ["flash_moba_varlen_func", "moba_attn_varlen"]


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

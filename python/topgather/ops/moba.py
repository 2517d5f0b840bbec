"""Block attention (MoBA): each query attends to its own key block and to the best-scoring others.

Sources: MoBA, arXiv 2502.13189, section 2.2 (block choice by mean-pooled keys, causality); FlashMoBA, arXiv 2511.11571
(small blocks, tiled top-k, gather-and-densify). The plain definition in float64 is :mod:`topgather.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _checks as checks
from . import _cuda
from . import _tensors as tensors
from ._library import call, sum_dtype
from ._spec import Meta, Op, register

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ops = torch.ops.topgather

MAX_HEAD_DIM_ON_CUDA = 256


@dataclass(frozen=True)
class BlockRouting:
    """Which key blocks each query attends to.

    Made by :func:`moba_route`, or by hand to bring another pattern.

    Args:
        block_indices: int32 ``[B, Hq, Nq, top_k]`` (packed: ``[Hq, total_q, top_k]``, blocks counted from each
            sequence's first key). ``-1`` marks an unused slot. :func:`moba_route` returns rows in ascending order,
            padded at the end; attention takes any order, but no block twice in a row.
        block_size: keys per block, the one the numbers refer to.

    Raises:
        TypeError: ``block_indices`` is not an int32 tensor, or ``block_size`` not an int.
        ValueError: ``block_indices`` has not 3 or 4 dimensions, or ``block_size`` is below 1.
    """

    block_indices: Tensor
    block_size: int

    def __post_init__(self) -> None:
        checks.check_tensor("block_indices", self.block_indices)
        if self.block_indices.dtype != torch.int32:
            raise TypeError(f"block_indices must have dtype torch.int32, got {self.block_indices.dtype}")
        if self.block_indices.ndim not in (3, 4):
            raise ValueError(
                "block_indices must have 4 dimensions [B, Hq, Nq, top_k], or 3 for packed sequences, "
                f"got shape {tuple(self.block_indices.shape)}"
            )
        checks.check_count("block_size", self.block_size)

    @property
    def top_k(self) -> int:
        """Slots per query."""
        return self.block_indices.size(-1)


def block_centroids(
    key: Tensor, block_size: int = 128, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> Tensor:
    """Mean key of every block, the vectors that blocks are chosen by (MoBA, arXiv 2502.13189, equation 6).

    Args:
        key: ``[B, Hkv, Nk, D]``, or packed ``[total, Hkv, D]`` with ``cu_seqlens``; float32, bfloat16, float16 or
            float64, contiguous in its last dimension.
        block_size: keys per block, at least 1. Blocks of a packed sequence start with the sequence. The last block may
            be short; its mean is over the keys it has.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where packed sequences start and end. None: ``key`` is
            dense.
        max_seqlen: at least the longest packed sequence, in tokens. Comes with ``cu_seqlens`` and only then.

    Returns:
        ``[B, Hkv, ceil(Nk / block_size), D]``, float32 (float64 for float64); packed ``[num_sequences, Hkv,
        ceil(max_seqlen / block_size), D]``, a sequence's blocks by the numbers that :func:`moba_route_varlen` gives
        them, zeros past its last. Differentiable with respect to ``key``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or ``block_size``; ``cu_seqlens`` that do not start with 0, decrease,
            or do not end with the number of tokens; a ``max_seqlen`` that is too small. What ``cu_seqlens`` holds is
            looked at on the CPU alone; on CUDA blocks that there is no room for are left out.
    """
    checks.check_tensor("key", key)
    checks.check_count("block_size", block_size)
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen must be None where cu_seqlens is, got {max_seqlen!r}")
        return call(_ops.block_centroids.default, key, block_size)
    checks.check_tensor("cu_seqlens", cu_seqlens)
    checks.check_count("max_seqlen", max_seqlen, least=0)
    return call(_ops.block_centroids.default, key, block_size, cu_seqlens, max_seqlen)


def moba_route(
    query: Tensor, key: Tensor, block_size: int = 128, top_k: int = 8, is_causal: bool = True
) -> BlockRouting:
    """Choose each query's key blocks (MoBA, arXiv 2502.13189, section 2.2).

    A block's score is the dot product of the query with the block's mean key, in float32 (float64 for float64). Causal:
    query ``i`` stands at position ``i + Nk - Nq``; the block it stands in always counts as one of ``top_k``, the others
    are the best among the blocks wholly before it. Not causal: the ``top_k`` best of all blocks. Equal scores go to the
    lower block number, a NaN score ranks as +inf. Where there are fewer blocks than ``top_k``, all are chosen; a query
    at a negative position chooses none. No gradient flows through the choice.

    Args:
        query: ``[B, Hq, Nq, D]``, float32, bfloat16, float16 or float64, contiguous in its last dimension.
        key: ``[B, Hkv, Nk, D]`` of the same dtype; ``Hq`` a multiple of ``Hkv``.
        block_size: keys per block, at least 1.
        top_k: blocks per query, the own one included, at least 1.
        is_causal: whether later keys are hidden.

    Returns:
        A :class:`BlockRouting` with ``block_indices`` int32 ``[B, Hq, Nq, top_k]``, each row ascending and padded at
        its end with -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device, ``block_size`` or ``top_k``; more than 2**31 - 1 numbers of
            ``block_indices`` for a ``top_k`` above the number of blocks.
    """
    _check_options(query, key, block_size, is_causal)
    checks.check_count("top_k", top_k)
    return BlockRouting(call(_ops.moba_route.default, query, key, block_size, top_k, is_causal), block_size)


def moba_route_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int = 128,
    top_k: int = 8,
    is_causal: bool = True,
) -> BlockRouting:
    """:func:`moba_route` (MoBA, arXiv 2502.13189, section 2.2) for sequences packed one after the other.

    Args:
        query: ``[total_q, Hq, D]``, otherwise as in :func:`moba_route`.
        key: ``[total_k, Hkv, D]``.
        cu_seqlens_q: int32 or int64 ``[num_sequences + 1]``, boundaries of the sequences' queries, as in
            :func:`moba_attention_varlen`.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: at least the longest sequence's queries, in tokens.
        max_seqlen_k: at least the longest sequence's keys, in tokens.
        block_size: keys per block, at least 1. Blocks start afresh in every sequence.
        top_k: blocks per query, the own one included, at least 1.
        is_causal: whether later keys are hidden.

    Returns:
        A :class:`BlockRouting` with ``block_indices`` int32 ``[Hq, total_q, top_k]``; blocks are counted from the
        first key of the query's own sequence.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option, or boundaries that do not delimit the tokens.
    """
    _check_options(query, key, block_size, is_causal)
    _check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_count("top_k", top_k)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    block_indices = call(_ops.moba_route.default, query, key, block_size, top_k, is_causal, *sequences)
    return BlockRouting(block_indices, block_size)


class _Options(TypedDict, total=False):
    """What every overload of attention takes by name, beside the arguments it lists."""

    routing: BlockRouting | None
    deterministic: bool | None
    softcap: float | None
    sinks: Tensor | None


# fmt: off
@overload
def moba_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., **options: Unpack[_Options],
) -> Tensor: ...
@overload
def moba_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., *, return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., return_lse: bool = ..., **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int = 128,
    top_k: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    routing: BlockRouting | None = None,
    deterministic: bool | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the ``top_k`` best key blocks of each query (MoBA, arXiv 2502.13189, section 2.2).

    The softmax runs over exactly the visible keys of the chosen blocks; with ``top_k`` at least the number of blocks
    this is dense attention. Blocks are chosen as :func:`moba_route` says, or given by ``routing``.

    Args:
        query: ``[B, Hq, Nq, D]``, float32, bfloat16, float16, or float64 (CPU only). Any strides with a contiguous
            last dimension, so the transposed view of a ``[B, N, H, D]`` tensor costs no copy.
        key: ``[B, Hkv, Nk, D]`` of the same dtype. ``Hq`` is a multiple of ``Hkv``; keys are not expanded.
        value: ``[B, Hkv, Nk, Dv]`` of the same dtype.
        block_size: keys per block, at least 1; the last block may be short.
        top_k: blocks per query, the own one included. None: every block, which is dense attention, unless ``routing``
            is given. More than there are is the same as all.
        is_causal: whether query ``i``, at position ``i + Nk - Nq``, sees only keys up to its own position.
        scale: factor on the scores; ``D ** -0.5`` if None.
        return_lse: also return the log-sum-exp of each query's scaled scores.
        routing: a choice of blocks to use instead of making one. Under ``is_causal`` later keys stay hidden whatever
            it names.
        deterministic: whether gradients are the same bits every time. On CUDA gradients are otherwise summed by atomic
            additions, in whatever order they come; the deterministic way moves more memory. None follows
            ``torch.use_deterministic_algorithms``. The CPU is always deterministic.
        softcap: if given, scaled scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118, section
            2); positive and finite. Blocks are chosen by scores as they are.
        sinks: ``[Hq]``, query's dtype or float32 (float64 for float64): a logit per head that joins each row's softmax
            and has no value (gpt-oss, arXiv 2508.10925; StreamingLLM, arXiv 2309.17453, section 3.3). ``lse`` does not
            count it.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in query's dtype, laid out as query is; with ``return_lse`` also
        ``lse [B, Hq, Nq]``, float32 (float64 for float64), natural logarithm. A query that sees no key gets 0 and
        -inf, and gradients of 0. Both are differentiable with respect to query, key, value and sinks, once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; ``top_k`` and ``routing`` given and not agreeing;
            ``routing`` naming a block twice for a query.
        IndexError: ``routing`` naming a block that does not exist.

    On CUDA what a tensor holds is not waited for: a query whose ``routing`` names a block that does not exist, or one
    twice, gets NaN in ``out``, ``lse`` and its gradient instead of an error.
    """
    _check_options(query, key, block_size, is_causal)
    checks.check_tensor("value", value)
    checks.check_scale(scale)
    checks.check_flag("return_lse", return_lse)
    _check_routing(routing, block_size, top_k)
    is_deterministic = _is_deterministic(deterministic)
    _check_scores(softcap, sinks)
    if routing is None:
        checks.check_ndim("key", key, 4, "[batch, heads, tokens, dim]")
        slots = _slots(top_k, key.size(2), block_size)
        block_indices = call(_ops.moba_route.default, query, key, block_size, slots, is_causal)
    else:
        block_indices = routing.block_indices
    out, lse, _ = call(
        _ops.moba_attention.default, query, key, value, block_indices, block_size, is_causal, _scale_of(scale, query),
        deterministic=is_deterministic, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return (out, lse) if return_lse else out


# fmt: off
@overload
def moba_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., **options: Unpack[_Options],
) -> Tensor: ...
@overload
def moba_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., *, return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, block_size: int = ..., top_k: int | None = ..., is_causal: bool = ...,
    scale: float | None = ..., return_lse: bool = ..., **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def moba_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int = 128,
    top_k: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    routing: BlockRouting | None = None,
    deterministic: bool | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`moba_attention` (MoBA, arXiv 2502.13189, section 2.2) for sequences packed one after the other.

    Args:
        query: ``[total_q, Hq, D]``, otherwise as in :func:`moba_attention`.
        key: ``[total_k, Hkv, D]``.
        value: ``[total_k, Hkv, Dv]``.
        cu_seqlens_q: int32 or int64 ``[num_sequences + 1]``: sequence ``s`` has the queries from ``cu_seqlens_q[s]`` to
            before ``cu_seqlens_q[s + 1]``. Starts with 0, never decreases, ends with ``total_q``. Sequences may be
            empty.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: at least the longest sequence's queries, in tokens.
        max_seqlen_k: at least the longest sequence's keys, in tokens.
        block_size, top_k, is_causal, scale, return_lse: as in :func:`moba_attention`. Blocks start afresh in every
            sequence.
        routing: as in :func:`moba_attention`, with ``block_indices [Hq, total_q, top_k]``.
        deterministic, softcap, sinks: as in :func:`moba_attention`.

    Returns:
        ``out [total_q, Hq, Dv]``; with ``return_lse`` also ``lse [Hq, total_q]``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`moba_attention`; ``ValueError`` also for boundaries that do not
            delimit the tokens.

    On CUDA boundaries are read on the device alone: what does not delimit the tokens is clamped to what is there, and
    a query of no sequence gets NaN. With ``top_k=None`` only as
    many blocks as ``max_seqlen_k`` tells of are attended to.
    """
    _check_options(query, key, block_size, is_causal)
    checks.check_tensor("value", value)
    checks.check_scale(scale)
    _check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_flag("return_lse", return_lse)
    _check_routing(routing, block_size, top_k)
    is_deterministic = _is_deterministic(deterministic)
    _check_scores(softcap, sinks)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if routing is None:
        checks.check_ndim("key", key, 3, "[total_tokens, heads, dim]")
        # On CUDA nobody sees whether a sequence is longer than max_seqlen_k; a top_k counts on no such bound.
        is_bound_known = top_k is None or not _cuda.gets(key)
        longest = torch.sym_min(max_seqlen_k, key.size(0)) if is_bound_known else key.size(0)
        slots = _slots(top_k, longest, block_size)
        block_indices = call(_ops.moba_route.default, query, key, block_size, slots, is_causal, *sequences)
    else:
        block_indices = routing.block_indices
    out, lse, _ = call(
        _ops.moba_attention.default, query, key, value, block_indices, block_size, is_causal, _scale_of(scale, query),
        *sequences, is_deterministic, softcap, sinks,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _slots(top_k: int | None, num_keys: int, block_size: int) -> int:
    """Blocks that ``top_k``, or all of them, can be of a sequence of so many keys: slots of a choice, at least one."""
    num_blocks = -(-num_keys // block_size)
    least, most = (torch.sym_min, torch.sym_max) if is_compiling() else (min, max)
    return most(num_blocks if top_k is None else least(top_k, num_blocks), 1)


def _scale_of(scale: float | None, query: Tensor) -> float:
    if scale is None:
        # A head_dim of 0 is refused by the op, in its own words.
        return max(query.size(-1), 1) ** -0.5
    return float(scale)


def _is_deterministic(deterministic: bool | None) -> bool:
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    checks.check_flag("deterministic", deterministic)
    return deterministic


def _check_options(query: Tensor, key: Tensor, block_size: int, is_causal: bool) -> None:
    checks.check_tensor("query", query)
    checks.check_tensor("key", key)
    checks.check_count("block_size", block_size)
    checks.check_flag("is_causal", is_causal)


def _check_scores(softcap: float | None, sinks: Tensor | None) -> None:
    checks.check_softcap(softcap)
    if sinks is not None:
        checks.check_tensor("sinks", sinks)


def _check_packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> None:
    checks.check_tensor("cu_seqlens_q", cu_seqlens_q)
    checks.check_tensor("cu_seqlens_k", cu_seqlens_k)
    checks.check_count("max_seqlen_q", max_seqlen_q, least=0)
    checks.check_count("max_seqlen_k", max_seqlen_k, least=0)


def _check_routing(routing: BlockRouting | None, block_size: int, top_k: int | None) -> None:
    if routing is None:
        if top_k is not None:
            checks.check_count("top_k", top_k)
        return
    if not isinstance(routing, BlockRouting):
        raise TypeError(f"routing must be a topgather.BlockRouting or None, got {type(routing).__name__}")
    if routing.block_size != block_size:
        raise ValueError(f"block_size must be that of routing, {routing.block_size}, got {block_size}")
    if top_k is not None and top_k != routing.top_k:
        raise ValueError(f"top_k must be that of routing, {routing.top_k}, or None, got {top_k}")


# --- the ops --------------------------------------------------------------------------------------------------------


def _check(
    query: Tensor,
    key: Tensor,
    block_size: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    value: Tensor | None = None,
    block_indices: Tensor | None = None,
    top_k: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> None:
    """What types, shapes, dtypes, strides and devices can say about a call of an op that has these arguments."""
    checks.check_count("block_size", block_size)
    checks.check_count("top_k", top_k)
    checks.check_count("max_seqlen_q", max_seqlen_q, least=0)
    checks.check_count("max_seqlen_k", max_seqlen_k, least=0)
    checks.check_scale(scale)
    checks.check_softcap(softcap)
    packed = cu_seqlens_q is not None
    named = [("query", query), ("key", key)]
    if value is not None:
        named.append(("value", value))
    checks.check_operands(
        named, 3 if packed else 4, "[total_tokens, heads, dim]" if packed else "[batch, heads, tokens, dim]"
    )
    # Sizes are compared here, so that a call that is right costs little.
    query_shape, key_shape = query.shape, key.shape
    if not packed and key_shape[0] != query_shape[0]:
        checks.check_size("key", key, 0, query_shape[0], "batch size of query")
    if key_shape[-1] != query_shape[-1]:
        checks.check_size("key", key, -1, query_shape[-1], "head_dim of query")
    if query_shape[-1] < 1:
        raise ValueError(f"query must have a head_dim of at least 1, got shape {tuple(query_shape)}")
    if value is not None:
        for dim, meaning in enumerate(("tokens", "heads") if packed else ("batch size", "heads", "tokens")):
            if value.size(dim) != key_shape[dim]:
                checks.check_size("value", value, dim, key_shape[dim], f"{meaning} of key")
    num_query_heads, num_kv_heads = query_shape[1], key_shape[1]
    if num_kv_heads < 1 or num_query_heads < 1 or num_query_heads % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of key's heads, at least one, got {num_query_heads} query heads "
            f"and {num_kv_heads} key heads"
        )
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
        checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query)
        checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "query", query)
        checks.check_size("cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.size(0), "size of cu_seqlens_q")
    if sinks is not None:
        checks.check_sinks(sinks, num_query_heads, query)
    if block_indices is None:
        return
    if block_indices.dtype != torch.int32:
        raise TypeError(f"block_indices must have dtype torch.int32, got {block_indices.dtype}")
    checks.check_same_device("block_indices", block_indices, "query", query)
    leading = _per_query(query)
    if block_indices.shape[:-1] != leading:
        raise ValueError(f"block_indices must have shape {list(leading)} + [top_k], got {tuple(block_indices.shape)}")
    if block_indices.size(-1) < 1:
        raise ValueError("block_indices must have at least one slot per query, got a last dimension of 0")


def _check_route(
    query: Tensor,
    key: Tensor,
    block_size: int,
    top_k: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    _check(
        query, key, block_size, cu_seqlens_q, cu_seqlens_k, top_k=top_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    num_keys = key.size(2) if cu_seqlens_k is None else key.size(0)
    checks.check_slots(top_k, _per_query(query), _slots(None, num_keys, block_size))


def _check_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_size: int,
    scale: float,
    softcap: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_terms: Tensor | None,
) -> None:
    bounds = (cu_seqlens_q, cu_seqlens_k)
    _check(query, key, block_size, *bounds, value, block_indices, 1, scale, softcap, None, max_seqlen_q, max_seqlen_k)
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        checks.check_same_dtype(name, tensor, "query", query)
        checks.check_same_device(name, tensor, "query", query)
        expected = (*query.shape[:-1], value.size(-1))
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have query's shape but for value_dim, {list(expected)}, got {tuple(tensor.shape)}"
            )
    for name, numbers, last in (("lse", lse, ()), ("grad_lse", grad_lse, ()), ("softmax_terms", softmax_terms, (2,))):
        if numbers is not None:
            checks.check_per_query(name, numbers, _per_query(query, *last), query)


def _check_centroids(key: Tensor, block_size: int, cu_seqlens: Tensor | None, max_seqlen: int) -> None:
    is_packed = cu_seqlens is not None
    layout = "[total_tokens, heads, dim]" if is_packed else "[batch, heads, tokens, dim]"
    checks.check_ndim("key", key, 3 if is_packed else 4, layout)
    checks.check_floating("key", key)
    checks.check_contiguous_rows("key", key)
    checks.check_count("block_size", block_size)
    checks.check_count("max_seqlen", max_seqlen, least=0)
    if cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, "key", key)


def _check_centroids_content(key: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> None:
    if cu_seqlens is not None:
        checks.check_boundaries("cu_seqlens", cu_seqlens, key.size(0), "key", "max_seqlen", max_seqlen)


def _check_content(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        checks.check_boundaries("cu_seqlens_q", cu_seqlens_q, query.size(0), "query", "max_seqlen_q", max_seqlen_q)
        checks.check_boundaries("cu_seqlens_k", cu_seqlens_k, key.size(0), "key", "max_seqlen_k", max_seqlen_k)


def _cuda_check(query: Tensor, value: Tensor | None = None) -> None:
    _cuda.check_dtype("query", query)
    for name, tensor in (("head_dim", query), ("value_dim", value)):
        if tensor is not None and tensor.size(-1) > MAX_HEAD_DIM_ON_CUDA:
            raise ValueError(f"{name} must be at most {MAX_HEAD_DIM_ON_CUDA} on CUDA, got {tensor.size(-1)}")


def _per_query(query: Tensor, *last: int) -> tuple[int, ...]:
    """Shape of what stands once a head and query: ``[B, Hq, Nq]``, packed ``[Hq, total_q]``, and ``last``."""
    shape = query.shape
    return (shape[1], shape[0], *last) if len(shape) == 3 else (*shape[:-1], *last)


def _centroids(key: Tensor, block_size: int, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    dtype = sum_dtype(key.dtype)
    if cu_seqlens is not None:
        # Zeros: kernels write the blocks that there are.
        shape = (cu_seqlens.size(0) - 1, key.size(1), -(-max_seqlen // block_size), key.size(2))
        return key.new_zeros(shape, dtype=dtype)
    batch, heads, tokens, dim = key.shape
    return key.new_empty((batch, heads, -(-tokens // block_size), dim), dtype=dtype)


def _centroids_backward(
    grad_centroids: Tensor, key_meta: Meta, block_size: int, cu_seqlens: Tensor | None
) -> tuple[Tensor]:
    """Each key gets its block's gradient over the block's size. Plain torch, so differentiable again."""
    if cu_seqlens is not None:
        return (_packed_centroids_backward(grad_centroids, key_meta, block_size, cu_seqlens),)
    num_keys, num_blocks = key_meta.shape[2], grad_centroids.size(2)
    block_of_key = torch.arange(num_keys, device=grad_centroids.device) // block_size
    block_sizes = grad_centroids.new_full((num_blocks, 1), block_size)
    block_sizes[-1:] = num_keys - (num_blocks - 1) * block_size
    return ((grad_centroids / block_sizes).index_select(2, block_of_key).to(key_meta.dtype),)


def _packed_centroids_backward(grad_centroids: Tensor, key_meta: Meta, block_size: int, cu_seqlens: Tensor) -> Tensor:
    """``[total, Hkv, D]``; zeros for tokens of no sequence, and for those whose block had no room."""
    num_sequences, num_heads, num_blocks, head_dim = grad_centroids.shape
    num_keys = key_meta.shape[0]
    if num_sequences == 0 or num_blocks == 0:
        return grad_centroids.new_zeros((num_keys, num_heads, head_dim), dtype=key_meta.dtype)
    starts = cu_seqlens.to(torch.int64).contiguous()
    keys = torch.arange(num_keys, device=starts.device)
    sequence = torch.searchsorted(starts, keys, right=True) - 1
    is_there = (sequence >= 0) & (sequence < num_sequences)
    sequence = sequence.clamp(0, num_sequences - 1)
    first = starts.gather(0, sequence)
    block = (keys - first) // block_size
    is_there = is_there & (block >= 0) & (block < num_blocks)
    block = block.clamp(0, num_blocks - 1)
    sizes = (starts.gather(0, sequence + 1) - first - block * block_size).clamp(1, block_size)
    rows = grad_centroids.transpose(1, 2).reshape(num_sequences * num_blocks, num_heads, head_dim)
    rows = rows.index_select(0, sequence * num_blocks + block)
    return torch.where(is_there[:, None, None], rows / sizes[:, None, None], 0).to(key_meta.dtype)


def _centroids_forward_mode(tangent_key: Tensor, block_size: int, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    tangent_key = tensors.contiguous_rows(tangent_key)
    tangent: Tensor = _ops.block_centroids.default(tangent_key, block_size, cu_seqlens, max_seqlen)
    return tangent


def _attention(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sum_dtype(query.dtype)
    lse, softmax_terms = (query.new_empty(_per_query(query, *last), dtype=dtype) for last in ((), (2,)))
    return tensors.empty_like_rows(query, value.size(-1)), lse, softmax_terms


def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_terms: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    deterministic: bool,
    softcap: float | None,
    sinks: Tensor | None,
    needs_grad_sinks: bool,
) -> tuple[Tensor | None, ...]:
    """A sink is one more term of a row's sum: weights are multiplied with the share that it leaves the keys."""

    def backward(grad_out: Tensor, grad_lse: Tensor | None, softmax_terms: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _ops.moba_attention_backward.default(
            grad_out, grad_lse, query, key, value, out, lse, block_indices, block_size, is_causal, scale,
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, softcap, softmax_terms,
        )  # fmt: skip
        return gradients

    if sinks is None:
        return (*backward(grad_out, grad_lse, softmax_terms), None)
    logits = sinks.to(lse.dtype)[:, None]
    largest, factor = softmax_terms.unbind(-1)
    # Scores of -inf beside a sink weigh 0, though their own sum is 0.
    has_no_share = (lse == -torch.inf) & (logits > -torch.inf)
    factor = torch.where(has_no_share, 0.0, factor * torch.sigmoid(lse - logits))
    gradients = backward(grad_out, None, torch.stack((largest, factor), -1))
    if grad_lse is not None:
        # lse has no sink in it. By itself: the ratio of both sums may be any number.
        of_lse = backward(torch.zeros_like(grad_out), grad_lse, softmax_terms)
        gradients = tuple(left + right for left, right in zip(gradients, of_lse, strict=True))
    if not needs_grad_sinks:
        return (*gradients, None)
    delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1)
    delta = delta.transpose(0, 1) if cu_seqlens_q is not None else delta
    grad_sinks = -(torch.sigmoid(logits - lse) * delta).sum(-1)
    return (*gradients, grad_sinks if cu_seqlens_q is not None else grad_sinks.sum(0))


def _sinks_follow(tensor: Tensor, query: Tensor, device_type: str) -> Tensor:
    return tensors.autocast_to_sums(tensor, query, device_type)


def _gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensors.empty_like_rows(tensor, tensor.size(-1)) for tensor in (query, key, value))


def _folds(cu_seqlens_q: Tensor | None) -> bool:
    return cu_seqlens_q is None


_SEQUENCES = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
_BOUNDARIES = {"cu_seqlens_q": tensors.boundaries, "cu_seqlens_k": tensors.boundaries}
_BATCH = dict.fromkeys(("query", "key", "value", "block_indices", "out", "lse", "softmax_terms"), 0)

register(
    Op(
        schema="block_centroids(Tensor key, SymInt block_size, Tensor? cu_seqlens=None, SymInt max_seqlen=0) "
        "-> Tensor centroids",
        check=_check_centroids,
        check_content=_check_centroids_content,
        cuda_check=lambda key: _cuda.check_dtype("key", key),
        inputs={"cu_seqlens": tensors.boundaries},
        results=_centroids,
        backward=_centroids_backward,
        gradients=("key",),
        forward_mode=_centroids_forward_mode,
        batch={"key": 0, "centroids": 0},
        folds=lambda cu_seqlens: cu_seqlens is None,
    )
)
register(
    Op(
        # No backward: the choice of blocks has no gradient.
        schema="moba_route(Tensor query, Tensor key, SymInt block_size, SymInt top_k, bool is_causal, "
        f"{_SEQUENCES}) -> Tensor block_indices",
        check=_check_route,
        check_content=_check_content,
        cuda_check=_cuda_check,
        inputs=_BOUNDARIES,
        results=lambda query, top_k: query.new_empty(_per_query(query, top_k), dtype=torch.int32),
        autocast=dict.fromkeys(("query", "key"), tensors.autocast),
        batch=_BATCH,
        folds=_folds,
    )
)
register(
    Op(
        schema="moba_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "Tensor out, Tensor lse, Tensor block_indices, SymInt block_size, bool is_causal, float scale, "
        f"{_SEQUENCES}, bool deterministic=False, float? softcap=None, Tensor? softmax_terms=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
        check=_check_backward,
        check_content=_check_content,
        cuda_check=_cuda_check,
        inputs={
            "grad_out": tensors.contiguous_rows,
            "grad_lse": tensors.contiguous,
            "out": tensors.contiguous_rows,
            "lse": tensors.contiguous,
            "softmax_terms": tensors.contiguous,
            "block_indices": tensors.contiguous_rows,
            **_BOUNDARIES,
        },
        results=_gradients,
        zeroed=("grad_query", "grad_key", "grad_value"),
        derivative_of="moba_attention",
        batch=_BATCH | dict.fromkeys(("grad_out", "grad_lse", "grad_query", "grad_key", "grad_value"), 0),
        folds=_folds,
    )
)
register(
    Op(
        schema="moba_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, SymInt block_size, "
        f"bool is_causal, float scale, {_SEQUENCES}, bool deterministic=False, float? softcap=None, "
        "Tensor? sinks=None) -> (Tensor out, Tensor lse, Tensor softmax_terms)",
        check=_check,
        check_content=_check_content,
        cuda_check=_cuda_check,
        inputs={"block_indices": tensors.contiguous_rows, "sinks": tensors.sums_like_query, **_BOUNDARIES},
        results=_attention,
        backward=_attention_backward,
        gradients=("query", "key", "value", "sinks"),
        autocast={**dict.fromkeys(("query", "key", "value"), tensors.autocast), "sinks": _sinks_follow},
        batch=_BATCH,
        folds=_folds,
    )
)

"""Block attention (MoBA): each query attends to its own key block and to the best-scoring others.

Sources: MoBA, arXiv 2502.13189, section 2.2 (block choice by mean-pooled keys, causality); FlashMoBA, arXiv 2511.11571
(small blocks, tiled top-k, gather-and-densify). The plain definition in float64 is :mod:`topgather.reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .._common import checks, cuda
from .._common.library import smaller
from . import _moba_ops, replay
from .routing import BlockRouting

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        return _moba_ops.block_centroids(key, block_size)
    checks.check_tensor("cu_seqlens", cu_seqlens)
    checks.check_count("max_seqlen", max_seqlen, least=0)
    return _moba_ops.block_centroids(key, block_size, cu_seqlens, max_seqlen)


def moba_route(
    query: Tensor,
    key: Tensor,
    block_size: int = 128,
    top_k: int = 8,
    is_causal: bool = True,
    force_first: int = 0,
    force_last: int = 1,
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
        force_first: how many of the sequence's first blocks are in every choice, whatever their scores. They count as
            of ``top_k``; blocks that a query does not see are left out.
        force_last: how many of the newest blocks up to the query's own, which is the first of them, are in its choice;
            with ``is_causal`` at least 1, and 1 is MoBA. A block that is among the first as well counts once. Without
            ``is_causal`` no block is the newest, and the default of 1 forces none.

    Returns:
        A :class:`BlockRouting` with ``block_indices`` int32 ``[B, Hq, Nq, top_k]``, each row ascending and padded at
        its end with -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device, ``block_size`` or ``top_k``; more blocks forced than ``top_k``, or
            a ``force_last`` that does not go with ``is_causal``; more than 2**31 - 1 numbers of ``block_indices`` for a
            ``top_k`` above the number of blocks.
    """
    _check_options(query, key, block_size, is_causal)
    checks.check_count("top_k", top_k)
    checks.check_forced(force_first, force_last, top_k, is_causal)
    block_indices = _moba_ops.moba_route(query, key, block_size, top_k, is_causal, *_DENSE, force_first, force_last)
    return BlockRouting(block_indices, block_size)


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
    force_first: int = 0,
    force_last: int = 1,
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
        force_first, force_last: as in :func:`moba_route`, of each sequence's blocks.

    Returns:
        A :class:`BlockRouting` with ``block_indices`` int32 ``[Hq, total_q, top_k]``; blocks are counted from the
        first key of the query's own sequence.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option, or boundaries that do not delimit the tokens.
    """
    _check_options(query, key, block_size, is_causal)
    sequences = _packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_count("top_k", top_k)
    checks.check_forced(force_first, force_last, top_k, is_causal)
    block_indices = _moba_ops.moba_route(query, key, block_size, top_k, is_causal, *sequences, force_first, force_last)
    return BlockRouting(block_indices, block_size)


class ScoreOptions(TypedDict, total=False):
    """Every option of attention that only the op itself looks at, checked by its name."""

    softcap: float | None
    sinks: Tensor | None
    window: int | None


class _Options(ScoreOptions, total=False):
    """What every overload of attention takes by name, beside the arguments it lists."""

    routing: BlockRouting | None
    deterministic: bool | None
    force_first: int
    force_last: int


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
    force_first: int = 0,
    force_last: int = 1,
    window: int | None = None,
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
        routing: a choice of blocks to use instead of making one, for each query head, each key head or all heads.
            Under ``is_causal`` later keys stay hidden whatever it names.
        deterministic: whether gradients are the same bits every time. On CUDA gradients are otherwise summed by atomic
            additions, in whatever order they come; the deterministic way moves more memory. None follows
            ``torch.use_deterministic_algorithms``. The CPU is always deterministic.
        softcap: if given, scaled scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118, section
            2); positive and finite. Blocks are chosen by scores as they are.
        sinks: ``[Hq]``, query's dtype or float32 (float64 for float64): a logit per head that joins each row's softmax
            and has no value (gpt-oss, arXiv 2508.10925; StreamingLLM, arXiv 2309.17453, section 3.3). ``lse`` does not
            count it.
        force_first, force_last: how many of the first and of the newest blocks are in every choice, as in
            :func:`moba_route`; with ``routing`` they are left as they are.
        window: if given, a query at position ``p`` sees the keys at ``p - window + 1`` to ``p`` as well as those of its
            blocks, each once; at least 1, with ``is_causal`` only. Whole blocks or not, they do not count as of
            ``top_k``, and the choice does not know of them.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in query's dtype, laid out as query is; with ``return_lse`` also
        ``lse [B, Hq, Nq]``, float32 (float64 for float64), natural logarithm. A query that sees no key gets 0 and
        -inf, and gradients of 0. Both are differentiable with respect to query, key, value and sinks, once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; ``top_k`` and ``routing`` given and not agreeing; a
            ``window`` without ``is_causal``; blocks forced beside a ``routing``, or more of them than ``top_k``;
            ``routing`` with other heads than query's, key's or 1, or naming a block twice for a query.
        IndexError: ``routing`` naming a block that does not exist.

    On CUDA what a tensor holds is not waited for: a query whose ``routing`` names a block that does not exist, or one
    twice, gets NaN in ``out``, ``lse`` and its gradient instead of an error.
    """
    return _attend(
        query, key, value, _DENSE, block_size, top_k, is_causal, scale, return_lse, routing, deterministic,
        (force_first, force_last), softcap=softcap, sinks=sinks, window=window,
    )  # fmt: skip


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
    force_first: int = 0,
    force_last: int = 1,
    window: int | None = None,
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
        routing: as in :func:`moba_attention`, with ``block_indices [H, total_q, top_k]``, ``H`` of query heads, key
            heads or 1.
        deterministic, softcap, sinks, force_first, force_last, window: as in :func:`moba_attention`.

    Returns:
        ``out [total_q, Hq, Dv]``; with ``return_lse`` also ``lse [Hq, total_q]``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`moba_attention`; ``ValueError`` also for boundaries that do not
            delimit the tokens.

    On CUDA boundaries are read on the device alone: what does not delimit the tokens is clamped to what is there, and
    a query of no sequence gets NaN. With ``top_k=None`` only as
    many blocks as ``max_seqlen_k`` tells of are attended to.
    """
    sequences = _packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(
        query, key, value, sequences, block_size, top_k, is_causal, scale, return_lse, routing, deterministic,
        (force_first, force_last), softcap=softcap, sinks=sinks, window=window,
    )  # fmt: skip


# force_first and force_last as they are by default: nothing but MoBA's own block.
NONE_FORCED = (0, 1)


def forced_within(slots: int, forced: tuple[int, int]) -> tuple[int, int]:
    """``forced``, as far as there are so many blocks: of fewer all are chosen, forced or not."""
    return forced if forced == NONE_FORCED or sum(forced) <= slots else NONE_FORCED


def check_none_forced(forced: tuple[int, int]) -> None:
    """Raise where blocks are forced beside a ``routing``, which has them or not."""
    for name, count in zip(("force_first", "force_last"), forced, strict=True):
        checks.check_count(name, count, least=0)
    if forced != NONE_FORCED:
        raise ValueError(
            "force_first and force_last must be 0 and 1, as they are by default, where routing is given, "
            f"got {forced[0]} and {forced[1]}"
        )


_Sequences = tuple[Tensor | None, Tensor | None, int, int]
_DENSE: _Sequences = (None, None, 0, 0)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: _Sequences,
    block_size: int,
    top_k: int | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    routing: BlockRouting | None,
    deterministic: bool | None,
    forced: tuple[int, int],
    **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    _check_options(query, key, block_size, is_causal)
    checks.check_tensor("value", value)
    checks.check_scale(scale)
    for name, option in options.items():
        checks.OPTIONS[name](option)
    checks.check_flag("return_lse", return_lse)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    else:
        checks.check_flag("deterministic", deterministic)
    is_chosen = False
    if routing is None:
        if top_k is not None:
            checks.check_count("top_k", top_k)
        checks.check_forced(*forced, top_k, is_causal)
        slots = _moba_ops.num_slots(top_k, _longest(key, sequences, top_k), block_size)
        arguments = (query, key, block_size, slots, is_causal, *sequences, *forced_within(slots, forced))
        if top_k is not None and replay.state.is_watched:
            is_chosen = True
            call = replay.Call(_moba_ops.per_query(query), key.size(1), key.size(-2), block_size, top_k, query.device)
            block_indices = replay.choose(_moba_ops.moba_route, arguments, call)
        else:
            block_indices = _moba_ops.moba_route(*arguments)
    else:
        _check_routing(routing, block_size, top_k)
        check_none_forced(forced)
        block_indices = routing.block_indices
    if scale is None:
        # A head_dim of 0 is refused by the op, in its own words.
        scale = max(query.size(-1), 1) ** -0.5
    with replay.taken_back_by_errors() if is_chosen else nullcontext():
        out, lse, _ = _moba_ops.moba_attention(
            query, key, value, block_indices, block_size, is_causal, float(scale), *sequences, deterministic, **options
        )
    return (out, lse) if return_lse else out


def _longest(key: Tensor, sequences: _Sequences, top_k: int | None) -> int:
    """At least the keys of the longest sequence."""
    _, cu_seqlens_k, _, max_seqlen_k = sequences
    if cu_seqlens_k is None:
        checks.check_ndim("key", key, 4, "[batch, heads, tokens, dim]")
        return key.size(2)
    checks.check_ndim("key", key, 3, "[total_tokens, heads, dim]")
    # On CUDA nobody sees whether a sequence is longer than max_seqlen_k; a top_k counts on no such bound.
    is_bound_known = top_k is None or not cuda.gets(key)
    return smaller(max_seqlen_k, key.size(0)) if is_bound_known else key.size(0)


def _check_options(query: Tensor, key: Tensor, block_size: int, is_causal: bool) -> None:
    checks.check_tensor("query", query)
    checks.check_tensor("key", key)
    checks.check_count("block_size", block_size)
    checks.check_flag("is_causal", is_causal)


def _packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> _Sequences:
    checks.check_tensor("cu_seqlens_q", cu_seqlens_q)
    checks.check_tensor("cu_seqlens_k", cu_seqlens_k)
    checks.check_count("max_seqlen_q", max_seqlen_q, least=0)
    checks.check_count("max_seqlen_k", max_seqlen_k, least=0)
    return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def _check_routing(routing: BlockRouting, block_size: int, top_k: int | None) -> None:
    if not isinstance(routing, BlockRouting):
        raise TypeError(f"routing must be a topgather.BlockRouting or None, got {type(routing).__name__}")
    if routing.block_size != block_size:
        raise ValueError(f"block_size must be that of routing, {routing.block_size}, got {block_size}")
    if top_k is not None and top_k != routing.top_k:
        raise ValueError(f"top_k must be that of routing, {routing.top_k}, or None, got {top_k}")

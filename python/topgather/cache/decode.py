"""Attention of new tokens over a cache: what users call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .._common import checks
from .._common.library import autocast_device
from ..ops import BlockRouting, replay
from ..ops.moba import check_none_forced, forced_within
from ._base import BaseCache
from ._checks import check_no_gradient
from .contiguous import MobaCache
from .paged import PagedMobaCache

if TYPE_CHECKING:
    from typing_extensions import Unpack

# From this many new tokens on, keys are worth fetching once for all of them: moba_attention's kernels.
_PREFILL_TOKENS = 64


class _Options(TypedDict, total=False):
    """What every overload takes by name, beside the arguments it lists."""

    routing: BlockRouting | None
    softcap: float | None
    sinks: Tensor | None
    force_first: int
    force_last: int
    window: int | None


# fmt: off
@overload
def moba_decode(
    query: Tensor, cache: MobaCache | PagedMobaCache, top_k: int | None = ..., scale: float | None = ...,
    num_tokens: Sequence[int] | Tensor | None = ..., return_lse: Literal[False] = ..., **options: Unpack[_Options],
) -> Tensor: ...
@overload
def moba_decode(
    query: Tensor, cache: MobaCache | PagedMobaCache, top_k: int | None = ..., scale: float | None = ...,
    num_tokens: Sequence[int] | Tensor | None = ..., *, return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_decode(
    query: Tensor, cache: MobaCache | PagedMobaCache, top_k: int | None = ..., scale: float | None = ...,
    num_tokens: Sequence[int] | Tensor | None = ..., return_lse: bool = ..., **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def moba_decode(
    query: Tensor,
    cache: MobaCache | PagedMobaCache,
    top_k: int | None = 8,
    scale: float | None = None,
    num_tokens: Sequence[int] | Tensor | None = None,
    return_lse: bool = False,
    routing: BlockRouting | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    force_first: int = 0,
    force_last: int = 1,
    window: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from the newest tokens to a cache that holds them already (MoBA, arXiv 2502.13189, section 2.2).

    Gives the rows that :func:`moba_attention` over the whole sequence gives for these tokens, with the same blocks
    chosen, for any split of the sequence into appends: prefill, chunks or single tokens. A token costs
    ``O(N / block_size + top_k * block_size)`` on a sequence of ``N``. For inference: there is no gradient.

    Args:
        query: ``[B, Hq, M, D]`` in the cache's dtype and on its device, contiguous in its last dimension; ``Hq`` a
            multiple of the cache's heads. Queries of the last ``M`` tokens of each sequence, or, with ``num_tokens``,
            of its last ``num_tokens[b]``, padded at the end.
        cache: a :class:`MobaCache` or :class:`PagedMobaCache`, to which these tokens' keys and values were appended.
        top_k: blocks per query, the own one included; None for all, which is dense attention.
        scale: factor on the scores; ``D ** -0.5`` if None.
        num_tokens: how many of the ``M`` queries each sequence has, ints or an integer tensor ``[B]``; if None, what
            the last append brought.
        return_lse: also return the log-sum-exp of each query's scaled scores.
        routing: a choice of blocks to use instead of making one, with ``block_indices [B, H, M, k]``, ``H`` of
            query heads, key heads or 1; ``top_k`` is then not looked at.
        softcap: if given, scaled scores become ``softcap * tanh(score / softcap)``, as in :func:`moba_attention`.
        sinks: ``[Hq]``, a logit per head that joins each row's softmax, as in :func:`moba_attention`.
        force_first, force_last: how many of the first and of the newest blocks are in every choice, as in
            :func:`moba_route`; with ``routing`` they are left as they are.
        window: if given, a query sees the newest ``window`` keys up to its own as well as those of its blocks, as in
            :func:`moba_attention`.

    Returns:
        ``out [B, Hq, M, Dv]`` in query's dtype, laid out as query is; with ``return_lse`` also ``lse [B, Hq, M]``,
        float32 (float64 for float64). A query past its sequence's ``num_tokens``, or of a token before its sequence's
        first, gets 0 and -inf.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; a query that requires grad where gradients are recorded;
            ``routing`` naming a block twice for a query.
        IndexError: ``routing`` naming a block that does not exist.
        NotImplementedError: a dual tensor of forward-mode differentiation.

    On CUDA what a tensor holds is not waited for: a query whose ``routing`` is at fault, or whose sequence has outgrown
    the cache, gets NaN instead of an error.

    Under ``torch.compile`` a step with :meth:`MobaCache.append` and this is one graph for all tokens.
    """
    checks.check_tensor("query", query)
    if not isinstance(cache, BaseCache):
        raise TypeError(f"cache must be a topgather.MobaCache or PagedMobaCache, got {type(cache).__name__}")
    cache.check_whole()
    checks.check_scale(scale)
    checks.check_softcap(softcap)
    checks.check_sinks(sinks)
    checks.check_window(window)
    checks.check_flag("return_lse", return_lse)
    if query.dtype != cache.dtype:
        raise TypeError(f"query must have the cache's dtype, {cache.dtype}, got {query.dtype}")
    if query.device != cache.device:
        raise ValueError(f"query must be on the cache's device, {cache.device}, got {query.device}")
    if query.ndim != 4 or query.size(0) != cache.batch_size or query.size(3) != cache.head_dim:
        raise ValueError(
            f"query must have shape [{cache.batch_size}, heads, tokens, {cache.head_dim}], got {tuple(query.shape)}"
        )
    for name, tensor in (("query", query), ("sinks", sinks)):
        if tensor is not None:
            check_no_gradient(name, tensor, "moba_decode has no gradient; use torch.no_grad(), or moba_attention")
    query_len = query.size(2)
    counts, count_tensor = _counts_of(cache, num_tokens, query_len)
    lengths = cache.lengths_on_host
    longest = cache.max_seq_len if lengths is None else max(lengths, default=0)
    num_blocks = max(1, -(-longest // cache.block_size))

    forced, is_chosen = (force_first, force_last), False
    if routing is None:
        if top_k is not None:
            checks.check_count("top_k", top_k)
        checks.check_forced(*forced, top_k)
        slots = num_blocks if top_k is None else min(top_k, num_blocks)
        arguments = (
            query, cache.centroids, cache.seq_lens, cache.page_table, count_tensor, cache.block_size, cache.page_size,
            slots, *forced_within(slots, forced),
        )  # fmt: skip
        route = torch.ops.topgather.moba_decode_route.default
        if top_k is not None and replay.state.is_watched:
            num_keys = None if lengths is None else longest
            per_query, num_kv_heads = tuple(query.shape[:3]), cache.key_pages.size(1)
            call = replay.Call(per_query, num_kv_heads, num_keys, cache.block_size, top_k, query.device)
            block_indices = replay.choose(route, arguments, call)
            is_chosen = True
        else:
            block_indices = route(*arguments)
    else:
        check_none_forced(forced)
        block_indices = _choice_of(routing, cache)
    factor = cache.head_dim**-0.5 if scale is None else float(scale)
    with replay.taken_back_by_errors() if is_chosen else nullcontext():
        if query_len >= _PREFILL_TOKENS and _is_dense_problem(cache, lengths, counts, query_len):
            # Not to be cast: the cache has the dtype that was asked for.
            with torch.autocast(autocast_device(query.device), enabled=False):
                out, lse, _ = torch.ops.topgather.moba_attention.default(
                    query, cache.key_pages[:, :, :longest], cache.value_pages[:, :, :longest], block_indices,
                    cache.block_size, True, factor, softcap=softcap, sinks=sinks, window=window,
                )  # fmt: skip
        else:
            out, lse = torch.ops.topgather.moba_decode.default(
                query, cache.key_pages, cache.value_pages, block_indices, cache.seq_lens, cache.page_table,
                count_tensor, cache.block_size, factor, softcap, sinks, window,
            )  # fmt: skip
    if lengths is None and cache.has_spare_rows:
        # Nobody may have seen that a sequence grew past its limit, into rows that are there.
        has_outgrown = (cache.seq_lens > cache.max_seq_len)[:, None, None]
        out, lse = out.masked_fill(has_outgrown[..., None], torch.nan), lse.masked_fill(has_outgrown, torch.nan)
    return (out, lse) if return_lse else out


def _counts_of(
    cache: BaseCache, num_tokens: Sequence[int] | Tensor | None, query_len: int
) -> tuple[list[int] | None, Tensor | None]:
    if num_tokens is not None:
        return cache.token_counts(num_tokens, query_len)
    last = cache.last_num_tokens
    if last is None:
        return [query_len] * cache.batch_size, None
    if query_len != cache.last_query_len:
        raise ValueError(
            f"query must have as many tokens as the last append, {cache.last_query_len}, which differed by sequence, "
            f"got {query_len}; give num_tokens for others"
        )
    return None, last


def _choice_of(routing: BlockRouting, cache: BaseCache) -> Tensor:
    if not isinstance(routing, BlockRouting):
        raise TypeError(f"routing must be a topgather.BlockRouting or None, got {type(routing).__name__}")
    if min(routing.block_size, cache.max_seq_len) != cache.block_size:
        raise ValueError(f"routing must have the cache's block_size, {cache.block_size}, got {routing.block_size}")
    return routing.block_indices


def _is_dense_problem(cache: BaseCache, lengths: list[int] | None, counts: list[int] | None, query_len: int) -> bool:
    """Whether keys are one tensor, sequences equally long, and all queries there."""
    if cache.page_table is not None or lengths is None or counts is None:
        return False
    return all(length == lengths[0] for length in lengths) and all(count == query_len for count in counts)

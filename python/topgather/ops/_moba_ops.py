"""The ops of block attention: what each takes, checks, returns and is differentiated by.

:mod:`topgather.ops.moba` is what users call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common import checks, cuda, tensors
from .._common.library import larger, smaller, sum_dtype
from .._common.spec import Meta, Op, register

_ops = torch.ops.topgather

MAX_HEAD_DIM_ON_CUDA = 256
# Up to here a compiled choice has as many slots as were asked for, whatever the number of blocks.
MAX_SLOTS_OF_FEWER = 64

# --- checks ---------------------------------------------------------------------------------------------------------


def repeated_blocks(block_indices: Tensor) -> Tensor:
    """The numbers ``[n]`` of blocks that ``block_indices [..., slots]`` names twice for a query; -1 is no block."""
    ordered = block_indices.sort(dim=-1).values
    return ordered[..., 1:][(ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)]


def num_slots(top_k: int | None, num_keys: int, block_size: int) -> int:
    """Blocks that ``top_k``, or all of them, can be of a sequence of so many keys: slots of a choice, at least one."""
    # Within torch.compile, make_fx (a symbol) and torch.jit.trace (a tensor) it is for sequences of other sizes too.
    is_traced = is_compiling() or type(num_keys) is not int
    if is_traced and top_k is not None and top_k <= MAX_SLOTS_OF_FEWER:
        return top_k  # a size that follows from another's quotient is a guard for torch: whether it is 1
    num_blocks = -(-num_keys // block_size)
    least, most = (smaller, larger) if is_traced else (min, max)
    return most(num_blocks if top_k is None else least(top_k, num_blocks), 1)


def _check(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    value: Tensor | None = None,
    block_indices: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool = True,
    window: int | None = None,
) -> None:
    """What types, shapes, dtypes, strides and devices can say about a call of an op that has these arguments."""
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
    checks.check_heads("query", query_shape[1], "key", key_shape[1])
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
        checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query)
        checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "query", query)
        checks.check_size("cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.size(0), "size of cu_seqlens_q")
    if sinks is not None:
        checks.check_logit_per_head(sinks, query_shape[1], query)
    if window is not None and not is_causal:
        raise ValueError(f"window must be None without is_causal, where no token is the newest, got {window}")
    if block_indices is None:
        return
    checks.check_dtype("block_indices", block_indices, torch.int32)
    checks.check_same_device("block_indices", block_indices, "query", query)
    checks.check_choices(block_indices, per_query(query), key_shape[1])


def _check_route(
    query: Tensor,
    key: Tensor,
    block_size: int,
    top_k: int,
    is_causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    force_first: int,
    force_last: int,
) -> None:
    _check(query, key, cu_seqlens_q, cu_seqlens_k)
    checks.check_forced(force_first, force_last, top_k, is_causal)
    num_keys = key.size(2) if cu_seqlens_k is None else key.size(0)
    checks.check_slots(top_k, per_query(query), num_slots(None, num_keys, block_size))


def _check_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_terms: Tensor | None,
) -> None:
    _check(query, key, cu_seqlens_q, cu_seqlens_k, value, block_indices)
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
            checks.check_per_query(name, numbers, per_query(query, *last), query)


def _check_centroids(key: Tensor, block_size: int, cu_seqlens: Tensor | None, max_seqlen: int) -> None:
    is_packed = cu_seqlens is not None
    layout = "[total_tokens, heads, dim]" if is_packed else "[batch, heads, tokens, dim]"
    checks.check_ndim("key", key, 3 if is_packed else 4, layout)
    checks.check_floating("key", key)
    checks.check_contiguous_rows("key", key)
    if cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, "key", key)
        checks.check_padded_blocks(max_seqlen, cu_seqlens.size(0) - 1, key, block_size)


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
    cuda.check_dtype("query", query)
    for name, tensor in (("head_dim", query), ("value_dim", value)):
        if tensor is not None and tensor.size(-1) > MAX_HEAD_DIM_ON_CUDA:
            raise ValueError(f"{name} must be at most {MAX_HEAD_DIM_ON_CUDA} on CUDA, got {tensor.size(-1)}")


def per_query(query: Tensor, *last: int) -> tuple[int, ...]:
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
    dtype, rows = sum_dtype(query.dtype), per_query(query)
    lse, softmax_terms = tensors.empty(query, rows, dtype), tensors.empty(query, (*rows, 2), dtype)
    return tensors.empty_like_rows(query, value.size(-1)), lse, softmax_terms


def _attention_backward(
    moba_attention_backward: Callable[..., tuple[Tensor, ...]],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_terms: Tensor,
    cu_seqlens_q: Tensor | None,
    sinks: Tensor | None,
    needs_grad_sinks: bool,
) -> tuple[Tensor | None, ...]:
    """A sink is one more term of a row's sum: weights are multiplied with the share that it leaves the keys."""
    if sinks is None:
        return (*moba_attention_backward(), None)
    logits = sinks.to(lse.dtype)[:, None]
    largest, factor = softmax_terms.unbind(-1)
    # Scores of -inf beside a sink weigh 0, though their own sum is 0.
    has_no_share = (lse == -torch.inf) & (logits > -torch.inf)
    factor = torch.where(has_no_share, 0.0, factor * torch.sigmoid(lse - logits))
    gradients = moba_attention_backward(grad_lse=None, softmax_terms=torch.stack((largest, factor), -1))
    if grad_lse is not None:
        # lse has no sink in it. By itself: the ratio of both sums may be any number.
        of_lse = moba_attention_backward(grad_out=torch.zeros_like(grad_out))
        gradients = tuple(left + right for left, right in zip(gradients, of_lse, strict=True))
    if not needs_grad_sinks:
        return (*gradients, None)
    delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1)
    delta = delta.transpose(0, 1) if cu_seqlens_q is not None else delta
    # A query that sees no key has lse -inf, from which a logit of -inf has no distance: it weighs 0 all the same.
    share = torch.where(logits == -torch.inf, 0.0, torch.sigmoid(logits - lse))
    grad_sinks = -(share * delta).sum(-1)
    return (*gradients, grad_sinks if cu_seqlens_q is not None else grad_sinks.sum(0))


def _sinks_follow(tensor: Tensor, query: Tensor, device_type: str) -> Tensor:
    return tensors.autocast_to_sums(tensor, query, device_type)


def _gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensors.empty_like_rows(tensor, tensor.size(-1)) for tensor in (query, key, value))


def _folds(cu_seqlens_q: Tensor | None) -> bool:
    return cu_seqlens_q is None


# Arguments of attention and of its gradient. Places of what is there stay: later ones end both schemas.
_ATTENTION = "bool deterministic=False, float? softcap=None"
_SEQUENCES = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
_WINDOW = "SymInt? window=None"
# Arguments of every op that chooses blocks by scores.
FORCED = "SymInt force_first=0, SymInt force_last=1"
_BOUNDARIES = {"cu_seqlens_q": tensors.boundaries, "cu_seqlens_k": tensors.boundaries}
_BATCH = dict.fromkeys(("query", "key", "value", "block_indices", "out", "lse", "softmax_terms"), 0)

block_centroids = register(
    Op(
        schema="block_centroids(Tensor key, SymInt block_size, Tensor? cu_seqlens=None, SymInt max_seqlen=0) "
        "-> Tensor centroids",
        check=_check_centroids,
        check_content=_check_centroids_content,
        cuda_check=lambda key: cuda.check_dtype("key", key),
        inputs={"cu_seqlens": tensors.boundaries},
        results=_centroids,
        backward=_centroids_backward,
        gradients=("key",),
        forward_mode=_centroids_forward_mode,
        batch={"key": 0, "centroids": 0},
        folds=lambda cu_seqlens: cu_seqlens is None,
    )
)
moba_route = register(
    Op(
        # No backward: the choice of blocks has no gradient.
        schema="moba_route(Tensor query, Tensor key, SymInt block_size, SymInt top_k, bool is_causal, "
        f"{_SEQUENCES}, {FORCED}) -> Tensor block_indices",
        check=_check_route,
        check_content=_check_content,
        cuda_check=_cuda_check,
        inputs=_BOUNDARIES,
        results=lambda query, top_k: tensors.empty(query, per_query(query, top_k), torch.int32),
        autocast=dict.fromkeys(("query", "key"), tensors.autocast),
        batch=_BATCH,
        folds=_folds,
    )
)
register(
    Op(
        schema="moba_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "Tensor out, Tensor lse, Tensor block_indices, SymInt block_size, bool is_causal, float scale, "
        f"{_SEQUENCES}, {_ATTENTION}, Tensor? softmax_terms=None, {_WINDOW}) "
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
moba_attention = register(
    Op(
        schema="moba_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, SymInt block_size, "
        f"bool is_causal, float scale, {_SEQUENCES}, {_ATTENTION}, "
        f"Tensor? sinks=None, {_WINDOW}) -> (Tensor out, Tensor lse, Tensor softmax_terms)",
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

"""Block attention behind the dispatcher: schemas, checks, CPU kernels, fake kernels and autograd.

Everything a caller can get wrong in the tensors is checked here, once a call, by :func:`check_problem`, which kernels
and fake kernels share. :mod:`topgather.ops.moba` is what users call, and
:mod:`topgather.ops._moba_cuda` has the CUDA kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import _checks as checks
from ._library import (
    DTYPE_CODES,
    below_autograd,
    define,
    library,
    needs_grad,
    register_autocast,
    register_fake,
    register_once_differentiable,
    sum_dtype,
)

_SEQUENCES = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
define("block_centroids(Tensor key, SymInt block_size) -> Tensor")
define(f"moba_route(Tensor query, Tensor key, SymInt block_size, SymInt top_k, bool is_causal, {_SEQUENCES}) -> Tensor")
define(
    "moba_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, SymInt block_size, bool is_causal, "
    f"float scale, {_SEQUENCES}, bool deterministic=False) -> (Tensor out, Tensor lse)"
)
define(
    "moba_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor block_indices, SymInt block_size, bool is_causal, float scale, "
    f"{_SEQUENCES}, bool deterministic=False) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


class Sizes(NamedTuple):
    """Sizes of a checked problem, in the order the native side takes them."""

    batch_size: int
    num_query_heads: int
    num_kv_heads: int
    query_len: int  # tokens of a sequence; of all of them where packed
    key_len: int
    head_dim: int
    value_dim: int


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, other: Tensor, other_name: str = "query") -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.size(0) < 1:
        raise ValueError(f"{name} must have shape [num_sequences + 1], got {tuple(cu_seqlens.shape)}")
    checks.check_same_device(name, cu_seqlens, other_name, other)


def check_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block_indices: Tensor | None,
    block_size: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Sizes:
    """Check everything that shapes, dtypes, strides and devices can say about a call, and return its sizes."""
    packed = cu_seqlens_q is not None
    ndim = 3 if packed else 4
    layout = "[total_tokens, heads, dim]" if packed else "[batch, heads, tokens, dim]"
    named = [("query", query), ("key", key)] + ([("value", value)] if value is not None else [])
    for name, tensor in named:
        checks.check_ndim(name, tensor, ndim, layout)
        checks.check_floating(name, tensor)
        checks.check_same_dtype(name, tensor, "query", query)
        checks.check_same_device(name, tensor, "query", query)
    head_axis, token_axis = (1, 0) if packed else (1, 2)
    if not packed:
        for name, tensor in named[1:]:
            checks.check_size(name, tensor, 0, query.size(0), "batch size of query")
    checks.check_size("key", key, -1, query.size(-1), "head_dim of query")
    if query.size(-1) < 1:
        raise ValueError(f"query must have a head_dim of at least 1, got shape {tuple(query.shape)}")
    if value is not None:
        checks.check_size("value", value, head_axis, key.size(head_axis), "heads of key")
        checks.check_size("value", value, token_axis, key.size(token_axis), "tokens of key")
    num_query_heads, num_kv_heads = query.size(head_axis), key.size(head_axis)
    if num_kv_heads < 1 or num_query_heads < 1 or num_query_heads % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of key's heads, at least one, got {num_query_heads} query heads "
            f"and {num_kv_heads} key heads"
        )
    for name, tensor in named:
        checks.check_contiguous_rows(name, tensor)
    checks.check_count("block_size", block_size)
    batch_size = query.size(0)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
        checks.check_size("cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.size(0), "size of cu_seqlens_q")
        batch_size = cu_seqlens_q.size(0) - 1
    if block_indices is not None:
        _check_block_indices(block_indices, query, packed)
    return Sizes(
        batch_size,
        num_query_heads,
        num_kv_heads,
        query.size(token_axis),
        key.size(token_axis),
        query.size(-1),
        0 if value is None else value.size(-1),
    )


def _check_block_indices(block_indices: Tensor, query: Tensor, packed: bool) -> None:
    if block_indices.dtype != torch.int32:
        raise TypeError(f"block_indices must have dtype torch.int32, got {block_indices.dtype}")
    checks.check_same_device("block_indices", block_indices, "query", query)
    leading = (query.size(1), query.size(0)) if packed else (query.size(0), query.size(1), query.size(2))
    if block_indices.ndim != len(leading) + 1 or tuple(block_indices.shape[:-1]) != leading:
        raise ValueError(f"block_indices must have shape {list(leading)} + [top_k], got {tuple(block_indices.shape)}")
    if block_indices.size(-1) < 1:
        raise ValueError("block_indices must have at least one slot per query, got a last dimension of 0")


def _read_cu_seqlens(
    cu_seqlens: Tensor | None, name: str, total: int, total_name: str, max_seqlen: int, max_name: str
) -> Tensor | None:
    """The boundaries as int64 on the host, checked against what they must delimit."""
    if cu_seqlens is None:
        return None
    boundaries = cu_seqlens.to(torch.int64).contiguous()
    if boundaries[0].item() != 0:
        raise ValueError(f"{name} must start with 0, got {boundaries[0].item()}")
    lengths = boundaries.diff()
    longest = 0
    if lengths.numel() > 0:
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0:
            raise ValueError(f"{name} must not decrease, got a sequence of length {shortest}")
    if boundaries[-1].item() != total:
        raise ValueError(
            f"{name} must end with the number of tokens of {total_name}, {total}, got {boundaries[-1].item()}"
        )
    if longest > max_seqlen:
        raise ValueError(f"{max_name} must be at least the longest sequence, {longest}, got {max_seqlen}")
    return boundaries


class _Call(NamedTuple):
    """A checked call as the native side takes it. ``keep_alive`` owns the memory ``fields`` points to."""

    sizes: Sizes
    fields: tuple[Any, ...]
    packed: bool
    keep_alive: tuple[Tensor | None, ...]


def _native_call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block_indices: Tensor | None,
    block_size: int,
    top_k: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> _Call:
    sizes = check_problem(query, key, value, block_indices, block_size, cu_seqlens_q, cu_seqlens_k)
    bounds_q = _read_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", sizes.query_len, "query", max_seqlen_q, "max_seqlen_q")
    bounds_k = _read_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", sizes.key_len, "key", max_seqlen_k, "max_seqlen_k")
    fields = (
        DTYPE_CODES[query.dtype],
        *sizes,
        block_size,
        top_k,
        is_causal,
        scale,
        0 if bounds_q is None else bounds_q.data_ptr(),
        0 if bounds_k is None else bounds_k.data_ptr(),
        torch.get_num_threads(),
    )
    return _Call(sizes, fields, bounds_q is not None, (bounds_q, bounds_k))


def rows_of(tensor: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Address and strides of [batch, heads, tokens, dim], or of packed [tokens, heads, dim]."""
    strides = tensor.stride()
    if packed:
        return tensor.data_ptr(), 0, strides[1], strides[0]
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def per_head(tensor: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Address and strides of [batch, heads, tokens(, slots)], or of packed [heads, tokens(, slots)]."""
    strides = tensor.stride()
    if packed:
        return tensor.data_ptr(), 0, strides[0], strides[1]
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def empty_like_rows(like: Tensor, dim: int, zero: bool = False) -> Tensor:
    """A tensor of ``like``'s shape but for its last dimension, laid out as ``like`` is.

    So that the transposed view of a [B, N, H, D] projection gets an output that transposes back without a copy.
    """
    make = like.new_zeros if zero else like.new_empty
    if like.ndim == 4 and like.stride(1) < like.stride(2):
        batch, heads, tokens, _ = like.shape
        return make((batch, tokens, heads, dim)).transpose(1, 2)
    return make((*like.shape[:-1], dim))


def lse_shape(query: Tensor, packed: bool) -> tuple[int, ...]:
    return (query.size(1), query.size(0)) if packed else (query.size(0), query.size(1), query.size(2))


# --- block_centroids ------------------------------------------------------------------------------------------------


def _check_centroids(key: Tensor, block_size: int) -> tuple[int, ...]:
    checks.check_ndim("key", key, 4, "[batch, heads, tokens, dim]")
    checks.check_floating("key", key)
    checks.check_contiguous_rows("key", key)
    checks.check_count("block_size", block_size)
    batch, heads, tokens, dim = key.shape
    return batch, heads, -(-tokens // block_size), dim


_Rows = tuple[int, int, int, int]


def centroid_call(key: Tensor, block_size: int) -> tuple[Tensor, tuple[tuple[Any, ...], _Rows, _Rows]]:
    shape = _check_centroids(key, block_size)
    centroids = key.new_empty(shape, dtype=sum_dtype(key.dtype))
    batch, heads, tokens, dim = key.shape
    # A native problem has at least one head; without any there is nothing to compute either.
    sizes = Sizes(batch if heads > 0 else 0, max(heads, 1), max(heads, 1), tokens, tokens, dim, dim)
    fields = (DTYPE_CODES[key.dtype], *sizes, block_size, 1, False, 1.0, 0, 0, torch.get_num_threads())
    return centroids, (fields, rows_of(key, False), rows_of(centroids, False))


def _block_centroids_cpu(key: Tensor, block_size: int) -> Tensor:
    centroids, arguments = centroid_call(key, block_size)
    _native.moba_centroids_cpu(*arguments)
    return centroids


def _block_centroids_fake(key: Tensor, block_size: int) -> Tensor:
    return key.new_empty(_check_centroids(key, block_size), dtype=sum_dtype(key.dtype))


class _BlockCentroids(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, block_size: int) -> Tensor:  # type: ignore[override]
        ctx.key_shape, ctx.key_dtype, ctx.block_size = key.shape, key.dtype, block_size
        with below_autograd():
            return torch.ops.topgather.block_centroids.default(key, block_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Plain torch: each key gets its block's gradient over the block's size. Differentiable again.
        num_keys = ctx.key_shape[2]
        block_of_key = torch.arange(num_keys, device=grad.device) // ctx.block_size
        last_size = num_keys - (grad.size(2) - 1) * ctx.block_size
        block_sizes = torch.full((grad.size(2), 1), ctx.block_size, device=grad.device, dtype=grad.dtype)
        block_sizes[-1:] = last_size
        return (grad / block_sizes).index_select(2, block_of_key).to(ctx.key_dtype), None


def _block_centroids_autograd(key: Tensor, block_size: int) -> Tensor:
    if needs_grad((key,)):
        return _BlockCentroids.apply(key, block_size)
    with below_autograd():
        return torch.ops.topgather.block_centroids.default(key, block_size)


library.impl("block_centroids", _block_centroids_cpu, "CPU")
library.impl("block_centroids", _block_centroids_autograd, "Autograd")
register_fake("block_centroids", _block_centroids_fake)


# --- moba_route -----------------------------------------------------------------------------------------------------


def _moba_route_cpu(
    query: Tensor,
    key: Tensor,
    block_size: int,
    top_k: int,
    is_causal: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Tensor:
    checks.check_count("top_k", top_k)
    call = _native_call(
        query, key, None, None, block_size, top_k, is_causal, 1.0,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    packed = call.packed
    block_indices = query.new_empty((*lse_shape(query, packed), top_k), dtype=torch.int32)
    _native.moba_route_cpu(call.fields, rows_of(query, packed), rows_of(key, packed), per_head(block_indices, packed))
    return block_indices


def _moba_route_fake(
    query: Tensor,
    key: Tensor,
    block_size: int,
    top_k: int,
    is_causal: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Tensor:
    checks.check_count("top_k", top_k)
    check_problem(query, key, None, None, block_size, cu_seqlens_q, cu_seqlens_k)
    return query.new_empty((*lse_shape(query, cu_seqlens_q is not None), top_k), dtype=torch.int32)


def _moba_route_autograd(*args: Any, **kwargs: Any) -> Tensor:
    # The choice of blocks has no gradient.
    with below_autograd():
        return torch.ops.topgather.moba_route.default(*args, **kwargs)


library.impl("moba_route", _moba_route_cpu, "CPU")
library.impl("moba_route", _moba_route_autograd, "Autograd")
register_fake("moba_route", _moba_route_fake)


# --- moba_attention -------------------------------------------------------------------------------------------------


def _moba_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    checks.check_scale(scale)
    call = _native_call(
        query, key, value, block_indices, block_size, block_indices.size(-1), is_causal, scale,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    packed = call.packed
    block_indices = checks.contiguous_rows(block_indices)
    out = empty_like_rows(query, call.sizes.value_dim)
    lse = query.new_empty(lse_shape(query, packed), dtype=sum_dtype(query.dtype))
    _native.moba_forward_cpu(
        call.fields,
        rows_of(query, packed),
        rows_of(key, packed),
        rows_of(value, packed),
        per_head(block_indices, packed),
        rows_of(out, packed),
        per_head(lse, packed),
    )
    return out, lse


def _moba_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    sizes = check_problem(query, key, value, block_indices, block_size, cu_seqlens_q, cu_seqlens_k)
    lse = query.new_empty(lse_shape(query, cu_seqlens_q is not None), dtype=sum_dtype(query.dtype))
    return empty_like_rows(query, sizes.value_dim), lse


class _MobaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query, key, value, block_indices, block_size, is_causal, scale = args[:7]
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic = args[7:]
        with below_autograd():
            out, lse = torch.ops.topgather.moba_attention.default(*args)
        ctx.save_for_backward(query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k)
        ctx.options = (block_size, is_causal, scale)
        ctx.max_seqlens = (max_seqlen_q, max_seqlen_k)
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, out, lse, block_indices, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = torch.ops.topgather.moba_attention_backward.default(
            grad_out, grad_lse, query, key, value, out, lse, block_indices, *ctx.options,
            cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens, ctx.deterministic,
        )  # fmt: skip
        return (*grads, *([None] * 9))


def _moba_attention_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    args = (
        query, key, value, block_indices, block_size, is_causal, scale,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic,
    )  # fmt: skip
    if needs_grad((query, key, value)):
        return _MobaAttention.apply(*args)
    with below_autograd():
        return torch.ops.topgather.moba_attention.default(*args)


library.impl("moba_attention", _moba_attention_cpu, "CPU")
library.impl("moba_attention", _moba_attention_autograd, "Autograd")
register_fake("moba_attention", _moba_attention_fake)


# --- moba_attention_backward ----------------------------------------------------------------------------------------


def check_backward(grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        checks.check_same_dtype(name, tensor, "query", query)
        checks.check_same_device(name, tensor, "query", query)
    if grad_out.shape != out.shape or out.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            f"grad_out and out must have query's shape but for the last dimension, got {tuple(grad_out.shape)} "
            f"and {tuple(out.shape)} for query {tuple(query.shape)}"
        )
    for name, tensor in (("lse", lse), ("grad_lse", lse if grad_lse is None else grad_lse)):
        if tensor.dtype != sum_dtype(query.dtype):
            raise TypeError(f"{name} must have dtype {sum_dtype(query.dtype)}, got {tensor.dtype}")
        checks.check_same_device(name, tensor, "query", query)
        if tuple(tensor.shape) != lse_shape(query, query.ndim == 3):
            raise ValueError(f"{name} must have one entry per query and head, got shape {tuple(tensor.shape)}")


def _moba_attention_backward_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_scale(scale)
    call = _native_call(
        query, key, value, block_indices, block_size, block_indices.size(-1), is_causal, scale,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    packed = call.packed
    check_backward(grad_out, grad_lse, query, out, lse)
    checks.check_size("out", out, -1, value.size(-1), "value_dim")
    grad_out, out, block_indices = (
        checks.contiguous_rows(grad_out),
        checks.contiguous_rows(out),
        checks.contiguous_rows(block_indices),
    )
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_query = empty_like_rows(query, query.size(-1), zero=True)
    grad_key = empty_like_rows(key, key.size(-1), zero=True)
    grad_value = empty_like_rows(value, value.size(-1), zero=True)
    _native.moba_backward_cpu(
        call.fields,
        rows_of(query, packed),
        rows_of(key, packed),
        rows_of(value, packed),
        per_head(block_indices, packed),
        rows_of(out, packed),
        per_head(lse, packed),
        rows_of(grad_out, packed),
        (0, 0, 0, 0) if grad_lse is None else per_head(grad_lse, packed),
        rows_of(grad_query, packed),
        rows_of(grad_key, packed),
        rows_of(grad_value, packed),
    )
    return grad_query, grad_key, grad_value


def _moba_attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    check_problem(query, key, value, block_indices, block_size, cu_seqlens_q, cu_seqlens_k)
    check_backward(grad_out, grad_lse, query, out, lse)
    return (
        empty_like_rows(query, query.size(-1)),
        empty_like_rows(key, key.size(-1)),
        empty_like_rows(value, value.size(-1)),
    )


library.impl("moba_attention_backward", _moba_attention_backward_cpu, "CPU")
register_once_differentiable("moba_attention_backward", "moba_attention")
register_fake("moba_attention_backward", _moba_attention_backward_fake)

register_autocast("moba_route", num_inputs=2)
register_autocast("moba_attention", num_inputs=3)

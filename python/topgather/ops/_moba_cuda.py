"""Block attention's CUDA kernels behind the dispatcher.

Nothing here waits for the device: what tensors hold is looked at by kernels alone. Workspace comes from torch's caching
allocator, so that it belongs to the caller's stream and to a captured graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from . import _cuda
from ._library import DTYPE_CODES, sum_dtype
from ._moba_kernels import (
    Sizes,
    centroid_call,
    check_backward,
    check_problem,
    empty_like_rows,
    lse_shape,
    per_head,
    rows_of,
)

MOST_HEAD_DIM = 256


class _Call(NamedTuple):
    """A checked call as the native side takes it. ``keep_alive`` owns the memory ``fields`` points to."""

    sizes: Sizes
    fields: tuple[Any, ...]
    packed: bool
    place: tuple[int, int]
    keep_alive: tuple[Tensor | None, ...]


def _check_cuda(dtype: torch.dtype, **dims: int) -> None:
    if dtype == torch.float64:
        raise TypeError("query must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
                        "got torch.float64")  # fmt: skip
    for name, dim in dims.items():
        if dim > MOST_HEAD_DIM:
            raise ValueError(f"{name} must be at most {MOST_HEAD_DIM} on CUDA, got {dim}")


def _call(
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
) -> _Call:
    sizes = check_problem(query, key, value, block_indices, block_size, cu_seqlens_q, cu_seqlens_k)
    _check_cuda(query.dtype, head_dim=sizes.head_dim, value_dim=sizes.value_dim)
    bounds = [None if bound is None else bound.to(torch.int64).contiguous() for bound in (cu_seqlens_q, cu_seqlens_k)]
    addresses = [0 if bound is None else bound.data_ptr() for bound in bounds]
    fields = (DTYPE_CODES[query.dtype], *sizes, block_size, top_k, is_causal, scale, *addresses, 1)
    return _Call(sizes, fields, bounds[0] is not None, _cuda.place(query.device), tuple(bounds))


def _aligned_rows(tensor: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Address and strides of an aligned tensor. Strides that lead nowhere count as 0."""
    address, *strides = rows_of(tensor, packed)
    if tensor.numel() == 0:
        return 0, 0, 0, 0
    sizes = (1, tensor.size(1), tensor.size(0)) if packed else tensor.shape[:3]
    batch, head, row = (stride if size > 1 else 0 for stride, size in zip(strides, sizes, strict=True))
    return address, batch, head, row


def _workspace(kind: str, call: _Call, like: Tensor) -> Tensor:
    num_bytes = _cuda.native_module().moba_cuda_workspace_bytes(kind, call.fields, call.place[0])
    return like.new_empty(num_bytes, dtype=torch.uint8)


# --- block_centroids ------------------------------------------------------------------------------------------------


def block_centroids_cuda(key: Tensor, block_size: int) -> Tensor:
    """CUDA kernel of ``topgather::block_centroids``."""
    _check_cuda(key.dtype)
    centroids, arguments = centroid_call(key, block_size)
    _cuda.native_module().moba_centroids_cuda(*arguments, *_cuda.place(key.device))
    return centroids


# --- moba_route -----------------------------------------------------------------------------------------------------


def moba_route_cuda(
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
    """CUDA kernel of ``topgather::moba_route``."""
    checks.check_count("top_k", top_k)
    call = _call(query, key, None, None, block_size, top_k, is_causal, 1.0, cu_seqlens_q, cu_seqlens_k)
    packed = call.packed
    query, key = _cuda.aligned(query), _cuda.aligned(key)
    block_indices = query.new_empty((*lse_shape(query, packed), top_k), dtype=torch.int32)
    workspace = _workspace("route", call, query)
    _cuda.native_module().moba_route_cuda(
        call.fields,
        _aligned_rows(query, packed),
        _aligned_rows(key, packed),
        per_head(block_indices, packed),
        (workspace.data_ptr(), workspace.numel()),
        *call.place,
    )
    return block_indices


# --- moba_attention -------------------------------------------------------------------------------------------------


def moba_attention_cuda(
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
    """CUDA kernel of ``topgather::moba_attention``. The forward is always deterministic."""
    checks.check_scale(scale)
    call = _call(
        query, key, value, block_indices, block_size, block_indices.size(-1), is_causal, scale,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    packed = call.packed
    out = empty_like_rows(query, call.sizes.value_dim)
    lse = query.new_empty(lse_shape(query, packed), dtype=sum_dtype(query.dtype))
    query, key, value = _cuda.aligned(query), _cuda.aligned(key), _cuda.aligned(value)
    block_indices = checks.contiguous_rows(block_indices)
    workspace = _workspace("forward", call, query)
    _cuda.native_module().moba_forward_cuda(
        call.fields,
        _aligned_rows(query, packed),
        _aligned_rows(key, packed),
        _aligned_rows(value, packed),
        per_head(block_indices, packed),
        rows_of(out, packed),
        per_head(lse, packed),
        (workspace.data_ptr(), workspace.numel()),
        *call.place,
    )
    return out, lse


def moba_attention_backward_cuda(
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
    """CUDA kernel of ``topgather::moba_attention_backward``."""
    checks.check_scale(scale)
    call = _call(
        query, key, value, block_indices, block_size, block_indices.size(-1), is_causal, scale,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    packed = call.packed
    check_backward(grad_out, grad_lse, query, out, lse)
    checks.check_size("grad_out", grad_out, -1, value.size(-1), "value_dim")
    grad_query = empty_like_rows(query, query.size(-1))
    grad_key = empty_like_rows(key, key.size(-1))
    grad_value = empty_like_rows(value, value.size(-1))
    query, key, value = _cuda.aligned(query), _cuda.aligned(key), _cuda.aligned(value)
    grad_out = _cuda.aligned(checks.contiguous_rows(grad_out))
    out, block_indices, lse = checks.contiguous_rows(out), checks.contiguous_rows(block_indices), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    workspace = _workspace("backward_deterministic" if deterministic else "backward", call, query)
    _cuda.native_module().moba_backward_cuda(
        call.fields,
        _aligned_rows(query, packed),
        _aligned_rows(key, packed),
        _aligned_rows(value, packed),
        per_head(block_indices, packed),
        rows_of(out, packed),
        per_head(lse, packed),
        _aligned_rows(grad_out, packed),
        (0, 0, 0, 0) if grad_lse is None else per_head(grad_lse, packed),
        rows_of(grad_query, packed),
        rows_of(grad_key, packed),
        rows_of(grad_value, packed),
        (workspace.data_ptr(), workspace.numel()),
        deterministic,
        *call.place,
    )
    return grad_query, grad_key, grad_value


_cuda.register_kernels(
    {
        "block_centroids": block_centroids_cuda,
        "moba_route": moba_route_cuda,
        "moba_attention": moba_attention_cuda,
        "moba_attention_backward": moba_attention_backward_cuda,
    }
)

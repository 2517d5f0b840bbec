"""The CUDA kernels of decoding with a cache behind the dispatcher.

Nothing here waits for the device: lengths, page tables and choices are looked at by kernels alone, and how much
workspace is needed follows from shapes, so that a captured graph holds all of a step. Workspace comes from torch's
caching allocator. The cache is never copied, however its rows lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _cuda
from ._decode_kernels import (
    check_append,
    check_decode,
    check_route,
    contiguous,
    empty_choices,
    empty_results,
    problem_of,
    tensor_of,
)

# A query's columns in float32 must fit shared memory, beside little else.
MOST_HEAD_DIM = 8192


def _check_kernels_take(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise TypeError(f"{name} must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
                        "got torch.float64")  # fmt: skip
    if tensor.size(-1) > MOST_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MOST_HEAD_DIM} on CUDA, got {tensor.size(-1)}")


def _workspace(num_bytes: int, like: Tensor) -> Tensor:
    return like.new_empty(num_bytes, dtype=torch.uint8)


def moba_cache_append_cuda(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
) -> None:
    """CUDA kernel of ``topgather::moba_cache_append``. Tokens that have no place are dropped."""
    sizes = check_append(key, value, key_pages, value_pages, centroids, seq_lens, page_table, num_tokens, block_size)
    _check_kernels_take("key", key)
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    _cuda.native_module().moba_cache_append_cuda(
        problem_of(key.dtype, sizes, 1.0, seq_lens, num_tokens, page_table),
        tensor_of(key),
        tensor_of(value),
        tensor_of(key_pages),
        tensor_of(value_pages),
        tensor_of(centroids),
        *_cuda.place(key.device),
    )


def moba_decode_route_cuda(
    query: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
) -> Tensor:
    """CUDA kernel of ``topgather::moba_decode_route``."""
    sizes = check_route(query, centroids, seq_lens, page_table, num_tokens, block_size, page_size, top_k)
    _check_kernels_take("query", query)
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    block_indices = empty_choices(query, top_k)
    problem: tuple[Any, ...] = problem_of(query.dtype, sizes, 1.0, seq_lens, num_tokens, page_table)
    module = _cuda.native_module()
    workspace = _workspace(module.moba_decode_route_workspace_bytes(problem), query)
    module.moba_decode_route_cuda(
        problem,
        tensor_of(query),
        tensor_of(centroids),
        tensor_of(block_indices),
        (workspace.data_ptr(), workspace.numel()),
        *_cuda.place(query.device),
    )
    return block_indices


def moba_decode_cuda(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_indices: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """CUDA kernel of ``topgather::moba_decode``. A query whose lengths, pages or choices cannot be gets NaN."""
    checks.check_scale(scale)
    sizes = check_decode(query, key_pages, value_pages, block_indices, seq_lens, page_table, num_tokens, block_size)
    _check_kernels_take("query", query)
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    block_indices = checks.contiguous_rows(block_indices)
    out, lse = empty_results(query, value_pages)
    query = _cuda.aligned(query)  # the new tokens alone: the cache stays where it is
    problem: tuple[Any, ...] = problem_of(query.dtype, sizes, scale, seq_lens, num_tokens, page_table)
    module = _cuda.native_module()
    workspace = _workspace(module.moba_decode_workspace_bytes(problem), query)
    module.moba_decode_cuda(
        problem,
        tensor_of(query),
        tensor_of(key_pages),
        tensor_of(value_pages),
        tensor_of(block_indices),
        tensor_of(out),
        tensor_of(lse),
        (workspace.data_ptr(), workspace.numel()),
        *_cuda.place(query.device),
    )
    return out, lse


_cuda.register_kernels(
    {
        "moba_cache_append": moba_cache_append_cuda,
        "moba_decode_route": moba_decode_route_cuda,
        "moba_decode": moba_decode_cuda,
    }
)

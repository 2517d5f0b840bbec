"""Memory layers' CUDA kernels behind the dispatcher.

Nothing here waits for the device, unless ``TOPGATHER_CHECK_INDICES=1`` asks for indices to be looked at before they are
followed; a kernel follows no index that names no row. A sparse gradient waits once, in ``number_touched``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import _cuda
from ._library import sum_dtype
from ._memory_kernels import (
    Call,
    check_product_keys,
    dense_backward_call,
    dot_call,
    lookup_call,
    raise_for_bad_index,
    sparse_backward_call,
    topk_call,
)

MOST_HALF_DIM = 256
MOST_TOP_K = 128
CHECK_INDICES_VARIABLE = "TOPGATHER_CHECK_INDICES"
# Scores of a chunk of tokens in the composition of torch ops.
COMPOSED_BYTES = 256 * 2**20


def _check_cuda(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise TypeError(f"{name} must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
                        "got torch.float64")  # fmt: skip


def _check_on_request(indices: Tensor, values: Tensor) -> None:
    if os.environ.get(CHECK_INDICES_VARIABLE, "") not in ("", "0"):
        raise_for_bad_index(indices, values.size(0))


# --- product_key_topk -----------------------------------------------------------------------------------------------


def product_key_topk_cuda(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """CUDA kernel of ``topgather::product_key_topk``; sizes it does not take go by torch's ops."""
    _check_cuda("query", query.dtype)
    check_product_keys(query, keys, top_k)
    half_dim = keys.size(3)
    halves = query.unflatten(2, (2, half_dim))
    if half_dim > MOST_HALF_DIM or top_k > MOST_TOP_K:
        return composed_topk(halves, keys, top_k)
    halves, keys = _cuda.aligned(halves), _cuda.aligned(keys)
    call = topk_call(halves, keys, top_k, half_dim)
    _cuda.native_module().product_key_topk_cuda(*call.arguments, *_cuda.place(query.device))
    scores, indices = call.results
    return scores, indices


def composed_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same contract by torch's own ops, a chunk of tokens at a time: for head_dim above 512 or top_k above 128.

    ``query [T, H, 2, D / 2]``, ``keys [H, 2, n, D / 2]``.
    """
    num_tokens, num_heads, _, _ = query.shape
    num_keys = keys.size(2)
    dtype = sum_dtype(query.dtype)
    scores = query.new_empty((num_tokens, num_heads, top_k), dtype=dtype)
    indices = query.new_empty((num_tokens, num_heads, top_k), dtype=torch.int64)
    length = min(top_k, num_keys)
    ranks = torch.arange(length, device=query.device)
    # Only pairs of ranks that fewer than top_k other pairs dominate can be among the best.
    first, second = _pairs_of_ranks(length, top_k, query.device)
    bytes_a_token = num_heads * (2 * num_keys * 12 + len(first) * 32)
    chunk = max(COMPOSED_BYTES // max(bytes_a_token, 1), 1)
    wide_keys = keys.to(dtype)
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        halves = torch.einsum("thsd,hsnd->thsn", query[part].to(dtype), wide_keys)
        kept = _ranked(halves).sort(dim=-1, descending=True, stable=True).indices[..., ranks]
        best = halves.gather(-1, kept)
        sums = best[:, :, 0, first] + best[:, :, 1, second]
        pairs = kept[:, :, 0, first] * num_keys + kept[:, :, 1, second]
        ranking = _ranked(best[:, :, 0, first]) + _ranked(best[:, :, 1, second])
        ranking = torch.where(ranking.isnan(), -torch.inf, ranking)
        # By index first: a stable sort by score then leaves ties to the lower one.
        by_index = pairs.argsort(dim=-1)
        by_score = ranking.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        order = by_index.gather(-1, by_score)
        scores[part] = sums.gather(-1, order)
        indices[part] = pairs.gather(-1, order)
    return scores, indices


def _ranked(scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), torch.inf, scores)


def _pairs_of_ranks(length: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    counts = [min(top_k // (rank + 1), length) for rank in range(length)]
    first = torch.repeat_interleave(torch.arange(length), torch.tensor(counts, dtype=torch.int64))
    second = torch.cat([torch.arange(count) for count in counts])
    return first.to(device), second.to(device)


# --- lookups --------------------------------------------------------------------------------------------------------


def memory_lookup_cuda(values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool = False) -> Tensor:
    """CUDA kernel of ``topgather::memory_lookup``."""
    _check_cuda("values", values.dtype)
    call = lookup_call(values, indices, weights)
    _check_on_request(indices, values)
    _cuda.native_module().memory_lookup_cuda(*call.arguments, *_cuda.place(values.device))
    return call.results[0]


def memory_dot_cuda(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    """CUDA kernel of ``topgather::memory_dot``."""
    _check_cuda("values", values.dtype)
    call = dot_call(values, indices, x)
    _check_on_request(indices, values)
    _cuda.native_module().memory_dot_cuda(*call.arguments, *_cuda.place(values.device))
    return call.results[0]


def _run_backward(call: Call, values: Tensor) -> None:
    problem: tuple[Any, ...] = call.arguments[0]
    module = _cuda.native_module()
    num_bytes = module.memory_backward_workspace_bytes(problem)
    workspace = values.new_empty(num_bytes, dtype=torch.uint8)
    module.memory_backward_cuda(*call.arguments, (workspace.data_ptr(), num_bytes), *_cuda.place(values.device))


def memory_backward_cuda(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor]:
    """CUDA kernel of ``topgather::memory_backward``."""
    _check_cuda("values", values.dtype)
    call = dense_backward_call(grad_out, values, indices, weights, needs_grad_weights)
    _run_backward(call, values)
    grad_values, grad_weights = call.results
    return grad_values, grad_weights


def memory_backward_sparse_cuda(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel of ``topgather::memory_backward_sparse``."""
    _check_cuda("values", values.dtype)
    touched, call = sparse_backward_call(grad_out, values, indices, weights, needs_grad_weights)
    _run_backward(call, values)
    grad_rows, grad_weights = call.results
    return touched, grad_rows, grad_weights


_cuda.register_kernels(
    {
        "product_key_topk": product_key_topk_cuda,
        "memory_lookup": memory_lookup_cuda,
        "memory_dot": memory_dot_cuda,
        "memory_backward": memory_backward_cuda,
        "memory_backward_sparse": memory_backward_sparse_cuda,
    }
)

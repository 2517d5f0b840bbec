"""The ops of decoding with a cache: ``csrc/decode/decode_params.h`` says how a cache's pages lie.

None has a gradient. :mod:`topgather.cache` has what users call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import checks, cuda, tensors
from .._common.library import sum_dtype
from .._common.spec import Op, register
from ._moba_ops import FORCED

# A query's columns in float32 must fit shared memory, beside little else.
MAX_CUDA_HEAD_DIM = 8192


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_tokens(name: str, tensor: Tensor) -> None:
    checks.check_ndim(name, tensor, 4, "[batch, heads, tokens, dim]")
    checks.check_floating(name, tensor)
    checks.check_contiguous_rows(name, tensor)
    if tensor.size(3) < 1:
        raise ValueError(f"{name} must have a head_dim of at least 1, got shape {tuple(tensor.shape)}")


def _check_pages(name: str, pages: Tensor, new_name: str, new: Tensor) -> None:
    checks.check_ndim(name, pages, 4, "[pages, heads, rows, dim]")
    checks.check_same_device(name, pages, new_name, new)
    checks.check_contiguous_rows(name, pages)
    expected = sum_dtype(new.dtype) if name == "centroids" else new.dtype
    if pages.dtype != expected:
        raise TypeError(f"{name} must have dtype {expected} for {new_name} of {new.dtype}, got {pages.dtype}")


def _check_centroids(centroids: Tensor, page_size: int, block_size: int, new_name: str, new: Tensor) -> None:
    _check_pages("centroids", centroids, new_name, new)
    checks.check_size("centroids", centroids, 2, -(-page_size // block_size), "blocks of a page")
    checks.check_size("centroids", centroids, 3, new.size(3), f"head_dim of {new_name}")


def _check_keys_and_values(key_pages: Tensor, value_pages: Tensor, new_name: str, new: Tensor) -> None:
    _check_pages("key_pages", key_pages, new_name, new)
    checks.check_size("key_pages", key_pages, 3, new.size(3), f"head_dim of {new_name}")
    _check_pages("value_pages", value_pages, new_name, new)
    for dim, meaning in ((0, "number of pages"), (1, "key heads of the cache"), (2, "page_size")):
        checks.check_size("value_pages", value_pages, dim, key_pages.size(dim), meaning)


def _check_integers(name: str, tensor: Tensor, like: Tensor) -> None:
    checks.check_dtype(name, tensor, torch.int32)
    checks.check_same_device(name, tensor, "the cache", like)


def _check_sequences(
    new: Tensor,
    num_pages: int,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
) -> None:
    """Lengths and the table of pages, but for what they hold."""
    checks.check_count("page_size", page_size)
    batch_size = new.size(0)
    for name, lengths in (("seq_lens", seq_lens), ("num_tokens", num_tokens)):
        if lengths is None:
            continue
        _check_integers(name, lengths, new)
        if lengths.ndim != 1 or lengths.size(0) != batch_size:
            raise ValueError(f"{name} must have shape [{batch_size}] (batch size), got {tuple(lengths.shape)}")
    if page_table is None:
        if num_pages != batch_size:
            raise ValueError(
                f"without page_table there must be one page a sequence, got {num_pages} pages and a batch size of "
                f"{batch_size}"
            )
        return
    _check_integers("page_table", page_table, new)
    if page_table.ndim != 2 or page_table.size(0) != batch_size:
        raise ValueError(
            f"page_table must have shape [{batch_size}, pages of a sequence], got {tuple(page_table.shape)}"
        )
    if page_size % block_size != 0:
        raise ValueError(
            f"page_size must be a multiple of block_size with a page_table, got page_size {page_size} and "
            f"block_size {block_size}"
        )


def _check_append(
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
    _check_tokens("key", key)
    _check_keys_and_values(key_pages, value_pages, "key", key)
    num_pages, num_kv_heads, page_size, _ = key_pages.shape
    _check_centroids(centroids, page_size, block_size, "key", key)
    checks.check_size("centroids", centroids, 0, num_pages, "number of pages")
    checks.check_size("centroids", centroids, 1, num_kv_heads, "key heads of the cache")
    checks.check_size("key", key, 1, num_kv_heads, "key heads of the cache")
    checks.check_ndim("value", value, 4, "[batch, heads, tokens, dim]")
    checks.check_same_dtype("value", value, "key", key)
    checks.check_same_device("value", value, "key", key)
    checks.check_contiguous_rows("value", value)
    for dim, expected, meaning in (
        (0, key.size(0), "batch size of key"),
        (1, num_kv_heads, "key heads of the cache"),
        (2, key.size(2), "tokens of key"),
        (3, value_pages.size(3), "value_dim of the cache"),
    ):
        checks.check_size("value", value, dim, expected, meaning)
    checks.check_heads("key", key.size(1), "the cache", num_kv_heads)
    _check_sequences(key, num_pages, seq_lens, page_table, num_tokens, block_size, page_size)


def _check_route(
    query: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
    force_first: int,
    force_last: int,
) -> None:
    _check_tokens("query", query)
    checks.check_forced(force_first, force_last, top_k)
    _check_centroids(centroids, page_size, block_size, "query", query)
    checks.check_heads("query", query.size(1), "the cache", centroids.size(1))
    _check_sequences(query, centroids.size(0), seq_lens, page_table, num_tokens, block_size, page_size)
    num_pages = 1 if page_table is None else page_table.size(1)
    checks.check_slots(top_k, query.shape[:3], max(num_pages * centroids.size(2), 1))


def _check_decode(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_indices: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    sinks: Tensor | None,
) -> None:
    _check_tokens("query", query)
    _check_keys_and_values(key_pages, value_pages, "query", query)
    num_pages, num_kv_heads, page_size, _ = key_pages.shape
    checks.check_heads("query", query.size(1), "the cache", num_kv_heads)
    _check_sequences(query, num_pages, seq_lens, page_table, num_tokens, block_size, page_size)
    _check_integers("block_indices", block_indices, query)
    if sinks is not None:
        checks.check_logit_per_head(sinks, query.size(1), query)
    checks.check_choices(block_indices, query.shape[:3], num_kv_heads)


def _cuda_check_query(query: Tensor) -> None:
    _check_cuda("query", query)


def _cuda_check_key(key: Tensor) -> None:
    _check_cuda("key", key)


def _check_cuda(name: str, tensor: Tensor) -> None:
    cuda.check_dtype(name, tensor)
    if tensor.size(-1) > MAX_CUDA_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_CUDA_HEAD_DIM} on CUDA, got {tensor.size(-1)}")


# --- the ops --------------------------------------------------------------------------------------------------------


def _choices(query: Tensor, top_k: int) -> Tensor:
    return tensors.empty(query, (*query.shape[:3], top_k), torch.int32)


def _results(query: Tensor, value_pages: Tensor) -> tuple[Tensor, Tensor]:
    out = tensors.empty_like_rows(query, value_pages.size(3))
    return out, tensors.empty(query, query.shape[:3], sum_dtype(query.dtype))


_LENGTHS = "Tensor seq_lens, Tensor? page_table, Tensor? num_tokens, SymInt block_size"
_CONTIGUOUS = dict.fromkeys(("seq_lens", "page_table", "num_tokens"), tensors.contiguous)

# Nothing here waits for the device: on CUDA lengths, page tables and choices are looked at by kernels alone, and how
# much workspace is needed follows from shapes, so that a captured graph holds all of a step. The cache is never copied.
register(
    Op(
        schema="moba_cache_append(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, "
        f"Tensor(c!) centroids, {_LENGTHS}) -> ()",
        check=_check_append,
        cuda_check=_cuda_check_key,
        inputs=_CONTIGUOUS,
        results=lambda: None,
        not_differentiable="a cache records no gradients; use torch.no_grad()",
    )
)
register(
    Op(
        schema=f"moba_decode_route(Tensor query, Tensor centroids, {_LENGTHS}, SymInt page_size, SymInt top_k, "
        f"{FORCED}) -> Tensor block_indices",
        check=_check_route,
        cuda_check=_cuda_check_query,
        inputs=_CONTIGUOUS,
        results=_choices,
    )
)
register(
    Op(
        schema="moba_decode(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_indices, "
        f"{_LENGTHS}, float scale, float? softcap=None, Tensor? sinks=None, SymInt? window=None) "
        "-> (Tensor out, Tensor lse)",
        check=_check_decode,
        cuda_check=_cuda_check_query,
        inputs={**_CONTIGUOUS, "block_indices": tensors.contiguous_rows, "sinks": tensors.sums_like_query},
        results=_results,
        not_differentiable="moba_decode has no gradient; use torch.no_grad(), or moba_attention",
    )
)

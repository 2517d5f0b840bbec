"""Decoding with a cache behind the dispatcher: schemas, checks, CPU kernels and fake kernels.

A cache is pages of keys, values and centroids; ``csrc/decode/decode_params.h`` says how they lie. None of the ops has a
gradient. :mod:`topgather.cache` is what users call, and
:mod:`topgather.ops._decode_cuda` has the CUDA kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import _checks as checks
from ._library import DTYPE_CODES, define, library, register_fake, sum_dtype
from ._moba_kernels import empty_like_rows

_LENGTHS = "Tensor seq_lens, Tensor? page_table, Tensor? num_tokens, SymInt block_size"
define(
    "moba_cache_append(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!) centroids, "
    f"{_LENGTHS}) -> ()"
)
define(f"moba_decode_route(Tensor query, Tensor centroids, {_LENGTHS}, SymInt page_size, SymInt top_k) -> Tensor")
define(
    "moba_decode(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_indices, "
    f"{_LENGTHS}, float scale) -> (Tensor out, Tensor lse)"
)


class Sizes(NamedTuple):
    """Sizes of a checked problem, in the order the native side takes them."""

    batch_size: int
    num_query_heads: int
    num_kv_heads: int
    query_len: int  # new tokens of a sequence
    head_dim: int
    value_dim: int
    block_size: int
    page_size: int
    num_pages: int
    pages_per_sequence: int
    top_k: int


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_integers(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {tensor.dtype}")
    checks.check_same_device(name, tensor, "the cache", like)


def _check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    checks.check_ndim(name, tensor, 4, "[batch, heads, tokens, dim]")
    checks.check_floating(name, tensor)
    checks.check_same_dtype(name, tensor, like_name, like)
    checks.check_same_device(name, tensor, like_name, like)
    checks.check_contiguous_rows(name, tensor)


def check_problem(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    key_pages: Tensor | None,
    value_pages: Tensor | None,
    centroids: Tensor | None,
    block_indices: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
) -> Sizes:
    """Check all that shapes, dtypes, strides and devices can say about a call of any of the ops; return its sizes.

    Each op has either ``query`` or ``key`` and ``value``, and of the cache what it reads: keys and values together, or
    centroids.
    """
    checks.check_count("block_size", block_size)
    checks.check_count("page_size", page_size)
    checks.check_count("top_k", top_k)
    new_name, new = ("query", query) if query is not None else ("key", key)
    assert new is not None
    _check_like(new_name, new, new_name, new)
    batch_size, num_heads, query_len, head_dim = new.shape
    if head_dim < 1:
        raise ValueError(f"{new_name} must have a head_dim of at least 1, got shape {tuple(new.shape)}")

    num_pages = num_kv_heads = value_dim = 0
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages), ("centroids", centroids)):
        if pages is None:
            continue
        checks.check_ndim(name, pages, 4, "[pages, heads, rows, dim]")
        checks.check_same_device(name, pages, new_name, new)
        checks.check_contiguous_rows(name, pages)
        expected_dtype = sum_dtype(new.dtype) if name == "centroids" else new.dtype
        if pages.dtype != expected_dtype:
            raise TypeError(f"{name} must have dtype {expected_dtype} for {new_name} of {new.dtype}, got {pages.dtype}")
        if pages is (key_pages if key_pages is not None else centroids):
            num_pages, num_kv_heads = pages.size(0), pages.size(1)
        checks.check_size(name, pages, 0, num_pages, "number of pages")
        checks.check_size(name, pages, 1, num_kv_heads, "key heads of the cache")
        rows = -(-page_size // block_size) if name == "centroids" else page_size
        checks.check_size(name, pages, 2, rows, "blocks of a page" if name == "centroids" else "page_size")
        if name == "value_pages":
            value_dim = pages.size(3)
        else:
            checks.check_size(name, pages, 3, head_dim, f"head_dim of {new_name}")

    if query is None:
        assert key is not None and value is not None
        checks.check_size("key", key, 1, num_kv_heads, "key heads of the cache")
        _check_like("value", value, "key", key)
        for dim, expected, meaning in (
            (0, batch_size, "batch size of key"),
            (1, num_kv_heads, "key heads of the cache"),
            (2, query_len, "tokens of key"),
            (3, value_dim, "value_dim of the cache"),
        ):
            checks.check_size("value", value, dim, expected, meaning)
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{new_name} must have a multiple of the cache's heads, at least one, got {num_heads} heads "
            f"and {num_kv_heads} key heads in the cache"
        )

    for name, lengths in (("seq_lens", seq_lens), ("num_tokens", num_tokens)):
        if lengths is None:
            continue
        _check_integers(name, lengths, new)
        if lengths.ndim != 1 or lengths.size(0) != batch_size:
            raise ValueError(f"{name} must have shape [{batch_size}] (batch size), got {tuple(lengths.shape)}")
    pages_per_sequence = 1
    if page_table is None:
        if num_pages != batch_size:
            raise ValueError(
                f"without page_table there must be one page a sequence, got {num_pages} pages and a batch size of "
                f"{batch_size}"
            )
    else:
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
        pages_per_sequence = page_table.size(1)
    if block_indices is not None:
        _check_integers("block_indices", block_indices, new)
        leading = (batch_size, num_heads, query_len)
        if tuple(block_indices.shape) != (*leading, top_k):
            raise ValueError(
                f"block_indices must have shape {list(leading)} + [top_k], got {tuple(block_indices.shape)}"
            )
    return Sizes(
        batch_size, num_heads, num_kv_heads, query_len, head_dim, value_dim,
        block_size, page_size, num_pages, pages_per_sequence, top_k,
    )  # fmt: skip


def check_append(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
) -> Sizes:
    """:func:`check_problem` for the arguments of ``moba_cache_append``."""
    checks.check_ndim("key_pages", key_pages, 4, "[pages, heads, rows, dim]")
    return check_problem(
        None, key, value, key_pages, value_pages, centroids, None,
        seq_lens, page_table, num_tokens, block_size, key_pages.size(2), 1,
    )  # fmt: skip


def check_route(
    query: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
) -> Sizes:
    """:func:`check_problem` for the arguments of ``moba_decode_route``."""
    return check_problem(
        query, None, None, None, None, centroids, None,
        seq_lens, page_table, num_tokens, block_size, page_size, top_k,
    )  # fmt: skip


def check_decode(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_indices: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
) -> Sizes:
    """:func:`check_problem` for the arguments of ``moba_decode``."""
    checks.check_ndim("key_pages", key_pages, 4, "[pages, heads, rows, dim]")
    checks.check_ndim("block_indices", block_indices, 4, "[batch, heads, tokens, top_k]")
    return check_problem(
        query, None, None, key_pages, value_pages, None, block_indices,
        seq_lens, page_table, num_tokens, block_size, key_pages.size(2), block_indices.size(3),
    )  # fmt: skip


# --- the native side's arguments ------------------------------------------------------------------------------------


def problem_of(
    dtype: torch.dtype,
    sizes: Sizes,
    scale: float,
    seq_lens: Tensor,
    num_tokens: Tensor | None,
    page_table: Tensor | None,
) -> tuple[Any, ...]:
    """In the order of DecodeProblem's fields. The lengths and the table must be contiguous and outlive the call."""
    return (
        DTYPE_CODES[dtype],
        *sizes,
        scale,
        seq_lens.data_ptr(),
        0 if num_tokens is None else num_tokens.data_ptr(),
        0 if page_table is None else page_table.data_ptr(),
        torch.get_num_threads(),
    )


def tensor_of(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and the strides of the first three dimensions; a tensor of new tokens, pages, choices or lse."""
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor or a contiguous copy, None for None."""
    return None if tensor is None else tensor.contiguous()


def empty_choices(query: Tensor, top_k: int) -> Tensor:
    """What ``moba_decode_route`` returns, not filled in."""
    return query.new_empty((*query.shape[:3], top_k), dtype=torch.int32)


def empty_results(query: Tensor, value_pages: Tensor) -> tuple[Tensor, Tensor]:
    """What ``moba_decode`` returns, not filled in."""
    out = empty_like_rows(query, value_pages.size(3))
    return out, query.new_empty(query.shape[:3], dtype=sum_dtype(query.dtype))


# --- moba_cache_append ----------------------------------------------------------------------------------------------


def _moba_cache_append_cpu(
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
    sizes = check_append(
        key, value, key_pages, value_pages, centroids, seq_lens, page_table, num_tokens, block_size
    )  # fmt: skip
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    _native.moba_cache_append_cpu(
        problem_of(key.dtype, sizes, 1.0, seq_lens, num_tokens, page_table),
        tensor_of(key),
        tensor_of(value),
        tensor_of(key_pages),
        tensor_of(value_pages),
        tensor_of(centroids),
    )


def _moba_cache_append_fake(
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
    check_append(key, value, key_pages, value_pages, centroids, seq_lens, page_table, num_tokens, block_size)


library.impl("moba_cache_append", _moba_cache_append_cpu, "CPU")
register_fake("moba_cache_append", _moba_cache_append_fake)


# --- moba_decode_route ----------------------------------------------------------------------------------------------


def _moba_decode_route_cpu(
    query: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
) -> Tensor:
    sizes = check_route(query, centroids, seq_lens, page_table, num_tokens, block_size, page_size, top_k)
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    block_indices = empty_choices(query, top_k)
    _native.moba_decode_route_cpu(
        problem_of(query.dtype, sizes, 1.0, seq_lens, num_tokens, page_table),
        tensor_of(query),
        tensor_of(centroids),
        tensor_of(block_indices),
    )
    return block_indices


def _moba_decode_route_fake(
    query: Tensor,
    centroids: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    num_tokens: Tensor | None,
    block_size: int,
    page_size: int,
    top_k: int,
) -> Tensor:
    check_route(query, centroids, seq_lens, page_table, num_tokens, block_size, page_size, top_k)
    return empty_choices(query, top_k)


library.impl("moba_decode_route", _moba_decode_route_cpu, "CPU")
register_fake("moba_decode_route", _moba_decode_route_fake)


# --- moba_decode ----------------------------------------------------------------------------------------------------


def _moba_decode_cpu(
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
    checks.check_scale(scale)
    sizes = check_decode(query, key_pages, value_pages, block_indices, seq_lens, page_table, num_tokens, block_size)
    seq_lens, num_tokens, page_table = seq_lens.contiguous(), contiguous(num_tokens), contiguous(page_table)
    block_indices = checks.contiguous_rows(block_indices)
    out, lse = empty_results(query, value_pages)
    _native.moba_decode_cpu(
        problem_of(query.dtype, sizes, scale, seq_lens, num_tokens, page_table),
        tensor_of(query),
        tensor_of(key_pages),
        tensor_of(value_pages),
        tensor_of(block_indices),
        tensor_of(out),
        tensor_of(lse),
    )
    return out, lse


def _moba_decode_fake(
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
    check_decode(query, key_pages, value_pages, block_indices, seq_lens, page_table, num_tokens, block_size)
    return empty_results(query, value_pages)


library.impl("moba_decode", _moba_decode_cpu, "CPU")
register_fake("moba_decode", _moba_decode_fake)

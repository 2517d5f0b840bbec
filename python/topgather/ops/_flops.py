"""Formulas by which ``torch.utils.flop_counter.FlopCounterMode`` counts the ops, on what was chosen.

As torch's own formulas they count matrix products alone, a multiplication and an addition as two. Of attention they
count the pairs of a query and a key that it sees, where torch's count all pairs; a gradient has what its forward has
and is computed again, as torch counts it. Where a choice cannot be read, of fake tensors, every slot counts as full.

Loaded behind ``torch.utils.flop_counter``, which loads triton where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .grid import WINDOW


def _formula(op_name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula, which takes arguments of the op by their names."""
    packet = getattr(torch.ops.topgather, op_name)
    arguments = packet.default._schema.arguments

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        wanted = formula.__code__.co_varnames[: formula.__code__.co_argcount]

        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
            given |= dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
            return formula(*(given[name] for name in wanted))

        register_flop_formula(packet, get_raw=True)(counted)
        return formula

    return register


def _is_readable(*held: Tensor | None) -> bool:
    given = [tensor for tensor in held if tensor is not None]
    return not any(isinstance(tensor, FakeTensor) or tensor.device.type == "meta" for tensor in given)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.long().diff()


# --- block attention ------------------------------------------------------------------------------------------------


def _seen(
    block_indices: Tensor,
    positions: Tensor,
    num_keys: Tensor,
    block_size: int,
    is_causal: bool,
    window: int | None = None,
) -> int:
    """Pairs that a choice ``[..., T, K]`` lets see each other; positions and numbers of keys ``[T]``.

    With a window a query sees the newest keys, and of its blocks those that are older.
    """
    limit = torch.minimum(num_keys, positions + 1) if is_causal else num_keys
    newest = limit.clamp(min=0) if window is None else limit.clamp(0, window)
    older = limit - (0 if window is None else newest)
    total = 0 if window is None else int(newest.sum()) * math.prod(block_indices.shape[:-2])
    for choice in block_indices.flatten(0, -3):  # a head at a time: what this takes beside the choice stays small
        visible = (older[..., None] - choice.long() * block_size).clamp(0, block_size)
        total += int(visible.masked_fill(choice < 0, 0).sum())
    return total


def _pairs(
    query: Tensor,
    key: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None = None,
) -> int:
    """Pairs of a query and a key, over all query heads."""
    is_packed = query.ndim == 3
    num_heads, num_keys = query.size(1), key.size(0 if is_packed else 2)
    sharing = num_heads // block_indices.size(-3)
    if not _is_readable(block_indices, cu_seqlens_q, cu_seqlens_k):
        slots = block_indices.numel() * min(block_size, num_keys)
        return sharing * (slots + block_indices.numel() // block_indices.size(-1) * (window or 0))
    device = block_indices.device
    if cu_seqlens_q is None or cu_seqlens_k is None:
        num_queries = query.size(2)
        positions = torch.arange(num_queries, device=device) + num_keys - num_queries
        limit = torch.full_like(positions, num_keys)
    else:
        of_query = torch.bucketize(torch.arange(query.size(0), device=device), cu_seqlens_q[1:], right=True)
        of_query = of_query.clamp(max=cu_seqlens_q.numel() - 2)
        limit = _lengths(cu_seqlens_k)[of_query]
        positions = torch.arange(query.size(0), device=device) - cu_seqlens_q[of_query]
        positions = positions + limit - _lengths(cu_seqlens_q)[of_query]
    return sharing * _seen(block_indices, positions, limit, block_size, is_causal, window)


@_formula("moba_attention")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor, block_size: int, is_causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, window: int | None,
) -> int:  # fmt: skip
    pairs = _pairs(query, key, block_indices, block_size, is_causal, cu_seqlens_q, cu_seqlens_k, window)
    return 2 * pairs * (query.size(-1) + value.size(-1))


@_formula("moba_attention_backward")
def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor, block_size: int, is_causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, window: int | None,
) -> int:  # fmt: skip
    """Scores again, and the gradients of query and key; of weights and values."""
    pairs = _pairs(query, key, block_indices, block_size, is_causal, cu_seqlens_q, cu_seqlens_k, window)
    return 2 * pairs * (3 * query.size(-1) + 2 * value.size(-1))


def _blocks_before(num_positions: int, block_size: int) -> int:
    """Blocks that end before a position, summed over the first positions of a sequence."""
    blocks, rest = divmod(num_positions, block_size)
    return block_size * blocks * (blocks - 1) // 2 + blocks * rest


def _scored(num_queries: int, num_keys: int, block_size: int, is_causal: bool) -> int:
    """Pairs of a query and a mean key that are scored; the own block is not."""
    if not is_causal:
        return num_queries * -(-num_keys // block_size)
    first = max(0, num_keys - num_queries)
    return _blocks_before(num_keys, block_size) - _blocks_before(first, block_size)


@_formula("moba_route")
def _route(
    query: Tensor, key: Tensor, block_size: int, is_causal: bool, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_k: int,
) -> int:  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch, num_heads, num_queries, head_dim = query.shape
        return 2 * batch * num_heads * head_dim * _scored(num_queries, key.size(2), block_size, is_causal)
    num_queries, num_heads, head_dim = query.shape
    if _is_readable(cu_seqlens_q, cu_seqlens_k):
        lengths = zip(_lengths(cu_seqlens_q).tolist(), _lengths(cu_seqlens_k).tolist(), strict=True)
        return 2 * num_heads * head_dim * sum(_scored(*pair, block_size, is_causal) for pair in lengths)
    return 2 * num_heads * head_dim * num_queries * -(-max_seqlen_k // block_size)


@_formula("moba_decode_route")
def _decode_route(
    query: Tensor, centroids: Tensor, seq_lens: Tensor, page_table: Tensor | None, num_tokens: Tensor | None,
    block_size: int,
) -> int:  # fmt: skip
    batch, num_heads, num_queries, head_dim = query.shape
    if _is_readable(seq_lens, num_tokens):
        new = [num_queries] * batch if num_tokens is None else num_tokens.tolist()
        scored = sum(_scored(*pair, block_size, True) for pair in zip(new, seq_lens.tolist(), strict=True))
        return 2 * num_heads * head_dim * scored
    pages = 1 if page_table is None else page_table.size(1)
    return 2 * batch * num_heads * num_queries * head_dim * pages * centroids.size(2)


@_formula("moba_decode")
def _decode(
    query: Tensor, value_pages: Tensor, block_indices: Tensor, seq_lens: Tensor, num_tokens: Tensor | None,
    block_size: int, window: int | None,
) -> int:  # fmt: skip
    batch, num_heads, num_queries, head_dim = query.shape
    sharing, width = num_heads // block_indices.size(1), 2 * (head_dim + value_pages.size(3))
    if not _is_readable(block_indices, seq_lens, num_tokens):
        rows = block_indices.numel() // block_indices.size(-1)
        return width * sharing * (block_indices.numel() * block_size + rows * (window or 0))
    lengths = seq_lens.long()[:, None]
    new = torch.full_like(lengths, num_queries) if num_tokens is None else num_tokens.long()[:, None]
    row = torch.arange(num_queries, device=seq_lens.device)
    # A row past a sequence's new tokens sees nothing.
    positions = torch.where(row < new, lengths - new + row, -1)
    seen = (_seen(block_indices[b : b + 1], positions[b], lengths[b], block_size, True, window) for b in range(batch))
    return width * sharing * sum(seen)


# --- the indexer ----------------------------------------------------------------------------------------------------


def _all_pairs(num_queries: int, num_keys: int, is_causal: bool) -> int:
    """Pairs of a query and a key that it may see."""
    if not is_causal:
        return num_queries * num_keys
    first = max(0, num_keys - num_queries)
    return (num_keys * (num_keys + 1) - first * (first + 1)) // 2


@_formula("index_route")
def _index_route(index_query: Tensor, index_key: Tensor, is_causal: bool) -> int:
    """Every key that a query sees is scored, for every index head."""
    batch, num_heads, num_queries, head_dim = index_query.shape
    return 2 * batch * num_heads * head_dim * _all_pairs(num_queries, index_key.size(2), is_causal)


def _loss_pairs(
    query: Tensor, key: Tensor, block_indices: Tensor | None, block_size: int, is_causal: bool, num_choices: int
) -> int:
    """Pairs of a query and a key, over the choices."""
    num_queries, num_keys = query.size(2), key.size(2)
    if block_indices is None:
        return query.size(0) * num_choices * _all_pairs(num_queries, num_keys, is_causal)
    if not _is_readable(block_indices):
        return block_indices.numel() * min(block_size, num_keys)
    positions = torch.arange(num_queries, device=block_indices.device) + num_keys - num_queries
    return _seen(block_indices, positions, torch.full_like(positions, num_keys), block_size, is_causal)


@_formula("index_loss")
def _index_loss(
    index_query: Tensor, query: Tensor, key: Tensor, block_indices: Tensor | None, block_size: int, is_causal: bool,
    num_choices: int,
) -> int:  # fmt: skip
    """Scores of the index heads, and of the query heads, of which the attention's weights are made again."""
    pairs = _loss_pairs(query, key, block_indices, block_size, is_causal, num_choices)
    columns = index_query.size(1) * index_query.size(3) + query.size(1) * query.size(3)
    return 2 * pairs * columns // num_choices


@_formula("index_loss_backward")
def _index_loss_backward(
    index_query: Tensor, query: Tensor, key: Tensor, block_indices: Tensor | None, block_size: int, is_causal: bool,
    num_choices: int,
) -> int:  # fmt: skip
    """Both scores again, and the gradients of index queries and index keys."""
    pairs = _loss_pairs(query, key, block_indices, block_size, is_causal, num_choices)
    columns = 3 * index_query.size(1) * index_query.size(3) + query.size(1) * query.size(3)
    return 2 * pairs * columns // num_choices


# --- the other ops --------------------------------------------------------------------------------------------------


@_formula("key_conv")
def _key_conv(key: Tensor, weight: Tensor) -> int:
    return 2 * key.numel() * weight.size(-1)


@_formula("key_conv_backward")
def _key_conv_backward(key: Tensor, weight: Tensor, needs_grad_weight: bool, activation: str | None) -> int:
    """The key's gradient, the weight's, and what SiLU needs of the forward."""
    return 2 * key.numel() * weight.size(-1) * (1 + bool(needs_grad_weight) + (activation is not None))


@_formula("product_key_topk")
def _product_keys(query: Tensor, keys: Tensor) -> int:
    return 2 * query.numel() * keys.size(2)


def _lookup(values: Tensor, indices: Tensor) -> int:
    return 2 * indices.numel() * values.size(1)


def _lookup_backward(values: Tensor, indices: Tensor, needs_grad_weights: bool) -> int:
    return 2 * indices.numel() * values.size(1) * (1 + bool(needs_grad_weights))


for _name in ("memory_lookup", "memory_dot", "memory_lookup_quantized", "memory_dot_quantized"):
    _formula(_name)(_lookup)
for _name in ("memory_backward", "memory_backward_sparse"):
    _formula(_name)(_lookup_backward)


def _row_steps(grad_out: Sequence[int], indices: Sequence[int], *_: Any, **__: Any) -> int:
    """The sums of entries; what a step does to a row are no products of matrices."""
    return 2 * indices[0] * grad_out[1]


for _name in ("memory_update", "memory_grad_square"):
    _formula(_name)(_row_steps)


def _pairs_along(size: int, step: int, is_window: bool) -> int:
    """Pairs of tokens of one group along an axis of an image."""
    if is_window:
        whole, rest = divmod(size, step)
        return whole * step**2 + rest**2
    per_group, longer = divmod(size, step)
    return longer * (per_group + 1) ** 2 + (step - longer) * per_group**2


def _grid_pairs(query: Tensor, partition: str, rows_step: int, columns_step: int) -> int:
    batch, num_heads, rows, columns, _ = query.shape
    is_window = partition == WINDOW
    pairs = _pairs_along(rows, rows_step, is_window) * _pairs_along(columns, columns_step, is_window)
    return batch * num_heads * pairs


@_formula("grid_attention")
def _grid(query: Tensor, partition: str, rows_step: int, columns_step: int) -> int:
    return 4 * _grid_pairs(query, partition, rows_step, columns_step) * query.size(-1)


@_formula("grid_attention_backward")
def _grid_backward(query: Tensor, partition: str, rows_step: int, columns_step: int) -> int:
    return 10 * _grid_pairs(query, partition, rows_step, columns_step) * query.size(-1)

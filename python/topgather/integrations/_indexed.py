"""Layers that choose their key blocks by an indexer of their own: MiniMax Sparse Attention, arXiv 2606.13392.

Such a layer hands its choice to the attention function, ``block_indices [B, H, M, k]`` with -1 for unused slots, one
for each key head. Its indexer numbers blocks by columns of the batch, which is right where columns are tokens of one
sequence. In a padded batch, or with several sequences in a row, it is not: there the choice is made anew from what the
indexer was given, with blocks that start with each sequence, so that a sequence chooses what it chooses alone.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..ops import BlockRouting, index_route
from . import _forward
from ._arguments import by_us
from ._attend import PackedRows

# Kinds of layers, of config.layer_types.
INDEXED = frozenset({"minimax_m3_sparse"})

_HOOKED = "_topgather_hooked"
_NAMES = ("hidden_states", "position_embeddings", "cache", "position_ids")


def has_indexed_layers(config: Any) -> bool:
    """Whether some layers of a model choose their blocks themselves; its other layers then attend to everything."""
    return not INDEXED.isdisjoint(getattr(config, "layer_types", None) or ())


def keeps_index(layer: Any) -> bool:
    """Whether a cache layer is transformers' own for such layers, which keeps index keys."""
    return getattr(type(layer), "_layer_type", None) in INDEXED


def hook_indexer(module: nn.Module) -> None:
    """Have the indexer of an attention module, if it has one, note what it is given."""
    indexer = getattr(module, "indexer", None)
    if isinstance(indexer, nn.Module) and not indexer.__dict__.get(_HOOKED):
        indexer.register_forward_pre_hook(_before_indexer, with_kwargs=True)
        indexer.__dict__[_HOOKED] = True


def _before_indexer(indexer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _forward.note_indexed(indexer, {**dict(zip(_NAMES, args, strict=False)), **kwargs})


def choice_of(module: nn.Module, block_indices: Any) -> BlockRouting:
    """The choice that ``module`` handed over, as it is."""
    block_size = getattr(getattr(module, "config", None), "index_block_size", None)
    if block_size is None:
        raise ValueError(
            f"block_indices are read {by_us(module)} where config.index_block_size says how many keys a block has, "
            f"got {type(block_indices).__name__} without it"
        )
    if not isinstance(block_indices, Tensor) or block_indices.ndim != 4 or block_indices.is_floating_point():
        shape = tuple(block_indices.shape) if isinstance(block_indices, Tensor) else type(block_indices).__name__
        raise ValueError(f"block_indices must be integers [batch, heads, queries, slots] {by_us(module)}, got {shape}")
    return BlockRouting(block_indices.to(torch.int32), block_size)


def choice_within_sequences(module: nn.Module, queries: PackedRows, keys: PackedRows, num_columns: int) -> BlockRouting:
    """The choice of packed sequences, ``[H, total_q, k]``: blocks are counted from each sequence's first key.

    The same arithmetic as the indexer's own (MiniMaxM3VLIndexer of transformers 5.24): a block scores what the best of
    its visible keys does, and the newest ``local_blocks`` are always chosen. ``num_columns`` of the cached keys are
    read.
    """
    indexer: Any = getattr(module, "indexer", None)
    given = None if torch.compiler.is_compiling() else _forward.noted_of(indexer)
    if given is None:
        raise ValueError(
            f"padded batches and several sequences in a row need what the indexer was given, which is not seen under "
            f"torch.compile, {by_us(module)}"
        )
    with torch.no_grad():
        query, key = _projected(indexer, given)
        cache = given.get("cache")
        if cache is not None:
            key = cache.layers[module.layer_idx].idx_keys[:, :, :num_columns]
        packed = queries.gather(query.float()).split(_lengths(queries)), keys.gather(key.float()).split(_lengths(keys))
        chosen = [_choose(indexer, *sequence) for sequence in zip(*packed, strict=True)]
    if not chosen:
        return BlockRouting(query.new_full((query.shape[1], 0, 1), -1, dtype=torch.int32), indexer.block_size)
    slots = max(each.shape[2] for each in chosen)
    padded = [pad(each, (0, slots - each.shape[2]), value=-1) for each in chosen]
    return BlockRouting(torch.cat(padded, dim=1), indexer.block_size)


def of_columns(routing: BlockRouting, queries: PackedRows, batch_size: int, num_queries: int) -> BlockRouting:
    """The choice of packed sequences put back in the columns of a batch, ``[B, H, M, k]``."""
    packed = routing.block_indices.transpose(0, 1)
    return BlockRouting(queries.scatter(packed, batch_size, num_queries), routing.block_size)


def _lengths(rows: PackedRows) -> list[int]:
    return [end - start for start, end in pairwise(rows.cu_seqlens.tolist())]


def _projected(indexer: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, M, D]`` and new keys ``[B, 1, M, D]`` of the indexer."""
    hidden_states = given["hidden_states"]
    rotate = sys.modules[type(indexer).__module__].apply_rotary_pos_emb
    cos, sin = (part[..., : indexer.head_dim] for part in given["position_embeddings"])
    heads = (*hidden_states.shape[:2], -1, indexer.head_dim)
    query = indexer.q_norm(indexer.q_proj(hidden_states).view(heads)).transpose(1, 2)
    key = indexer.k_norm(indexer.k_proj(hidden_states).view(heads)).transpose(1, 2)
    query, key = rotate(query, key, cos, sin)
    return query, key


def _choose(indexer: Any, query: Tensor, key: Tensor) -> Tensor:
    """Of one sequence, ``query [M, H, D]`` at the end of ``key [N, 1, D]``: int32 ``[H, M, k]``."""
    slots = min(indexer.topk_blocks, max(1, -(-key.shape[0] // indexer.block_size)))
    forced = min(indexer.local_blocks, slots)
    query, key = (tensor.transpose(0, 1)[None] for tensor in (query, key))
    return index_route(query, key, indexer.block_size, slots, force_last=forced).block_indices[0]

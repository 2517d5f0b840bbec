"""What an attention call of a batch comes down to: rows of a padded or packed batch, and attention over them.

A batch reaches the attention of a transformers model as ``query [B, Hq, Nq, D]`` and ``key, value [B, Hkv, Nk, D]``,
with a mask ``[B, Nk]`` that says which tokens are real. Padding is not hidden by a mask of scores: a block's mean key
would still hold it. Real tokens are packed one after the other instead, attended to as sequences of their own, and the
results put back in their places, with zeros at the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..ops import moba_attention, moba_attention_varlen


@dataclass(frozen=True)
class Settings:
    """How a layer attends. ``top_k`` None: to everything."""

    block_size: int
    top_k: int | None


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of packed sequences lie among the ``B * N`` rows of a batch.

    ``rows`` int64 ``[total]``, or None where they are all rows in order; ``cu_seqlens`` int32 ``[num_sequences + 1]``.
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def of_mask(mask: Tensor) -> PackedRows:
        """The rows where ``mask [B, N]`` is true, a sequence for each of its rows."""
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return PackedRows(mask.flatten().nonzero().squeeze(1), cu_seqlens, int(lengths.max()) if len(lengths) else 0)

    @staticmethod
    def of_boundaries(cu_seqlens: Tensor) -> PackedRows:
        """All rows, cut at ``cu_seqlens``."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        return PackedRows(None, cu_seqlens, longest)

    def gather(self, batch: Tensor) -> Tensor:
        """``[B, H, N, D]`` to ``[total, H, D]``."""
        flat = batch.transpose(1, 2).flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def scatter(self, packed: Tensor, batch_size: int, num_tokens: int) -> Tensor:
        """``[total, H, D]`` to ``[B, H, N, D]``, 0 where there is no token."""
        if self.rows is not None:
            packed = packed.new_zeros(batch_size * num_tokens, *packed.shape[1:]).index_copy(0, self.rows, packed)
        return packed.unflatten(0, (batch_size, num_tokens)).transpose(1, 2)


@dataclass(frozen=True)
class NewTokens:
    """The real tokens among the newest ``M`` columns of a padded batch, as a cache takes them: first in their rows.

    ``counts`` of each row; ``order`` int64 ``[B, M]``, the columns with the real ones first.
    """

    counts: list[int]
    order: Tensor

    @staticmethod
    def of_mask(mask: Tensor) -> NewTokens | None:
        """Those of ``mask [B, M]``; None where all are real."""
        counts = mask.sum(1).tolist()
        if all(count == mask.shape[1] for count in counts):
            return None
        return NewTokens(counts, mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True))

    def gather(self, batch: Tensor) -> Tensor:
        """``[B, H, M, D]`` with the real tokens of each row first."""
        return batch.gather(2, self.order[:, None, :, None].expand_as(batch))

    def scatter(self, batch: Tensor) -> Tensor:
        """Back to their columns."""
        return torch.empty_like(batch).scatter_(2, self.order[:, None, :, None].expand_as(batch), batch)


class LastOne:
    """Remembers what was made of the last tensor: all layers of a forward get the same mask and positions."""

    def __init__(self, make: Any) -> None:
        self.make = make
        self.last: tuple[Any, ...] = (None, None, None)

    def __call__(self, tensor: Tensor, *args: Any) -> Any:
        if tensor.is_inference() or torch.compiler.is_compiling():  # whether it has changed is not known
            return self.make(tensor, *args)
        now = (tensor._version, args)
        before, then, made = self.last
        if before is not tensor or then != now:
            made = self.make(tensor, *args)
            self.last = (tensor, now, made)
        return made


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast its dtype, which rotated keys and queries have lost; else the tensors as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, settings: Settings, scale: float | None) -> Tensor:
    """Causal attention, query ``i`` at position ``i + Nk - Nq``: ``[B, Hq, Nq, Dv]``, differentiable."""
    if settings.top_k is not None:
        return moba_attention(query, key, value, settings.block_size, settings.top_k, scale=scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    hidden = None
    if 1 < num_queries < num_keys:
        # torch's is_causal puts query i at position i.
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=hidden,
        is_causal=num_queries == num_keys,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedRows,
    keys: PackedRows,
    settings: Settings,
    scale: float | None,
) -> Tensor:
    """The same within each packed sequence; 0 for rows of no sequence."""
    batch_size, _, num_tokens, _ = query.shape
    packed = queries.gather(query), keys.gather(key), keys.gather(value)
    if settings.top_k is None:
        out = _attend_densely_to_packed(*packed, queries, keys, settings, scale)
    else:
        out = moba_attention_varlen(
            *packed,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            settings.block_size,
            settings.top_k,
            scale=scale,
        )
    return queries.scatter(out, batch_size, num_tokens)


def _attend_densely_to_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedRows,
    keys: PackedRows,
    settings: Settings,
    scale: float | None,
) -> Tensor:
    """One sequence after the other: torch's fast dense kernels know no packed sequences."""
    outs = []
    boundaries = queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    lengths_q, lengths_k = ([end - start for start, end in pairwise(each)] for each in boundaries)
    sequences = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    for rows in sequences:
        one_query, one_key, one_value = (tensor.transpose(0, 1)[None] for tensor in rows)
        outs.append(attend(one_query, one_key, one_value, settings, scale)[0].transpose(0, 1))
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])

"""What an attention call of a batch comes down to: rows of a padded or packed batch, and attention over them.

A batch reaches the attention of a transformers model as ``query [B, Hq, Nq, D]`` and ``key, value [B, Hkv, Nk, D]``,
with a mask ``[B, Nk]`` that says which tokens are real, and with positions or boundaries that say where sequences start
within a row. Neither is a mask of scores, for a block's mean key would still hold what is hidden: real tokens are
packed one after the other, attended to as sequences of their own, and the results put back in their places, with zeros
at the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..ops import BlockRouting, moba_attention, moba_attention_varlen
from ._arguments import Scores


@dataclass(frozen=True)
class Settings:
    """How a layer attends. ``top_k`` None: to everything, and then there is nothing to force."""

    block_size: int
    top_k: int | None
    force_first: int = 0
    force_last: int = 1
    window: int | None = None

    @property
    def of_op(self) -> dict[str, Any]:
        """What the ops take of a choice, beside its sizes."""
        return {"force_first": self.force_first, "force_last": self.force_last, "window": self.window}


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of packed sequences lie among the ``B * N`` rows of a batch.

    ``rows`` int64 ``[total]``, or None where they are all rows in order; ``cu_seqlens`` int32 ``[num_sequences + 1]``.
    ``is_real`` bool ``[total, 1, 1]``, or None where all are. Under torch.compile, whose graphs have fixed shapes,
    ``rows`` has the padding too, behind the real tokens, and the last sequence is the padding.
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    is_real: Tensor | None = None

    @staticmethod
    def of_mask(mask: Tensor) -> PackedRows:
        """The rows where ``mask [B, N]`` is true, a sequence for each of its rows."""
        segments = torch.arange(mask.shape[0], device=mask.device).repeat_interleave(mask.shape[1])
        return PackedRows.of_segments(segments, mask.shape[0], mask.flatten())

    @staticmethod
    def of_segments(segments: Tensor, num_segments: int, is_real: Tensor) -> PackedRows:
        """The rows where ``is_real [B * N]`` is true; ``segments`` int64 ``[B * N]`` never decreases."""
        counts = torch.zeros(num_segments, dtype=torch.int64, device=segments.device)
        counts = counts.scatter_add(0, segments, is_real.long())
        cu_seqlens = pad(counts.cumsum(0), (1, 0))
        if torch.compiler.is_compiling():
            rows = is_real.logical_not().to(torch.uint8).argsort(stable=True)
            cu_seqlens = pad(cu_seqlens, (0, 1), value=is_real.shape[0]).int()
            return PackedRows(rows, cu_seqlens, is_real.shape[0], is_real[rows][:, None, None])
        return PackedRows(is_real.nonzero().squeeze(1), cu_seqlens.int(), int(counts.max()) if num_segments else 0)

    @staticmethod
    def of_boundaries(cu_seqlens: Tensor, num_tokens: int) -> PackedRows:
        """All of ``num_tokens`` rows, cut at ``cu_seqlens``."""
        cu_seqlens = cu_seqlens.int()
        if torch.compiler.is_compiling():
            return PackedRows(None, cu_seqlens, num_tokens)
        return PackedRows(None, cu_seqlens, int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0)

    def gather(self, batch: Tensor) -> Tensor:
        """``[B, H, N, D]`` to ``[total, H, D]``."""
        flat = batch.transpose(1, 2).flatten(0, 1)
        flat = flat if self.rows is None else flat.index_select(0, self.rows)
        return flat if self.is_real is None else flat.where(self.is_real, flat.new_zeros(()))

    def scatter(self, packed: Tensor, batch_size: int, num_tokens: int) -> Tensor:
        """``[total, H, D]`` to ``[B, H, N, D]``, 0 where there is no token."""
        if self.is_real is not None:
            packed = packed.where(self.is_real, packed.new_zeros(()))
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


def sequence_starts(position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Where ``position_ids [B, N]`` start a sequence within a row: bool ``[B, N]``, False at its first token.

    Positions go on where they grow by 1 from one token that ``mask`` says is real to the next one, or by as much as
    the columns do.
    """
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    if mask is None:
        starts = position_ids.diff(dim=1) != 1
        return pad(starts, (1, 0))
    latest = columns.where(mask, columns.new_full((), -1)).cummax(1).values
    previous = pad(latest[:, :-1], (1, 0), value=-1)  # the column of the real token before, -1 where there is none
    step = position_ids - position_ids.gather(1, previous.clamp(min=0))
    return mask & (previous >= 0) & (step != 1) & (step != columns - previous)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scores: Scores,
    routing: BlockRouting | None = None,
) -> Tensor:
    """Causal attention, query ``i`` at position ``i + Nk - Nq``: ``[B, Hq, Nq, Dv]``, differentiable.

    ``routing`` is a choice of blocks, in place of one by ``settings``.
    """
    if routing is not None:
        return moba_attention(query, key, value, routing.block_size, routing=routing, **scores.of_op)
    top_k = _num_blocks(settings, scores, key.shape[2])
    if top_k is not None:
        return moba_attention(query, key, value, settings.block_size, top_k, **settings.of_op, **scores.of_op)
    num_queries, num_keys = query.shape[2], key.shape[2]
    visible = None
    if 1 < num_queries < num_keys:
        # torch's is_causal puts query i at position i.
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return _dense(query, key, value, visible, num_queries == num_keys, scores)


def _num_blocks(settings: Settings, scores: Scores, num_keys: int) -> int | None:
    """Blocks of a query; None for torch's dense attention, which knows neither caps of scores nor sinks."""
    if settings.top_k is not None or (scores.softcap is None and scores.sinks is None):
        return settings.top_k
    return max(1, -(-num_keys // settings.block_size))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, is_causal: bool, scores: Scores
) -> Tensor:
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=is_causal,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedRows,
    keys: PackedRows,
    settings: Settings,
    scores: Scores,
    routing: BlockRouting | None = None,
) -> Tensor:
    """The same within each packed sequence, ``routing`` of packed sequences; 0 for rows of no sequence."""
    batch_size, _, num_tokens, _ = query.shape
    packed = queries.gather(query), keys.gather(key), keys.gather(value)
    block_size = settings.block_size if routing is None else routing.block_size
    top_k = None if routing is not None else _num_blocks(settings, scores, keys.max_seqlen)
    if top_k is None and routing is None:
        out = _attend_densely_to_packed(*packed, queries, keys, settings, scores)
    else:
        out = moba_attention_varlen(
            *packed,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            block_size,
            top_k,
            routing=routing,
            **{**settings.of_op, **scores.of_op},
        )
    return queries.scatter(out, batch_size, num_tokens)


def _attend_densely_to_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedRows,
    keys: PackedRows,
    settings: Settings,
    scores: Scores,
) -> Tensor:
    """One sequence after the other: torch's fast dense kernels know no packed sequences."""
    if torch.compiler.is_compiling():
        visible = visible_in_packed(queries.cu_seqlens, keys.cu_seqlens, query.shape[0], key.shape[0])
        one_query, one_key, one_value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return _dense(one_query, one_key, one_value, visible, False, scores)[0].transpose(0, 1)
    outs = []
    boundaries = queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    lengths_q, lengths_k = ([end - start for start, end in pairwise(each)] for each in boundaries)
    sequences = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    for rows in sequences:
        one_query, one_key, one_value = (tensor.transpose(0, 1)[None] for tensor in rows)
        outs.append(attend(one_query, one_key, one_value, settings, scores)[0].transpose(0, 1))
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])


def visible_in_packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Which keys a query may see, in its own sequence and not after it: bool ``[Nq, Nk]``."""
    sequences, positions = [], []
    for cu_seqlens, count in ((cu_seqlens_q, num_queries), (cu_seqlens_k, num_keys)):
        rows = torch.arange(count, device=cu_seqlens.device)
        sequence = torch.bucketize(rows, cu_seqlens[1:].contiguous(), right=True)
        sequences.append(sequence)
        positions.append(rows - cu_seqlens[1:].long()[sequence.clamp(max=len(cu_seqlens) - 2)])  # from the end
    same = sequences[0][:, None] == sequences[1]
    return same & (positions[0][:, None] >= positions[1])


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast its dtype, which rotated keys and queries have lost; else the tensors as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)

"""Decoding over ranks: a cache whose pages are spread over them. See :class:`ShardedCache`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._common import checks, tensors
from .._common.library import DTYPE_CODES, sum_dtype
from ..cache._checks import check_counts, check_no_gradient, check_sizes
from ..ops import _decode_ops, _moba_ops  # noqa: F401  registers the ops
from . import collectives
from .placement import Placement, Stretch, check_placement, group_of, placement_of
from .transfer import Transfer

_ops = torch.ops.topgather


class _Part(NamedTuple):
    """Sequences of one length that get equally many tokens."""

    sequences: slice
    length: int
    num_new: int

    @property
    def end(self) -> int:
        return self.length + self.num_new


class ShardedCache:
    """Keys and values of a batch of sequences, of which each one's pages are dealt out to the ranks of a group in turn.

    Every rank has all centroids, one key a block, and the keys of the block that is being filled, so a token's blocks
    are chosen without a message, as one cache chooses them. Each rank attends to the chosen blocks that it has; outputs
    and lse are gathered and merged in the order of ranks. All ranks call every method, with the same new tokens, and
    get the same results; that tokens and queries are the same everywhere is not looked at, which would be a message for
    every token. For inference: there is no gradient.

    ::

        cache = ShardedCache(mesh["cp"], batch_size, num_kv_heads, head_dim, max_seq_len=1 << 20)
        cache.append_sharded(key, value, placement="zigzag")  # a prompt, of which each rank has its own tokens
        cache.append(key, value)  # then token by token, the same on all ranks
        out = cache.decode(query, top_k=8)

    Sequences may differ in length, as those of one cache may: ``num_tokens`` says how many of the new tokens each has.

    What a rank sends for a token: ``(R - 1) * B * Hq * (Dv * s + w)`` bytes, ``s`` being the size of a number and ``w``
    that of a sum; nothing for its choice, nor to append it.

    Args:
        mesh: a mesh of one dimension, or a group.
        batch_size: sequences, B.
        num_kv_heads: key and value heads, Hkv.
        head_dim: of keys, D.
        block_size: keys of a block, at least 1.
        max_seq_len: the most tokens of a sequence. A rank takes memory for its share of the pages at once.
        value_dim: of values; ``head_dim`` if None.
        dtype: of keys and values: float32, bfloat16, float16 or (CPU only) float64.
        device: where it lives; torch's default if None.
        page_size: tokens of a page, a multiple of ``block_size``, which it is if None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or arguments that differ by rank, on every rank.
    """

    def __init__(
        self,
        mesh: DeviceMesh | dist.ProcessGroup,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 128,
        max_seq_len: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page_size: int | None = None,
    ) -> None:
        self._group = group_of(mesh)
        error: Exception | None = None
        facts: dict[str, int] = {}
        try:
            check_sizes(batch_size, num_kv_heads, head_dim, block_size, max_seq_len, value_dim, dtype)
            page_size = block_size if page_size is None else page_size
            checks.check_count("page_size", page_size)
            if page_size % block_size != 0:
                raise ValueError(f"page_size must be a multiple of block_size, {block_size}, got {page_size}")
            facts = {
                "batch_size": batch_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                "block_size": block_size, "max_seq_len": max_seq_len, "value_dim": value_dim or head_dim,
                "dtype (by its code)": DTYPE_CODES[dtype], "page_size": page_size,
            }  # fmt: skip
        except (TypeError, ValueError) as raised:
            error = raised
        what = "agreeing on a ShardedCache"
        numbers = [int(error is not None), *facts.values(), *[0] * (8 - len(facts))]
        agreed = collectives.gather_numbers(numbers, self._group, collectives.agreement_device(self._group), what)
        collectives.raise_everywhere(error, agreed[0], self._group, what)
        collectives.require_same(facts, agreed[1:])
        assert page_size is not None
        self.batch_size, self.num_kv_heads, self.head_dim = batch_size, num_kv_heads, head_dim
        self.block_size, self.page_size, self.max_seq_len = block_size, page_size, max_seq_len
        self.value_dim = head_dim if value_dim is None else value_dim
        self.dtype = dtype
        self._rank, self._num_ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._lengths = [0] * batch_size
        # What the last append brought: how many tokens, and of each sequence where they were not all.
        self._last_query_len = 0
        self._last_counts: list[int] | None = None
        num_pages = -(-max_seq_len // page_size)
        rows = max(-(-(num_pages - self._rank) // self._num_ranks), 1) * page_size
        num_blocks = -(-max_seq_len // block_size)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((batch_size, num_kv_heads, *shape), dtype=dtype, device=device)

        with torch.inference_mode(False):
            self._keys, self._values = zeros(rows, head_dim), zeros(rows, self.value_dim)
            self._centroids = zeros(num_blocks, head_dim, dtype=sum_dtype(dtype))
            self._unfinished = zeros(block_size, head_dim)
        self.device = self._keys.device

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return list(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of every sequence, 0 where there is none.

        Raises:
            ValueError: sequences differ; :attr:`lengths` has those of each.
        """
        if len(set(self._lengths)) > 1:
            raise ValueError(f"sequences must be equally long to have one length, got {self._lengths}: see lengths")
        return max(self._lengths, default=0)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.batch_size}, {self.num_kv_heads}, {self.head_dim}, "
            f"block_size={self.block_size}, max_seq_len={self.max_seq_len}, lengths={self._lengths}, "
            f"rank={self._rank} of {self._num_ranks})"
        )

    def __copy__(self) -> ShardedCache:
        """As ``copy.deepcopy``: one of the same group with pages of its own."""
        other = object.__new__(type(self))
        with torch.inference_mode(False), torch.no_grad():
            for name, held in vars(self).items():
                made = held.clone() if isinstance(held, Tensor) else list(held) if isinstance(held, list) else held
                setattr(other, name, made)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedCache:
        memo[id(self)] = other = copy.copy(self)
        return other

    # --- cutting off --------------------------------------------------------------------------------------------------

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Cut sequences off at their ends. Ranks tell each other the keys of blocks that are cut.

        Args:
            lengths: tokens that each sequence keeps, or one number for all; at most those it has. 0 forgets a sequence,
                so that another may take its place.

        Raises:
            TypeError: not ints, on every rank.
            ValueError: a negative length or one longer than the sequence, or lengths that differ by rank, on every
                rank. The cache is then what it was.
        """
        error: Exception | None = None
        after = self._lengths
        try:
            wanted = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
            after = check_counts("lengths", wanted, self.batch_size)
            for sequence, (old, new) in enumerate(zip(self._lengths, after, strict=True)):
                if new > old:
                    raise ValueError(f"lengths must be at most what a sequence holds, {old} for {sequence}, got {new}")
        except (TypeError, ValueError) as raised:
            error, after = raised, self._lengths
        facts = {"lengths of the cache": self._lengths, "lengths": after}
        self._agree(error, [], facts, "agreeing on what to cut off a ShardedCache")
        size = self.block_size
        is_cut = [new % size > 0 and new // size < old // size for old, new in zip(self._lengths, after, strict=True)]
        cut = [(sequence, after[sequence] // size) for sequence, is_one in enumerate(is_cut) if is_one]
        owners = [self._owner(block) for _, block in cut]
        with torch.no_grad():
            mine = [
                self._block_keys(slice(sequence, sequence + 1), [block])
                for (sequence, block), owner in zip(cut, owners, strict=True)
                if owner == self._rank
            ]
            keys = torch.cat(mine) if mine else self._unfinished[:0]
            keys = self._from_owners(owners, keys, "sending the keys of blocks that were cut in a ShardedCache")
            self._unfinished[[sequence for sequence, _ in cut]] = keys
        self._lengths, self._last_query_len, self._last_counts = after, 0, None

    def reset(self) -> None:
        """Forget every token. Memory stays. ``truncate`` forgets single sequences."""
        self._lengths, self._last_query_len, self._last_counts = [0] * self.batch_size, 0, None

    def _agree(
        self, error: Exception | None, own: list[int], facts: dict[str, list[int]], what: str
    ) -> list[list[int]]:
        """``own`` of all ranks; raises on all of them what one is refused for, and where they differ in ``facts``."""
        numbers = [int(error is not None), *own, *(number for fact in facts.values() for number in fact)]
        device = collectives.agreement_device(self._group)
        has_error, *columns = collectives.gather_numbers(numbers, self._group, device, what)
        collectives.raise_everywhere(error, has_error, self._group, what)
        names = [f"{name}[{index}]" for name, fact in facts.items() for index in range(len(fact))]
        collectives.require_same(names, columns[len(own) :])
        return columns[: len(own)]

    # --- who has what -------------------------------------------------------------------------------------------------

    def _owned(self, rank: int, start: int, end: int) -> list[Stretch]:
        """The positions from ``start`` to ``end`` that a rank has, in order."""
        size, found = self.page_size, []
        page = start // size
        page += (rank - page) % self._num_ranks
        for first in range(page * size, end, self._num_ranks * size):
            clipped = max(first, start)
            found.append(Stretch(clipped, min(first + size, end) - clipped))
        return found

    def _row(self, position: int) -> int:
        """Where a position of this rank is kept."""
        page, offset = divmod(position, self.page_size)
        return page // self._num_ranks * self.page_size + offset

    def _num_before(self, position: int) -> int:
        """How many of this rank's tokens stand before a position."""
        page, offset = divmod(position, self.page_size)
        turns, place = divmod(page, self._num_ranks)
        whole = turns + (place > self._rank)
        return whole * self.page_size + (offset if place == self._rank else 0)

    def _owner(self, block: int) -> int:
        """The rank that has a block of any sequence."""
        return block * self.block_size // self.page_size % self._num_ranks

    def _block_keys(self, sequences: slice, blocks: list[int]) -> Tensor:
        """``[B', Hkv, blocks * block_size, D]``, the keys of blocks that this rank has."""
        first = torch.tensor([self._row(block * self.block_size) for block in blocks], device=self.device)
        rows = (first[:, None] + torch.arange(self.block_size, device=self.device)).flatten()
        return self._keys[sequences].index_select(2, rows)

    def _from_owners(self, owners: list[int], mine: Tensor, what: str) -> Tensor:
        """``[owners, ...]``, for each of ``owners`` what that rank has: ``mine [its own, ...]``, in order."""
        most = max((owners.count(rank) for rank in set(owners)), default=0)
        if most == 0:
            return mine
        sent = mine.new_zeros((most, *mine.shape[1:]))
        sent[: mine.size(0)] = mine
        received = sent.new_empty((self._num_ranks * most, *mine.shape[1:]))
        with collectives.naming(what, self._group):
            collectives.all_gather(received.view(-1), sent.view(-1), group=self._group)
        next_of = [iter(range(rank * most, (rank + 1) * most)) for rank in range(self._num_ranks)]
        return received.index_select(0, torch.tensor([next(next_of[owner]) for owner in owners], device=self.device))

    def _parts(self, counts: list[int]) -> list[_Part]:
        """The sequences, all at once where all are as long and get as many tokens."""
        found = list(zip(self._lengths, counts, strict=True))
        if len(set(found)) == 1:
            return [_Part(slice(0, self.batch_size), *found[0])]
        return [_Part(slice(index, index + 1), *one) for index, one in enumerate(found)]

    # --- appending ----------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, num_tokens: Sequence[int] | Tensor | None = None) -> None:
        """Append tokens that all ranks have: ``key [B, Hkv, M, D]``, ``value [B, Hkv, M, Dv]``.

        Args:
            key, value: the same on all ranks.
            num_tokens: how many of the ``M`` tokens each sequence has, ints or an integer tensor ``[B]``, which the
                host reads; the others, at the end, are ignored. None for all.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape or device, a tensor that requires grad where gradients are recorded, or more
                tokens than ``max_seq_len``.
        """
        self._check_new(key, value)
        counts = self._counts(num_tokens, key.size(2))
        self._check_room(counts)
        with torch.no_grad():
            if len(self._parts(counts)) == 1:
                self._append_to_all(key, value, counts[0])
            elif any(counts):
                self._append_to_each(key, value, counts)
        self._advance(counts, key.size(2))

    def _append_to_all(self, key: Tensor, value: Tensor, count: int) -> None:
        start = self._lengths[0]
        for stretch in self._owned(self._rank, start, start + count):
            row, new = self._row(stretch.start), slice(stretch.start - start, stretch.end - start)
            self._keys[:, :, row : row + stretch.length] = key[:, :, new]
            self._values[:, :, row : row + stretch.length] = value[:, :, new]
        held = start % self.block_size
        joined = torch.cat([self._unfinished[:, :, :held], key[:, :, :count]], dim=2)
        num_whole = joined.size(2) // self.block_size * self.block_size
        if num_whole > 0:
            first = start // self.block_size
            found = _ops.block_centroids.default(tensors.contiguous_rows(joined[:, :, :num_whole]), self.block_size)
            self._centroids[:, :, first : first + found.size(2)] = found
        rest = joined[:, :, num_whole:]
        self._unfinished[:, :, : rest.size(2)] = rest

    def _append_to_each(self, key: Tensor, value: Tensor, counts: list[int]) -> None:
        """Sequences of different lengths, or with different numbers of tokens: by indices, whatever their number."""
        size = self.block_size
        new, blocks = [], []
        rows: list[int] = []
        for sequence, (start, count) in enumerate(zip(self._lengths, counts, strict=True)):
            for stretch in self._owned(self._rank, start, start + count):
                row = self._row(stretch.start)
                new += [(sequence, token - start) for token in range(stretch.start, stretch.end)]
                rows += range(row, row + stretch.length)
            ends = start // size, (start + count) // size
            blocks += [(sequence, block, block - ends[0]) for block in range(*ends)]
        if new:
            entry, token = self._indices(new)
            at = torch.tensor(rows, device=self.device)
            self._keys[entry, :, at] = key[entry, :, token]
            self._values[entry, :, at] = value[entry, :, token]
        # Behind the keys of the block that a sequence is filling come its new ones.
        held = torch.tensor([start % size for start in self._lengths], device=self.device)[:, None]
        joined = torch.cat([self._unfinished, key], dim=2)
        most = max(start % size + count for start, count in zip(self._lengths, counts, strict=True))
        place = torch.arange(-(-most // size) * size, device=self.device)
        place = torch.where(place < held, place, place - held + size).clamp(max=joined.size(2) - 1)
        ordered = _rows_of(joined, place)
        if blocks:
            entry, of_block, number = self._indices(blocks)
            found = _ops.block_centroids.default(tensors.contiguous_rows(ordered), size)
            self._centroids[entry, :, of_block] = found[entry, :, number]
        first = [(start % size + count) // size * size for start, count in zip(self._lengths, counts, strict=True)]
        place = torch.tensor(first, device=self.device)[:, None] + torch.arange(size, device=self.device)
        self._unfinished.copy_(_rows_of(ordered, place.clamp(max=ordered.size(2) - 1)))

    def _indices(self, tuples: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        return torch.tensor(tuples, device=self.device).unbind(1)

    def append_sharded(
        self,
        key: Tensor,
        value: Tensor,
        placement: str = "contiguous",
        num_tokens: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Append tokens of which each rank has its own, as :func:`shard_sequence` cuts them or any number in order.

        Keys and values go to the ranks that have their pages; each rank holds the new tokens once more meanwhile.

        Args:
            key: ``[B, Hkv, n, D]``, this rank's tokens.
            value: ``[B, Hkv, n, Dv]``.
            placement: as in :func:`moba_attention`.
            num_tokens: how many of all ranks' tokens each sequence has, the same on all ranks; the others, at the end,
                are ignored. As :meth:`append` takes it.

        Raises:
            TypeError: an argument of the wrong type or dtype, on every rank.
            ValueError: as :meth:`append`, on every rank, or numbers of tokens that are not those of ``placement``.
        """
        error: Exception | None = None
        given = [-1] * self.batch_size
        try:
            self._check_new(key, value)
            check_placement(placement)
            if num_tokens is not None:
                given = self._counts(num_tokens, 2**31 - 1)
        except (TypeError, ValueError) as raised:
            error = raised
        own = [0 if error is not None else key.size(2)]
        facts = {"placement": [int(placement == "zigzag")], "lengths of the cache": self._lengths, "num_tokens": given}
        (lengths,) = self._agree(error, own, facts, "agreeing on tokens for a ShardedCache")
        layout = placement_of(placement, self._group, lengths)
        counts = self._counts(None if num_tokens is None else given, layout.total)
        self._check_room(counts)
        with torch.no_grad():
            if any(counts):
                self._receive(key, value, layout, counts)
        self._advance(counts, layout.total)

    def _receive(self, key: Tensor, value: Tensor, layout: Placement, counts: list[int]) -> None:
        # Sequences lie one after the other, so far apart that each has room for all columns.
        parts = self._parts(counts)
        apart = max(self._lengths, default=0) + layout.total
        has = [
            [
                Stretch(number * apart + part.length + stretch.start, stretch.length)
                for number, part in enumerate(parts)
                for stretch in of_rank
                if stretch.length > 0
            ]
            for of_rank in layout.stretches
        ]
        needs = [
            [
                Stretch(number * apart + stretch.start, stretch.length)
                for number, part in enumerate(parts)
                for stretch in self._owned(rank, part.length, part.end)
            ]
            for rank in range(layout.num_ranks)
        ]
        to_pages = Transfer(has, needs)
        what = "sending tokens to their pages of a ShardedCache"
        for pages, new in ((self._keys, key), (self._values, value)):
            first, arrived = 0, to_pages.fetch(_by_token(new, len(parts)), layout, what)
            for part in parts:
                for stretch in self._owned(self._rank, part.length, part.end):
                    row = self._row(stretch.start)
                    tokens = arrived[first : first + stretch.length]
                    pages[part.sequences, :, row : row + stretch.length] = _by_head(tokens, self.num_kv_heads)
                    first += stretch.length
        # Blocks that are whole now have their keys at one rank, which tells the others their mean.
        size = self.block_size
        blocks = [range(part.length // size, part.end // size) for part in parts]
        means = [self._centroids.new_zeros((0, *self._centroids[parts[0].sequences, :, 0].shape))]
        for part, new_blocks in zip(parts, blocks, strict=True):
            here = [block for block in new_blocks if self._owner(block) == self._rank]
            if here:
                keys = self._block_keys(part.sequences, here)
                means.append(_ops.block_centroids.default(keys, size).permute(2, 0, 1, 3))
        owners = [self._owner(block) for new_blocks in blocks for block in new_blocks]
        found = self._from_owners(owners, torch.cat(means), "gathering centroids of a ShardedCache")
        for part, new_blocks, of_part in zip(parts, blocks, found.split([len(each) for each in blocks]), strict=True):
            self._centroids[part.sequences, :, new_blocks.start : new_blocks.stop] = of_part.permute(1, 2, 0, 3)
        rest = [max(part.end // size * size, part.length) for part in parts]
        unfinished = [
            Stretch(number * apart + start, part.end - start)
            for number, (part, start) in enumerate(zip(parts, rest, strict=True))
            if start < part.end
        ]
        arrived = Transfer(has, [unfinished] * layout.num_ranks).fetch(_by_token(key, len(parts)), layout, what)
        first = 0
        for part, start in zip(parts, rest, strict=True):
            place, count = start % size, part.end - start
            tokens = _by_head(arrived[first : first + count], self.num_kv_heads)
            self._unfinished[part.sequences, :, place : place + count] = tokens
            first += count

    def _counts(self, num_tokens: Sequence[int] | Tensor | None, most: int) -> list[int]:
        if num_tokens is None:
            return [most] * self.batch_size
        if isinstance(num_tokens, Tensor):
            if num_tokens.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"num_tokens must have dtype torch.int32 or torch.int64, got {num_tokens.dtype}")
            num_tokens = num_tokens.tolist()
        counts = check_counts("num_tokens", num_tokens, self.batch_size, "ints, a tensor or None")
        for count in counts:
            if count > most:
                raise ValueError(f"num_tokens must be at most the number of new tokens, {most}, got {count}")
        return counts

    def _advance(self, counts: list[int], query_len: int) -> None:
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        is_whole = all(count == query_len for count in counts)
        self._last_query_len, self._last_counts = query_len, None if is_whole else counts

    # --- attention ----------------------------------------------------------------------------------------------------

    def decode(
        self,
        query: Tensor,
        top_k: int | None = 8,
        scale: float | None = None,
        return_lse: bool = False,
        *,
        num_tokens: Sequence[int] | Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from the last ``M`` tokens, as :func:`topgather.moba_decode` does with one cache.

        Args:
            query: ``[B, Hq, M, D]``, the same on all ranks. Queries of the last ``M`` tokens of each sequence, or, with
                ``num_tokens``, of its last ``num_tokens[b]``, padded at the end.
            num_tokens: how many of the ``M`` queries each sequence has, as :meth:`append` takes it; if None, all, and
                after an append with ``num_tokens`` what that brought.
            top_k, scale, return_lse, softcap, sinks: as in :func:`topgather.moba_decode`.

        Returns:
            ``out [B, Hq, M, Dv]``, the same bits on all ranks, and with ``return_lse`` also ``lse [B, Hq, M]``. A query
            past its sequence's ``num_tokens``, or of a token before the first, gets 0 and -inf.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or option; a query that requires grad where gradients are recorded.
        """
        self._check_query(query, top_k, scale, return_lse, softcap, sinks)
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        counts = self._query_counts(num_tokens, query.size(2))
        num_blocks = max(-(-max(self._lengths, default=0) // self.block_size), 1)
        slots = num_blocks if top_k is None else min(top_k, num_blocks)
        with torch.no_grad():
            lengths, num_queries = torch.tensor([self._lengths, counts], dtype=torch.int32, device=self.device)
            page = self._centroids.size(2) * self.block_size
            chosen = _ops.moba_decode_route.default(
                query, self._centroids, lengths, None, num_queries, self.block_size, page, slots
            )
            out, lse = self._attend_here(query, chosen, counts, scale, softcap)
            out, lse = self._merge(out, lse)
            if sinks is not None:
                logits = sinks.to(lse.dtype)[:, None]
                is_nothing = (lse == -torch.inf) & (logits == -torch.inf)
                out = out * torch.sigmoid((lse - logits).masked_fill(is_nothing, torch.inf))[..., None]
            out = out.to(query.dtype)
        return (out, lse) if return_lse else out

    def _query_counts(self, num_tokens: Sequence[int] | Tensor | None, query_len: int) -> list[int]:
        if num_tokens is None and self._last_counts is not None:
            if query_len != self._last_query_len:
                raise ValueError(
                    f"query must have as many tokens as the last append, {self._last_query_len}, which differed by "
                    f"sequence, got {query_len}; give num_tokens for others"
                )
            return self._last_counts
        return self._counts(num_tokens, query_len)

    def _attend_here(
        self, query: Tensor, chosen: Tensor, counts: list[int], scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """To those of the chosen blocks that this rank has; every query as a sequence of its own."""
        batch, num_heads, num_queries, _ = query.shape
        per_page = self.page_size // self.block_size
        page = torch.div(chosen, per_page, rounding_mode="floor")
        is_here = (chosen >= 0) & (page % self._num_ranks == self._rank)
        local = torch.div(page, self._num_ranks, rounding_mode="floor") * per_page + chosen % per_page
        local = torch.where(is_here, local, -1).to(torch.int32)
        # A query sees this rank's tokens up to its own place; that is the length its sequence has here.
        seen = [
            self._num_before(length - count + index + 1) if index < count and length - count + index >= 0 else 0
            for length, count in zip(self._lengths, counts, strict=True)
            for index in range(num_queries)
        ]
        lengths = torch.tensor(seen, dtype=torch.int32, device=self.device)
        table = torch.arange(batch, dtype=torch.int32, device=self.device).repeat_interleave(num_queries)[:, None]
        rows, choice = (
            tensor.transpose(1, 2).reshape(batch * num_queries, num_heads, 1, -1) for tensor in (query, local)
        )
        out, lse = _ops.moba_decode.default(
            rows, self._keys, self._values, choice, lengths, table, None, self.block_size, scale, softcap, None
        )
        return (
            out.view(batch, num_queries, num_heads, -1).transpose(1, 2),
            lse.view(batch, num_queries, num_heads).transpose(1, 2),
        )

    def _merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all ranks, in their order, in the dtype of sums."""
        if out.numel() == 0:
            return out.to(lse.dtype), lse.contiguous()
        parts = []
        for tensor in (out, lse):
            sent = tensor.contiguous()
            received = sent.new_empty((self._num_ranks, *sent.shape))
            with collectives.naming("merging what ranks attended to in a ShardedCache", self._group):
                collectives.all_gather(received.view(-1), sent.view(-1), group=self._group)
            parts.append(received)
        outs, all_lse = parts
        largest = all_lse.amax(0)
        finite = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = torch.exp(all_lse - finite)
        total, merged = torch.zeros_like(lse), torch.zeros_like(outs[0], dtype=lse.dtype)
        for part, weight in zip(outs, weights, strict=True):
            total = total + weight
            merged += part.masked_fill((weight == 0)[..., None], 0.0) * weight[..., None]
        merged = torch.where((total == 0)[..., None], 0.0, merged / total[..., None])
        return merged, torch.where(total == 0, -torch.inf, finite + total.log())

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        for (name, tensor), dim in zip((("key", key), ("value", value)), (self.head_dim, self.value_dim), strict=True):
            checks.check_tensor(name, tensor)
            self._check_like(name, tensor)
            expected = (self.batch_size, self.num_kv_heads, dim)
            if tensor.ndim != 4 or (*tensor.shape[:2], tensor.shape[3]) != expected or tensor.size(2) != key.size(2):
                raise ValueError(
                    f"{name} must have shape [{self.batch_size}, {self.num_kv_heads}, tokens, {dim}] and key and value "
                    f"the same tokens, got {tuple(key.shape)} and {tuple(value.shape)}"
                )
            check_no_gradient(name, tensor, "a cache records no gradients; use torch.no_grad()")

    def _check_like(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.dtype:
            raise TypeError(f"{name} must have the cache's dtype, {self.dtype}, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on the cache's device, {self.device}, got {tensor.device}")

    def _check_room(self, counts: list[int]) -> None:
        for sequence, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if length + count > self.max_seq_len:
                raise ValueError(
                    f"key has {count} new tokens for sequence {sequence}, which holds {length}: that is more than "
                    f"max_seq_len, {self.max_seq_len}"
                )

    def _check_query(
        self,
        query: Tensor,
        top_k: int | None,
        scale: float | None,
        return_lse: bool,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        checks.check_tensor("query", query)
        self._check_like("query", query)
        heads = query.size(1) if query.ndim == 4 else 0
        if query.ndim != 4 or query.size(0) != self.batch_size or query.size(3) != self.head_dim:
            raise ValueError(
                f"query must have shape [{self.batch_size}, heads, tokens, {self.head_dim}], got {tuple(query.shape)}"
            )
        checks.check_heads("query", heads, "the cache", self.num_kv_heads)
        check_no_gradient("query", query, "a cache records no gradients; use torch.no_grad()")
        if top_k is not None:
            checks.check_count("top_k", top_k)
        checks.check_scale(scale)
        checks.check_flag("return_lse", return_lse)
        checks.check_softcap(softcap)
        checks.check_sinks(sinks)
        if sinks is not None:
            checks.check_logit_per_head(sinks, heads, query)


def _by_token(tensor: Tensor, num_parts: int) -> Tensor:
    """``[B, H, n, D]`` as ``[parts * n, B / parts * H, D]``."""
    batch, num_heads, num_tokens, dim = tensor.shape
    rows = tensor.reshape(num_parts, batch // num_parts * num_heads, num_tokens, dim)
    return rows.transpose(1, 2).flatten(0, 1)


def _by_head(tokens: Tensor, num_heads: int) -> Tensor:
    """``[n, B * H, D]`` as ``[B, H, n, D]``."""
    return tokens.transpose(0, 1).unflatten(0, (-1, num_heads))


def _rows_of(tensor: Tensor, place: Tensor) -> Tensor:
    """Of ``tensor [B, H, N, D]`` rows ``place [B, n]`` of each batch entry."""
    return tensor.gather(2, place[:, None, :, None].expand(-1, tensor.size(1), -1, tensor.size(3)))

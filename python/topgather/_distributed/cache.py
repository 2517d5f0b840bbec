"""Decoding over ranks: a cache whose pages are spread over them. See :class:`ShardedCache`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._common import checks, tensors
from .._common.library import DTYPE_CODES, sum_dtype
from ..cache._checks import check_no_gradient, check_sizes
from ..ops import _decode_ops, _moba_ops  # noqa: F401  registers the ops
from . import collectives
from .placement import Placement, Stretch, check_placement, group_of, placement_of
from .transfer import Transfer

_ops = torch.ops.topgather


class ShardedCache:
    """Keys and values of a batch of sequences of one length, whose pages are dealt out to the ranks of a group in turn.

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
        self._length = 0
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
    def length(self) -> int:
        """Tokens of each sequence."""
        return self._length

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.batch_size}, {self.num_kv_heads}, {self.head_dim}, "
            f"block_size={self.block_size}, max_seq_len={self.max_seq_len}, length={self._length}, "
            f"rank={self._rank} of {self._num_ranks})"
        )

    def reset(self) -> None:
        """Forget every token. Memory stays."""
        self._length = 0

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

    # --- appending ----------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append tokens that all ranks have: ``key [B, Hkv, M, D]``, ``value [B, Hkv, M, Dv]``.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape or device, a tensor that requires grad where gradients are recorded, or more
                tokens than ``max_seq_len``.
        """
        self._check_new(key, value)
        start, end = self._length, self._length + key.size(2)
        self._check_room(end)
        with torch.no_grad():
            for stretch in self._owned(self._rank, start, end):
                row, new = self._row(stretch.start), slice(stretch.start - start, stretch.end - start)
                self._keys[:, :, row : row + stretch.length] = key[:, :, new]
                self._values[:, :, row : row + stretch.length] = value[:, :, new]
            held = start % self.block_size
            joined = torch.cat([self._unfinished[:, :, :held], key], dim=2)
            self._finish_blocks(joined, start // self.block_size)
        self._length = end

    def _finish_blocks(self, keys: Tensor, first_block: int) -> None:
        """Centroids of the blocks that ``keys`` fill, from the start of a block on; the rest is kept."""
        count = keys.size(2) // self.block_size
        whole = keys[:, :, : count * self.block_size]
        if count > 0:
            found = _ops.block_centroids.default(tensors.contiguous_rows(whole), self.block_size)
            self._centroids[:, :, first_block : first_block + count] = found
        rest = keys[:, :, count * self.block_size :]
        self._unfinished[:, :, : rest.size(2)] = rest

    def append_sharded(self, key: Tensor, value: Tensor, placement: str = "contiguous") -> None:
        """Append tokens of which each rank has its own, as :func:`shard_sequence` cuts them or any number in order.

        Keys and values go to the ranks that have their pages; each rank holds the new tokens once more meanwhile.

        Args:
            key: ``[B, Hkv, n, D]``, this rank's tokens.
            value: ``[B, Hkv, n, Dv]``.
            placement: as in :func:`moba_attention`.

        Raises:
            TypeError: an argument of the wrong type or dtype, on every rank.
            ValueError: as :meth:`append`, on every rank, or numbers of tokens that are not those of ``placement``.
        """
        error: Exception | None = None
        try:
            self._check_new(key, value)
            check_placement(placement)
        except (TypeError, ValueError) as raised:
            error = raised
        what = "appending to a ShardedCache"
        numbers = [int(error is not None), 0 if error is not None else key.size(2), int(placement == "zigzag")]
        device = collectives.agreement_device(self._group)
        has_error, lengths, kinds = collectives.gather_numbers(numbers, self._group, device, what)
        collectives.raise_everywhere(error, has_error, self._group, what)
        collectives.require_same(["placement"], [kinds])
        layout = placement_of(placement, self._group, lengths)
        start, end = self._length, self._length + layout.total
        self._check_room(end)
        with torch.no_grad():
            self._receive(key, value, layout, start, end)
        self._length = end

    def _receive(self, key: Tensor, value: Tensor, layout: Placement, start: int, end: int) -> None:
        has = [
            [Stretch(start + stretch.start, stretch.length) for stretch in of_rank if stretch.length > 0]
            for of_rank in layout.stretches
        ]
        to_pages = Transfer(has, [self._owned(rank, start, end) for rank in range(layout.num_ranks)])
        what = "sending tokens to their pages of a ShardedCache"
        for pages, new in ((self._keys, key), (self._values, value)):
            first, arrived = 0, to_pages.fetch(_by_token(new), layout, what)
            for stretch in self._owned(self._rank, start, end):
                part = _by_head(arrived[first : first + stretch.length], self.batch_size)
                row = self._row(stretch.start)
                pages[:, :, row : row + stretch.length] = part
                first += stretch.length
        # Blocks that are whole now have their keys at one rank, which tells the others their mean.
        size, num_ranks = self.block_size, layout.num_ranks
        first_block, end_block = start // size, end // size
        owners = [block * size // self.page_size % num_ranks for block in range(first_block, end_block)]
        most = max((owners.count(rank) for rank in set(owners)), default=0)
        if most > 0:
            found = self._centroids.new_zeros((most, self.batch_size, self.num_kv_heads, self.head_dim))
            mine = [first_block + index for index, owner in enumerate(owners) if owner == self._rank]
            if mine:
                rows = torch.cat([torch.arange(size) + self._row(block * size) for block in mine]).to(self.device)
                keys = self._keys.index_select(2, rows)
                found[: len(mine)] = _ops.block_centroids.default(keys, size).permute(2, 0, 1, 3)
            received = found.new_empty((num_ranks, *found.shape))
            with collectives.naming("gathering centroids of a ShardedCache", self._group):
                collectives.all_gather(received.view(-1), found.view(-1), group=self._group)
            for rank in range(num_ranks):
                blocks = [first_block + index for index, owner in enumerate(owners) if owner == rank]
                self._centroids[:, :, blocks] = received[rank, : len(blocks)].permute(1, 2, 0, 3)
        rest = max(end_block * size, start)
        to_all = Transfer(has, [[Stretch(rest, end - rest)] if rest < end else []] * num_ranks)
        arrived = to_all.fetch(_by_token(key), layout, what)
        place = rest % size
        self._unfinished[:, :, place : place + end - rest] = _by_head(arrived, self.batch_size)

    # --- attention ----------------------------------------------------------------------------------------------------

    def decode(
        self,
        query: Tensor,
        top_k: int | None = 8,
        scale: float | None = None,
        return_lse: bool = False,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from the last ``M`` tokens, as :func:`topgather.moba_decode` does with one cache.

        Args:
            query: ``[B, Hq, M, D]``, the same on all ranks.
            top_k, scale, return_lse, softcap, sinks: as in :func:`topgather.moba_decode`.

        Returns:
            ``out [B, Hq, M, Dv]``, the same bits on all ranks, and with ``return_lse`` also ``lse [B, Hq, M]``. A query
            of a token before the first gets 0 and -inf.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or option; a query that requires grad where gradients are recorded.
        """
        self._check_query(query, top_k, scale, return_lse, softcap, sinks)
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        batch = query.size(0)
        num_blocks = max(-(-self._length // self.block_size), 1)
        slots = num_blocks if top_k is None else min(top_k, num_blocks)
        with torch.no_grad():
            lengths = torch.full((batch,), self._length, dtype=torch.int32, device=self.device)
            page = self._centroids.size(2) * self.block_size
            chosen = _ops.moba_decode_route.default(
                query, self._centroids, lengths, None, None, self.block_size, page, slots
            )
            out, lse = self._attend_here(query, chosen, scale, softcap)
            out, lse = self._merge(out, lse)
            if sinks is not None:
                logits = sinks.to(lse.dtype)[:, None]
                is_nothing = (lse == -torch.inf) & (logits == -torch.inf)
                out = out * torch.sigmoid((lse - logits).masked_fill(is_nothing, torch.inf))[..., None]
            out = out.to(query.dtype)
        return (out, lse) if return_lse else out

    def _attend_here(self, query: Tensor, chosen: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """To those of the chosen blocks that this rank has; every query as a sequence of its own."""
        batch, num_heads, num_queries, _ = query.shape
        per_page = self.page_size // self.block_size
        page = torch.div(chosen, per_page, rounding_mode="floor")
        is_here = (chosen >= 0) & (page % self._num_ranks == self._rank)
        local = torch.div(page, self._num_ranks, rounding_mode="floor") * per_page + chosen % per_page
        local = torch.where(is_here, local, -1).to(torch.int32)
        # A query sees this rank's tokens up to its own place; that is the length its sequence has here.
        positions = [self._length - num_queries + index for index in range(num_queries)]
        seen = [self._num_before(position + 1) if position >= 0 else 0 for position in positions]
        lengths = torch.tensor(seen * batch, dtype=torch.int32, device=self.device)
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

    def _check_room(self, end: int) -> None:
        if end > self.max_seq_len:
            raise ValueError(
                f"key has {end - self._length} new tokens, and the cache holds {self._length}: that is more than "
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


def _by_token(tensor: Tensor) -> Tensor:
    """``[B, H, n, D]`` as ``[n, B * H, D]``."""
    return tensor.flatten(0, 1).transpose(0, 1)


def _by_head(tokens: Tensor, batch: int) -> Tensor:
    """``[n, B * H, D]`` as ``[B, H, n, D]``."""
    return tokens.transpose(0, 1).unflatten(0, (batch, -1))

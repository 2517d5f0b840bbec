"""Caches of keys and values that :func:`topgather.moba_decode` attends to.

A cache keeps, beside keys and values, the centroid of every block, and keeps it up to date as tokens come: appending
costs what the new tokens cost. :class:`MobaCache` has one piece of memory a sequence, :class:`PagedMobaCache` pages
that sequences take from a pool, as serving engines keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._base_cache import BaseCache
from .ops import _checks as checks

__all__ = ["MobaCache", "PagedMobaCache"]


def _checked(name: str, value: Any, least: int = 1) -> int:
    checks.check_count(name, value, least)
    return int(value)


def _check_sizes(
    batch_size: int, num_kv_heads: int, head_dim: int, block_size: int, max_seq_len: int, value_dim: int | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    checks.check_count("batch_size", batch_size, least=0)
    checks.check_count("num_kv_heads", num_kv_heads)
    checks.check_count("head_dim", head_dim)
    checks.check_count("block_size", block_size)
    checks.check_count("max_seq_len", max_seq_len)
    if value_dim is not None:
        checks.check_count("value_dim", value_dim, least=0)
    if dtype not in checks.FLOATING_DTYPES:
        allowed = ", ".join(str(allowed) for allowed in checks.FLOATING_DTYPES)
        raise TypeError(f"dtype must be one of {allowed}, got {dtype}")


class MobaCache(BaseCache):
    """Keys and values of a batch of sequences, each in memory of its own (MoBA, arXiv 2502.13189, section 2.2).

    Args:
        batch_size: number of sequences, B.
        num_kv_heads: key and value heads, Hkv.
        head_dim: of keys, D.
        block_size: keys of a block, at least 1.
        max_seq_len: the most tokens of a sequence; memory for them is taken at once.
        value_dim: of values; ``head_dim`` if None.
        dtype: of keys and values: float32, bfloat16, float16 or (CPU only) float64. Centroids are float32 (float64
            for float64).
        device: where it lives; torch's default if None.
        conv_weight: ``[Hkv, D, W]``, weights of :func:`topgather.key_conv`, which keys then go through as they come;
            the convolution's state is part of the cache.

    Attributes:
        seq_lens: int32 ``[B]`` on the device, tokens of each sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 128,
        max_seq_len: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv_weight: Tensor | None = None,
    ) -> None:
        _check_sizes(batch_size, num_kv_heads, head_dim, block_size, max_seq_len, value_dim, dtype)
        super().__init__(
            batch_size, num_kv_heads, head_dim, block_size=block_size, max_seq_len=max_seq_len, value_dim=value_dim,
            dtype=dtype, device=device, conv_weight=conv_weight, page_size=max_seq_len, num_pages=batch_size,
        )  # fmt: skip

    @property
    def key(self) -> Tensor:
        """View ``[B, Hkv, longest sequence, D]``; rows past a sequence's end mean nothing."""
        return self.key_pages[:, :, : max(self.lengths, default=0)]

    @property
    def value(self) -> Tensor:
        """View ``[B, Hkv, longest sequence, Dv]``; rows past a sequence's end mean nothing."""
        return self.value_pages[:, :, : max(self.lengths, default=0)]

    def _reorder_pages(self, numbers: list[int]) -> None:
        stays = len(numbers) == self.batch_size
        longest = max(self._lengths, default=0)
        num_blocks = -(-longest // self.block_size)
        chosen = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        for name, used in (("key_pages", longest), ("value_pages", longest), ("centroids", num_blocks)):
            pages = getattr(self, name)
            selected = pages[:, :, :used].index_select(0, chosen)
            if not stays:
                if name == "centroids":
                    pages = pages.new_empty((len(numbers), *pages.shape[1:]))
                else:
                    pages = self._new_rows(len(numbers), pages.size(2), pages.size(3))
            pages[:, :, :used].copy_(selected)
            setattr(self, name, pages)


class PagedMobaCache(BaseCache):
    """Keys and values of a batch of sequences in pages of a shared pool (PagedAttention, arXiv 2309.06180; the blocks
    are MoBA's, arXiv 2502.13189).

    A sequence takes a page when its tokens reach it. :meth:`reorder` lets sequences share whole pages; a page that is
    still being filled is copied.

    Args:
        batch_size: number of sequences, B.
        num_kv_heads: key and value heads, Hkv.
        head_dim: of keys, D.
        block_size: keys of a block, at least 1.
        max_seq_len: the most tokens of a sequence.
        value_dim: of values; ``head_dim`` if None.
        dtype: of keys and values, as in :class:`MobaCache`.
        device: where it lives; torch's default if None.
        conv_weight: ``[Hkv, D, W]``, as in :class:`MobaCache`.
        page_size: tokens of a page, a multiple of ``block_size``; ``block_size`` if None.
        num_pages: pages of the pool; if None, enough for all sequences to reach ``max_seq_len``.

    Attributes:
        seq_lens: int32 ``[B]`` on the device, tokens of each sequence.
        page_table: int32 ``[B, ceil(max_seq_len / page_size)]`` on the device, pages of each sequence, -1 where it has
            none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
    """

    page_table: Tensor

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 128,
        max_seq_len: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv_weight: Tensor | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        _check_sizes(batch_size, num_kv_heads, head_dim, block_size, max_seq_len, value_dim, dtype)
        tokens = _checked("page_size", block_size if page_size is None else page_size)
        if tokens % block_size != 0:
            raise ValueError(f"page_size must be a multiple of block_size, {block_size}, got {page_size}")
        per_sequence = -(-max_seq_len // tokens)
        pages = _checked("num_pages", batch_size * per_sequence if num_pages is None else num_pages, least=0)
        super().__init__(
            batch_size, num_kv_heads, head_dim, block_size=block_size, max_seq_len=max_seq_len, value_dim=value_dim,
            dtype=dtype, device=device, conv_weight=conv_weight, page_size=tokens, num_pages=pages,
        )  # fmt: skip
        self.num_pages = pages
        self.page_table = torch.full((batch_size, per_sequence), -1, dtype=torch.int32, device=self.device)
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._num_users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def reserve(self, num_tokens: int | Sequence[int]) -> None:
        """Give every sequence its pages for so many more tokens now, so that appending them needs nothing of the host.

        Needed before a CUDA graph with an :meth:`append` is captured or replayed. Pages that no token reached go back
        with :meth:`truncate`, :meth:`reorder` and :meth:`reset`.

        Args:
            num_tokens: tokens to come, one number for all sequences or one for each.

        Raises:
            TypeError: not ints.
            ValueError: a negative number, or not enough space.
        """
        wanted = [num_tokens] * self.batch_size if isinstance(num_tokens, int) else num_tokens
        if not isinstance(wanted, Sequence) or isinstance(wanted, str):
            raise TypeError(f"num_tokens must be an int or ints, got {type(num_tokens).__name__}")
        if len(wanted) != self.batch_size:
            raise ValueError(f"num_tokens must have one number a sequence, {self.batch_size}, got {len(wanted)}")
        for count in wanted:
            checks.check_count("num_tokens", count, least=0)
        self._make_room(list(wanted), capturing=False)

    def _missing_pages(self, lengths: list[int]) -> int:
        needed = (-(-length // self.page_size) for length in lengths)
        return sum(max(0, need - len(held)) for need, held in zip(needed, self._pages, strict=True))

    def _lacks_room(self, counts: list[int]) -> bool:
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        return super()._lacks_room(counts) or self._missing_pages(lengths) > len(self._free)

    def _take_pages(self, lengths: list[int]) -> None:
        missing = self._missing_pages(lengths)
        if missing == 0:
            return
        if missing > len(self._free):
            raise ValueError(
                f"{missing} more pages of {self.page_size} tokens are needed, but only {len(self._free)} of num_pages, "
                f"{self.num_pages}, are free"
            )
        rows, columns, numbers = [], [], []
        for sequence, length in enumerate(lengths):
            held = self._pages[sequence]
            while len(held) * self.page_size < length:
                page = self._free.pop()
                self._num_users[page] = 1
                rows.append(sequence)
                columns.append(len(held))
                numbers.append(page)
                held.append(page)
        place = torch.tensor([rows, columns, numbers], device=self.device)
        self.page_table.index_put_((place[0], place[1]), place[2].to(torch.int32))

    def _drop_pages(self, lengths: list[int]) -> None:
        shared = self._keep([(sequence, length) for sequence, length in enumerate(lengths)])
        self._copy_pages(shared)
        self._write_table()

    def _reorder_pages(self, numbers: list[int]) -> None:
        shared = self._keep([(number, self._lengths[number]) for number in numbers])
        self._copy_pages(shared)
        if len(numbers) != self.page_table.size(0):
            self.page_table = self.page_table.new_empty((len(numbers), self.page_table.size(1)))
        self._write_table()

    def _keep(self, kept: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Make the sequences those of ``kept``, pairs of an old sequence and a length.

        Returns pages to copy, from and to: a page that has room left belongs to one sequence alone. Raises before
        anything is changed.
        """
        pages = [self._pages[sequence][: -(-length // self.page_size)] for sequence, length in kept]
        users = [0] * self.num_pages
        for held in pages:
            for page in held:
                users[page] += 1
        free = [page for page in self._free if users[page] == 0]
        free += [page for page in range(self.num_pages) if users[page] == 0 and self._num_users[page] > 0]
        copies: list[tuple[int, int]] = []
        for (_, length), held in zip(kept, pages, strict=True):
            if length % self.page_size == 0 or users[held[-1]] == 1:
                continue
            if not free:
                raise ValueError(
                    f"a page that sequences share is to be copied, but none of num_pages, {self.num_pages}, is free"
                )
            users[held[-1]] -= 1
            copies.append((held[-1], free.pop()))
            held[-1] = copies[-1][1]
            users[held[-1]] = 1
        self._pages, self._num_users, self._free = pages, users, free
        return copies

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        source, target = torch.tensor(copies, dtype=torch.int64, device=self.device).unbind(1)
        for pages in (self.key_pages, self.value_pages, self.centroids):
            pages[target] = pages[source]

    def _write_table(self) -> None:
        width = self.page_table.size(1)
        table = [held + [-1] * (width - len(held)) for held in self._pages]
        self.page_table.copy_(torch.tensor(table, dtype=torch.int32).reshape(len(table), width))

    def _made_by(self, make: Callable[[Tensor], Tensor], device: torch.device) -> PagedMobaCache:
        other = super()._made_by(make, device)
        other._pages = [list(held) for held in self._pages]
        other._num_users, other._free = list(self._num_users), list(self._free)
        return other

"""A cache in which sequences take pages from a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import checks
from ._base import BaseCache, Commit, Rearrangement, nothing_to_do, ordinary_tensors
from ._checks import check_counts, check_sizes


class PagedMobaCache(BaseCache):
    """Keys and values of a batch of sequences in pages of a shared pool (PagedAttention, arXiv 2309.06180; the blocks
    are MoBA's, arXiv 2502.13189).

    A sequence takes a page when its tokens reach it. :meth:`reorder` lets sequences share whole pages; a page that is
    still being filled is copied.

    Args:
        batch_size: number of sequences, B.
        num_kv_heads: key and value heads, Hkv.
        head_dim: of keys, D.
        block_size: keys of a block, at least 1; more than ``max_seq_len`` is the same as ``max_seq_len``.
        max_seq_len: the most tokens of a sequence.
        value_dim: of values; ``head_dim`` if None.
        dtype: of keys and values, as in :class:`MobaCache`.
        device: where it lives; torch's default if None.
        conv_weight: ``[Hkv, D, W]``, as in :class:`MobaCache`.
        page_size: tokens of a page, a multiple of ``block_size``; ``block_size`` if None. No more than a sequence can
            fill is taken.
        num_pages: pages of the pool; if None, enough for all sequences to reach ``max_seq_len``.

    Attributes:
        seq_lens: int32 ``[B]`` on the device, tokens of each sequence.
        page_table: int32 ``[B, most pages of a sequence]`` on the device, pages of each sequence, -1 where it has none.
            ``ceil(max_seq_len / page_size)`` columns, or ``num_pages`` where that is less.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range, or more than memory holds
            (``torch.OutOfMemoryError`` on a GPU).
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
        check_sizes(batch_size, num_kv_heads, head_dim, block_size, max_seq_len, value_dim, dtype)
        tokens = block_size if page_size is None else page_size
        checks.check_count("page_size", tokens)
        if tokens % block_size != 0:
            raise ValueError(f"page_size must be a multiple of block_size, {block_size}, got {page_size}")
        block_size = min(block_size, max_seq_len)
        tokens = min(tokens, -(-max_seq_len // block_size) * block_size)
        per_sequence = -(-max_seq_len // tokens)
        pages = batch_size * per_sequence if num_pages is None else num_pages
        checks.check_count("num_pages", pages, least=0)
        self.num_pages = pages
        self._num_columns = min(per_sequence, max(pages, 1))
        super().__init__(
            batch_size, num_kv_heads, head_dim, block_size=block_size, max_seq_len=max_seq_len, value_dim=value_dim,
            dtype=dtype, device=device, conv_weight=conv_weight, page_size=tokens, num_pages=pages,
        )  # fmt: skip
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._num_users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    def _allocate(self, num_pages: int) -> None:
        super()._allocate(num_pages)
        shape = (self.batch_size, self._num_columns)
        self.page_table = torch.full(shape, -1, dtype=torch.int32, device=self.device)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def reserve(self, num_tokens: int | Sequence[int]) -> None:
        """Give every sequence its pages for so many more tokens now, so that appending them needs nothing of the host.

        Needed before a compiled :meth:`append`, and before a CUDA graph with one is captured or replayed. Pages that no
        token reached go back with :meth:`truncate`, :meth:`reorder` and :meth:`reset`.

        Args:
            num_tokens: tokens to come, one number for all sequences or one for each.

        Raises:
            TypeError: not ints.
            ValueError: a negative number, or not enough space. The cache is then what it was.
        """
        wanted = [num_tokens] * self.batch_size if isinstance(num_tokens, int) else num_tokens
        _, take = self._room_for(check_counts("num_tokens", wanted, self.batch_size))
        take()

    def _missing_pages(self, lengths: list[int]) -> int:
        needed = (-(-length // self.page_size) for length in lengths)
        return sum(max(0, need - len(held)) for need, held in zip(needed, self._pages, strict=True))

    def _lacks_room(self, counts: list[int]) -> bool:
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        return super()._lacks_room(counts) or self._missing_pages(lengths) > len(self._free)

    def _pages_for(self, lengths: list[int]) -> tuple[Tensor | None, Commit]:
        missing = self._missing_pages(lengths)
        if missing == 0:
            return self.page_table, nothing_to_do
        if missing > len(self._free):
            raise ValueError(
                f"{missing} more pages of {self.page_size} tokens are needed, but only {len(self._free)} of num_pages, "
                f"{self.num_pages}, are free"
            )
        rows, columns = [], []
        for sequence, (length, held) in enumerate(zip(lengths, self._pages, strict=True)):
            for column in range(len(held), -(-length // self.page_size)):
                rows.append(sequence)
                columns.append(column)
        numbers = self._free[: -missing - 1 : -1]
        place = torch.tensor([rows, columns, numbers], device=self.device)
        table = self.page_table.index_put((place[0], place[1]), place[2].to(torch.int32))

        def commit() -> None:
            self.page_table.copy_(table)
            del self._free[-missing:]
            for sequence, page in zip(rows, numbers, strict=True):
                self._num_users[page] = 1
                self._pages[sequence].append(page)

        return table, commit

    def _give_back_reserved(self, lengths: list[int]) -> None:
        needed = (-(-length // self.page_size) for length in lengths)
        if any(len(held) > need for need, held in zip(needed, self._pages, strict=True)):
            with ordinary_tensors():
                rearrangement = self._rearranged(list(enumerate(lengths)))
                rearrangement.write_rows()
                rearrangement.commit()

    def _rearranged(self, kept: list[tuple[int, int]]) -> Rearrangement:
        pages, users, free, copies = self._shared_pages(kept)
        rows = (self.key_pages, self.value_pages, self.centroids)
        source, target = torch.tensor(copies, dtype=torch.int64, device=self.device).reshape(-1, 2).unbind(1)
        copied = [each[source] for each in rows] if copies else []
        table = self.page_table.new_full((len(kept), self.page_table.size(1)), -1)
        most = max(map(len, pages), default=0)
        filled = [held + [-1] * (most - len(held)) for held in pages]
        table[:, :most] = torch.tensor(filled, dtype=torch.int32, device="cpu").reshape(len(kept), most)
        stays = len(kept) == self.page_table.size(0)

        def write_rows() -> None:
            for each, chosen in zip(rows, copied, strict=False):
                each.index_copy_(0, target, chosen)

        def commit() -> None:
            self.page_table = self.page_table.copy_(table) if stays else table
            self._pages, self._num_users, self._free = pages, users, free

        return Rearrangement(table, write_rows, commit)

    def _shared_pages(
        self, kept: list[tuple[int, int]]
    ) -> tuple[list[list[int]], list[int], list[int], list[tuple[int, int]]]:
        """Pages of the sequences of ``kept``, users of every page, free pages, and pages to copy, from and to.

        A page that has room left belongs to one sequence alone; raises where it cannot be copied for the others.
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
        return pages, users, free, copies

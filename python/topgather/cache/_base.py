"""What every cache of keys and values can do; the two that users make differ in where space comes from.

**All or nothing.** A method that changes a cache checks its arguments and computes everything it is going to write
before it writes anything. A call that is refused, or that runs out of memory, leaves the cache as it was. One that is
interrupted while it writes (``KeyboardInterrupt``, a failure of the device) leaves a cache that knows it, and refuses
all but :meth:`BaseCache.reset`.

**Lengths** are on the device, where kernels read them, and mirrored on the host, where space is given out. What happens
on the device alone (token counts in a CUDA tensor, a compiled step, a replayed CUDA graph) leaves the mirror behind; it
is then read from the device when it is needed next.

**Modes.** A cache may be made, filled and read under any mix of inference mode, ``torch.no_grad()`` and autocast: its
tensors are ordinary ones, which may be written to everywhere, and its dtype is the one it was made with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common import checks
from .._common.library import autocast_device, sum_dtype
from ..ops import _decode_ops  # noqa: F401  registers the ops
from ..ops.key_conv import MAX_WIDTH, MIN_WIDTH, key_conv
from ._checks import (
    check_counts,
    check_device_dtype,
    check_no_gradient,
    check_not_fake,
    check_not_transformed,
)

ROW_BYTES = 16  # rows start on such boundaries, so that CUDA kernels read them in place

_Cache = TypeVar("_Cache", bound="BaseCache")
# The second half of a change: writes, after everything that could be refused.
Commit = Callable[[], None]


@dataclass(frozen=True)
class Rearrangement:
    """How sequences become others of the same cache."""

    page_table: Tensor | None  # what it will be
    write_rows: Commit  # keys, values and centroids; where there are pages, in pages that no sequence has yet
    commit: Commit  # the page table and whose pages are whose; after write_rows


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is allocated here can be written to later, in inference mode and outside; gradients are not recorded."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def nothing_to_do() -> None:
    """The commit of a change that needs none."""


class BaseCache:
    """What both caches share: everything but where space comes from."""

    page_table: Tensor | None = None

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int,
        max_seq_len: int,
        value_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        conv_weight: Tensor | None,
        page_size: int,
        num_pages: int,
    ) -> None:
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.block_size = min(block_size, max_seq_len)
        self.max_seq_len = max_seq_len
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device
        check_device_dtype(dtype, self.device)
        if conv_weight is not None:
            self._check_conv_weight(conv_weight)
        self.conv_weight = conv_weight
        # The call that writes, or that was interrupted while it did.
        self._unfinished: str | None = None
        with ordinary_tensors():
            try:
                self._allocate(num_pages)
            except (RuntimeError, MemoryError) as error:
                self._raise_too_large(num_pages, error)
        # The mirror: exact; or where it is not, at least the length; or where it is no bound either, anything.
        self._lengths = [0] * batch_size
        self._is_exact = True
        self._is_bound = True
        self._was_captured = False
        # What the last append brought: how many tokens, and per sequence where they were not all.
        self.last_query_len = 0
        self.last_num_tokens: Tensor | None = None

    def _allocate(self, num_pages: int) -> None:
        def rows(dim: int) -> Tensor:
            return aligned_rows((num_pages, self.num_kv_heads, self.page_size, dim), self.dtype, self.device)

        self.key_pages = rows(self.head_dim)
        self.value_pages = rows(self.value_dim)
        blocks = -(-self.page_size // self.block_size)
        shape = (num_pages, self.num_kv_heads, blocks, self.head_dim)
        # Zeros, so that caches may be compared: a block that no key has filled is not read.
        self.centroids = torch.zeros(shape, dtype=sum_dtype(self.dtype), device=self.device)
        self.seq_lens = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        # The last keys from before the convolution, newest last: zeros before a sequence's start, which is what they
        # count as; and how many of them are known.
        self._raw_keys: Tensor | None = None
        self._num_raw_keys: list[int] = []
        if self.conv_weight is not None:
            num_kept = self.block_size + self._state_len
            shape = (self.batch_size, self.num_kv_heads, num_kept, self.head_dim)
            self._raw_keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._num_raw_keys = [num_kept] * self.batch_size

    def _raise_too_large(self, num_pages: int, error: Exception) -> NoReturn:
        row_bytes = (self.head_dim + self.value_dim) * self.dtype.itemsize * self.num_kv_heads
        message = (
            f"max_seq_len, batch_size, num_pages and block_size must be such that a cache fits memory: "
            f"{num_pages} pages of {self.page_size} tokens with {self.num_kv_heads} heads take "
            f"{num_pages * self.page_size * row_bytes} bytes on {self.device}, and were not to be had"
        )
        # On a GPU the type by which programs know that they may try again with less.
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else ValueError
        raise kind(message) from error

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; waits for the device where only it knows them."""
        if not self._is_exact or self._was_captured:
            self._read_lengths()
        return list(self._lengths)

    @property
    def lengths_on_host(self) -> list[int] | None:
        """Tokens of each sequence where the host knows them without asking the device, else None."""
        if is_compiling():
            return None  # a graph for every length otherwise
        return self._lengths if self._is_exact and not self._was_captured else None

    def _read_lengths(self) -> None:
        """Bring the host's mirror of the lengths up to date; waits for the device."""
        self._lengths = self.seq_lens.tolist()
        self._is_exact = self._is_bound = True

    def __repr__(self) -> str:
        known = self.lengths_on_host
        return (
            f"{type(self).__name__}({self.batch_size}, {self.num_kv_heads}, {self.head_dim}, "
            f"block_size={self.block_size}, max_seq_len={self.max_seq_len}, value_dim={self.value_dim}, "
            f"dtype={self.dtype}, device='{self.device}', lengths={'on the device' if known is None else known})"
        )

    def check_whole(self) -> None:
        """Raise ``RuntimeError`` where a call was interrupted while it wrote."""
        if self._unfinished is not None:
            raise RuntimeError(
                f"the cache was interrupted in the middle of {self._unfinished}: it holds a part of what that wrote; "
                f"call reset() on it and fill it again"
            )

    # --- appending --------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, num_tokens: Sequence[int] | Tensor | None = None) -> None:
        """Add new tokens behind those that are there, and bring the centroids up to date.

        Args:
            key: ``[B, Hkv, M, D]`` in the cache's dtype and on its device, contiguous in its last dimension. With a
                ``conv_weight`` these are the keys before the convolution.
            value: ``[B, Hkv, M, Dv]``, likewise.
            num_tokens: how many of the ``M`` tokens each sequence has, ints or an integer tensor ``[B]``; the others,
                at the end, are ignored. None for all. A tensor on a CUDA device is not waited for.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, stride or device; a tensor that requires grad where gradients are recorded, that
                a transform of ``torch.func`` wraps, or that is fake; not enough space. The cache is then what it was.
                On CUDA, where only the device knows how many tokens there are, a token without a place is dropped
                instead.
            NotImplementedError: a dual tensor of forward-mode differentiation.

        In a compiled function and in a captured CUDA graph the host does not follow the lengths: pages must have been
        reserved. On the CPU tokens without a place, or beyond ``max_seq_len``, then raise when the graph runs, before
        anything is written: ``RuntimeError`` for the latter. On CUDA those without a place are dropped, and queries of
        a sequence that has outgrown ``max_seq_len`` get NaN.
        """
        self._check_new(key, value)
        counts, count_tensor = self.token_counts(num_tokens, key.size(2))
        if is_compiling():
            self._assert_length(key.size(2) if count_tensor is None else count_tensor)
        table, take_room = self._room_for([key.size(2)] * self.batch_size if counts is None else counts)
        key, raw_keys = self._convolved(key, count_tensor)
        # The one write that an op could refuse comes first, and nobody sees it before the lengths change.
        torch.ops.topgather.moba_cache_append.default(
            key, value, self.key_pages, self.value_pages, self.centroids,
            self.seq_lens, table, count_tensor, self.block_size,
        )  # fmt: skip
        self._unfinished = "append"
        take_room()
        if raw_keys is not None:
            self._keep_raw_keys(raw_keys, counts)
        self._advance(key.size(2), counts, count_tensor)
        self._unfinished = None

    @property
    def has_spare_rows(self) -> bool:
        """Whether there are places for more tokens than ``max_seq_len``, at the end of a last page."""
        columns = 1 if self.page_table is None else self.page_table.size(1)
        return columns * self.page_size > self.max_seq_len

    def _assert_length(self, num_new: int | Tensor) -> None:
        """Raise, when a compiled graph runs, where ``num_new`` more tokens have a place but no right to it."""
        if self.device.type == "cpu" and self.has_spare_rows:
            torch._assert_async(
                (self.seq_lens + num_new <= self.max_seq_len).all(),
                f"key has more new tokens than a sequence has room for: it would be longer than max_seq_len, "
                f"{self.max_seq_len}",
            )

    def _advance(self, query_len: int, counts: list[int] | None, count_tensor: Tensor | None) -> None:
        if count_tensor is None:
            self.seq_lens.add_(query_len)
        else:
            self.seq_lens.add_(count_tensor)
        self.last_query_len, self.last_num_tokens = query_len, count_tensor
        if is_compiling():
            self._is_exact = self._is_bound = False
            return
        if is_capturing(self.device):
            # From now on replays move the lengths, and the host does not see them.
            self._was_captured = True
            return
        if counts is None:
            self._is_exact = False
            counts = [query_len] * self.batch_size
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def token_counts(
        self, num_tokens: Sequence[int] | Tensor | None, query_len: int
    ) -> tuple[list[int] | None, Tensor | None]:
        """Checked counts of new tokens, as ints where the host knows them and as the kernels take them.

        Args:
            num_tokens: as :meth:`append` takes it.
            query_len: the most a sequence can have.

        Returns:
            Ints, or None where only the device knows; and an int32 tensor on the device, or None for all.

        Raises:
            TypeError: not ints.
            ValueError: not one number a sequence, or not between 0 and ``query_len``.
        """
        if num_tokens is None:
            return [query_len] * self.batch_size, None
        if isinstance(num_tokens, Tensor):
            checks.check_tensor("num_tokens", num_tokens)
            if num_tokens.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"num_tokens must have dtype torch.int32 or torch.int64, got {num_tokens.dtype}")
            if tuple(num_tokens.shape) != (self.batch_size,):
                raise ValueError(
                    f"num_tokens must have shape [{self.batch_size}] (batch size), got {tuple(num_tokens.shape)}"
                )
            if num_tokens.device.type != "cpu" or is_compiling():
                if num_tokens.device != self.device:
                    raise ValueError(
                        f"num_tokens must be on the CPU or the cache's device, {self.device}, got {num_tokens.device}"
                    )
                return None, num_tokens.to(torch.int32)
            if torch._C._functorch.is_batchedtensor(num_tokens):
                raise NotImplementedError(
                    "topgather: num_tokens cannot be mapped by vmap: the host reads how many tokens sequences have"
                )
            num_tokens = num_tokens.tolist()
        counts = check_counts("num_tokens", num_tokens, self.batch_size, "ints, a tensor or None")
        for count in counts:
            if count > query_len:
                raise ValueError(f"num_tokens must be at most the number of new tokens, {query_len}, got {count}")
        return counts, torch.tensor(counts, dtype=torch.int32, device=self.device)

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        self.check_whole()
        dims = (self.head_dim, self.value_dim)
        for (name, tensor), dim in zip((("key", key), ("value", value)), dims, strict=True):
            checks.check_tensor(name, tensor)
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} must have the cache's dtype, {self.dtype}, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the cache's device, {self.device}, got {tensor.device}")
            expected = (self.batch_size, self.num_kv_heads, dim)
            if tensor.ndim != 4 or (*tensor.shape[:2], tensor.shape[3]) != expected or tensor.size(2) != key.size(2):
                raise ValueError(
                    f"{name} must have shape [{self.batch_size}, {self.num_kv_heads}, tokens, {dim}] and key and value "
                    f"the same tokens, got {tuple(key.shape)} and {tuple(value.shape)}"
                )
            checks.check_contiguous_rows(name, tensor)
            check_no_gradient(name, tensor, "a cache records no gradients; use torch.no_grad()")
            check_not_transformed(name, tensor)
            check_not_fake(name, tensor, self.key_pages)

    # --- space ------------------------------------------------------------------------------------------------------

    def _room_for(self, counts: list[int]) -> tuple[Tensor | None, Commit]:
        """Places for so many more tokens of every sequence: the page table with them, and how to take them.

        Raises where there is not enough space. Where the host does not follow the lengths, :meth:`reserve` has seen to
        space, and kernels see what has no place.
        """
        if is_compiling() or is_capturing(self.device):
            return self.page_table, nothing_to_do
        if self._was_captured or not self._is_bound or (not self._is_exact and self._lacks_room(counts)):
            self._read_lengths()
        for sequence, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if length + count > self.max_seq_len:
                raise ValueError(
                    f"key has {count} new tokens for sequence {sequence}, which holds {length}: that is more than "
                    f"max_seq_len, {self.max_seq_len}"
                )
        return self._pages_for([length + count for length, count in zip(self._lengths, counts, strict=True)])

    def _lacks_room(self, counts: list[int]) -> bool:
        return any(length + count > self.max_seq_len for length, count in zip(self._lengths, counts, strict=True))

    def _pages_for(self, lengths: list[int]) -> tuple[Tensor | None, Commit]:
        """The page table for sequences of these lengths, and how to take what it names; raises for lack of pages."""
        raise NotImplementedError

    def _rearranged(self, kept: list[tuple[int, int]]) -> Rearrangement:
        """How to make the sequences those of ``kept``, pairs of an old sequence and its length; raises if it cannot."""
        raise NotImplementedError

    # --- the convolution's state --------------------------------------------------------------------------------------

    def _check_conv_weight(self, weight: Tensor) -> None:
        checks.check_tensor("conv_weight", weight)
        if weight.ndim != 3 or tuple(weight.shape[:2]) != (self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"conv_weight must have shape [{self.num_kv_heads}, {self.head_dim}, width], got {tuple(weight.shape)}"
            )
        if not MIN_WIDTH <= weight.size(2) <= MAX_WIDTH:
            raise ValueError(
                f"conv_weight must have between {MIN_WIDTH} and {MAX_WIDTH} taps, got shape {tuple(weight.shape)}"
            )
        if weight.dtype not in (self.dtype, sum_dtype(self.dtype)):
            allowed = " or ".join(str(dtype) for dtype in dict.fromkeys((self.dtype, sum_dtype(self.dtype))))
            raise TypeError(
                f"conv_weight must have the cache's dtype or that of its sums, {allowed}, got {weight.dtype}"
            )
        if weight.device != self.device:
            raise ValueError(f"conv_weight must be on the cache's device, {self.device}, got {weight.device}")

    @property
    def _state_len(self) -> int:
        assert self.conv_weight is not None
        return self.conv_weight.size(2) - 1

    def _convolved(self, key: Tensor, count_tensor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The keys to store, and the raw keys to remember behind them."""
        if self.conv_weight is None:
            return key, None
        assert self._raw_keys is not None
        num_kept = self._raw_keys.size(2)
        # Under autocast too: the cache has the dtype that was asked for.
        with torch.no_grad(), torch.autocast(autocast_device(self.device), enabled=False):
            convolved, _ = key_conv(key, self.conv_weight, state=self._raw_keys[:, :, num_kept - self._state_len :])
        joined = torch.cat([self._raw_keys, key], dim=2)
        if count_tensor is None:
            return convolved, joined[:, :, key.size(2) :]
        return convolved, _rows_from(joined, count_tensor.clamp(0, key.size(2)), num_kept)

    def _keep_raw_keys(self, raw_keys: Tensor, counts: list[int] | None) -> None:
        assert self._raw_keys is not None
        self._raw_keys.copy_(raw_keys)
        if counts is None or is_compiling():
            return  # no more are known to be there than before
        num_kept = raw_keys.size(2)
        self._num_raw_keys = [min(num_kept, old + new) for old, new in zip(self._num_raw_keys, counts, strict=True)]

    def _truncated_raw_keys(self, before: list[int], after: list[int]) -> Commit:
        if self._raw_keys is None:
            return nothing_to_do
        target, num_kept = self._raw_keys, self._raw_keys.size(2)
        dropped = [old - new for old, new in zip(before, after, strict=True)]
        for sequence, (num_dropped, known) in enumerate(zip(dropped, self._num_raw_keys, strict=True)):
            if after[sequence] > 0 and known - num_dropped < self._state_len and num_dropped > 0:
                raise ValueError(
                    f"lengths cut {num_dropped} tokens off sequence {sequence}; with a conv_weight a cache remembers "
                    f"enough to cut off {known - self._state_len}, or everything"
                )
        # What is left of a sequence that is cut off whole are the zeros before its start.
        known_after = [num_kept if new == 0 else known - cut
                       for new, known, cut in zip(after, self._num_raw_keys, dropped, strict=True)]  # fmt: skip
        shifts = [num_kept if new == 0 else min(cut, num_kept) for new, cut in zip(after, dropped, strict=True)]
        padded = torch.cat([torch.zeros_like(target), target], dim=2)
        raw_keys = _rows_from(padded, num_kept - torch.tensor(shifts, device=self.device), num_kept)

        def commit() -> None:
            target.copy_(raw_keys)
            self._num_raw_keys = known_after

        return commit

    # --- changes ------------------------------------------------------------------------------------------------------

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Cut sequences off at their ends.

        Args:
            lengths: tokens that each sequence keeps, or one number for all; at most those it has.

        Raises:
            TypeError: not ints.
            ValueError: a negative length or one longer than the sequence; with a ``conv_weight``, cutting off more
                tokens than the cache remembers the unconvolved keys of (a block, since the last truncation); for pages
                that sequences share, no free page to copy one to. The cache is then what it was.
        """
        self.check_whole()
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
        after, before = check_counts("lengths", wanted, self.batch_size), self.lengths
        for sequence, (old, new) in enumerate(zip(before, after, strict=True)):
            if new > old:
                raise ValueError(f"lengths must be at most what a sequence holds, {old} for {sequence}, got {new}")
        if after == before:
            self._give_back_reserved(after)
            return
        with ordinary_tensors():
            cut_raw_keys = self._truncated_raw_keys(before, after)
            rearrangement = self._rearranged(list(enumerate(after)))
            sum_blocks = self._restarted_sums(before, after)
            seq_lens = torch.tensor(after, dtype=torch.int32, device=self.device)
            rearrangement.write_rows()
            self._unfinished = "truncate"
            try:
                sum_blocks(rearrangement.page_table)
            except Exception:
                # The one write that an op could refuse comes before all others that can be seen.
                self._unfinished = None
                raise
            rearrangement.commit()
            cut_raw_keys()
            self.seq_lens.copy_(seq_lens)
        self._lengths = after
        self.last_query_len, self.last_num_tokens = 0, None
        self._unfinished = None

    def _give_back_reserved(self, lengths: list[int]) -> None:
        """Give back what :meth:`reserve` took and no token reached."""

    def _restarted_sums(self, before: list[int], after: list[int]) -> Callable[[Tensor | None], None]:
        """How to sum the blocks that were cut once more, given a page table: their keys stay where they are."""
        size = self.block_size
        counts = [new % size if new < old else 0 for old, new in zip(before, after, strict=True)]
        if not any(counts):
            return lambda page_table: None
        starts = [new // size * size for new in after]
        start = torch.tensor(starts, device=self.device)
        pages = torch.arange(self.batch_size, device=self.device)
        if self.page_table is not None:
            column = (start // self.page_size).clamp(max=self.page_table.size(1) - 1)
            # A sequence that is left alone may have no page here; what is read in its stead is not written.
            pages = self.page_table.gather(1, column[:, None])[:, 0].clamp(min=0).long()
            start = start % self.page_size
        rows = (start[:, None] + torch.arange(max(counts), device=self.device)).clamp(max=self.page_size - 1)
        key = self.key_pages[pages[:, None], :, rows].transpose(1, 2)
        value = self.value_pages[pages[:, None], :, rows].transpose(1, 2)
        restarts = [start if count > 0 else 0 for start, count in zip(starts, counts, strict=True)]
        num_before = torch.tensor(restarts, dtype=torch.int32, device=self.device)
        num_tokens = torch.tensor(counts, dtype=torch.int32, device=self.device)

        def sum_blocks(page_table: Tensor | None) -> None:
            torch.ops.topgather.moba_cache_append.default(
                key, value, self.key_pages, self.value_pages, self.centroids, num_before, page_table, num_tokens, size
            )

        return sum_blocks

    def reset(self) -> None:
        """Forget every token. Memory stays, and stays where it is, but for that of a cache that was interrupted."""
        with ordinary_tensors():
            if self._unfinished is not None:
                self._allocate(self.batch_size if self.page_table is None else self.key_pages.size(0))
            rearrangement = self._rearranged([(sequence, 0) for sequence in range(self.batch_size)])
            self._unfinished = "reset"
            rearrangement.commit()
            self.seq_lens.zero_()
            if self._raw_keys is not None:
                self._raw_keys.zero_()
                self._num_raw_keys = [self._raw_keys.size(2)] * self.batch_size
        self._lengths = [0] * self.batch_size
        self._is_exact = self._is_bound = True
        self.last_query_len, self.last_num_tokens = 0, None
        self._unfinished = None

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Let sequence ``i`` go on from what sequence ``indices[i]`` holds, as beam search does.

        Args:
            indices: numbers of sequences, ints or an integer tensor. They may repeat and leave sequences out; the
                cache then has as many sequences as there are numbers. As long as that number stays, memory stays
                where it is.

        Raises:
            TypeError: not ints.
            IndexError: a sequence that does not exist.
            ValueError: not one-dimensional; for pages, not enough of them. The cache is then what it was.
        """
        self.check_whole()
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        if not isinstance(numbers, Sequence) or isinstance(numbers, (str, bytes)):
            raise TypeError(f"indices must be ints or a tensor, got {type(indices).__name__}")
        numbers = list(numbers)
        for number in numbers:
            if isinstance(number, list):
                raise ValueError(f"indices must have one dimension, got {indices!r}")
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"indices must be ints, got {number!r}")
            if not 0 <= number < self.batch_size:
                raise IndexError(f"indices must be between 0 and {self.batch_size - 1}, got {number}")
        before = self.lengths
        lengths = [before[number] for number in numbers]
        stays = len(numbers) == self.batch_size
        with ordinary_tensors():
            rearrangement = self._rearranged(list(zip(numbers, lengths, strict=True)))
            chosen = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            seq_lens = self.seq_lens.index_select(0, chosen)
            raw_keys = None if self._raw_keys is None else self._raw_keys.index_select(0, chosen)
            self._unfinished = "reorder"
            rearrangement.write_rows()
            rearrangement.commit()
            self.seq_lens = self.seq_lens.copy_(seq_lens) if stays else seq_lens
            if self._raw_keys is not None and raw_keys is not None:
                self._raw_keys = self._raw_keys.copy_(raw_keys) if stays else raw_keys
                self._num_raw_keys = [self._num_raw_keys[number] for number in numbers]
        self.batch_size, self._lengths = len(numbers), lengths
        self.last_query_len, self.last_num_tokens = 0, None
        self._unfinished = None

    # --- copies -------------------------------------------------------------------------------------------------------

    def copy(self: _Cache) -> _Cache:
        """A cache of its own with the same content; ``copy.copy`` and ``copy.deepcopy`` give the same."""
        return self._made_by(torch.Tensor.clone, self.device)

    def __copy__(self: _Cache) -> _Cache:
        return self.copy()

    def __deepcopy__(self: _Cache, memo: dict[int, Any]) -> _Cache:
        memo[id(self)] = other = self.copy()
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # What is unpickled may have gone elsewhere, by the map_location of torch.load.
        self.device = self.key_pages.device

    def to(self: _Cache, device: torch.device | str) -> _Cache:
        """The same content on another device; the cache itself where it is there already.

        Args:
            device: where to.

        Raises:
            TypeError: a float64 cache to a CUDA device.
        """
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        check_device_dtype(self.dtype, target)
        return self._made_by(lambda tensor: tensor.to(target), target)

    def _made_by(self: _Cache, make: Callable[[Tensor], Tensor], device: torch.device) -> _Cache:
        other = object.__new__(type(self))
        with ordinary_tensors():
            for name, held in vars(self).items():
                if name in ("key_pages", "value_pages"):
                    made: Any = aligned_rows(held.shape, self.dtype, device).copy_(held)
                elif isinstance(held, Tensor):
                    made = make(held)
                else:
                    made = copy.deepcopy(held) if isinstance(held, list) else held
                setattr(other, name, made)
        other.device = device
        if self._was_captured:  # the graph goes on with this cache, not with the copy
            other._was_captured = other._is_exact = other._is_bound = False
        return other


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def aligned_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[num_pages, num_heads, num_rows, dim]``, not filled in; every row starts at a multiple of ``ROW_BYTES``."""
    *leading, dim = shape
    per_row = ROW_BYTES // dtype.itemsize
    padded = -(-dim // per_row) * per_row
    return torch.empty((*leading, padded), dtype=dtype, device=device)[..., :dim]


def _rows_from(tensor: Tensor, first: Tensor, count: int) -> Tensor:
    """Of ``tensor [B, H, N, D]`` rows ``first[b]`` to before ``first[b] + count`` of every batch entry."""
    rows = first.long()[:, None] + torch.arange(count, device=tensor.device)
    return tensor.gather(2, rows[:, None, :, None].expand(-1, tensor.size(1), -1, tensor.size(3)))

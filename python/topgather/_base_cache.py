"""What every cache of keys and values can do; :mod:`topgather.cache` has the two that users make.

Lengths are on the device, where kernels read them, and mirrored on the host, where space is given out. What happens on
the device alone (token counts in a CUDA tensor, a replayed CUDA graph) leaves the mirror behind; it is then read from
the device when it is needed next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .ops import _checks as checks
from .ops import _decode_ops  # noqa: F401  registers the ops
from .ops._library import sum_dtype
from .ops.key_conv import key_conv

ROW_BYTES = 16  # rows start on such boundaries, so that CUDA kernels read them in place

_Cache = TypeVar("_Cache", bound="BaseCache")


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
        self.block_size = block_size
        self.max_seq_len = max_seq_len
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device
        self.key_pages = self._new_rows(num_pages, page_size, self.head_dim)
        self.value_pages = self._new_rows(num_pages, page_size, self.value_dim)
        self.centroids = torch.empty(
            (num_pages, num_kv_heads, -(-page_size // block_size), head_dim), dtype=sum_dtype(dtype), device=self.device
        )
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        # The mirror: exact, or at least the length where it is not.
        self._lengths = [0] * batch_size
        self._is_exact = True
        self._was_captured = False
        # What the last append brought: how many tokens, and per sequence where they were not all.
        self.last_query_len = 0
        self.last_num_tokens: Tensor | None = None
        self.conv_weight = conv_weight
        self._raw_keys: Tensor | None = None
        self._num_raw_keys: list[int] = []
        if conv_weight is not None:
            self._check_conv_weight(conv_weight)
            self._start_raw_keys()

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; waits for the device where only it knows them."""
        if not self._is_exact or self._was_captured:
            self._lengths = self.seq_lens.tolist()
            self._is_exact = True
        return list(self._lengths)

    @property
    def lengths_on_host(self) -> list[int] | None:
        """Tokens of each sequence where the host knows them without asking the device, else None."""
        return self._lengths if self._is_exact and not self._was_captured else None

    def __repr__(self) -> str:
        known = self.lengths_on_host
        return (
            f"{type(self).__name__}({self.batch_size}, {self.num_kv_heads}, {self.head_dim}, "
            f"block_size={self.block_size}, max_seq_len={self.max_seq_len}, value_dim={self.value_dim}, "
            f"dtype={self.dtype}, device='{self.device}', lengths={'on the device' if known is None else known})"
        )

    # --- appending --------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, num_tokens: Sequence[int] | Tensor | None = None) -> None:
        """Add new tokens behind those that are there, and bring the centroids up to date.

        Args:
            key: ``[B, Hkv, M, D]`` in the cache's dtype and on its device, contiguous in its last dimension. With a
                ``conv_weight`` these are the keys before the convolution.
            value: ``[B, Hkv, M, Dv]``.
            num_tokens: how many of the ``M`` tokens each sequence has, ints or an integer tensor ``[B]``; the others,
                at the end, are ignored. None for all. A tensor on a CUDA device is not waited for.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, stride or device; a tensor that requires grad where gradients are recorded; not
                enough space, which is checked before anything is written. On CUDA, where only the device knows how
                many tokens there are, a token without a place is dropped instead.
        """
        self._check_new(key, value)
        counts, count_tensor = self.token_counts(num_tokens, key.size(2))
        self._make_room(counts if counts is not None else [key.size(2)] * self.batch_size, is_capturing(self.device))
        if self.conv_weight is not None:
            key = self._convolve(key, counts, count_tensor)
        torch.ops.topgather.moba_cache_append.default(
            key, value, self.key_pages, self.value_pages, self.centroids,
            self.seq_lens, self.page_table, count_tensor, self.block_size,
        )  # fmt: skip
        self._advance(key.size(2), counts, count_tensor)

    def _advance(self, query_len: int, counts: list[int] | None, count_tensor: Tensor | None) -> None:
        if count_tensor is None:
            self.seq_lens.add_(query_len)
        else:
            self.seq_lens.add_(count_tensor)
        self.last_query_len, self.last_num_tokens = query_len, count_tensor
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
            if num_tokens.device.type != "cpu":
                if num_tokens.device != self.device:
                    raise ValueError(
                        f"num_tokens must be on the CPU or the cache's device, {self.device}, got {num_tokens.device}"
                    )
                return None, num_tokens.to(torch.int32)
            num_tokens = num_tokens.tolist()
        if not isinstance(num_tokens, Sequence) or isinstance(num_tokens, str):
            raise TypeError(f"num_tokens must be ints, a tensor or None, got {type(num_tokens).__name__}")
        counts = list(num_tokens)
        if len(counts) != self.batch_size:
            raise ValueError(f"num_tokens must have one number a sequence, {self.batch_size}, got {len(counts)}")
        for count in counts:
            checks.check_count("num_tokens", count, least=0)
            if count > query_len:
                raise ValueError(f"num_tokens must be at most the number of new tokens, {query_len}, got {count}")
        return counts, torch.tensor(counts, dtype=torch.int32, device=self.device)

    def _check_new(self, key: Tensor, value: Tensor) -> None:
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
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} must not require grad: a cache records no gradients; use torch.no_grad()")

    # --- space ------------------------------------------------------------------------------------------------------

    def _make_room(self, counts: list[int], capturing: bool) -> None:
        """See to it that every sequence has place for so many more tokens, or raise."""
        if capturing or self._was_captured:
            if capturing:
                return  # reserve() has seen to it, and the device drops what has no place
            self.lengths  # noqa: B018  brings the mirror up to date
        if self._lacks_room(counts) and not self._is_exact:
            self.lengths  # noqa: B018
        for sequence, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if length + count > self.max_seq_len:
                raise ValueError(
                    f"key has {count} new tokens for sequence {sequence}, which holds {length}: that is more than "
                    f"max_seq_len, {self.max_seq_len}"
                )
        self._take_pages([length + count for length, count in zip(self._lengths, counts, strict=True)])

    def _lacks_room(self, counts: list[int]) -> bool:
        return any(length + count > self.max_seq_len for length, count in zip(self._lengths, counts, strict=True))

    def _take_pages(self, lengths: list[int]) -> None:
        """Pages for sequences of these lengths; nothing to do where each has its own memory."""

    def _new_rows(self, num_pages: int, rows: int, dim: int) -> Tensor:
        per_row = ROW_BYTES // self.dtype.itemsize
        padded = -(-dim // per_row) * per_row
        shape = (num_pages, self.num_kv_heads, rows, padded)
        return torch.empty(shape, dtype=self.dtype, device=self.device)[..., :dim]

    # --- the convolution's state --------------------------------------------------------------------------------------

    def _check_conv_weight(self, weight: Tensor) -> None:
        checks.check_tensor("conv_weight", weight)
        if weight.ndim != 3 or tuple(weight.shape[:2]) != (self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"conv_weight must have shape [{self.num_kv_heads}, {self.head_dim}, width], got {tuple(weight.shape)}"
            )

    @property
    def _state_len(self) -> int:
        assert self.conv_weight is not None
        return self.conv_weight.size(2) - 1

    def _start_raw_keys(self) -> None:
        """The last raw keys of every sequence, newest last: zeros before its start, which is what they count as."""
        num_kept = self.block_size + self._state_len
        shape = (self.batch_size, self.num_kv_heads, num_kept, self.head_dim)
        self._raw_keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._num_raw_keys = [num_kept] * self.batch_size

    def _convolve(self, key: Tensor, counts: list[int] | None, count_tensor: Tensor | None) -> Tensor:
        assert self._raw_keys is not None and self.conv_weight is not None
        num_kept = self._raw_keys.size(2)
        state = self._raw_keys[:, :, num_kept - self._state_len :]
        with torch.no_grad():
            convolved, _ = key_conv(key, self.conv_weight, state=state)
        joined = torch.cat([self._raw_keys, key], dim=2)
        if count_tensor is None:
            self._raw_keys.copy_(joined[:, :, key.size(2) :])
        else:
            self._raw_keys.copy_(_rows_from(joined, count_tensor.clamp(0, key.size(2)), num_kept))
        # Where only the device knows the counts, no more are known to be there than before.
        least = [0] * self.batch_size if counts is None else counts
        self._num_raw_keys = [min(num_kept, old + new) for old, new in zip(self._num_raw_keys, least, strict=True)]
        return convolved

    def _truncate_raw_keys(self, before: list[int], after: list[int]) -> None:
        assert self._raw_keys is not None
        num_kept = self._raw_keys.size(2)
        dropped = [old - new for old, new in zip(before, after, strict=True)]
        for sequence, (num_dropped, known) in enumerate(zip(dropped, self._num_raw_keys, strict=True)):
            if after[sequence] > 0 and known - num_dropped < self._state_len and num_dropped > 0:
                raise ValueError(
                    f"lengths cut {num_dropped} tokens off sequence {sequence}; with a conv_weight a cache remembers "
                    f"enough to cut off {known - self._state_len}, or everything"
                )
        shifts = torch.tensor(dropped, dtype=torch.int32, device=self.device)
        padded = torch.cat([torch.zeros_like(self._raw_keys), self._raw_keys], dim=2)
        self._raw_keys.copy_(_rows_from(padded, num_kept - shifts.clamp(max=num_kept), num_kept))
        for sequence, length in enumerate(after):
            self._num_raw_keys[sequence] -= dropped[sequence]
            if length == 0:
                self._raw_keys[sequence] = 0
                self._num_raw_keys[sequence] = num_kept

    # --- changes ------------------------------------------------------------------------------------------------------

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Cut sequences off at their ends.

        Args:
            lengths: tokens that each sequence keeps, or one number for all; at most those it has.

        Raises:
            TypeError: not ints.
            ValueError: a negative length or one longer than the sequence; with a ``conv_weight``, cutting off more
                tokens than the cache remembers the unconvolved keys of (a block, since the last truncation).
        """
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
        if not isinstance(wanted, Sequence) or isinstance(wanted, str):
            raise TypeError(f"lengths must be an int or ints, got {type(lengths).__name__}")
        after, before = list(wanted), self.lengths
        if len(after) != self.batch_size:
            raise ValueError(f"lengths must have one number a sequence, {self.batch_size}, got {len(after)}")
        for sequence, (old, new) in enumerate(zip(before, after, strict=True)):
            checks.check_count("lengths", new, least=0)
            if new > old:
                raise ValueError(f"lengths must be at most what a sequence holds, {old} for {sequence}, got {new}")
        if after == before:
            return
        if self._raw_keys is not None:
            self._truncate_raw_keys(before, after)
        self._drop_pages(after)
        self._lengths = after
        self.seq_lens.copy_(torch.tensor(after, dtype=torch.int32))
        self.last_query_len, self.last_num_tokens = 0, None
        self._restart_sums(before, after)

    def _restart_sums(self, before: list[int], after: list[int]) -> None:
        """Sum the blocks that were cut once more: their keys are appended where they stand."""
        size = self.block_size
        counts = [new % size if new < old else 0 for old, new in zip(before, after, strict=True)]
        if not any(counts):
            return
        starts = [new // size * size for new in after]
        most = max(counts)
        start = torch.tensor(starts, device=self.device)
        pages = torch.arange(self.batch_size, device=self.device)
        if self.page_table is not None:
            column = (start // self.page_size).clamp(max=self.page_table.size(1) - 1)
            # A sequence that is left alone may have no page here; what is read in its stead is not written.
            pages = self.page_table.gather(1, column[:, None])[:, 0].clamp(min=0).long()
            start = start % self.page_size
        rows = (start[:, None] + torch.arange(most, device=self.device)).clamp(max=self.page_size - 1)
        key = self.key_pages[pages[:, None], :, rows].transpose(1, 2)
        value = self.value_pages[pages[:, None], :, rows].transpose(1, 2)
        torch.ops.topgather.moba_cache_append.default(
            key, value, self.key_pages, self.value_pages, self.centroids,
            torch.tensor([start if count > 0 else 0 for start, count in zip(starts, counts, strict=True)],
                         dtype=torch.int32, device=self.device),
            self.page_table, torch.tensor(counts, dtype=torch.int32, device=self.device), size,
        )  # fmt: skip

    def _drop_pages(self, lengths: list[int]) -> None:
        """Give back the pages that sequences of these lengths do not need."""

    def reset(self) -> None:
        """Forget every token. Memory stays, and stays where it is."""
        self._drop_pages([0] * self.batch_size)
        self._lengths = [0] * self.batch_size
        self._is_exact = True
        self._was_captured = False
        self.seq_lens.zero_()
        self.last_query_len, self.last_num_tokens = 0, None
        if self._raw_keys is not None:
            self._raw_keys.zero_()
            self._num_raw_keys = [self._raw_keys.size(2)] * self.batch_size

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Let sequence ``i`` go on from what sequence ``indices[i]`` holds, as beam search does.

        Args:
            indices: numbers of sequences, ints or an integer tensor. They may repeat and leave sequences out; the
                cache then has as many sequences as there are numbers. As long as that number stays, memory stays
                where it is.

        Raises:
            TypeError: not ints.
            IndexError: a sequence that does not exist.
            ValueError: not one-dimensional; for pages, not enough of them.
        """
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            raise TypeError(f"indices must be ints or a tensor, got {type(indices).__name__}")
        numbers = list(numbers)
        for number in numbers:
            if isinstance(number, list):
                raise ValueError(f"indices must have one dimension, got {indices!r}")
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"indices must be ints, got {number!r}")
            if not 0 <= number < self.batch_size:
                raise IndexError(f"indices must be between 0 and {self.batch_size - 1}, got {number}")
        lengths = self.lengths
        self._reorder_pages(numbers)
        self._lengths = [lengths[number] for number in numbers]
        chosen = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        stays = len(numbers) == self.batch_size
        self.batch_size = len(numbers)
        self.seq_lens = _chosen(self.seq_lens, chosen, stays)
        self.last_query_len, self.last_num_tokens = 0, None
        if self._raw_keys is not None:
            self._raw_keys = _chosen(self._raw_keys, chosen, stays)
            self._num_raw_keys = [self._num_raw_keys[number] for number in numbers]

    def _reorder_pages(self, numbers: list[int]) -> None:
        raise NotImplementedError

    def copy(self: _Cache) -> _Cache:
        """A cache of its own with the same content."""
        return self._made_by(torch.Tensor.clone, self.device)

    def to(self: _Cache, device: torch.device | str) -> _Cache:
        """The same content on another device; the cache itself where it is there already.

        Args:
            device: where to.
        """
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        return self._made_by(lambda tensor: tensor.to(target), target)

    def _made_by(self: _Cache, make: Callable[[Tensor], Tensor], device: torch.device) -> _Cache:
        other = copy.copy(self)
        other.device = device
        other._lengths = list(self._lengths)
        other._num_raw_keys = list(self._num_raw_keys)
        for name in ("key_pages", "value_pages"):
            rows = getattr(self, name)
            setattr(other, name, other._new_rows(rows.size(0), rows.size(2), rows.size(3)).copy_(rows))
        for name in ("centroids", "seq_lens", "page_table", "last_num_tokens", "conv_weight", "_raw_keys"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(other, name, make(tensor))
        return other


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rows_from(tensor: Tensor, first: Tensor, count: int) -> Tensor:
    """Of ``tensor [B, H, N, D]`` rows ``first[b]`` to before ``first[b] + count`` of every batch entry."""
    rows = first.long()[:, None] + torch.arange(count, device=tensor.device)
    return tensor.gather(2, rows[:, None, :, None].expand(-1, tensor.size(1), -1, tensor.size(3)))


def _chosen(tensor: Tensor, chosen: Tensor, stays: bool) -> Tensor:
    """The chosen batch entries, in the same memory where their number ``stays``."""
    selected = tensor.index_select(0, chosen)
    return tensor.copy_(selected) if stays else selected

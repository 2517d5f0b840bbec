"""A cache in which every sequence has one piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import BaseCache, Commit, Rearrangement, aligned_rows, nothing_to_do
from ._checks import check_sizes


class MobaCache(BaseCache):
    """Keys and values of a batch of sequences, each in memory of its own (MoBA, arXiv 2502.13189, section 2.2).

    Args:
        batch_size: number of sequences, B.
        num_kv_heads: key and value heads, Hkv.
        head_dim: of keys, D.
        block_size: keys of a block, at least 1; more than ``max_seq_len`` is the same as ``max_seq_len``.
        max_seq_len: the most tokens of a sequence; memory for them is taken at once.
        value_dim: of values; ``head_dim`` if None.
        dtype: of keys and values: float32, bfloat16, float16 or (CPU only) float64. Centroids are float32 (float64
            for float64).
        device: where it lives; torch's default if None.
        conv_weight: ``[Hkv, D, W]`` with ``W`` from 2 to 8, in ``dtype`` or that of its sums: weights of
            :func:`topgather.key_conv`, which keys then go through as they come; the convolution's state is part of the
            cache.

    Attributes:
        seq_lens: int32 ``[B]`` on the device, tokens of each sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range, or more than memory holds
            (``torch.OutOfMemoryError`` on a GPU).
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
        check_sizes(batch_size, num_kv_heads, head_dim, block_size, max_seq_len, value_dim, dtype)
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

    def _pages_for(self, lengths: list[int]) -> tuple[Tensor | None, Commit]:
        return None, nothing_to_do

    def _rearranged(self, kept: list[tuple[int, int]]) -> Rearrangement:
        moved = [(old, new) for new, (old, _) in enumerate(kept) if old != new]
        if not moved and len(kept) == self.batch_size:
            return Rearrangement(None, nothing_to_do, nothing_to_do)
        longest = max((length for _, length in kept), default=0)
        num_blocks = -(-longest // self.block_size)
        used_rows = {"key_pages": longest, "value_pages": longest, "centroids": num_blocks}
        if len(kept) == self.batch_size:
            return Rearrangement(None, self._moved_in_place(moved, used_rows), nothing_to_do)

        chosen = torch.tensor([old for old, _ in kept], dtype=torch.int64, device=self.device)
        made = {}
        for name, used in used_rows.items():
            pages = getattr(self, name)
            sizes = (len(kept), *pages.shape[1:])
            if name == "centroids":
                made[name] = pages.new_empty(sizes)
            else:
                made[name] = aligned_rows(sizes, self.dtype, self.device)
            made[name][:, :, :used] = pages[:, :, :used].index_select(0, chosen)
        return Rearrangement(None, nothing_to_do, lambda: vars(self).update(made))

    def _moved_in_place(self, moved: list[tuple[int, int]], used_rows: dict[str, int]) -> Commit:
        source, target = torch.tensor(moved, dtype=torch.int64, device=self.device).unbind(1)
        rows = [getattr(self, name)[:, :, :used] for name, used in used_rows.items()]
        selected = [each.index_select(0, source) for each in rows]

        def commit() -> None:
            for each, chosen in zip(rows, selected, strict=True):
                each.index_copy_(0, target, chosen)

        return commit

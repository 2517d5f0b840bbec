"""Layers of a transformers ``Cache`` that hold a :class:`topgather.MobaCache`.

How a layer works, one forward of its attention module:

1. The module calls ``update`` with the new keys and values. ``update`` is not told which of them are padding, so it
   only keeps them at hand, and returns them with itself tied to the keys.
2. The attention function finds the layer at the keys and calls ``attend`` with the mask. The first tokens attend to
   each other as in training; later ones are appended and decoded with the cache. Padding never enters the cache:
   its sequences are ragged, and ``num_columns`` counts what transformers counts, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..cache import MobaCache, PagedMobaCache, moba_decode
from ._attend import LastOne, NewTokens, Settings, as_autocast

# Under this name a layer is tied to the keys it returns.
_LAYER = "_topgather_layer"

_new_of_last_mask = LastOne(lambda mask, num_new: NewTokens.of_mask(mask[:, mask.shape[1] - num_new :]))


class MobaLayer(CacheLayerMixin):
    """One attention layer's keys and values, in a cache that is searched block by block.

    Args:
        max_seq_len: tokens of a sequence to make room for at once. None, or too few in the contiguous cache: it doubles
            when it is full.
        paged: whether to keep them in a :class:`topgather.PagedMobaCache`, whose beams share pages. Needs
            ``max_seq_len``, and does not grow.
        num_pages: of a paged cache; enough for every sequence if None.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_seq_len: int | None = None, paged: bool = False, num_pages: int | None = None) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.paged = paged
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.moba_cache: MobaCache | PagedMobaCache | None = None
        self.num_columns = 0
        self.mask: Tensor | None = None  # [B, columns] bool, which columns are real; None, or past its end: all are
        self._pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    # ------------------------------------------------------------------------------- what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing yet: the block size is known to the attention function."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, ``[B, Hkv, M, D]``; the attention function will fetch them."""
        self._check_settled()
        key = key_states.view_as(key_states)  # a tensor of our own to write on
        setattr(key, _LAYER, self)
        self._pending = key_states, value_states
        self.is_initialized = True
        return key, value_states

    def get_seq_length(self) -> int:
        """Columns of the mask so far, padding included."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns of the next mask, and the first of them. Older versions give positions."""
        num_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.num_columns + num_new, 0

    def get_max_length(self) -> int:
        """No limit but that of a paged cache."""
        return self.max_seq_len if self.paged and self.max_seq_len is not None else -1

    get_max_cache_shape = get_max_length  # its name in older versions

    @property
    def batch_size(self) -> int:
        """Sequences, -1 before the first tokens."""
        return -1 if self.moba_cache is None else self.moba_cache.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns. A positive number, in older versions, is how many to keep."""
        self._check_settled()
        keep = self.num_columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= self.num_columns or self.moba_cache is None:
            return
        keep = max(keep, 0)
        lengths = [keep] * self.moba_cache.batch_size
        if self.mask is not None:
            beyond = max(keep - self.mask.shape[1], 0)
            self.mask = self.mask[:, :keep]
            lengths = [length + beyond for length in self.mask.sum(1).tolist()]
        self.moba_cache.truncate(lengths)
        self.num_columns = keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes what ``beam_idx[i]`` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of ``indices``, numbers or a mask."""
        self._select(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, one beside the other."""
        if self.moba_cache is not None:
            self._select(torch.arange(self.moba_cache.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """Not supported."""
        raise ValueError("a cache of MoBA layers cannot be offloaded to the CPU, got offloading=True")

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> MobaLayer:
        """A layer of its own: how a prompt's cache is used several times."""
        self._check_settled()
        other = MobaLayer(self.max_seq_len, self.paged, self.num_pages)
        memo[id(self)] = other
        other.moba_cache = None if self.moba_cache is None else self.moba_cache.copy()
        other.num_columns, other.mask = self.num_columns, self.mask
        other.is_initialized = self.is_initialized
        return other

    # --------------------------------------------------------------------------- what the attention function asks of it

    @staticmethod
    def of_keys(key: Tensor) -> MobaLayer | None:
        """The layer whose ``update`` returned ``key``."""
        return getattr(key, _LAYER, None)

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        settings: Settings,
        scale: float | None,
        attend_to_new: Callable[[], Tensor],
    ) -> Tensor:
        """Append the pending tokens and attend with ``query [B, Hq, M, D]``: ``[B, Hq, M, Dv]``.

        ``mask`` is bool ``[B, columns]`` or None, ``attend_to_new`` what the first tokens do among themselves.
        """
        assert self._pending is not None
        (key, value), self._pending = self._pending, None
        if self.num_columns == 0:
            out = attend_to_new()
            self.append(key, value, mask, settings)
            return out
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise ValueError(
                "query must not require gradients where the cache holds tokens already: a MoBA cache is for inference. "
                "Call the model under torch.no_grad(), or without the cache"
            )
        new = self.append(key, value, mask, settings)
        assert self.moba_cache is not None
        if new is None:
            return moba_decode(query, self.moba_cache, settings.top_k, scale)
        return new.scatter(moba_decode(new.gather(query), self.moba_cache, settings.top_k, scale))

    def append(self, key: Tensor, value: Tensor, mask: Tensor | None, settings: Settings) -> NewTokens | None:
        """Store new columns, ``[B, Hkv, M, D]``; of ``mask [B, columns]`` the last M count."""
        num_new = key.shape[2]
        key, value = as_autocast(key.detach(), value.detach())
        new = None
        if mask is not None:
            new = _new_of_last_mask(mask, num_new)
            self.mask = mask
        counts = None
        if new is not None:
            key, value, counts = new.gather(key), new.gather(value), new.counts
        self._make_room(key, value, max(counts) if counts else num_new, settings.block_size)
        assert self.moba_cache is not None
        self.moba_cache.append(key, value, num_tokens=counts)
        self.num_columns += num_new
        self.is_initialized = True
        return new

    @classmethod
    def taking_over(cls, layer: DynamicLayer, mask: Tensor | None, settings: Settings) -> MobaLayer:
        """A layer with what transformers' own holds; ``mask`` is that of the next forward, with columns to come."""
        taker = cls()
        if layer.get_seq_length() > 0:
            assert layer.keys is not None and layer.values is not None
            past = None if mask is None else mask[:, : layer.get_seq_length()]
            taker.append(layer.keys, layer.values, past, settings)
        return taker

    def _make_room(self, key: Tensor, value: Tensor, num_new: int, block_size: int) -> None:
        """See to a cache that takes ``num_new`` more tokens a sequence."""
        held = self.moba_cache
        if held is None:
            capacity = num_new if self.max_seq_len is None else self.max_seq_len
            self.moba_cache = self._make(key, value, max(capacity, 1), block_size)
            return
        if held.block_size != block_size:
            raise ValueError(f"block_size must stay what the cache was made with, {held.block_size}, got {block_size}")
        needed = max(held.lengths, default=0) + num_new
        if needed > held.max_seq_len and isinstance(held, MobaCache):
            longest = max(held.lengths, default=0)
            larger = self._make(key, value, max(needed, 2 * held.max_seq_len), block_size)
            larger.append(held.key[:, :, :longest], held.value[:, :, :longest], num_tokens=held.lengths)
            self.moba_cache = larger

    def _make(self, key: Tensor, value: Tensor, capacity: int, block_size: int) -> MobaCache | PagedMobaCache:
        options: dict[str, Any] = {
            "block_size": block_size,
            "max_seq_len": -(-capacity // block_size) * block_size,
            "value_dim": value.shape[3],
            "dtype": key.dtype,
            "device": key.device,
        }
        batch_size, num_kv_heads, _, head_dim = key.shape
        if self.paged:
            return PagedMobaCache(batch_size, num_kv_heads, head_dim, num_pages=self.num_pages, **options)
        return MobaCache(batch_size, num_kv_heads, head_dim, **options)

    def _select(self, indices: Tensor) -> None:
        self._check_settled()
        if self.moba_cache is None:
            return
        self.moba_cache.reorder(indices)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, indices.to(self.mask.device))

    def _check_settled(self) -> None:
        if self._pending is not None:
            raise RuntimeError(
                "the cache's last tokens were never attended to: a cache of MoBA layers works with a model whose "
                'attn_implementation is "moba" alone'
            )

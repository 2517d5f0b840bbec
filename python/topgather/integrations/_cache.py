"""Layers of a transformers ``Cache`` that hold a :class:`topgather.MobaCache`.

A layer holds its tokens in one of two ways.

*Columns*: all keys and values that ``update`` was given, padding included, as transformers' own layers hold them. So it
starts, and so it is left to a module that does not attend by blocks: ``update`` returns all of them.

*Blocks*: the keys and values that the attention function saw, in a :class:`topgather.MobaCache` without padding. Its
sequences are ragged, and ``num_columns`` counts what transformers counts. ``update`` then returns the new tokens alone.

From columns to blocks a layer goes when a module that attends by blocks is about to ask (``expect``): the attention
function gets all keys, attends, and puts them in. What it sees may not be what ``update`` was given: where a model
caches a latent and makes keys of it (multi-head latent attention), blocks hold the keys, and the latents, which are
small, stay beside them. From blocks to columns it goes when a module asks that was not expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..cache import MobaCache, PagedMobaCache, moba_decode
from ..ops import BlockRouting
from ._arguments import Scores
from ._attend import NewTokens, Settings, as_autocast
from ._forward import note_part, remembered

_Fields = dict[str, Any]


# Whether ``crop`` is told how many columns to keep, so that 0 leaves none, as it was in older versions.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters

# Room that a cache is given at most for the end of a block, where blocks are longer than what there is to hold.
MAX_SPARE_TOKENS = 4096


class MobaLayer(DynamicLayer):
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

    @classmethod
    def of(cls, layer: DynamicLayer) -> MobaLayer:
        """A layer with the columns of transformers' own."""
        taker = cls()
        taker.keys, taker.values = layer.keys, layer.values
        taker.is_initialized = getattr(layer, "is_initialized", layer.keys is not None)  # new in transformers 4.57
        taker.num_columns = layer.get_seq_length()
        return taker

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.moba_cache: MobaCache | PagedMobaCache | None = None
        self.num_columns = 0
        self.mask: Tensor | None = None  # [B, columns] bool, which columns are real; None, or past its end: all are
        self.holds_packed = False  # whether the columns are several sequences side by side
        # What update was given, where that is not what the attention function saw, by forwards.
        self.raw: list[tuple[Tensor, Tensor]] | None = None
        self._is_expected = False
        self._updated: tuple[Tensor, Tensor] | None = None  # what update returned, until it is attended to

    # ------------------------------------------------------------------------------- what transformers asks of a layer

    def expect(self, is_expected: bool) -> None:
        """Say whether the next ``update`` is of a module that attends by blocks."""
        self._is_expected, self._updated = is_expected, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, ``[B, Hkv, M, D]``: all columns, or the new ones where blocks hold the others."""
        expected, self._is_expected = self._is_expected, False
        if self.moba_cache is not None and expected:
            returned = key_states, value_states
            note_part(key_states)
        else:
            self.to_columns()
            returned = super().update(key_states, value_states)
        self.num_columns += key_states.shape[2]
        self.is_initialized = True
        self._updated = returned if expected else None
        return returned

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
        if self.moba_cache is not None:
            return self.moba_cache.batch_size
        return -1 if self.keys is None else self.keys.shape[0]

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the last ``-tokens_to_remove`` columns. A positive number, in older versions, is how many to keep."""
        number = int(tokens_to_remove)  # assisted generation of transformers 5.16 gives a tensor
        keep = number if number > 0 or (number == 0 and _CROPS_TO_LENGTH) else max(self.num_columns + number, 0)
        if keep >= self.num_columns:
            return
        if self.moba_cache is not None:
            lengths = [keep] * self.moba_cache.batch_size
            if self.mask is not None:
                beyond = max(keep - self.mask.shape[1], 0)
                lengths = [length + beyond for length in self.mask[:, :keep].sum(1).tolist()]
            self.moba_cache.truncate(lengths)
        if self.mask is not None:
            self.mask = self.mask[:, :keep]
        self._change_columns(lambda columns: columns[:, :, :keep])
        self.num_columns = keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes what ``beam_idx[i]`` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of ``indices``, numbers or a mask."""
        self._select(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, one beside the other."""
        if self.batch_size >= 0:
            self._select(torch.arange(self.batch_size, device="cpu").repeat_interleave(repeats))

    def offload(self) -> None:
        """Not supported."""
        raise ValueError("a cache of MoBA layers cannot be offloaded to the CPU, got offloading=True")

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> MobaLayer:
        """A layer of its own: how a prompt's cache is used several times."""
        other = type(self)(self.max_seq_len, self.paged, self.num_pages)
        memo[id(self)] = other
        # Columns and masks are replaced and never written to.
        other.__dict__.update(self._fields(), _is_expected=False, _updated=None)
        other.moba_cache = None if self.moba_cache is None else self.moba_cache.copy()
        return other

    def __copy__(self) -> MobaLayer:
        """The same: a layer of transformers replaces its tensors, so that its copies are their own too."""
        return self.__deepcopy__({})

    # ----------------------------------------------------------------------------------- forwards that are taken back

    def snapshot(self) -> _Fields:
        """What :meth:`restore` needs to take back the forwards from now on."""
        return {**self._fields(), "lengths": None if self.moba_cache is None else self.moba_cache.lengths}

    def restore(self, snapshot: _Fields) -> None:
        """Be what the layer was at ``snapshot``."""
        fields = dict(snapshot)
        lengths = fields.pop("lengths")
        self.__dict__.update(fields, _is_expected=False, _updated=None)
        if self.moba_cache is not None:
            self.moba_cache.truncate(lengths)

    def _fields(self) -> _Fields:
        return {**self.__dict__, "raw": None if self.raw is None else list(self.raw)}

    # --------------------------------------------------------------------------- what the attention function asks of it

    @property
    def is_pending(self) -> bool:
        """Whether the last tokens of ``update`` are still to be attended to."""
        return self._updated is not None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: Settings,
        scores: Scores,
        attend_to_keys: Callable[[], Tensor],
        is_packed: bool,
        routing: BlockRouting | None = None,
    ) -> Tensor:
        """Attend with ``query [B, Hq, M, D]`` to all tokens, and keep ``key``, ``value``: ``[B, Hq, M, Dv]``.

        ``mask`` is bool ``[B, columns]`` or None. ``attend_to_keys`` attends to ``key`` and ``value`` alone, which
        are all tokens or, where blocks hold the others, the new ones. ``is_packed``: whether they are several sequences
        in a row. ``routing``: a choice of blocks for the new tokens, ``[B, H, M, k]``, in place of one by ``settings``.
        """
        assert self._updated is not None
        if key.shape[2] != self._updated[0].shape[2]:
            raise ValueError(
                f"key must have the tokens that the cache returned, {self._updated[0].shape[2]}, got {key.shape[2]}"
            )
        if self.holds_packed or (is_packed and self.num_columns > query.shape[2]):
            raise ValueError(
                "several sequences in a row cannot be gone on with from a cache: give each a row of its own, padded, "
                "or call the model with use_cache=False"
            )
        if self.moba_cache is None:
            out = attend_to_keys()
            self._append(key, value, mask, settings)
            self.holds_packed = is_packed
            return out
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise ValueError(
                "query must not require gradients where the cache holds tokens already: a MoBA cache is for inference. "
                "Call the model under torch.no_grad(), or without the cache"
            )
        new = self._append(key, value, mask, settings)
        assert self.moba_cache is not None
        dtype, query = query.dtype, query.to(self.moba_cache.dtype)
        if new is not None:
            query = new.gather(query)
            routing = None if routing is None else replace(routing, block_indices=new.gather(routing.block_indices))
        options = {**settings.of_op, **scores.of_op}
        out = moba_decode(query, self.moba_cache, settings.top_k, routing=routing, **options).to(dtype)
        return out if new is None else new.scatter(out)

    def _append(self, key: Tensor, value: Tensor, mask: Tensor | None, settings: Settings) -> NewTokens | None:
        """Store the columns of ``key [B, Hkv, M, D]`` in blocks; of ``mask [B, columns]`` the last M count."""
        assert self._updated is not None
        updated, self._updated = self._updated, None
        num_new = key.shape[2]
        is_raw = _is_same(updated[0], key) and _is_same(updated[1], value)
        key, value = as_autocast(key.detach(), value.detach())
        if self.moba_cache is not None:  # made under autocast perhaps, or before it
            key, value = key.to(self.moba_cache.dtype), value.to(self.moba_cache.dtype)
        new = None if mask is None else remembered(_new_tokens, mask, num_new)
        counts = None
        if new is not None:
            key, value, counts = new.gather(key), new.gather(value), new.counts
        was_empty = self.moba_cache is None
        self._make_room(key, value, max(counts) if counts else num_new, settings.block_size)
        assert self.moba_cache is not None
        self.moba_cache.append(key, value, num_tokens=counts)
        if mask is not None:
            self.mask = mask
        if was_empty:
            self.raw = None if is_raw else []
            self.keys = self.values = None
        if self.raw is not None:
            self.raw.append((updated[0].detach(), updated[1].detach()))
        return new

    def _make_room(self, key: Tensor, value: Tensor, num_new: int, block_size: int) -> None:
        """See to a cache that takes ``num_new`` more tokens a sequence."""
        held = self.moba_cache
        if held is None:
            capacity = num_new if self.max_seq_len is None else self.max_seq_len
            self.moba_cache = self._make(key, value, max(capacity, 1), block_size)
            return
        if held.block_size != min(block_size, held.max_seq_len):
            raise ValueError(f"block_size must stay what the cache was made with, {held.block_size}, got {block_size}")
        needed = max(held.lengths, default=0) + num_new
        if needed > held.max_seq_len and isinstance(held, MobaCache):
            longest = max(held.lengths, default=0)
            larger = self._make(key, value, max(needed, 2 * held.max_seq_len), block_size)
            larger.append(held.key[:, :, :longest], held.value[:, :, :longest], num_tokens=held.lengths)
            self.moba_cache = larger

    def _make(self, key: Tensor, value: Tensor, capacity: int, block_size: int) -> MobaCache | PagedMobaCache:
        # Whole blocks, but for those that are far longer than what there is to hold.
        room = min(block_size, max(capacity, MAX_SPARE_TOKENS))
        options: dict[str, Any] = {
            "block_size": block_size,
            "max_seq_len": min(-(-capacity // room) * room, 2**31 - 1),
            "value_dim": value.shape[3],
            "dtype": key.dtype,
            "device": key.device,
        }
        batch_size, num_kv_heads, _, head_dim = key.shape
        if self.paged:
            return PagedMobaCache(batch_size, num_kv_heads, head_dim, num_pages=self.num_pages, **options)
        return MobaCache(batch_size, num_kv_heads, head_dim, **options)

    # ------------------------------------------------------------------------------------------------- columns, blocks

    def to_columns(self) -> None:
        """Hold what blocks hold as columns, zeros where there is padding."""
        if self.moba_cache is None:
            return
        if self.raw is not None:
            keys, values = zip(*self.raw, strict=True)
            self.keys, self.values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        else:
            self.keys, self.values = (self._columns_of(pages) for pages in self._rows())
        self.moba_cache, self.raw, self.mask = None, None, None

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks, ``[B, Hkv, longest sequence, D]``."""
        cache = self.moba_cache
        assert cache is not None
        longest = max(cache.lengths, default=0)
        if isinstance(cache, MobaCache):
            return cache.key[:, :, :longest], cache.value[:, :, :longest]
        pages = cache.page_table[:, : -(-longest // cache.page_size)].long().clamp(min=0)
        key, value = (
            held[pages].transpose(1, 2).flatten(2, 3)[:, :, :longest] for held in (cache.key_pages, cache.value_pages)
        )
        return key, value

    def _columns_of(self, rows: Tensor) -> Tensor:
        """``rows [B, Hkv, longest, D]`` put in the columns of the mask."""
        if self.mask is None:
            return rows.clone()
        beyond = self.num_columns - self.mask.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, beyond), value=True)
        place = (mask.long().cumsum(1) - 1).clamp(min=0, max=max(rows.shape[2] - 1, 0))[:, None, :, None]
        if rows.shape[2] == 0:
            return rows.new_zeros(*rows.shape[:2], self.num_columns, rows.shape[3])
        columns = rows.gather(2, place.expand(-1, rows.shape[1], -1, rows.shape[3]))
        return columns.where(mask[:, None, :, None], columns.new_zeros(()))

    def _change_columns(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held as columns."""
        if self.keys is not None and self.values is not None and self.keys.ndim == 4:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.raw is not None:
            keys, values = zip(*self.raw, strict=True)
            self.raw = [(change(torch.cat(keys, dim=2)), change(torch.cat(values, dim=2)))]

    def _select(self, indices: Tensor) -> None:
        if self.moba_cache is not None:
            self.moba_cache.reorder(indices)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, indices.to(self.mask.device))
        self._change_columns(lambda columns: columns.index_select(0, indices.to(columns.device)))


class IndexedMobaLayer(MobaLayer):
    """The same for a layer that chooses its blocks by an indexer, whose keys ``[B, 1, columns, D]`` stand beside it."""

    @classmethod
    def of(cls, layer: DynamicLayer) -> MobaLayer:
        """A layer with the columns of transformers' own, and its index keys."""
        taker = super().of(layer)
        taker.__dict__["idx_keys"] = vars(layer)["idx_keys"]
        return taker

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.idx_keys: Tensor | None = None

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Take the index keys of the new tokens, ``[B, 1, M, D]``; returns those of all columns."""
        self.idx_keys = idx_k if self.idx_keys is None else torch.cat([self.idx_keys, idx_k], dim=2)
        return self.idx_keys

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the last columns, as :meth:`MobaLayer.crop` does."""
        super().crop(tokens_to_remove)
        if self.idx_keys is not None:
            self.idx_keys = self.idx_keys[:, :, : self.num_columns]

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self.idx_keys is not None:
            self.idx_keys = self.idx_keys.index_select(0, indices.to(self.idx_keys.device))


def _new_tokens(mask: Tensor, num_new: int) -> NewTokens | None:
    return NewTokens.of_mask(mask[:, mask.shape[1] - num_new :])


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.shape == right.shape and left.data_ptr() == right.data_ptr())

"""Bags as ``torch.nn.functional.embedding_bag`` takes them, made into those that the op of the lookup takes.

Everything here is made of torch's own ops and of shapes: it differentiates, compiles into the graph around it, and
waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import checks
from .._common.library import sum_dtype
from ._memory_ops import check_indices, check_offsets, check_table, tokens_of

MODES = ("sum", "mean")


def check_mode(mode: Any) -> None:
    """Raise unless ``mode`` is one that bags can be reduced by."""
    if not isinstance(mode, str):
        raise TypeError(f"mode must be a str, got {mode!r} of type {type(mode).__name__}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def row_of_padding(padding_idx: Any, num_rows: int) -> int | None:
    """``padding_idx``, checked, counted from the first row."""
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r} of type {type(padding_idx).__name__}")
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(f"padding_idx must be between {-num_rows} and {num_rows - 1}, got {padding_idx}")
    return padding_idx % num_rows


def make_bags(
    values: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``indices``, ``weights`` and ``offsets`` of the op, of what :func:`topgather.memory_lookup` takes, checked.

    Entries that name the padding are moved behind the last bag, where they are nobody's: no kernel looks at them, they
    pass on no gradient, and what stands in their row does not matter.
    """
    check_mode(mode)
    checks.check_flag("include_last_offset", include_last_offset)
    check_table("values", values)
    if offsets is not None:
        check_offsets(offsets, values, least=0)
        offsets = offsets.to(torch.int64)
        if not include_last_offset:
            offsets = torch.cat((offsets, offsets.new_full((1,), indices.numel())))
    elif include_last_offset:
        raise ValueError("include_last_offset must be False where no offsets are given, got True")
    check_indices(indices, values, offsets=offsets)
    padding_row = row_of_padding(padding_idx, values.size(0))
    if weights is not None:
        if mode != "sum":
            raise ValueError(f"mode must be 'sum' where weights are given, got {mode!r}")
        checks.check_floating("weights", weights)
        checks.check_same_device("weights", weights, "values", values)
        if weights.shape != indices.shape:
            raise ValueError(
                f"weights must have the shape of indices, {tuple(indices.shape)}, got {tuple(weights.shape)}"
            )
    if padding_row is not None:
        indices, weights, offsets = _without_padding(indices, weights, offsets, padding_row)
    if weights is None:
        weights = values.new_ones(indices.shape, dtype=sum_dtype(values.dtype))
        if mode == "mean":
            weights = weights / _sizes_of_bags(indices, offsets)
    return indices, weights, offsets


def _without_padding(
    indices: Tensor, weights: Tensor | None, offsets: Tensor | None, padding_row: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ragged bags, the entries that name the padding behind the last of them."""
    if offsets is None:
        num_bags, bag_size = indices.shape
        offsets = torch.arange(num_bags + 1, device=indices.device) * bag_size
        indices = indices.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
    num_entries = indices.size(0)
    is_kept = indices != padding_row
    # How many entries are kept before each one, and in all.
    num_kept = torch.nn.functional.pad(is_kept.to(torch.int64).cumsum(0), (1, 0))
    entries = torch.arange(num_entries, device=indices.device)
    place = torch.where(is_kept, num_kept[:-1], num_kept[-1:] + entries - num_kept[:-1])
    # Offsets that no bag can have stay such.
    is_outside = (offsets < 0) | (offsets > num_entries)
    is_wrong = is_outside | torch.nn.functional.pad(~is_outside[:-1] & (offsets[1:] < offsets[:-1]), (1, 0))
    offsets = torch.where(is_wrong, -1, num_kept.gather(0, offsets.clamp(0, num_entries)))
    indices = torch.zeros_like(indices).scatter(0, place, indices)
    if weights is not None:
        weights = torch.zeros_like(weights).scatter(0, place, weights)
    return indices, weights, offsets


def _sizes_of_bags(indices: Tensor, offsets: Tensor | None) -> Tensor | int:
    """For every entry the number of entries of its bag."""
    if offsets is None:
        return indices.size(1)
    if offsets.size(0) == 1:
        return 1
    tokens = tokens_of(indices, offsets)
    assert tokens is not None
    sizes = (offsets[1:] - offsets[:-1]).clamp(min=1)
    return sizes.gather(0, tokens.clamp(min=0).to(torch.int64))

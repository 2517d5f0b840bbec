"""Tensors as native entry points take them, and as autocast makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import sum_dtype


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous."""
    return tensor if tensor.size(-1) <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def saved_rows(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors of a backward; hooks of saved tensors may have laid them out anew, which rows do not show."""
    return tuple(None if tensor is None else contiguous_rows(tensor) for tensor in ctx.saved_tensors)


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor or a contiguous copy."""
    return tensor.contiguous()


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor where ``like`` is; two thirds of the time of ``like.new_empty``."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like_rows(like: Tensor, dim: int) -> Tensor:
    """An empty tensor of the shape of ``like`` but for its last dimension, laid out as ``like`` is.

    So that the transposed view of a ``[B, N, H, D]`` projection gets an output that transposes back without a copy.
    """
    strides = like.stride()
    if len(strides) == 4:
        batch, heads, tokens, _ = like.shape
        if strides[1] < strides[2]:
            return empty(like, (batch, tokens, heads, dim), like.dtype).transpose(1, 2)
        return empty(like, (batch, heads, tokens, dim), like.dtype)
    return empty(like, (*like.shape[:-1], dim), like.dtype)


def memory_of(*written: Tensor | None) -> set[int]:
    """What memory these have: where their storages begin."""
    return {tensor.untyped_storage().data_ptr() for tensor in written if tensor is not None}


def apart(tensor: Tensor, memory: set[int]) -> Tensor:
    """The tensor, or a copy of one that has a part of ``memory``."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in memory else tensor


def boundaries(tensor: Tensor) -> Tensor:
    """``cu_seqlens`` or indices as int64, contiguous."""
    return tensor.to(torch.int64).contiguous()


def sums_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype of sums of ``like``, contiguous."""
    return tensor.to(sum_dtype(like.dtype)).contiguous()


def sums_like_query(tensor: Tensor, query: Tensor) -> Tensor:
    """:func:`sums_like` for what stands beside queries."""
    return sums_like(tensor, query)


def is_autocast(tensor: Tensor, device_type: str) -> bool:
    """Whether autocast casts such a tensor: floating-point, not float64, nor of 8 bits or fewer, on its device."""
    is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.dtype.itemsize > 1
    return tensor.device.type == device_type and is_cast


def autocast(tensor: Tensor, device_type: str) -> Tensor:
    """The tensor as matrix products get it under autocast."""
    return tensor.to(torch.get_autocast_dtype(device_type)) if is_autocast(tensor, device_type) else tensor


def autocast_to_sums(tensor: Tensor, like: Tensor, device_type: str) -> Tensor:
    """The tensor in the dtype of sums of ``like`` where its own is another than that of ``like``."""
    is_cast = tensor.dtype != like.dtype and is_autocast(tensor, device_type)
    return tensor.to(sum_dtype(like.dtype)) if is_cast else tensor

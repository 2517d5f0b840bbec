"""A memory layer's table in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._common import checks
from ..ops._bags import check_mode, row_of_padding
from ..ops._memory_ops import MAX_KEYS
from ..ops.quantized import WIDE_DTYPES, check_quantized_dtype, groups_of, quantized_lookup
from ._tables import is_of_its_kind


class QuantizedMemoryPool(nn.Module):
    """A :class:`MemoryPool` in 8 bits, which is read and not trained: a fourth of the bytes of float32.

    Gradients go on to weights, and so to keys and queries. :meth:`MemoryPool.quantize` makes one of a trained table;
    one that is made here holds nothing until a ``state_dict`` is loaded.

    Args:
        num_keys: keys of a half; the table has ``num_keys ** 2`` rows. From 1 to 46340.
        value_dim: channels of a row.
        quantized_dtype: of the table, ``torch.int8`` or ``torch.float8_e4m3fn``.
        group_size: channels that share a scale; a row if None.
        device: where the table is created; torch's default if None.
        dtype: of results, float32, bfloat16 or float16; torch's default if None, float32 for float64.
        mode: as in :class:`MemoryPool`.
        padding_idx: as in :class:`MemoryPool`.
        include_last_offset: as in :class:`MemoryPool`.

    Attributes:
        values: ``[num_keys ** 2, value_dim]``, a buffer: zeros at first.
        dtype: of results.
        scales: ``[num_keys ** 2, groups]`` float32, a buffer: ones at first. Both keep their dtypes where a module is
            converted to another, by ``module.to(torch.bfloat16)`` for one, and then change that of results alone.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size or dtype out of range, a ``group_size`` that does not divide ``value_dim``.
    """

    values: Tensor
    scales: Tensor

    def __init__(
        self,
        num_keys: int,
        value_dim: int,
        quantized_dtype: torch.dtype = torch.int8,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> None:
        super().__init__()
        checks.check_count("num_keys", num_keys)
        if num_keys > MAX_KEYS:
            raise ValueError(f"num_keys must be at most {MAX_KEYS}, got {num_keys}")
        checks.check_count("value_dim", value_dim)
        check_quantized_dtype(quantized_dtype)
        num_groups = groups_of(value_dim, group_size)
        check_mode(mode)
        checks.check_flag("include_last_offset", include_last_offset)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.num_keys = num_keys
        self.value_dim = value_dim
        self.group_size = group_size
        self.mode = mode
        self.padding_idx = row_of_padding(padding_idx, num_keys**2)
        self.include_last_offset = include_last_offset
        num_rows = num_keys**2
        values = torch.zeros(num_rows, value_dim, dtype=torch.int8, device=device).view(quantized_dtype)
        self.register_buffer("values", values)
        self.register_buffer("scales", torch.ones(num_rows, num_groups, dtype=torch.float32, device=device))
        dtype = torch.float32 if dtype == torch.float64 else dtype
        if dtype not in WIDE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, WIDE_DTYPES))}, got {dtype}")
        self.dtype = dtype

    def reset_parameters(self) -> None:
        """Make all rows 0: numbers of 0, scales of 1."""
        self.values.view(torch.int8).zero_()
        self.scales.fill_(1.0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedMemoryPool:
        """As ``nn.Module``, for ``to`` and the like; to it, the table is of integers, which no dtype is wanted of."""
        dtype = self.values.dtype
        self.values, self.scales = self.values.view(torch.int8), self.scales.view(torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            self.values, self.scales = self.values.view(dtype), self.scales.view(torch.float32)
        converted = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self.dtype = converted if converted in WIDE_DTYPES else torch.float32
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        scales = state_dict.get(prefix + "scales")
        if isinstance(scales, Tensor) and scales.dtype != torch.float32:
            lists[-1].append(f"{prefix}scales must have dtype torch.float32, got {scales.dtype}")
        elif is_of_its_kind(self.values, state_dict, prefix + "values", lists[-1]):
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.num_keys**2

    @property
    def embedding_dim(self) -> int:
        """``value_dim``, under the name that it has in an ``nn.EmbeddingBag``."""
        return self.value_dim

    def forward(self, indices: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """Sums or means of rows, ``[T, value_dim]``: :func:`topgather.quantized_lookup`.

        Args:
            indices: ``[T, K]``, or ``[E]`` with ``offsets``.
            weights: of the shape of ``indices``; ones if None.
            offsets: ``[T]``, where each bag begins, and with ``include_last_offset`` the end of the last, ``[T + 1]``.
        """
        includes_last = self.include_last_offset and offsets is not None
        if isinstance(weights, Tensor) and weights.dtype == torch.float64:  # of a layer in float64; sums are in float32
            weights = weights.to(torch.float32)
        bags = (indices, weights, offsets, self.mode, self.padding_idx, includes_last)
        return quantized_lookup(self.values, self.scales, *bags, dtype=self.dtype)

    def extra_repr(self) -> str:
        """The table's options, as ``print`` shows them."""
        text = f"num_keys={self.num_keys}, value_dim={self.value_dim}, quantized_dtype={self.values.dtype}"
        text += "" if self.group_size is None else f", group_size={self.group_size}"
        text += "" if self.mode == "sum" else f", mode={self.mode!r}"
        text += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return text + (", include_last_offset=True" if self.include_last_offset else "")

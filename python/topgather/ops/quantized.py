"""Tables of 8 bits: rows of signed integers or e4m3 with scales, and the lookup that reads them as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import checks
from . import _quantized_ops
from ._bags import make_bags
from ._quantized_ops import DTYPES, WIDE_DTYPES, check_rows

# The largest number of each: amplitudes are scaled to it.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Of rows that are quantised at a time, in float32.
CHUNK_BYTES = 64 * 2**20


def check_quantized_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is one of 8 bits that rows may have."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r} of type {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def groups_of(row_dim: int, group_size: int | None) -> int:
    """Scales of a row of so many columns.

    Raises:
        TypeError: ``group_size`` is no int.
        ValueError: it does not divide the columns.
    """
    if group_size is None or row_dim == 0:
        return 1
    checks.check_count("group_size", group_size)
    if row_dim % group_size != 0:
        raise ValueError(f"group_size must divide the {row_dim} columns of a row, got {group_size}")
    return row_dim // group_size


@torch.no_grad()
def quantize_rows(
    values: Tensor, dtype: torch.dtype = torch.int8, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """A table in 8 bits, for inference and for tables that stay as they are: a scale for every row, or for every
    ``group_size`` columns of it, and numbers rounded to the nearest (symmetric absmax quantisation, as LLM.int8 has it
    for rows, arXiv 2208.07339, section 2.1).

    A scale is the largest magnitude of its columns by 127, or by 448 for e4m3 (arXiv 2209.05433). Then

        int8    ``|row - scale * number| <= 0.501 * scale``
        e4m3    ``|row - scale * number| <= max(2 ** -4 * |row|, 2 ** -10 * scale)``, to within float32

    Args:
        values: ``[rows, W]``, floating-point, on any device.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        group_size: columns that share a scale, a divisor of W; a whole row if None. CUDA reads 16 columns at a time
            where it is a multiple of 16.

    Returns:
        ``values [rows, W]`` of ``dtype`` and ``scales [rows, W / group_size]``, float32, without gradients, for
        :func:`quantized_lookup`. A group of zeros has a scale of 1, one with a number that is not finite a scale of
        NaN, so that it is read as NaN.

    Raises:
        TypeError: ``values`` is no tensor of floating-point numbers, ``dtype`` no dtype, ``group_size`` no int.
        ValueError: another shape, another dtype than these two, a ``group_size`` that does not divide W.
    """
    checks.check_tensor("values", values)
    checks.check_ndim("values", values, 2, "[rows, row_dim]")
    checks.check_floating("values", values)
    check_quantized_dtype(dtype)
    num_rows, row_dim = values.shape
    num_groups = groups_of(row_dim, group_size)
    quantized = torch.empty((num_rows, row_dim), dtype=dtype, device=values.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=values.device)
    step = max(CHUNK_BYTES // (4 * max(row_dim, 1)), 1)
    for first in range(0, num_rows, step):
        part = slice(first, first + step)
        groups = values[part].to(torch.float32).unflatten(1, (num_groups, row_dim // num_groups))
        scales[part] = _scales(groups, LARGEST[dtype])
        numbers = (groups / scales[part].unsqueeze(2)).nan_to_num_(0.0).clamp_(-LARGEST[dtype], LARGEST[dtype])
        numbers = numbers.round_() if dtype == torch.int8 else numbers
        quantized[part] = numbers.flatten(1).to(dtype)
    return quantized, scales


def _scales(groups: Tensor, largest: float) -> Tensor:
    if groups.size(2) == 0:
        return groups.new_ones(groups.shape[:2])
    scales = groups.abs().amax(2) / largest
    return torch.where(scales.isfinite(), torch.where(scales == 0, 1.0, scales), torch.nan)


def quantized_lookup(
    values: Tensor,
    scales: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`memory_lookup` (arXiv 2412.09764, section 3.2) of a table in 8 bits, read as it is: a quarter of the bytes
    of float32.

    ``out_t = sum_k weights[t, k] * scales[i, d // group_size] * values[i, d]`` with ``i`` = ``indices[t, k]``. It
    differs from the lookup of the table that was quantised by at most the sum of ``|weights|`` times the bound of
    :func:`topgather.nn.quantize_rows`.

    Args:
        values: ``[rows, W]``, ``torch.int8`` or ``torch.float8_e4m3fn``; any stride of rows.
        scales: ``[rows, groups]`` float32; the number of groups divides W.
        indices: ``[T, K]`` int64 or int32; ``[E]`` with ``offsets``.
        weights: of the shape of ``indices``, float32, bfloat16 or float16. Sums run in float32. None: ones.
        offsets: as in :func:`memory_lookup`.
        mode: ``"sum"`` or ``"mean"``.
        padding_idx: as in :func:`memory_lookup`.
        include_last_offset: as in :func:`memory_lookup`.
        dtype: of the result, float32, bfloat16 or float16: the float32 sum, rounded once.

    Returns:
        ``[T, W]`` in ``dtype``, differentiable with respect to ``weights``, as often as wanted. The same bits every
        time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: as :func:`memory_lookup`; scales that require a gradient: a table in 8 bits is not trained.
        IndexError: as :func:`memory_lookup`. On CUDA too what holds there holds here.
    """
    for name, tensor in (("values", values), ("scales", scales), ("indices", indices)):
        checks.check_tensor(name, tensor)
    if weights is not None:
        checks.check_tensor("weights", weights)
        checks.check_dtype("weights", weights, *WIDE_DTYPES)
    if offsets is not None:
        checks.check_tensor("offsets", offsets)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r} of type {type(dtype).__name__}")
    if dtype not in WIDE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, WIDE_DTYPES))}, got {dtype}")
    for name, tensor in (("values", values), ("scales", scales)):
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: a table in 8 bits is not trained")
    is_weighted = weights is not None and mode == "sum"
    if not (is_weighted and offsets is None and padding_idx is None and include_last_offset is False):
        check_rows(values, scales)
        # Bags ask a table for its rows and its device, and scales have the same.
        bags = make_bags(scales, indices, weights, offsets, mode, padding_idx, include_last_offset)
        indices, weights, offsets = bags
    out: Tensor = _quantized_ops.memory_lookup_quantized(values, scales, indices, weights, offsets)
    return out.to(dtype)

"""Attention inside groups of an image's tokens: strided grids and contiguous windows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as checks
from . import _grid_cuda  # noqa: F401  register torch.ops.topgather
from ._grid_kernels import GRID, WINDOW
from ._library import call

_ops = torch.ops.topgather

Pair = int | tuple[int, int]


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_size: Pair | None = None,
    stride: Pair | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside strided grids of tokens (SparseViT, arXiv 2412.14598, section 3.2; grid attention of MaxViT,
    arXiv 2204.01697, section 3.3).

    Group ``(a, b)`` holds the tokens ``(a + i * stride_rows, b + j * stride_columns)``: each sees the whole image,
    sparsely. Tokens are read where they lie, so nothing is permuted or padded; where the stride does not divide the
    image, groups that reach further have a token more than others.

    Args:
        query: ``[B, heads, H, W, D]``, float32, bfloat16, float16, or float64 (CPU only). Any strides with a contiguous
            last dimension: the views of a fused ``[B, H, W, 3, heads, D]`` projection need no copy.
        key: the same shape and dtype.
        value: the same shape and dtype.
        grid_size: most tokens of a group, ``(rows, columns)``, or an int for a square: the strides are then
            ``ceil(H / rows)`` and ``ceil(W / columns)``.
        stride: instead of ``grid_size``, the distance between a group's tokens, which keeps the rate of sparsity as
            images grow. 1 is global attention.
        bias: ``[heads, G, G]``, added to the scaled scores, query before key, of query's dtype or float32 (float64 for
            float64). ``G`` is the most tokens that a group has, ``ceil(H / stride_rows) * ceil(W / stride_columns)``, a
            group's tokens counted row by row.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        ``[B, heads, H, W, D]`` in query's dtype, heads and tokens laid out as query has them. Differentiable with
        respect to query, key, value and bias, once. The same bits every time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; neither ``grid_size`` nor ``stride`` given, or both.
    """
    if (grid_size is None) == (stride is None):
        raise ValueError(f"exactly one of grid_size and stride must be given, got {grid_size!r} and {stride!r}")
    if stride is not None:
        steps = checks.check_pair("stride", stride)
    else:
        rows, columns = checks.check_pair("grid_size", grid_size)
        checks.check_tensor("query", query)
        checks.check_ndim("query", query, 5, "[batch, heads, rows, columns, head_dim]")
        steps = max(-(-query.size(2) // rows), 1), max(-(-query.size(3) // columns), 1)
    return _attention(query, key, value, bias, GRID, steps, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Pair,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside contiguous windows of tokens (Swin, arXiv 2103.14030, section 3.1; the blocks in the words of
    SparseViT, arXiv 2412.14598, section 3.2).

    Args:
        query: ``[B, heads, H, W, D]``, as in :func:`grid_attention`.
        key: the same shape and dtype.
        value: the same shape and dtype.
        window_size: tokens of a window, ``(rows, columns)``, or an int for a square. Windows at the lower and right
            edge have fewer tokens where it does not divide the image; nothing is padded.
        bias: ``[heads, G, G]`` as in :func:`grid_attention`, with ``G`` = ``min(H, rows) * min(W, columns)``.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        As :func:`grid_attention`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option.
    """
    return _attention(query, key, value, bias, WINDOW, checks.check_pair("window_size", window_size), scale)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    steps: tuple[int, int],
    scale: float | None,
) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
    if bias is not None:
        checks.check_tensor("bias", bias)
    checks.check_scale(scale)
    if scale is None:
        # A head_dim of 0 is refused by the op, in its own words.
        scale = max(query.size(-1), 1) ** -0.5 if query.ndim > 0 else 1.0
    out, _ = call(_ops.grid_attention.default, query, key, value, bias, partition, *steps, float(scale))
    result: Tensor = out
    return result

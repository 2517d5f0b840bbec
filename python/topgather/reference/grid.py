"""Grid and window attention in plain float64 PyTorch.

Sources: SparseViT, arXiv 2412.14598, section 3.2; MaxViT, arXiv 2204.01697, section 3.3; Swin, arXiv 2103.14030,
section 3.1. Where the papers leave room (sizes that do not divide), the rules stated below are the contract.

Notation used in every docstring: B batch, H rows and W columns of tokens, D head dimension, G most tokens of a group.
"""

import torch
from torch import Tensor

__all__ = ["grid_attention", "grid_groups", "window_attention", "window_groups"]


def grid_groups(num_rows: int, num_columns: int, stride: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of every group's tokens, for a grid of the given strides: group ``(a, b)`` has the rows ``a, a +
    stride[0], ...`` and the columns ``b, b + stride[1], ...``, as far as the image reaches.

    Args:
        num_rows: H.
        num_columns: W.
        stride: distance between a group's tokens, along rows and columns.

    Returns:
        For each group int64 tensors of its rows and of its columns; its tokens are all pairs of both.
    """
    rows = [torch.arange(a, num_rows, stride[0]) for a in range(min(stride[0], num_rows))]
    columns = [torch.arange(b, num_columns, stride[1]) for b in range(min(stride[1], num_columns))]
    return [(row, column) for row in rows for column in columns]


def window_groups(num_rows: int, num_columns: int, window_size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of every window's tokens; windows at the edges may be short.

    Args:
        num_rows: H.
        num_columns: W.
        window_size: rows and columns of a window.

    Returns:
        As :func:`grid_groups`.
    """
    rows = torch.arange(num_rows).split(window_size[0]) if num_rows else ()
    columns = torch.arange(num_columns).split(window_size[1]) if num_columns else ()
    return [(row, column) for row in rows for column in columns]


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stride: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside each group of :func:`grid_groups` (SparseViT, arXiv 2412.14598, section 3.2).

    Args:
        query: ``[B, heads, H, W, D]``, any floating dtype.
        key: the same shape.
        value: the same shape.
        stride: distance between a group's tokens, along rows and columns.
        bias: ``[heads, G, G]``, added to the scaled scores; token ``(i, j)`` of a group is number ``i * most_columns +
            j``, with ``most_columns`` those of the widest group.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        float64 ``[B, heads, H, W, D]``, differentiable.
    """
    groups = grid_groups(query.shape[2], query.shape[3], stride)
    return _attention_in_groups(query, key, value, groups, bias, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside each group of :func:`window_groups` (Swin, arXiv 2103.14030, section 3.1).

    Args:
        query: ``[B, heads, H, W, D]``, any floating dtype.
        key: the same shape.
        value: the same shape.
        window_size: rows and columns of a window.
        bias: as in :func:`grid_attention`.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        float64 ``[B, heads, H, W, D]``, differentiable.
    """
    groups = window_groups(query.shape[2], query.shape[3], window_size)
    return _attention_in_groups(query, key, value, groups, bias, scale)


def _attention_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: list[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    most_columns = max((len(columns) for _, columns in groups), default=0)
    out = torch.zeros_like(query)
    for rows, columns in groups:
        row, column = rows[:, None].to(query.device), columns[None, :].to(query.device)
        inside = [tensor[:, :, row, column].flatten(2, 3) for tensor in (query, key, value)]
        scores = scale * inside[0] @ inside[1].transpose(-2, -1)
        if bias is not None:
            number = torch.arange(len(rows))[:, None] * most_columns + torch.arange(len(columns))
            number = number.flatten().to(query.device)
            scores = scores + bias.double()[:, number[:, None], number[None, :]]
        attended = scores.softmax(dim=-1) @ inside[2]
        indices = (torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[1])[:, None, None])
        place = (*(index.to(query.device) for index in indices), row, column)
        out = out.index_put(place, attended.unflatten(2, (len(rows), len(columns))))
    return out

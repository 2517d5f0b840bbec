"""Which rows a batch uses that others do not: what sparse memory finetuning trains."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import checks


@torch.no_grad()
def tfidf_rows(counts: Tensor, num_batches_with_row: Tensor, num_batches: int, num_rows: int) -> Tensor:
    """The rows that a batch uses most, of those that background batches use least, by TF-IDF (Continual Learning via
    Sparse Memory Finetuning, arXiv 2510.15103, section 3).

    A row scores ``counts / counts.sum() * log((num_batches + 1) / (num_batches_with_row + 1))``.

    Args:
        counts: ``[rows]``, how often the batch uses each row: :meth:`RowOptimizer.row_counts`.
        num_batches_with_row: ``[rows]``, how many of the background batches use it at all.
        num_batches: of the background.
        num_rows: that are wanted.

    Returns:
        ``[rows]`` bool for :meth:`RowOptimizer.set_trainable_rows`: the ``num_rows`` rows of the highest scores, of
        equal ones the lowest; fewer where fewer are used.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that differ, or a number out of range.
    """
    checks.check_tensor("counts", counts)
    checks.check_tensor("num_batches_with_row", num_batches_with_row)
    checks.check_ndim("counts", counts, 1, "[rows]")
    checks.check_ndim("num_batches_with_row", num_batches_with_row, 1, "[rows]")
    checks.check_size("num_batches_with_row", num_batches_with_row, 0, counts.size(0), "rows of counts")
    checks.check_count("num_batches", num_batches, least=0)
    checks.check_count("num_rows", num_rows, least=0)
    use = counts.to(torch.float64)
    rarity = torch.log((num_batches + 1) / (num_batches_with_row.to(torch.float64) + 1))
    scores = torch.where(counts > 0, use / use.sum().clamp(min=1) * rarity, -torch.inf)
    order = scores.sort(descending=True, stable=True).indices[:num_rows]
    chosen = torch.zeros(counts.shape, dtype=torch.bool, device=counts.device)
    chosen[order] = True
    return chosen & (counts > 0)

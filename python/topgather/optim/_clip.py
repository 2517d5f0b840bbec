"""Clipping by the norm of all gradients, those that nobody made among them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._common.library import sum_dtype
from ..nn._tables import check_number
from ..ops._memory_update import recorder_of
from ._rows import RowOptimizer


def strided_gradient(parameter: Tensor) -> Tensor:
    """The gradient of ``parameter``, which has one; of a sparse one its rows, each once: a row counts with its sum."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        grad = parameter.grad = grad.coalesce()
        grad = grad._values()
    return grad


def refuse_recorded(parameters: Iterable[Tensor], optimizers: Iterable[RowOptimizer] = ()) -> None:
    """Raise ``ValueError`` for a table whose recorded gradients would not count."""
    known = [recorder for optimizer in optimizers for recorder in optimizer._recorders.values()]
    for parameter in parameters:
        recorder = recorder_of(parameter)
        if recorder is not None and recorder.parts and all(recorder is not other for other in known):
            raise ValueError(
                "parameters must have no table of a row optimizer whose recorded gradients would not count: pass the "
                "optimizer to topgather.optim.clip_grad_norm_ as one of row_optimizers, or leave the table out"
            )


def factor_to_clip(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of such a norm are multiplied by; 1 where any norm is allowed, also one that is not finite."""
    return torch.ones_like(norm) if max_norm == math.inf else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    row_optimizers: RowOptimizer | Iterable[RowOptimizer] = (),
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip gradients by their norm, all together, as ``torch.nn.utils.clip_grad_norm_`` does.

    Two passes: the first adds up the squares of gradients and, over recorded entries, of the rows' gradients that are
    never made; the second scales gradients in place, and is for the rows part of the optimizer's next step.

    Args:
        parameters: tensors whose ``.grad`` counts, dense or sparse; tables of ``row_optimizers`` may be among them.
        max_norm: that the gradients are scaled down to; infinite to have the norm alone.
        row_optimizers: whose recorded gradients count.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Gradients, and tables, may be DTensors: then all ranks of their meshes call this together.

    A norm that is NaN leaves NaN in gradients, and the row optimizer's next step raises ``ValueError`` for it.

    Returns:
        The norm before clipping, ``[]`` float64.

    Raises:
        TypeError: ``max_norm`` is no number.
        ValueError: it is negative, or a table among ``parameters`` has recorded gradients of an optimizer that is not
            among ``row_optimizers``.
        RuntimeError: the norm is not finite, where that is an error.
    """
    max_norm = float(max_norm) if isinstance(max_norm, Tensor) else max_norm
    check_number("max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    optimizers = [row_optimizers] if isinstance(row_optimizers, RowOptimizer) else list(row_optimizers)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    refuse_recorded(parameters, optimizers)
    squares = [optimizer.grad_square() for optimizer in optimizers]  # takes the sparse gradients of tables
    grads = [strided_gradient(parameter) for parameter in parameters if parameter.grad is not None]
    device = grads[0].device if grads else squares[0].device if squares else torch.device("cpu")
    norms = (torch.linalg.vector_norm(grad, dtype=sum_dtype(grad.dtype)) for grad in grads)
    squares += [_whole(norm).to(torch.float64) ** 2 for norm in norms]
    norm = sum((square.to(device) for square in squares), torch.zeros((), dtype=torch.float64, device=device)).sqrt()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the norm of all gradients must be finite, got {float(norm)}")
    factor = factor_to_clip(norm, float(max_norm))
    for grad in grads:
        grad = grad.to_local() if isinstance(grad, DTensor) else grad
        grad.mul_(factor.to(grad.device, sum_dtype(grad.dtype)))
    for optimizer in optimizers:
        optimizer.scale_grad_(factor)
    return norm

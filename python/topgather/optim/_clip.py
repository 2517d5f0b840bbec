"""Clipping by the norm of all gradients, those that nobody made among them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ._rows import RowOptimizer, check_rate


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
        parameters: tensors whose ``.grad`` counts; tables of ``row_optimizers`` may be among them.
        max_norm: that the gradients are scaled down to.
        row_optimizers: whose recorded gradients count.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Gradients, and tables, may be DTensors: then all ranks of their meshes call this together.

    A norm that is NaN leaves NaN in gradients, and the row optimizer's next step raises ``ValueError`` for it.

    Returns:
        The norm before clipping, ``[]`` float64.

    Raises:
        TypeError: ``max_norm`` is no number.
        ValueError: it is negative.
        RuntimeError: the norm is not finite, where that is an error.
    """
    check_rate("max_norm", max_norm)
    optimizers = [row_optimizers] if isinstance(row_optimizers, RowOptimizer) else list(row_optimizers)
    squares = [optimizer.grad_square() for optimizer in optimizers]  # takes the sparse gradients of tables
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = grads[0].device if grads else squares[0].device if squares else torch.device("cpu")
    squares += [_whole(torch.linalg.vector_norm(grad)).to(torch.float64) ** 2 for grad in grads]
    norm = sum((square.to(device) for square in squares), torch.zeros((), dtype=torch.float64, device=device)).sqrt()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the norm of all gradients must be finite, got {float(norm)}")
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad = grad.to_local() if isinstance(grad, DTensor) else grad
        grad.mul_(factor.to(grad.device, grad.dtype))
    for optimizer in optimizers:
        optimizer.scale_grad_(factor)
    return norm

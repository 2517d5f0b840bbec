"""A step of a row optimizer out of torch's own ops: what runs on CUDA, and what the CPU kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.library import sum_dtype
from ._memory_ops import COMPOSED_BYTES

_ops = torch.ops.topgather


def row_gradients(
    grad_out: Tensor, indices: Tensor, weights: Tensor, tokens: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows that entries name, ascending, and their gradients, in the dtype of the table.

    On CUDA this waits for the device, for the number of rows.
    """
    # Nobody's entries last, and those of a token side by side, as ragged bags have them; of a row's entries the order
    # stays that of tokens and entries.
    order = torch.where(tokens < 0, grad_out.size(0), tokens).sort(stable=True).indices
    sorted_tokens = tokens[order].masked_fill_(tokens[order] < 0, grad_out.size(0))
    bounds = torch.arange(grad_out.size(0) + 1, dtype=torch.int32, device=tokens.device)
    offsets = torch.searchsorted(sorted_tokens, bounds).to(torch.int64)
    entries = (indices[order], weights[order])
    gradient, _ = _ops.memory_backward_sparse.default(grad_out, values, *entries, False, "memory_update", offsets)
    return gradient._indices()[0], gradient._values()


def composed_update(
    grad_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    tokens: Tensor,
    values: Tensor,
    steps: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    decayed: Tensor | None,
    algorithm: str,
    learning_rate: float,
    first_rate: float,
    second_rate: float,
    eps: float,
    weight_decay: float,
    total_decay: float,
    grad_scale: float,
    nesterov: bool,
    seed: int,
    step: int,
    stochastic_rounding: bool,
) -> bool:
    """``memory_update``; a chunk of rows at a time. Gradients of the touched rows exist meanwhile."""
    all_rows, all_grads = row_gradients(grad_out, indices, weights, tokens, values)
    dtype = sum_dtype(values.dtype)
    chunk = max(COMPOSED_BYTES // max(values.size(1) * 64, 1), 1)
    for rows, grad in zip(all_rows.split(chunk), all_grads.split(chunk), strict=True):
        bits_of_states, bits_of_values = _random_bits(rows, values.size(1), seed, step, stochastic_rounding)
        taken = steps[rows] + 1
        value = values[rows].to(dtype)
        if decayed is not None:
            value *= (total_decay - decayed[rows]).exp().to(dtype).unsqueeze(1)
            decayed[rows] = total_decay
        grad = grad.to(dtype) * grad_scale + value * weight_decay
        # Corrections in float64: a row's own steps are a column.
        counts = taken.to(torch.float64).unsqueeze(1)
        if algorithm == "sgd":
            direction = grad
            if first is not None:
                momentum = first[rows].to(dtype) * first_rate + grad * (1 - second_rate)
                momentum = torch.where(taken.unsqueeze(1) == 1, grad, momentum)
                first[rows] = _rounded(momentum, first.dtype, bits_of_states & 0xFFFF, stochastic_rounding)
                direction = grad + momentum * first_rate if nesterov else momentum
            value -= learning_rate * direction
        elif algorithm == "adagrad":
            assert first is not None
            total = first[rows].to(dtype) + grad * grad
            first[rows] = _rounded(total, first.dtype, bits_of_states & 0xFFFF, stochastic_rounding)
            rate = (learning_rate / (1 + (counts - 1) * second_rate)).to(dtype)
            value -= rate * grad / (total.sqrt() + eps)
        else:
            assert first is not None and second is not None
            old = first[rows].to(dtype)
            mean = old + (grad - old) * (1 - first_rate)
            square = second[rows].to(dtype) * second_rate + grad * grad * (1 - second_rate)
            first[rows] = _rounded(mean, first.dtype, bits_of_states & 0xFFFF, stochastic_rounding)
            second[rows] = _rounded(square, second.dtype, bits_of_states >> 16, stochastic_rounding)
            rate = (learning_rate / (1 - first_rate**counts)).to(dtype)
            root = (1 - second_rate**counts).rsqrt().to(dtype)
            value -= rate * mean / (square.sqrt() * root + eps)
        values[rows] = _rounded(value, values.dtype, bits_of_values & 0xFFFF, stochastic_rounding)
        steps[rows] = taken
    return True


def composed_square(grad_out: Tensor, indices: Tensor, weights: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """``memory_grad_square``."""
    _, grads = row_gradients(grad_out, indices, weights, tokens, values)
    return grads.to(torch.float64).square().sum().reshape(1)


def _rounded(numbers: Tensor, dtype: torch.dtype, bits: Tensor, is_stochastic: bool) -> Tensor:
    """``numbers`` in ``dtype``; float32 to bfloat16 by 16 random ``bits``: up with the share of what is cut off."""
    if not is_stochastic or dtype != torch.bfloat16:
        return numbers.to(dtype)
    raised = ((numbers.view(torch.int32) + bits.to(torch.int32)) & ~0xFFFF).view(torch.float32)
    return torch.where(numbers.isfinite(), raised, numbers).to(dtype)


_LOW = 2**32 - 1


def _random_bits(rows: Tensor, row_dim: int, seed: int, step: int, is_stochastic: bool) -> tuple[Tensor, Tensor]:
    """32 bits of every column for the states, and for the values, ``[rows, W]`` int64: those of the CPU kernel."""
    if not is_stochastic:
        nothing = torch.zeros((), dtype=torch.int64, device=rows.device)
        return nothing, nothing
    bits = _mixed(rows + _signed(_mixed_number(_mixed_number(seed) + step)))
    columns = torch.arange(row_dim, dtype=torch.int64, device=rows.device) * 0x9E3779B9
    return tuple(_column_bits(part.unsqueeze(1) + columns) for part in (bits & _LOW, bits >> 32 & _LOW))  # type: ignore[return-value]


def _column_bits(bits: Tensor) -> Tensor:
    bits = bits & _LOW
    bits = _times((bits ^ bits >> 16), 0x7FEB352D)
    bits = _times((bits ^ bits >> 15), 0x846CA68B)
    return bits ^ bits >> 16


def _times(bits: Tensor, factor: int) -> Tensor:
    """Of 32-bit numbers, the low 32 bits."""
    return bits * factor & _LOW


def _signed(number: int) -> int:
    """The int64 that has these 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mixed_number(bits: int) -> int:
    bits %= 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def _mixed(bits: Tensor) -> Tensor:
    """splitmix64's mixture of 64-bit numbers, which torch has signed: the shifts are of unsigned ones."""
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return bits ^ (bits >> 31 & (1 << 33) - 1)

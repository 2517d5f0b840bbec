"""A step of a row optimizer out of torch's own ops, by the same random bits: what the kernels are compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.common.tolerances import accumulation_dtype


def row_gradients(
    grad_out: Tensor, indices: Tensor, weights: Tensor, tokens: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows that entries name, ascending, and their gradients, in float64."""
    is_there = tokens >= 0
    indices, tokens = indices[is_there], tokens[is_there].long()
    terms = weights[is_there].double().unsqueeze(1) * grad_out[tokens].double()
    rows = indices.unique()
    return rows, torch.zeros(values.shape, dtype=torch.float64).index_add_(0, indices, terms)[rows]


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
) -> None:
    """``memory_update``."""
    rows, grad = row_gradients(grad_out, indices, weights, tokens, values)
    dtype = accumulation_dtype(values.dtype)
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


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCase:
    """A third of the entries name row 1, which goes through several pieces on CUDA; some are nobody's."""

    algorithm: str
    dtype: torch.dtype
    state_dtype: torch.dtype = torch.bfloat16
    width: int = 72
    num_rows: int = 40
    num_entries: int = 700


CASES = {
    "SGD": StepCase("sgd", torch.float32),
    "Adagrad, odd": StepCase("adagrad", torch.bfloat16, torch.float32, width=35),
    "Adam": StepCase("adam", torch.bfloat16, width=520),
    "Adam, odd": StepCase("adam", torch.float32, torch.float32, width=7, num_entries=30),
    "Adam, float16": StepCase("adam", torch.float16),
}


def check_row_steps(case: StepCase, device: torch.device) -> None:
    """Compare the ops' step, and sum of squares, with the composition's."""
    generator = torch.Generator().manual_seed(0)
    rows, width, entries, tokens = case.num_rows, case.width, case.num_entries, 20

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    sums = accumulation_dtype(case.dtype)
    given = {
        "grad_out": normal(tokens, width).to(case.dtype),
        "indices": torch.where(whole(3, entries) == 0, 1, whole(rows - 2, entries)),
        "weights": normal(entries).to(sums),
        "tokens": (whole(tokens + 1, entries) - 1).to(torch.int32),
    }
    has_second = case.algorithm == "adam"
    written: dict[str, Tensor | None] = {
        "values": normal(rows, width).to(case.dtype),
        "steps": whole(4, rows).to(torch.int32),
        "first": normal(rows, width).abs().to(case.state_dtype),
        "second": normal(rows, width).abs().to(case.state_dtype) if has_second else None,
        "decayed": -normal(rows).abs().double(),
    }
    options = (case.algorithm, 0.1, 0.9, 0.99, 1e-8, 0.01, -1.5, 0.5, case.algorithm == "sgd", 2**31 - 1, 7, True)
    expected = copy.deepcopy(written)
    composed_update(*given.values(), *expected.values(), *options)  # type: ignore[arg-type]
    given = {name: tensor.to(device) for name, tensor in given.items()}
    found = {name: None if tensor is None else tensor.to(device, copy=True) for name, tensor in written.items()}
    square = torch.ops.topgather.memory_grad_square(*given.values(), found["values"])
    torch.ops.topgather.memory_update(*given.values(), *found.values(), *options)
    for name, tensor in found.items():
        if tensor is None:
            continue
        wanted, before = expected[name], written[name]
        assert wanted is not None and before is not None
        assert not torch.equal(wanted, before), f"{name}: the case changes nothing"
        tensor = tensor.cpu()
        # Of 16 bits a neighbour, where a sum's last bit decides.
        is_small = tensor.itemsize == 2
        is_close = torch.isclose(tensor, wanted, atol=2e-4, rtol=2**-7 if is_small else 2e-5)
        assert is_close.all(), f"{name}: {int((~is_close).sum())} of {is_close.numel()} are not close"
        assert not is_small or (tensor != wanted).float().mean() < 0.05, f"{name}: rounded otherwise"
        untouched = torch.ones(rows, dtype=torch.bool)
        untouched[given["indices"].cpu()[given["tokens"].cpu() >= 0]] = False
        assert torch.equal(tensor[untouched], before[untouched]), f"{name}: rows of no entry changed"
    wanted_square = row_gradients(*(tensor.cpu() for tensor in given.values()), expected["values"])[1].square().sum()
    assert torch.allclose(square.cpu()[0], wanted_square, rtol=1e-5), "squares: not the sum"

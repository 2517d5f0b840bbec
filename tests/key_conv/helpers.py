"""What the tests of the key convolution share: problems, inputs in every layout, checks against the oracle.

The checks raise AssertionError; ``test_helpers.py`` plants wrong data and demands that they do.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

import topgather as tg
from tests.common import tensors
from tests.common.tensors import LAYOUTS as LAYOUTS
from tests.common.tensors import Case, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES
from topgather import reference

NAMES = ("key", "weight", "state", "bias")


@dataclass(frozen=True)
class KeyConvCase(Case):
    """A problem size. ``lengths`` are those of packed sequences, in place of ``batch`` and ``num_tokens``."""

    batch: int = 2
    num_heads: int = 2
    num_tokens: int = 37
    head_dim: int = 16
    width: int = 3
    lengths: tuple[int, ...] | None = None
    has_state: bool = False
    has_bias: bool = False
    activation: str | None = "silu"

    def shape(self) -> tuple[int, ...]:
        """Of key, and everything that has an entry for each of its numbers."""
        if self.lengths is not None:
            return (sum(self.lengths), self.num_heads, self.head_dim)
        return (self.batch, self.num_heads, self.num_tokens, self.head_dim)

    def total_tokens(self) -> int:
        """Of all sequences: as many terms has a sum for the weight."""
        return self.batch * self.num_tokens if self.lengths is None else sum(self.lengths)


# A bias, no SiLU, both.
OPTIONS: list[dict[str, Any]] = [{"has_bias": True}, {"activation": None}, {"has_bias": True, "activation": None}]


def with_options(cases: Iterable[KeyConvCase]) -> list[KeyConvCase]:
    """Each case with every choice of options but the default."""
    return [replace(case, **options) for case in cases for options in OPTIONS]


@dataclass
class Inputs:
    """Inputs of one problem; all but ``grad_out`` and ``cu_seqlens`` are leaves that require grad."""

    key: Tensor
    weight: Tensor
    grad_out: Tensor
    state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bias: Tensor | None = None
    activation: str | None = "silu"

    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by the name of its gradient."""
        tensors = {f"d_{name}": getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def make_inputs(
    case: KeyConvCase,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    layout: str = "contiguous",
    weight_dtype: torch.dtype | None = None,
) -> Inputs:
    """Random inputs, all in the given layout."""

    def random(shape: tuple[int, ...], number: int, of_dtype: torch.dtype = dtype) -> Tensor:
        return tensors.with_layout(random_tensor(shape, of_dtype, device, 8 * seed + number), layout)

    key, grad_out = random(case.shape(), 0), random(case.shape(), 1)
    weight = random((case.num_heads, case.head_dim, case.width), 2, weight_dtype or dtype)
    state = cu_seqlens = None
    if case.has_state:
        state = random((case.batch, case.num_heads, case.width - 1, case.head_dim), 3).requires_grad_()
    if case.lengths is not None:
        bounds = [0, *accumulate(case.lengths)]
        cu_seqlens = torch.tensor(bounds, dtype=(torch.int32, torch.int64)[seed % 2], device=device)
    bias = None
    if case.has_bias:
        bias = random((case.num_heads, case.head_dim), 4, weight_dtype or dtype).requires_grad_()
    return Inputs(key.requires_grad_(), weight.requires_grad_(), grad_out, state, cu_seqlens, bias, case.activation)


def convolve(inputs: Inputs) -> Tensor:
    """The public function, without the new state."""
    if inputs.state is None:
        return tg.key_conv(inputs.key, inputs.weight, inputs.cu_seqlens, None, inputs.bias, inputs.activation)
    options = {"bias": inputs.bias, "activation": inputs.activation}
    out, new_state = tg.key_conv(inputs.key, inputs.weight, state=inputs.state, **options)
    assert new_state.shape == inputs.state.shape
    return out


def run_key_conv(inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of the op under test."""
    out = convolve(inputs)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def reference_key_conv(inputs: Inputs) -> dict[str, Tensor]:
    """The same of the oracle."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves().items()}
    given = {name.removeprefix("d_"): leaf for name, leaf in leaves.items()}
    out = reference.key_conv(**given, cu_seqlens=inputs.cu_seqlens, activation=inputs.activation)
    if inputs.state is not None:
        out = out[0]
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out.double(), allow_unused=True)
    return {
        "out": out.detach(),
        **{
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        },
    }


def linear(
    key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The sums alone, without SiLU and residual."""
    if bias is not None:
        return linear(key, weight, state, cu_seqlens) + (bias[:, None] if cu_seqlens is None else bias)
    width = weight.shape[-1]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        sequences = [key[a:b].transpose(0, 1) for a, b in pairwise(bounds)]
    else:
        sequences = [key]
    sums = []
    for rows in sequences:
        before = rows.new_zeros(*rows.shape[:-2], width - 1, rows.shape[-1]) if state is None else state
        padded = torch.cat([before, rows], dim=-2)
        num_tokens = rows.shape[-2]
        terms = [weight[:, None, :, tap] * padded[..., tap : tap + num_tokens, :] for tap in range(width)]
        sums.append(sum(terms[1:], terms[0]))
    if cu_seqlens is None:
        return sums[0]
    return torch.cat([part.transpose(0, 1) for part in sums]) if sums else key * 0


@dataclass
class Magnitudes:
    """Root sum of squares of the terms of each element of each result, and 1 + the largest |sum|."""

    by_name: dict[str, Tensor]
    score_factor: float


def key_conv_magnitudes(inputs: Inputs) -> Magnitudes:
    """How large the terms are that rounding errors of each result are proportional to (float64).

    Non-finite inputs count as 0: they make results that are compared by their NaN and inf masks alone.
    """

    def finite(tensor: Tensor) -> Tensor:
        return torch.nan_to_num(tensor.detach().double(), 0.0, 0.0, 0.0)

    values = {name: finite(leaf) for name, leaf in inputs.leaves().items()}
    key, weight, state, bias = (values.get(f"d_{name}") for name in NAMES)
    assert key is not None and weight is not None
    sums = linear(key, weight, state, inputs.cu_seqlens, bias)
    squares = {name: value.square().requires_grad_() for name, value in values.items()}
    square_key, square_weight, square_state, square_bias = (squares.get(f"d_{name}") for name in NAMES)
    square_sums = linear(square_key, square_weight, square_state, inputs.cu_seqlens, square_bias)
    sizes = square_sums.detach().sqrt()
    grad_out = finite(inputs.grad_out)
    # An error of a sum moves its slope: by less than the error itself.
    incoming = (grad_out.abs() * (1 + sizes)).square()
    passed = torch.autograd.grad(square_sums, tuple(squares.values()), incoming, allow_unused=True)
    by_name = {
        name: torch.zeros_like(values[name]) if gradient is None else gradient.sqrt()
        for name, gradient in zip(squares, passed, strict=True)
    }
    by_name["d_key"] = by_name["d_key"] + grad_out.abs()
    by_name["out"] = key.abs() + sizes
    largest = float((sums.abs() + sizes).max()) if sums.numel() else 0.0
    return Magnitudes(by_name, 1.0 + largest)


def assert_key_conv_close(result: dict[str, Tensor], inputs: Inputs, case: KeyConvCase) -> None:
    """Result and gradients equal the oracle's, up to the table's tolerance."""
    dtype = inputs.key.dtype
    expected = reference_key_conv(inputs)
    magnitudes = key_conv_magnitudes(inputs)
    lengths = dict.fromkeys(expected, 2 * case.width) | {"out": case.width}
    lengths["d_weight"] = lengths["d_bias"] = case.width + case.total_tokens()
    lengths = {name: length for name, length in lengths.items() if name in expected}
    assert set(result) == set(expected), f"results {sorted(result)}, expected {sorted(expected)}"
    for name, tensor in result.items():
        of_dtype = inputs.weight.dtype if name in ("d_weight", "d_bias") else dtype
        assert tensor.dtype == of_dtype, f"{name}: dtype {tensor.dtype}, expected {of_dtype}"
        tolerance = TOLERANCES["key_conv", name]
        magnitude = magnitudes.by_name[name]
        assert_close(name, tensor, expected[name], magnitude, tolerance, dtype, lengths[name], magnitudes.score_factor)


def check_key_conv(
    case: KeyConvCase,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Convolve and differentiate a random problem; check every result."""
    inputs = make_inputs(case, dtype, device, seed, layout, weight_dtype)
    result = run_key_conv(inputs)
    assert_key_conv_close(result, inputs, case)
    return result

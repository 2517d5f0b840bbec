"""What the tests of grid and window attention share: problems, inputs in every layout, checks against the oracle.

The checks raise AssertionError; ``test_helpers.py`` plants wrong data and demands that they do.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import topgather as tg
from tests.common import tensors
from tests.common.tensors import Case, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference
from topgather.ops.grid import GRID, WINDOW, tokens_per_group

PARTITIONS = [GRID, WINDOW]
LAYOUTS = ["contiguous", "fused", "offset", "padded", "transposed", "expanded"]
NAMES = ("query", "key", "value", "bias")


@dataclass(frozen=True)
class GridCase(Case):
    """A problem size; ``step`` is the stride of a grid, or a window."""

    batch: int = 2
    num_heads: int = 2
    rows: int = 7
    columns: int = 6
    head_dim: int = 16
    partition: str = GRID
    step: tuple[int, int] = (3, 2)
    has_bias: bool = False
    scale: float | None = None

    def shape(self) -> tuple[int, ...]:
        """Of query, key, value and everything that has an entry per channel."""
        return (self.batch, self.num_heads, self.rows, self.columns, self.head_dim)

    def most_tokens(self) -> int:
        """Of a group: the sides of a bias."""
        return tokens_per_group(torch.empty(self.shape(), device="meta"), self.partition, *self.step)


@dataclass
class Inputs:
    """Inputs of one problem; all but ``grad_out`` are leaves that require grad."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    bias: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by the name of its gradient."""
        tensors = {f"d_{name}": getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another offset; last dimension contiguous. "expanded" repeats the first.

    "fused" lays tokens out before heads, as a projection's output has them.
    """
    if layout == "fused":
        return tensor.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    return tensors.with_layout(tensor, layout)


def make_inputs(
    case: GridCase,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    layout: str = "contiguous",
    bias_dtype: torch.dtype | None = None,
) -> Inputs:
    """Random inputs, all in the given layout; "fused" cuts query, key and value out of one tensor."""
    images = [random_tensor(case.shape(), dtype, device, 8 * seed + number) for number in range(4)]
    if layout == "fused":
        # One projection's output [B, H, W, 3, heads, D].
        fused = torch.stack([image.permute(0, 2, 3, 1, 4) for image in images[:3]], dim=3)
        images[:3] = fused.permute(3, 0, 4, 1, 2, 5).unbind(0)
    else:
        images[:3] = [with_layout(image, layout) for image in images[:3]]
    grad_out = with_layout(images[3], layout)
    query, key, value = (image.requires_grad_() for image in images[:3])
    if not case.has_bias:
        return Inputs(query, key, value, grad_out)
    sides = (case.num_heads, case.most_tokens(), case.most_tokens())
    bias = random_tensor(sides, bias_dtype or dtype, device, 8 * seed + 4)
    if layout == "transposed":
        bias = bias.transpose(-2, -1).contiguous().transpose(-2, -1)
    elif layout != "fused":
        bias = tensors.with_layout(bias, layout)
    return Inputs(query, key, value, grad_out, bias.requires_grad_())


def attend(inputs: Inputs, case: GridCase) -> Tensor:
    """The public function."""
    images = (inputs.query, inputs.key, inputs.value)
    if case.partition == WINDOW:
        return tg.window_attention(*images, case.step, bias=inputs.bias, scale=case.scale)
    return tg.grid_attention(*images, stride=case.step, bias=inputs.bias, scale=case.scale)


def run_grid(inputs: Inputs, case: GridCase) -> dict[str, Tensor]:
    """Forward and backward of the op under test."""
    out = attend(inputs, case)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def reference_grid(inputs: Inputs, case: GridCase) -> dict[str, Tensor]:
    """The same of the oracle."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves().items()}
    function = reference.window_attention if case.partition == WINDOW else reference.grid_attention
    query, key, value, *bias = leaves.values()
    out = function(query, key, value, case.step, *(bias or [None]), case.scale)
    if not out.requires_grad:  # no group at all
        return {"out": out, **{name: torch.zeros_like(leaf) for name, leaf in leaves.items()}}
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def groups_of(case: GridCase) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of every group."""
    find = reference.window_groups if case.partition == WINDOW else reference.grid_groups
    return find(case.rows, case.columns, case.step)


def groups_of_each_size(case: GridCase, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of all groups of one size: rows and columns of tokens, ``[groups, tokens]``, and their numbers in a bias."""
    groups = groups_of(case)
    most_columns = max((len(columns) for _, columns in groups), default=0)
    for size in sorted({(len(rows), len(columns)) for rows, columns in groups}):
        alike = [group for group in groups if (len(group[0]), len(group[1])) == size]
        rows = torch.stack([rows[:, None].expand(size).flatten() for rows, _ in alike])
        columns = torch.stack([columns.expand(size).flatten() for _, columns in alike])
        numbers = torch.arange(size[0])[:, None] * most_columns + torch.arange(size[1])
        yield rows.to(device), columns.to(device), numbers.flatten().to(device)


def root_sum_square(left: Tensor, right: Tensor) -> Tensor:
    """How large the terms of every element of a matrix product are."""
    return (left.square() @ right.square()).sqrt()


@dataclass
class Magnitudes:
    """Root sum of squares of the terms of each element of each result, and 1 + the largest |score|."""

    by_name: dict[str, Tensor]
    score_factor: float


def grid_magnitudes(inputs: Inputs, case: GridCase) -> Magnitudes:
    """How large the terms are that rounding errors of each result are proportional to (float64).

    Non-finite inputs count as 0: they make results that are compared by their NaN and inf masks alone.
    """
    tensors = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    query, key, value, grad_out = (torch.nan_to_num(t.detach().double(), 0.0, 0.0, 0.0) for t in tensors)
    bias = None if inputs.bias is None else inputs.bias.detach().double()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    image = torch.zeros(case.shape(), dtype=torch.float64, device=query.device)
    by_name = {name: image.clone() for name in ("out", "d_query", "d_key", "d_value")}
    d_bias_squares = None if bias is None else torch.zeros_like(bias)
    largest = 0.0
    for rows, columns, numbers in groups_of_each_size(case, query.device):
        # [B, heads, groups, tokens, D]
        q, k, v, g = (tensor[:, :, rows, columns] for tensor in (query, key, value, grad_out))
        scores = q @ k.transpose(-2, -1) * scale
        sizes = scores.abs() + root_sum_square(q, k.transpose(-2, -1)) * abs(scale)
        if bias is not None:
            added = bias[:, None, numbers[:, None], numbers[None, :]]
            scores, sizes = scores + added, sizes + torch.nan_to_num(added, 0.0, 0.0, 0.0).abs()
        weights = torch.nan_to_num(scores.softmax(dim=-1), 0.0)
        largest = max(largest, float(sizes.max()) if sizes.numel() else 0.0)
        out = weights @ v

        d_weights = g @ v.transpose(-2, -1)
        row_dot_magnitude = (g.square() * out.square()).sum(dim=-1, keepdim=True).sqrt()
        row_terms = (g * out).sum(dim=-1, keepdim=True).abs() + row_dot_magnitude
        d_scores = weights * (d_weights.abs() + root_sum_square(g, v.transpose(-2, -1)) + row_terms)
        # The error of a row's dot product with grad_out is shared by all its scores: it adds up with their signs.
        shared = row_dot_magnitude * (weights @ k).abs()

        by_name["out"][:, :, rows, columns] = root_sum_square(weights, v)
        by_name["d_query"][:, :, rows, columns] = (root_sum_square(d_scores, k) + shared) * abs(scale)
        by_name["d_key"][:, :, rows, columns] = root_sum_square(d_scores.transpose(-2, -1), q) * abs(scale)
        by_name["d_value"][:, :, rows, columns] = root_sum_square(weights.transpose(-2, -1), g)
        if d_bias_squares is not None:
            d_bias_squares[:, numbers[:, None], numbers[None, :]] += d_scores.square().sum(dim=(0, 2))
    if d_bias_squares is not None:
        by_name["d_bias"] = d_bias_squares.sqrt()
    return Magnitudes(by_name, 1.0 + largest)


def assert_grid_close(result: dict[str, Tensor], inputs: Inputs, case: GridCase) -> None:
    """Result and gradients equal the oracle's, up to the table's tolerance."""
    dtype = inputs.query.dtype
    expected = reference_grid(inputs, case)
    magnitudes = grid_magnitudes(inputs, case)
    forward_length = case.head_dim + case.most_tokens()
    lengths = dict.fromkeys(expected, 2 * forward_length) | {"out": forward_length}
    # A token of a bias stands for one of every group.
    lengths["d_bias"] = 2 * forward_length + case.batch * len(groups_of(case))
    assert set(result) == set(expected), f"results {sorted(result)}, expected {sorted(expected)}"
    for name, tensor in result.items():
        of_dtype = inputs.bias.dtype if name == "d_bias" and inputs.bias is not None else dtype
        assert tensor.dtype == of_dtype, f"{name}: dtype {tensor.dtype}, expected {of_dtype}"
        tolerance = TOLERANCES["grid_attention", name]
        magnitude = magnitudes.by_name[name]
        assert_close(name, tensor, expected[name], magnitude, tolerance, dtype, lengths[name], magnitudes.score_factor)


def reference_lse(inputs: Inputs, case: GridCase) -> Tensor:
    """Logarithm of the sum of a token's exponentiated scores, float64 ``[B, heads, H, W]``."""
    query, key = inputs.query.detach().double(), inputs.key.detach().double()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    lse = query.new_zeros(case.shape()[:-1])
    for rows, columns, numbers in groups_of_each_size(case, query.device):
        scores = query[:, :, rows, columns] @ key[:, :, rows, columns].transpose(-2, -1) * scale
        if inputs.bias is not None:
            scores = scores + inputs.bias.detach().double()[:, None, numbers[:, None], numbers[None, :]]
        lse[:, :, rows, columns] = scores.logsumexp(dim=-1)
    return lse


def assert_lse_close(lse: Tensor, inputs: Inputs, case: GridCase) -> None:
    """What the backward pass starts from."""
    dtype = inputs.query.dtype
    assert lse.dtype == accumulation_dtype(dtype), f"lse: dtype {lse.dtype}"
    expected, length = reference_lse(inputs, case), case.head_dim + case.most_tokens()
    factor = grid_magnitudes(inputs, case).score_factor
    tolerance = TOLERANCES["grid_attention", "lse"]
    assert_close("lse", lse, expected, torch.ones_like(expected), tolerance, dtype, length, factor)


def check_grid(
    case: GridCase,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
    bias_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Attend and differentiate a random problem; check every result."""
    inputs = make_inputs(case, dtype, device, seed, layout, bias_dtype)
    result = run_grid(inputs, case)
    assert_grid_close(result, inputs, case)
    return result

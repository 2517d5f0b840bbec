"""The checks of grid and window attention are checked: right data passes, planted wrong data fails."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common.tensors import DTYPES, random_tensor
from tests.common.tolerances import accumulation_dtype
from tests.grid.helpers import (
    LAYOUTS,
    PARTITIONS,
    GridCase,
    Inputs,
    assert_grid_close,
    assert_lse_close,
    grid_magnitudes,
    groups_of,
    groups_of_each_size,
    make_inputs,
    reference_grid,
    reference_lse,
    with_layout,
)

CPU = torch.device("cpu")
CASE = GridCase(rows=9, columns=8, has_bias=True)
RESULTS = ["out", "d_query", "d_key", "d_value", "d_bias"]
# The least relative error of the largest element that must not pass.
NOTICED = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03, torch.float64: 1e-12}


def right_results(inputs: Inputs, case: GridCase) -> dict[str, Tensor]:
    """The oracle's, rounded once."""
    return {name: tensor.to(inputs.query.dtype) for name, tensor in reference_grid(inputs, case).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_accepts_the_reference(layout: str, partition: str, dtype: torch.dtype) -> None:
    case = replace(CASE, partition=partition)
    inputs = make_inputs(case, dtype, CPU, 0, layout)
    assert_grid_close(right_results(inputs, case), inputs, case)
    assert_lse_close(reference_lse(inputs, case).to(accumulation_dtype(dtype)), inputs, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESULTS)
def test_check_rejects(name: str, dtype: torch.dtype) -> None:
    """One element too large, one NaN, tokens in another order, another dtype."""
    inputs = make_inputs(CASE, dtype, CPU)
    right = right_results(inputs, CASE)
    largest = tuple(torch.unravel_index(right[name].abs().argmax(), right[name].shape))
    for factor in (1 + NOTICED[dtype], torch.nan, -1):
        wrong = right[name].clone()
        wrong[largest] *= factor
        with pytest.raises(AssertionError, match=name):
            assert_grid_close(right | {name: wrong}, inputs, CASE)
    with pytest.raises(AssertionError, match=name):
        assert_grid_close(right | {name: right[name].roll(1, -2)}, inputs, CASE)
    other = torch.float32 if dtype != torch.float32 else torch.float64
    with pytest.raises(AssertionError, match="dtype"):
        assert_grid_close(right | {name: right[name].to(other)}, inputs, CASE)
    with pytest.raises(AssertionError, match="results"):
        assert_grid_close({key: right[key] for key in RESULTS if key != name}, inputs, CASE)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CASE, step=(3, 3), has_bias=False),
        replace(CASE, step=(2, 3), has_bias=False),
        replace(CASE, partition="window", has_bias=False),
        replace(CASE, scale=0.26, has_bias=False),
        replace(CASE, step=(4, 2), has_bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_groups_are_noticed(wrong: GridCase, dtype: torch.dtype) -> None:
    """In the coarsest dtypes; a scale that differs by 4 % included."""
    case = replace(CASE, has_bias=False, scale=1.0 if wrong.scale else None)
    wrong = replace(wrong, scale=1.04 if wrong.scale else None)
    inputs = make_inputs(case, dtype, CPU)
    with pytest.raises(AssertionError, match="out"):
        assert_grid_close(right_results(inputs, wrong), inputs, case)


def test_a_padded_token_attended_to_is_noticed() -> None:
    """In bfloat16: groups of one token fewer take in a token of zeros."""
    case = GridCase(rows=9, columns=8, step=(2, 2))
    inputs = make_inputs(case, torch.bfloat16, CPU)
    padded = replace(case, rows=10)

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor.detach(), (0, 0, 0, 0, 0, 1))

    images = (pad(tensor).requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value))
    wrong = right_results(Inputs(*images, pad(inputs.grad_out)), padded)
    cut = {name: tensor[:, :, :9] for name, tensor in wrong.items()}
    with pytest.raises(AssertionError, match="out"):
        assert_grid_close(cut, inputs, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_left_out_or_turned_is_noticed(dtype: torch.dtype) -> None:
    inputs = make_inputs(CASE, dtype, CPU)
    assert inputs.bias is not None
    right = right_results(inputs, CASE)
    for changed in (torch.zeros_like(inputs.bias), inputs.bias.mT, inputs.bias.flip(0), inputs.bias.roll(1, 1)):
        wrong = replace(inputs, bias=changed.detach().clone().requires_grad_())
        with pytest.raises(AssertionError, match="out"):
            assert_grid_close(right_results(wrong, CASE), inputs, CASE)
    # An image left out of the sum.
    without = replace(inputs, grad_out=inputs.grad_out * torch.tensor([1, 0]).view(2, 1, 1, 1, 1).to(dtype))
    with pytest.raises(AssertionError, match="d_bias"):
        assert_grid_close(right | {"d_bias": right_results(without, CASE)["d_bias"]}, inputs, CASE)


def test_a_gradient_of_zeros_is_noticed() -> None:
    inputs = make_inputs(CASE, torch.bfloat16, CPU)
    right = right_results(inputs, CASE)
    for name in RESULTS[1:]:
        with pytest.raises(AssertionError, match=name):
            assert_grid_close(right | {name: torch.zeros_like(right[name])}, inputs, CASE)


def test_lse_in_16_bits_is_noticed() -> None:
    inputs = make_inputs(CASE, torch.bfloat16, CPU)
    with pytest.raises(AssertionError, match="lse"):
        assert_lse_close(reference_lse(inputs, CASE).bfloat16().float(), inputs, CASE)
    with pytest.raises(AssertionError, match="dtype"):
        assert_lse_close(reference_lse(inputs, CASE), inputs, CASE)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_gradients_of_tokens_alone_have_room_for_rounding(partition: str) -> None:
    """They are zero in theory; magnitudes say how large what cancels is."""
    step = (9, 8) if partition == "grid" else (1, 1)
    case = replace(CASE, partition=partition, step=step)
    inputs = make_inputs(case, torch.float32, CPU)
    expected, magnitudes = reference_grid(inputs, case), grid_magnitudes(inputs, case)
    for name in ("d_query", "d_key", "d_bias"):
        assert expected[name].abs().max() < 1e-12 and magnitudes.by_name[name].min() > 0
    right = right_results(inputs, case)
    with pytest.raises(AssertionError, match="d_key"):
        assert_grid_close(right | {"d_key": right["d_key"] + 1e-2}, inputs, case)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("rows", "columns", "step"), [(7, 6, (3, 4)), (1, 9, (2, 2)), (4, 4, (9, 1)), (0, 5, (2, 2))])
def test_every_token_is_in_exactly_one_group(rows: int, columns: int, step: tuple[int, int], partition: str) -> None:
    case = GridCase(rows=rows, columns=columns, step=step, partition=partition)
    counts = torch.zeros(rows, columns, dtype=torch.int64)
    num_groups = 0
    for row, column, number in groups_of_each_size(case, CPU):
        counts.index_put_((row, column), torch.tensor(1), accumulate=True)
        num_groups += len(row)
        assert number.numel() == row.shape[1] and number.unique().numel() == number.numel()
        assert int(number.max()) < case.most_tokens()
    assert (counts == 1).all() and num_groups == len(groups_of(case))


def test_groups_of_a_small_image() -> None:
    """By hand: 3 x 5 tokens."""
    grid = groups_of(GridCase(rows=3, columns=5, step=(2, 3)))
    assert [(row.tolist(), column.tolist()) for row, column in grid] == [
        ([0, 2], [0, 3]),
        ([0, 2], [1, 4]),
        ([0, 2], [2]),
        ([1], [0, 3]),
        ([1], [1, 4]),
        ([1], [2]),
    ]
    windows = groups_of(GridCase(rows=3, columns=5, step=(2, 3), partition="window"))
    assert [(row.tolist(), column.tolist()) for row, column in windows] == [
        ([0, 1], [0, 1, 2]),
        ([0, 1], [3, 4]),
        ([2], [0, 1, 2]),
        ([2], [3, 4]),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout: str) -> None:
    tensor = random_tensor((2, 3, 5, 4, 8), torch.float32, CPU, 0)
    view = with_layout(tensor, layout)
    assert torch.equal(view, tensor[:1].expand(tensor.shape) if layout == "expanded" else tensor)
    assert view.stride(-1) == 1 and view.is_contiguous() == (layout in ("contiguous", "offset"))


def test_a_fused_projection_is_one_tensor() -> None:
    inputs = make_inputs(GridCase(), torch.float32, CPU, 0, "fused")
    assert inputs.key.data_ptr() - inputs.query.data_ptr() == 4 * 2 * 16
    assert inputs.query.stride() == (7 * 6 * 3 * 32, 16, 6 * 3 * 32, 3 * 32, 1)
    assert torch.equal(inputs.key, make_inputs(GridCase(), torch.float32, CPU).key)

"""Every instruction set this machine has runs the same compact set of grid and window attention's cases."""

import pytest
import torch

from tests.common.tensors import DTYPES
from tests.grid.helpers import GridCase, assert_grid_close, check_grid, make_inputs, run_grid

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target")]
CPU = torch.device("cpu")

CASES = [
    GridCase(),
    GridCase(rows=13, columns=11, step=(4, 3), head_dim=33, has_bias=True),
    GridCase(rows=13, columns=11, step=(4, 3), head_dim=8, has_bias=True, partition="window"),
    GridCase(batch=1, rows=15, columns=17, step=(1, 1), head_dim=5, has_bias=True),
    GridCase(batch=1, num_heads=1, rows=17, columns=16, step=(1, 1), head_dim=64),
    GridCase(batch=1, rows=1, columns=31, step=(1, 2), head_dim=128),
    GridCase(rows=6, columns=5, step=(6, 5), head_dim=1, has_bias=True),
    # So many groups that a thread takes several at a time, some of them short.
    GridCase(num_heads=3, rows=25, columns=23, step=(11, 7), head_dim=9, has_bias=True),
    GridCase(num_heads=3, rows=25, columns=23, step=(2, 3), head_dim=16, partition="window"),
    # Queries that fill any number of vectors, and one less and one more.
    *(
        GridCase(batch=1, rows=1, columns=n, step=(1, 1), head_dim=n)
        for n in (1, 2, 3, 4, 7, 9, 15, 17, 31, 48, 63, 65)
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: GridCase, dtype: torch.dtype) -> None:
    check_grid(case, dtype, CPU)


@pytest.mark.parametrize("layout", ["fused", "offset", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    check_grid(CASES[1], dtype, CPU, layout)
    check_grid(CASES[2], dtype, CPU, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite(number: float, dtype: torch.dtype) -> None:
    """In queries, keys, values and bias, of groups of several tiles."""
    case = GridCase(batch=1, rows=15, columns=19, step=(2, 1), head_dim=9, has_bias=True)
    for name in ("query", "key", "value", "bias"):
        inputs = make_inputs(case, dtype, CPU)
        tensor = getattr(inputs, name).detach().clone()
        tensor[(1, 70, 140) if name == "bias" else (0, 1, 9, 13, 2)] = number
        setattr(inputs, name, tensor.requires_grad_())
        assert_grid_close(run_grid(inputs, case), inputs, case)

"""Results stored past the caches, as those of calls larger than the last-level cache are: the same bits."""

from collections.abc import Iterator

import pytest
import torch

from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.grid.helpers import GridCase, assert_grid_close, make_inputs, run_grid
from topgather import _native

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target", "real_cache")]
CPU = torch.device("cpu")

CASES = [
    # Groups of one vector: of rows of one, four and five vectors, full groups and short ones, several to a task.
    GridCase(rows=8, columns=12, step=(2, 3), head_dim=16),
    GridCase(rows=16, columns=16, step=(4, 4), head_dim=64, has_bias=True),
    GridCase(rows=7, columns=9, step=(2, 3), head_dim=80),
    GridCase(num_heads=3, rows=25, columns=23, step=(2, 3), head_dim=16, partition="window"),
    # Of more, in which the backward alone does so.
    GridCase(batch=1, rows=13, columns=11, step=(1, 1), head_dim=32, has_bias=True),
    # Rows that are no whole lines, so that nothing may.
    GridCase(rows=8, columns=8, step=(2, 2), head_dim=24),
    GridCase(rows=8, columns=8, step=(2, 2), head_dim=5),
]


@pytest.fixture
def real_cache() -> Iterator[None]:
    """This machine's last-level cache, whatever the test took it for."""
    yield
    _native.assume_last_level_cache(0)


@pytest.mark.parametrize("layout", ["contiguous", "fused", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_past_the_caches(case: GridCase, dtype: torch.dtype, layout: str) -> None:
    inputs = make_inputs(case, dtype, CPU, layout=layout)
    _native.assume_last_level_cache(1 << 40)
    expected = run_grid(inputs, case)
    _native.assume_last_level_cache(1)
    streamed = run_grid(inputs, case)
    for name, tensor in streamed.items():
        assert_bitwise_equal(name, tensor, expected[name])
    if layout == "contiguous":
        assert_grid_close(streamed, inputs, case)

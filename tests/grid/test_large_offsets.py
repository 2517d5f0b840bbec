"""Tokens more than 2^31 elements past the start of a tensor: 32-bit offsets would wrap.

The storage is address space of which only the pages under the tokens are ever touched.
"""

import sys

import pytest
import torch
from torch import Tensor

from tests.common.tensors import assert_bitwise_equal
from tests.grid.helpers import PARTITIONS, GridCase, make_inputs, run_grid

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
PAST = 2**31 + 2**20
CASE = GridCase(rows=3, columns=4, step=(2, 3), head_dim=8)
# Strides of batch, heads, rows and columns, whole multiples of 16 bytes, and the offset.
FAR: dict[str, tuple[tuple[int, ...], int]] = {
    "batch": ((PAST, 96, 32, 8, 1), 0),
    "head": ((96, PAST, 32, 8, 1), 0),
    "row": ((64, 32, PAST // 16 * 8, 8, 1), 0),
    "column": ((64, 32, 8, PAST // 24 * 8, 1), 0),
    "storage_offset": ((192, 96, 32, 8, 1), PAST),
}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def storage(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    try:
        return torch.empty(2 * PAST, dtype=request.param, device=device)
    except RuntimeError:
        pytest.skip("the system does not lend 8 GiB of untouched memory")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("kind", FAR)
def test_far_apart(kind: str, partition: str, storage: Tensor) -> None:
    """The bits of contiguous tensors, whichever input lies far away."""
    case = GridCase(**{**CASE.__dict__, "partition": partition})
    inputs = make_inputs(case, storage.dtype, storage.device)
    expected = run_grid(inputs, case)
    strides, offset = FAR[kind]
    for number, name in enumerate(("query", "key", "value", "grad_out")):
        near = getattr(inputs, name)
        far = storage.as_strided(case.shape(), strides, offset + 4096 * number).copy_(near.detach())
        setattr(inputs, name, far.requires_grad_(name != "grad_out"))
        for result, tensor in run_grid(inputs, case).items():
            assert_bitwise_equal(result, tensor, expected[result])

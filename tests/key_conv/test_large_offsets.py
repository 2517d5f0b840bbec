"""Keys more than 2^31 elements past the start of a tensor: 32-bit offsets would wrap.

The storage is address space of which only the pages under the keys are ever touched.
"""

import sys

import pytest
import torch
from torch import Tensor

from tests.common.tensors import assert_bitwise_equal
from tests.key_conv.helpers import KeyConvCase, make_inputs, run_key_conv

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
PAST = 2**31 + 2**20
CASE = KeyConvCase(num_tokens=9, head_dim=8, width=4, has_state=True)
# Strides of batch, heads and rows, whole multiples of 16 bytes, and the offset.
FAR: dict[str, tuple[tuple[int, ...], int]] = {
    "batch": ((PAST, 96, 8, 1), 0),
    "head": ((96, PAST, 8, 1), 0),
    "row": ((16, 8, PAST // 64 * 8, 1), 0),
    "storage_offset": ((192, 96, 8, 1), PAST),
}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def storage(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    try:
        return torch.empty(2 * PAST, dtype=request.param, device=device)
    except RuntimeError:
        pytest.skip("the system does not lend 8 GiB of untouched memory")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", FAR)
def test_far_apart(kind: str, storage: Tensor) -> None:
    """The bits of contiguous tensors, whichever input lies far away."""
    inputs = make_inputs(CASE, storage.dtype, storage.device)
    expected = run_key_conv(inputs)
    strides, offset = FAR[kind]
    for number, name in enumerate(("key", "state", "grad_out")):
        near = getattr(inputs, name)
        far = storage.as_strided(near.shape, strides, offset + 4096 * number).copy_(near.detach())
        setattr(inputs, name, far.requires_grad_(name != "grad_out"))
        for result, tensor in run_key_conv(inputs).items():
            assert_bitwise_equal(result, tensor, expected[result])

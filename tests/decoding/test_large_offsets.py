"""Tokens of a cache more than 2^31 elements past its start: 32-bit offsets would wrap.

The storage is address space of which only the pages under the tokens are ever touched.
"""

import sys

import pytest
import torch
from torch import Tensor

from tests.common.tensors import assert_bitwise_equal, random_tensor

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
PAST = 2**31 + 2**20
ops = torch.ops.topgather
# Strides of pages, heads and rows, whole multiples of 16 bytes, and the offset.
FAR: dict[str, tuple[tuple[int, ...], int]] = {
    "page": ((PAST // 3, 64, 8, 1), 0),
    "head": ((64, PAST, 8, 1), 0),
    "row": ((2048, 1024, PAST // 24 * 8, 1), 0),
    "storage_offset": ((64, 32, 8, 1), PAST),
}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def storage(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    try:
        return torch.empty(2 * PAST, dtype=request.param, device=device)
    except RuntimeError:
        pytest.skip("the system does not lend 8 GiB of untouched memory")


def decoded(key_pages: Tensor, value_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Four pages of four tokens, two sequences."""
    dtype, device = key_pages.dtype, key_pages.device
    centroids = torch.empty(4, 2, 2, 8, device=device)
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32, device=device)
    key, value, query = (random_tensor((2, 2, 7, 8), dtype, device, seed) for seed in range(3))
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    ops.moba_cache_append(key, value, key_pages, value_pages, centroids, lengths, table, None, 2)
    tail = (lengths + 7, table, None, 2)
    choice = ops.moba_decode_route(query, centroids, *tail, 4, 3)
    return ops.moba_decode(query, key_pages, value_pages, choice, *tail, 0.5)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", FAR)
def test_far_apart(kind: str, storage: Tensor) -> None:
    """The bits of contiguous pages, whichever of the two lies far away."""
    near = [torch.empty(4, 2, 4, 8, dtype=storage.dtype, device=storage.device) for _ in range(2)]
    expected = decoded(*near)
    strides, offset = FAR[kind]
    for number in range(2):
        pages = list(near)
        pages[number] = storage.as_strided((4, 2, 4, 8), strides, offset + 4096 * number)
        for name, left, right in zip(("out", "lse"), decoded(*pages), expected, strict=True):
            assert_bitwise_equal(name, left, right)

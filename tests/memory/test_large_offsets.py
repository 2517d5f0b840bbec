"""Rows and tokens more than 2^31 elements past the start of a tensor: 32-bit offsets would wrap.

The storage is address space of which only the pages under the rows named are ever touched; gradients are sparse.
"""

import sys

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import assert_bitwise_equal, random_tensor

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
WIDTH = 600
NUM_ROWS = 2**22
# Rows on either side of element 2^31, the first and the last one.
ROWS = [0, 2**31 // WIDTH - 1, 2**31 // WIDTH, 2**31 // WIDTH + 1, 3_700_001, NUM_ROWS - 1]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def storage(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    try:
        return torch.empty(NUM_ROWS * WIDTH, dtype=request.param, device=device)
    except RuntimeError:
        pytest.skip("the system does not lend 5 GiB of untouched memory")


def test_rows_of_a_large_table(storage: Tensor) -> None:
    """The bits of a small table that has just the rows named."""
    dtype, device = storage.dtype, storage.device
    small = random_tensor((len(ROWS), WIDTH), dtype, device, 0).requires_grad_()
    table = storage.view(NUM_ROWS, WIDTH)
    rows = torch.tensor(ROWS, device=device)
    table[rows] = small.detach()
    table.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    small_indices = torch.randint(0, len(ROWS), (9, 7), generator=generator).to(device)
    weights = random_tensor((9, 7), torch.float32, device, 1)
    x, grad_out = (random_tensor((9, WIDTH), dtype, device, seed) for seed in (2, 3))
    results = []
    for values, indices in ((small, small_indices), (table, rows[small_indices])):
        leaves = (values, weights.detach().requires_grad_(), x.detach().requires_grad_())
        out = tg.memory_lookup(values, indices, leaves[1], sparse_grad=True)
        results.append([out, *torch.autograd.grad(out, leaves[:2], grad_out)])
        out = tg.expert_lookup(leaves[2], values, values.detach(), indices, leaves[1], "gelu", sparse_grad=True)
        results[-1] += [out, *torch.autograd.grad(out, leaves, grad_out)]
    table.requires_grad_(False)
    for left, right in zip(*results, strict=True):
        if left.is_sparse:
            assert torch.equal(rows[left.indices()[0]], right.indices()[0])
            left, right = left.values(), right.values()
        assert_bitwise_equal("result", right.detach(), left.detach())


@pytest.mark.parametrize("which", ["x", "grad_out"])
def test_rows_of_tokens_far_apart(which: str, storage: Tensor) -> None:
    """What varies by token is read where it lies, with a stride of 2^28 elements."""
    dtype, device = storage.dtype, storage.device
    values = random_tensor((20, 40), dtype, device, 0).requires_grad_()
    near = random_tensor((9, 40), dtype, device, 1)
    far = storage.as_strided((9, 40), (2**28, 1)).copy_(near)
    assert 8 * 2**28 >= 2**31
    indices = torch.arange(9 * 4, device=device).view(9, 4) % 20
    weights = torch.ones(9, 4, device=device)
    for sparse_grad in (False, True):
        results = []
        for rows in (near, far):
            if which == "x":
                dots = torch.ops.topgather.memory_dot(values, indices, rows, sparse_grad)
                results.append((dots.detach(), torch.autograd.grad(dots.sum(), values)[0].to_dense()))
            else:
                out = tg.memory_lookup(values, indices, weights, sparse_grad)
                results.append((torch.autograd.grad(out, values, rows)[0].to_dense(),))
        for left, right in zip(*results, strict=True):
            assert_bitwise_equal("result", right, left)

"""Elements more than 2^31 past the start of a tensor, of every tensor of every op: 32-bit offsets would wrap.

The storage is address space of which only the pages under the views are ever touched.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.common.ops import REGISTERED, OpCase, every
from tests.common.runs import assert_all_equal

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
PAST = 2**31 + 2**20
MOST_BYTES = 4
MOST_ELEMENTS = 2**14
TENSORS = [
    (case, name) for case in REGISTERED for name in case.tensors() if case.example[name].element_size() <= MOST_BYTES
]


@pytest.fixture
def storage(device: torch.device) -> Tensor:
    """Bytes for any tensor's elements up to 2^31 and some more."""
    try:
        return torch.empty(MOST_BYTES * (PAST + 2**20), dtype=torch.uint8, device=device)
    except RuntimeError:
        pytest.skip("the system does not lend 8 GiB of untouched memory")


def far_views(tensor: Tensor, storage: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers, at a stride or an offset beyond 2^31 elements; the last dimension of several stays as it is.

    Strides are whole multiples of 16 bytes: rows on CUDA are then read where they are, not from an aligned copy.
    """
    elements = storage.view(tensor.dtype)
    near = tensor.contiguous()
    yield "offset", elements.as_strided(tensor.shape, near.stride(), PAST).copy_(tensor)
    for dim, size in enumerate(tensor.shape[:-1] if tensor.ndim > 1 else tensor.shape):
        if size > 1:
            strides = list(near.stride())
            strides[dim] = PAST // (size - 1) // 8 * 8
            assert strides[dim] * (size - 1) > 2**31
            yield f"dimension {dim}", elements.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every(REGISTERED)
def test_all_far_away(case: OpCase, dtype: torch.dtype, storage: Tensor, device: torch.device) -> None:
    """Views of the same bytes, far enough apart to share none."""
    expected = case.everything(case.inputs(dtype, device))
    inputs = case.inputs(dtype, device)
    for number, name in enumerate(name for of, name in TENSORS if of is case):
        elements, tensor = storage.view(inputs[name].dtype), inputs[name]
        offset = PAST + MOST_ELEMENTS * MOST_BYTES // tensor.element_size() * number
        assert tensor.numel() <= MOST_ELEMENTS
        inputs[name] = elements[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert_all_equal(case.everything(inputs), expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "name"), TENSORS, ids=[f"{case}-{name}" for case, name in TENSORS])
def test_far_apart(case: OpCase, name: str, dtype: torch.dtype, storage: Tensor, device: torch.device) -> None:
    """The bits of contiguous tensors, whichever lies far away."""
    expected = case.everything(case.inputs(dtype, device))
    inputs = case.inputs(dtype, device)
    for where, view in far_views(inputs[name], storage):
        found = case.everything({**case.inputs(dtype, device), name: view})
        assert_all_equal(found, expected, f"{name} far apart by {where}")

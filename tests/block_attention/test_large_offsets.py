"""Elements more than 2^31 past the start of a tensor: 32-bit offsets would wrap.

The storage is 9 GiB of address space of which only the few pages under the views are ever touched.
"""

import sys

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    AttentionCase,
    assert_attention_close,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.common.tensors import assert_bitwise_equal

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that is not touched"),
    pytest.mark.unchecked,
]
PAST = 2**31 + 2**20
# Whole multiples of 16 bytes: rows on CUDA are then read where they are, not from an aligned copy.
TOKEN_STRIDE = PAST // 38 // 8 * 8
NUM_ELEMENTS = 2 * PAST + 2**20
CASE = AttentionCase(batch=2, num_heads=2, query_len=40, head_dim=16, block_size=8, top_k=2)
SHAPE = (2, 2, 40, 16)
STRIDES = {
    "batch": (PAST, 40 * 16, 16, 1),
    "head": (2 * 40 * 16, PAST, 16, 1),
    "token": (16, 32, TOKEN_STRIDE, 1),
    "storage_offset": (2 * 40 * 16, 40 * 16, 16, 1),
}


@pytest.fixture(scope="module")
def storages() -> dict[tuple[str, torch.dtype], Tensor]:
    """What the tests of this file have in common, by device and dtype."""
    return {}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def storage(
    request: pytest.FixtureRequest, device: torch.device, storages: dict[tuple[str, torch.dtype], Tensor]
) -> Tensor:
    place = (device.type, request.param)
    try:
        if place not in storages:
            storages.clear()
            storages[place] = torch.empty(NUM_ELEMENTS, dtype=request.param, device=device)
        return storages[place]
    except RuntimeError:
        pytest.skip("the system does not lend 9 GiB of untouched memory")


def spread(tensor: Tensor, storage: Tensor, kind: str, shift: int) -> Tensor:
    """The same values at strides or an offset beyond 2^31 elements."""
    offset = shift + (PAST if kind == "storage_offset" else 0)
    view = storage.as_strided(SHAPE, STRIDES[kind], offset)
    view.copy_(tensor)
    largest = offset + sum((size - 1) * stride for size, stride in zip(SHAPE, STRIDES[kind], strict=True))
    assert largest > 2**31
    return view


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_out", "all"])
@pytest.mark.parametrize("kind", STRIDES)
def test_attention(kind: str, which: str, storage: Tensor) -> None:
    plain = make_inputs(CASE, storage.dtype, storage.device)
    grad_out, grad_lse = make_gradients(CASE, storage.dtype, storage.device, 0)
    expected = run_attention(*plain, grad_out, grad_lse, CASE)
    block_indices = tg.moba_route(plain[0], plain[1], CASE.block_size, CASE.top_k).block_indices
    assert_attention_close(expected, plain, (grad_out, grad_lse), block_indices, CASE)

    # Views of the same storage, 4096 elements apart so that they share no element.
    moved = {}
    for shift, (name, tensor) in enumerate(zip(("query", "key", "value", "grad_out"), (*plain, grad_out), strict=True)):
        is_moved = which in (name, "all")
        moved[name] = spread(tensor.detach(), storage, kind, 4096 * shift) if is_moved else tensor.detach()
    inputs = [moved[name].requires_grad_() for name in ("query", "key", "value")]
    result = run_attention(inputs[0], inputs[1], inputs[2], moved["grad_out"], grad_lse, CASE)
    for name, tensor in result.tensors().items():
        assert_bitwise_equal(name, tensor, expected.tensors()[name])
    for tensor in inputs:
        tensor.requires_grad_(False)


@pytest.mark.parametrize("kind", STRIDES)
def test_routing_and_centroids(kind: str, storage: Tensor) -> None:
    query, key, _ = (tensor.detach() for tensor in make_inputs(CASE, storage.dtype, storage.device))
    far_query, far_key = spread(query, storage, kind, 0), spread(key, storage, kind, 4096)
    routing = tg.moba_route(query, key, CASE.block_size, CASE.top_k)
    for pair in ((far_query, key), (query, far_key), (far_query, far_key)):
        chosen = tg.moba_route(*pair, CASE.block_size, CASE.top_k)
        assert_bitwise_equal("block_indices", chosen.block_indices, routing.block_indices)
    assert_bitwise_equal("centroids", tg.block_centroids(far_key, 8), tg.block_centroids(key, 8))


def test_varlen_token_stride(storage: Tensor) -> None:
    """Packed tokens 2^26 elements apart."""
    plain = [torch.randn(40, heads, 16, device=storage.device).to(storage.dtype) for heads in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, 13, 40], dtype=torch.int32, device=storage.device)
    arguments = (cu_seqlens, cu_seqlens, 27, 27, 8, 2)
    far = []
    for shift, tensor in enumerate(plain):
        view = storage.as_strided(tensor.shape, (TOKEN_STRIDE, 16, 1), 4096 * shift)
        far.append(view.copy_(tensor))
    assert_bitwise_equal(
        "out", tg.moba_attention_varlen(*far, *arguments), tg.moba_attention_varlen(*plain, *arguments)
    )

"""Block centroids: values, the short last block, gradients, layouts, edges."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import LAYOUTS, with_layout
from tests.common.tensors import DTYPES, assert_bitwise_equal, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference

pytestmark = pytest.mark.sanitize


def centroid_magnitude(key: Tensor, block_size: int) -> Tensor:
    """Root sum of squares of the terms of each centroid."""
    blocks = key.detach().double().split(block_size, dim=2)
    return torch.stack([block.square().sum(dim=2).sqrt() / block.shape[2] for block in blocks], dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16, 100, 128, 512])
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 256])
def test_values_and_gradients(block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    key = random_tensor((2, 3, 300, head_dim), dtype, device, 0).requires_grad_()
    centroids = tg.block_centroids(key, block_size)
    expected_key = key.detach().double().requires_grad_()
    expected = reference.block_centroids(expected_key, block_size)
    assert centroids.dtype == accumulation_dtype(dtype)
    forward = TOLERANCES["block_centroids", "forward"]
    magnitude = centroid_magnitude(key, block_size)
    assert_close("centroids", centroids.detach(), expected.detach(), magnitude, forward, dtype, block_size)

    grad = random_tensor(tuple(centroids.shape), centroids.dtype, device, 1)
    (d_key,) = torch.autograd.grad(centroids, key, grad)
    (expected_d_key,) = torch.autograd.grad(expected, expected_key, grad.double())
    assert d_key.dtype == dtype
    backward = TOLERANCES["block_centroids", "backward"]
    assert_close("d_key", d_key, expected_d_key, torch.zeros_like(expected_d_key), backward, dtype, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    key = with_layout(random_tensor((2, 3, 37, 20), dtype, device, 0), layout)
    assert_bitwise_equal(layout, tg.block_centroids(key, 8), tg.block_centroids(key.contiguous(), 8))


def test_short_last_block_is_the_mean_of_its_own_tokens(device: torch.device) -> None:
    key = torch.arange(7, dtype=torch.float32, device=device).reshape(1, 1, 7, 1)
    assert tg.block_centroids(key, 4).flatten().tolist() == [1.5, 5.0]
    assert tg.block_centroids(key, 100).flatten().tolist() == [3.0]
    assert torch.equal(tg.block_centroids(key, 1), key)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    key = torch.empty(shape, device=device, requires_grad=True)
    centroids = tg.block_centroids(key, 2)
    assert centroids.shape == (shape[0], shape[1], -(-shape[2] // 2), shape[3])
    (d_key,) = torch.autograd.grad(centroids.sum(), key)
    assert d_key.shape == shape


def test_nan_and_inf_stay_in_their_block(device: torch.device) -> None:
    key = torch.ones(1, 1, 12, 2, device=device)
    key[0, 0, 1, 0], key[0, 0, 5, 1], key[0, 0, 8, 0], key[0, 0, 9, 0] = (
        float("nan"),
        float("inf"),
        float("inf"),
        -float("inf"),
    )
    expected = torch.tensor([[float("nan"), 1.0], [1.0, float("inf")], [float("nan"), 1.0]], device=device)
    torch.testing.assert_close(tg.block_centroids(key, 4)[0, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_half_precision_sums_do_not_overflow(device: torch.device) -> None:
    key = torch.full((1, 1, 64, 4), 60000.0, dtype=torch.float16, device=device)
    assert torch.equal(tg.block_centroids(key, 64), torch.full((1, 1, 1, 4), 60000.0, device=device).to(torch.float32))

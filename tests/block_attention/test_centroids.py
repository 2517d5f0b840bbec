"""Block centroids: values, the short last block, gradients, layouts, edges."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import LAYOUTS, with_layout
from tests.common import tensors
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


# --- packed sequences -------------------------------------------------------------------------------------------------

LENGTHS = [(5, 0, 9, 1, 1, 30, 2, 0), (40, 3), (64, 64, 128), (0, 0), (), (1,) * 40]


def make_packed(
    lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device, head_dim: int = 20
) -> tuple[Tensor, Tensor, int]:
    """Keys, a leaf that requires grad, boundaries, and the longest sequence."""
    key = random_tensor((sum(lengths), 3, head_dim), dtype, device, 0).requires_grad_()
    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return key, bounds, max(lengths, default=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_equals_each_sequence_alone(
    lengths: tuple[int, ...], block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The bits, and zeros past a sequence's last block; gradients likewise."""
    key, bounds, longest = make_packed(lengths, dtype, device)
    max_seqlen = longest + 9
    centroids = tg.block_centroids(key, block_size, bounds, max_seqlen)
    assert centroids.shape == (len(lengths), 3, -(-max_seqlen // block_size), 20)
    assert centroids.dtype == accumulation_dtype(dtype)
    expected = reference.block_centroids(key, block_size, bounds, max_seqlen)
    torch.testing.assert_close(centroids.double(), expected, rtol=1e-5, atol=1e-5)
    grad = random_tensor(tuple(centroids.shape), centroids.dtype, device, 1)
    (d_key,) = torch.autograd.grad(centroids, key, grad)
    assert d_key.dtype == dtype and d_key.shape == key.shape
    first = 0
    for sequence, length in enumerate(lengths):
        part = slice(first, first + length)
        alone = key.detach()[part].transpose(0, 1)[None].requires_grad_()
        wanted = tg.block_centroids(alone, block_size)
        num_blocks = wanted.shape[2]
        assert_bitwise_equal(f"sequence {sequence}", centroids[sequence, :, :num_blocks].detach(), wanted[0].detach())
        assert (centroids[sequence, :, num_blocks:] == 0).all()
        (wanted_grad,) = torch.autograd.grad(wanted, alone, grad[sequence, :, :num_blocks][None])
        assert_bitwise_equal(f"d_key {sequence}", d_key[part], wanted_grad[0].transpose(0, 1))
        first += length


@pytest.mark.parametrize("layout", ["offset", "padded", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_layouts(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    key, bounds, longest = make_packed(LENGTHS[0], dtype, device)
    strided = tensors.with_layout(key.detach(), layout)
    for boundaries in (bounds, bounds.long(), bounds.repeat_interleave(2)[::2]):
        found = tg.block_centroids(strided, 4, boundaries, longest)
        assert_bitwise_equal(layout, found, tg.block_centroids(key.detach(), 4, bounds, longest))


@pytest.mark.parametrize("lengths", [LENGTHS[0], LENGTHS[2]], ids=str)
def test_packed_numbers_are_those_of_the_choice(lengths: tuple[int, ...], device: torch.device) -> None:
    """Scores of packed centroids choose what ``moba_route_varlen`` does."""
    key, bounds, longest = make_packed(lengths, torch.float32, device)
    key = key.detach()
    query = random_tensor((sum(lengths), 3, 20), torch.float32, device, 5)
    routing = tg.moba_route_varlen(query, key, bounds, bounds, longest, longest, 4, 1, is_causal=False)
    centroids = tg.block_centroids(key, 4, bounds, longest)
    first = 0
    for sequence, length in enumerate(lengths):
        part = slice(first, first + length)
        scores = torch.einsum("qhd,hbd->hqb", query[part], centroids[sequence, :, : -(-length // 4)])
        if length:
            assert torch.equal(scores.argmax(-1), routing.block_indices[:, part, 0].long())
        first += length


def test_packed_gradcheck() -> None:
    key, bounds, longest = make_packed((3, 0, 5), torch.float64, torch.device("cpu"), head_dim=2)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}

    def centroids(key: Tensor) -> Tensor:
        return tg.block_centroids(key, 2, bounds, longest)

    assert torch.autograd.gradcheck(centroids, (key,), **modes)
    assert torch.autograd.gradgradcheck(centroids, (key,))


def test_packed_arguments_that_are_wrong(device: torch.device, device_kind: str) -> None:
    key, bounds, longest = make_packed((5, 9), torch.float32, device)
    wrong_calls: list[tuple[str, type[Exception], tuple[object, ...]]] = [
        ("key", ValueError, (key[None], 4, bounds, longest)),
        ("key", ValueError, (key, 4)),
        ("max_seqlen", ValueError, (key[None], 4, None, longest)),
        ("max_seqlen", TypeError, (key, 4, bounds)),
        ("max_seqlen", ValueError, (key, 4, bounds, -1)),
        ("max_seqlen", ValueError, (key, 4, bounds, 2**31 - 1)),
        ("max_seqlen", TypeError, (key, 4, bounds, 9.0)),
        ("cu_seqlens", TypeError, (key, 4, [0, 5, 14], longest)),
        ("cu_seqlens", TypeError, (key, 4, bounds.float(), longest)),
        ("cu_seqlens", ValueError, (key, 4, bounds[None], longest)),
        ("cu_seqlens", ValueError, (key, 4, bounds[:0], longest)),
        ("block_size", ValueError, (key, 0, bounds, longest)),
    ]
    if device_kind == "cpu":
        wrong_calls += [
            ("cu_seqlens", ValueError, (key, 4, bounds + 1, longest)),
            ("cu_seqlens", ValueError, (key, 4, bounds[:2], longest)),
            ("cu_seqlens", ValueError, (key, 4, bounds[[0, 2, 1, 2]], 14)),
            ("max_seqlen", ValueError, (key, 4, bounds, longest - 1)),
        ]
    for name, exception, arguments in wrong_calls:
        with pytest.raises(exception, match=name):
            tg.block_centroids(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [[0, 9, 5, 14], [3, 9, 20], [-4, 5, 100], [2**40, 0, 9], [0, 14, 14, 2]], ids=str)
@pytest.mark.parametrize("max_seqlen", [0, 3, 14])
def test_wrong_boundaries_on_cuda_lead_nowhere(bounds: list[int], max_seqlen: int, cuda_device: torch.device) -> None:
    """Whatever stands there: no access outside, no number that is not a mean of keys."""
    key = torch.ones(14, 2, 8, device=cuda_device, requires_grad=True)
    centroids = tg.block_centroids(key, 4, torch.tensor(bounds, device=cuda_device), max_seqlen)
    assert ((centroids == 0) | (centroids == 1)).all()
    (d_key,) = torch.autograd.grad(centroids.sum(), key)
    assert d_key.isfinite().all()

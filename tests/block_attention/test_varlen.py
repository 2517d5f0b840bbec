"""Packed sequences: every result equals the dense problem of each sequence alone."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import Packed, assert_routing_contract
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal

pytestmark = pytest.mark.sanitize

LENGTHS = {
    "equal": ([40, 40, 40], [40, 40, 40]),
    "ragged": ([3, 77, 1, 20], [3, 77, 1, 20]),
    "empty_sequences": ([0, 50, 0, 0, 17, 0], [0, 50, 0, 0, 17, 0]),
    "empty_queries": ([0, 20, 5], [30, 20, 5]),
    "empty_keys": ([12, 20], [0, 20]),
    "more_keys": ([10, 1, 40], [90, 65, 41]),
    "more_queries": ([90, 65], [10, 1]),
    "one": ([70], [70]),
    "all_empty": ([0, 0], [0, 0]),
    "no_sequences": ([], []),
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("block_size", "top_k"), [(8, 3), (13, 2), (128, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_each_sequence_alone(
    lengths: tuple[list[int], list[int]],
    block_size: int,
    top_k: int,
    is_causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    packed = Packed(lengths, dtype, device)
    routing = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, block_size, top_k, is_causal)
    assert (routing.block_size, routing.top_k) == (block_size, top_k)
    assert routing.block_indices.shape == (4, packed.query.shape[0], top_k)
    for seq_idx in range(len(packed.lengths_q)):
        query, key = packed.tokens(packed.query, seq_idx), packed.tokens(packed.key, seq_idx, of_key=True)
        indices = packed.columns(routing.block_indices, seq_idx)
        assert_routing_contract(indices, query, key, block_size, top_k, is_causal)
    result = packed.run(block_size, top_k, is_causal)
    packed.check(result, routing.block_indices, block_size, top_k, is_causal)

    reused = packed.run(block_size, None, is_causal, routing)
    for name, tensor in reused.tensors().items():
        assert_bitwise_equal(name, tensor, result.tensors()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_enough_to_be_split(dtype: torch.dtype, device: torch.device) -> None:
    """A kernel works on more than a thousand queries in several pieces, of one sequence only."""
    lengths = ([5, 1300, 0, 30], [5, 1100, 3, 40])
    packed = Packed(lengths, dtype, device, num_heads=2, num_kv_heads=1, head_dim=4, value_dim=3)
    block_indices = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 300, 3).block_indices
    packed.check(packed.run(300, 3, True), block_indices, 300, 3, True)


@pytest.mark.usefixtures("deterministic")
def test_sequences_do_not_leak_into_each_other(device: torch.device) -> None:
    """NaN and inf all over one sequence leave its neighbours' bits as they were."""
    packed = Packed(([30, 41, 22], [30, 41, 22]), torch.float32, device)
    clean = packed.run(8, 3, True)
    with torch.no_grad():
        packed.query[30:71] = float("nan")
        packed.key[30:71] = float("inf")
        packed.value[30:71] = float("nan")
    planted = packed.run(8, 3, True)
    for name, tensor in planted.tensors().items():
        for part in (slice(0, 30), slice(71, 93)):
            where = (slice(None), part) if name == "lse" else (part,)
            assert_bitwise_equal(name, tensor[where], clean.tensors()[name][where])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_cu_seqlens_dtypes_and_loose_maxima(cu_dtype: torch.dtype, device: torch.device) -> None:
    """int32 and int64 give the same bits, and so do larger max_seqlen values than needed."""
    lengths = ([20, 45], [33, 45])
    expected = Packed(lengths, torch.float32, device).run(8, 3, True)
    packed = Packed(lengths, torch.float32, device, cu_dtype=cu_dtype)
    packed.cu_seqlens = (*packed.cu_seqlens[:2], 1000, 1000)
    for name, tensor in packed.run(8, 3, True).tensors().items():
        assert_bitwise_equal(name, tensor, expected.tensors()[name])


@pytest.mark.usefixtures("deterministic")
def test_views_of_a_fused_projection(device: torch.device) -> None:
    """query, key and value cut from one ``[total, Hq + 2 * Hkv, D]`` tensor give the bits of their copies."""
    lengths = ([25, 40], [25, 40])
    packed = Packed(lengths, torch.float32, device, value_dim=16)
    expected = packed.run(8, 3, True)
    fused = torch.cat([packed.query, packed.key, packed.value], dim=1).detach()
    packed.query, packed.key, packed.value = (part.requires_grad_() for part in fused.split([4, 2, 2], dim=1))
    assert not packed.key.is_contiguous()
    for name, tensor in packed.run(8, 3, True).tensors().items():
        assert_bitwise_equal(name, tensor, expected.tensors()[name])


def test_users_own_routing(device: torch.device, device_kind: str) -> None:
    """Block numbers count from each sequence's start, in any order, with -1 anywhere."""
    packed = Packed(([30, 50], [30, 50]), widest_dtype(device_kind), device)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for length in packed.lengths_k:
        num_blocks = -(-length // 8)
        order = torch.rand(4, length, num_blocks, generator=generator).argsort(dim=-1)[..., :4]
        parts.append(torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order))
    block_indices = torch.cat(parts, dim=1).to(torch.int32).to(device)
    for is_causal in (True, False):
        result = packed.run(8, None, is_causal, tg.BlockRouting(block_indices, 8))
        packed.check(result, block_indices, 8, 4, is_causal)


def test_many_short_sequences_beside_a_long_one(device: torch.device) -> None:
    """Memory goes with the number of tokens, not with sequences times the longest of them."""
    num_short, length = 10_000, 32_768
    inputs = [torch.randn(num_short + length, heads, 4, device=device, requires_grad=True) for heads in (4, 2, 2)]
    cu_seqlens = torch.arange(num_short + 2, dtype=torch.int32, device=device)
    cu_seqlens[-1] = num_short + length
    out = tg.moba_attention_varlen(*inputs, cu_seqlens, cu_seqlens, length, length, block_size=32, top_k=8)
    gradients = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(out[:num_short], inputs[2][:num_short].repeat_interleave(2, dim=1))

    alone = [tensor[num_short:].detach().transpose(0, 1)[None].requires_grad_() for tensor in inputs]
    expected = tg.moba_attention(*alone, block_size=32, top_k=8)
    torch.testing.assert_close(out[num_short:].transpose(0, 1)[None], expected)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected.sum(), alone), strict=True):
        torch.testing.assert_close(actual[num_short:].transpose(0, 1)[None], wanted, rtol=1e-4, atol=1e-4)


def test_scale_and_single_result(device: torch.device) -> None:
    packed = Packed(([30], [30]), torch.float32, device)
    arguments = (packed.query, packed.key, packed.value, *packed.cu_seqlens)
    out = tg.moba_attention_varlen(*arguments, block_size=8, top_k=2, scale=-0.5)
    assert isinstance(out, Tensor)
    dense = [packed.tokens(tensor, 0) for tensor in (packed.query, packed.key, packed.value)]
    expected = tg.moba_attention(*dense, block_size=8, top_k=2, scale=-0.5)
    torch.testing.assert_close(packed.tokens(out, 0), expected, rtol=1e-5, atol=1e-5)

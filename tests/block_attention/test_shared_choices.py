"""Choices that query heads share: those of a key head, or all of them. Nothing is expanded, and nothing changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    AttentionCase,
    AttentionResult,
    Packed,
    assert_attention_close,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.decoding.helpers import DecodeCase, filled_cache
from topgather import reference

pytestmark = pytest.mark.sanitize

# Groups of two and of three, one key head, and long enough to be split into several pieces.
CASES = [
    AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=75, head_dim=24, top_k=3),
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=37, key_len=90, block_size=9, top_k=4),
    AttentionCase(batch=2, num_heads=3, num_kv_heads=1, query_len=60, is_causal=False, top_k=2),
    AttentionCase(num_heads=4, num_kv_heads=2, query_len=1100, head_dim=4, block_size=128, top_k=2),
    AttentionCase(num_heads=4, num_kv_heads=2, query_len=90, block_size=2, top_k=40, head_dim=8),
]


def draw_choice(leading: tuple[int, ...], num_blocks: int, top_k: int, device: torch.device) -> Tensor:
    """Blocks in any order, unused slots anywhere."""
    generator = torch.Generator().manual_seed(7)
    block_indices = torch.rand((*leading, num_blocks), generator=generator).argsort(dim=-1)[..., :top_k].int()
    block_indices[torch.rand(block_indices.shape, generator=generator) < 0.2] = -1
    return block_indices.to(device)


def expanded(block_indices: Tensor, num_heads: int) -> Tensor:
    return block_indices.repeat_interleave(num_heads // block_indices.shape[-3], dim=-3)


def assert_same_bits(actual: AttentionResult, expected: AttentionResult) -> None:
    for name, tensor in actual.tensors().items():
        assert_bitwise_equal(name, tensor, expected.tensors()[name])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_expanded_choices(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
    inputs, gradients = make_inputs(case, dtype, device), make_gradients(case, dtype, device, 0)
    for num_choice_heads in sorted({case.kv_heads, 1}):
        leading = (case.batch, num_choice_heads, case.query_len)
        shared = draw_choice(leading, case.num_blocks, case.top_k, device)
        routing = tg.BlockRouting(shared, case.block_size)
        actual = run_attention(*inputs, *gradients, case, routing)
        alone = tg.BlockRouting(expanded(shared, case.num_heads), case.block_size)
        assert_same_bits(actual, run_attention(*inputs, *gradients, case, alone))
        assert_attention_close(actual, inputs, gradients, alone.block_indices, case)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(dtype: torch.dtype, device: torch.device) -> None:
    packed = Packed(([30, 0, 50], [30, 4, 50]), dtype, device)
    for num_choice_heads in (2, 1):
        shared = draw_choice((num_choice_heads, 80), 4, 3, device)
        shared[:, :30] = draw_choice((num_choice_heads, 30), 3, 3, device)
        alone = expanded(shared, 4)
        actual = packed.run(13, None, True, tg.BlockRouting(shared, 13))
        assert_same_bits(actual, packed.run(13, None, True, tg.BlockRouting(alone, 13)))
        packed.check(actual, alone, 13, 3, True)


@pytest.mark.parametrize("num_choice_heads", [2, 1])
def test_strides_of_a_choice(num_choice_heads: int, device: torch.device) -> None:
    """As an indexer gives it, heads beside each other in a token's row, or one token's choice for all."""
    case = CASES[0]
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.float32, device))
    rows = draw_choice((2, case.query_len, num_choice_heads), case.num_blocks, 3, device)
    for view in (rows.transpose(1, 2), rows[:, :1].expand(rows.shape).transpose(1, 2)):
        assert not view.is_contiguous() or num_choice_heads == 1
        routings = (tg.BlockRouting(choice, case.block_size) for choice in (view, expanded(view, 4)))
        actual, expected = (tg.moba_attention(query, key, value, case.block_size, routing=each) for each in routings)
        assert_bitwise_equal("out", actual, expected)


def test_the_reference_shares_too(device_kind: str, device: torch.device) -> None:
    case = CASES[0]
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    shared = draw_choice((2, 2, case.query_len), case.num_blocks, 3, device)
    actual, expected = (
        reference.moba_attention(*inputs, choice, case.block_size) for choice in (shared, expanded(shared, 4))
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("num_choice_heads", [2, 1])
def test_nothing_expanded_is_kept(num_choice_heads: int, device: torch.device) -> None:
    case = CASES[0]
    shared = draw_choice((2, num_choice_heads, case.query_len), case.num_blocks, 3, device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routing = tg.BlockRouting(shared, case.block_size)
        tg.moba_attention(*make_inputs(case, torch.float32, device), case.block_size, routing=routing)
    assert [tensor.shape for tensor in kept if tensor.dtype == torch.int32] == [shared.shape]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, 1, 1, 1), (0, None, None, 0), (0, 0, 0, None)], ids=str)
def test_vmap(in_dims: tuple[int | None, ...], device: torch.device) -> None:
    case = replace(CASES[0], query_len=40)
    tensors = []
    for dim, tensor in zip(in_dims, make_inputs(case, torch.float32, device), strict=False):
        tensor = tensor.detach()
        tensors.append(tensor if dim is None else torch.stack([tensor, tensor.flip(0), tensor.flip(2)], dim))
    choice = draw_choice((3, 2, 2, 40), case.num_blocks, 3, device)
    tensors.append(choice[0] if in_dims[3] is None else choice.movedim(0, in_dims[3]))

    def attend(query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor) -> Tensor:
        routing = tg.BlockRouting(block_indices, case.block_size)
        return tg.moba_attention(query, key, value, case.block_size, routing=routing)

    mapped = torch.vmap(attend, in_dims)(*tensors)
    for index in range(3):
        one = [each if dim is None else each.select(dim, index) for dim, each in zip(in_dims, tensors, strict=True)]
        assert_bitwise_equal("out", mapped[index], attend(*one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize("steps", [((21, 9), (3, 2)), ((7, 7), (66, 66)), ((40, 3), (1, 1))], ids=str)
def test_decoding(steps: tuple[tuple[int, ...], ...], pages: int, dtype: torch.dtype, device: torch.device) -> None:
    """A few new tokens, and a prefill, which goes the way of moba_attention where the cache is contiguous."""
    case = DecodeCase(steps, num_heads=6, num_kv_heads=2, head_dim=8, pages=pages)
    cache = filled_cache(case, dtype, device)[0]
    most = max(steps[-1])
    query = random_tensor((2, 6, most, 8), dtype, device, 5)
    counts = torch.tensor(steps[-1], dtype=torch.int32, device=device)
    for num_choice_heads in (2, 1):
        shared = draw_choice((2, num_choice_heads, most), min(-(-length // 8) for length in case.lengths), 2, device)
        arguments: dict[str, Any] = {"query": query, "cache": cache, "num_tokens": counts, "return_lse": True}
        actual = tg.moba_decode(**arguments, routing=tg.BlockRouting(shared, 8))
        expected = tg.moba_decode(**arguments, routing=tg.BlockRouting(expanded(shared, 6), 8))
        for name, left, right in zip(("out", "lse"), actual, expected, strict=True):
            assert_bitwise_equal(name, left, right)


@pytest.mark.parametrize("num_choice_heads", [2, 3, 6, 16])
def test_other_heads_are_refused(num_choice_heads: int, device: torch.device) -> None:
    """A divisor that is neither of query, nor of key, nor 1 is more likely a mistake than meant."""
    case = AttentionCase(num_heads=8, num_kv_heads=4, query_len=20)
    query, key, value = make_inputs(case, torch.float32, device)
    choice = torch.zeros(1, num_choice_heads, 20, 1, dtype=torch.int32, device=device)
    message = rf"block_indices must have shape .* query \(8\), those of key \(4\) or 1, got \(1, {num_choice_heads}, "
    with pytest.raises(ValueError, match=message):
        tg.moba_attention(query, key, value, 16, routing=tg.BlockRouting(choice, 16))
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = torch.tensor([0, 20], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message.replace(r"\(1, ", r"\(")):
        tg.moba_attention_varlen(*packed, bounds, bounds, 20, 20, 16, routing=tg.BlockRouting(choice[0], 16))
    cache = tg.MobaCache(1, 4, 16, block_size=16, max_seq_len=20, device=device)
    with torch.no_grad():
        cache.append(key, value)
        with pytest.raises(ValueError, match=message):
            tg.moba_decode(query, cache, routing=tg.BlockRouting(choice, 16))


@pytest.mark.parametrize("num_choice_heads", [2, 1])
def test_faults_of_a_shared_choice(num_choice_heads: int) -> None:
    """Found, and named by the first query head that goes by it."""
    query, key, value = make_inputs(AttentionCase(num_heads=4, num_kv_heads=2, query_len=40), torch.float32, CPU)
    choice = torch.zeros(1, num_choice_heads, 40, 2, dtype=torch.int32)
    choice[..., 1] = -1
    choice[0, -1, 33, 1] = 3
    head = 4 - 4 // num_choice_heads
    with pytest.raises(IndexError, match=rf"block_indices holds 3 at query head {head}, query 33"):
        tg.moba_attention(query, key, value, 16, routing=tg.BlockRouting(choice, 16))
    choice[0, -1, 33, 1] = 0
    with pytest.raises(ValueError, match=rf"block_indices names block 0 more than once at query head {head}, query 33"):
        tg.moba_attention(query, key, value, 16, routing=tg.BlockRouting(choice, 16))


CPU = torch.device("cpu")


def shared_choice_case() -> None:
    """For ``planted_bugs.py``: a choice for each key head."""
    test_the_bits_of_expanded_choices(CASES[0], torch.bfloat16, CPU)

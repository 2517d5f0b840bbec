"""A top_k of more blocks than there are is the same as all, and so is None: the same bits, time and memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_inputs
from tests.common.tensors import assert_bitwise_equal
from topgather import compat, nn

# Beyond any memory, were there a slot for each.
HUGE = 2**31 - 1
NUM_BLOCKS = 5
CASE = AttentionCase(num_heads=4, num_kv_heads=2, query_len=70, block_size=16)
ABOVE = (NUM_BLOCKS + 1, 4096, HUGE, None)


def heads(device: torch.device, is_packed: bool = False) -> list[Tensor]:
    tensors = [tensor.detach() for tensor in make_inputs(CASE, torch.float32, device)]
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors] if is_packed else tensors


def attend(device: torch.device, top_k: int | None, is_packed: bool, is_causal: bool) -> list[Tensor]:
    """Output, lse and gradients."""
    leaves = [tensor.requires_grad_() for tensor in heads(device, is_packed)]
    options: dict[str, Any] = {"is_causal": is_causal, "return_lse": True, "deterministic": True}
    if is_packed:
        bounds = torch.tensor([0, 70], device=device)
        out, lse = tg.moba_attention_varlen(*leaves, bounds, bounds, HUGE, HUGE, 16, top_k, **options)
    else:
        out, lse = tg.moba_attention(*leaves, 16, top_k, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("is_packed", [False, True])
def test_more_than_all_blocks_are_all(is_packed: bool, is_causal: bool, device: torch.device) -> None:
    expected = attend(device, NUM_BLOCKS, is_packed, is_causal)
    for top_k in ABOVE:
        for number, tensor in enumerate(attend(device, top_k, is_packed, is_causal)):
            assert_bitwise_equal(f"top_k {top_k}, result {number}", tensor, expected[number])


def test_none_is_dense_attention(device: torch.device) -> None:
    query, key, value = heads(device)
    out = tg.moba_attention(query, key, value, 16)
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [None, HUGE])
def test_no_keys_at_all(top_k: int | None, device: torch.device) -> None:
    query, key, value = heads(device)
    out = tg.moba_attention(query, key[:, :, :0], value[:, :, :0], 16, top_k)
    assert (out == 0).all()


def test_a_choice_has_a_slot_for_each_of_top_k(device: torch.device) -> None:
    """Padded by -1, as long as that can be held."""
    query, key, value = heads(device)
    routing = tg.moba_route(query, key, 16, 300)
    assert routing.top_k == 300 and (routing.block_indices[..., NUM_BLOCKS:] == -1).all()
    expected = tg.moba_attention(query, key, value, 16, NUM_BLOCKS)
    assert_bitwise_equal("out", tg.moba_attention(query, key, value, 16, 300, routing=routing), expected)


@pytest.mark.parametrize("top_k", [2**28, HUGE])
def test_a_choice_of_nothing_but_padding_is_refused(top_k: int, device: torch.device) -> None:
    query, key, _ = heads(device)
    with pytest.raises(ValueError, match=f"top_k must be at most {NUM_BLOCKS}.*got {top_k}"):
        tg.moba_route(query, key, 16, top_k)
    with pytest.raises(ValueError, match=f"top_k must be at most {NUM_BLOCKS}.*got {top_k}"):
        torch.ops.topgather.moba_route(query, key, 16, top_k, True)
    query, key, _ = heads(device, is_packed=True)
    bounds = torch.tensor([0, 70], device=device)
    with pytest.raises(ValueError, match=f"top_k must be at most {NUM_BLOCKS}.*got {top_k}"):
        tg.moba_route_varlen(query, key, bounds, bounds, 70, 70, 16, top_k)


def test_a_choice_in_a_cache_of_nothing_but_padding_is_refused() -> None:
    query, key, value = heads(torch.device("cpu"))
    for kind in (tg.MobaCache, tg.PagedMobaCache):
        cache = kind(CASE.batch, 2, CASE.head_dim, block_size=16, max_seq_len=80)
        cache.append(key, value)
        last = query[:, :, -1:].contiguous()
        expected = tg.moba_decode(last, cache, NUM_BLOCKS)
        assert_bitwise_equal("out", tg.moba_decode(last, cache, HUGE), expected)
        places = (cache.seq_lens, cache.page_table, None, 16, cache.page_size)
        with pytest.raises(ValueError, match=f"top_k must be at most {NUM_BLOCKS}"):
            torch.ops.topgather.moba_decode_route(last, cache.centroids, *places, HUGE)


def test_layers_and_compat_take_any_top_k() -> None:
    torch.manual_seed(0)
    layer = nn.MobaAttention(16, 2, block_size=8, top_k=4)
    x = torch.randn(2, 32, 16)
    expected = layer(x)
    layer.top_k = HUGE
    assert_bitwise_equal("layer", layer(x), expected)
    query, key, value = (tensor.detach() for tensor in heads(torch.device("cpu"), is_packed=True))
    bounds = torch.tensor([0, 70], dtype=torch.int32)
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    outs = [compat.moba_attn_varlen(query, key, value, bounds, 70, 16, top_k) for top_k in (NUM_BLOCKS, HUGE)]
    assert_bitwise_equal("compat", outs[1], outs[0])


@pytest.mark.parametrize("top_k", [3, HUGE, None])
def test_lengths_beyond_and_below_top_k_share_a_graph(top_k: int | None) -> None:
    """Whether there are more blocks than top_k is no guard."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *inputs: tg.moba_attention(*inputs, 16, top_k), backend=counter, dynamic=True, fullgraph=True
    )
    for length in (20, 40, 70, 100, 200):
        inputs = [torch.randn(2, 2, length, 8) for _ in range(3)]
        torch.testing.assert_close(compiled(*inputs), tg.moba_attention(*inputs, 16, top_k))
    assert counter.frame_count == 1


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_a_compiled_number_is_traced_once(option: str) -> None:
    """Whether it is finite is asked when the graph runs: to ask while tracing would trace it twice, or break it."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda inputs, number: tg.moba_attention(*inputs, 16, 2, **{option: number}),
        backend=counter,
        dynamic=True,
        fullgraph=True,
    )
    inputs = [torch.randn(2, 2, 40, 8) for _ in range(3)]
    torch.testing.assert_close(compiled(inputs, 1.5), tg.moba_attention(*inputs, 16, 2, **{option: 1.5}))
    assert counter.frame_count == 1
    for wrong in (float("nan"), float("inf")):
        # Older Dynamos take infinities and NaN for constants, and wrap what the op says of them in an error of theirs.
        is_old = torch.__version__ < (2, 13)
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError if is_old else ValueError, match=option):
            compiled(inputs, wrong)

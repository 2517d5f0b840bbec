"""The published packages' signatures, on top of the varlen op."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal

BOUNDARIES = [0, 40, 40, 75]


def packed(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    tensors = [torch.randn(75, heads, 16, device=device).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    return tensors, torch.tensor(BOUNDARIES, dtype=torch.int32, device=device)


def assert_same_call(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """The same bits, forward and backward."""
    assert_bitwise_equal("out", actual.detach(), expected.detach())
    gradients = torch.autograd.grad(actual.sum(), inputs, retain_graph=True)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs, retain_graph=True)
    for left, right in zip(gradients, expected_gradients, strict=True):
        assert_bitwise_equal("gradient", left, right)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_flash_moba_varlen_func(causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs, cu_seqlens = packed(dtype, device)
    arguments = (*inputs, cu_seqlens, cu_seqlens, 40, 40)
    expected = tg.moba_attention_varlen(*arguments, block_size=8, top_k=3, is_causal=causal)
    assert_same_call(tg.compat.flash_moba_varlen_func(*arguments, 8, 3, causal), expected, inputs)
    if causal:
        actual = tg.compat.flash_moba_varlen_func(*arguments, moba_chunk_size=8, moba_topk=3)
        assert_same_call(actual, expected, inputs)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_moba_attn_varlen(dtype: torch.dtype, device: torch.device) -> None:
    inputs, cu_seqlens = packed(dtype, device)
    expected = tg.moba_attention_varlen(*inputs, cu_seqlens, cu_seqlens, 40, 40, block_size=8, top_k=3, is_causal=True)
    actual = tg.compat.moba_attn_varlen(*inputs, cu_seqlens, 40, 8, 3)
    assert_same_call(actual, expected, inputs)


def test_top_k_of_one_attends_to_the_own_block(device: torch.device, device_kind: str) -> None:
    """The one difference from the original, which runs full attention there; its docstring says so."""
    inputs, cu_seqlens = packed(widest_dtype(device_kind), device)
    out = tg.compat.moba_attn_varlen(*inputs, cu_seqlens, 40, 20, 1)
    query, key, value = (tensor[:20].transpose(0, 1)[None] for tensor in inputs)
    own = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:20], own[0].transpose(0, 1))
    query, key, value = (tensor[20:40].transpose(0, 1)[None] for tensor in inputs)
    own = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[20:40], own[0].transpose(0, 1))
    assert "full attention" in (tg.compat.moba_attn_varlen.__doc__ or "")


def test_enough_chunks_equal_full_attention(device: torch.device, device_kind: str) -> None:
    inputs, cu_seqlens = packed(widest_dtype(device_kind), device)
    out = tg.compat.moba_attn_varlen(*inputs, cu_seqlens, 40, 8, 5)
    for start, end in ((0, 40), (40, 75)):
        query, key, value = (tensor[start:end].transpose(0, 1)[None] for tensor in inputs)
        dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[start:end], dense[0].transpose(0, 1))


def test_signatures_are_the_published_ones() -> None:
    assert list(inspect.signature(tg.compat.flash_moba_varlen_func).parameters) == [
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "moba_chunk_size",
        "moba_topk",
        "causal",
    ]
    assert list(inspect.signature(tg.compat.moba_attn_varlen).parameters) == [
        "q",
        "k",
        "v",
        "cu_seqlens",
        "max_seqlen",
        "moba_chunk_size",
        "moba_topk",
    ]


@pytest.mark.parametrize(
    ("name", "wrong", "exception", "named"),
    [
        ("q", torch.zeros(75, 3, 16), ValueError, "query"),
        ("q", "q", TypeError, "query"),
        ("k", torch.zeros(75, 2, 15), ValueError, "key"),
        ("v", torch.zeros(70, 2, 16), ValueError, "value"),
        ("cu_seqlens_q", torch.tensor([0, 40, 74], dtype=torch.int32), ValueError, "cu_seqlens_q"),
        ("cu_seqlens_k", torch.tensor([0.0, 40.0, 40.0, 75.0]), TypeError, "cu_seqlens_k"),
        ("max_seqlen_q", 39, ValueError, "max_seqlen_q"),
        ("max_seqlen_k", 39, ValueError, "max_seqlen_k"),
        ("moba_chunk_size", 0, ValueError, "block_size"),
        ("moba_topk", 0, ValueError, "top_k"),
        ("moba_topk", 1.0, TypeError, "top_k"),
        ("causal", "yes", TypeError, "is_causal"),
    ],
)
def test_bad_input_is_refused(name: str, wrong: Any, exception: type[Exception], named: str) -> None:
    """The errors speak in the op's terms, as the docstring says."""
    inputs, cu_seqlens = packed(torch.float32, torch.device("cpu"))
    arguments: dict[str, Any] = dict(zip(("q", "k", "v"), inputs, strict=True))
    arguments |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    arguments |= {"max_seqlen_q": 40, "max_seqlen_k": 40, "moba_chunk_size": 8, "moba_topk": 3}
    tg.compat.flash_moba_varlen_func(**arguments)
    with pytest.raises(exception, match=named):
        tg.compat.flash_moba_varlen_func(**{**arguments, name: wrong})

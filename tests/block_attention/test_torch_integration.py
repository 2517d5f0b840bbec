"""Block attention inside a compiled model, under autocast, on meta tensors; all_ops has what holds of every op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_gradients, make_inputs
from tests.common.devices import widest_dtype
from tests.common.tensors import assert_bitwise_equal

CASE = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=50, head_dim=8, value_dim=6, block_size=8, top_k=3)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything a model may call in one function, with ordinary torch ops around it."""
    centroids = tg.block_centroids(key, block_size=8)
    routing = tg.moba_route(query, key, block_size=8, top_k=3)
    out, lse = tg.moba_attention(query * 2, key, value, block_size=8, return_lse=True, routing=routing)
    again = tg.moba_attention(query, key, value, block_size=8, top_k=2)
    return out * again, lse, centroids.square()


def loss_gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(result.float().square().sum() for result in results), inputs)


def compare_compiled(compiled: Callable[..., Any], eager: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> None:
    """Forward and backward, to the rounding that fusing the surrounding torch ops may change."""
    actual, expected = compiled(*inputs, *rest), eager(*inputs, *rest)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for left, right in zip(loss_gradients(actual, inputs), loss_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_compile_without_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = list(make_inputs(CASE, torch.float32, device))
    compare_compiled(torch.compile(attend, fullgraph=True, backend="aot_eager"), attend, inputs)


def test_compile_dynamic_shapes(device: torch.device) -> None:
    """One graph for every length and batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes of the first call are equal: the compiler would take equal ones for the same.
    for batch, length in ((3, 50), (2, 37), (4, 64), (7, 130)):
        case = AttentionCase(batch=batch, num_heads=4, num_kv_heads=2, query_len=length, head_dim=8, block_size=8)
        compare_compiled(compiled, attend, list(make_inputs(case, torch.float32, device)))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """float32 inputs run in the autocast dtype; their gradients come back in float32."""
    query, key, value = make_inputs(CASE, torch.float32, device)
    grad_out, grad_lse = make_gradients(CASE, dtype, device, 0)
    with torch.autocast(device.type, dtype=dtype):
        out, lse = tg.moba_attention(query, key, value, block_size=8, top_k=3, return_lse=True)
        block_indices = tg.moba_route(query, key, block_size=8, top_k=3).block_indices
        mixed = tg.moba_attention(query.to(dtype), key, value, block_size=8, top_k=3)
    assert (out.dtype, lse.dtype, mixed.dtype) == (dtype, torch.float32, dtype)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
    expected, expected_lse = tg.moba_attention(*halves, block_size=8, top_k=3, return_lse=True)
    assert_bitwise_equal("out", out, expected)
    assert_bitwise_equal("mixed", mixed, expected)
    assert_bitwise_equal("lse", lse, expected_lse)
    assert_bitwise_equal("block_indices", block_indices, tg.moba_route(*halves[:2], 8, 3).block_indices)
    gradients = torch.autograd.grad((out, lse), (query, key, value), (grad_out, grad_lse))
    expected_gradients = torch.autograd.grad((expected, expected_lse), halves, (grad_out, grad_lse))
    for left, right in zip(gradients, expected_gradients, strict=True):
        assert_bitwise_equal("gradient", left, right.float())


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs(CASE, torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tg.moba_attention(*inputs, block_size=8, top_k=3).dtype == torch.float64


def test_autocast_varlen(device: torch.device) -> None:
    query, key, value = (torch.randn(50, heads, 8, device=device) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = tg.moba_attention_varlen(query, key, value, cu_seqlens, cu_seqlens, 30, 30, block_size=8, top_k=3)
    halves = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = tg.moba_attention_varlen(*halves, cu_seqlens, cu_seqlens, 30, 30, block_size=8, top_k=3)
    assert_bitwise_equal("out", out, expected)


def test_public_functions_on_meta_tensors() -> None:
    query = torch.empty(2, 4, 100, 16, device="meta", requires_grad=True)
    out, lse = tg.moba_attention(query, query, query, block_size=16, top_k=2, return_lse=True)
    assert out.device.type == "meta" and out.shape == query.shape and lse.shape == (2, 4, 100)
    out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


def test_same_tensor_as_query_key_and_value(device: torch.device, device_kind: str) -> None:
    shared = torch.randn(1, 2, 40, 8, dtype=widest_dtype(device_kind), device=device, requires_grad=True)
    apart = [shared.detach().clone().requires_grad_() for _ in range(3)]
    (gradient,) = torch.autograd.grad(tg.moba_attention(shared, shared, shared, 8, 3).square().sum(), shared)
    gradients = torch.autograd.grad(tg.moba_attention(*apart, 8, 3).square().sum(), apart)
    torch.testing.assert_close(gradient, gradients[0] + gradients[1] + gradients[2])

"""The ops inside torch: opcheck, compile, autocast, fake and meta tensors, subsets of gradients."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_gradients, make_inputs
from tests.common.devices import widest_dtype
from tests.common.tensors import assert_bitwise_equal

CASE = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=50, head_dim=8, value_dim=6, block_size=8, top_k=3)


def dense_arguments(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op of the library on one dense problem."""
    query, key, value = make_inputs(CASE, dtype, device)
    grad_out, grad_lse = make_gradients(CASE, dtype, device, 0)
    block_indices = torch.ops.topgather.moba_route(query, key, 8, 3, True)
    with torch.no_grad():
        out, lse = torch.ops.topgather.moba_attention(query, key, value, block_indices, 8, True, 0.3)
    plain = [tensor.detach() for tensor in (query, key, value)]
    return {
        "block_centroids": (key, 8),
        "moba_route": (query, key, 8, 3, True),
        "moba_attention": (query, key, value, block_indices, 8, True, 0.3),
        "moba_attention_backward": (grad_out, grad_lse, *plain, out, lse, block_indices, 8, True, 0.3),
    }


def varlen_arguments(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """The same of packed sequences of 20, 0 and 30 queries over 20, 5 and 40 keys."""
    cu_seqlens = tuple(torch.tensor(c, dtype=torch.int32, device=device) for c in ([0, 20, 20, 50], [0, 20, 25, 65]))
    query = torch.randn(50, 4, 8, device=device).to(dtype).requires_grad_()
    key = torch.randn(65, 2, 8, device=device).to(dtype).requires_grad_()
    value = torch.randn(65, 2, 6, device=device).to(dtype).requires_grad_()
    packing = (*cu_seqlens, 30, 40)
    block_indices = torch.ops.topgather.moba_route(query, key, 8, 3, True, *packing)
    with torch.no_grad():
        out, lse = torch.ops.topgather.moba_attention(query, key, value, block_indices, 8, True, 0.3, *packing)
    plain = [tensor.detach() for tensor in (query, key, value)]
    tail = (block_indices, 8, True, 0.3, *packing)
    return {
        "moba_route": (query, key, 8, 3, True, *packing),
        "moba_attention": (query, key, value, *tail),
        "moba_attention_backward": (torch.randn_like(out), torch.randn_like(lse), *plain, out, lse, *tail),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["block_centroids", "moba_route", "moba_attention", "moba_attention_backward"])
def test_opcheck_dense(name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.library.opcheck(getattr(torch.ops.topgather, name).default, dense_arguments(dtype, device)[name])


@pytest.mark.parametrize("name", ["moba_route", "moba_attention", "moba_attention_backward"])
def test_opcheck_varlen(name: str, device: torch.device) -> None:
    torch.library.opcheck(getattr(torch.ops.topgather, name).default, varlen_arguments(torch.float32, device)[name])


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything a model may call in one function, with ordinary torch ops around it."""
    centroids = tg.block_centroids(key, block_size=8)
    routing = tg.moba_route(query, key, block_size=8, top_k=3)
    out, lse = tg.moba_attention(query * 2, key, value, block_size=8, return_lse=True, routing=routing)
    again = tg.moba_attention(query, key, value, block_size=8, top_k=2)
    return out * again, lse, centroids.square()


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    arguments = (query, key, value, cu_seqlens, cu_seqlens, 30, 30)
    out, lse = tg.moba_attention_varlen(*arguments, block_size=8, top_k=3, return_lse=True)
    return out.sin(), lse


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


def test_compile_by_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = list(make_inputs(CASE, torch.float32, device))
    compare_compiled(torch.compile(attend, fullgraph=True, backend="inductor"), attend, inputs)


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


def test_compile_varlen(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend_varlen, fullgraph=True, backend="aot_eager")
    query, key, value = (torch.randn(50, heads, 8, device=device, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 20, 20, 50], dtype=torch.int32, device=device)
    compare_compiled(compiled, attend_varlen, [query, key, value], cu_seqlens)


def test_compile_without_gradients(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = [tensor.detach() for tensor in make_inputs(CASE, torch.float32, device)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for left, right in zip(compiled(*inputs), attend(*inputs), strict=True):
        assert not left.requires_grad
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


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


def assert_fake_like(fake: Any, real: Any) -> None:
    for left, right in zip(fake, real, strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_and_meta_tensors_have_the_real_shapes(dtype: torch.dtype, device: torch.device) -> None:
    """Shape, dtype and strides of each result, without touching data."""
    for arguments in (dense_arguments(dtype, device), varlen_arguments(dtype, device)):
        for name, real_arguments in arguments.items():
            op = getattr(torch.ops.topgather, name)
            with torch.no_grad():
                real = op(*real_arguments)
                meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in real_arguments))
                with FakeTensorMode() as mode:
                    fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments))
            results = [(result,) if isinstance(result, Tensor) else result for result in (fake, meta, real)]
            assert_fake_like(results[0], results[2])
            assert_fake_like(results[1], results[2])


def test_public_functions_on_meta_tensors() -> None:
    query = torch.empty(2, 4, 100, 16, device="meta", requires_grad=True)
    out, lse = tg.moba_attention(query, query, query, block_size=16, top_k=2, return_lse=True)
    assert out.device.type == "meta" and out.shape == query.shape and lse.shape == (2, 4, 100)
    out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=3) if any(w)])
def test_subsets_of_gradients(wanted: tuple[bool, ...], device: torch.device) -> None:
    """Only what is asked for, and the same bits as when everything is."""
    inputs = make_inputs(CASE, torch.float32, device)
    gradients = make_gradients(CASE, torch.float32, device, 0)
    results = tg.moba_attention(*inputs, block_size=8, top_k=3, return_lse=True)
    expected = torch.autograd.grad(results, inputs, gradients)
    part = [tensor.detach().clone().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
    results = tg.moba_attention(*part, block_size=8, top_k=3, return_lse=True)
    torch.autograd.backward(results, gradients)
    for tensor, want, gradient in zip(part, wanted, expected, strict=True):
        if want:
            assert tensor.grad is not None
            assert_bitwise_equal("gradient", tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_without_gradients(device: torch.device) -> None:
    """no_grad and inference_mode give the same bits and keep no graph."""
    inputs = make_inputs(CASE, torch.float32, device)
    expected = tg.moba_attention(*inputs, block_size=8, top_k=3)
    assert expected.requires_grad
    with torch.no_grad():
        out = tg.moba_attention(*inputs, block_size=8, top_k=3)
    assert not out.requires_grad
    assert_bitwise_equal("no_grad", out, expected.detach())
    with torch.inference_mode():
        out = tg.moba_attention(*(tensor.detach() for tensor in inputs), block_size=8, top_k=3)
    assert_bitwise_equal("inference_mode", out.clone(), expected.detach())


@pytest.mark.usefixtures("deterministic")
def test_backward_twice_needs_retain_graph(device: torch.device) -> None:
    inputs = make_inputs(CASE, torch.float32, device)
    out = tg.moba_attention(*inputs, block_size=8, top_k=3)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    for left, right in zip(first, second, strict=True):
        assert_bitwise_equal("gradient", left, right)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), inputs)


def test_changing_an_input_in_place_before_backward_is_refused(device: torch.device) -> None:
    inputs = make_inputs(CASE, torch.float32, device)
    moved = inputs[0] * 1
    out = tg.moba_attention(moved, *inputs[1:], block_size=8, top_k=3)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_same_tensor_as_query_key_and_value(device: torch.device, device_kind: str) -> None:
    shared = torch.randn(1, 2, 40, 8, dtype=widest_dtype(device_kind), device=device, requires_grad=True)
    apart = [shared.detach().clone().requires_grad_() for _ in range(3)]
    (gradient,) = torch.autograd.grad(tg.moba_attention(shared, shared, shared, 8, 3).square().sum(), shared)
    gradients = torch.autograd.grad(tg.moba_attention(*apart, 8, 3).square().sum(), apart)
    torch.testing.assert_close(gradient, gradients[0] + gradients[1] + gradients[2])


@pytest.mark.usefixtures("deterministic")
def test_checkpoint_recomputes_the_same(device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs(CASE, torch.float32, device)

    def attend_once(*inputs: Tensor) -> Tensor:
        return tg.moba_attention(*inputs, block_size=8, top_k=3)

    expected = torch.autograd.grad(attend_once(*inputs).square().sum(), inputs)
    out = checkpoint(attend_once, *inputs, use_reentrant=False)
    for left, right in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        assert_bitwise_equal("gradient", left, right)

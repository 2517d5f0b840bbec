"""Memory layers inside a compiled model, under autocast, on fake and meta tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import topgather as tg
from tests.common.tensors import assert_bitwise_equal
from tests.memory.helpers import LookupCase, TopkCase, make_lookup, make_topk_inputs

TOPK = TopkCase(num_tokens=7, num_heads=2, num_keys=10, head_dim=12, top_k=4)
LOOKUP = LookupCase(num_rows=100, width=9, num_tokens=7, bag_size=8, width_in=5)
OPS = ["product_key_topk", "memory_lookup", "memory_dot", "memory_backward", "memory_backward_sparse"]


def arguments_of(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op of the library."""
    query, keys = make_topk_inputs(TOPK, dtype, device)
    lookup = make_lookup(LOOKUP, dtype, device)
    backward = (lookup.grad_out, lookup.values.detach(), lookup.indices, lookup.weights.detach(), True)
    return {
        "product_key_topk": (query, keys, 4),
        "memory_lookup": (lookup.values, lookup.indices, lookup.weights),
        "memory_dot": (lookup.values_in, lookup.indices, lookup.x),
        "memory_backward": backward,
        "memory_backward_sparse": backward,
    }


@pytest.mark.parametrize("name", ["memory_backward", "memory_backward_sparse"])
def test_opcheck_of_a_backward_without_weights(name: str, device: torch.device) -> None:
    arguments = (*arguments_of(torch.float32, device)[name][:-1], False)
    torch.library.opcheck(getattr(torch.ops.topgather, name).default, arguments)


def memory_layer(query: Tensor, keys: Tensor, values: Tensor, x: Tensor, values_in: Tensor) -> tuple[Tensor, Tensor]:
    """Everything a model may call in one function, with ordinary torch ops around it."""
    scores, indices = tg.product_key_topk(query * 2, keys, top_k=4)
    weights = scores.softmax(dim=-1).flatten(1)
    out = tg.memory_lookup(values, indices.flatten(1), weights)
    experts = tg.expert_lookup(x, values_in, values, indices.flatten(1), weights, activation="silu")
    return out.sin(), experts * out


def layer_inputs(num_tokens: int, device: torch.device) -> list[Tensor]:
    query, keys = make_topk_inputs(TopkCase(num_tokens, 2, 10, 12), torch.float32, device)
    lookup = make_lookup(LookupCase(100, 9, num_tokens, 8, width_in=5), torch.float32, device)
    return [query, keys, lookup.values, lookup.x, lookup.values_in]


def loss_gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(result.float().square().sum() for result in results), inputs)


def compare_compiled(compiled: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Forward and backward, to the rounding that fusing the surrounding torch ops may change."""
    actual, expected = compiled(*inputs), memory_layer(*inputs)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for left, right in zip(loss_gradients(actual, inputs), loss_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_compile_without_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(memory_layer, fullgraph=True, backend="aot_eager")
    compare_compiled(compiled, layer_inputs(7, device))


def test_compile_dynamic_shapes(device: torch.device) -> None:
    """One graph for every number of tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory_layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (7, 3, 31, 64):
        compare_compiled(compiled, layer_inputs(num_tokens, device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "made"])
def test_compile_with_sparse_gradients(is_leaf: bool, device: torch.device) -> None:
    """One graph; a leaf's stored gradient is marked as coalesced, as without compiling."""
    torch._dynamo.reset()
    lookup = make_lookup(LOOKUP, torch.float32, device)

    def look_up(values: Tensor, weights: Tensor) -> Tensor:
        return tg.memory_lookup(values if is_leaf else values * 2, lookup.indices, weights, sparse_grad=True)

    gradients = []
    counter = CompileCounterWithBackend("aot_eager")
    for function in (look_up, torch.compile(look_up, backend=counter)):
        lookup.values.grad = lookup.weights.grad = None
        function(lookup.values, lookup.weights).backward(lookup.grad_out)
        gradients.append((lookup.values.grad, lookup.weights.grad))
    assert counter.frame_count == 1
    assert gradients[1][0].is_sparse and (gradients[1][0].is_coalesced() or not is_leaf)
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left.to_dense(), right.to_dense())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_search(dtype: torch.dtype, device: torch.device) -> None:
    """As matrix products: float32 inputs run in the autocast dtype; scores and gradients come back in float32."""
    query, keys = make_topk_inputs(TOPK, torch.float32, device)
    with torch.autocast(device.type, dtype=dtype):
        scores, indices = tg.product_key_topk(query, keys, 4)
        mixed = tg.product_key_topk(query.to(dtype), keys, 4)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, keys)]
    expected, expected_indices = tg.product_key_topk(halves[0], halves[1], 4)
    assert scores.dtype == torch.float32
    for left, right in ((scores, expected), (mixed[0], expected), (indices, expected_indices)):
        assert_bitwise_equal("result", left.detach(), right.detach())
    gradients = torch.autograd.grad(scores.square().sum(), (query, keys))
    for left, right in zip(gradients, torch.autograd.grad(expected.square().sum(), halves), strict=True):
        assert_bitwise_equal("gradient", left, right.float())


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_table(
    weights_dtype: torch.dtype, table_dtype: torch.dtype, sparse_grad: bool, device: torch.device
) -> None:
    """Weights and x of any dtype join the table; the result has the table's dtype, gradients that of their tensor."""
    lookup = make_lookup(LOOKUP, table_dtype, device)
    weights = lookup.weights.detach().to(weights_dtype).requires_grad_()
    x = lookup.x.detach().to(weights_dtype).requires_grad_()
    tables = (lookup.values_in, lookup.values)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = tg.memory_lookup(lookup.values, lookup.indices, weights, sparse_grad)
        experts = tg.expert_lookup(x, *tables, lookup.indices, weights, "gelu", sparse_grad)
    wide = weights.detach().float().requires_grad_()
    same_x = x.detach().to(table_dtype).requires_grad_()
    expected = tg.memory_lookup(lookup.values, lookup.indices, wide, sparse_grad)
    expected_experts = tg.expert_lookup(same_x, *tables, lookup.indices, wide, "gelu", sparse_grad)
    assert out.dtype == experts.dtype == table_dtype
    assert_bitwise_equal("out", out.detach(), expected.detach())
    assert_bitwise_equal("experts", experts.detach(), expected_experts.detach())
    gradients = torch.autograd.grad((out, experts), (*tables, x, weights), (lookup.grad_out,) * 2)
    others = torch.autograd.grad((expected, expected_experts), (*tables, same_x, wide), (lookup.grad_out,) * 2)
    for left, right, leaf in zip(gradients, others, (*tables, x, weights), strict=True):
        assert left.dtype == leaf.dtype and left.is_sparse == right.is_sparse
    for left, right in zip(gradients[:3], others[:3], strict=True):
        assert torch.equal(left.to_dense(), right.to(left.dtype).to_dense())
    # Two gradients of one tensor are added in its dtype, or before it is rounded to.
    torch.testing.assert_close(gradients[3].float(), others[3], rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone() -> None:
    query, keys = make_topk_inputs(TOPK, torch.float64, torch.device("cpu"))
    lookup = make_lookup(LOOKUP, torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tg.product_key_topk(query, keys, 4)[0].dtype == torch.float64
        assert tg.memory_lookup(lookup.values, lookup.indices, lookup.weights).dtype == torch.float64
        arguments = (lookup.x, lookup.values_in, lookup.values, lookup.indices, lookup.weights)
        assert tg.expert_lookup(*arguments).dtype == torch.float64


WRONG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "int": lambda weights: weights.int(),
    "bool": lambda weights: weights > 0,
    "complex": lambda weights: weights + 0j,
    "float64": lambda weights: weights.double(),
    "[T, 1]": lambda weights: weights[:, :1],
    "[1, K]": lambda weights: weights[:1],
    "[]": lambda weights: weights[0, 0],
    "[2, T, K]": lambda weights: weights.expand(2, *weights.shape),
}


@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_the_same_is_refused_with_and_without_autocast(wrong: str, is_autocast: bool, device: torch.device) -> None:
    lookup = make_lookup(LOOKUP, torch.float32, device)
    tables = (lookup.values_in, lookup.values)
    weights = WRONG_WEIGHTS[wrong](lookup.weights.detach())
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_autocast):
        for call in (
            lambda: tg.memory_lookup(lookup.values, lookup.indices, weights),
            lambda: tg.expert_lookup(lookup.x, *tables, lookup.indices, weights),
        ):
            with pytest.raises((TypeError, ValueError), match=r"weights must have the (dtype|shape) of"):
                call()
        for x in (lookup.x.int(), lookup.x.double(), lookup.x[:1]):
            with pytest.raises((TypeError, ValueError), match="x must have"):
                tg.expert_lookup(x, *tables, lookup.indices, lookup.weights)


def test_a_fake_sparse_gradient_has_the_shape_of_the_table(device: torch.device) -> None:
    """How many rows it holds only data would tell."""
    real_arguments = arguments_of(torch.bfloat16, device)["memory_backward_sparse"]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        arguments = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments)
        grad_values, grad_weights = torch.ops.topgather.memory_backward_sparse(*arguments)
    real, _ = torch.ops.topgather.memory_backward_sparse(*real_arguments)
    assert grad_values.is_sparse and grad_values.is_coalesced() and grad_values.shape == real.shape == (100, 9)
    assert grad_values.dtype == real.dtype == torch.bfloat16
    assert grad_weights.dtype == torch.float32 and grad_weights.shape == (7, 8)


def test_public_functions_on_meta_tensors() -> None:
    query = torch.empty(5, 2, 8, device="meta", requires_grad=True)
    keys = torch.empty(2, 2, 20, 4, device="meta", requires_grad=True)
    values = torch.empty(400, 6, device="meta", requires_grad=True)
    scores, indices = tg.product_key_topk(query, keys, 3)
    assert scores.device.type == "meta" and scores.shape == indices.shape == (5, 2, 3)
    out = tg.memory_lookup(values, indices.flatten(1), scores.flatten(1))
    out = tg.expert_lookup(out, values, values, indices.flatten(1), scores.flatten(1))
    assert out.device.type == "meta" and out.shape == (5, 6)
    out.sum().backward()
    for leaf in (query, keys, values):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape

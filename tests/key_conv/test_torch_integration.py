"""The key convolution inside a compiled model, under autocast, as fake and meta tensors of every layout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import topgather as tg
from tests.common.tensors import assert_bitwise_equal
from tests.key_conv.helpers import LAYOUTS, KeyConvCase, convolve, make_inputs

DENSE = KeyConvCase(num_tokens=9, head_dim=8, width=4)
CASES = [DENSE, replace(DENSE, has_state=True), replace(DENSE, lengths=(4, 0, 6))]
OPS = ["key_conv", "key_conv_backward"]


def arguments_of(
    name: str, case: KeyConvCase, dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> tuple[Any, ...]:
    """Arguments of each op of the library."""
    inputs = make_inputs(case, dtype, device, 0, layout)
    forward = (inputs.key, inputs.weight, inputs.state, inputs.cu_seqlens)
    if name == "key_conv":
        return forward
    return (inputs.grad_out, *(None if tensor is None else tensor.detach() for tensor in forward), True)


def test_opcheck_of_a_backward_without_gradient_of_weight(device: torch.device) -> None:
    arguments = (*arguments_of("key_conv_backward", CASES[1], torch.float32, device)[:-1], False)
    torch.library.opcheck(torch.ops.topgather.key_conv_backward.default, arguments)


def layer(x: Tensor, weight: Tensor, taps: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """What a model does: a projection, the convolution on its view, and the same in two calls."""
    batch, tokens, _ = x.shape
    key = (x @ weight).view(batch, tokens, 2, 4).transpose(1, 2)
    out = tg.key_conv(key, taps)
    first, between = tg.key_conv(key, taps, state=state)
    second, last = tg.key_conv(key * 2, taps, state=between)
    return out.transpose(1, 2).flatten(2).sin(), first, second, last


def layer_inputs(tokens: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 6), (6, 8), (2, 4, 3), (2, 2, 2, 4)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def loss_gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(result.square().sum() for result in results), inputs)


def compare_compiled(compiled: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Forward and backward, to the rounding that fusing the surrounding torch ops may change."""
    actual, expected = compiled(*inputs), layer(*inputs)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for left, right in zip(loss_gradients(actual, inputs), loss_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_compile_without_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    compare_compiled(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer_inputs(7, device))


def test_compile_dynamic_shapes(device: torch.device) -> None:
    """One graph for every number of tokens that the taps reach back."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 9, 33, 12):
        compare_compiled(compiled, layer_inputs(tokens, device))
    assert counter.frame_count == 1


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """As matrix products: float32 keys run in the autocast dtype with their state, a weight of any joins them."""
    case = CASES[1]
    inputs = make_inputs(case, torch.float32, device, weight_dtype=weight_dtype)
    with torch.autocast(device.type, dtype=dtype):
        out = convolve(inputs)
    assert out.dtype == dtype and inputs.state is not None
    weight = inputs.weight.detach() if weight_dtype == dtype else inputs.weight.detach().float()
    cast = replace(inputs, key=inputs.key.detach().to(dtype), state=inputs.state.detach().to(dtype), weight=weight)
    for leaf in cast.leaves().values():
        leaf.requires_grad_()
    expected = convolve(cast)
    assert_bitwise_equal("out", out.detach(), expected.detach())
    grad_out = inputs.grad_out.to(dtype)
    gradients = torch.autograd.grad(out, tuple(inputs.leaves().values()), grad_out)
    others = torch.autograd.grad(expected, tuple(cast.leaves().values()), grad_out)
    for leaf, left, right in zip(inputs.leaves().values(), gradients, others, strict=True):
        assert left.dtype == leaf.dtype
        assert_bitwise_equal("gradient", left, right.to(leaf.dtype))


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs(DENSE, torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve(inputs).dtype == torch.float64


def test_autocast_still_refuses_what_it_cannot_cast(device: torch.device) -> None:
    inputs = make_inputs(DENSE, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="key"):
            tg.key_conv(inputs.key.int(), inputs.weight)
        with pytest.raises(TypeError, match="weight"):
            tg.key_conv(inputs.key, inputs.weight.int())


# --- fake and meta tensors --------------------------------------------------------------------------------------------


def assert_fake_like(fake: Any, real: Any) -> None:
    for left, right in zip(fake, real, strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_fake_and_meta_tensors_have_the_real_shapes(
    name: str, case: KeyConvCase, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Shape, dtype and strides of each result, without touching data."""
    op = getattr(torch.ops.topgather, name)
    real_arguments = arguments_of(name, case, dtype, device, layout)
    with torch.no_grad():
        real = op(*real_arguments)
        meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in real_arguments))
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments))
    real, meta, fake = ((x,) if isinstance(x, Tensor) else x for x in (real, meta, fake))
    assert_fake_like(fake, real)
    if layout == "contiguous":  # .to("meta") keeps strides of dense tensors alone
        assert_fake_like(meta, real)


def test_public_function_on_meta_tensors() -> None:
    key = torch.empty(2, 3, 9, 8, device="meta", requires_grad=True)
    weight = torch.empty(3, 8, 4, device="meta", requires_grad=True)
    out, state = tg.key_conv(key, weight, state=torch.empty(2, 3, 3, 8, device="meta"))
    assert out.device.type == "meta" and out.shape == key.shape and state.shape == (2, 3, 3, 8)
    out.sum().backward()
    assert key.grad is not None and key.grad.shape == key.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape


# --- autograd ---------------------------------------------------------------------------------------------------------

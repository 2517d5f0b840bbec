"""Grid and window attention inside a compiled model, under autocast, as fake and meta tensors of every layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import topgather as tg
from tests.common.tensors import assert_bitwise_equal
from tests.grid.helpers import LAYOUTS, PARTITIONS, GridCase, Inputs, make_inputs

CASE = GridCase(rows=7, columns=5, step=(3, 2), head_dim=8, has_bias=True)
OPS = ["grid_attention", "grid_attention_backward"]


def arguments_of(
    name: str, dtype: torch.dtype, device: torch.device, partition: str = "grid", layout: str = "contiguous"
) -> tuple[Any, ...]:
    """Arguments of each op of the library."""
    inputs = make_inputs(GridCase(**{**CASE.__dict__, "partition": partition}), dtype, device, 0, layout)
    forward = (inputs.query, inputs.key, inputs.value, inputs.bias)
    options = (partition, *CASE.step, 0.25)
    if name == "grid_attention":
        return (*forward, *options)
    forward = tuple(tensor.detach() for tensor in forward if tensor is not None)
    out, lse, _ = torch.ops.topgather.grid_attention(*forward, *options)
    return (inputs.grad_out, *forward, out, lse, *options, True)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_without_bias(name: str, device: torch.device) -> None:
    arguments = list(arguments_of(name, torch.float32, device))
    arguments[3 if name == "grid_attention" else 4] = None
    if name == "grid_attention_backward":
        arguments[-1] = False
    torch.library.opcheck(getattr(torch.ops.topgather, name).default, tuple(arguments))


def test_opcheck_of_a_backward_without_gradient_of_bias(device: torch.device) -> None:
    arguments = (*arguments_of("grid_attention_backward", torch.float32, device)[:-1], False)
    torch.library.opcheck(torch.ops.topgather.grid_attention_backward.default, arguments)


def attention_layer(x: Tensor, weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What a model does: a fused projection, attention on its views, heads side by side again."""
    batch, rows, columns, _ = x.shape
    qkv = (x @ weight).view(batch, rows, columns, 3, 2, 4)
    query, key, value = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)
    out = tg.grid_attention(query, key, value, grid_size=(4, 3))
    windows = tg.window_attention(query, key, value, window_size=2, bias=table.tanh(), scale=0.3)
    return out.permute(0, 2, 3, 1, 4).flatten(3).sin(), windows.permute(0, 2, 3, 1, 4).flatten(3) * 2


def layer_inputs(rows: int, columns: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, rows, columns, 6), (6, 24), (2, 4, 4)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def loss_gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(result.square().sum() for result in results), inputs)


def compare_compiled(compiled: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Forward and backward, to the rounding that fusing the surrounding torch ops may change."""
    actual, expected = compiled(*inputs), attention_layer(*inputs)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for left, right in zip(loss_gradients(actual, inputs), loss_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_compile_without_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention_layer, fullgraph=True, backend="aot_eager")
    compare_compiled(compiled, layer_inputs(7, 5, device))


def test_compile_dynamic_shapes(device: torch.device) -> None:
    """One graph for every size of the image."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_layer, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns in ((7, 5), (9, 6), (11, 17), (13, 8)):
        compare_compiled(compiled, layer_inputs(rows, columns, device))
    assert counter.frame_count == 1


# --- autocast ---------------------------------------------------------------------------------------------------------


def attend_mixed(inputs: Inputs) -> Tensor:
    return tg.grid_attention(inputs.query, inputs.key, inputs.value, stride=CASE.step, bias=inputs.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """As matrix products: float32 images run in the autocast dtype, a float32 bias stays; gradients come back."""
    inputs = make_inputs(CASE, torch.float32, device)
    with torch.autocast(device.type, dtype=dtype):
        out = attend_mixed(inputs)
    images = (t.detach().to(dtype).requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    cast = Inputs(*images, inputs.grad_out.to(dtype), inputs.bias)
    expected = attend_mixed(cast)
    assert out.dtype == dtype
    assert_bitwise_equal("out", out.detach(), expected.detach())
    gradients = torch.autograd.grad(out, tuple(inputs.leaves().values()), cast.grad_out)
    others = torch.autograd.grad(expected, tuple(cast.leaves().values()), cast.grad_out)
    for left, right in zip(gradients, others, strict=True):
        assert left.dtype == torch.float32
        assert_bitwise_equal("gradient", left, right.float())


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_of_mixed_dtypes(image_dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device) -> None:
    """Images of different dtypes come together, a bias of any joins them; its gradient has its dtype."""
    inputs = make_inputs(CASE, torch.float32, device, bias_dtype=bias_dtype)
    mixed = Inputs(inputs.query, inputs.key.to(image_dtype), inputs.value.bfloat16(), inputs.grad_out, inputs.bias)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = attend_mixed(mixed)
    assert out.dtype == torch.bfloat16 and inputs.bias is not None
    wide_bias = inputs.bias.detach().float()
    images = (tensor.detach().bfloat16() for tensor in (mixed.query, mixed.key, mixed.value))
    assert_bitwise_equal("out", out.detach(), attend_mixed(Inputs(*images, inputs.grad_out, wide_bias)))
    (gradient,) = torch.autograd.grad(out, inputs.bias, inputs.grad_out.bfloat16())
    assert gradient.dtype == bias_dtype


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs(CASE, torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend_mixed(inputs).dtype == torch.float64


def test_autocast_still_refuses_what_it_cannot_cast(device: torch.device) -> None:
    inputs = make_inputs(CASE, torch.float32, device)
    images = (inputs.query, inputs.key, inputs.value)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="key"):
            tg.grid_attention(inputs.query, inputs.key.int(), inputs.value, stride=2)
        with pytest.raises(TypeError, match="bias"):
            tg.grid_attention(*images, stride=CASE.step, bias=torch.zeros(2, 9, 9, device=device).int())


# --- fake and meta tensors --------------------------------------------------------------------------------------------


def assert_fake_like(fake: Any, real: Any) -> None:
    for left, right in zip(fake, real, strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_fake_and_meta_tensors_have_the_real_shapes(
    name: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Shape, dtype and strides of each result, without touching data."""
    op = getattr(torch.ops.topgather, name)
    real_arguments = arguments_of(name, dtype, device, "window", layout)
    with torch.no_grad():
        real = op(*real_arguments)
        meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in real_arguments))
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments))
    assert_fake_like(fake, real)
    if layout in ("contiguous", "fused"):  # .to("meta") keeps strides of dense tensors alone
        assert_fake_like(meta, real)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_public_functions_on_meta_tensors(partition: str) -> None:
    image = torch.empty(2, 3, 9, 10, 8, device="meta", requires_grad=True)
    bias = torch.empty(3, 12, 12, device="meta", requires_grad=True)
    if partition == "grid":
        out = tg.grid_attention(image, image, image, grid_size=(3, 4), bias=bias)
    else:
        out = tg.window_attention(image, image, image, (3, 4), bias=bias)
    assert out.device.type == "meta" and out.shape == image.shape
    out.sum().backward()
    assert image.grad is not None and image.grad.shape == image.shape
    assert bias.grad is not None and bias.grad.shape == bias.shape


# --- autograd ---------------------------------------------------------------------------------------------------------

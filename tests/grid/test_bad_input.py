"""Every argument of grid and window attention, given wrong: an error that names the argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.bad_input import CPU, TYPE, VALUE, Change, alter, assert_refused, put


def image_arguments() -> dict[str, Any]:
    images = {name: torch.randn(2, 3, 7, 5, 8) for name in ("query", "key", "value")}
    return {**images, "bias": torch.randn(3, 12, 12), "scale": None}


def stride_arguments() -> dict[str, Any]:
    return {**image_arguments(), "stride": (2, 2)}


def grid_size_arguments() -> dict[str, Any]:
    return {**image_arguments(), "grid_size": (4, 3)}


def window_arguments() -> dict[str, Any]:
    return {**image_arguments(), "window_size": (4, 3)}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "grid_attention(stride)": (tg.grid_attention, stride_arguments),
    "grid_attention(grid_size)": (tg.grid_attention, grid_size_arguments),
    "window_attention": (tg.window_attention, window_arguments),
}
SIDES = {
    "grid_attention(stride)": "stride",
    "grid_attention(grid_size)": "grid_size",
    "window_attention": "window_size",
}
IMAGES = ["query", "key", "value"]
TENSORS = [*IMAGES, "bias"]

pytestmark = [pytest.mark.sanitize, pytest.mark.parametrize("function", FUNCTIONS)]


def arguments_of(function: str, device: torch.device) -> dict[str, Any]:
    """Good arguments, on ``device``."""
    arguments = FUNCTIONS[function][1]()
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}


def refuse(
    function: str,
    change: Change,
    named: str,
    exceptions: tuple[type[Exception], ...],
    device: torch.device = CPU,
) -> None:
    """The call fails with one of ``exceptions``, whose message has one of ``named`` (a|b) as a whole word."""
    assert_refused(FUNCTIONS[function][0], arguments_of(function, device), change, named, exceptions)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixed_dtypes(function: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    refuse(function, alter(name, lambda tensor: tensor.to(dtype)), "query", TYPE, device)
    refuse(function, alter(name, lambda tensor: tensor.to(dtype)), "key" if name == "query" else name, TYPE, device)


def test_bias_of_another_dtype(function: str, device: torch.device) -> None:
    """That of query or that of its sums, no other."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        refuse(function, alter("bias", lambda tensor, dtype=dtype: tensor.to(dtype)), "bias", TYPE, device)

    def change(arguments: dict[str, Any]) -> None:
        for name in IMAGES:
            arguments[name] = arguments[name].bfloat16()
        arguments["bias"] = arguments["bias"].half()

    refuse(function, change, "bias", TYPE, device)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dim", range(5))
def test_shapes_that_differ(function: str, name: str, dim: int, device: torch.device) -> None:
    """One shorter in any dimension; of query that shows at the key, whose shape it no longer is, or at the bias."""
    named = "query|key|bias" if name == "query" else name
    refuse(function, alter(name, lambda tensor: tensor.narrow(dim, 0, tensor.size(dim) - 1)), named, VALUE, device)
    refuse(function, alter(name, lambda tensor: tensor.narrow(dim, 0, 1)), named, VALUE, device)


def test_shapes_of_bias_that_do_not_fit(function: str, device: torch.device) -> None:
    for change in (
        lambda bias: bias[:2],
        lambda bias: bias[:, :11],
        lambda bias: bias[..., :11],
        lambda bias: bias[:, :11, :11],
        lambda bias: bias[:1],
        lambda bias: bias[:, :1],
        lambda bias: bias[..., :0],
        lambda bias: bias[0],
        lambda bias: bias.repeat(1, 2, 2),
        lambda bias: bias.repeat(2, 1, 1),
    ):
        refuse(function, alter("bias", change), "bias", VALUE, device)


def test_channels_that_are_not_there(function: str, device: torch.device) -> None:
    def change(arguments: dict[str, Any]) -> None:
        for name in IMAGES:
            arguments[name] = arguments[name][..., :0]

    refuse(function, change, "query", VALUE, device)


@pytest.mark.parametrize("name", IMAGES)
def test_last_dimension_not_contiguous(function: str, name: str, device: torch.device) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    refuse(function, alter(name, spread), name, VALUE, device)
    refuse(function, alter(name, lambda tensor: tensor[..., :1].expand(tensor.shape)), name, VALUE, device)
    channels_first = alter(name, lambda tensor: tensor.movedim(-1, 2).contiguous().movedim(2, -1))
    refuse(function, channels_first, name, VALUE, device)


def test_a_bias_may_have_any_strides(function: str, device: torch.device) -> None:
    """Not an error, and not misread."""
    arguments = arguments_of(function, device)
    call, bias = FUNCTIONS[function][0], arguments["bias"]
    for strided in (bias.mT.contiguous().mT, bias.repeat_interleave(2, dim=2)[..., ::2], bias[:1].expand(bias.shape)):
        expected = call(**{**arguments, "bias": strided.contiguous()})
        assert torch.equal(call(**{**arguments, "bias": strided}), expected)


@pytest.mark.parametrize("wrong", [1.5, "8", torch.tensor(8), True, {4, 3}, 2.0 + 0j], ids=repr)
def test_sides_of_the_wrong_type(function: str, wrong: Any, device: torch.device) -> None:
    name = SIDES[function]
    refuse(function, put(name, wrong), name, TYPE, device)
    refuse(function, put(name, (2, wrong)), name, TYPE, device)
    refuse(function, put(name, [wrong, 2]), name, TYPE, device)


@pytest.mark.parametrize("wrong", [0, -1, 2**31, -(2**63), 2**63 - 1, 2**64, -(2**70)])
def test_sides_out_of_range(function: str, wrong: int, device: torch.device) -> None:
    name = SIDES[function]
    refuse(function, put(name, wrong), name, VALUE, device)
    refuse(function, put(name, (2, wrong)), name, VALUE, device)
    refuse(function, put(name, (wrong, 2)), name, VALUE, device)


@pytest.mark.parametrize("wrong", [(), (2,), (2, 2, 2), [3]], ids=repr)
def test_not_a_pair(function: str, wrong: Any, device: torch.device) -> None:
    refuse(function, put(SIDES[function], wrong), SIDES[function], VALUE, device)


def test_sides_missing_or_said_twice(function: str, device: torch.device) -> None:
    if function == "window_attention":
        refuse(function, put("window_size", None), "window_size", TYPE, device)
        return
    for name in ("grid_size", "stride"):
        refuse(function, lambda arguments: arguments.update(grid_size=2, stride=2), name, VALUE, device)
        refuse(function, put(SIDES[function], None), name, VALUE, device)


def test_registered_ops_check_too(function: str, device: torch.device) -> None:
    """Calling torch.ops.topgather past the public functions still gives an error, never a crash."""
    partition = "window" if function == "window_attention" else "grid"
    ops = torch.ops.topgather
    arguments = arguments_of(function, device)
    query, key, value, bias = (arguments[name] for name in TENSORS)
    steps = (4, 3) if partition == "window" else (2, 2)
    images = (query, key, value)
    options = (partition, *steps, 0.25)
    out, lse, terms = ops.grid_attention(*images, bias, *options)
    backward = (out, *images, bias, out, lse, *options, True, terms)
    ops.grid_attention_backward(*backward)
    nan = float("nan")
    wrong_forward: list[tuple[Any, ...]] = [
        (query, key, value[:, :2], bias, *options),
        (query[0], key[0], value[0], bias, *options),
        (query.int(), key.int(), value.int(), bias, *options),
        (query.mT, key.mT, value.mT, None, *options),
        (*images, bias[0], *options),
        (*images, bias.half(), *options),
        (*images, bias, "block", *steps, 0.25),
        (*images, bias, "", *steps, 0.25),
        (*images, bias, partition, 0, 2, 0.25),
        (*images, bias, partition, 2, -1, 0.25),
        (*images, bias, partition, 2**31, 2, 0.25),
        (*images, bias, partition, *steps, nan),
    ]
    for call in wrong_forward:
        with pytest.raises((ValueError, TypeError)):
            ops.grid_attention(*call)
    for position, changed in (
        (0, out[..., :7]),
        (0, out.bfloat16()),
        (0, out.to("meta")),
        (1, query[:1]),
        (2, key.double()),
        (4, bias[:, :3]),
        (5, out[:, :2]),
        (5, out.double()),
        (6, lse[..., :2]),
        (6, lse.bfloat16()),
        (6, lse.double()),
        (6, lse.to("meta")),
        (7, "block"),
        (8, 0),
        (10, nan),
        (12, terms[..., 0]),
        (12, terms.double()),
        (12, terms.to("meta")),
    ):
        with pytest.raises((ValueError, TypeError)):
            ops.grid_attention_backward(*backward[:position], changed, *backward[position + 1 :])

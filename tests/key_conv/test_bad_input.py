"""Every argument of the key convolution, given wrong: an error that names the argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.bad_input import EITHER, TYPE, VALUE, Change, alter, assert_refused, put

pytestmark = pytest.mark.sanitize


def dense_arguments() -> dict[str, Any]:
    return {
        "key": torch.randn(2, 3, 7, 8),
        "weight": torch.randn(3, 8, 4),
        "cu_seqlens": None,
        "state": torch.randn(2, 3, 3, 8),
        "bias": torch.randn(3, 8),
        "activation": "silu",
    }


def packed_arguments() -> dict[str, Any]:
    return {
        "key": torch.randn(7, 3, 8),
        "weight": torch.randn(3, 8, 4),
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32),
        "state": None,
        "bias": torch.randn(3, 8),
        "activation": None,
    }


FORMS: dict[str, Callable[[], dict[str, Any]]] = {"dense": dense_arguments, "packed": packed_arguments}
FLOATING = {"dense": ["key", "weight", "state", "bias"], "packed": ["key", "weight", "bias"]}


def arguments_of(form: str, device: torch.device) -> dict[str, Any]:
    """Good arguments, on ``device``."""
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in FORMS[form]().items()}


def refuse(
    form: str, change: Change, named: str, exceptions: tuple[type[Exception], ...], device: torch.device
) -> None:
    """The call fails with one of ``exceptions``, whose message has one of ``named`` (a|b) as a whole word."""
    assert_refused(tg.key_conv, arguments_of(form, device), change, named, exceptions)


ARGUMENTS = [(form, name) for form, names in FLOATING.items() for name in names]
every_tensor = pytest.mark.parametrize(("form", "name"), ARGUMENTS)


@every_tensor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mixed_dtypes(form: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    if name == "key" and dtype != torch.float64:
        if form == "packed":  # a weight in float32 is right beside keys of 16 bits
            arguments = arguments_of(form, device)
            assert tg.key_conv(**{**arguments, "key": arguments["key"].to(dtype)}).dtype == dtype
            return
        refuse(form, alter(name, lambda tensor: tensor.to(dtype)), "state", TYPE, device)
        return
    refuse(form, alter(name, lambda tensor: tensor.to(dtype)), name + "|weight", TYPE, device)


def test_dense_keys_with_boundaries_and_packed_ones_without(device: torch.device) -> None:
    dense, packed = arguments_of("dense", device), arguments_of("packed", device)
    with pytest.raises(ValueError, match="key must have 3 dimensions"):
        tg.key_conv(dense["key"], dense["weight"], packed["cu_seqlens"])
    with pytest.raises(ValueError, match="key must have 4 dimensions"):
        tg.key_conv(packed["key"], packed["weight"])


def test_state_beside_boundaries(device: torch.device) -> None:
    packed = arguments_of("packed", device)
    with pytest.raises(ValueError, match="state must be None"):
        tg.key_conv(**{**packed, "state": torch.zeros(2, 3, 3, 8, device=device)})


@pytest.mark.parametrize("form", FORMS)
def test_wrong_sizes(form: str, device: torch.device) -> None:
    refuse(form, alter("weight", lambda t: t[:2]), "weight", VALUE, device)
    refuse(form, alter("weight", lambda t: t[:, :7]), "weight", VALUE, device)
    refuse(form, alter("key", lambda t: t[..., :0]), "key", VALUE, device)
    if form == "dense":
        for change in (lambda t: t[:1], lambda t: t[:, :2], lambda t: t[:, :, :2], lambda t: t[..., :7]):
            refuse(form, alter("state", change), "state", VALUE, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [0, 1, 9, 100])
def test_width_out_of_range(form: str, width: int, device: torch.device) -> None:
    refuse(form, put("weight", torch.randn(3, 8, width, device=device)), "weight", VALUE, device)


@pytest.mark.parametrize("name", ["key", "state"])
def test_last_dimension_not_contiguous(name: str, device: torch.device) -> None:
    refuse("dense", alter(name, lambda t: t.mT.contiguous().mT), name, VALUE, device)
    refuse("dense", alter(name, lambda t: t.repeat_interleave(2, dim=-1)[..., ::2]), name, VALUE, device)


def test_a_weight_may_have_any_strides(device: torch.device) -> None:
    """Not an error, and not misread."""
    arguments = arguments_of("packed", device)
    weight = arguments["weight"]
    for strided in (
        weight.mT.contiguous().mT,
        weight.repeat_interleave(2, dim=2)[..., ::2],
        weight[:1].expand(3, 8, 4),
    ):
        expected = tg.key_conv(**{**arguments, "weight": strided.contiguous()})
        assert torch.equal(tg.key_conv(**{**arguments, "weight": strided}), expected)


def test_boundaries_of_another_shape(device: torch.device) -> None:
    refuse("packed", alter("cu_seqlens", lambda t: t[None]), "cu_seqlens", VALUE, device)
    refuse("packed", alter("cu_seqlens", lambda t: t[:0]), "cu_seqlens", VALUE, device)
    refuse("packed", alter("cu_seqlens", lambda t: t.to("meta")), "cu_seqlens|device", EITHER, device)


@pytest.mark.parametrize("wrong", [[1, 3, 7], [0, 3, 6], [0, 3, 8], [0, 5, 3, 7], [0], [-1, 7]], ids=repr)
def test_boundaries_that_do_not_delimit(wrong: list[int]) -> None:
    """On the CPU; on CUDA nobody looks, and test_cuda_contract.py sees that nothing comes of it."""
    change = put("cu_seqlens", torch.tensor(wrong, dtype=torch.int32))
    refuse("packed", change, "cu_seqlens", VALUE, torch.device("cpu"))


def test_registered_ops_check_too(device: torch.device) -> None:
    """Calling torch.ops.topgather past the public function still gives an error, never a crash."""
    ops = torch.ops.topgather
    dense = arguments_of("dense", device)
    key, weight, state = dense["key"], dense["weight"], dense["state"]
    bounds = torch.tensor([0, 7], device=device)
    out = ops.key_conv(key, weight, state, None)
    backward = (out, key, weight, state, None, True)
    ops.key_conv_backward(*backward)
    for call in (
        (key[0], weight, None, None),
        (key.int(), weight, None, None),
        (key.mT, weight, None, None),
        (key, weight[0], None, None),
        (key, weight.half(), None, None),
        (key, weight, state[:1], None),
        (key, weight, state, bounds),
        (key[0], weight, None, bounds.float()),
    ):
        with pytest.raises((ValueError, TypeError)):
            ops.key_conv(*call)
    for position, changed in (
        (0, out[..., :7]),
        (0, out.bfloat16()),
        (0, out.to("meta")),
        (1, key[:1]),
        (2, weight[:2]),
        (3, state.double()),
    ):
        with pytest.raises((ValueError, TypeError)):
            ops.key_conv_backward(*backward[:position], changed, *backward[position + 1 :])


@pytest.mark.parametrize("form", FORMS)
def test_bias_of_another_shape(form: str, device: torch.device) -> None:
    refuse(form, alter("bias", lambda bias: bias[:2]), "bias", VALUE, device)
    refuse(form, alter("bias", lambda bias: bias[:, :7]), "bias", VALUE, device)
    refuse(form, alter("bias", lambda bias: bias.T), "bias", VALUE, device)
    refuse(form, alter("bias", Tensor.flatten), "bias", VALUE, device)
    refuse(form, put("bias", 1.0), "bias", TYPE, device)


@pytest.mark.parametrize("wrong", ["gelu", "SiLU", "", "swish", 1, True, ["silu"]], ids=repr)
def test_unknown_activation(wrong: Any, device: torch.device) -> None:
    refuse("dense", put("activation", wrong), "activation", EITHER, device)
    if isinstance(wrong, str):
        arguments = arguments_of("dense", device)
        with pytest.raises(ValueError, match="activation"):
            torch.ops.topgather.key_conv(arguments["key"], arguments["weight"], None, None, None, wrong)

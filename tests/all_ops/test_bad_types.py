"""Every argument of every op, given as something else: an error that names the argument, on every device.

Sizes, strides and contents that an op refuses are its own affair: ``test_bad_input.py`` in its folder.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.common.ops import CASES, PUBLIC, REGISTERED, OpCase, every
from tests.common.runs import assert_all_equal

pytestmark = pytest.mark.sanitize
TYPE = (TypeError,)
VALUE = (ValueError,)
EITHER = (TypeError, ValueError)
NO_FLOATS = [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
NO_INTEGERS = [torch.float32, torch.bool, torch.int16, torch.uint8]


def arguments(
    of: Callable[[Any], bool],
    cases: list[OpCase] = CASES,
    which: Callable[[OpCase, str], bool] = lambda case, name: True,
) -> Any:
    """Run a test over arguments whose value ``of`` takes, as its parameters ``case`` and ``name``."""
    found = [(case, name) for case in cases for name, value in case.example.items() if of(value) and which(case, name)]
    return pytest.mark.parametrize(("case", "name"), found, ids=[f"{case}-{name}" for case, name in found])


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_float(value: Any) -> bool:
    return isinstance(value, float)


def refuse(
    case: OpCase, name: str, wrong: Any, exceptions: tuple[type[Exception], ...], named: str, device: torch.device
) -> None:
    """The call with ``wrong`` fails with one of ``exceptions``, whose message has one of ``named`` (a|b) as a word.

    Of a registered op torch itself refuses what its schema does not allow, by a RuntimeError.
    """
    inputs = case.inputs(torch.float32, device)
    inputs[name] = wrong(inputs[name]) if callable(wrong) else wrong
    with pytest.raises(exceptions if case.is_public else (*exceptions, RuntimeError)) as info:
        case.function(**inputs)
    if case.is_public:
        assert type(info.value) in exceptions, f"{wrong!r}: {info.value!r}"
    assert re.search(rf"\b({named})\b", str(info.value)), f"{wrong!r}: does not name {named}: {info.value}"


def tensors_of(case: OpCase) -> str:
    """The names of all tensors: where two do not go together the message may begin with either."""
    return "|".join([*case.tensors(), "cache"])


@arguments(is_tensor)
def test_not_a_tensor(case: OpCase, name: str, device: torch.device) -> None:
    for wrong in (None, 3.0, [[1.0]], "query"):
        if wrong is None and name in case.optional:
            continue
        # num_tokens may be a list of ints, too.
        refuse(case, name, wrong, EITHER if "tokens" in name else TYPE, name, device)


# `torch.ops.topgather.*` under grad mode, autocast and without either: three ways to a kernel.
MODES = {"plain": torch.no_grad, "grad": torch.enable_grad, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("mode", MODES)
@arguments(is_tensor, REGISTERED)
def test_none_for_a_tensor_of_a_registered_op(case: OpCase, name: str, mode: str) -> None:
    """Torch itself hands on None for any tensor."""
    inputs = case.inputs(torch.float32, torch.device("cpu"), requires_grad=mode == "grad")
    inputs[name] = None
    if name in case.optional:
        return
    with MODES[mode](), pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, got NoneType"):
        case.function(**inputs)


@arguments(is_tensor)
def test_unsupported_dtype(case: OpCase, name: str, device: torch.device) -> None:
    for dtype in NO_FLOATS if case.example[name].is_floating_point() else NO_INTEGERS:
        refuse(case, name, lambda tensor, dtype=dtype: tensor.to(dtype), TYPE, tensors_of(case), device)


@every(CASES)
def test_unsupported_dtype_throughout(case: OpCase, device: torch.device) -> None:
    for dtype in NO_FLOATS:
        inputs = case.inputs(torch.float32, device)
        inputs |= {name: inputs[name].to(dtype) for name in case.tensors(floating=True)}
        with pytest.raises(TypeError, match=rf"\b({tensors_of(case)})\b"):
            case.function(**inputs)


@every(CASES)
def test_float64_is_for_the_cpu(case: OpCase, cuda_device: torch.device) -> None:
    inputs = case.inputs(torch.float32, cuda_device)
    inputs |= {name: inputs[name].double() for name in case.tensors(floating=True)}
    with pytest.raises(TypeError, match=rf"\b({tensors_of(case)})\b"):
        case.function(**inputs)


@arguments(is_tensor)
def test_wrong_number_of_dimensions(case: OpCase, name: str, device: torch.device) -> None:
    for wrong in (lambda tensor: tensor[0], lambda tensor: tensor[None], lambda tensor: tensor.flatten()[0]):
        refuse(case, name, wrong, VALUE, tensors_of(case), device)


@arguments(is_tensor)
def test_another_device(case: OpCase, name: str, device: torch.device) -> None:
    others = len(case.tensors()) > 1 or "cache" in case.example
    if others:
        refuse(case, name, lambda tensor: tensor.to("meta"), EITHER, f"{tensors_of(case)}|device", device)
    else:
        assert case.function(**{**case.inputs(torch.float32, device), name: case.example[name].to("meta")}).is_meta


@arguments(is_tensor)
def test_sparse_layout(case: OpCase, name: str, device: torch.device) -> None:
    named = name if case.is_public else f"{name}|Sparse\\w+"
    refuse(case, name, Tensor.to_sparse, EITHER, named, device)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor.unbind())),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@arguments(lambda value: is_tensor(value) and value.is_floating_point() and value.ndim > 1)
def test_tensors_of_other_kinds(case: OpCase, name: str, requires_grad: bool, kind: str) -> None:
    """Where no kernel takes them, an op says so itself, not the dispatcher."""
    inputs = case.inputs(torch.float32, torch.device("cpu"), requires_grad=requires_grad)
    wrong = KINDS[kind](inputs[name].detach())
    with pytest.raises((TypeError, ValueError), match=rf"\b({tensors_of(case)})\b"):
        case.function(**inputs | {name: wrong.requires_grad_(requires_grad and kind == "nested")})


@arguments(is_flag, PUBLIC)
def test_flag_of_another_type(case: OpCase, name: str, device: torch.device) -> None:
    for wrong in (1, 0, None, "yes", torch.tensor(True)):
        if wrong is not None or name not in case.optional:
            refuse(case, name, wrong, TYPE, name, device)


@arguments(is_int)
def test_integer_of_another_type(case: OpCase, name: str, device: torch.device) -> None:
    # What torch makes an int of before a registered op sees it is none of the op's business.
    wrongs = (1.5, 8.0, True, "8", [8], torch.tensor(8.0), {8}) if case.is_public else (1.5, "8", [8], {8})
    for wrong in wrongs:
        refuse(case, name, wrong, TYPE, name, device)
    if name not in case.optional:
        refuse(case, name, None, TYPE, name, device)


@arguments(is_int)
def test_integer_out_of_range(case: OpCase, name: str, device: torch.device) -> None:
    # A row may be counted from the end of a table.
    may_be_zero = name.startswith(("max_seqlen", "force_", "seed"))
    below_least = {"padding_idx": (20, -21)}.get(name, (-2,) if may_be_zero else (0, -1))
    too_small = (*below_least, -(2**63), -(2**70))
    for wrong in (*too_small, 2**31, 2**63 - 1, 2**64, 2**70):
        # Python's ints may have more bits than torch's.
        named = name if case.is_public or -(2**63) <= wrong < 2**63 else f"{name}|Overflow|overflow|too (big|large)"
        refuse(case, name, wrong, VALUE if case.is_public else EITHER, named, device)


@arguments(is_float)
def test_number_of_another_type(case: OpCase, name: str, device: torch.device) -> None:
    for wrong in ("1", True, [1.0], torch.ones(2), 1j) if case.is_public else ("1", [1.0], torch.ones(2), 1j):
        refuse(case, name, wrong, TYPE, name, device)


@arguments(is_float)
def test_number_that_is_not_finite(case: OpCase, name: str, device: torch.device) -> None:
    for wrong in (float("nan"), float("inf"), -float("inf")):
        refuse(case, name, wrong, VALUE, name, device)
    if case.is_public:
        refuse(case, name, 10**400, VALUE, name, device)


@every(PUBLIC)
def test_unknown_and_missing_arguments(case: OpCase) -> None:
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    with pytest.raises(TypeError, match="blocksize"):
        case.function(**inputs, blocksize=3)
    for parameter in inspect.signature(case.function).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            with pytest.raises(TypeError, match=parameter.name):
                case.function(**{name: value for name, value in inputs.items() if name != parameter.name})


@pytest.mark.usefixtures("deterministic")
@every(CASES)
def test_an_error_leaves_the_op_usable(case: OpCase, device: torch.device) -> None:
    expected = case.everything(case.inputs(torch.float32, device, requires_grad=True))
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    name = case.tensors()[-1]
    with pytest.raises(ValueError, match=rf"\b({tensors_of(case)})\b"):
        case.function(**{**inputs, name: inputs[name][None]})
    assert_all_equal(case.everything(inputs), expected)

"""Every op reaches its CPU kernel past the dispatcher in a plain program, and goes through it in any other."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common.emulated import through_dispatcher
from tests.common.ops import CASES, REGISTERED, Inputs, OpCase, every
from topgather._common.spec import CALLERS

CPU = torch.device("cpu")
FUNCTIONAL = [case for case in REGISTERED if not case.written]


class Direct(Exception):
    """Raised by what stands in for a kernel."""


def stand_in(*args: Any, **kwargs: Any) -> Any:
    raise Direct


def name_of(case: OpCase) -> str:
    return case.function.__name__.removesuffix(".default")


def caller_of(case: OpCase) -> Callable[..., Any]:
    """What the package calls the op by, with a kernel for direct calls that raises :class:`Direct`."""
    caller: Any = CALLERS[name_of(case)]
    names = {**caller.__globals__, "kernel": stand_in}
    made = FunctionType(caller.__code__, names, caller.__name__, caller.__defaults__, caller.__closure__)
    made.__kwdefaults__ = caller.__kwdefaults__
    return made


def is_direct(case: OpCase, inputs: Inputs) -> bool:
    """Whether a call goes straight to the kernel; one that does not returns what it returns."""
    try:
        caller_of(case)(**inputs)
    except Direct:
        return True
    return False


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Its methods are those of torch, which wraps every result in it."""


@contextmanager
def profiled() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


def first_tensor(inputs: Inputs, make: Callable[[Tensor], Tensor]) -> Inputs:
    name = next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return inputs | {name: make(inputs[name])}


@every(FUNCTIONAL)
def test_plain_calls_are_direct(case: OpCase) -> None:
    inputs = case.inputs(torch.float32, CPU)
    assert is_direct(case, inputs)
    with torch.no_grad():
        assert is_direct(case, first_tensor(inputs, torch.nn.Parameter))
    with torch.inference_mode():
        assert is_direct(case, inputs)
        assert is_direct(case, case.inputs(torch.float32, CPU))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Watching,
    "function mode": WatchingFunctions,
    "device context": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu"),
    "dual numbers": forward_ad.dual_level,
    "profiler": profiled,
    "through_dispatcher": through_dispatcher,
}


@pytest.mark.parametrize("state", STATES)
@every(FUNCTIONAL)
def test_a_state_that_torch_acts_on_goes_through_it(case: OpCase, state: str) -> None:
    inputs = case.inputs(torch.float32, CPU)
    with STATES[state]():
        assert not is_direct(case, inputs)
    assert is_direct(case, inputs)


@every(FUNCTIONAL)
def test_tensors_that_torch_acts_on_go_through_it(case: OpCase) -> None:
    inputs = case.inputs(torch.float32, CPU)
    assert not is_direct(case, first_tensor(inputs, lambda tensor: tensor.neg()._neg_view()))
    if "sparse" not in case.name:  # torch can wrap no sparse result
        assert not is_direct(case, first_tensor(inputs, lambda tensor: tensor.as_subclass(Subclass)))
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            assert not is_direct(case, fakes)
    with torch.no_grad():
        outside = torch.zeros(())

    def mapped(unused: Tensor) -> Tensor:
        assert not is_direct(case, inputs)
        return unused

    torch.vmap(mapped)(torch.zeros(2))
    torch.func.grad(mapped)(outside)


@every([case for case in FUNCTIONAL if case.differentiable])
def test_calls_to_differentiate_go_through_it(case: OpCase) -> None:
    assert not is_direct(case, case.inputs(torch.float32, CPU, requires_grad=True))


@every(CASES)
def test_direct_calls_have_the_same_bits(case: OpCase) -> None:
    direct = case.run(case.inputs(torch.float32, CPU))
    with through_dispatcher():
        dispatched = case.run(case.inputs(torch.float32, CPU))
    for name, tensor in dispatched.items():
        assert torch.equal(direct[name], tensor) and direct[name].stride() == tensor.stride(), name


@every(CASES)
@pytest.mark.parametrize("kind", ["dispatch mode", "function mode", "profiler"])
def test_who_watches_sees_every_op(case: OpCase, kind: str) -> None:
    inputs = case.inputs(torch.float32, CPU)
    if kind == "profiler":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            case.run(inputs)
        assert any(event.name.startswith("topgather::") for event in profile.events())
        return
    watching: Any = STATES[kind]()
    with watching:
        case.run(inputs)
    assert any(name.startswith("topgather") for name in watching.seen)


def test_negated_views_are_read_as_what_they_stand_for() -> None:
    """A kernel would read the memory, in which signs are the other way round."""
    for case in FUNCTIONAL:
        inputs = case.inputs(torch.float32, CPU)
        expected = case.run(inputs)
        negated = first_tensor(inputs, lambda tensor: tensor.neg()._neg_view())
        results = case.run(negated)
        called = CALLERS[name_of(case)](**negated)
        named = dict(zip(case.results, (called,) if isinstance(called, Tensor) else called, strict=True))
        for name, tensor in expected.items():
            assert torch.equal(results[name], tensor), (case.name, name)
            found = named[name].to_dense() if named[name].is_sparse else named[name]
            assert torch.equal(found, tensor), (case.name, name)


def test_other_threads_have_states_of_their_own() -> None:
    """One thread under a mode does not keep another from calling directly, nor the other way round."""
    case = FUNCTIONAL[0]
    inputs, found = case.inputs(torch.float32, CPU), []
    with Watching():
        thread = threading.Thread(target=lambda: found.append(is_direct(case, inputs)))
        thread.start()
        thread.join()
        assert not is_direct(case, inputs)
    assert found == [True]

"""A call that is refused, or that fails half-way, leaves a cache as it was, bit for bit.

Methods, their parameters and what a cache holds are found by introspection: a new method or a new attribute is tested
without being named here, except for one valid call of the method.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import topgather as tg
import topgather.cache

CLASSES = [cls for cls in vars(topgather.cache).values() if inspect.isclass(cls)]
BATCH, HEADS, DIM, VALUE_DIM, BLOCK, MAX_SEQ_LEN, PAGE = 2, 2, 8, 6, 4, 32, 8
# Methods that change nothing; every other public one is a mutator.
READERS = {"copy", "to", "token_counts", "check_whole"}
# A valid call of every mutator, on a cache of any state that STATES makes.
CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "append": lambda cache: {
        "key": torch.randn(BATCH, HEADS, 3, DIM, device=cache.device),
        "value": torch.randn(BATCH, HEADS, 3, VALUE_DIM, device=cache.device),
        "num_tokens": [1, 2],
    },
    "truncate": lambda cache: {"lengths": [max(0, length - 2) for length in cache.lengths]},
    "reorder": lambda cache: {"indices": [1, 1]},
    "reserve": lambda cache: {"num_tokens": [2, 1]},
    "reset": lambda cache: {},
}
REFUSALS = (TypeError, ValueError, IndexError, NotImplementedError)


def mutators(cls: type) -> Iterator[str]:
    for name, _ in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("_") and name not in READERS:
            yield name


MUTATORS = [pytest.param(cls, name, id=f"{cls.__name__}.{name}") for cls in CLASSES for name in mutators(cls)]


def test_every_mutator_has_a_valid_call() -> None:
    assert {cls.__name__ for cls in CLASSES} == {"MobaCache", "PagedMobaCache"}
    for cls in CLASSES:
        names = set(mutators(cls))
        assert names <= set(CALLS), f"write a valid call of {names - set(CALLS)}"
        assert {"append", "truncate", "reorder", "reset"} <= names


# --- states of a cache ------------------------------------------------------------------------------------------------


def make(cls: type, device: torch.device, conv: bool, num_pages: int = 12) -> Any:
    weight = torch.randn(HEADS, DIM, 3, device=device) if conv else None
    options = {"page_size": PAGE, "num_pages": num_pages} if issubclass(cls, topgather.cache.PagedMobaCache) else {}
    return cls(
        BATCH, HEADS, DIM, block_size=BLOCK, max_seq_len=MAX_SEQ_LEN, value_dim=VALUE_DIM, device=device,
        conv_weight=weight, **options,
    )  # fmt: skip


def fill(cache: Any, counts: list[int]) -> Any:
    key = torch.randn(BATCH, HEADS, max(counts), DIM, device=cache.device)
    value = torch.randn(BATCH, HEADS, max(counts), VALUE_DIM, device=cache.device)
    cache.append(key, value, num_tokens=counts)
    return cache


def shared(cls: type, device: torch.device, conv: bool) -> Any:
    """Both sequences go on from one, of whole pages, and no page is free."""
    cache = fill(make(cls, device, conv, num_pages=2), [16, 0])
    cache.reorder([0, 0])
    return cache


STATES: dict[str, Callable[[type, torch.device, bool], Any]] = {
    "empty": make,
    "filled": lambda cls, device, conv: fill(make(cls, device, conv), [13, 6]),
    "shared pages, none free": shared,
    "full": lambda cls, device, conv: fill(make(cls, device, conv), [32, 31]),
}


def state_of(held: Any, hide_free_pages: bool = False) -> Any:
    """All that an object holds: tensors by their place, layout and bits."""
    if isinstance(held, Tensor):
        bits = held.detach().contiguous().view(torch.uint8).clone() if held.dtype != torch.bool else held.clone()
        return (held.data_ptr(), tuple(held.shape), held.stride(), held.dtype, bits)
    if isinstance(held, list):
        return [state_of(item) for item in held]
    if not isinstance(held, topgather.cache._base.BaseCache):
        return held
    held_state = {}
    for name, value in vars(held).items():
        if hide_free_pages and isinstance(value, Tensor) and name in ("key_pages", "value_pages", "centroids"):
            users = getattr(held, "_num_users", [1] * held.batch_size)
            value = value[[page for page, count in enumerate(users) if count > 0]].clone()
            held_state[name] = state_of(value)[1:]
        else:
            held_state[name] = state_of(value)
    return held_state


def differences(before: Any, after: Any, path: str = "cache") -> list[str]:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        return [found for name in before for found in differences(before[name], after[name], f"{path}.{name}")]
    if isinstance(before, tuple) and isinstance(before[-1], Tensor) and isinstance(after, tuple):
        same = before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])
    else:
        same = before == after
    return [] if same else [path]


# --- inputs that are refused ------------------------------------------------------------------------------------------


def dual(tensor: Tensor) -> Tensor:
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "no tensor": lambda tensor: tensor.tolist(),
    "None": lambda tensor: None,
    "float64": lambda tensor: tensor.double(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "int64": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "another batch": lambda tensor: torch.cat([tensor, tensor]),
    "other heads": lambda tensor: torch.cat([tensor, tensor], dim=1),
    "another width": lambda tensor: torch.cat([tensor, tensor], dim=3),
    "other tokens": lambda tensor: tensor[:, :, :1],
    "three dimensions": lambda tensor: tensor[0],
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "requires grad": lambda tensor: tensor.clone().requires_grad_(),
    "a tangent": dual,
    "columns apart": lambda tensor: tensor.mT.contiguous().mT,
}
WRONG_COUNTS: dict[str, Any] = {
    "a float": 1.5,
    "a string": "ab",
    "bytes": b"ab",
    "True": True,
    "negative": -1,
    "too large": 2**31,
    "huge": 2**31 - 1,
    "too many": [1] * (BATCH + 1),
    "floats": [1.0] * BATCH,
    "bools": [True] * BATCH,
    "negative ints": [0, -1],
    "beyond what there is": [0, 40],
    "strings": ["a"] * BATCH,
    "nested": [[1], [1]],
    "a float tensor": torch.ones(BATCH),
    "a bool tensor": torch.ones(BATCH, dtype=torch.bool),
    "a tensor of two dimensions": torch.ones(BATCH, 1, dtype=torch.int64),
    "a tensor without dimensions": torch.tensor(1),
    "a negative tensor": torch.tensor([0, -1]),
    "an object": object(),
}


def wrong_arguments(name: str, cache: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The valid call with one argument wrong, for each argument and each way to be wrong."""
    valid = CALLS[name](cache)
    for parameter, value in valid.items():
        if isinstance(value, Tensor):
            yield from ((f"{parameter}: {kind}", {**valid, parameter: make_wrong(value)})
                        for kind, make_wrong in WRONG_TENSORS.items())  # fmt: skip
        else:
            yield from ((f"{parameter}: {kind}", {**valid, parameter: wrong}) for kind, wrong in WRONG_COUNTS.items())
    tensors = {parameter: value for parameter, value in valid.items() if isinstance(value, Tensor)}
    if tensors:
        more = {parameter: value.repeat(1, 1, 20, 1) for parameter, value in tensors.items()}
        yield "more tokens than max_seq_len", {**valid, **more, "num_tokens": None}


def modes(device: torch.device) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {
        "plain": nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast(device.type, torch.bfloat16),
    }


# What is right to pass after all: these modes record no gradients, inference mode no tangents either. And a cache may
# be reordered to any number of sequences.
PASSES = {("requires grad", "no_grad"), ("requires grad", "inference_mode"), ("a tangent", "inference_mode")}


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("cls", "name"), MUTATORS)
def test_a_refused_call_changes_nothing(cls: type, name: str, state: str, conv: bool, device: torch.device) -> None:
    cache = STATES[state](cls, device, conv)
    num_refused = 0
    for mode, context in modes(device).items():
        with forward_ad.dual_level():
            for kind, arguments in wrong_arguments(name, cache):
                before, target = state_of(cache), cache
                if kind == "indices: too many" or (kind.split(": ")[-1], mode) in PASSES:
                    target = cache.copy()
                with context():
                    try:
                        getattr(target, name)(**arguments)
                    except REFUSALS as error:
                        num_refused += 1
                        assert str(error), kind
                    else:
                        assert target is not cache, f"{name}({kind}) was not refused under {mode}"
                assert not differences(before, state_of(cache)), f"{name}({kind}) under {mode}"
    assert num_refused > 0 or not CALLS[name](cache)


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize(("cls", "name"), MUTATORS)
def test_transforms_are_refused(cls: type, name: str, conv: bool, device: torch.device) -> None:
    """A tensor that a transform wraps cannot be stored."""
    cache = fill(make(cls, device, conv), [13, 6])
    valid = CALLS[name](cache)
    before = state_of(cache)
    for parameter, value in valid.items():
        if not isinstance(value, Tensor):
            continue

        def call(tensor: Tensor, parameter: str = parameter) -> Tensor:
            getattr(cache, name)(**{**valid, parameter: tensor})
            return tensor.sum()

        transforms = {
            "vmap": lambda call=call, value=value: torch.vmap(call)(value[None]),
            "grad": lambda call=call, value=value: torch.func.grad(call)(value),
            "jvp": lambda call=call, value=value: torch.func.jvp(call, (value,), (value,)),
            "functionalize": lambda call=call, value=value: torch.func.functionalize(call)(value),
        }
        for kind, transform in transforms.items():
            with pytest.raises(REFUSALS, match=f"{parameter} must not"):
                transform()
            assert not differences(before, state_of(cache)), f"{name}({parameter}) under {kind}"


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize(("cls", "name", "state", "arguments", "match"), [
    (topgather.cache.PagedMobaCache, "truncate", "shared pages, none free", {"lengths": [15, 15]}, "is to be copied"),
    (topgather.cache.PagedMobaCache, "truncate", "shared pages, none free", {"lengths": [15, 14]}, "is to be copied"),
    (topgather.cache.PagedMobaCache, "reserve", "shared pages, none free", {"num_tokens": 1}, "more pages"),
])  # fmt: skip
def test_shared_pages(
    cls: type, name: str, state: str, arguments: dict[str, Any], match: str, conv: bool, device: torch.device
) -> None:
    cache = STATES[state](cls, device, conv)
    before = state_of(cache)
    with pytest.raises(ValueError, match=match):
        getattr(cache, name)(**arguments)
    assert not differences(before, state_of(cache))


# --- failures half-way ------------------------------------------------------------------------------------------------


class _FailsAt(TorchDispatchMode):
    """Fails the n-th op that allocates or that this package has written."""

    def __init__(self, countdown: int) -> None:
        super().__init__()
        self.countdown = countdown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "topgather" or not func._schema.is_mutable:
            self.countdown -= 1
            if self.countdown == 0:
                raise MemoryError("no memory for this test")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("cls", "name"), MUTATORS)
def test_a_call_that_runs_out_of_memory_changes_nothing(
    cls: type, name: str, state: str, conv: bool, device: torch.device
) -> None:
    """Wherever it does so. What free pages hold is nobody's."""
    cache = STATES[state](cls, device, conv)
    arguments = CALLS[name](cache)
    expected = cache.copy()
    try:
        getattr(expected, name)(**arguments)
    except ValueError:
        return  # this state has no room for it: tested above
    before = state_of(cache, hide_free_pages=True)
    for countdown in range(1, 500):
        try:
            with _FailsAt(countdown):
                getattr(cache, name)(**arguments)
        except MemoryError:
            assert not differences(before, state_of(cache, hide_free_pages=True)), f"at op {countdown}"
        else:
            break
    # Failures before it have not harmed the call that succeeded.
    assert cache.lengths == expected.lengths == cache.seq_lens.tolist()
    query = torch.randn(BATCH, HEADS, 1, DIM, device=device)
    assert torch.equal(*(tg.moba_decode(query, each, top_k=2, num_tokens=[1, 1]) for each in (cache, expected)))
    if conv:
        assert torch.equal(cache._raw_keys, expected._raw_keys)


# --- interrupts -------------------------------------------------------------------------------------------------------


class _InterruptsAt(TorchDispatchMode):
    """Interrupts before the n-th op."""

    def __init__(self, countdown: int) -> None:
        super().__init__()
        self.countdown = countdown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def decoded(cache: Any) -> Tensor:
    """Of one more token, which tells of keys, values, centroids, lengths and the convolution's state."""
    cache, generator = cache.copy(), torch.Generator().manual_seed(2)
    shape = (cache.batch_size, HEADS, 1)
    key, value = (torch.randn(*shape, dim, generator=generator).to(cache.device) for dim in (DIM, VALUE_DIM))
    cache.append(key, value)
    return tg.moba_decode(key, cache, top_k=2)


# Calls that write as much as they can.
INTERRUPTED: dict[str, list[dict[str, Any]]] = {
    "reorder": [{"indices": [1, 0]}, {"indices": [1, 0, 1]}],
    "reserve": [{"num_tokens": 12}],
}


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize(("cls", "name"), MUTATORS)
def test_an_interrupted_call_is_undone_or_known(cls: type, name: str, conv: bool, device: torch.device) -> None:
    """A cache is what it was, or knows that it holds a part of what was to be written, until it is reset."""
    weight = make(cls, device, conv).conv_weight
    num_known = 0

    def filled(cache: Any) -> Any:
        torch.manual_seed(1)
        cache.conv_weight = weight
        return fill(cache, [13, 6])

    for change in INTERRUPTED.get(name, [{}]):
        for countdown in range(1, 500):
            cache = filled(make(cls, device, conv))
            arguments, expected = CALLS[name](cache) | change, decoded(cache)
            try:
                with _InterruptsAt(countdown):
                    getattr(cache, name)(**arguments)
                break
            except KeyboardInterrupt:
                pass
            try:
                cache.check_whole()
            except RuntimeError:
                num_known += 1
            else:
                assert torch.equal(decoded(cache), expected), f"{name} at op {countdown}"
                continue
            message = f"interrupted in the middle of {name}: .* reset"
            for other in set(mutators(cls)) - {"reset"}:
                with pytest.raises(RuntimeError, match=message):
                    getattr(cache, other)(**CALLS[other](cache))
            with pytest.raises(RuntimeError, match=message):
                tg.moba_decode(torch.randn(cache.batch_size, HEADS, 1, DIM, device=device), cache)
            cache.reset()
            cache.reorder([0] * BATCH)
            assert torch.equal(decoded(filled(cache)), expected), f"{name} at op {countdown}"
    assert num_known > 0


# --- the harness itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_changes_are_seen(cls: type) -> None:
    """A bit of any tensor, and an item of any list."""
    cache = fill(make(cls, torch.device("cpu"), conv=True), [13, 6])
    names = [name for name, held in vars(cache).items() if isinstance(held, (Tensor, list))]
    assert {"key_pages", "value_pages", "centroids", "seq_lens", "_raw_keys", "_lengths"} <= set(names)
    for name in names:
        other = cache.copy()
        before = state_of(other)
        held = getattr(other, name)
        if isinstance(held, Tensor):
            held[..., -1:].view(torch.uint8).bitwise_xor_(torch.ones((), dtype=torch.uint8, device=held.device))
        else:
            held.append(copy.deepcopy(held[0]))
        assert differences(before, state_of(other)) == [f"cache.{name}"], name

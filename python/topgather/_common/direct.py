"""Calls that the dispatcher would hand to the CPU kernel as they are, and how to know them.

Going through the dispatcher, to a kernel written in Python and back, costs about as much as all else of a small call.
What happens on the way is a function of three things: the dispatch keys of the tensors, the keys that the thread
includes and excludes (autocast, ``torch.func``, fake tensors, modes, tracing, inference mode), and what watches calls
(modes of ``__torch_function__``, profilers). Where all are as in a plain program nothing happens, and the kernel may be
called. Whatever else there is, and what this file does not know, takes the dispatcher's way. Who registers a kernel
of his own over one of the package opens :func:`through_dispatcher`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_num_function_modes, _is_profiling = torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled

keys_of = torch._C._dispatch_keys

# Subclasses may have methods of their own (__torch_function__, __torch_dispatch__); a parameter has none.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

# What a scalar of a schema's type is when the dispatcher would change nothing about it.
SCALAR_TYPES: dict[str, type] = {"int": int, "SymInt": int, "float": float, "bool": bool, "str": str}


def _state() -> tuple[int, int]:
    return _included().raw_repr(), _excluded().raw_repr()


def _states_and_keys() -> tuple[frozenset[tuple[int, int]], frozenset[int]]:
    """A thread's keys in a plain program, outside and in inference mode, and those of CPU tensors made in either."""
    states, keys = set(), set()
    for is_inference in (False, True):
        with torch.inference_mode(is_inference), torch.autocast("cpu", enabled=False):
            states.add(_state())
            keys.add(keys_of(torch.empty(0, device="cpu")).raw_repr())
    return frozenset(states), frozenset(keys)


_direct_states, PLAIN_KEYS = _states_and_keys()


def is_undisturbed() -> bool:
    """Whether this thread's calls meet nothing on their way to a kernel but what their tensors bring."""
    return _state() in _direct_states and not _num_function_modes() and not _is_profiling()


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """While open, every call of every thread goes through the dispatcher."""
    global _direct_states
    before, _direct_states = _direct_states, frozenset()
    try:
        yield
    finally:
        _direct_states = before


def condition(arguments: list[Any], tensors: list[str]) -> str | None:
    """An expression of a call's arguments that holds where the kernel may be called; None if it never may.

    ``arguments`` are those of the schema. The names that it uses are :data:`NAMES`.
    """
    parts = []
    for argument in arguments:
        name, text = argument.name, str(argument.type)
        is_optional = isinstance(argument.type, torch.OptionalType)
        if name in tensors:
            part = f"type({name}) in PLAIN_TYPES and keys_of({name}).raw_repr() in PLAIN_KEYS"
        else:
            text = text.removeprefix("Optional[").removesuffix("]") if is_optional else text
            if text not in SCALAR_TYPES:
                return None
            part = f"type({name}) is {SCALAR_TYPES[text].__name__}"
        parts.append(f"({name} is None or {part})" if is_optional else part)
    return " and ".join(["is_undisturbed()", *parts])


NAMES: dict[str, Any] = {
    "is_undisturbed": is_undisturbed,
    "keys_of": keys_of,
    "PLAIN_KEYS": PLAIN_KEYS,
    "PLAIN_TYPES": PLAIN_TYPES,
}

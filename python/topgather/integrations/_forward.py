"""What a model's forward in progress knows: which module asks for which cache layer, and what was made of its masks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ._cache import MobaLayer


class _State(threading.local):
    memo: dict[Any, Any] | None = None  # of the forward in progress; None outside of one
    num_calls = 0  # of the attention function so far
    asking: tuple[ref[nn.Module], ref[MobaLayer]] | None = None
    indexed: tuple[ref[nn.Module], dict[str, Any]] | None = None  # an indexer, and what it was given

    def __init__(self) -> None:
        self.in_progress: list[tuple[nn.Module, Any]] = []  # models, and what they began with
        self.parts: list[ref[Tensor]] = []  # keys that a layer gave in this forward, of new tokens alone


_state = _State()


def begin(model: nn.Module, note: Any) -> None:
    """``model``'s forward starts: nothing is known of its masks."""
    _state.memo = {}
    _state.parts.clear()
    _drop(model)  # one that never ended, as a keyboard interrupt leaves it
    _state.in_progress.append((model, note))


def end(model: nn.Module) -> Any:
    """It is over, and ``begin``'s note returned. What was remembered is forgotten: its tensors may be refilled."""
    _state.memo = None
    _state.indexed = None
    _state.parts.clear()
    return _drop(model)


def name_of_model() -> str | None:
    """The class of the model whose forward was called, for messages."""
    return type(_state.in_progress[0][0]).__name__ if _state.in_progress else None


def name_of_part() -> str:
    """The class of the model whose forward is in progress, and that of the one that it is a part of."""
    names = dict.fromkeys(type(model).__name__ for model, _ in (_state.in_progress[-1:] + _state.in_progress[:1]))
    return " of ".join(names) or "the model"


def _drop(model: nn.Module) -> Any:
    for depth, (other, note) in enumerate(_state.in_progress):
        if other is model:
            del _state.in_progress[depth:]
            return note
    return None


def remembered(make: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    """``make(tensor, *args)``, once in a forward: all its layers get the same masks and positions."""
    memo = None if torch.compiler.is_compiling() else _state.memo
    if memo is None:
        return make(tensor, *args)
    tensors = (tensor, *(arg for arg in args if isinstance(arg, Tensor)))
    versions = tuple(0 if each.is_inference() else each._version for each in tensors)
    key = (make, *(id(arg) if isinstance(arg, Tensor) else arg for arg in (tensor, *args)), versions)
    if key not in memo:
        memo[key] = (tensors, make(tensor, *args))  # the tensors too: another could get the id of one that is gone
    return memo[key][1]


def count_call() -> None:
    """The attention function was called."""
    _state.num_calls += 1


def num_calls() -> int:
    """How often it was in this thread."""
    return _state.num_calls


def ask(module: nn.Module, layer: MobaLayer | None) -> None:
    """``module`` is about to run, with ``layer`` for its keys."""
    _state.asking = None if layer is None else (ref(module), ref(layer))


def layer_asked_by(module: nn.Module) -> MobaLayer | None:
    """The layer that ``module``, which is running, has its keys in."""
    if _state.asking is None or _state.asking[0]() is not module:
        return None
    return _state.asking[1]()


def note_indexed(indexer: nn.Module, given: dict[str, Any]) -> None:
    """``indexer`` is about to choose blocks by what it is ``given``."""
    _state.indexed = ref(indexer), given


def noted_of(indexer: nn.Module) -> dict[str, Any] | None:
    """What ``indexer`` was given, if it was the last to choose. It is forgotten."""
    noted, _state.indexed = _state.indexed, None
    return noted[1] if noted is not None and noted[0]() is indexer else None


def note_part(key: Tensor) -> None:
    """A layer gave ``key``, which is not all it holds, to the module that asked for it."""
    _state.parts.append(ref(key))


def is_part(key: Tensor) -> bool:
    """Whether ``key`` is what a layer gave, in this forward, to a module that was to attend by blocks."""
    return any(part() is key for part in _state.parts)

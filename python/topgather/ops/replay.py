"""Record the blocks that a model's layers choose, and have them choose the same again.

Source: Rollout Routing Replay, arXiv 2510.11370, section 3, which replays a rollout's choice of experts in training, as
is done here with blocks.

A call that chooses by itself goes by :func:`choose` where ``state.is_watched`` says that somebody cares. Which record
is meant is a context variable: other threads have their own. What ``torch.utils.checkpoint`` repeats in a backward,
perhaps in a thread of autograd and after the context has ended, is told by its checkpoint: the frame that torch keeps
of it remembers what its first pass chose.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from itertools import count
from types import FrameType, TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
import torch.utils.checkpoint
from torch import Tensor

from .._common import checks
from .routing import BlockRouting, RoutingRecord


class Call(NamedTuple):
    """What a call that chooses blocks by itself tells of itself."""

    per_query: tuple[int, ...]  # [B, Hq, Nq], packed [Hq, total_q]
    num_kv_heads: int
    num_keys: int | None  # None where only the device knows
    block_size: int
    top_k: int
    device: torch.device


class _State:
    """``is_watched`` is read by compiled code as well, which is compiled anew where it changes."""

    is_watched = False

    def __init__(self) -> None:
        self._watchers: set[int] = set()  # of contexts, and of checkpoints that remember
        # One that the thread holding it may take again: a checkpoint may be collected at any point of any thread.
        self._lock = threading.RLock()

    def add(self, watcher: int) -> None:
        with self._lock:
            self._watchers.add(watcher)
            self.is_watched = True

    def discard(self, watcher: int) -> None:
        with self._lock:
            self._watchers.discard(watcher)
            self.is_watched = bool(self._watchers)


state = _State()
_watchers = count()
_variable: ContextVar[_Recording | _Replaying | None] = ContextVar("topgather_routing", default=None)


def _active() -> _Recording | _Replaying | None:
    """What stands around this call.

    Who left it in another context of contextvars, as a generator does that another thread or task closes, could not
    reset the variable of this one.
    """
    active = _variable.get()
    return None if active is None or active.has_ended else active


class _Recording:
    owner: _Context | None = None
    has_ended = False

    def __init__(self, share_every: int) -> None:
        self.watcher = next(_watchers)
        self.record = RoutingRecord((), share_every)
        self.last: Call | None = None
        self.before: tuple[int, int, Call | None] = (0, 0, None)

    def choose(self, route: Callable[..., Tensor], arguments: tuple[Any, ...], call: Call) -> Tensor:
        record = self.record
        self.before = (record._num_calls, len(record._choices), self.last)
        if record._num_calls % record.share_every != 0:
            if call != self.last:
                first = "" if self.last is None else _shown(self.last)
                raise ValueError(
                    f"share_every must join calls of one shape, got {record.share_every}: call {record.num_calls} has "
                    f"{_shown(call)}, and the one whose choice it should share {first}"
                )
        else:
            chosen = route(*arguments)
            if torch._C._functorch.is_functorch_wrapped_tensor(chosen):
                raise ValueError("record_routing cannot record what is under a transform of torch.func, such as vmap")
            record._choices.append(BlockRouting(chosen, call.block_size))
            self.last = call
        record._num_calls += 1
        return record[-1].block_indices

    def take_back(self) -> None:
        self.record._num_calls, num_choices, self.last = self.before
        del self.record._choices[num_choices:]


class _Replaying:
    owner: _Context | None = None
    has_ended = False

    def __init__(self, record: RoutingRecord) -> None:
        self.watcher = next(_watchers)
        self.record = record
        self.num_calls = 0

    def choose(self, route: Callable[..., Tensor], arguments: tuple[Any, ...], call: Call) -> Tensor:
        record = self.record
        if self.num_calls >= record.num_calls:
            raise ValueError(f"record must have a choice for every call, got one of {record.num_calls} calls")
        choice = record[self.num_calls // record.share_every]
        self._check(choice, call)
        self.num_calls += 1
        block_indices = choice.block_indices.to(call.device)
        # What was made in inference mode cannot be kept for a backward.
        is_unkeepable = block_indices.is_inference() and not torch.is_inference_mode_enabled()
        return block_indices.clone() if is_unkeepable else block_indices

    def take_back(self) -> None:
        self.num_calls -= 1

    def _check(self, choice: BlockRouting, call: Call) -> None:
        shape = choice.block_indices.shape
        *leading, num_heads, num_queries = call.per_query
        fits = len(shape) == len(call.per_query) + 1 and list(shape[: len(leading)]) == leading
        fits = fits and shape[-2] == num_queries and shape[-3] in (num_heads, call.num_kv_heads, 1)
        if not fits or choice.block_size != call.block_size or choice.top_k > call.top_k:
            raise ValueError(
                f"record does not fit: its choice for call {self.num_calls} is {tuple(shape)} for a block_size of "
                f"{choice.block_size}, the call has {_shown(call)}"
            )


def _shown(call: Call) -> str:
    keys = "" if call.num_keys is None else f", {call.num_keys} keys"
    return (
        f"queries {list(call.per_query)}{keys} in {call.num_kv_heads} heads, a block_size of {call.block_size} and a "
        f"top_k of {call.top_k}"
    )


# Compiled code does not know what a context variable holds: it breaks its graph here.
@torch.compiler.disable
def choose(route: Callable[..., Tensor], arguments: tuple[Any, ...], call: Call) -> Tensor:
    """The blocks of a call that was given none: ``route(*arguments)``, or what a record says."""
    checkpoint, repetition = _checkpoint()
    if repetition is not None:
        memory = _memories.get(checkpoint)
        # Without a memory its first pass was outside of any context.
        return route(*arguments) if memory is None else memory.recall(repetition)
    active = _active()
    if active is None:
        return route(*arguments)
    _refuse_hidden_checkpoints(checkpoint)
    block_indices = active.choose(route, arguments, call)
    if checkpoint is not None:
        _remember(checkpoint, block_indices)
    return block_indices


@torch.compiler.disable
def _take_back() -> None:
    checkpoint, repetition = _checkpoint()
    active = _active()
    if repetition is not None or active is None:
        return
    active.take_back()
    if checkpoint is not None:
        _memories[checkpoint].choices.pop()


class taken_back_by_errors:
    """What a call does with the blocks of :func:`choose`: where it is refused, they are not chosen, nor replayed."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            _take_back()


class _NothingGiven(Exception):
    """A call chooses by itself."""


def _raise_nothing_given() -> Tensor:
    raise _NothingGiven


@torch.compiler.disable
def given(call: Call) -> tuple[Tensor | None, bool]:
    """For a call that chooses while it attends: the blocks it is given, and whether :func:`note` is to get its own."""
    try:
        return choose(_raise_nothing_given, (), call), False
    except _NothingGiven:
        return None, _active() is not None and _checkpoint()[1] is None


@torch.compiler.disable
def note(block_indices: Tensor, call: Call) -> None:
    """Record what a call chose that was given nothing."""
    choose(lambda: block_indices, (), call)


class _Context:
    """What both contexts do."""

    _entered: _Recording | _Replaying

    def _enter(self, active: _Recording | _Replaying) -> None:
        if _active() is not None:
            raise ValueError(f"{type(self).__name__} must not stand within record_routing or replay_routing")
        self._entered = active
        active.owner = self
        _variable.set(active)
        state.add(active.watcher)

    def _exit(self) -> Any:
        active = _variable.get()
        if active is None or active.owner is not self:
            active = self._entered
        active.has_ended = True
        if _variable.get() is active:
            _variable.set(None)
        state.discard(active.watcher)
        return active


class record_routing(_Context):
    """Context in which the blocks that layers choose are recorded (Rollout Routing Replay, arXiv 2510.11370).

    ::

        with tg.record_routing() as record:
            model(tokens)
        record.save("choices.safetensors")

    Every call of :func:`moba_attention`, :func:`moba_attention_varlen` and :func:`moba_decode` that chooses blocks by
    itself is recorded in this thread (in this context, of contextvars): int32, on the device where it was made. Of a
    sequence that is spread over ranks (:mod:`topgather.distributed`) each rank records its own tokens' choices. Calls
    with a ``routing`` of their own, or with ``top_k=None``, which attends to everything, choose nothing, and are not
    counted. What ``torch.utils.checkpoint`` repeats is not recorded twice, and chooses what its first pass chose, also
    after the context has ended.

    Args:
        share_every: from one choice on, how many calls go by it, at least 1. With more than 1 only every n-th call
            chooses, and the others, the layers behind it, take over. That saves their choice; a model that was not
            trained so loses accuracy. Where the context has several forwards, the calls of each must be a multiple.

    Yields:
        A :class:`RoutingRecord`, which grows.

    Raises:
        TypeError: ``share_every`` is not an int.
        ValueError: ``share_every`` is below 1; contexts within one another; in a call, calls that would share a choice
            and differ in shapes; ``torch.utils.checkpoint`` with ``use_reentrant=True``, within another checkpoint, or
            with hooks of saved tensors within it; a transform of torch.func.
        RuntimeError: ``torch.utils.checkpoint`` with torch before 2.8.

    Code under ``torch.compile`` is compiled anew and breaks its graph at every choice; with ``fullgraph=True`` it
    raises.
    """

    def __init__(self, share_every: int = 1) -> None:
        checks.check_count("share_every", share_every)
        self.share_every = share_every

    def __enter__(self) -> RoutingRecord:
        recording = _Recording(self.share_every)
        self._enter(recording)
        return recording.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit()


class replay_routing(_Context):
    """Context in which layers attend to recorded blocks (Rollout Routing Replay, arXiv 2510.11370).

    ::

        with tg.replay_routing(tg.RoutingRecord.load("choices.safetensors")):
            loss = model(tokens, labels=tokens).loss
        loss.backward()

    The calls that :class:`record_routing` records take the choices of ``record``, in order. The heads of a choice may
    be those of query, those of key or 1. A choice on another device is copied to the call's.

    Args:
        record: a :class:`RoutingRecord`, of a forward of the same calls.

    Raises:
        TypeError: ``record`` is something else.
        ValueError: in a call, a choice for other queries or another block_size, with more slots than its ``top_k``, or
            none left; at the end, choices left over; and as :class:`record_routing` does.
    """

    def __init__(self, record: RoutingRecord) -> None:
        if not isinstance(record, RoutingRecord):
            raise TypeError(f"record must be a topgather.RoutingRecord, got {type(record).__name__}")
        self.record = record

    def __enter__(self) -> None:
        self._enter(_Replaying(self.record))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        num_calls = self._exit().num_calls
        if kind is None and num_calls != self.record.num_calls:
            raise ValueError(
                f"record must be of as many calls as replay it, {num_calls}, got one of {self.record.num_calls}"
            )


# --- what torch.utils.checkpoint repeats ----------------------------------------------------------------------------


class _Memory:
    """What the first pass of a checkpoint chose."""

    def __init__(self) -> None:
        self.watcher = next(_watchers)
        self.choices: list[Tensor] = []
        self.repetition: Any = None
        self.num_calls = 0  # of the repetition

    def recall(self, repetition: Any) -> Tensor:
        if repetition is not self.repetition:
            self.repetition, self.num_calls = repetition, 0
        if self.num_calls >= len(self.choices):
            raise ValueError(
                f"torch.utils.checkpoint repeats a function that chose blocks {len(self.choices)} times in its first "
                "pass, and now does so more often"
            )
        self.num_calls += 1
        return self.choices[self.num_calls - 1]


_memories: WeakKeyDictionary[Any, _Memory] = WeakKeyDictionary()
_CHECKPOINT = torch.utils.checkpoint.__name__
# Hooks of saved tensors, by which a checkpoint is known; None before torch 2.8, which does not show them.
_top_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_CHECKPOINT_FILE = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__.co_filename


def _remember(checkpoint: Any, block_indices: Tensor) -> None:
    memory = _memories.get(checkpoint)
    if memory is None:
        memory = _memories[checkpoint] = _Memory()
        state.add(memory.watcher)
        finalize(checkpoint, state.discard, memory.watcher).atexit = False
    memory.choices.append(block_indices)


def _checkpoint() -> tuple[Any, Any]:
    """The checkpoint in which this runs, and, where it is repeated, what tells this repetition from others."""
    hooks = None if _top_hooks is None else _top_hooks(True)
    if hooks is None:
        return None, None
    pack: Any = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != _CHECKPOINT:
        return None, None
    cells = dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    if "frame" in cells:
        return cells["frame"], None
    return cells["target_frame_ref"](), pack


def _refuse_hidden_checkpoints(checkpoint: Any) -> None:
    """Raise ``ValueError`` where a call is in a checkpoint that could not be told when it is repeated.

    ``RuntimeError`` where that is for the version of torch.
    """
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "record_routing and replay_routing do not know which call is repeated in a backward: use "
            "torch.utils.checkpoint with use_reentrant=False"
        )
    names = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT_FILE:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    if "forward" in names:
        reason = "use_reentrant=True"
    elif "checkpoint" in names and _top_hooks is None:
        raise RuntimeError(
            "record_routing and replay_routing within torch.utils.checkpoint need torch 2.8 or newer, this is "
            f"{torch.__version__}"
        )
    elif not torch.is_grad_enabled():
        return
    elif names.count("checkpoint") > 1:
        reason = "a checkpoint within another one"
    elif "checkpoint" in names and checkpoint is None:
        reason = "hooks of saved tensors within the checkpoint"
    else:
        return
    raise ValueError(
        f"record_routing and replay_routing cannot tell what is repeated by torch.utils.checkpoint with {reason}"
    )

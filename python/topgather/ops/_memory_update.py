"""What optimizers of table rows are made of: entries that backwards record, and the ops that step rows by them.

A table that an optimizer of :mod:`topgather.optim` took over gets no gradient. The backward of each of its lookups
hands the optimizer what the gradient would be made of, ``grad_out [T, W]`` and the entries' rows and weights, and
``memory_update`` sums each row's entries, of all lookups together, where it steps the row.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .._common import checks, cuda, tensors
from .._common.library import sum_dtype
from .._common.spec import Op, register
from . import _memory_ops
from ._memory_ops import _is_first, _sorted_entries, check_content, check_table, tokens_of

_ops = torch.ops.topgather

ALGORITHMS = {"sgd": 0, "adagrad": 1, "adam": 2}


# --- the ops --------------------------------------------------------------------------------------------------------


def _check_entries(grad_out: Tensor, indices: Tensor, weights: Tensor, tokens: Tensor, values: Tensor) -> None:
    check_table("values", values)
    checks.check_ndim("grad_out", grad_out, 2, "[tokens, row_dim]")
    checks.check_same_dtype("grad_out", grad_out, "values", values)
    checks.check_size("grad_out", grad_out, 1, values.size(1), "row_dim of values")
    checks.check_contiguous_rows("grad_out", grad_out)
    if weights.dtype != sum_dtype(values.dtype):
        raise TypeError(f"weights must have dtype {sum_dtype(values.dtype)}, got {weights.dtype}")
    for name, tensor, dtype in (("indices", indices, torch.int64), ("tokens", tokens, torch.int32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    for name, tensor in (("indices", indices), ("weights", weights), ("tokens", tokens)):
        checks.check_ndim(name, tensor, 1, "[entries]")
        checks.check_size(name, tensor, 0, indices.size(0), "entries of indices")
    for name, tensor in (("grad_out", grad_out), ("indices", indices), ("weights", weights), ("tokens", tokens)):
        checks.check_same_device(name, tensor, "values", values)


def _check_entries_content(grad_out: Tensor, indices: Tensor, tokens: Tensor, values: Tensor) -> None:
    check_content(values, indices, None)
    if tokens.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(tokens))
    if low < -1 or high >= len(grad_out):
        raise IndexError(f"tokens must be between -1 and {len(grad_out) - 1}, got {low if low < -1 else high}")


def _check_update(
    grad_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    tokens: Tensor,
    values: Tensor,
    steps: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    decayed: Tensor | None,
    algorithm: str,
    learning_rate: float,
    first_rate: float,
    second_rate: float,
    eps: float,
    weight_decay: float,
    total_decay: float,
    grad_scale: float,
    seed: int,
    step: int,
) -> None:
    _check_entries(grad_out, indices, weights, tokens, values)
    numbers = {"learning_rate": learning_rate, "first_rate": first_rate, "second_rate": second_rate, "eps": eps}
    numbers |= {"weight_decay": weight_decay, "total_decay": total_decay, "grad_scale": grad_scale}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    checks.check_count("seed", seed, least=0)
    checks.check_count("step", step)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    for name, state, dtype in (("steps", steps, torch.int32), ("decayed", decayed, torch.float64)):
        if state is None:
            continue
        if state.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {state.dtype}")
        checks.check_ndim(name, state, 1, "[rows]")
        checks.check_size(name, state, 0, values.size(0), "rows of values")
        checks.check_same_device(name, state, "values", values)
    if first is None and algorithm != "sgd":
        raise ValueError(f"first must be given for {algorithm}")
    if (second is None) == (algorithm == "adam"):
        raise ValueError(f"second must be {'given' if algorithm == 'adam' else 'None'} for {algorithm}")
    allowed = (sum_dtype(values.dtype), *((torch.bfloat16,) if values.dtype != torch.float64 else ()))
    for name, state in (("first", first), ("second", second)):
        if state is None:
            continue
        if state.dtype not in allowed or (first is not None and state.dtype != first.dtype):
            raise TypeError(f"{name} must have dtype {' or '.join(map(str, allowed))}, as first has, got {state.dtype}")
        if state.shape != values.shape:
            raise ValueError(f"{name} must have the shape of values, {tuple(values.shape)}, got {tuple(state.shape)}")
        checks.check_same_device(name, state, "values", values)
        checks.check_contiguous_rows(name, state)


def check_update(arguments: dict[str, Any]) -> None:
    """Raise where ``memory_update`` would, whatever the tensors hold."""
    _check_update(**{name: arguments[name] for name in inspect.signature(_check_update).parameters})


_ENTRIES = "Tensor grad_out, Tensor indices, Tensor weights, Tensor tokens"
_locals: dict[str, Callable[..., Any]] = {
    "entries": _sorted_entries,
    "sorted_rows": lambda entries: entries[0],
    "order": lambda entries: entries[1],
    "targets": lambda sorted_rows: _is_first(sorted_rows).cumsum(0, dtype=torch.int32).sub_(1),
}
_inputs: dict[str, Callable[..., Any]] = {"weights": tensors.contiguous, "tokens": tensors.contiguous}
memory_update = register(
    Op(
        schema=f"memory_update({_ENTRIES}, Tensor(a!) values, Tensor(b!) steps, Tensor(c!)? first, Tensor(d!)? second, "
        "Tensor(e!)? decayed, str algorithm, float learning_rate, float first_rate, float second_rate, float eps, "
        "float weight_decay, float total_decay, float grad_scale, bool nesterov, int seed, int step, "
        "bool stochastic_rounding) -> ()",
        check=_check_update,
        check_content=_check_entries_content,
        cuda_check=lambda values: cuda.check_dtype("values", values),
        locals={**_locals, "algorithm_code": lambda algorithm: ALGORITHMS[algorithm], "squares": lambda: None},
        inputs={
            **_inputs,
            # Any stride: what is written is the tensor itself.
            "steps": lambda tensor: tensor.unsqueeze(1),
            "decayed": lambda tensor: tensor.unsqueeze(1),
        },
        results=lambda: None,
        not_differentiable="a step of an optimizer records no gradients; use torch.no_grad()",
    )
)
# What only an update has, and the kernel does not look at where it makes squares.
_UNUSED = [
    "steps",
    "first",
    "second",
    "decayed",
    "algorithm_code",
    "learning_rate",
    "first_rate",
    "second_rate",
    "eps",
    "weight_decay",
    "total_decay",
    "grad_scale",
    "nesterov",
    "seed",
    "step",
    "stochastic_rounding",
]
memory_grad_square = register(
    Op(
        schema=f"memory_grad_square({_ENTRIES}, Tensor values) -> Tensor squares",
        native="memory_update",
        check=_check_entries,
        check_content=_check_entries_content,
        cuda_check=lambda values: cuda.check_dtype("values", values),
        locals={**_locals, **dict.fromkeys(_UNUSED, lambda: None)},
        inputs=_inputs,
        results=lambda values: values.new_empty((1,), dtype=torch.float64),
        not_differentiable="the norm of a table's gradient has no gradient; use torch.no_grad()",
    )
)


# --- what backwards record ------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """What a table's gradient is made of: row ``indices[e]`` gets ``weights[e] * grad_out[tokens[e]]``."""

    grad_out: Tensor  # [T, W] dtype of the table
    indices: Tensor  # [E] int64
    weights: Tensor  # [E] sum type
    tokens: Tensor  # [E] int32, -1: nobody's


def entries_of(grad_out: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Entries:
    """Of a lookup: ``indices`` and ``weights`` ``[T, K]``, or ``[E]`` with ``offsets [T + 1]``.

    Copies: between a backward and the step, buffers of a training loop may be filled anew.
    """
    tokens = tokens_of(indices, offsets)
    if tokens is None:
        numbers = torch.arange(indices.size(0), dtype=torch.int32, device=indices.device)
        tokens = numbers.unsqueeze(1).expand(indices.shape)
    return Entries(
        grad_out.detach().clone(memory_format=torch.contiguous_format),
        indices.to(torch.int64, copy=True).reshape(-1),
        weights.detach().to(sum_dtype(grad_out.dtype), copy=True).reshape(-1),
        tokens.reshape(-1).to(torch.int32),
    )


def merged(parts: Sequence[Entries]) -> Entries:
    """The entries of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    tokens, first = [], 0
    for part in parts:
        tokens.append(torch.where(part.tokens >= 0, part.tokens + first, -1))
        first += part.grad_out.size(0)
    return Entries(
        torch.cat([part.grad_out for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat(tokens),
    )


class Recorder:
    """Takes the entries of a table's lookups from their backwards, in the order in which these run."""

    def __init__(self) -> None:
        self.parts: list[Entries] = []
        self.table: Tensor | None = None
        # Whether DistributedDataParallel has the table, which is then to have gradients that it averages.
        self.is_averaged = False


# By the id of each table that an optimizer took over; the optimizer holds the recorder, and that the table. No weak
# references to tables: torch.utils.swap_tensors, by which modules may be converted and loaded, refuses such tensors.
_recorders: dict[int, weakref.ref[Recorder]] = {}
# Whether there is any that lives: what a call asks first, and all that a compiled one does.
is_recording = False


# The attribute of an attached table. A compiled lookup asks for it, and is compiled anew for a table that has it or
# lost it; those of other tables stay as they are.
_MARK = "_topgather_has_row_optimizer"


class _Attached:
    """Value of that attribute. No optimizer has a copy of the table that was pickled: there it is empty, and so false.

    ``torch.load`` takes this dict, with ``weights_only=True`` too.
    """

    def __reduce__(self) -> Any:
        return OrderedDict, ()


_ATTACHED = _Attached()


def _forget(table: Tensor) -> None:
    global is_recording
    _recorders.pop(id(table), None)
    if hasattr(table, _MARK):
        delattr(table, _MARK)
    is_recording = len(_recorders) > 0


def _forget_if_dead(table: Tensor) -> None:
    if recorder_of(table) is None:
        _forget(table)


def attach(table: Tensor, recorder: Recorder) -> None:
    """Have the lookups of ``table`` record, until ``detach`` or as long as ``recorder`` lives."""
    global is_recording
    recorder.table = table
    _recorders[id(table)] = weakref.ref(recorder)
    setattr(table, _MARK, _ATTACHED)
    # An optimizer that is dropped lets go of its tables.
    weakref.finalize(recorder, _forget_if_dead, table).atexit = False
    is_recording = True


def detach(table: Tensor) -> None:
    """Have the lookups of ``table`` make gradients again."""
    _forget(table)


# The attribute of hooks on a table that have nothing to do where there is no gradient.
TAKES_NONE = "_topgather_takes_none"

# Of each table that lies in a file: what marks rows as changed.
_listeners: Any = WeakIdKeyDictionary()


def listen(table: Tensor, mark_rows: weakref.WeakMethod[Callable[[Tensor], None]]) -> None:
    """Have ``mark_rows`` called with the rows of ``table`` that a step is about to change, or an optimizer of torch's
    changed.
    """
    global _hears_steps
    _listeners[table] = mark_rows
    if not _hears_steps:
        register_optimizer_step_post_hook(_tell_of_step)
        _hears_steps = True


# Whether optimizers of torch's tell of their steps.
_hears_steps = False


def _tell_of_step(optimizer: Any, _arguments: Any, _options: Any) -> None:
    """Say which rows a step changed: those of a gradient, wherever that is from, and those that momentum moves on."""
    for group in optimizer.param_groups:
        for table in group["params"]:
            if table not in _listeners:
                continue
            if table.grad is not None:
                tell_of_changes(table, rows_of_gradient(table.grad))
            for state in optimizer.state.get(table, {}).values():
                if isinstance(state, Tensor) and state.is_sparse:
                    tell_of_changes(table, rows_of_gradient(state))


def rows_of_gradient(grad: Tensor) -> Tensor:
    """The rows that a step by this gradient changes."""
    return grad._indices()[0] if grad.is_sparse else torch.arange(grad.size(0), device=grad.device)


def tell_of_changes(table: Tensor, rows: Tensor) -> None:
    """Say that rows of ``table`` are about to change, to whom it concerns."""
    listener = _listeners.get(table)
    mark_rows = None if listener is None else listener()
    if mark_rows is not None:
        mark_rows(rows)


def recorder_of(table: Tensor) -> Recorder | None:
    """The recorder of ``table``, if there is one that lives."""
    found = _recorders.get(id(table))
    recorder = None if found is None else found()
    if recorder is None or recorder.table is not table:
        return None
    if not hasattr(table, _MARK):  # it was swapped with another tensor
        setattr(table, _MARK, _ATTACHED)
    return recorder


def is_marked(table: Tensor) -> bool:
    """Whether an optimizer has ``table``, in words that ``torch.compile`` follows.

    A compiled graph records nothing: an attached table's gradient is a sparse one there, which the optimizer's step
    takes as entries.
    """
    return bool(getattr(table, _MARK, False))


def lookup(
    values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool, offsets: Tensor | None, padded_grad: bool
) -> Tensor:
    """``memory_lookup``, whose backward records where ``values`` has a recorder."""
    recorder = _recorder_for(values)
    if recorder is None:
        out: Tensor = _memory_lookup(values, indices, weights, sparse_grad, offsets, padded_grad)
        return out
    found: Tensor = _Lookup.apply(values, indices, weights, offsets, recorder)  # type: ignore[no-untyped-call]
    return found


def sharded_lookup(table: Tensor, local: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
    """The lookup in ``local``, this rank's columns of ``table``, if that has a recorder."""
    recorder = _recorder_for(table) if is_recording else None
    if recorder is None:
        return None
    # A leaf of its own, which gets no gradient: DTensors make zeros of one that is not there.
    leaf = local.detach().requires_grad_()
    out: Tensor = _Lookup.apply(leaf, indices, weights, None, recorder)  # type: ignore[no-untyped-call]
    return out


def dot(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool, offsets: None, padded_grad: bool) -> Tensor:
    """``memory_dot``, whose backward records where ``values`` has a recorder."""
    recorder = _recorder_for(values)
    if recorder is None:
        out: Tensor = _ops.memory_dot.default(values, indices, x, sparse_grad, offsets, padded_grad)
        return out
    found: Tensor = _Dot.apply(values, indices, x, recorder)  # type: ignore[no-untyped-call]
    return found


def _memory_lookup(*arguments: Any) -> Any:
    return _ops.memory_lookup.default(*arguments)


def _is_averaged_by(ddp: Any, table: Tensor) -> bool:
    """Whether this module of DistributedDataParallel has the table, and is not told to ignore it."""
    return ddp is not None and any(parameter is table for parameter in ddp._module_parameters)


def _recorder_for(values: Tensor) -> Recorder | None:
    recorder = recorder_of(values)
    if recorder is None:
        return None
    is_averaged = _is_averaged_by(DistributedDataParallel._active_ddp_module, values)
    if is_averaged:
        recorder.is_averaged = True
    if not (values.requires_grad and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active():
        return None
    # What is computed anew within a backward, by checkpointing, belongs to a forward before.
    if not is_averaged and torch._C._current_graph_task_id() == -1:
        recorder.is_averaged = False
    if recorder.is_averaged:
        return None
    if any(not hasattr(hook, TAKES_NONE) for hook in (values._backward_hooks or {}).values()):
        raise RuntimeError(
            "a table of a row optimizer must have no hooks on its gradient, which is never made: remove them, or "
            "detach() the optimizer"
        )
    return recorder


def _is_asked_for(ctx: Any) -> bool:
    """Whether this backward is to reach the table: ``torch.autograd.grad`` of other tensors does not."""
    node = ctx.next_functions[0][0]
    if node is None or not ctx.needs_input_grad[0]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        raise RuntimeError(
            "torch.autograd.grad of a table that an optimizer of topgather.optim has: its lookups record rows and make "
            "no gradient; detach() the optimizer first"
        ) from None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None, recorder: Recorder
    ) -> Tensor:
        ctx.save_for_backward(values, indices, weights, offsets)
        ctx.save_for_forward(values, indices, weights, offsets)
        ctx.recorder = recorder
        out: Tensor = _memory_lookup(values, indices, weights, False, offsets)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        values, indices, weights, offsets = tensors.saved_rows(ctx)
        if _is_asked_for(ctx):
            ctx.recorder.parts.append(entries_of(grad_out, indices, weights, offsets))
        grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weights = _ops.memory_dot.default(values, indices, grad_out, False, offsets).to(weights.dtype)
        return None, None, grad_weights, None, None

    @staticmethod
    def jvp(ctx: Any, tangent_values: Any, _indices: Any, tangent_weights: Any, *_: Any) -> Any:  # type: ignore[override]
        values, indices, weights, offsets = tensors.saved_rows(ctx)
        return _memory_ops.lookup_tangent(values, indices, weights, offsets, tangent_values, tangent_weights)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, x: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(values, indices, x)
        ctx.save_for_forward(values, indices, x)
        ctx.recorder = recorder
        out: Tensor = _ops.memory_dot.default(values, indices, x)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        values, indices, x = tensors.saved_rows(ctx)
        if _is_asked_for(ctx):
            ctx.recorder.parts.append(entries_of(x.to(values.dtype), indices, grad_out))
        grad_x = None
        if ctx.needs_input_grad[2]:
            grad_x = _ops.memory_lookup.default(values, indices, grad_out, False).to(x.dtype)
        return None, None, grad_x, None

    @staticmethod
    def jvp(ctx: Any, tangent_values: Any, _indices: Any, tangent_x: Any, *_: Any) -> Any:  # type: ignore[override]
        values, indices, x = tensors.saved_rows(ctx)
        return _memory_ops.dot_tangent(values, indices, x, None, tangent_values, tangent_x)

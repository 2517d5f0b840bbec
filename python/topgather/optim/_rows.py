"""What optimizers of table rows have in common: the entries that backwards record, states by row, and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from .._common import checks
from .._common.library import sum_dtype
from ..nn._tables import check_number
from ..ops import _memory_update
from ..ops._memory_ops import check_table
from ..ops._memory_update import Entries, Recorder


class Rule(NamedTuple):
    """What a step does to a row, as the kernel takes it: :func:`torch.ops.topgather.memory_update`."""

    algorithm: str
    first_rate: float = 0.0
    second_rate: float = 0.0
    eps: float = 0.0
    is_nesterov: bool = False
    has_first: bool = True
    has_second: bool = False
    first_value: float = 0.0
    """Of the first state, before a row's first step."""


def check_rate(name: str, value: Any, below: float = math.inf) -> None:
    """Raise unless ``value`` is a number of at least 0 and below ``below``."""
    if isinstance(value, Tensor):
        value = float(value)
    check_number(name, value)
    if not 0 <= value < below:
        raise ValueError(f"{name} must be at least 0 and below {below}, got {value}")


# States of a table by name, with how many of its dimensions they have.
STATES = {"num_steps": 0, "decay": 0, "decay_at_mask": 0, "steps": 1, "decayed": 1, "trainable": 1}
STATES |= {"first": 2, "second": 2}


class RowOptimizer(torch.optim.Optimizer):
    """Base of the optimizers of table rows; use :class:`RowSGD`, :class:`RowAdagrad` or :class:`RowAdam`.

    It takes over the tables it is given: the backward of :func:`topgather.memory_lookup` and
    :func:`topgather.expert_lookup` then makes no gradient of them, dense or sparse, but records what it would be made
    of, ``grad_out [T, W]`` and each entry's row and weight. :meth:`step` sorts the entries of all lookups since the
    last one, whichever layers of a shared table and whichever micro-batches they are of, sums each row's and steps the
    row, in one pass over the touched rows and their states. Sparse gradients that lie in ``.grad`` are entries as well.

    Args:
        params: tables ``[rows, W]``, or groups of them with options of their own.
        defaults: options of groups that name none.
    """

    # torch's GradScaler, which would find no gradients to divide, then calls step() with the scale in grad_scale.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._recorders: dict[Tensor, Recorder] = {}
        self._masks: dict[Tensor, Tensor] = {}
        self._grad_scale = 1.0
        try:
            super().__init__(params, defaults)
        except BaseException:
            self.detach()  # tables of groups before the one that was refused
            raise

    # --- tables -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over more tables, with options of their own.

        Args:
            param_group: ``params``, tables ``[rows, W]``, and options.

        Raises:
            TypeError: a parameter that is no tensor of floating-point numbers, or a DTensor that is not sharded by
                columns alone; an option of the wrong type.
            ValueError: one that is no leaf or not ``[rows, W]``, that stands there twice or that another optimizer of
                rows has; an option out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if len({id(table) for table in group["params"]}) < len(group["params"]):
                raise ValueError("params must name each table once")
            for table in group["params"]:
                if isinstance(table, DTensor) and tuple(table.placements) != (Shard(1),):
                    raise TypeError(
                        f"params must be plain tensors or DTensors sharded by columns alone, as MemoryColwise shards "
                        f"them, got one with placements {table.placements}; have fully_shard leave the table as it is "
                        f"by ignored_params, or use torch's optimizers"
                    )
                check_table("params", table)
                if _memory_update.recorder_of(table) is not None:
                    raise ValueError("params must belong to one optimizer of rows; detach() the other first")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for table in group["params"]:
            self._attach(table)

    def _attach(self, table: Tensor) -> None:
        self._recorders[table] = Recorder()
        _memory_update.attach(table, self._recorders[table])

    def detach(self) -> None:
        """Let go of the tables: their lookups make gradients again. What was recorded is dropped."""
        for table in self._recorders:
            _memory_update.detach(table)
        self._recorders.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was recorded since the last :meth:`step`, and gradients.

        Args:
            set_to_none: gradients become None, not zeros.
        """
        super().zero_grad(set_to_none)
        self._grad_scale = 1.0
        for recorder in self._recorders.values():
            recorder.parts.clear()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_recorders": self._recorders, "_masks": self._masks, "_grad_scale": self._grad_scale}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, has tables of its own, and takes them over."""
        super().__setstate__(state)
        for table, recorder in self._recorders.items():
            _memory_update.attach(table, recorder)

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rate("lr", group["lr"])
        check_rate("weight_decay", group["weight_decay"])
        for name in ("decoupled_weight_decay", "maximize", "stochastic_rounding"):
            checks.check_flag(name, group[name])
        if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise TypeError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {group['state_dtype']}")
        checks.check_count("seed", group["seed"], least=0)

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    # --- entries ----------------------------------------------------------------------------------------------------

    def _take_sparse_grads(self) -> None:
        """Sparse gradients, of DistributedDataParallel for one, become entries: of each row one, with weight 1."""
        for table, recorder in self._recorders.items():
            grad = table.grad
            if grad is None:
                continue
            if grad.is_sparse:
                grad = grad.coalesce()
                rows, grads = grad.indices()[0], grad.values()
            elif not bool(_local(grad).any()):
                # torch.distributed.checkpoint has an optimizer make its states by a step with gradients of zero.
                rows, grads = torch.zeros(0, dtype=torch.int64, device=table.device), _local(grad)[:0]
            else:
                raise RuntimeError(
                    "a table of a row optimizer has a dense gradient, for something other than memory_lookup and "
                    "expert_lookup uses it, or DistributedDataParallel does with sparse_grad=False; set "
                    "sparse_grad=True, detach() the optimizer, or use torch's"
                )
            weights = torch.ones(rows.numel(), 1, dtype=sum_dtype(table.dtype), device=table.device)
            recorder.parts.append(_memory_update.entries_of(grads, rows.unsqueeze(1), weights))
            table.grad = None

    def _entries(self, table: Tensor) -> Entries | None:
        """What was recorded of ``table``, without the entries of rows that its mask leaves out."""
        recorder = self._recorders.get(table)
        if recorder is None or not recorder.parts:
            return None
        entries = _memory_update.merged(recorder.parts)
        if entries.grad_out.dtype != table.dtype:  # it was converted since the backward, as module.to does
            weights = entries.weights.to(sum_dtype(table.dtype))
            entries = entries._replace(grad_out=entries.grad_out.to(table.dtype), weights=weights)
        recorder.parts[:] = [entries]
        mask = self._masks.get(table)
        if mask is not None:
            entries = entries._replace(tokens=torch.where(mask[entries.indices], entries.tokens, -1))
        return entries

    @torch.no_grad()
    def grad_square(self) -> Tensor:
        """The sum of squares of the gradients that the next :meth:`step` sees, ``[]`` float64, without making them.

        One pass over the recorded entries; the same bits for any number of threads. Of a sharded table all ranks call
        this together, and each gets the sum over all columns.
        """
        self._take_sparse_grads()
        total: Tensor | None = None
        for group in self.param_groups:
            for table in group["params"]:
                entries = self._entries(table)
                if entries is not None:
                    square = _memory_update.memory_grad_square(*entries, _local(table))[0]
                    if isinstance(table, DTensor):
                        square = DTensor.from_local(square, table.device_mesh, [Partial()]).full_tensor()
                    total = square if total is None else total + square.to(total.device)
        if total is None:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        return total * self._grad_scale**2

    def scale_grad_(self, factor: float | Tensor) -> None:
        """Multiply the gradients that the next :meth:`step` sees, as clipping and loss scaling do.

        Args:
            factor: a number.
        """
        self._grad_scale *= float(factor)

    @torch.no_grad()
    def row_counts(self, table: Tensor) -> Tensor:
        """Entries recorded of each row since the last :meth:`step`, ``[rows]`` int64, masks not regarded.

        Args:
            table: one that this optimizer has.

        Raises:
            ValueError: another one.
        """
        self._check_own(table)
        self._take_sparse_grads()
        counts = torch.zeros(table.size(0), dtype=torch.int64, device=table.device)
        for part in self._recorders[table].parts:
            counts += torch.bincount(part.indices[part.tokens >= 0], minlength=table.size(0))
        return counts

    @torch.no_grad()
    def set_trainable_rows(self, table: Tensor, rows: Tensor | None) -> None:
        """Which rows of a table the next steps may change; a frozen row keeps its bits and states and does not decay.

        Args:
            table: one that this optimizer has.
            rows: ``[rows]`` bool, or int64 numbers of the trainable rows. None: all of them.

        Raises:
            TypeError: ``rows`` of another dtype.
            ValueError: another shape, or a table that this optimizer does not have.
            IndexError: a number that names no row.
        """
        self._check_own(table)
        mask = None if rows is None else _mask_of(table, rows)
        state = self.state[table]
        if "decayed" in state:
            old = self._masks.get(table)
            if old is not None:  # what the other rows decayed since the mask was set, a frozen row did not
                state["decayed"][~old] += state["decay"] - state["decay_at_mask"]
            state["decay_at_mask"] = state["decay"]
        if mask is None:
            self._masks.pop(table, None)
        else:
            self._masks[table] = mask

    def _check_own(self, table: Tensor) -> None:
        if table not in self._recorders:
            raise ValueError("table must be one of the optimizer's params")

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every row that an entry recorded since the last step names; what was recorded is used up.

        Args:
            closure: computes the loss anew, with its backward.

        Returns:
            What ``closure`` returns.

        Raises:
            RuntimeError: a table has a dense gradient: something other than a lookup uses it; or a ``GradScaler``
                called: see docs/memory.md for what to call instead. No table was stepped.
            ValueError: an option of a group is out of range, or the factor of :meth:`scale_grad_` not finite; likewise.
        """
        if hasattr(self, "grad_scale"):
            for name in ("grad_scale", "found_inf"):  # which it takes back from steps that return
                delattr(self, name)
            raise RuntimeError(
                "GradScaler cannot step a row optimizer, whose gradients are never made: call "
                "optimizer.scale_grad_(1 / scaler.get_scale()), then optimizer.step() if "
                "optimizer.grad_square().isfinite(), else optimizer.zero_grad()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._check_step()
            tables = [(group, table) for group in self.param_groups for table in group["params"]]
            updates = [(table, self._update_of(group, table)) for group, table in tables]
            for table, (num_steps, decay, arguments) in updates:
                if num_steps > 0:
                    self.state[table]["num_steps"], self.state[table]["decay"] = num_steps, decay
                if arguments is not None:
                    self._step_table(table, arguments)
        self._grad_scale = 1.0
        return loss

    def _check_step(self) -> None:
        """Whatever may be refused, before any table is stepped: schedules and users change options of groups."""
        if not math.isfinite(self._grad_scale):
            raise ValueError(f"the factors of scale_grad_ must be finite, their product is {self._grad_scale}")
        for group in self.param_groups:
            self._check_group(group)
            decay = float(group["lr"]) * float(group["weight_decay"])
            if group["decoupled_weight_decay"] and decay >= 1:
                raise ValueError(f"lr * weight_decay must be below 1, got {decay}")
        self._take_sparse_grads()

    def _update_of(self, group: dict[str, Any], table: Tensor) -> tuple[int, float, dict[str, Any] | None]:
        """The number of this step of ``table`` (0: there is none), its decay up to it, and what ``memory_update`` takes
        (None: no row is named). Whatever that may refuse is refused here, before any table is stepped.
        """
        entries = self._entries(table)
        rule = self._rule(group)
        is_decoupled = group["decoupled_weight_decay"]
        weight_decay = float(group["weight_decay"])
        is_decaying = is_decoupled and weight_decay != 0
        if entries is None and not is_decaying:
            return 0, 0.0, None
        self._make_state(group, rule, table, is_decaying)
        state = self.state[table]
        num_steps, decay = state["num_steps"] + 1, state["decay"]
        if is_decaying:
            decay += math.log(1 - float(group["lr"]) * weight_decay)
        if entries is None:
            return num_steps, decay, None
        arguments = {
            **entries._asdict(),
            "values": _local(table),
            "steps": state["steps"],
            "first": _local(state.get("first")),
            "second": _local(state.get("second")),
            "decayed": state.get("decayed"),
            "algorithm": rule.algorithm,
            "learning_rate": float(group["lr"]),
            "first_rate": rule.first_rate,
            "second_rate": rule.second_rate,
            "eps": rule.eps,
            "weight_decay": 0.0 if is_decoupled else weight_decay,
            "total_decay": decay,
            "grad_scale": -self._grad_scale if group["maximize"] else self._grad_scale,
            "nesterov": rule.is_nesterov,
            "seed": group["seed"],
            "step": num_steps,
            "stochastic_rounding": group["stochastic_rounding"],
        }
        _memory_update.check_update(arguments)
        return num_steps, decay, arguments

    def _step_table(self, table: Tensor, arguments: dict[str, Any]) -> None:
        _memory_update.tell_of_changes(table, arguments["indices"][arguments["tokens"] >= 0])
        _memory_update.memory_update(**arguments)
        self._recorders[table].parts.clear()

    # Not in inference mode, or later steps outside of it could not write to the states.
    @torch.inference_mode(False)
    def _make_state(self, group: dict[str, Any], rule: Rule, table: Tensor, is_decaying: bool) -> None:
        """Memory of zeros costs nothing before it is written, on the CPU."""
        state = self.state[table]
        if "steps" not in state:
            state["num_steps"], state["decay"] = 0, 0.0
            state["steps"] = torch.zeros(table.size(0), dtype=torch.int32, device=table.device)
        dtype = group["state_dtype"] or sum_dtype(table.dtype)
        dtype = torch.float64 if table.dtype == torch.float64 else dtype
        if rule.has_first and "first" not in state:
            state["first"] = _zeros_like(table, dtype)
            if rule.first_value != 0:
                _local(state["first"]).fill_(rule.first_value)
        if rule.has_second and "second" not in state:
            state["second"] = _zeros_like(table, dtype)
        for name in ("first", "second"):  # of a table that was converted, or of another dtype where it was saved
            is_double = name in state and state[name].dtype == torch.float64
            if name in state and is_double != (table.dtype == torch.float64):
                state[name] = state[name].to(dtype)
        if is_decaying and "decayed" not in state:
            state["decayed"] = torch.full((table.size(0),), state["decay"], dtype=torch.float64, device=table.device)
            state["decay_at_mask"] = state["decay"]

    @torch.no_grad()
    def settle(self) -> None:
        """Apply the weight decay that rows still owe, to whole tables: before one is evaluated or saved."""
        for group in self.param_groups:
            for table in group["params"]:
                state = self.state.get(table, {})
                if "decayed" not in state:
                    continue
                factors = (state["decay"] - state["decayed"]).exp()
                mask = self._masks.get(table)
                if mask is not None:
                    factors = torch.where(mask, factors, 1.0)
                    state["decayed"][mask] = state["decay"]
                else:
                    state["decayed"].fill_(state["decay"])
                _memory_update.tell_of_changes(table, (factors != 1).nonzero())
                _local(table).mul_(factors.to(sum_dtype(table.dtype)).unsqueeze(1))

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """States of rows, options of groups, and which rows are trainable."""
        saved = super().state_dict()
        for number, table in enumerate(table for group in self.param_groups for table in group["params"]):
            if table in self._masks:
                saved["state"][number] = {**saved["state"].get(number, {}), "trainable": self._masks[table]}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another optimizer of the same class and tables of the same sizes, with the dtypes that it
        has there, but for states of float64 tables, which are float64, and of others, which are not.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: it is of another class, or of tables of other sizes. Nothing is loaded then.
        """
        loaded: list[dict[str, Any]] = []

        def check(_: Any, found: dict[str, Any]) -> None:
            self._check_loaded(found)
            loaded.append(found)

        hook = self.register_load_state_dict_pre_hook(check)  # after those of others, which may change it
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._masks.clear()
        # torch gives states the dtype of their parameter.
        for table, values in self._saved_states(loaded[0]):
            for name, value in values.items():
                if name == "trainable":
                    self._masks[table] = value.to(table.device, copy=True)
                    del self.state[table][name]
                elif isinstance(value, Tensor) and self.state[table][name].dtype != value.dtype:
                    self.state[table][name] = value.to(table.device, copy=True)

    def _saved_states(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tables, and what there is of each in ``state_dict``."""
        saved_ids: Iterable[int] = (number for group in state_dict["param_groups"] for number in group["params"])
        tables = (table for group in self.param_groups for table in group["params"])
        # torch compares their numbers, in words of its own.
        return [(table, state_dict["state"].get(number, {})) for number, table in zip(saved_ids, tables, strict=False)]

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        for group in state_dict["param_groups"]:
            missing = [option for option in self.defaults if option not in group]
            if missing:
                raise ValueError(f"state_dict must be of a {name}, but its groups have no {', '.join(missing)}")
        for table, values in self._saved_states(state_dict):
            unknown = [state for state in values if state not in STATES]
            if unknown:
                raise ValueError(f"state_dict must be of a {name}, but holds {', '.join(unknown)}")
            missing = [state for state in ("num_steps", "decay", "steps") if state not in values]
            if missing and values.keys() - {"trainable"}:
                raise ValueError(f"state_dict must be of a {name}, but has no {', '.join(missing)} beside the states")
            for state, value in values.items():
                expected = table.shape[: STATES[state]]
                if isinstance(value, Tensor) and value.shape != expected:
                    raise ValueError(
                        f"state_dict must be of tables of the same sizes: its {state} must have shape "
                        f"{tuple(expected)}, for the table has {tuple(table.shape)}, got {tuple(value.shape)}"
                    )


def _local(tensor: Any) -> Any:
    """What this rank has of a table or state, without its gradient."""
    if tensor is None:
        return None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _zeros_like(table: Tensor, dtype: torch.dtype) -> Tensor:
    """A state, sharded as its table is, so that checkpoints may have other numbers of ranks."""
    zeros = torch.zeros(_local(table).shape, dtype=dtype, device=table.device)
    if not isinstance(table, DTensor):
        return zeros
    return DTensor.from_local(
        zeros, table.device_mesh, table.placements, run_check=False, shape=table.shape, stride=table.stride()
    )


def _mask_of(table: Tensor, rows: Tensor) -> Tensor:
    checks.check_tensor("rows", rows)
    if rows.ndim != 1:
        raise ValueError(f"rows must have 1 dimension, got shape {tuple(rows.shape)}")
    if rows.dtype == torch.bool:
        checks.check_size("rows", rows, 0, table.size(0), "rows of table")
        return rows.to(table.device, copy=True)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must have dtype torch.bool or torch.int64, got {rows.dtype}")
    if rows.numel() > 0 and (int(rows.min()) < 0 or int(rows.max()) >= table.size(0)):
        raise IndexError(f"rows must be between 0 and {table.size(0) - 1}")
    mask = torch.zeros(table.size(0), dtype=torch.bool, device=table.device)
    mask[rows.to(table.device)] = True
    return mask

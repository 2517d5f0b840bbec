"""The tables of memory layers as parameters: found under any parametrisation, grouped for optimizers, loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._common import checks


class _Parametrizations(nn.ModuleDict):
    """What :mod:`torch.nn.utils.parametrize` hangs up in a module, for tensors of any name.

    ``nn.ModuleDict`` refuses the names of its own methods, ``keys`` and ``values`` among them.
    """

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module
        # Before the method of that name, so that `get_submodule`, and what stands on it, finds the module.
        self.__dict__[key] = module

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        del self.__dict__[key]


class TableModule(nn.Module):
    """A module with tables: parameters that have an optimizer group of their own.

    Attributes:
        TABLES: the names of these parameters and of their groups, ``"keys"`` or ``"values"``.
    """

    TABLES: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            value = _Parametrizations(dict(value.items()))
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        tables = {name: self._parameters.get(name) for name in self.TABLES}
        # Not parametrised ones, which go by other names.
        are_of_their_kind = [
            table is None or is_of_its_kind(table, state_dict, prefix + name, lists[-1])
            for name, table in tables.items()
        ]
        if all(are_of_their_kind):
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)  # type: ignore[arg-type]

    def _are_parameters(self, *names: str) -> bool:
        """Whether these tables are parameters themselves, not computed from others by a parametrisation or pruning."""
        return all(self._parameters.get(name) is not None for name in names)


class SparseTables(nn.EmbeddingBag):
    """Stands for the tables of a layer where ``DistributedDataParallel`` looks for sparse gradients."""

    sparse = True

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        nn.Module.__init__(self)
        for name in names:
            self.register_parameter(name, layer._parameters[name])

    def reset_parameters(self) -> None:
        """Nothing: the layer draws its tables."""

    def extra_repr(self) -> str:
        """Nothing."""
        return ""


def table_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that the table ``name`` of ``module`` is, or is computed from where it is parametrised or pruned.

    Raises:
        ValueError: it is none of these.
    """
    own = module._parameters.get(name)
    if own is not None:
        return [own]
    if parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        return list(parametrizations[name].parameters())
    # torch.nn.utils.prune and the older weight_norm and spectral_norm.
    found = [module._parameters.get(name + suffix) for suffix in ("_orig", "_g", "_v")]
    parameters = [parameter for parameter in found if parameter is not None]
    if not parameters:
        raise ValueError(
            f"{name} of {type(module).__name__} is no parameter, nor known to be computed from parameters: it must be "
            f"a parameter, parametrised by torch.nn.utils.parametrize, or pruned by torch.nn.utils.prune"
        )
    return parameters


def memory_parameter_groups(
    model: nn.Module,
    lr: float,
    values_lr: float = 1e-3,
    keys_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups for a model with memory layers.

    A row of a table is touched by few tokens of a batch, so tables bear, and want, a higher learning rate than the
    rest, one that does not fall: the code published with arXiv 2412.09764 has a constant 1e-3. Weight decay would
    shrink rows that a batch does not touch, so tables have none.

    Args:
        model: any module; its memory layers are found wherever they are.
        lr: learning rate of all other parameters.
        values_lr: learning rate of :attr:`MemoryPool.values` and of PEER's ``values_in`` and ``values_out``.
        keys_lr: learning rate of the layers' product keys; ``lr`` if None.
        weight_decay: of all parameters but the tables.

    Returns:
        Three groups, each a dict with ``name``, ``params``, ``lr`` and ``weight_decay``: ``"rest"``, ``"keys"`` and
        ``"values"``, in this order. A parameter stands in one group, once, however many layers share it; frozen ones
        are left out, and a group may be empty. What a parametrised or pruned table is computed from counts as the
        table.

    Raises:
        TypeError: ``model`` is not a module or a rate not a number.
        ValueError: a rate below 0, or a table whose parameters cannot be told.

    With dense gradients the groups go to one optimizer, and a schedule leaves the last group as it is::

        groups = tg.nn.memory_parameter_groups(model, lr=3e-4, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups)
        decay = lambda step: 1 - step / num_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [decay, decay, lambda step: 1.0])

    With ``sparse_grad=True`` the tables have an optimizer of their own::

        rest, keys, values = tg.nn.memory_parameter_groups(model, lr=3e-4, weight_decay=0.1)
        optimizers = [
            torch.optim.AdamW([rest, keys]),
            torch.optim.SparseAdam(values["params"], lr=values["lr"]),
        ]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    keys_lr = lr if keys_lr is None else keys_lr
    rates = {"lr": lr, "values_lr": values_lr, "keys_lr": keys_lr, "weight_decay": weight_decay}
    for name, rate in rates.items():
        check_number(name, rate)
        if not rate >= 0:
            raise ValueError(f"{name} must be at least 0, got {rate}")

    group_of: dict[Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, TableModule):
            for table, group in module.TABLES.items():
                group_of |= dict.fromkeys(table_parameters(module, table), group)
    params: dict[str, list[nn.Parameter]] = {"rest": [], "keys": [], "values": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            params[group_of.get(parameter, "rest")].append(parameter)
    return [
        {"name": "rest", "params": params["rest"], "lr": lr, "weight_decay": weight_decay},
        {"name": "keys", "params": params["keys"], "lr": keys_lr, "weight_decay": weight_decay},
        {"name": "values", "params": params["values"], "lr": values_lr, "weight_decay": 0.0},
    ]


# --- published parameters ---------------------------------------------------------------------------------------------


def parameter_to_load(module: nn.Module, name: str) -> Tensor:
    """The parameter ``name`` of ``module``.

    Raises:
        ValueError: the module computes that tensor from others, so that what is copied into it would be lost.
    """
    own = module._parameters.get(name)
    if own is None:
        raise ValueError(
            f"{name} of {type(module).__name__} is computed from other tensors, so nothing can be loaded into it: "
            f"remove its parametrisation or pruning first"
        )
    return own


def linear_targets(name: str, linear: nn.Linear) -> dict[str, Tensor]:
    """The parameters of a projection under their published names."""
    return {f"{name}.{part}": tensor for part, tensor in linear.named_parameters()}


def copy_reference(
    targets: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    prefix: str,
    may_miss: Collection[str],
    unused: Collection[str] = (),
) -> None:
    """Copy the entries of ``state_dict`` into ``targets``, all or none."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, got {type(prefix).__name__}")
    found = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    missing = [name for name in targets if name not in found and name not in may_miss]
    unknown = [name for name in found if name not in targets and name not in unused]
    if missing or unknown:
        complaints = [
            f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise ValueError(f"state_dict does not fit the layer under prefix {prefix!r}: {'; '.join(complaints)}")
    copies: list[tuple[Tensor, Tensor]] = []
    for name, target in targets.items():
        if name not in found:
            continue
        full_name = f"state_dict[{prefix + name!r}]"
        tensor = checks.check_tensor(full_name, found[name])
        if target.is_meta and not tensor.is_meta:
            raise ValueError(
                f"the layer has no memory to load {full_name} into: it is on the meta device, call "
                f"to_empty(device=...) first"
            )
        if tensor.is_meta and not target.is_meta:
            raise ValueError(f"{full_name} must hold numbers, but is on the meta device")
        if name == "keys" and tensor.ndim == 2 and tensor.shape == target.flatten(0, 2).shape:
            tensor = tensor.reshape(target.shape)
        if hasattr(target, "full_tensor"):
            raise ValueError(f"{full_name} cannot be loaded into a tensor that is sharded over ranks: load it before")
        errors: list[str] = []
        if not is_of_its_kind(target, state_dict, prefix + name, errors):
            raise ValueError(f"state_dict must hold numbers of the layer's kind: {errors[0]}")
        if tensor.shape != target.shape:
            raise ValueError(f"{full_name} must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
        copies.append((target, tensor))
    with torch.no_grad():
        for target, tensor in copies:
            target.copy_(tensor)


def refuse_sharded(values: Tensor, what: str) -> None:
    """Raise ``TypeError`` for a table that is a DTensor."""
    if hasattr(values, "full_tensor"):
        raise TypeError(
            f"{what} cannot be made of a table that is sharded over ranks, got a {type(values).__name__}: put "
            f"values.full_tensor() into a MemoryPool first"
        )


def is_of_its_kind(table: Tensor, state_dict: Mapping[str, Any], name: str, errors: list[str]) -> bool:
    """Whether ``state_dict[name]`` may be copied into ``table``; ``errors`` gets what stands in the way.

    ``copy_`` converts any dtype to any other, and integers of 8 bits are no rows without their scales.
    """
    loaded = state_dict.get(name)
    if not isinstance(loaded, Tensor) or loaded.dtype == table.dtype:
        return True
    if loaded.is_floating_point() and table.dtype.itemsize > 1 and loaded.dtype.itemsize > 1:
        return True
    errors.append(f"{name} is of {loaded.dtype}, the table is of {table.dtype}: quantise or make a pool of that dtype")
    return False


def check_number(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r} of type {type(value).__name__}")

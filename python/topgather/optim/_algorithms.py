"""The three optimizers of rows, with the options that torch's have."""

from __future__ import annotations

from typing import Any

import torch

from .._common import checks
from ._rows import RowOptimizer, Rule, check_rate


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, by name: all arguments of a constructor but its tables."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


class RowSGD(RowOptimizer):
    """Stochastic gradient descent on the touched rows of tables, as ``torch.optim.SGD`` does it.

    Args:
        params: tables ``[rows, W]``, or dicts of groups of them with options of their own.
        lr: learning rate.
        momentum: with one, rows have a state, their momentum.
        dampening: of the momentum.
        weight_decay: at each step of a row, what is added to its gradient, times the row.
        nesterov: whether momentum is Nesterov's.
        maximize: whether to ascend.
        decoupled_weight_decay: whether rows are multiplied by ``1 - lr * weight_decay`` instead, of every step: a row
            makes up at its next step, or at :meth:`settle`, for those that did not touch it.
        state_dtype: ``torch.bfloat16``, or ``torch.float32``; None: that of sums. States of float64 tables are float64.
        stochastic_rounding: whether what is stored in bfloat16, states and tables, is rounded up or down by random
            bits, so that small steps add up, rather than to nearest.
        seed: of these bits, which a hash makes of seed, step, row and column.

    Raises:
        TypeError: an argument of the wrong type, a table that is a DTensor not sharded by columns alone.
        ValueError: an option out of range, a table of the wrong shape or that another optimizer of rows has.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, _options(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_rate("momentum", group["momentum"])
        checks.check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov must be False without a momentum, or with a dampening")

    def _rule(self, group: dict[str, Any]) -> Rule:
        momentum = float(group["momentum"])
        return Rule("sgd", momentum, float(group["dampening"]), is_nesterov=group["nesterov"], has_first=momentum != 0)


class RowAdagrad(RowOptimizer):
    """Adagrad on the touched rows of tables, as ``torch.optim.Adagrad`` does it; ``lr_decay`` counts a row's own steps.

    Args:
        params: tables ``[rows, W]``, or dicts of groups of them with options of their own.
        lr: learning rate.
        lr_decay: at a row's step t the rate is ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: as in :class:`RowSGD`.
        initial_accumulator_value: of the sums of squares.
        eps: added to the root of a sum.
        maximize: whether to ascend.
        decoupled_weight_decay: as in :class:`RowSGD`.
        state_dtype: as in :class:`RowSGD`.
        stochastic_rounding: as in :class:`RowSGD`.
        seed: as in :class:`RowSGD`.

    Raises:
        TypeError: as :class:`RowSGD` does.
        ValueError: as :class:`RowSGD` does.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, _options(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            check_rate(name, group[name])

    def _rule(self, group: dict[str, Any]) -> Rule:
        eps, first_value = float(group["eps"]), float(group["initial_accumulator_value"])
        return Rule("adagrad", second_rate=float(group["lr_decay"]), eps=eps, first_value=first_value)


class RowAdam(RowOptimizer):
    """Adam on the touched rows of tables, as ``torch.optim.AdamW`` (or ``Adam``) does it; each row counts its own steps
    for the corrections of its moments.

    Args:
        params: tables ``[rows, W]``, or dicts of groups of them with options of their own.
        lr: learning rate.
        betas: of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: as in :class:`RowSGD`.
        maximize: whether to ascend.
        decoupled_weight_decay: as in :class:`RowSGD`; True as in AdamW.
        state_dtype: as in :class:`RowSGD`.
        stochastic_rounding: as in :class:`RowSGD`.
        seed: as in :class:`RowSGD`.

    Raises:
        TypeError: as :class:`RowSGD` does.
        ValueError: as :class:`RowSGD` does.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, _options(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_rate("eps", group["eps"])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_rate(f"betas[{i}]", beta, below=1.0)

    def _rule(self, group: dict[str, Any]) -> Rule:
        first, second = (float(beta) for beta in group["betas"])
        return Rule("adam", first, second, float(group["eps"]), has_second=True)

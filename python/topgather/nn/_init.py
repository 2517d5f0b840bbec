"""How parameters are drawn: each module draws its own, so that modules may be reset in any order.

A parent that draws its child's weights is overruled where the child's own ``reset_parameters`` comes later, as it does
in the order of ``modules()``, which FSDP on the meta device follows. So projections whose weights are not those of
``nn.Linear`` are classes that say so.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class XavierLinear(nn.Linear):
    """A projection with Xavier uniform weights."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class FanInNormalLinear(nn.Linear):
    """A projection with normal weights, whose standard deviation is the inverse root of the inputs."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class TruncatedNormalLinear(nn.Linear):
    """A projection with truncated normal weights of standard deviation 0.02 and a bias of zeros."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def reset_modules(*modules: nn.Module | None) -> None:
    """Call ``reset_parameters`` of each module, or of its children where it has none."""
    for module in modules:
        # FSDP has reset what it wraps already, and may have freed its memory.
        if module is None or hasattr(module, "_fsdp_wrapped_module"):
            continue
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        else:
            reset_modules(*module.children())

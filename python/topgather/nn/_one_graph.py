"""Layers of torch in forms with which one compiled graph serves all sizes; parameters and their names are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Not in torch 2.6.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, of single tokens too: ``[B, in_channels, H, W]`` to ``[B, out_channels,
    H // kernel, W // kernel]``.

    Torch's convolution asks whether its input has more than 20480 numbers, and a compiled graph is good for one answer.
    There it is a matrix product, which is no faster by itself: 0.94 to 0.99 times as fast in ``SparseViT``. An exported
    program keeps the convolution, of which nothing is asked, and which leaves out what is no whole patch.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=kernel_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or is_exporting():
            return super().forward(x)
        side = self.kernel_size[0]
        if side == 1:
            patches = x.permute(0, 2, 3, 1)
        else:
            rows, columns = x.size(2) // side, x.size(3) // side
            patches = x[:, :, : rows * side, : columns * side].unflatten(2, (rows, side)).unflatten(4, (columns, side))
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def constant_float(name: str) -> Any:
    """A property of a module that holds a float or None, which compilers take for the constant that it is.

    ``torch.compile(dynamic=True)`` makes an input of its graph of each float of a module; where torch's own layers then
    ask for its value, the graph is thrown away and compiled once more.
    """
    digits = f"_{name}_digits"

    def get(module: nn.Module) -> float | None:
        held = getattr(module, digits)
        return None if held is None else float(held)

    def put(module: nn.Module, value: float | None) -> None:
        # As digits, which are no number to a compiler, and name a float exactly.
        setattr(module, digits, None if value is None else repr(float(value)))
        module.__dict__[name] = value  # for who prints a module's fields

    return property(get, put)


class LayerNorm(nn.LayerNorm):
    """torch's, of which the first graph is kept."""

    eps = constant_float("eps")


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, of which the first graph is kept; a ``momentum`` of None is a cumulative average, as there."""

    eps = constant_float("eps")
    momentum = constant_float("momentum")

"""One way to call an op or a public function: what the table of ops (``ops.py``) is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import random_tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpCase:
    """One way to call an op or a public function.

    ``draw(dtype, device, seed)`` gives arguments by name, tensors that require no grad. Results are named in the order
    in which they come back; an op that writes to arguments has these as results.
    """

    name: str
    function: Callable[..., Any]
    draw: Callable[[torch.dtype, torch.device, int], Inputs]
    results: tuple[str, ...] = ("out",)
    differentiable: tuple[str, ...] = ()
    """Arguments that get a gradient."""
    differentiable_results: tuple[str, ...] = ()
    """Results that have one."""
    written: tuple[str, ...] = ()
    """Arguments that the call writes to."""

    def __str__(self) -> str:
        """Test id."""
        return self.name

    @property
    def is_public(self) -> bool:
        """Whether this calls a function of the package, rather than a registered op."""
        return not isinstance(self.function, torch._ops.OpOverload)

    @cached_property
    def optional(self) -> frozenset[str]:
        """Arguments that may be None."""
        if self.is_public:
            hints = get_type_hints(self.function)
            return frozenset(name for name in inspect.signature(self.function).parameters if _takes_none(hints[name]))
        arguments = self.function._schema.arguments
        return frozenset(argument.name for argument in arguments if isinstance(argument.type, torch.OptionalType))

    @cached_property
    def example(self) -> Inputs:
        """Arguments to look at, not to call with: which there are, and of what types and shapes."""
        return self.inputs(torch.float32, torch.device("cpu"))

    def tensors(self, *, floating: bool | None = None) -> list[str]:
        """Names of arguments that are tensors; ``floating`` ones, the others, or all."""
        return [
            name
            for name, value in self.example.items()
            if isinstance(value, Tensor) and floating in (None, value.is_floating_point())
        ]

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0, *, requires_grad: bool = False) -> Inputs:
        """Fresh arguments by name; with ``requires_grad`` those that are differentiable require it."""
        inputs = self.draw(dtype, device, seed)
        for name in self.differentiable if requires_grad else ():
            inputs[name].requires_grad_()
        return inputs

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Results by name."""
        found = self.function(**inputs)
        if self.written:
            return {name: inputs[name] for name in self.written}
        if isinstance(found, tg.BlockRouting):
            found = found.block_indices
        named = dict(zip(self.results, (found,) if isinstance(found, Tensor) else found, strict=True))
        return {name: result.to_dense() if result.is_sparse else result for name, result in named.items()}

    def everything(self, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
        """Results, and under ``grad_<name>`` the gradients of the arguments that require one, for random gradients."""
        results = self.run(inputs)
        leaves = {name: inputs[name] for name in self.differentiable if inputs[name].requires_grad}
        if leaves:
            outputs = [results[name] for name in self.differentiable_results if results[name].requires_grad]
            incoming = [
                random_tensor(tuple(output.shape), output.dtype, output.device, 100 + seed + i)
                for i, output in enumerate(outputs)
            ]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
            results |= {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {part: tensor for name, result in results.items() for part, tensor in _parts(name, result.detach())}


def _takes_none(hint: Any) -> bool:
    return type(None) in getattr(hint, "__args__", ())


def _parts(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A tensor, or the parts of a sparse one."""
    if not tensor.is_sparse:
        return [(name, tensor)]
    kind = "rows" if tensor.is_coalesced() else "padded rows"
    return [(f"{name} {kind}", tensor._indices()), (name, tensor._values())]


def on(device: torch.device, inputs: Inputs) -> Inputs:
    """The same with every tensor on ``device``."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def gives(names: tuple[str, ...], results: tuple[str, ...] = ("out",)) -> dict[str, Any]:
    """Options of a case whose ``names`` get gradients from all ``results``."""
    return {"results": results, "differentiable": names, "differentiable_results": results}

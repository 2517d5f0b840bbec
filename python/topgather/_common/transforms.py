"""How ops behave under ``torch.vmap``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from .spec import Op


def refuse_gradient(advice: str, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` that names the first tensor that requires grad."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: {advice}")


def refuse_tangent(advice: str, **tensors: Tensor | None) -> None:
    """Raise ``NotImplementedError`` that names the first tensor that is a dual number."""
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"topgather: {name} must not have a tangent (forward mode): {advice}")


def refuse_transforms(what: str, reason: str) -> None:
    """Raise ``NotImplementedError`` for a layer that no transform of torch.func can have."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"topgather: {what} cannot be called under torch.vmap and other transforms of torch.func: {reason}"
        )


def batching_rule(overload: Any, op: Op) -> Callable[..., Any]:
    """The rule that ``torch.library.register_vmap`` takes.

    The mapped dimension is folded into the one that the op treats as a batch, so that the result is that of a loop for
    one call's work. Where some argument has no such dimension the loop itself runs, each call being differentiable.
    """
    schema = overload._schema
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    results = [result.name for result in schema.returns]
    is_mutable = schema.is_mutable
    asks = list(inspect.signature(op.folds).parameters) if op.folds is not None else []

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if is_mutable:
            raise NotImplementedError(
                f"topgather: {schema.name.partition('::')[2]} writes its arguments: not under vmap"
            )
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        mapped = {name: dim for name, dim in zip(names, in_dims, strict=False) if dim is not None}
        folds = (
            info.batch_size > 0
            and set(mapped) <= set(op.batch)
            and set(results) <= set(op.batch)
            and (op.folds is None or op.folds(**{name: given[name] for name in asks}))
        )
        if not folds:
            return _loop(overload, info.batch_size, given, mapped)
        for name, dim in op.batch.items():
            if isinstance(given.get(name), Tensor):
                given[name] = _folded(given[name], mapped.get(name), dim, info.batch_size)
        output = overload(**given)
        single = isinstance(output, Tensor)
        parts = [
            part.unflatten(op.batch[name], (info.batch_size, -1))
            for name, part in zip(results, (output,) if single else output, strict=True)
        ]
        dims = tuple(op.batch[name] for name in results)
        return (parts[0], dims[0]) if single else (tuple(parts), dims)

    return rule


def _folded(tensor: Tensor, mapped: int | None, dim: int, batch_size: int) -> Tensor:
    """The mapped dimension, or copies of what is not mapped, in front of dimension ``dim`` and one with it."""
    if mapped is None:
        moved = tensor.unsqueeze(dim)
        moved = moved.expand(*moved.shape[:dim], batch_size, *moved.shape[dim + 1 :])
    else:
        moved = tensor.movedim(mapped, dim)
    # Sizes are multiplied here: flatten cannot tell them where there are no elements.
    shape = (*moved.shape[:dim], moved.size(dim) * moved.size(dim + 1), *moved.shape[dim + 2 :])
    return moved.reshape(shape)


def _loop(overload: Any, batch_size: int, given: dict[str, Any], mapped: dict[str, int]) -> tuple[Any, Any]:
    calls = []
    for index in range(batch_size):
        one = {name: given[name].select(dim, index) for name, dim in mapped.items()}
        calls.append(overload(**(given | one)))
    if not calls:
        raise ValueError(f"topgather: {overload._schema.name}: vmap over an empty dimension is not supported")
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])

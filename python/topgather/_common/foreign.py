"""Tensors of kinds that no op takes, refused by ops in words that name the argument.

A kernel for each kind's dispatch key does it, so that a call that is right asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch.library import Library

_IS_NESTED = (lambda tensor: tensor.is_nested, "a nested tensor: pack its sequences one behind the other")
_IS_QUANTIZED = (lambda tensor: tensor.is_quantized, "a quantized one: call .dequantize() on it")
_KINDS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "NestedTensorCPU": _IS_NESTED,
    "NestedTensorCUDA": _IS_NESTED,
    "QuantizedCPU": _IS_QUANTIZED,
    "QuantizedCUDA": _IS_QUANTIZED,
}


def refuse(library: Library, op_name: str, arguments: list[str]) -> None:
    """Have the op of ``library`` raise ``TypeError`` for such tensors."""
    for key, (is_of_kind, words) in _KINDS.items():

        def refusal(
            *args: Any, _is_of_kind: Callable[[Tensor], bool] = is_of_kind, _words: str = words, **kwargs: Any
        ) -> NoReturn:
            given = dict(zip(arguments, args, strict=False)) | kwargs
            wrong = [name for name, value in given.items() if isinstance(value, Tensor) and _is_of_kind(value)]
            raise TypeError(f"{' and '.join(wrong)} must be a plain torch.Tensor, got {_words}")

        library.impl(op_name, refusal, key)

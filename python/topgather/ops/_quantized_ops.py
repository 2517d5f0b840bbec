"""The ops of tables of 8 bits: a weighted sum of rows (``memory_lookup_quantized``) and dot products with rows
(``memory_dot_quantized``), each the other's gradient. Rows and scales have none.

:mod:`topgather.ops.quantized` is what users call.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .._common import checks, tensors
from .._common.spec import Op, register
from ._memory_ops import CHECK_INDICES_VARIABLE, MAX_ROWS, check_content, check_indices, num_tokens, tokens_of

_ops = torch.ops.topgather

DTYPES = (torch.int8, torch.float8_e4m3fn)
# What stands beside rows of 8 bits, and is summed in float32.
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(values: Tensor, scales: Tensor) -> None:
    """Rows of 8 bits and their scales that a kernel can take."""
    checks.check_ndim("values", values, 2, "[rows, row_dim]")
    checks.check_dtype("values", values, *DTYPES)
    checks.check_contiguous_rows("values", values)
    if values.size(0) > MAX_ROWS:
        raise ValueError(f"values must have at most {MAX_ROWS} rows, got shape {tuple(values.shape)}")
    checks.check_ndim("scales", scales, 2, "[rows, groups]")
    checks.check_dtype("scales", scales, torch.float32)
    checks.check_same_device("scales", scales, "values", values)
    checks.check_contiguous_rows("scales", scales)
    checks.check_size("scales", scales, 0, values.size(0), "rows of values")
    if scales.size(1) < 1 or values.size(1) % scales.size(1) != 0:
        raise ValueError(
            f"scales must have a number of groups that divides the {values.size(1)} columns of values, got shape "
            f"{tuple(scales.shape)}"
        )


def _check_lookup(values: Tensor, scales: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None) -> None:
    check_rows(values, scales)
    check_indices(indices, values, offsets=offsets)
    checks.check_dtype("weights", weights, *WIDE_DTYPES)
    checks.check_same_device("weights", weights, "values", values)
    if weights.shape != indices.shape:
        raise ValueError(f"weights must have the shape of indices, {tuple(indices.shape)}, got {tuple(weights.shape)}")


def _check_dot(values: Tensor, scales: Tensor, indices: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    check_rows(values, scales)
    check_indices(indices, values, offsets=offsets)
    checks.check_ndim("x", x, 2, "[tokens, row_dim]")
    checks.check_dtype("x", x, *WIDE_DTYPES)
    checks.check_same_device("x", x, "values", values)
    meaning = "bags of offsets" if offsets is not None else "tokens of indices"
    checks.check_size("x", x, 0, num_tokens(indices, offsets), meaning)
    checks.check_size("x", x, 1, values.size(1), "row_dim of values")


def _cuda_check(values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    if os.environ.get(CHECK_INDICES_VARIABLE, "") not in ("", "0"):
        check_content(values, indices, offsets)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int8)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _is_float8(values: Tensor) -> bool:
    return values.dtype == torch.float8_e4m3fn


def _lookup_backward(
    grad_out: Tensor, values: Tensor, scales: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None
) -> tuple[Tensor]:
    return (_ops.memory_dot_quantized.default(values, scales, indices, grad_out, offsets),)


def _lookup_forward(
    values: Tensor, scales: Tensor, indices: Tensor, offsets: Tensor | None, tangent_weights: Tensor | None
) -> Tensor | None:
    if tangent_weights is None:
        return None
    return _ops.memory_lookup_quantized.default(values, scales, indices, tangent_weights, offsets)


def _dot_backward(
    grad_out: Tensor, values: Tensor, scales: Tensor, indices: Tensor, x: Tensor, offsets: Tensor | None
) -> tuple[Tensor]:
    return (_ops.memory_lookup_quantized.default(values, scales, indices, grad_out, offsets),)


def _dot_forward(
    values: Tensor, scales: Tensor, indices: Tensor, offsets: Tensor | None, tangent_x: Tensor | None
) -> Tensor | None:
    if tangent_x is None:
        return None
    return _ops.memory_dot_quantized.default(values, scales, indices, tangent_x, offsets)


def _bags_of_dots(tensor: Tensor, offsets: Tensor | None) -> Tensor:
    """Of ragged bags, each entry is a bag."""
    indices = tensors.boundaries(tensor)
    return indices if offsets is None else indices.unsqueeze(1)


memory_lookup_quantized = register(
    Op(
        schema=(
            "memory_lookup_quantized(Tensor values, Tensor scales, Tensor indices, Tensor weights, "
            "Tensor? offsets=None) -> Tensor out"
        ),
        check=_check_lookup,
        check_content=check_content,
        cuda_check=_cuda_check,
        locals={"is_float8": _is_float8},
        inputs={
            "values": _bits,
            "indices": tensors.boundaries,
            "weights": _in_float32,
            "offsets": tensors.boundaries,
        },
        results=lambda values, indices, offsets: values.new_empty(
            (num_tokens(indices, offsets), values.size(1)), dtype=torch.float32
        ),
        backward=_lookup_backward,
        gradients=("weights",),
        forward_mode=_lookup_forward,
        batch={"indices": 0, "weights": 0, "out": 0},
        folds=lambda offsets: offsets is None,
    )
)
memory_dot_quantized = register(
    Op(
        schema=(
            "memory_dot_quantized(Tensor values, Tensor scales, Tensor indices, Tensor x, Tensor? offsets=None) "
            "-> Tensor out"
        ),
        check=_check_dot,
        check_content=check_content,
        cuda_check=_cuda_check,
        locals={"tokens": tokens_of, "is_float8": _is_float8},
        inputs={"values": _bits, "indices": _bags_of_dots, "x": _in_float32},
        results=lambda values, indices: values.new_empty(indices.shape, dtype=torch.float32),
        backward=_dot_backward,
        gradients=("x",),
        forward_mode=_dot_forward,
        batch={"indices": 0, "x": 0, "out": 0},
        folds=lambda offsets: offsets is None,
    )
)

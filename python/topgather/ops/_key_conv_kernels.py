"""The key convolution behind the dispatcher: schemas, checks, CPU kernels, fake kernels and autograd.

:mod:`topgather.ops.key_conv` is what users call, and :mod:`topgather.ops._key_conv_cuda` has the CUDA kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import _checks as checks
from ._library import (
    DTYPE_CODES,
    below_autograd,
    define,
    library,
    needs_grad,
    register_autocast_rule,
    register_fake,
    register_once_differentiable,
    sum_dtype,
)
from ._moba_kernels import _check_cu_seqlens, _read_cu_seqlens, rows_of

define("key_conv(Tensor key, Tensor weight, Tensor? state, Tensor? cu_seqlens) -> Tensor")
define(
    "key_conv_backward(Tensor grad_out, Tensor key, Tensor weight, Tensor? state, Tensor? cu_seqlens, "
    "bool needs_grad_weight) -> (Tensor grad_key, Tensor grad_weight, Tensor grad_state)"
)

_ops = torch.ops.topgather

LEAST_WIDTH, MOST_WIDTH = 2, 8
NOTHING = (0, 0, 0, 0)


def check_problem(key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Everything that shapes, dtypes, strides and devices can say about a call."""
    packed = cu_seqlens is not None
    layout = "[total_tokens, heads, head_dim]" if packed else "[batch, heads, tokens, head_dim]"
    checks.check_ndim("key", key, 3 if packed else 4, layout)
    checks.check_floating("key", key)
    checks.check_contiguous_rows("key", key)
    if key.size(-1) < 1:
        raise ValueError(f"key must have a head_dim of at least 1, got shape {tuple(key.shape)}")
    checks.check_ndim("weight", weight, 3, "[heads, head_dim, kernel_width]")
    dtype = key.dtype
    if weight.dtype not in (dtype, sum_dtype(dtype)):
        names = " or ".join(str(allowed) for allowed in dict.fromkeys((dtype, sum_dtype(dtype))))
        raise TypeError(f"weight must have the dtype of key or that of its sums, {names}, got {weight.dtype}")
    checks.check_same_device("weight", weight, "key", key)
    checks.check_size("weight", weight, 0, key.size(1), "heads of key")
    checks.check_size("weight", weight, 1, key.size(-1), "head_dim of key")
    width = weight.size(2)
    if not LEAST_WIDTH <= width <= MOST_WIDTH:
        raise ValueError(f"weight must have between {LEAST_WIDTH} and {MOST_WIDTH} taps, got shape "
                         f"{tuple(weight.shape)}")  # fmt: skip
    if cu_seqlens is not None:
        _check_cu_seqlens("cu_seqlens", cu_seqlens, key, "key")
    if state is None:
        return
    if packed:
        raise ValueError("state must be None where cu_seqlens is given: packed sequences start from nothing")
    checks.check_same_dtype("state", state, "key", key)
    checks.check_same_device("state", state, "key", key)
    expected = (key.size(0), key.size(1), width - 1, key.size(3))
    if tuple(state.shape) != expected:
        raise ValueError(
            f"state must have shape {list(expected)} [batch, heads, kernel_width - 1, head_dim], "
            f"got {tuple(state.shape)}"
        )
    checks.check_contiguous_rows("state", state)


def problem_of(key: Tensor, taps: Tensor, boundaries: Tensor | None) -> tuple[Any, ...]:
    """The problem as the native side takes it; ``taps`` is the weight as it gets it, ``boundaries`` are int64."""
    dtypes = DTYPE_CODES[key.dtype], DTYPE_CODES[taps.dtype]
    if boundaries is None:
        return (*dtypes, *key.shape, taps.size(2), 0, 0, torch.get_num_threads())
    tokens, heads, dim = key.shape
    sequences = boundaries.data_ptr(), boundaries.size(0) - 1
    return (*dtypes, 1, heads, tokens, dim, taps.size(2), *sequences, torch.get_num_threads())


def _boundaries_on_host(key: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    return _read_cu_seqlens(cu_seqlens, "cu_seqlens", key.size(0), "key", key.size(0), "max_seqlen")


# --- key_conv -------------------------------------------------------------------------------------------------------


def _key_conv_cpu(key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    check_problem(key, weight, state, cu_seqlens)
    boundaries = _boundaries_on_host(key, cu_seqlens)
    packed = boundaries is not None
    out = torch.empty_like(key)
    taps = weight.contiguous()
    _native.key_conv_forward_cpu(
        problem_of(key, taps, boundaries),
        rows_of(key, packed),
        NOTHING if state is None else rows_of(state, packed),
        taps.data_ptr(),
        rows_of(out, packed),
    )
    return out


def _key_conv_fake(key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    check_problem(key, weight, state, cu_seqlens)
    return torch.empty_like(key)


class _KeyConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
        with below_autograd():
            out: Tensor = _ops.key_conv.default(*args)
        ctx.save_for_backward(*args)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        key, weight, state, cu_seqlens = ctx.saved_tensors
        needs_grad_weight = ctx.needs_input_grad[1]
        grad_key, grad_weight, grad_state = _ops.key_conv_backward.default(
            grad_out, key, weight, state, cu_seqlens, needs_grad_weight
        )
        return (
            grad_key,
            grad_weight.to(weight.dtype) if needs_grad_weight else None,
            None if state is None else grad_state,
            None,
        )


def _key_conv_autograd(*args: Any) -> Tensor:
    if needs_grad(args):
        return _KeyConv.apply(*args)
    with below_autograd():
        return _ops.key_conv.default(*args)


library.impl("key_conv", _key_conv_cpu, "CPU")
library.impl("key_conv", _key_conv_autograd, "Autograd")
register_fake("key_conv", _key_conv_fake)


# --- key_conv_backward ----------------------------------------------------------------------------------------------


def check_backward(grad_out: Tensor, key: Tensor) -> None:
    checks.check_same_dtype("grad_out", grad_out, "key", key)
    checks.check_same_device("grad_out", grad_out, "key", key)
    if grad_out.shape != key.shape:
        raise ValueError(f"grad_out must have the shape of key, {tuple(key.shape)}, got {tuple(grad_out.shape)}")


def empty_gradients(
    key: Tensor, weight: Tensor, state: Tensor | None, needs_grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_key, grad_weight and grad_state; where one is not asked for, an empty tensor."""
    grad_weight = key.new_empty(weight.shape if needs_grad_weight else (0,), dtype=sum_dtype(key.dtype))
    # Zeros: where there are no tokens, no kernel writes them.
    grad_state = key.new_empty(0) if state is None else key.new_zeros(state.shape)
    return torch.empty_like(key), grad_weight, grad_state


def _key_conv_backward_cpu(
    grad_out: Tensor,
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_problem(key, weight, state, cu_seqlens)
    check_backward(grad_out, key)
    boundaries = _boundaries_on_host(key, cu_seqlens)
    packed = boundaries is not None
    grad_out = checks.contiguous_rows(grad_out)
    taps = weight.contiguous()
    gradients = empty_gradients(key, weight, state, needs_grad_weight)
    grad_key, grad_weight, grad_state = gradients
    _native.key_conv_backward_cpu(
        problem_of(key, taps, boundaries),
        (rows_of(grad_out, packed), rows_of(key, packed), NOTHING if state is None else rows_of(state, packed)),
        taps.data_ptr(),
        (rows_of(grad_key, packed), NOTHING if state is None else rows_of(grad_state, packed)),
        grad_weight.data_ptr() if needs_grad_weight else 0,
    )
    return gradients


def _key_conv_backward_fake(
    grad_out: Tensor,
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_problem(key, weight, state, cu_seqlens)
    check_backward(grad_out, key)
    return empty_gradients(key, weight, state, needs_grad_weight)


library.impl("key_conv_backward", _key_conv_backward_cpu, "CPU")
register_once_differentiable("key_conv_backward", "key_conv")
register_fake("key_conv_backward", _key_conv_backward_fake)


def _cast_keys(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keys as matrix products are cast, the state with them; a weight follows where its dtype no longer fits."""
    dtype = torch.get_autocast_dtype(device_type)

    def is_cast(tensor: Tensor) -> bool:
        return tensor.device.type == device_type and tensor.is_floating_point() and tensor.dtype != torch.float64

    key, weight, state, *rest = args
    key = key.to(dtype) if is_cast(key) else key
    state = state.to(dtype) if state is not None and is_cast(state) else state
    if is_cast(weight) and weight.dtype != key.dtype:
        weight = weight.to(sum_dtype(key.dtype))
    return (key, weight, state, *rest)


register_autocast_rule("key_conv", _cast_keys)

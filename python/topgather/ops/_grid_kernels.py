"""Grid and window attention behind the dispatcher: schemas, checks, CPU kernels, fake kernels and autograd.

Both are attention inside groups of an image's tokens; they differ in where a group's tokens lie, which
:class:`Partition` says. :mod:`topgather.ops.grid` is what users call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

_PARTITION = "str partition, SymInt rows_step, SymInt columns_step, float scale"
define(
    f"grid_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, {_PARTITION}) -> (Tensor out, Tensor lse)"
)
define(
    "grid_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, "
    f"Tensor lse, {_PARTITION}, bool needs_grad_bias) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)

_ops = torch.ops.topgather

GRID, WINDOW = "grid", "window"


class Axis(NamedTuple):
    """How an axis is cut, as the native side takes it: token i of group g is g * group_step + i * token_step."""

    size: int
    num_groups: int
    group_step: int
    token_step: int
    most_tokens: int


def axis_of(partition: str, size: int, step: int) -> Axis:
    """``step`` is the stride of a grid's tokens, or the side of a window."""
    if partition == GRID:
        return Axis(size, min(step, size), 1, step, -(-size // step))
    return Axis(size, -(-size // step), step, 1, min(step, size))


def tokens_per_group(query: Tensor, partition: str, rows_step: int, columns_step: int) -> int:
    """Most tokens of a group: the sides of a bias."""
    rows = axis_of(partition, query.size(2), rows_step).most_tokens
    return rows * axis_of(partition, query.size(3), columns_step).most_tokens


def check_problem(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, partition: str, rows_step: int, columns_step: int
) -> None:
    """Everything that shapes, dtypes, strides and devices can say about a call."""
    if partition not in (GRID, WINDOW):
        raise ValueError(f"partition must be {GRID!r} or {WINDOW!r}, got {partition!r}")
    checks.check_count("rows_step", rows_step)
    checks.check_count("columns_step", columns_step)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_ndim(name, tensor, 5, "[batch, heads, rows, columns, head_dim]")
        checks.check_floating(name, tensor)
        checks.check_same_dtype(name, tensor, "query", query)
        checks.check_same_device(name, tensor, "query", query)
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {tuple(tensor.shape)}")
        checks.check_contiguous_rows(name, tensor)
    if query.size(-1) < 1:
        raise ValueError(f"query must have a head_dim of at least 1, got shape {tuple(query.shape)}")
    if bias is None:
        return
    allowed = dict.fromkeys((query.dtype, sum_dtype(query.dtype)))
    if bias.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"bias must have the dtype of query or that of its sums, {names}, got {bias.dtype}")
    checks.check_same_device("bias", bias, "query", query)
    num_tokens = tokens_per_group(query, partition, rows_step, columns_step)
    expected = (query.size(1), num_tokens, num_tokens)
    if tuple(bias.shape) != expected:
        raise ValueError(
            f"bias must have shape {list(expected)} [heads, tokens of a group, tokens of a group], "
            f"got {tuple(bias.shape)}"
        )


def empty_like_image(like: Tensor) -> Tensor:
    """A tensor of ``like``'s shape, tokens before heads in memory where ``like`` has them so.

    So that the view ``[B, heads, H, W, D]`` of a projection ``[B, H, W, heads, D]`` gets an output that needs no copy.
    """
    batch, heads, rows, columns, dim = like.shape
    if like.stride(1) < like.stride(3):
        return like.new_empty((batch, rows, columns, heads, dim)).permute(0, 3, 1, 2, 4)
    return like.new_empty(like.shape)


def image_of(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides; strides that lead nowhere count as 0."""
    strides = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    return (tensor.data_ptr(), *(stride if size > 1 else 0 for stride, size in strides))


def problem_of(query: Tensor, partition: str, rows_step: int, columns_step: int, scale: float) -> tuple[Any, ...]:
    batch, heads, rows, columns, dim = query.shape
    return (
        DTYPE_CODES[query.dtype],
        batch,
        heads,
        dim,
        tuple(axis_of(partition, rows, rows_step)),
        tuple(axis_of(partition, columns, columns_step)),
        scale,
        torch.get_num_threads(),
    )


def bias_in_sum_dtype(bias: Tensor | None, query: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(sum_dtype(query.dtype)).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- grid_attention -------------------------------------------------------------------------------------------------


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like_image(query), query.new_empty(query.shape[:-1], dtype=sum_dtype(query.dtype))


def _grid_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    checks.check_scale(scale)
    out, lse = _empty_results(query)
    bias = bias_in_sum_dtype(bias, query)
    _native.grid_forward_cpu(
        problem_of(query, partition, rows_step, columns_step, scale),
        image_of(query),
        image_of(key),
        image_of(value),
        _address(bias),
        image_of(out),
        lse.data_ptr(),
    )
    return out, lse


def _grid_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    return _empty_results(query)


class _GridAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with below_autograd():
            out, lse = _ops.grid_attention.default(*args)
        query, key, value, bias = args[:4]
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.options = args[4:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, bias, out, lse = ctx.saved_tensors
        needs_grad_bias = bias is not None and ctx.needs_input_grad[3]
        grad_query, grad_key, grad_value, grad_bias = _ops.grid_attention_backward.default(
            grad_out, query, key, value, bias, out, lse, *ctx.options, needs_grad_bias
        )
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_bias.to(bias.dtype) if needs_grad_bias else None,
            *(None,) * len(ctx.options),
        )


def _grid_attention_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if needs_grad(args):
        return _GridAttention.apply(*args)
    with below_autograd():
        return _ops.grid_attention.default(*args)


library.impl("grid_attention", _grid_attention_cpu, "CPU")
library.impl("grid_attention", _grid_attention_autograd, "Autograd")
register_fake("grid_attention", _grid_attention_fake)


# --- grid_attention_backward ----------------------------------------------------------------------------------------


def check_backward(grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        checks.check_same_dtype(name, tensor, "query", query)
        checks.check_same_device(name, tensor, "query", query)
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {tuple(tensor.shape)}")
    if lse.dtype != sum_dtype(query.dtype):
        raise TypeError(f"lse must have dtype {sum_dtype(query.dtype)}, got {lse.dtype}")
    if lse.shape != query.shape[:-1] or lse.device != query.device:
        raise ValueError(f"lse must have one entry per token and head on query's device, got {tuple(lse.shape)}")


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, needs_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = bias.shape if bias is not None and needs_grad_bias else (0,)
    grad_bias = query.new_empty(shape, dtype=sum_dtype(query.dtype))
    return empty_like_image(query), empty_like_image(key), empty_like_image(value), grad_bias


def _grid_attention_backward_cpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    checks.check_scale(scale)
    check_backward(grad_out, query, out, lse)
    gradients = _empty_gradients(query, key, value, bias, needs_grad_bias)
    bias = bias_in_sum_dtype(bias, query)
    grad_out, out, lse = checks.contiguous_rows(grad_out), checks.contiguous_rows(out), lse.contiguous()
    _native.grid_backward_cpu(
        problem_of(query, partition, rows_step, columns_step, scale),
        tuple(image_of(tensor) for tensor in (query, key, value, out, grad_out)),
        _address(bias),
        lse.data_ptr(),
        tuple(image_of(tensor) for tensor in gradients[:3]),
        gradients[3].data_ptr() if needs_grad_bias and bias is not None else 0,
    )
    return gradients


def _grid_attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    check_backward(grad_out, query, out, lse)
    return _empty_gradients(query, key, value, bias, needs_grad_bias)


library.impl("grid_attention_backward", _grid_attention_backward_cpu, "CPU")
register_once_differentiable("grid_attention_backward", "grid_attention")
register_fake("grid_attention_backward", _grid_attention_backward_fake)


def _cast_images(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Queries, keys and values as matrix products are cast; a bias follows where its dtype no longer fits."""
    dtype = torch.get_autocast_dtype(device_type)

    def is_cast(tensor: Tensor) -> bool:
        return tensor.device.type == device_type and tensor.is_floating_point() and tensor.dtype != torch.float64

    images = [tensor.to(dtype) if is_cast(tensor) else tensor for tensor in args[:3]]
    bias = args[3]
    if bias is not None and is_cast(bias) and bias.dtype != images[0].dtype:
        bias = bias.to(sum_dtype(images[0].dtype))
    return (*images, bias, *args[4:])


register_autocast_rule("grid_attention", _cast_images)

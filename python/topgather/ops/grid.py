"""Attention inside groups of an image's tokens: strided grids and contiguous windows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._common import checks, cuda, tensors
from .._common.library import larger, smaller, sum_dtype
from .._common.spec import Op, register

Pair = int | tuple[int, int]
GRID, WINDOW = "grid", "window"
MAX_CUDA_HEAD_DIM = 128


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_size: Pair | None = None,
    stride: Pair | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside strided grids of tokens (SparseViT, arXiv 2412.14598, section 3.2; grid attention of MaxViT,
    arXiv 2204.01697, section 3.3).

    Group ``(a, b)`` holds the tokens ``(a + i * stride_rows, b + j * stride_columns)``: each sees the whole image,
    sparsely. Tokens are read where they lie, so nothing is permuted or padded; where the stride does not divide the
    image, groups that reach further have a token more than others.

    Args:
        query: ``[B, heads, H, W, D]``, float32, bfloat16, float16, or float64 (CPU only). Any strides with a contiguous
            last dimension: the views of a fused ``[B, H, W, 3, heads, D]`` projection need no copy.
        key: the same shape and dtype.
        value: the same shape and dtype.
        grid_size: largest number of tokens of a group, ``(rows, columns)``, or an int for a square: the strides are
            then ``ceil(H / rows)`` and ``ceil(W / columns)``.
        stride: instead of ``grid_size``, the distance between a group's tokens, which keeps the rate of sparsity as
            images grow. 1 is global attention.
        bias: ``[heads, G, G]``, added to the scaled scores, query before key, of query's dtype or float32 (float64 for
            float64). ``G`` is the largest number of tokens that a group has, ``ceil(H / stride_rows) *
            ceil(W / stride_columns)``, a group's tokens counted row by row.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        ``[B, heads, H, W, D]`` in query's dtype, heads and tokens laid out as query has them. Differentiable with
        respect to query, key, value and bias, once. The same bits every time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; neither ``grid_size`` nor ``stride`` given, or both.
    """
    if (grid_size is None) == (stride is None):
        raise ValueError(f"exactly one of grid_size and stride must be given, got {grid_size!r} and {stride!r}")
    if stride is not None:
        steps = checks.check_pair("stride", stride)
    else:
        rows, columns = checks.check_pair("grid_size", grid_size)
        checks.check_tensor("query", query)
        checks.check_ndim("query", query, 5, "[batch, heads, rows, columns, head_dim]")
        steps = grid_step(query.size(2), rows), grid_step(query.size(3), columns)
    return _attention(query, key, value, bias, GRID, steps, scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Pair,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside contiguous windows of tokens (Swin, arXiv 2103.14030, section 3.1; the blocks in the words of
    SparseViT, arXiv 2412.14598, section 3.2).

    Args:
        query: ``[B, heads, H, W, D]``, as in :func:`grid_attention`.
        key: the same shape and dtype.
        value: the same shape and dtype.
        window_size: tokens of a window, ``(rows, columns)``, or an int for a square. Windows at the lower and right
            edge have fewer tokens where it does not divide the image; nothing is padded.
        bias: ``[heads, G, G]`` as in :func:`grid_attention`, with ``G`` = ``min(H, rows) * min(W, columns)``.
        scale: factor on the scores; ``D ** -0.5`` if None.

    Returns:
        As :func:`grid_attention`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option.
    """
    return _attention(query, key, value, bias, WINDOW, checks.check_pair("window_size", window_size), scale)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    steps: tuple[int, int],
    scale: float | None,
) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
    if bias is not None:
        checks.check_tensor("bias", bias)
    checks.check_scale(scale)
    if scale is None:
        # A head_dim of 0 is refused by the op, in its own words.
        scale = max(query.size(-1), 1) ** -0.5 if query.ndim > 0 else 1.0
    out: Tensor = _grid_attention(query, key, value, bias, partition, *steps, float(scale))[0]
    return out


# --- the ops --------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """How an axis is cut: token i of group g stands at g * group_step + i * token_step."""

    size: int
    num_groups: int
    group_step: int
    token_step: int
    max_tokens: int


def grid_step(size: int, most: int) -> int:
    """The stride of a grid whose groups have at most ``most`` tokens along an axis of ``size``."""
    return larger(-(-size // most), 1)


def axis_of(partition: str, size: int, step: int) -> Axis:
    """``step`` is the stride of a grid's tokens, or the side of a window."""
    if partition == GRID:
        return Axis(size, smaller(step, size), 1, step, -(-size // step))
    return Axis(size, -(-size // step), step, 1, smaller(step, size))


def tokens_per_group(query: Tensor, partition: str, rows_step: int, columns_step: int) -> int:
    """Largest number of tokens of a group: the sides of a bias."""
    rows = axis_of(partition, query.size(2), rows_step).max_tokens
    return rows * axis_of(partition, query.size(3), columns_step).max_tokens


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    rows_step: int,
    columns_step: int,
) -> None:
    if partition not in (GRID, WINDOW):
        raise ValueError(f"partition must be {GRID!r} or {WINDOW!r}, got {partition!r}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_ndim(name, tensor, 5, "[batch, heads, rows, columns, head_dim]")
        checks.check_floating(name, tensor)
        _check_like_query(name, tensor, query)
        checks.check_contiguous_rows(name, tensor)
    if query.size(-1) < 1:
        raise ValueError(f"query must have a head_dim of at least 1, got shape {tuple(query.shape)}")
    if bias is None:
        return
    checks.check_sum_operand("bias", bias, "query", query)
    num_tokens = tokens_per_group(query, partition, rows_step, columns_step)
    expected = (query.size(1), num_tokens, num_tokens)
    if checks.is_other_shape(bias.shape, expected):
        raise ValueError(
            f"bias must have shape {list(expected)} [heads, tokens of a group, tokens of a group], "
            f"got {tuple(bias.shape)}"
        )


def _check_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    checks.check_same_dtype(name, tensor, "query", query)
    checks.check_same_device(name, tensor, "query", query)
    if tensor.shape != query.shape:
        raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {tuple(tensor.shape)}")


def _check_backward(
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
    softmax_terms: Tensor | None,
) -> None:
    _check(query, key, value, bias, partition, rows_step, columns_step)
    _check_like_query("grad_out", grad_out, query)
    _check_like_query("out", out, query)
    checks.check_per_query("lse", lse, query.shape[:-1], query)
    if softmax_terms is not None:
        checks.check_per_query("softmax_terms", softmax_terms, (*query.shape[:-1], 2), query)


def _cuda_check(query: Tensor) -> None:
    cuda.check_dtype("query", query)
    if query.size(-1) > MAX_CUDA_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_CUDA_HEAD_DIM} on CUDA, got {query.size(-1)}")


def _empty_like_image(like: Tensor) -> Tensor:
    """A tensor of ``like``'s shape, tokens before heads in memory where ``like`` has them so.

    So that the view ``[B, heads, H, W, D]`` of a projection ``[B, H, W, heads, D]`` gets an output that needs no copy.
    """
    batch, heads, rows, columns, dim = like.shape
    if like.stride(1) < like.stride(3):
        return like.new_empty((batch, rows, columns, heads, dim)).permute(0, 3, 1, 2, 4)
    return like.new_empty(like.shape)


def _results(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    per_token, dtype = query.shape[:-1], sum_dtype(query.dtype)
    return (
        _empty_like_image(query),
        query.new_empty(per_token, dtype=dtype),
        query.new_empty((*per_token, 2), dtype=dtype),
    )


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, needs_grad_bias: bool
) -> tuple[Tensor, ...]:
    """Where that of the bias is not asked for, an empty tensor."""
    shape = bias.shape if bias is not None and needs_grad_bias else (0,)
    grad_bias = query.new_empty(shape, dtype=sum_dtype(query.dtype))
    return _empty_like_image(query), _empty_like_image(key), _empty_like_image(value), grad_bias


def _grad_bias(tensor: Tensor, bias: Tensor | None, needs_grad_bias: bool) -> Tensor | None:
    return tensor if bias is not None and needs_grad_bias else None


def _bias_follows(tensor: Tensor, query: Tensor, device_type: str) -> Tensor:
    return tensors.autocast_to_sums(tensor, query, device_type)


def _is_window(partition: str) -> bool:
    return partition == WINDOW


_IMAGES = ("query", "key", "value", "out", "lse", "softmax_terms", "grad_out", "grad_query", "grad_key", "grad_value")
_BATCH = dict.fromkeys(_IMAGES, 0)
_OPTIONS = "str partition, SymInt rows_step, SymInt columns_step, float scale"

register(
    Op(
        schema="grid_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? bias, "
        f"Tensor out, Tensor lse, {_OPTIONS}, bool needs_grad_bias, Tensor? softmax_terms=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
        check=_check_backward,
        cuda_check=_cuda_check,
        locals={"is_window": _is_window},
        inputs={
            "bias": tensors.sums_like_query,
            "out": tensors.contiguous_rows,
            "lse": tensors.contiguous,
            "softmax_terms": tensors.contiguous,
            "grad_out": tensors.contiguous_rows,
            "grad_bias": _grad_bias,
        },
        results=_gradients,
        derivative_of="grid_attention",
        batch=_BATCH,
    )
)
_grid_attention = register(
    Op(
        schema="grid_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, "
        f"{_OPTIONS}) -> (Tensor out, Tensor lse, Tensor softmax_terms)",
        check=_check,
        cuda_check=_cuda_check,
        locals={"is_window": _is_window},
        inputs={"bias": tensors.sums_like_query},
        results=_results,
        backward="grid_attention_backward",
        autocast={**dict.fromkeys(("query", "key", "value"), tensors.autocast), "bias": _bias_follows},
        batch=_BATCH,
    )
)

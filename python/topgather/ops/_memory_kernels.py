"""Memory layers behind the dispatcher: schemas, checks, CPU kernels, fake kernels and autograd.

Two kernels make the forward, a weighted sum of table rows (``memory_lookup``) and dot products with table rows
(``memory_dot``), and one the gradients of tables (``memory_backward``); each op's gradient is made of the others.
:mod:`topgather.ops.memory` is what users call, and :mod:`topgather.ops._memory_cuda` has the CUDA kernels.
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
    register_autocast,
    register_autocast_rule,
    register_fake,
    register_once_differentiable,
    sum_dtype,
)

MOST_ROWS = 2**31 - 2
# So that the n * n pairs of keys can be numbered in 31 bits.
MOST_KEYS = 46340

define("product_key_topk(Tensor query, Tensor keys, SymInt top_k) -> (Tensor scores, Tensor indices)")
define("memory_lookup(Tensor values, Tensor indices, Tensor weights, bool sparse_grad=False) -> Tensor")
define("memory_dot(Tensor values, Tensor indices, Tensor x, bool sparse_grad=False) -> Tensor")
define(
    "memory_backward(Tensor grad_out, Tensor values, Tensor indices, Tensor weights, bool needs_grad_weights) "
    "-> (Tensor grad_values, Tensor grad_weights)"
)
define(
    "memory_backward_sparse(Tensor grad_out, Tensor values, Tensor indices, Tensor weights, bool needs_grad_weights) "
    "-> (Tensor rows, Tensor grad_rows, Tensor grad_weights)"
)

_ops = torch.ops.topgather


class Call(NamedTuple):
    """A checked call: what it returns, what the native side takes, and tensors whose memory that points to."""

    results: tuple[Tensor, ...]
    arguments: tuple[Any, ...]
    keep_alive: tuple[Tensor, ...]


def _stride(tensor: Tensor, dim: int) -> int:
    """Strides that lead nowhere count as 0."""
    return tensor.stride(dim) if tensor.size(dim) > 1 else 0


# --- product_key_topk -----------------------------------------------------------------------------------------------


def check_product_keys(query: Tensor, keys: Tensor, top_k: int) -> None:
    """Everything that shapes, dtypes, strides and devices can say about a call."""
    checks.check_ndim("query", query, 3, "[tokens, heads, head_dim]")
    checks.check_floating("query", query)
    checks.check_ndim("keys", keys, 4, "[heads, 2, num_keys, head_dim / 2]")
    checks.check_same_dtype("keys", keys, "query", query)
    checks.check_same_device("keys", keys, "query", query)
    head_dim = query.size(2)
    if head_dim < 2 or head_dim % 2 != 0:
        raise ValueError(f"query must have an even head_dim of at least 2, got shape {tuple(query.shape)}")
    checks.check_size("keys", keys, 0, query.size(1), "heads of query")
    checks.check_size("keys", keys, 1, 2, "halves")
    checks.check_size("keys", keys, 3, head_dim // 2, "half of query's head_dim")
    num_keys = keys.size(2)
    if num_keys < 1 or num_keys > MOST_KEYS:
        raise ValueError(f"keys must have between 1 and {MOST_KEYS} keys a half, got shape {tuple(keys.shape)}")
    checks.check_count("top_k", top_k)
    if top_k > num_keys * num_keys:
        raise ValueError(f"top_k must be at most num_keys squared, {num_keys * num_keys}, got {top_k}")
    checks.check_contiguous_rows("query", query)
    checks.check_contiguous_rows("keys", keys)


def _empty_topk(query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (query.size(0), query.size(1), top_k)
    return query.new_empty(shape, dtype=sum_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


def topk_call(query: Tensor, keys: Tensor, top_k: int, half_dim: int) -> Call:
    """``query [T, H, 2, half]`` and ``keys``, whose rows may be padded beyond ``half_dim``."""
    scores, indices = _empty_topk(query, top_k)
    fields = (
        DTYPE_CODES[query.dtype],
        query.size(0),
        query.size(1),
        keys.size(2),
        half_dim,
        top_k,
        torch.get_num_threads(),
        query.data_ptr(),
        _stride(query, 0),
        _stride(query, 1),
        keys.data_ptr(),
        _stride(keys, 0),
        _stride(keys, 1),
        _stride(keys, 2),
        scores.data_ptr(),
        indices.data_ptr(),
    )
    return Call((scores, indices), (fields,), (query, keys))


def _product_key_topk_cpu(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    check_product_keys(query, keys, top_k)
    call = topk_call(query, keys, top_k, keys.size(3))
    _native.product_key_topk_cpu(*call.arguments)
    scores, indices = call.results
    return scores, indices


def _product_key_topk_fake(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    check_product_keys(query, keys, top_k)
    return _empty_topk(query, top_k)


class _ProductKeyTopk(torch.autograd.Function):
    """The keys of all heads and halves are one table of rows, and a token's chosen keys a bag of it for each half."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with below_autograd():
            scores, indices = _ops.product_key_topk.default(query, keys, top_k)
        ctx.save_for_backward(query, keys, indices)
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        query, keys, indices = ctx.saved_tensors
        num_tokens, num_heads, top_k = indices.shape
        num_keys, half_dim = keys.shape[2:]
        halves = torch.stack((indices.div(num_keys, rounding_mode="floor"), indices % num_keys), dim=2)
        first_rows = torch.arange(2 * num_heads, device=keys.device).view(num_heads, 2, 1) * num_keys
        num_bags = num_tokens * num_heads * 2
        rows = (halves + first_rows).view(num_bags, top_k)
        weights = grad_scores.unsqueeze(2).expand(-1, -1, 2, -1).reshape(num_bags, top_k)
        table = keys.reshape(num_heads * 2 * num_keys, half_dim)
        grad_query = grad_keys = None
        if ctx.needs_input_grad[0]:
            grad_query = _ops.memory_lookup.default(table, rows, weights).view(query.shape)
        if ctx.needs_input_grad[1]:
            bags = query.reshape(num_bags, half_dim)
            grad_keys = _ops.memory_backward.default(bags, table, rows, weights, False)[0].view(keys.shape)
        return grad_query, grad_keys, None


def _product_key_topk_autograd(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if needs_grad((query, keys)):
        return _ProductKeyTopk.apply(query, keys, top_k)
    with below_autograd():
        return _ops.product_key_topk.default(query, keys, top_k)


library.impl("product_key_topk", _product_key_topk_cpu, "CPU")
library.impl("product_key_topk", _product_key_topk_autograd, "Autograd")
register_fake("product_key_topk", _product_key_topk_fake)


# --- what lookups share ---------------------------------------------------------------------------------------------


def check_table(name: str, values: Tensor) -> None:
    """A table of rows that a kernel can take."""
    checks.check_ndim(name, values, 2, "[rows, row_dim]")
    checks.check_floating(name, values)
    checks.check_contiguous_rows(name, values)
    if values.size(0) > MOST_ROWS:
        raise ValueError(f"{name} must have at most {MOST_ROWS} rows, got shape {tuple(values.shape)}")


def check_indices(indices: Tensor, values: Tensor, name: str = "values") -> None:
    """Indices that a kernel can take, but for what they hold."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must have dtype torch.int32 or torch.int64, got {indices.dtype}")
    checks.check_ndim("indices", indices, 2, "[tokens, entries]")
    checks.check_same_device("indices", indices, name, values)


def check_weights(weights: Tensor, indices: Tensor, values: Tensor, name: str = "values") -> None:
    """Weights that a kernel can take."""
    allowed = dict.fromkeys((values.dtype, sum_dtype(values.dtype)))
    if weights.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"weights must have the dtype of {name} or that of its sums, {names}, got {weights.dtype}")
    checks.check_same_device("weights", weights, name, values)
    if weights.shape != indices.shape:
        raise ValueError(f"weights must have the shape of indices, {tuple(indices.shape)}, got {tuple(weights.shape)}")


def check_token_rows(name: str, x: Tensor, indices: Tensor, values: Tensor, values_name: str = "values") -> None:
    """One row as wide as the table's for every token."""
    checks.check_ndim(name, x, 2, "[tokens, row_dim]")
    checks.check_same_dtype(name, x, values_name, values)
    checks.check_same_device(name, x, values_name, values)
    checks.check_size(name, x, 0, indices.size(0), "tokens of indices")
    checks.check_size(name, x, 1, values.size(1), f"row_dim of {values_name}")


def raise_for_bad_index(indices: Tensor, num_rows: int) -> None:
    """Raise ``IndexError`` where an index names no row. Reads what the tensor holds."""
    if indices.numel() == 0:
        return
    least, most = (bound.item() for bound in torch.aminmax(indices))
    if least < 0 or most >= num_rows:
        raise IndexError(
            f"indices must be between 0 and {num_rows - 1}, for values has {num_rows} rows, "
            f"got {least if least < 0 else most}"
        )


def _problem(values: Tensor, indices: Tensor) -> tuple[int, ...]:
    num_tokens, bag_size = indices.shape
    return (DTYPE_CODES[values.dtype], values.size(0), values.size(1), num_tokens, bag_size, torch.get_num_threads())


def _rows(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _stride(tensor, 0)


def _in_sum_dtype(tensor: Tensor, values: Tensor) -> Tensor:
    return tensor.to(sum_dtype(values.dtype)).contiguous()


# --- memory_lookup --------------------------------------------------------------------------------------------------


def _check_lookup(values: Tensor, indices: Tensor, weights: Tensor) -> None:
    check_table("values", values)
    check_indices(indices, values)
    check_weights(weights, indices, values)


def lookup_call(values: Tensor, indices: Tensor, weights: Tensor) -> Call:
    """A checked ``memory_lookup``."""
    _check_lookup(values, indices, weights)
    out = values.new_empty((indices.size(0), values.size(1)))
    rows, factors = indices.to(torch.int64).contiguous(), _in_sum_dtype(weights, values)
    arguments = (_problem(values, indices), _rows(values), rows.data_ptr(), factors.data_ptr(), out.data_ptr())
    return Call((out,), arguments, (rows, factors))


def _memory_lookup_cpu(values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool = False) -> Tensor:
    call = lookup_call(values, indices, weights)
    raise_for_bad_index(indices, values.size(0))
    _native.memory_lookup_cpu(*call.arguments)
    return call.results[0]


def _memory_lookup_fake(values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool = False) -> Tensor:
    _check_lookup(values, indices, weights)
    return values.new_empty((indices.size(0), values.size(1)))


def _table_gradients(
    is_sparse: bool, grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a table, dense or sparse, and of weights; the latter empty unless asked for."""
    if not is_sparse:
        grad_values, grad_weights = _ops.memory_backward.default(grad_out, values, indices, weights, needs_grad_weights)
        return grad_values, grad_weights
    rows, grad_rows, grad_weights = _ops.memory_backward_sparse.default(
        grad_out, values, indices, weights, needs_grad_weights
    )
    grad_values = torch.sparse_coo_tensor(
        rows.unsqueeze(0), grad_rows, values.shape, is_coalesced=True, check_invariants=False
    )
    if values.is_leaf and values.requires_grad and not torch.compiler.is_compiling():
        _keep_coalesced(values, rows)
    return grad_values, grad_weights


def _keep_coalesced(values: Tensor, rows: Tensor) -> None:
    """Mark ``values.grad`` as coalesced once it is stored, if it then is the gradient of just these rows.

    torch stores a sparse gradient without its mark, and an optimizer would sort and copy all of it again. Holding on to
    ``rows`` makes sure that no other gradient's indices can lie at their address.
    """

    def mark(parameter: Tensor) -> None:
        handle.remove()
        grad = parameter.grad
        if grad is None or not grad.is_sparse:
            return
        if grad._nnz() == rows.numel() and grad._indices().data_ptr() == rows.data_ptr():
            grad._coalesced_(True)

    handle = values.register_post_accumulate_grad_hook(mark)


class _MemoryLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool) -> Tensor:  # type: ignore[override]
        with below_autograd():
            out = _ops.memory_lookup.default(values, indices, weights, sparse_grad)
        ctx.save_for_backward(values, indices, weights)
        ctx.sparse_grad = sparse_grad
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        values, indices, weights = ctx.saved_tensors
        needs_values, _, needs_weights, _ = ctx.needs_input_grad
        grad_values = grad_weights = None
        if needs_values:
            grad_values, grad_weights = _table_gradients(
                ctx.sparse_grad, grad_out, values, indices, weights, needs_weights
            )
        elif needs_weights:
            grad_weights = _ops.memory_dot.default(values, indices, grad_out)
        if not needs_weights or grad_weights is None:
            return grad_values, None, None, None
        return grad_values, None, grad_weights.to(weights.dtype), None


def _memory_lookup_autograd(values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool = False) -> Tensor:
    if needs_grad((values, weights)):
        return _MemoryLookup.apply(values, indices, weights, sparse_grad)
    with below_autograd():
        return _ops.memory_lookup.default(values, indices, weights, sparse_grad)


library.impl("memory_lookup", _memory_lookup_cpu, "CPU")
library.impl("memory_lookup", _memory_lookup_autograd, "Autograd")
register_fake("memory_lookup", _memory_lookup_fake)


# --- memory_dot -----------------------------------------------------------------------------------------------------


def _check_dot(values: Tensor, indices: Tensor, x: Tensor) -> None:
    check_table("values", values)
    check_indices(indices, values)
    check_token_rows("x", x, indices, values)


def dot_call(values: Tensor, indices: Tensor, x: Tensor) -> Call:
    """A checked ``memory_dot``."""
    _check_dot(values, indices, x)
    out = values.new_empty(indices.shape, dtype=sum_dtype(values.dtype))
    rows, x = indices.to(torch.int64).contiguous(), checks.contiguous_rows(x)
    arguments = (_problem(values, indices), _rows(values), rows.data_ptr(), _rows(x), out.data_ptr())
    return Call((out,), arguments, (rows, x))


def _memory_dot_cpu(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    call = dot_call(values, indices, x)
    raise_for_bad_index(indices, values.size(0))
    _native.memory_dot_cpu(*call.arguments)
    return call.results[0]


def _memory_dot_fake(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    _check_dot(values, indices, x)
    return values.new_empty(indices.shape, dtype=sum_dtype(values.dtype))


class _MemoryDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool) -> Tensor:  # type: ignore[override]
        with below_autograd():
            out = _ops.memory_dot.default(values, indices, x, sparse_grad)
        ctx.save_for_backward(values, indices, x)
        ctx.sparse_grad = sparse_grad
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        values, indices, x = ctx.saved_tensors
        needs_values, _, needs_x, _ = ctx.needs_input_grad
        grad_values = grad_x = None
        if needs_values:
            grad_values, _ = _table_gradients(ctx.sparse_grad, x, values, indices, grad, False)
        if needs_x:
            grad_x = _ops.memory_lookup.default(values, indices, grad)
        return grad_values, None, grad_x, None


def _memory_dot_autograd(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    if needs_grad((values, x)):
        return _MemoryDot.apply(values, indices, x, sparse_grad)
    with below_autograd():
        return _ops.memory_dot.default(values, indices, x, sparse_grad)


library.impl("memory_dot", _memory_dot_cpu, "CPU")
library.impl("memory_dot", _memory_dot_autograd, "Autograd")
register_fake("memory_dot", _memory_dot_fake)


# --- memory_backward, dense and sparse ------------------------------------------------------------------------------


class SortedEntries(NamedTuple):
    """Entries ``t * K + k`` by the row they name, those of a row in ascending order."""

    order: Tensor  # [T * K] int64
    rows: Tensor  # [T * K] int32, ascending; the number of rows where an index names none
    targets: Tensor  # [T * K] int32, the row of the gradient that each entry adds to


def sort_entries(indices: Tensor, num_rows: int) -> SortedEntries:
    """Entries sorted for a dense gradient, whose rows are the table's."""
    flat = indices.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < num_rows), flat, num_rows)
    rows, order = flat.to(torch.int32).sort(stable=True)
    return SortedEntries(order, rows, rows)


def number_touched(entries: SortedEntries, num_rows: int) -> tuple[SortedEntries, Tensor]:
    """Entries for a gradient of just the touched rows, and which rows these are, int64 ascending.

    How many there are shapes the result, so on CUDA this waits for the device: the one place where an op does.
    """
    is_first = torch.ones_like(entries.rows, dtype=torch.bool)
    torch.ne(entries.rows[1:], entries.rows[:-1], out=is_first[1:])
    targets = is_first.cumsum(0, dtype=torch.int32).sub_(1)
    touched = entries.rows[is_first & (entries.rows < num_rows)]
    return entries._replace(targets=targets), touched.to(torch.int64)


def _check_memory_backward(grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> None:
    _check_lookup(values, indices, weights)
    check_token_rows("grad_out", grad_out, indices, values)


def _empty_weights(values: Tensor, indices: Tensor, is_needed: bool) -> Tensor:
    return values.new_empty(indices.shape if is_needed else (0,), dtype=sum_dtype(values.dtype))


def backward_call(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    needs_grad_weights: bool,
    entries: SortedEntries,
    num_targets: int,
) -> Call:
    """A checked gradient of ``num_targets`` rows."""
    grad_rows = values.new_empty((num_targets, values.size(1)))
    grad_weights = _empty_weights(values, indices, needs_grad_weights)
    grad_out, factors = checks.contiguous_rows(grad_out), _in_sum_dtype(weights, values)
    arguments = (
        _problem(values, indices),
        _rows(values) if needs_grad_weights else (0, 0),
        (entries.order.data_ptr(), entries.rows.data_ptr(), entries.targets.data_ptr()),
        factors.data_ptr(),
        _rows(grad_out),
        num_targets,
        grad_rows.data_ptr(),
        grad_weights.data_ptr() if needs_grad_weights else 0,
    )
    return Call((grad_rows, grad_weights), arguments, (grad_out, factors, *entries))


def dense_backward_call(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> Call:
    """A checked ``memory_backward``."""
    _check_memory_backward(grad_out, values, indices, weights)
    entries = sort_entries(indices, values.size(0))
    return backward_call(grad_out, values, indices, weights, needs_grad_weights, entries, values.size(0))


def sparse_backward_call(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Call]:
    """Touched rows, and a checked ``memory_backward_sparse``."""
    _check_memory_backward(grad_out, values, indices, weights)
    entries, touched = number_touched(sort_entries(indices, values.size(0)), values.size(0))
    call = backward_call(grad_out, values, indices, weights, needs_grad_weights, entries, touched.numel())
    return touched, call


def _memory_backward_cpu(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor]:
    call = dense_backward_call(grad_out, values, indices, weights, needs_grad_weights)
    raise_for_bad_index(indices, values.size(0))
    _native.memory_backward_cpu(*call.arguments)
    grad_values, grad_weights = call.results
    return grad_values, grad_weights


def _memory_backward_sparse_cpu(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    touched, call = sparse_backward_call(grad_out, values, indices, weights, needs_grad_weights)
    raise_for_bad_index(indices, values.size(0))
    _native.memory_backward_cpu(*call.arguments)
    grad_rows, grad_weights = call.results
    return touched, grad_rows, grad_weights


def _memory_backward_fake(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor]:
    _check_memory_backward(grad_out, values, indices, weights)
    return values.new_empty(values.shape), _empty_weights(values, indices, needs_grad_weights)


def _memory_backward_sparse_fake(
    grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, needs_grad_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_memory_backward(grad_out, values, indices, weights)
    num_touched = torch.library.get_ctx().new_dynamic_size()
    return (
        indices.new_empty((num_touched,), dtype=torch.int64),
        values.new_empty((num_touched, values.size(1))),
        _empty_weights(values, indices, needs_grad_weights),
    )


library.impl("memory_backward", _memory_backward_cpu, "CPU")
library.impl("memory_backward_sparse", _memory_backward_sparse_cpu, "CPU")
register_once_differentiable("memory_backward", "memory_lookup")
register_once_differentiable("memory_backward_sparse", "memory_lookup")
register_fake("memory_backward", _memory_backward_fake)
register_fake("memory_backward_sparse", _memory_backward_sparse_fake)


# --- autocast: what is scored is cast as matrix products are; a table of millions of rows stays what it is -----------


def _cast_weights(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    values, indices, weights, *rest = args
    is_cast = weights.is_floating_point() and weights.device.type == device_type and weights.dtype != values.dtype
    return (values, indices, weights.to(sum_dtype(values.dtype)) if is_cast else weights, *rest)


def _cast_token_rows(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    values, indices, x, *rest = args
    is_cast = x.is_floating_point() and x.device.type == device_type
    return (values, indices, x.to(values.dtype) if is_cast else x, *rest)


register_autocast("product_key_topk", num_inputs=2)
register_autocast_rule("memory_lookup", _cast_weights)
register_autocast_rule("memory_dot", _cast_token_rows)

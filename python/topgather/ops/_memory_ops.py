"""The ops of memory layers.

Two kernels make the forward, a weighted sum of table rows (``memory_lookup``) and dot products with table rows
(``memory_dot``), and one the gradients of tables (``memory_backward``); each op's gradient is made of the others.
:mod:`topgather.ops.memory` is what users call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .._common import checks, cuda, sparse, tensors
from .._common.library import sum_dtype
from .._common.spec import Op, register

_ops = torch.ops.topgather

MAX_ROWS = 2**31 - 2
# So that the n * n pairs of keys can be numbered in 31 bits.
MAX_KEYS = 46340
# What the CUDA kernel of the search takes (csrc/memory/memory_cuda.h).
MAX_HALF_DIM = 256
MAX_TOP_K = 128
CHECK_INDICES_VARIABLE = "TOPGATHER_CHECK_INDICES"
# Scores of a chunk of tokens in the composition of torch ops.
COMPOSED_BYTES = 256 * 2**20

# --- checks ---------------------------------------------------------------------------------------------------------


def _check_product_keys(query: Tensor, keys: Tensor, top_k: int) -> None:
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
    if num_keys < 1 or num_keys > MAX_KEYS:
        raise ValueError(f"keys must have between 1 and {MAX_KEYS} keys a half, got shape {tuple(keys.shape)}")
    if top_k > num_keys * num_keys:
        raise ValueError(f"top_k must be at most num_keys squared, {num_keys * num_keys}, got {top_k}")
    checks.check_contiguous_rows("query", query)
    checks.check_contiguous_rows("keys", keys)


def check_table(name: str, values: Tensor) -> None:
    """A table of rows that a kernel can take."""
    checks.check_ndim(name, values, 2, "[rows, row_dim]")
    checks.check_floating(name, values)
    checks.check_contiguous_rows(name, values)
    if values.size(0) > MAX_ROWS:
        raise ValueError(f"{name} must have at most {MAX_ROWS} rows, got shape {tuple(values.shape)}")


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {tensor.dtype}")


def check_indices(indices: Tensor, values: Tensor, name: str = "values", offsets: Tensor | None = None) -> None:
    """Indices, and offsets of ragged bags, that a kernel can take, but for what they hold."""
    _check_integers("indices", indices)
    if offsets is None:
        checks.check_ndim("indices", indices, 2, "[tokens, entries]")
    else:
        checks.check_ndim("indices", indices, 1, "[entries] where offsets are given")
    checks.check_same_device("indices", indices, name, values)
    if offsets is not None:
        check_offsets(offsets, values, name)


def check_offsets(offsets: Tensor, values: Tensor, name: str = "values", least: int = 1) -> None:
    """Offsets of ragged bags, at least so many, but for what they hold."""
    _check_integers("offsets", offsets)
    if offsets.ndim != 1 or offsets.size(0) < least:
        raise ValueError(
            f"offsets must have 1 dimension, with the end of the last bag [bags + 1], got shape {tuple(offsets.shape)}"
            if least
            else f"offsets must have 1 dimension [bags], got shape {tuple(offsets.shape)}"
        )
    checks.check_same_device("offsets", offsets, name, values)


def check_weights(weights: Tensor, indices: Tensor, values: Tensor, name: str = "values") -> None:
    """Weights that a kernel can take."""
    checks.check_sum_operand("weights", weights, name, values)
    if weights.shape != indices.shape:
        raise ValueError(f"weights must have the shape of indices, {tuple(indices.shape)}, got {tuple(weights.shape)}")


def check_token_rows(
    name: str, x: Tensor, indices: Tensor, values: Tensor, values_name: str = "values", offsets: Tensor | None = None
) -> None:
    """One row as wide as the table's for every token."""
    checks.check_ndim(name, x, 2, "[tokens, row_dim]")
    checks.check_same_dtype(name, x, values_name, values)
    checks.check_same_device(name, x, values_name, values)
    checks.check_size(
        name, x, 0, num_tokens(indices, offsets), "bags of offsets" if offsets is not None else "tokens of indices"
    )
    checks.check_size(name, x, 1, values.size(1), f"row_dim of {values_name}")


def _check_lookup(values: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None) -> None:
    check_table("values", values)
    check_indices(indices, values, offsets=offsets)
    check_weights(weights, indices, values)


def _check_dot(values: Tensor, indices: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    check_table("values", values)
    check_indices(indices, values, offsets=offsets)
    check_token_rows("x", x, indices, values, offsets=offsets)


def _check_backward(grad_out: Tensor, values: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None) -> None:
    _check_lookup(values, indices, weights, offsets)
    check_token_rows("grad_out", grad_out, indices, values, offsets=offsets)


def check_content(values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    """Raise ``IndexError`` where an index names no row, ``ValueError`` for wrong offsets. Waits for the device."""
    if offsets is not None and offsets.size(0) > 1:
        num_entries = indices.size(0)
        if offsets[0].item() != 0:
            raise ValueError(f"offsets must start with 0, got {offsets[0].item()}")
        is_wrong = (offsets[1:] < offsets[:-1]) | (offsets[1:] > num_entries)
        if is_wrong.any():
            raise ValueError(
                f"offsets must not decrease, nor be above {num_entries}, the number of entries; "
                f"that at {int(is_wrong.nonzero()[0]) + 1} does"
            )
    if indices.numel() == 0:
        return
    num_rows = values.size(0)
    low, high = (bound.item() for bound in torch.aminmax(indices))
    if low < 0 or high >= num_rows:
        raise IndexError(
            f"indices must be between 0 and {num_rows - 1}, for values has {num_rows} rows, "
            f"got {low if low < 0 else high}"
        )


def _cuda_check(values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    """A kernel follows no index that names no row, so that nothing waits for the device unless that is asked for."""
    cuda.check_dtype("values", values)
    if os.environ.get(CHECK_INDICES_VARIABLE, "") not in ("", "0"):
        check_content(values, indices, offsets)


# --- ragged bags ----------------------------------------------------------------------------------------------------


def num_tokens(indices: Tensor, offsets: Tensor | None) -> int:
    """Tokens, each of which has a bag."""
    return indices.size(0) if offsets is None else offsets.size(0) - 1


def tokens_of(indices: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Token of each entry of ragged bags, ``[E]`` int32, -1 where it is nobody's; None where bags are not ragged.

    ``offsets [T + 1]``. Nothing waits for the device.
    """
    if offsets is None:
        return None
    entries = torch.arange(indices.size(0), dtype=offsets.dtype, device=offsets.device)
    begun = torch.searchsorted(offsets.contiguous(), entries, right=True, out_int32=True)
    return torch.where(begun < offsets.size(0), begun, 0) - 1


# --- gradients of tables: memory_backward, dense and sparse ---------------------------------------------------------


def _sorted_entries(values: Tensor, indices: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of the entries ``t * K + k``, int32 ascending, and the entries, int64, those of a row ascending.

    Both ``[T * K]``. An index that names no row counts as the number of rows, and so does that of an entry of nobody.
    """
    num_rows, flat = values.size(0), indices.reshape(-1)
    is_row = (flat >= 0) & (flat < num_rows)
    if tokens is not None:
        is_row &= tokens >= 0
    flat = torch.where(is_row, flat, num_rows)
    sorted_rows, order = flat.to(torch.int32).sort(stable=True)
    return sorted_rows, order


def _is_first(sorted_rows: Tensor) -> Tensor:
    is_first = torch.ones_like(sorted_rows, dtype=torch.bool)
    torch.ne(sorted_rows[1:], sorted_rows[:-1], out=is_first[1:])
    return is_first


def _empty_weights(values: Tensor, indices: Tensor, needs_grad_weights: bool) -> Tensor:
    return values.new_empty(indices.shape if needs_grad_weights else (0,), dtype=sum_dtype(values.dtype))


def _dense_gradients(values: Tensor, indices: Tensor, needs_grad_weights: bool) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), _empty_weights(values, indices, needs_grad_weights)


def _touched_rows(values: Tensor, sorted_rows: Tensor, is_first: Tensor) -> Tensor:
    """Their number is a size of the result: on CUDA this waits for the device, as no other op does."""
    return sorted_rows[is_first & (sorted_rows < values.size(0))].to(torch.int64)


def _padded_rows(values: Tensor, sorted_rows: Tensor, is_first: Tensor, targets: Tensor) -> Tensor:
    """As many as there are entries, so that nothing waits: the touched rows, then the last of them again and again."""
    num_entries = sorted_rows.numel() if values.size(0) > 0 else 0
    # What names no row stands behind all rows: nobody reads that place.
    places = torch.where(is_first & (sorted_rows < values.size(0)), targets, num_entries).to(torch.int64)
    rows = sorted_rows.new_zeros(num_entries + 1, dtype=torch.int64)
    return rows.scatter_(0, places, sorted_rows.to(torch.int64))[:num_entries].cummax(0).values


def _rows_of_gradient(values: Tensor, sorted_rows: Tensor, is_first: Tensor, targets: Tensor, padded: bool) -> Tensor:
    if padded:
        return _padded_rows(values, sorted_rows, is_first, targets)
    return _touched_rows(values, sorted_rows, is_first)


def _sparse_gradients(
    values: Tensor, indices: Tensor, needs_grad_weights: bool, rows: Tensor, grad_rows: Tensor, padded: bool
) -> tuple[Tensor, Tensor]:
    if not padded:
        sparse.keep_coalesced(rows)
    grad_values = torch.sparse_coo_tensor(
        rows.unsqueeze(0), grad_rows, values.shape, is_coalesced=not padded, check_invariants=False
    )
    return grad_values, _empty_weights(values, indices, needs_grad_weights)


def _fake_sparse_gradients(
    values: Tensor, indices: Tensor, needs_grad_weights: bool, padded: bool
) -> tuple[Tensor, Tensor]:
    """With as many rows as there are entries: how many are touched only data can tell, and nobody who traces asks."""
    sparse.let_compiler_compare()
    num_entries = indices.numel()
    rows = indices.new_empty((1, num_entries), dtype=torch.int64)
    grad_rows = values.new_empty((num_entries, values.size(1)))
    grad_values = torch.sparse_coo_tensor(
        rows, grad_rows, values.shape, is_coalesced=not padded, check_invariants=False
    )
    return grad_values, _empty_weights(values, indices, needs_grad_weights)


def _in_sum_dtype(tensor: Tensor, values: Tensor) -> Tensor:
    return tensors.sums_like(tensor, values)


_entry_locals: dict[str, Callable[..., Any]] = {
    "tokens": tokens_of,
    "entries": _sorted_entries,
    "sorted_rows": lambda entries: entries[0],
    "order": lambda entries: entries[1],
}
_backward_inputs: dict[str, Callable[..., Any]] = {
    "grad_out": tensors.contiguous_rows,
    "weights": _in_sum_dtype,
    "grad_weights": lambda tensor, needs_grad_weights: tensor if needs_grad_weights else None,
}
# `owner` is the op whose gradient is made.
_backward_arguments = (
    "Tensor grad_out, Tensor values, Tensor indices, Tensor weights, bool needs_grad_weights, "
    'str owner="memory_lookup", Tensor? offsets=None'
)
register(
    Op(
        schema=f"memory_backward({_backward_arguments}) -> (Tensor grad_rows, Tensor grad_weights)",
        check=_check_backward,
        check_content=check_content,
        cuda_check=_cuda_check,
        locals={**_entry_locals, "targets": lambda sorted_rows: sorted_rows},
        inputs=_backward_inputs,
        results=_dense_gradients,
        derivative_of="owner",
    )
)
register(
    Op(
        schema=(
            f"memory_backward_sparse({_backward_arguments}, bool padded=False) "
            "-> (Tensor grad_values, Tensor grad_weights)"
        ),
        native="memory_backward",
        check=_check_backward,
        check_content=check_content,
        cuda_check=_cuda_check,
        locals={
            **_entry_locals,
            "is_first": _is_first,
            "targets": lambda is_first: is_first.cumsum(0, dtype=torch.int32).sub_(1),
            "rows": _rows_of_gradient,
            "grad_rows": lambda values, rows: values.new_empty((rows.size(0), values.size(1))),
        },
        inputs=_backward_inputs,
        results=_sparse_gradients,
        fake_results=_fake_sparse_gradients,
        derivative_of="owner",
    )
)


def _table_gradients(sparse_grad: bool, padded_grad: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of a table, dense or sparse, and of weights; the latter empty unless asked for.

    Those of several backward passes at once (``torch.autograd.grad`` with ``is_grads_batched``) are dense: torch's loop
    over them takes no sparse results.
    """
    is_batch = any(isinstance(each, Tensor) and is_legacy_batchedtensor(each) for each in arguments)
    if sparse_grad and not is_batch:
        grad_values, grad_weights = _ops.memory_backward_sparse.default(*arguments, padded_grad)
    else:
        grad_values, grad_weights = _ops.memory_backward.default(*arguments)
    return grad_values, grad_weights


# --- memory_lookup and memory_dot -----------------------------------------------------------------------------------


def follow_table(tensor: Tensor, values: Tensor, device_type: str) -> Tensor:
    """A table of millions of rows stays what it is under autocast: what is multiplied with its rows follows it."""
    return tensor.to(values.dtype) if tensors.is_autocast(tensor, device_type) else tensor


def _lookup_backward(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    sparse_grad: bool,
    offsets: Tensor | None,
    padded_grad: bool,
    needs_grad_values: bool,
    needs_grad_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if needs_grad_values:
        arguments = (grad_out, values, indices, weights, needs_grad_weights)
        return _table_gradients(sparse_grad, padded_grad, *arguments, "memory_lookup", offsets)
    return None, _ops.memory_dot.default(values, indices, grad_out, False, offsets)


def lookup_tangent(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    offsets: Tensor | None,
    tangent_values: Tensor | None,
    tangent_weights: Tensor | None,
) -> Tensor:
    """The tangent of ``memory_lookup``."""
    pairs = (tangent_values, values), (weights, tangent_weights)
    return _sum_of_tangents(_ops.memory_lookup.default, indices, *pairs, offsets)


def _dot_backward(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    sparse_grad: bool,
    offsets: Tensor | None,
    padded_grad: bool,
    needs_grad_values: bool,
    needs_grad_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad_values = grad_x = None
    if needs_grad_values:
        owner = "memory_dot, of expert_lookup or of the gradient of memory_lookup,"
        arguments = (x, values, indices, grad_out, False, owner, offsets)
        grad_values, _ = _table_gradients(sparse_grad, padded_grad, *arguments)
    if needs_grad_x:
        grad_x = _ops.memory_lookup.default(values, indices, grad_out, False, offsets)
    return grad_values, grad_x


def dot_tangent(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    offsets: Tensor | None,
    tangent_values: Tensor | None,
    tangent_x: Tensor | None,
) -> Tensor:
    """The tangent of ``memory_dot``."""
    return _sum_of_tangents(_ops.memory_dot.default, indices, (tangent_values, values), (x, tangent_x), offsets)


def _sum_of_tangents(
    op: Any,
    indices: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    others: tuple[Tensor | None, Tensor | None],
    offsets: Tensor | None = None,
) -> Tensor:
    """The tangent of an op that is linear in its table and in its other tensor: one call for each that has one."""
    pairs = zip(tables, others, strict=True)
    terms = [
        op(tensors.contiguous_rows(table), indices, other, False, offsets)
        for table, other in pairs
        if table is not None and other is not None
    ]
    return sum(terms[1:], start=terms[0])


def _bags_of_dots(tensor: Tensor, offsets: Tensor | None) -> Tensor:
    """Of ragged bags, each entry is a bag."""
    indices = tensors.boundaries(tensor)
    return indices if offsets is None else indices.unsqueeze(1)


memory_lookup = register(
    Op(
        schema=(
            "memory_lookup(Tensor values, Tensor indices, Tensor weights, bool sparse_grad=False, "
            "Tensor? offsets=None, bool padded_grad=False) -> Tensor out"
        ),
        check=_check_lookup,
        check_content=check_content,
        cuda_check=_cuda_check,
        inputs={"indices": tensors.boundaries, "weights": _in_sum_dtype, "offsets": tensors.boundaries},
        results=lambda values, indices, offsets: values.new_empty((num_tokens(indices, offsets), values.size(1))),
        backward=_lookup_backward,
        gradients=("values", "weights"),
        forward_mode=lookup_tangent,
        autocast={"weights": lambda tensor, values, device_type: tensors.autocast_to_sums(tensor, values, device_type)},
        batch={"indices": 0, "weights": 0, "out": 0},
        folds=lambda offsets: offsets is None,
        shared="values",
    )
)
memory_dot = register(
    Op(
        schema=(
            "memory_dot(Tensor values, Tensor indices, Tensor x, bool sparse_grad=False, Tensor? offsets=None, "
            "bool padded_grad=False) -> Tensor out"
        ),
        check=_check_dot,
        check_content=check_content,
        cuda_check=_cuda_check,
        locals={"tokens": tokens_of},
        inputs={"indices": _bags_of_dots, "x": tensors.contiguous_rows},
        results=lambda values, indices: values.new_empty(indices.shape, dtype=sum_dtype(values.dtype)),
        backward=_dot_backward,
        gradients=("values", "x"),
        forward_mode=dot_tangent,
        autocast={"x": follow_table},
        batch={"indices": 0, "x": 0, "out": 0},
        folds=lambda offsets: offsets is None,
        shared="values",
    )
)


# --- product_key_topk -----------------------------------------------------------------------------------------------


def _empty_topk(query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (query.size(0), query.size(1), top_k)
    return query.new_empty(shape, dtype=sum_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


def _halves(tensor: Tensor, keys: Tensor) -> Tensor:
    return tensor.unflatten(2, (2, keys.size(3)))


def _topk_composed_on_cuda(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor] | None:
    fits = keys.size(3) <= MAX_HALF_DIM and top_k <= MAX_TOP_K
    return None if fits else composed_topk(_halves(query, keys), keys, top_k)


def composed_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same contract by torch's own ops, a chunk of tokens at a time: for head_dim above 512 or top_k above 128.

    ``query [T, H, 2, D / 2]``, ``keys [H, 2, n, D / 2]``.
    """
    num_tokens, num_heads, _, _ = query.shape
    num_keys = keys.size(2)
    dtype = sum_dtype(query.dtype)
    scores = query.new_empty((num_tokens, num_heads, top_k), dtype=dtype)
    indices = query.new_empty((num_tokens, num_heads, top_k), dtype=torch.int64)
    length = min(top_k, num_keys)
    ranks = torch.arange(length, device=query.device)
    # Only pairs of ranks that fewer than top_k other pairs dominate can be among the best.
    first, second = _pairs_of_ranks(length, top_k, query.device)
    bytes_a_token = num_heads * (2 * num_keys * 60 + len(first) * 32 + top_k * 120)
    chunk = max(COMPOSED_BYTES // max(bytes_a_token, 1), 1)
    score = _scorer_of_halves(keys)
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        halves = score(query[part])
        kept = _ranked(halves).sort(dim=-1, descending=True, stable=True).indices[..., ranks]
        best = halves.gather(-1, kept)
        pairs = kept[:, :, 0, first] * num_keys + kept[:, :, 1, second]
        sums = best[:, :, 0, first] + best[:, :, 1, second]
        is_number = best.isfinite()
        is_number = is_number[:, :, 0, first] & is_number[:, :, 1, second]
        # By index first: a stable sort by score then leaves ties to the lower one.
        by_index = pairs.argsort(dim=-1)
        ranking = torch.where(is_number, sums, -torch.inf)
        by_score = ranking.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
        order = by_index.gather(-1, by_score)
        # Sums of numbers that overflowed are numbers still.
        by_kind = is_number.gather(-1, order).to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
        numbers = pairs.gather(-1, order.gather(-1, by_kind[..., :top_k]))
        indices[part] = _among_infinite(halves, numbers, is_number.sum(-1, keepdim=True), top_k)
        keys_of_pairs = torch.stack((indices[part] // num_keys, indices[part] % num_keys), dim=2)
        scores[part] = halves.gather(-1, keys_of_pairs).sum(2)
    return scores, indices


def _among_infinite(halves: Tensor, numbers: Tensor, num_numbers: Tensor, top_k: int) -> Tensor:
    """The best pairs ``[T, H, top_k]``: those that rank as +inf, the best of two ``numbers``, those that rank as -inf.

    Of infinite sums the lower index comes first, of which ranks of halves say nothing.
    """
    is_minus = halves == -torch.inf
    is_plus = ~(halves.isfinite() | is_minus)
    every = torch.ones_like(is_minus[:, :, 1])
    plus, num_plus = _lowest_pairs(is_plus[:, :, 0], ~is_minus[:, :, 1], is_plus[:, :, 1], ~is_minus[:, :, 0], top_k)
    minus, _ = _lowest_pairs(is_minus[:, :, 0], every, is_minus[:, :, 1], every, top_k)
    place = torch.arange(top_k, device=halves.device)
    after_plus, after_numbers = place - num_plus, place - num_plus - num_numbers
    place = torch.where(
        after_plus < 0, place, torch.where(after_numbers < 0, top_k + after_plus, 2 * top_k + after_numbers)
    )
    return torch.cat((plus, numbers, minus), dim=-1).gather(-1, place)


def _lowest_pairs(
    is_special: Tensor, of_special: Tensor, of_others: Tensor, has_pairs: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` lowest pairs of a first key, special or not, with second keys that go with it, and how many are.

    All masks are ``[T, H, n]``. Where there are fewer, what stands in the last places means nothing.
    """
    num_keys = is_special.size(-1)
    ends_special, ends_others = of_special.cumsum(-1), of_others.cumsum(-1)
    counts = torch.where(is_special, ends_special[..., -1:], ends_others[..., -1:]) * has_pairs
    ends = counts.cumsum(-1)
    wanted = torch.arange(top_k, device=ends.device).expand(*ends.shape[:-1], top_k).contiguous()
    first = torch.searchsorted(ends, wanted, right=True).clamp_(max=num_keys - 1)
    number = wanted - (ends - counts).gather(-1, first) + 1
    second = torch.where(
        is_special.gather(-1, first),
        torch.searchsorted(ends_special, number),
        torch.searchsorted(ends_others, number),
    )
    return first * num_keys + second.clamp_(max=num_keys - 1), ends[..., -1:]


def _ranked(scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), torch.inf, scores)


def _pairs_of_ranks(length: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made on the device, of whose numbers the host knows how many there are: nothing is copied or waited for."""
    num_pairs = sum(min(top_k // (rank + 1), length) for rank in range(length))
    ranks = torch.arange(length, device=device)
    counts = (top_k // (ranks + 1)).clamp_(max=length)
    first = torch.repeat_interleave(ranks, counts, output_size=num_pairs)
    return first, torch.arange(num_pairs, device=device) - (counts.cumsum(0) - counts)[first]


def _scorer_of_halves(keys: Tensor) -> Callable[[Tensor], Tensor]:
    """``dot(query, keys)`` of every half by query, in the dtype of sums and its full precision.

    ``query [T, H, 2, D / 2]``, ``keys [H, 2, n, D / 2]``; ``[T, H, 2, n]``. Where torch may round float32 to TF32 (10
    bits behind the first), float32 is cut into three parts that this leaves as they are. 16-bit numbers are none the
    worse.
    """
    dtype = sum_dtype(keys.dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("thsd,hsnd->thsn", left, right)

    if keys.dtype != torch.float32 or not _is_tf32_allowed():
        wide_keys = keys.to(dtype)
        return lambda query: product(query.to(dtype), wide_keys)
    k0, k1, k2 = _tf32_parts(keys)

    def score(query: Tensor) -> Tensor:
        q0, q1, q2 = _tf32_parts(query)
        large = product(q0, k0)
        small = product(q2, k0) + product(q1, k1) + product(q0, k2)
        # Of an infinite number the other parts are 0, and 0 times infinity is none.
        return torch.where(large.isfinite(), small + product(q1, k0) + product(q0, k1) + large, large)

    return score


def _is_tf32_allowed() -> bool:
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by torch's newer switches alone
        return True


def _tf32_parts(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers of at most 11 bits each that add up to one of 24; what is not finite is in the first alone."""

    def cut(rest: Tensor) -> Tensor:
        return (rest.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    first = torch.where(tensor.isfinite(), cut(tensor), tensor)
    rest = torch.where(tensor.isfinite(), tensor - first, 0.0)
    second = cut(rest)
    return first, second, rest - second


def _bags_of_half_keys(keys: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of all heads and halves as one table of rows, and a token's chosen keys as a bag of it for each half.

    ``[H * 2 * n, D / 2]`` and ``[T * H * 2, top_k]``.
    """
    num_heads, _, num_keys, half_dim = keys.shape
    halves = torch.stack((indices.div(num_keys, rounding_mode="floor"), indices % num_keys), dim=2)
    first_rows = torch.arange(2 * num_heads, device=keys.device).view(num_heads, 2, 1) * num_keys
    return keys.reshape(-1, half_dim), (halves + first_rows).view(-1, indices.size(2))


def _topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, indices: Tensor, needs_grad_query: bool, needs_grad_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    table, rows = _bags_of_half_keys(keys, indices)
    weights = grad_scores.unsqueeze(2).expand(-1, -1, 2, -1).reshape(rows.shape)
    grad_query = grad_keys = None
    if needs_grad_query:
        grad_query = _ops.memory_lookup.default(table, rows, weights).view(query.shape)
    if needs_grad_keys:
        bags = query.reshape(rows.size(0), keys.size(3))
        grad_keys, _ = _ops.memory_backward.default(bags, table, rows, weights, False, "product_key_topk")
        grad_keys = grad_keys.view(keys.shape)
    return grad_query, grad_keys


def _topk_forward(
    query: Tensor, keys: Tensor, indices: Tensor, tangent_query: Tensor | None, tangent_keys: Tensor | None
) -> tuple[Tensor, None]:
    table, rows = _bags_of_half_keys(keys, indices)
    bags = query.reshape(rows.size(0), keys.size(3))
    tangent_table = None if tangent_keys is None else tangent_keys.reshape(table.shape)
    tangent_bags = None if tangent_query is None else tangent_query.reshape(bags.shape)
    of_halves = _sum_of_tangents(_ops.memory_dot.default, rows, (tangent_table, table), (bags, tangent_bags))
    return of_halves.view(*indices.shape[:2], 2, -1).sum(2), None


product_key_topk = register(
    Op(
        schema="product_key_topk(Tensor query, Tensor keys, SymInt top_k) -> (Tensor scores, Tensor indices)",
        check=_check_product_keys,
        cuda_check=lambda query: cuda.check_dtype("query", query),
        composed_on_cuda=_topk_composed_on_cuda,
        inputs={"query": _halves},
        results=_empty_topk,
        backward=_topk_backward,
        gradients=("query", "keys"),
        forward_mode=_topk_forward,
        autocast={"query": tensors.autocast, "keys": tensors.autocast},
        batch={"query": 0, "scores": 0, "indices": 0},
    )
)

"""Memory layers: product-key top-k, weighted sums of table rows, experts of one neuron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import checks, cuda, tensors
from .._common.library import AUTOCAST_KEYS
from . import _memory_ops, _memory_update
from ._bags import make_bags
from ._memory_ops import check_indices, check_table, check_token_rows, check_weights, follow_table

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda hidden: hidden,
}


def product_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best of ``n * n`` keys that are pairs of ``n`` and ``n`` (Memory Layers at Scale, arXiv 2412.09764,
    section 3; product keys, arXiv 1907.05242, section 3.2).

    The key of pair ``(i, j)`` scores ``dot(query[:D/2], keys[h, 0, i]) + dot(query[D/2:], keys[h, 1, j])``. All pairs
    are ranked, exactly, though few are looked at: a pair can only be among the best where fewer than ``top_k`` pairs of
    better halves stand above it.

    Args:
        query: ``[T, H, D]`` for T tokens and H heads; float32, bfloat16, float16, or float64 (CPU only). ``D`` is even.
            Any strides with a contiguous last dimension.
        keys: ``[H, 2, n, D / 2]`` of the same dtype, ``n`` from 1 to 46340: two sets of half keys for each head.
        top_k: keys per token and head, from 1 to ``n * n``.

    Returns:
        ``scores [T, H, top_k]``, float32 (float64 for float64), descending, differentiable with respect to query and
        keys; ``indices [T, H, top_k]`` int64, ``i * n + j``, distinct. Of equal scores the lower index comes first, as
        far as float32 tells them apart. A NaN half score ranks as +inf and a sum of opposite infinities as -inf.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride or device, or ``top_k`` out of range.

    On CUDA a fused kernel takes ``D`` up to 512 and ``top_k`` up to 128 and writes no scores but the result; beyond
    that torch's own ops do the same, a chunk of tokens at a time, and the last bits of a token's scores may depend on
    how many tokens there are.
    """
    checks.check_tensor("query", query)
    checks.check_tensor("keys", keys)
    checks.check_count("top_k", top_k)
    scores, indices = _memory_ops.product_key_topk(query, keys, top_k)
    return scores, indices


def memory_lookup(
    values: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    sparse_grad: bool | str = False,
    offsets: Tensor | None = None,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """Weighted sums of table rows, ``out_t = sum_k weights[t, k] * values[indices[t, k]]`` (Memory Layers at Scale,
    arXiv 2412.09764, section 3.2): a weighted embedding bag that differentiates both its table and its weights.

    It takes the bags of ``torch.nn.functional.embedding_bag``, whose ``per_sample_weights`` are ``weights`` here.

    Args:
        values: ``[rows, W]``, float32, bfloat16, float16, or float64 (CPU only); any width, any stride of rows.
        indices: ``[T, K]`` int64 or int32; ``[E]`` with ``offsets``. A row may stand several times in a bag.
        weights: of the shape of ``indices``, of the dtype of ``values`` or float32 (float64 for float64). Sums run in
            float32. None: ones.
        sparse_grad: whether ``values`` gets a sparse gradient, coalesced, over the touched rows alone, for
            ``torch.optim.SparseAdam`` or ``SGD``: the cost of a step then does not grow with the table. Otherwise a
            dense one. ``"padded"``: a sparse gradient of as many rows as there are entries, so that on CUDA nothing
            waits and a graph can be captured: the touched rows in order, then the last of them again with zeros (the
            first row of the table, if none is touched). It is not coalesced.
        offsets: ``[T]`` int64 or int32, for bags of different sizes: bag ``t`` has the entries from ``offsets[t]`` up
            to ``offsets[t + 1]``, the last one the rest. The first offset is 0, and none is below the one before it.
        mode: ``"sum"``, or ``"mean"``, which divides by the number of a bag's entries and takes no ``weights``.
        padding_idx: entries that name this row count neither in a sum nor in a mean, and the row gets no gradient;
            counted from the end of the table where negative. None: no such row.
        include_last_offset: whether ``offsets`` is ``[T + 1]``, with the end of the last bag. Entries past it are
            nobody's.

    Returns:
        ``[T, W]`` in the dtype of ``values``, differentiable with respect to ``values``, once, and ``weights``; zeros
        for a bag without entries. Results and gradients are the same bits every time, on every device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride or device, weights of a mean, a ``padding_idx`` that names no row, or wrong
            numbers in ``offsets``. On CUDA these are not waited for: bags between offsets that decrease or lead past
            the last entry are NaN.
        IndexError: an index below 0 or not below ``rows``. On CUDA what a tensor holds is not waited for: such an index
            is not followed and makes its token's row of the result NaN, and no row's gradient; set
            ``TOPGATHER_CHECK_INDICES=1`` to have it raised there too. A sparse gradient on CUDA waits once for the
            number of touched rows, a padded one does not.

    Under ``torch.autocast`` the table keeps its dtype: casting it whole would cost more than the lookup.
    """
    checks.check_tensor("values", values)
    checks.check_tensor("indices", indices)
    sparse_grad, padded_grad = _form_of_gradient(sparse_grad)
    if weights is not None:
        checks.check_tensor("weights", weights)
    if offsets is not None:
        checks.check_tensor("offsets", offsets)
    is_weighted = weights is not None and mode == "sum"
    if not (is_weighted and offsets is None and padding_idx is None and include_last_offset is False):
        bags = make_bags(values, indices, weights, offsets, mode, padding_idx, include_last_offset)
        indices, weights, offsets = bags
    if _memory_update.is_recording:
        if not torch.compiler.is_compiling():
            assert weights is not None
            return _memory_update.lookup(values, indices, weights, sparse_grad, offsets, padded_grad)
        sparse_grad = sparse_grad or _memory_update.is_marked(values)
    out: Tensor = _memory_ops.memory_lookup(values, indices, weights, sparse_grad, offsets, padded_grad)
    return out


def _form_of_gradient(sparse_grad: Any) -> tuple[bool, bool]:
    """Whether the gradient of a table is sparse, and whether it has as many rows as there are entries."""
    checks.check_sparse_grad(sparse_grad)
    return bool(sparse_grad), sparse_grad == "padded"


def expert_lookup(
    x: Tensor,
    values_in: Tensor,
    values_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    activation: str = "gelu",
    sparse_grad: bool | str = False,
) -> Tensor:
    """Experts of one hidden neuron, ``out_t = sum_k weights[t, k] * act(dot(x_t, values_in[i])) * values_out[i]`` with
    ``i`` = ``indices[t, k]`` (PEER, arXiv 2407.04153, section 2; the PEER variant of arXiv 2412.09764).

    Rows are read where they lie: nothing of the size ``[T, K, D]`` or ``[T, K, W]`` is made, only ``[T, K]`` numbers.

    Args:
        x: ``[T, D]``, float32, bfloat16, float16, or float64 (CPU only).
        values_in: ``[rows, D]`` of the same dtype: the weights into each expert's neuron.
        values_out: ``[rows, W]`` of the same dtype: the weights out of it.
        indices: ``[T, K]`` int64 or int32.
        weights: ``[T, K]``, of the tables' dtype or float32 (float64 for float64).
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.
        sparse_grad: whether both tables get sparse gradients, as in :func:`memory_lookup`.

    Returns:
        ``[T, W]`` in the tables' dtype, differentiable with respect to ``x``, ``weights``, and once to both tables.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or activation.
        IndexError: as in :func:`memory_lookup`.
    """
    for name, tensor in (("x", x), ("values_in", values_in), ("values_out", values_out)):
        checks.check_tensor(name, tensor)
    checks.check_tensor("indices", indices)
    checks.check_tensor("weights", weights)
    sparse_grad, padded_grad = _form_of_gradient(sparse_grad)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    device_type = x.device.type
    if device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type):
        x = follow_table(x, values_in, device_type)
        weights = tensors.autocast_to_sums(weights, values_out, device_type)
    _check_experts(x, values_in, values_out, indices, weights)
    look_up, dot = _memory_ops.memory_lookup, _memory_ops.memory_dot
    is_sparse_in = is_sparse_out = sparse_grad
    if _memory_update.is_recording:
        if torch.compiler.is_compiling():
            is_sparse_in = sparse_grad or _memory_update.is_marked(values_in)
            is_sparse_out = sparse_grad or _memory_update.is_marked(values_out)
        else:
            look_up, dot = _memory_update.lookup, _memory_update.dot
    hidden = dot(values_in, indices, x, is_sparse_in, None, padded_grad)
    gates = ACTIVATIONS[activation](hidden) * weights.to(hidden.dtype)
    out: Tensor = look_up(values_out, indices, gates, is_sparse_out, None, padded_grad)
    return out


def _check_experts(x: Tensor, values_in: Tensor, values_out: Tensor, indices: Tensor, weights: Tensor) -> None:
    check_table("values_in", values_in)
    if cuda.gets(values_in):
        cuda.check_dtype("values_in", values_in)
    check_table("values_out", values_out)
    checks.check_same_dtype("values_out", values_out, "values_in", values_in)
    checks.check_same_device("values_out", values_out, "values_in", values_in)
    checks.check_size("values_out", values_out, 0, values_in.size(0), "rows of values_in")
    check_indices(indices, values_in, "values_in")
    check_token_rows("x", x, indices, values_in, "values_in")
    check_weights(weights, indices, values_in, "values_in")

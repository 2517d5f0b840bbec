"""The trained indexer of block attention: a small branch that chooses each query's key blocks, and the loss for it.

Sources: MiniMax Sparse Attention, arXiv 2606.13392 (a block scores what the best of its keys does, the newest blocks
are always chosen, one choice a key head, the loss against the attention's own mass); DeepSeek-V3.2, arXiv 2512.02556,
section 2.1 (sums of ReLU, weights of index heads, dense warm-up and sparse stage). The plain definition in float64 is
:mod:`topgather.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import checks, cuda, tensors
from .._common.library import sum_dtype
from .._common.spec import Op, register
from . import _index_loss
from ._moba_ops import MAX_HEAD_DIM_ON_CUDA, num_slots, repeated_blocks
from .routing import BlockRouting

# In the order of csrc/indexer/indexer_params.h.
REDUCTIONS = ("max", "mean", "relu_sum")


def index_route(
    index_query: Tensor,
    index_key: Tensor,
    block_size: int = 128,
    top_k: int = 16,
    reduction: str = "max",
    is_causal: bool = True,
    force_first: int = 0,
    force_last: int = 1,
    num_choices: int | None = None,
    weights: Tensor | None = None,
) -> BlockRouting:
    """Choose each query's key blocks by an indexer's queries and keys (MiniMax Sparse Attention, arXiv 2606.13392).

    A block's score comes from the dot products of the index query with the index keys of the block that the query sees,
    in float32 (float64 for float64). Chosen are the forced blocks and the best of the others, exactly ``top_k`` in all
    where a query sees more. Equal scores go to the lower block number, a NaN score ranks as +inf. Scores are never
    written to memory, neither by key nor by block. No gradient flows through the choice: :func:`index_loss` trains the
    indexer.

    Args:
        index_query: ``[B, Hi, Nq, Di]``, float32, bfloat16, float16, or float64 (CPU only), contiguous in its last
            dimension. On CUDA ``Di`` is at most 256.
        index_key: ``[B, Hk, Nk, Di]`` of the same dtype; ``Hi`` a multiple of ``Hk``. MiniMax-M3 has one key head.
        block_size: keys per block, at least 1; the last block may be short.
        top_k: blocks per query, the forced ones included, at least 1.
        reduction: ``"max"`` (MiniMax-M3) or ``"mean"`` of the products, one choice an index head; or ``"relu_sum"``,
            the sum of their ReLU over keys and over the index heads of a choice, which with a ``block_size`` of 1 is
            DeepSeek's indexer (arXiv 2512.02556, equation 1).
        is_causal: whether query ``i``, at position ``i + Nk - Nq``, sees only keys up to its own position, of its own
            block too.
        force_first: how many of the first blocks are always chosen.
        force_last: how many of the newest blocks that a query sees are always chosen: its own and those just before
            it. With ``force_first`` at most ``top_k``. Without ``is_causal`` no block is the newest: 1 or 0, and
            nothing is forced.
        num_choices: choices per query, a divisor of ``Hi`` whose groups of index heads are neighbours; ``Hi`` if None,
            and always but for ``"relu_sum"``. As many as query heads, key heads or 1 are what attention takes.
        weights: ``[B, Hi, Nq]``, the dtype of index_query or float32 (float64 for float64): a factor on each index
            head's sum, for ``"relu_sum"`` alone.

    Returns:
        A :class:`BlockRouting` with ``block_indices`` int32 ``[B, num_choices, Nq, top_k]``, each row ascending and
        padded at its end with -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; more forced blocks than ``top_k``.
    """
    checks.check_tensor("index_query", index_query)
    checks.check_tensor("index_key", index_key)
    checks.check_count("block_size", block_size)
    checks.check_count("top_k", top_k)
    check_reduction(reduction)
    checks.check_flag("is_causal", is_causal)
    checks.check_count("force_first", force_first, least=0)
    force_last = checks.forced_last(force_last, is_causal)
    choices = _choices(num_choices, index_query)
    if weights is not None:
        checks.check_tensor("weights", weights)
    block_indices = index_route_op(
        index_query,
        index_key,
        block_size,
        top_k,
        reduction,
        is_causal,
        force_first,
        force_last,
        choices,
        weights,
    )
    return BlockRouting(block_indices, block_size)


def index_loss(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    routing: BlockRouting | None = None,
    block_size: int = 128,
    reduction: str = "max",
    is_causal: bool = True,
    scale: float | None = None,
    index_scale: float | None = None,
    num_choices: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL divergence from the attention's mass by block to the indexer's distribution (arXiv 2606.13392).

    The target of a query is what share each of its blocks has in the attention's weights, averaged over the query heads
    of the choice; the indexer's distribution is the softmax of its scores of the same blocks. With a ``routing`` these
    are the chosen blocks (the sparse stage), without one all that the query sees some key of (the dense warm-up, with
    the ``lse`` of dense attention). The target is made anew from ``lse`` in forward and backward: neither it nor any
    matrix of queries by keys is kept, and memory beside the arguments is bounded but for gradients.

    Args:
        index_query: ``[B, Hi, Nq, Di]``, as for :func:`index_route`.
        index_key: ``[B, Hk, Nk, Di]``.
        query: ``[B, Hq, Nq, D]``, as attention got it, in its own dtype; ``Hq`` a multiple of the choices.
        key: ``[B, Hkv, Nk, D]``.
        lse: ``[B, Hq, Nq]``, float32 (float64 for float64), as ``moba_attention(..., return_lse=True)`` returns it:
            over the same blocks as ``routing``, or dense.
        routing: the choices, ``block_indices [B, num_choices, Nq, k]``, in any order, no block twice in a row; None for
            the dense warm-up.
        block_size: keys per block, at least 1; that of ``routing``.
        reduction: as for :func:`index_route`.
        is_causal: as for :func:`index_route`.
        scale: factor on the attention's scores; ``D ** -0.5`` if None.
        index_scale: factor on the indexer's scores in its softmax; ``Di ** -0.5`` if None. It does not change the order
            of blocks, so :func:`index_route` has none.
        num_choices: as for :func:`index_route`; with a ``routing`` that of ``routing``, or None.
        weights: as for :func:`index_route`.

    Returns:
        A number in float32 (float64 for float64), the mean over batch, choices and queries; a query with a single block
        or none counts as 0. Differentiable with respect to index_query, index_key and weights, once; query, key and lse
        get no gradient. The same bits every time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride, device or option; ``routing`` that does not agree with the rest, or
            names a block twice for a query.
        IndexError: ``routing`` naming a block that does not exist. What ``routing`` holds is looked at on the CPU
            alone, elsewhere a slot of such a block counts as unused.

    Composed of torch's own ops on every device. On CUDA it waits for the device where there is a ``routing``.
    """
    for name, tensor in (
        ("index_query", index_query),
        ("index_key", index_key),
        ("query", query),
        ("key", key),
        ("lse", lse),
    ):
        checks.check_tensor(name, tensor)
    checks.check_count("block_size", block_size)
    check_reduction(reduction)
    checks.check_flag("is_causal", is_causal)
    checks.check_scale(scale)
    check_index_scale(index_scale)
    if weights is not None:
        checks.check_tensor("weights", weights)
    block_indices = None
    if routing is None:
        choices = _choices(num_choices, index_query)
    else:
        if not isinstance(routing, BlockRouting):
            raise TypeError(f"routing must be a topgather.BlockRouting or None, got {type(routing).__name__}")
        if routing.block_size != block_size:
            raise ValueError(f"block_size must be that of routing, {routing.block_size}, got {block_size}")
        block_indices = routing.block_indices
        checks.check_ndim("block_indices", block_indices, 4, "[batch, choices, queries, top_k]")
        choices = block_indices.size(1)
        if num_choices is not None:
            checks.check_count("num_choices", num_choices)
            if num_choices != choices:
                raise ValueError(f"num_choices must be that of routing, {choices}, or None, got {num_choices}")
    losses = index_loss_op(
        index_query,
        index_key,
        query,
        key,
        lse,
        block_indices,
        block_size,
        reduction,
        is_causal,
        float(max(query.size(-1), 1) ** -0.5 if scale is None else scale),
        float(max(index_query.size(-1), 1) ** -0.5 if index_scale is None else index_scale),
        choices,
        weights,
    )
    mean: Tensor = losses.sum() / max(losses.numel(), 1)
    return mean


def _choices(num_choices: int | None, index_query: Tensor) -> int:
    if num_choices is not None:
        checks.check_count("num_choices", num_choices)
        return num_choices
    checks.check_ndim("index_query", index_query, 4, "[batch, index heads, tokens, dim]")
    return index_query.size(1)


# --- the ops --------------------------------------------------------------------------------------------------------


@checks.option
def check_reduction(reduction: Any) -> None:
    """Raise unless it is the name of a reduction that kernels have."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a str, got {reduction!r} of type {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


@checks.option
def check_index_scale(value: Any) -> None:
    """Raise unless ``value`` is None or a finite number."""
    checks.check_finite("index_scale", value)


@checks.option
def check_num_choices(num_choices: Any) -> None:
    """Raise unless it is a count."""
    checks.check_count("num_choices", num_choices)


def _check_index(
    index_query: Tensor, index_key: Tensor, reduction: str, num_choices: int, weights: Tensor | None
) -> None:
    """What every op of the indexer asks of its queries and keys."""
    operands = [("index_query", index_query), ("index_key", index_key)]
    checks.check_operands(operands, 4, "[batch, index heads, tokens, dim]")
    checks.check_size("index_key", index_key, 0, index_query.size(0), "batch size of index_query")
    checks.check_size("index_key", index_key, 3, index_query.size(3), "dim of index_query")
    if index_query.size(3) < 1:
        raise ValueError(f"index_query must have a last dimension of at least 1, got shape {tuple(index_query.shape)}")
    num_heads = index_query.size(1)
    checks.check_heads("index_query", num_heads, "index_key", index_key.size(1))
    if num_heads % num_choices != 0:
        raise ValueError(f"num_choices must divide the heads of index_query, {num_heads}, got {num_choices}")
    if reduction != "relu_sum" and num_choices != num_heads:
        raise ValueError(
            f"num_choices must be the heads of index_query, {num_heads}, for reduction={reduction!r}, got {num_choices}"
        )
    if weights is None:
        return
    if reduction != "relu_sum":
        raise ValueError(f"weights must be None for reduction={reduction!r}")
    checks.check_ndim("weights", weights, 3, "[batch, index heads, queries]")
    checks.check_sum_operand("weights", weights, "index_query", index_query)
    if tuple(weights.shape) != tuple(index_query.shape[:3]):
        raise ValueError(f"weights must have shape {list(index_query.shape[:3])}, got {tuple(weights.shape)}")


def _check_route(
    index_query: Tensor,
    index_key: Tensor,
    block_size: int,
    top_k: int,
    reduction: str,
    force_first: int,
    force_last: int,
    num_choices: int,
    weights: Tensor | None,
) -> None:
    _check_index(index_query, index_key, reduction, num_choices, weights)
    if force_first + force_last > top_k:
        raise ValueError(
            f"force_first and force_last must together be at most top_k, {top_k}, got {force_first} and {force_last}"
        )
    leading = (index_query.size(0), num_choices, index_query.size(2))
    checks.check_slots(top_k, leading, num_slots(None, index_key.size(2), block_size))


def _check_loss(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_indices: Tensor | None,
    reduction: str,
    num_choices: int,
    weights: Tensor | None,
) -> None:
    _check_index(index_query, index_key, reduction, num_choices, weights)
    checks.check_operands([("query", query), ("key", key)], 4, "[batch, heads, tokens, dim]")
    checks.check_same_device("query", query, "index_query", index_query)
    checks.check_size("query", query, 0, index_query.size(0), "batch size of index_query")
    checks.check_size("query", query, 2, index_query.size(2), "tokens of index_query")
    checks.check_size("key", key, 0, query.size(0), "batch size of query")
    checks.check_size("key", key, 2, index_key.size(2), "tokens of index_key")
    checks.check_size("key", key, 3, query.size(3), "head_dim of query")
    if query.size(3) < 1:
        raise ValueError(f"query must have a head_dim of at least 1, got shape {tuple(query.shape)}")
    checks.check_heads("query", query.size(1), "key", key.size(1))
    checks.check_per_query("lse", lse, query.shape[:3], query)
    if sum_dtype(query.dtype) != sum_dtype(index_query.dtype):
        raise TypeError(
            f"query must be float64 exactly where index_query is, got {query.dtype} and {index_query.dtype}"
        )
    if query.size(1) % num_choices != 0:
        raise ValueError(f"query must have a multiple of num_choices heads, {num_choices}, got {query.size(1)}")
    if block_indices is None:
        return
    checks.check_dtype("block_indices", block_indices, torch.int32)
    checks.check_same_device("block_indices", block_indices, "query", query)
    checks.check_ndim("block_indices", block_indices, 4, "[batch, choices, queries, top_k]")
    expected = (query.size(0), num_choices, query.size(2))
    if tuple(block_indices.shape[:3]) != expected or block_indices.size(3) < 1:
        raise ValueError(
            f"block_indices must have shape [{', '.join(map(str, expected))}, top_k], got {tuple(block_indices.shape)}"
        )


def _check_loss_backward(
    grad_losses: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_indices: Tensor | None,
    reduction: str,
    num_choices: int,
    weights: Tensor | None,
) -> None:
    _check_loss(index_query, index_key, query, key, lse, block_indices, reduction, num_choices, weights)
    shape = (query.size(0), num_choices, query.size(2))
    checks.check_per_query("grad_losses", grad_losses, shape, index_query)


def _check_loss_content(key: Tensor, block_indices: Tensor | None, block_size: int) -> None:
    if block_indices is None or block_indices.numel() == 0:
        return
    least, most = (int(number) for number in torch.aminmax(block_indices))
    num_blocks = -(-key.size(2) // block_size)
    if least < -1 or most >= num_blocks:
        wrong = least if least < -1 else most
        raise IndexError(
            f"block_indices holds {wrong}; allowed are -1 and the numbers of the {num_blocks} key blocks, from 0 on"
        )
    repeated = repeated_blocks(block_indices)
    if repeated.numel() > 0:
        raise ValueError(f"block_indices names block {int(repeated[0])} twice for a query")


def _cuda_check(index_query: Tensor) -> None:
    cuda.check_dtype("index_query", index_query)
    if index_query.size(-1) > MAX_HEAD_DIM_ON_CUDA:
        raise ValueError(
            f"index_query must have a last dimension of at most {MAX_HEAD_DIM_ON_CUDA} on CUDA, "
            f"got {index_query.size(-1)}"
        )


def _weights_as_sums(tensor: Tensor, index_query: Tensor) -> Tensor:
    return tensors.sums_like(tensor, index_query)


def _weights_follow(tensor: Tensor, index_query: Tensor, device_type: str) -> Tensor:
    return tensors.autocast_to_sums(tensor, index_query, device_type)


def _loss_results(query: Tensor, num_choices: int) -> Tensor:
    return tensors.empty(query, (query.size(0), num_choices, query.size(2)), sum_dtype(query.dtype))


def _gradient_results(index_query: Tensor, index_key: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    shape = (0,) if weights is None else weights.shape
    like_rows = (tensors.empty_like_rows(tensor, tensor.size(-1)) for tensor in (index_query, index_key))
    return (*like_rows, index_query.new_empty(shape, dtype=sum_dtype(index_query.dtype)))


_LOSS = (
    "Tensor index_query, Tensor index_key, Tensor query, Tensor key, Tensor lse, Tensor? block_indices, "
    "SymInt block_size, str reduction, bool is_causal, float scale, float index_scale, SymInt num_choices, "
    "Tensor? weights=None"
)
_LOSS_BATCH = dict.fromkeys(
    ("index_query", "index_key", "query", "key", "lse", "block_indices", "weights", "losses", "grad_losses"), 0
)

index_route_op = register(
    Op(
        # No backward: the choice of blocks has no gradient.
        schema="index_route(Tensor index_query, Tensor index_key, SymInt block_size, SymInt top_k, str reduction, "
        "bool is_causal, SymInt force_first, SymInt force_last, SymInt num_choices, Tensor? weights=None) "
        "-> Tensor block_indices",
        check=_check_route,
        cuda_check=_cuda_check,
        locals={"reduction_code": lambda reduction: REDUCTIONS.index(reduction)},
        inputs={"weights": _weights_as_sums},
        results=lambda index_query, num_choices, top_k: tensors.empty(
            index_query, (index_query.size(0), num_choices, index_query.size(2), top_k), torch.int32
        ),
        autocast={
            "index_query": tensors.autocast,
            "index_key": tensors.autocast,
            "weights": _weights_follow,
        },
        batch={"index_query": 0, "index_key": 0, "weights": 0, "block_indices": 0},
    )
)
register(
    Op(
        schema=f"index_loss_backward(Tensor grad_losses, {_LOSS}) "
        "-> (Tensor grad_index_query, Tensor grad_index_key, Tensor grad_weights)",
        check=_check_loss_backward,
        check_content=_check_loss_content,
        cuda_check=_cuda_check,
        results=_gradient_results,
        locals={"problem": _index_loss.Problem},
        composed=_index_loss.gradients,
        derivative_of="index_loss",
        batch=_LOSS_BATCH | {"grad_index_query": 0, "grad_index_key": 0},
    )
)
index_loss_op = register(
    Op(
        schema=f"index_loss({_LOSS}) -> Tensor losses",
        check=_check_loss,
        check_content=_check_loss_content,
        cuda_check=_cuda_check,
        results=_loss_results,
        locals={"problem": _index_loss.Problem},
        composed=_index_loss.losses,
        backward="index_loss_backward",
        gradients=("index_query", "index_key", "weights"),
        autocast={
            **dict.fromkeys(("index_query", "index_key", "query", "key"), tensors.autocast),
            "weights": _weights_follow,
        },
        batch=_LOSS_BATCH,
    )
)

"""Argument checks shared by every op.

Each raises an error that names the argument, says what it was and what is allowed. They look at types, shapes, strides
and devices only, never at values, so they run under fake tensors and while compiling as well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .library import sum_dtype

# Checks of options, by argument: an op that has such an argument checks it (:mod:`topgather._common.spec`).
OPTIONS: dict[str, Callable[[Any], None]] = {}


def option(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """``check_<argument>`` holds of the argument in every op."""
    OPTIONS[check.__name__.removeprefix("check_")] = check
    return check


FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# From here on a choice's padding is looked at.
MAX_PADDED_SLOTS = 2**12


def check_tensor(name: str, value: Any) -> Tensor:
    """Raise ``TypeError`` unless ``value`` is a tensor, and ``ValueError`` unless it is a strided one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor: pack its sequences one behind the other" if value.is_nested else value.layout
        raise ValueError(f"{name} must have layout torch.strided, got {kind}")
    return value


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is an int (not a bool) of at least ``least`` that fits 31 bits."""
    if type(value) is int and least <= value < 2**31:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least or value > 2**31 - 1:
        raise ValueError(f"{name} must be between {least} and 2**31 - 1, got {value}")


OPTIONS |= {
    name: partial(check_count, name) for name in ("block_size", "page_size", "top_k", "rows_step", "columns_step")
}
OPTIONS |= {
    name: partial(check_count, name, least=0)
    for name in ("max_seqlen", "max_seqlen_q", "max_seqlen_k", "force_first", "force_last")
}


def check_heads(name: str, num_heads: int, other_name: str, num_kv_heads: int) -> None:
    """Raise unless query heads share key heads evenly."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"{name} must have a multiple of {other_name}'s heads, at least one, got {num_heads} heads and "
            f"{num_kv_heads} key heads"
        )


def check_slots(top_k: int, leading: Sequence[int], num_blocks: int) -> None:
    """Raise where padding, for a ``top_k`` above the number of blocks, makes a choice of more than 31 bits' numbers."""
    if top_k > MAX_PADDED_SLOTS and top_k > num_blocks and top_k * math.prod(leading) > 2**31 - 1:
        raise ValueError(
            f"top_k must be at most {num_blocks}, the number of blocks, for so many queries: block_indices "
            f"{[*leading, top_k]} would be padding for the most part, got {top_k}"
        )


def forced_last(force_last: Any, is_causal: bool) -> int:
    """How many of the newest blocks are forced; raises where ``force_last`` is no such number."""
    check_count("force_last", force_last, least=0)
    if not is_causal and force_last > 1:
        raise ValueError(
            f"force_last must be 1, or 0, without is_causal, where no block is the newest, got {force_last}"
        )
    number: int = force_last if is_causal else 0
    return number


def check_forced(force_first: int, force_last: int, top_k: int | None, is_causal: bool = True) -> None:
    """Raise unless so many blocks can stand in every choice; a ``top_k`` of None is all of them."""
    check_count("force_first", force_first, least=0)
    num_last = forced_last(force_last, is_causal)
    if is_causal and num_last < 1:
        raise ValueError("force_last must be at least 1 with is_causal, where a query's own block is always chosen")
    num_forced = force_first + num_last
    if top_k is not None and num_forced > 1 and num_forced > top_k:
        raise ValueError(
            f"top_k must be at least what force_first and force_last make together, {num_forced}, got {top_k}"
        )


def check_padded_blocks(max_seqlen: int, num_sequences: int, key: Tensor, block_size: int) -> None:
    """Raise where a ``max_seqlen`` beyond the packed tokens makes centroids of more than 31 bits' numbers."""
    num_tokens, num_heads, head_dim = key.shape
    if max_seqlen > MAX_PADDED_SLOTS and max_seqlen > num_tokens:
        shape = [num_sequences, num_heads, -(-max_seqlen // block_size), head_dim]
        if math.prod(shape) > 2**31 - 1:
            raise ValueError(
                f"max_seqlen must be at most {num_tokens}, the number of tokens, for so many numbers: centroids "
                f"{shape} would be padding for the most part, got {max_seqlen}"
            )


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """Raise unless ``value`` is an int or a pair of ints, each at least 1; returns the pair."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    for side in pair:
        check_count(name, side)
    rows, columns = pair
    return rows, columns


def check_flag(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def check_sparse_grad(value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` names a form of a table's gradient."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "padded"):
        raise TypeError(f"sparse_grad must be a bool or 'padded', got {value!r} of type {type(value).__name__}")


def _is_traced(value: Any) -> bool:
    """Whether ``value`` is a float of a graph being traced.

    To compare it would trace the graph twice, and other functions would break it. The op compares it whenever the graph
    runs.
    """
    return isinstance(value, torch.SymFloat) or (is_compiling() and isinstance(value, float))


def _check_number(name: str, value: Any, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise unless ``value`` is None or an allowed number. Ints may be beyond what floats hold."""
    if value is None or _is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or None, got {value!r} of type {type(value).__name__}")
    if not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_finite(name: str, value: Any) -> None:
    """Raise unless ``value`` is None or a finite number."""
    _check_number(name, value, lambda number: abs(number) <= sys.float_info.max, "finite")


@option
def check_scale(value: Any) -> None:
    """Raise unless ``value`` is None or a finite number."""
    check_finite("scale", value)


@option
def check_softcap(value: Any) -> None:
    """Raise unless ``value`` is None or a finite number above 0."""
    _check_number("softcap", value, lambda cap: 0 < cap <= torch.finfo(torch.float32).max, "positive and finite")


@option
def check_sinks(value: Any) -> None:
    """Raise unless ``value`` is None or a tensor."""
    if value is not None:
        check_tensor("sinks", value)


@option
def check_window(value: Any) -> None:
    """Raise unless ``value`` is None or an int of at least 1."""
    if value is not None:
        check_count("window", value)


def check_logit_per_head(sinks: Tensor, num_query_heads: int, query: Tensor) -> None:
    """Raise unless ``sinks`` has one logit per query head."""
    check_sum_operand("sinks", sinks, "query", query)
    if tuple(sinks.shape) != (num_query_heads,):
        raise ValueError(f"sinks must have shape [{num_query_heads}] (query heads), got {tuple(sinks.shape)}")


def check_per_query(name: str, tensor: Tensor, shape: Sequence[int], query: Tensor) -> None:
    """Raise unless ``tensor``, numbers of a softmax's rows, has this shape, the dtype of sums and query's device."""
    check_dtype(name, tensor, sum_dtype(query.dtype))
    check_same_device(name, tensor, "query", query)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(tensor.shape)}")


def check_choices(block_indices: Tensor, per_query: Sequence[int], num_kv_heads: int) -> None:
    """Raise unless ``block_indices`` has choices for ``per_query``, ``[.., query heads, queries]``.

    In place of query heads it may have key heads, whose groups share a choice, or a single one.
    """
    shape = block_indices.shape
    *leading, num_heads, num_queries = per_query
    wrong = len(shape) != len(per_query) + 1 or list(shape[: len(leading)]) != leading or shape[-2] != num_queries
    if wrong or shape[-3] not in (num_heads, num_kv_heads, 1):
        expected = ", ".join(str(size) for size in (*leading, "heads", num_queries, "top_k"))
        raise ValueError(
            f"block_indices must have shape [{expected}] with heads those of query "
            f"({num_heads}), those of key ({num_kv_heads}) or 1, got {tuple(shape)}"
        )
    if shape[-1] < 1:
        raise ValueError("block_indices must have at least one slot per query, got a last dimension of 0")


def is_other_shape(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes differ, as far as it is known: in a graph of any size an op's own call tells the rest.

    Asking would pin the sizes of an exported graph to those that it was traced with.
    """
    if len(shape) != len(expected):
        return True
    for size, wanted in zip(shape, expected, strict=True):
        if isinstance(size, torch.SymInt) or isinstance(wanted, torch.SymInt):
            if statically_known_true(size != wanted):
                return True
        elif size != wanted:
            return True
    return False


def check_ndim(name: str, tensor: Tensor, ndim: int, layout: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``ndim`` dimensions."""
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {layout}, got shape {tuple(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` for a dtype no kernel takes."""
    if tensor.dtype not in FLOATING_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOATING_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ``TypeError`` for a dtype that is not among these."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``TypeError`` where two tensors that are computed with together differ in dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` where two tensors live on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_contiguous_rows(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` unless the last dimension is contiguous."""
    if tensor.size(-1) > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension, got strides {tuple(tensor.stride())}; "
            f"call .contiguous() on it"
        )


def check_operands(named: Sequence[tuple[str, Tensor]], ndim: int, layout: str) -> None:
    """Raise unless tensors have ``ndim`` dimensions, contiguous rows, and the first one's floating dtype and device."""
    first_name, first = named[0]
    dtype, device = first.dtype, first.device
    for name, tensor in named:
        # Asked here, so that a call that is right costs no more calls.
        if tensor.dim() != ndim:
            check_ndim(name, tensor, ndim, layout)
        if tensor.dtype not in FLOATING_DTYPES:
            check_floating(name, tensor)
        if tensor.dtype != dtype:
            check_same_dtype(name, tensor, first_name, first)
        if tensor.device != device:
            check_same_device(name, tensor, first_name, first)
        if tensor.stride(-1) != 1:
            check_contiguous_rows(name, tensor)


def check_sum_operand(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``tensor`` has the dtype of ``like`` or that of its sums, on its device."""
    allowed = dict.fromkeys((like.dtype, sum_dtype(like.dtype)))
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name} must have the dtype of {like_name} or that of its sums, {names}, got {tensor.dtype}")
    check_same_device(name, tensor, like_name, like)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``cu_seqlens`` can delimit sequences of ``other``, but for what it holds."""
    check_dtype(name, cu_seqlens, torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or cu_seqlens.size(0) < 1:
        raise ValueError(f"{name} must have shape [num_sequences + 1], got {tuple(cu_seqlens.shape)}")
    check_same_device(name, cu_seqlens, other_name, other)


def check_boundaries(
    name: str, cu_seqlens: Tensor, total: int, total_name: str, max_name: str, max_seqlen: int
) -> None:
    """Raise unless ``cu_seqlens`` delimits ``total`` tokens. Reads what the tensor holds."""
    boundaries = cu_seqlens.to(torch.int64)
    if boundaries[0].item() != 0:
        raise ValueError(f"{name} must start with 0, got {boundaries[0].item()}")
    lengths = boundaries.diff()
    longest = 0
    if lengths.numel() > 0:
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0:
            raise ValueError(f"{name} must not decrease, got a sequence of length {shortest}")
    if boundaries[-1].item() != total:
        raise ValueError(
            f"{name} must end with the number of tokens of {total_name}, {total}, got {boundaries[-1].item()}"
        )
    if longest > max_seqlen:
        raise ValueError(f"{max_name} must be at least the longest sequence, {longest}, got {max_seqlen}")


def check_size(name: str, tensor: Tensor, dim: int, expected: Any, meaning: str) -> None:
    """Raise ``ValueError`` unless dimension ``dim`` of ``tensor`` is ``expected``."""
    if not -tensor.ndim <= dim < tensor.ndim or tensor.size(dim) != expected:
        raise ValueError(
            f"{name} must have size {expected} in dimension {dim} ({meaning}), got shape {tuple(tensor.shape)}"
        )

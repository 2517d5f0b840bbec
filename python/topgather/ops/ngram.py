"""Rows of n-gram tables: the last tokens, hashed. Integer arithmetic by torch's own ops, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from .._common import checks

MAX_ORDER = 64
MAX_VOCAB = 2**31
NO_TOKEN = -1
"""Stands for the tokens before a document's first, where no token ends documents."""
STATE_OF_PACKED = "state must be None where cu_seqlens is given: packed documents start from nothing"
MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


@lru_cache(maxsize=64)
def _primes_from(rows: int, num_primes: int, skip: int) -> tuple[int, ...]:
    found: list[int] = []
    candidate = max(rows, 2)
    while len(found) < skip + num_primes:
        if candidate == 2 or (candidate % 2 and all(candidate % d for d in range(3, int(candidate**0.5) + 1, 2))):
            found.append(candidate)
        candidate += 1
    return tuple(found[skip:])


@torch.compiler.assume_constant_result
def ngram_table_rows(rows: int, num_tables: int, skip: int = 0) -> tuple[int, ...]:
    """How many rows each of some hashed tables has: the primes from ``rows`` on, each once.

    Different numbers of rows make tables that collide differently, and primes use all bits of a hash.

    Args:
        rows: no table has fewer, at least 1.
        num_tables: how many there are, of all orders together.
        skip: how many primes are passed over, those of other layers' tables.

    Returns:
        ``num_tables`` ints, ascending.

    Raises:
        TypeError: an argument that is no int.
        ValueError: one out of range.
    """
    checks.check_count("rows", rows)
    checks.check_count("num_tables", num_tables)
    checks.check_count("skip", skip, least=0)
    return _primes_from(rows, num_tables, skip)


@lru_cache(maxsize=64)
def _multipliers(order: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    half_bound = max(1, (2**63 - 1) // vocab_size // 2)
    multipliers = []
    for shift in range(order):
        value = (seed + GAMMA * (shift + 2)) & MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        multipliers.append(2 * ((value ^ (value >> 31)) % half_bound) + 1)
    return tuple(multipliers)


@torch.compiler.assume_constant_result
def ngram_multipliers(order: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """An odd number for the current token and each of the ``order - 1`` before it, of SplitMix64.

    Times a token of ``vocab_size`` it is below 2^63. A compiler takes it for the constant that it is.
    """
    return _multipliers(order, vocab_size, seed)


@overload
def ngram_hash(
    tokens: Tensor,
    orders: Sequence[int] = (2, 3),
    *,
    num_tables: int,
    rows: int | Sequence[int],
    cu_seqlens: Tensor | None = None,
    state: None = None,
    vocab_size: int = MAX_VOCAB,
    end_token: int | None = None,
    seed: int = 0,
) -> Tensor: ...


@overload
def ngram_hash(
    tokens: Tensor,
    orders: Sequence[int] = (2, 3),
    *,
    num_tables: int,
    rows: int | Sequence[int],
    cu_seqlens: None = None,
    state: Tensor,
    vocab_size: int = MAX_VOCAB,
    end_token: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]: ...


def ngram_hash(
    tokens: Tensor,
    orders: Sequence[int] = (2, 3),
    *,
    num_tables: int,
    rows: int | Sequence[int],
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    vocab_size: int = MAX_VOCAB,
    end_token: int | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Hash the n-grams that end at each token to rows of tables (Engram, arXiv 2601.07372).

    For each order ``n``, ``h = t_0 * m_0 ^ t_1 * m_1 ^ ... ^ t_(n-1) * m_(n-1)``, where ``t_s`` is the token ``s``
    places before, the ``m_s`` are odd numbers that ``seed`` and ``vocab_size`` give, and ``^`` is exclusive or. Each of
    the order's ``num_tables`` tables takes ``h`` modulo its number of rows. All tables lie one after the other in one
    table, the first order's first, and indices are rows of that.

    Tokens before a document's first stand as ``end_token``, or as -1 where that is None. A document ends with a token
    that is ``end_token``, and where ``cu_seqlens`` says so.

    Args:
        tokens: ``[B, N]``, or packed ``[total]`` with ``cu_seqlens``; int64 or int32, from 0 to ``vocab_size - 1``.
            Others are hashed too, to rows that are there.
        orders: lengths of n-grams, from 1 to 64, ascending.
        num_tables: of each order.
        rows: of each of the ``len(orders) * num_tables`` tables. One int: they have :func:`ngram_table_rows` of it.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where packed documents start and end. None: ``tokens`` is
            dense, with a document, or several by ``end_token``, in each of its rows.
        state: int64 ``[B, max(orders) - 1]``, the tokens just before this call, of dense ones alone. The result of a
            document then does not depend on how it is cut into calls. Start with ``end_token``, or with -1 where that
            is None. None: there are no tokens before.
        vocab_size: of the tokens, from 1 to 2**31; the numbers ``m_s`` are the larger the smaller it is.
        end_token: the token that ends documents. None: no token does.
        seed: of the numbers ``m_s``. Layers with tables of their own take different ones.

    Returns:
        ``[B, N, len(orders) * num_tables]`` int64, or ``[total, ...]`` packed; with ``state`` the pair of that and the
        next call's state.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, a number out of range, or ``state`` beside ``cu_seqlens``; on the CPU ``cu_seqlens``
            that do not start with 0, decrease or do not end with the number of tokens.
    """
    sizes = check_tables(orders, num_tables, rows)
    check_tokens(tokens, cu_seqlens)
    checks.check_count("seed", seed, least=0)
    check_vocabulary(vocab_size, end_token)
    if state is not None and cu_seqlens is not None:
        raise ValueError(STATE_OF_PACKED)
    place = None if cu_seqlens is None else place_in_document(tokens.size(0), cu_seqlens)
    indices, next_state = hash_ngrams(tokens, orders, sizes, place, state, vocab_size, end_token, seed)
    return indices if next_state is None else (indices, next_state)


def hash_ngrams(
    tokens: Tensor,
    orders: Sequence[int],
    sizes: Sequence[int],
    place: Tensor | None,
    state: Tensor | None,
    vocab_size: int,
    end_token: int | None,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """:func:`ngram_hash` of what is checked but for ``state``; ``place`` is that of packed tokens in their documents.

    The next call's state is None where ``state`` is.
    """
    longest = orders[-1]
    absent = NO_TOKEN if end_token is None else end_token
    tokens = tokens.to(torch.int64)
    if place is None:
        if state is None:
            before = tokens.new_full((tokens.size(0), longest - 1), absent)
        else:
            _check_state(state, tokens, longest)
            before = state
        history = torch.cat([before, tokens], dim=1)

    multipliers = ngram_multipliers(longest, vocab_size, seed)
    shifted, mixed = tokens, tokens * multipliers[0]
    num_tables = len(sizes) // len(orders)
    found: list[Tensor] = []
    for shift in range(longest):
        if shift > 0:
            if place is None:
                at_shift = history.narrow(1, longest - 1 - shift, tokens.size(1))
            else:
                at_shift = torch.where(place >= shift, tokens.roll(shift, 0), absent)
            # What is before a document's end is before all that comes earlier.
            shifted = at_shift if shift == 1 else torch.where(shifted == absent, absent, at_shift)
            mixed = mixed ^ (shifted * multipliers[shift])
        if shift + 1 in orders:
            first = len(found)
            found += [mixed.remainder(sizes[first + table]) for table in range(num_tables)]
    offsets = [sum(sizes[:table]) for table in range(len(sizes))]
    indices = torch.stack([part + offset for part, offset in zip(found, offsets, strict=True)], dim=-1)
    return indices, None if state is None else history.narrow(1, tokens.size(1), longest - 1).clone()


def place_in_document(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """``[total]``: how many tokens of its document stand before each token."""
    tokens, starts = torch.arange(num_tokens, device=cu_seqlens.device), cu_seqlens.to(torch.int64)
    return tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]


# --- checks ---------------------------------------------------------------------------------------------------------


def check_tables(orders: Any, num_tables: Any, rows: Any) -> tuple[int, ...]:
    """The number of rows of each table, checked."""
    if isinstance(orders, (str, Tensor)) or not isinstance(orders, Sequence):
        raise TypeError(f"orders must be a sequence of ints, got {type(orders).__name__}")
    for order in orders:
        checks.check_count("orders", order)
    if len(orders) == 0 or list(orders) != sorted(set(orders)) or orders[-1] > MAX_ORDER:
        raise ValueError(f"orders must be ascending ints from 1 to {MAX_ORDER}, got {tuple(orders)}")
    checks.check_count("num_tables", num_tables)
    count = len(orders) * num_tables
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        checks.check_count("rows", rows)
        return ngram_table_rows(rows, count)
    for size in rows:
        checks.check_count("rows", size)
    if len(rows) != count:
        raise ValueError(f"rows must be an int, or one for each of {count} tables, got {len(rows)}")
    return tuple(rows)


def check_tokens(tokens: Any, cu_seqlens: Any) -> None:
    """Raise unless ``tokens`` and ``cu_seqlens`` are tokens of documents."""
    checks.check_tensor("tokens", tokens)
    checks.check_dtype("tokens", tokens, torch.int64, torch.int32)
    if cu_seqlens is None:
        checks.check_ndim("tokens", tokens, 2, "[batch, tokens]")
        return
    checks.check_tensor("cu_seqlens", cu_seqlens)
    checks.check_ndim("tokens", tokens, 1, "[total_tokens]")
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, "tokens", tokens)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        total = tokens.size(0)
        checks.check_boundaries("cu_seqlens", cu_seqlens, total, "tokens", "max_seqlen", total)


def _check_state(state: Any, tokens: Tensor, longest: int) -> None:
    checks.check_tensor("state", state)
    checks.check_dtype("state", state, torch.int64)
    checks.check_same_device("state", state, "tokens", tokens)
    expected = [tokens.size(0), longest - 1]
    if tuple(state.shape) != tuple(expected):
        raise ValueError(f"state must have shape {expected} [batch, max(orders) - 1], got {tuple(state.shape)}")


def check_vocabulary(vocab_size: Any, end_token: Any) -> None:
    """Raise unless ``vocab_size`` is how many tokens there may be, and ``end_token`` one of them or None."""
    if vocab_size != MAX_VOCAB or not isinstance(vocab_size, int):
        checks.check_count("vocab_size", vocab_size)
    if end_token is not None:
        checks.check_count("end_token", end_token, least=0)
        if end_token >= vocab_size:
            raise ValueError(f"end_token must be below vocab_size, {vocab_size}, got {end_token}")

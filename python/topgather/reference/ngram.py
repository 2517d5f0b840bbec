"""Hashed n-grams in plain Python ints.

Source: Engram, arXiv 2601.07372; the numbers and the order of tables are those of ``qwen4_exp`` in transformers.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["ngram_hash"]


def ngram_hash(
    tokens: Tensor,
    orders: Sequence[int] = (2, 3),
    *,
    num_tables: int,
    rows: int | Sequence[int],
    cu_seqlens: Tensor | None = None,
    vocab_size: int = 2**31,
    end_token: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows that the n-grams ending at each token have in tables that lie one after the other.

    Args:
        tokens: ``[B, N]``, or packed ``[total]`` with ``cu_seqlens``.
        orders: lengths of n-grams.
        num_tables: of each order.
        rows: of each table; an int stands for the primes from it on.
        cu_seqlens: ``[num_sequences + 1]``, boundaries of packed documents.
        vocab_size: of the tokens.
        end_token: the token that ends documents, or None.
        seed: of the multipliers.

    Returns:
        ``[B, N, len(orders) * num_tables]``, or ``[total, ...]``, int64.
    """
    sizes = _primes(rows, len(orders) * num_tables) if isinstance(rows, int) else list(rows)
    multipliers = [_multiplier(seed, shift, vocab_size) for shift in range(max(orders))]
    if cu_seqlens is not None:
        documents = [tokens[first:last].tolist() for first, last in pairwise(cu_seqlens.tolist())]
    else:
        documents = tokens.tolist()
    found = []
    for document in documents:
        for place in range(len(document)):
            row, offset, table = [], 0, 0
            for order in orders:
                value = 0
                for shift, token in enumerate(_last_tokens(document, place, order, end_token)):
                    value ^= token * multipliers[shift]
                for _ in range(num_tables):
                    row.append(offset + value % sizes[table])
                    offset, table = offset + sizes[table], table + 1
            found.append(row)
    shape = (*tokens.shape, len(orders) * num_tables)
    return torch.tensor(found, dtype=torch.int64, device=tokens.device).reshape(shape)


def _last_tokens(document: list[int], place: int, order: int, end_token: int | None) -> list[int]:
    """The token at ``place`` and those before it, the latest first; what is no part of its document is absent."""
    last = [document[place]]
    while len(last) < order and place > 0 and document[place - 1] != end_token:
        place -= 1
        last.append(document[place])
    absent = -1 if end_token is None else end_token
    return last + [absent] * (order - len(last))


def _primes(least: int, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        if least > 1 and all(least % divisor for divisor in range(2, int(least**0.5) + 1)):
            found.append(least)
        least += 1
    return found


def _multiplier(seed: int, shift: int, vocab_size: int) -> int:
    """Odd, below ``2^63 / vocab_size``: number ``shift + 2`` of SplitMix64's sequence that starts at ``seed``."""
    value = (seed + 0x9E3779B97F4A7C15 * (shift + 2)) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    value = value ^ (value >> 31)
    return 2 * (value % max(1, (2**63 - 1) // vocab_size // 2)) + 1

"""The indexer's loss and its gradients, by torch's own ops, in pieces of bounded size.

A piece is some queries of one choice. It visits the key blocks one after the other, each with the queries that have it,
and leaves a number or two for each query and block of its choice: no matrix of queries by keys exists, and what the
attention weighs is made from its ``lse`` anew, in the backward too. The order of every sum comes from shapes and the
choice alone: on the CPU, where torch's products of matrices have other bits for other numbers of threads, a product is
one thread's, and choices are shared out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from .._common import tensors
from .._common.library import sum_dtype

Result = TypeVar("Result")

# Numbers in the largest matrix of a piece, over which a large block shortens the piece.
PIECE_NUMBERS = 2**22
MAX_PIECE, MIN_PIECE = 1024, 16

# Beside the caller's own; a thread is made when all others are busy.
MAX_THREADS = 63


class _Threads:
    """Threads that stay.

    One that ends takes a lock of the library that multiplies matrices (MKL's memory manager), after Python has joined
    it already: a process that forks at that moment leaves its child the lock for ever.
    """

    def __init__(self) -> None:
        # The library counts threads for the whole process: one call at a time.
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def one_each(self) -> Iterator[int]:
        """In which a product of matrices is one thread's; yields how many threads there are for several."""
        with self._lock:
            num_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield num_threads
            finally:
                torch.set_num_threads(num_threads)

    def run(self, work: Callable[[], None], count: int) -> None:
        """``work()`` in ``count`` threads, of which the caller is one, inside ``one_each``."""
        if count > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(MAX_THREADS, "topgather", initializer=torch.set_num_threads, initargs=(1,))
        others = [self._pool.submit(work) for _ in range(min(count, MAX_THREADS + 1) - 1)] if self._pool else []
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()


_threads = _Threads()


def _renew_threads() -> None:
    global _threads
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    # A child has none of them, and another thread may have held the lock.
    os.register_at_fork(after_in_child=_renew_threads)


@dataclass
class Problem:
    """What forward and backward take; the names are the op's."""

    index_query: Tensor
    index_key: Tensor
    query: Tensor
    key: Tensor
    lse: Tensor
    block_indices: Tensor | None
    block_size: int
    reduction: str
    is_causal: bool
    scale: float
    index_scale: float
    num_choices: int
    weights: Tensor | None

    def __post_init__(self) -> None:
        self.dtype = sum_dtype(self.index_query.dtype)
        self.num_queries, self.num_keys = self.query.size(2), self.key.size(2)
        self.num_blocks = -(-self.num_keys // self.block_size)

    def pieces(self, batch: int, choice: int) -> Iterator[Piece]:
        """All queries of a choice; none where there are no keys."""
        group = max(self.query.size(1), self.index_query.size(1)) // self.num_choices
        row_numbers = group * max(min(self.block_size, self.num_keys), 1)
        length = max(min(PIECE_NUMBERS // row_numbers, MAX_PIECE), MIN_PIECE)
        for first in range(0, self.num_queries if self.num_keys else 0, length):
            yield Piece(self, batch, choice, slice(first, min(first + length, self.num_queries)))

    def for_each_choice(self, work: Callable[[int, int], Result]) -> list[Result]:
        """What ``work(batch, choice)`` gives, in order. Work writes to nothing that other work does."""
        tasks = list(product(range(self.query.size(0)), range(self.num_choices)))

        # Another thread knows of no mode of the caller's.
        without_gradient = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

        def alone(task: tuple[int, int]) -> Result:
            # The arguments are what autocast has made of them.
            with without_gradient(), torch.autocast(self.query.device.type, enabled=False):
                return work(*task)

        if self.query.device.type != "cpu":
            return [alone(task) for task in tasks]
        results: dict[int, Result] = {}
        # Its `next` is one step of the interpreter: no two threads get the same task.
        left = iter(range(len(tasks)))

        def take() -> None:
            for task_idx in left:
                results[task_idx] = alone(tasks[task_idx])

        threads = _threads
        with threads.one_each() as num_threads:
            threads.run(take, min(num_threads, len(tasks)))
        return [results[task_idx] for task_idx in range(len(tasks))]

    def heads(self, tensor: Tensor, choice: int) -> slice:
        """A choice's part of the heads of ``tensor``, which are a multiple of the choices."""
        count = tensor.size(1) // self.num_choices
        return slice(choice * count, (choice + 1) * count)


class Piece:
    """Some queries of one choice: which blocks they have, what attention and indexer make of them."""

    def __init__(self, problem: Problem, batch: int, choice: int, rows: slice) -> None:
        self.problem, self.batch, self.choice, self.rows = problem, batch, choice, rows
        dtype = problem.dtype
        self.index_heads = problem.heads(problem.index_query, choice)
        heads = problem.heads(problem.query, choice)
        self.index_query = problem.index_query[batch, self.index_heads, rows].to(dtype)
        self.query = problem.query[batch, heads, rows].to(dtype)
        self.lse = problem.lse[batch, heads, rows].to(dtype)[..., None]
        self.index_key_heads = self._key_heads(problem.index_query, problem.index_key, self.index_heads)
        self.key_heads = self._key_heads(problem.query, problem.key, heads)
        self.weights = None
        if problem.weights is not None:
            self.weights = problem.weights[batch, self.index_heads, rows].to(dtype)
        device = problem.query.device
        self.positions = torch.arange(rows.start, rows.stop, device=device) + (problem.num_keys - problem.num_queries)
        self.num_rows = rows.stop - rows.start
        self.num_slots = problem.num_blocks if problem.block_indices is None else problem.block_indices.size(-1)
        self.blocks = list(self._blocks())

    def _key_heads(self, query: Tensor, key: Tensor, heads: slice) -> Tensor:
        group = query.size(1) // key.size(1)
        return torch.arange(heads.start, heads.stop, device=key.device) // group

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each block that some query has, with those queries and their places among all queries' slots."""
        problem, num_slots = self.problem, self.num_slots
        device = self.positions.device
        if problem.block_indices is None:
            for block in range(problem.num_blocks):
                first = block * problem.block_size - (problem.num_keys - problem.num_queries) - self.rows.start
                first = max(first, 0) if problem.is_causal else 0
                if first < self.num_rows:
                    rows = torch.arange(first, self.num_rows, device=device)
                    yield block, rows, rows * num_slots + block
            return
        chosen = problem.block_indices[self.batch, self.choice, self.rows].long()
        is_there = (chosen >= 0) & (chosen < problem.num_blocks)
        if problem.is_causal:
            is_there &= chosen * problem.block_size <= self.positions[:, None]
        chosen = torch.where(is_there, chosen, problem.num_blocks).flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=problem.num_blocks + 1).tolist()[: problem.num_blocks]
        start = 0
        for block, count in enumerate(counts):
            if count:
                places = order[start : start + count]
                yield block, places // num_slots, places
            start += count

    def _late(self, block: int, rows: Tensor) -> Tensor | None:
        """Which keys of the block each query does not see, or None where there are none."""
        first = block * self.problem.block_size
        end = min(first + self.problem.block_size, self.problem.num_keys)
        if not self.problem.is_causal or end - 1 <= self.rows.start + self.problem.num_keys - self.problem.num_queries:
            return None
        return torch.arange(first, end, device=rows.device) > self.positions[rows][:, None]

    def _keys(self, key: Tensor, heads: Tensor, block: int) -> Tensor:
        first = block * self.problem.block_size
        rows = key[self.batch, :, first : min(first + self.problem.block_size, self.problem.num_keys)]
        return rows.index_select(0, heads).to(self.problem.dtype)

    def _products(self, block: int, rows: Tensor) -> Tensor:
        index_key = self._keys(self.problem.index_key, self.index_key_heads, block)
        return self.index_query[:, rows] @ index_key.transpose(-2, -1)

    def _score(self, products: Tensor, late: Tensor | None, rows: Tensor) -> Tensor:
        """Of a block, from ``products [heads, queries, keys]``."""
        if self.problem.reduction == "max":
            return (products if late is None else products.masked_fill(late, -torch.inf)).amax(-1)[0]
        if self.problem.reduction == "mean":
            if late is None:
                return products.mean(-1)[0]
            return (products.masked_fill(late, 0.0).sum(-1) / (~late).sum(-1))[0]
        sums = self._relu_sums(products, late)
        return sums.sum(0) if self.weights is None else (self.weights[:, rows] * sums).sum(0)

    def _relu_sums(self, products: Tensor, late: Tensor | None) -> Tensor:
        kept = products.relu()
        return (kept if late is None else kept.masked_fill(late, 0.0)).sum(-1)

    def distributions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target and logits ``[queries, slots]``, and which queries count ``[queries]``."""
        problem = self.problem
        mass = self.query.new_zeros(self.num_rows * self.num_slots)
        logits = mass.new_full(mass.shape, -torch.inf)
        for block, rows, places in self.blocks:
            late = self._late(block, rows)
            key = self._keys(problem.key, self.key_heads, block)
            scores = problem.scale * (self.query[:, rows] @ key.transpose(-2, -1))
            weights = (scores - self.lse[:, rows]).exp()
            weights = weights if late is None else weights.masked_fill(late, 0.0)
            mass[places] = weights.sum(-1).mean(0)
            logits[places] = problem.index_scale * self._score(self._products(block, rows), late, rows)
        mass, logits = mass.view(self.num_rows, -1), logits.view(self.num_rows, -1)
        total = mass.sum(-1, keepdim=True)
        counts = total[:, 0] > 0
        return torch.where(counts[:, None], mass / total, 0.0), logits, counts

    def losses(self) -> Tensor:
        """``[queries]``."""
        target, logits, counts = self.distributions()
        cross = torch.where(target > 0, target * logits.log_softmax(-1), 0.0)
        return torch.where(counts, (torch.xlogy(target, target) - cross).sum(-1), 0.0)

    def add_gradients(self, grad: Tensor, grad_query: Tensor, grad_key: Tensor, grad_weights: Tensor) -> None:
        """For ``grad [queries]``, into the whole problem's gradients, and ``grad_key`` of the choice's key heads."""
        target, logits, counts = self.distributions()
        difference = torch.where(counts[:, None], logits.softmax(-1) - target, 0.0)
        grad_scores = (self.problem.index_scale * grad[:, None] * difference).flatten()
        of_query = self.index_query.new_zeros(self.index_query.shape)
        of_weights = None if self.weights is None else torch.zeros_like(self.weights)
        for block, rows, places in self.blocks:
            late, products = self._late(block, rows), self._products(block, rows)
            grad_score = grad_scores[places]
            if of_weights is not None:
                of_weights[:, rows] += grad_score * self._relu_sums(products, late)
            grad_products = self._grad_products(products, late, grad_score, rows)
            index_key = self._keys(self.problem.index_key, self.index_key_heads, block)
            of_query[:, rows] += grad_products @ index_key
            of_key = grad_products.transpose(-2, -1) @ self.index_query[:, rows]
            first = block * self.problem.block_size
            for head, key_head in enumerate((self.index_key_heads - self.index_key_heads[0]).tolist()):
                grad_key[key_head, first : first + of_key.size(1)] += of_key[head]
        grad_query[self.batch, self.index_heads, self.rows] = of_query
        if of_weights is not None:
            grad_weights[self.batch, self.index_heads, self.rows] = of_weights

    def _grad_products(self, products: Tensor, late: Tensor | None, grad_score: Tensor, rows: Tensor) -> Tensor:
        """Gradients of ``products [heads, queries, keys]``; of equal largest ones the first has the maximum's."""
        if self.problem.reduction == "max":
            seen = products if late is None else products.masked_fill(late, -torch.inf)
            largest = seen.argmax(-1, keepdim=True)
            return torch.zeros_like(products).scatter_(-1, largest, grad_score[None, :, None].expand_as(largest))
        if self.problem.reduction == "mean":
            if late is None:
                return (grad_score / products.size(-1))[None, :, None].expand_as(products)
            counts = (~late).sum(-1)
            return (grad_score / counts)[None, :, None].expand_as(products).masked_fill(late, 0.0)
        factor = grad_score if self.weights is None else self.weights[:, rows] * grad_score
        grad_products = torch.where(products > 0, factor.expand(products.shape[:2])[..., None], 0.0)
        return grad_products if late is None else grad_products.masked_fill(late, 0.0)


def losses(problem: Problem) -> Tensor:
    """``[B, Hc, Nq]``."""
    shape = (problem.query.size(0), problem.num_choices, problem.num_queries)
    result = problem.query.new_zeros(shape, dtype=problem.dtype)

    def fill(batch: int, choice: int) -> None:
        for piece in problem.pieces(batch, choice):
            result[batch, choice, piece.rows] = piece.losses()

    problem.for_each_choice(fill)
    return result


def gradients(grad_losses: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of index_query and index_key, in their dtypes and layouts, and of weights in the dtype of sums.

    For ``grad_losses [B, Hc, Nq]``. Without weights the last is empty.
    """
    dtype = problem.dtype
    grad_query = problem.index_query.new_zeros(problem.index_query.shape, dtype=dtype)
    grad_key = problem.index_key.new_zeros(problem.index_key.shape, dtype=dtype)
    shape = (0,) if problem.weights is None else problem.weights.shape
    grad_weights = problem.index_query.new_zeros(shape, dtype=dtype)

    def fill(batch: int, choice: int) -> Tensor:
        group = problem.index_query.size(1) // problem.index_key.size(1)
        heads = problem.heads(problem.index_query, choice)
        num_key_heads = (heads.stop - 1) // group - heads.start // group + 1
        of_key = grad_key.new_zeros((num_key_heads, *grad_key.shape[2:]))
        for piece in problem.pieces(batch, choice):
            piece.add_gradients(grad_losses[batch, choice, piece.rows].to(dtype), grad_query, of_key, grad_weights)
        return of_key

    parts = problem.for_each_choice(fill)
    for number, of_key in enumerate(parts):
        batch, choice = divmod(number, problem.num_choices)
        group = problem.index_query.size(1) // problem.index_key.size(1)
        first = problem.heads(problem.index_query, choice).start // group
        grad_key[batch, first : first + of_key.size(0)] += of_key
    return laid_out(problem.index_query, grad_query), laid_out(problem.index_key, grad_key), grad_weights


def laid_out(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype and layout of ``like``."""
    return tensors.empty_like_rows(like, like.size(-1)).copy_(tensor)

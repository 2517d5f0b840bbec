"""What block attention over ranks sends, holds and takes: formulas. See :func:`plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._common import checks
from .._common.library import sum_dtype
from .blocks import reach_of
from .gather import held_bytes_of_head
from .placement import Stretch, check_placement, contiguous, zigzag

METHODS = ("gather", "exchange")


class Shapes(NamedTuple):
    """What a call of attention over ranks goes by."""

    lengths: Sequence[int]
    """Tokens of each rank."""
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    block_size: int
    top_k: int | None
    is_causal: bool

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_others(self) -> int:
        return len(self.lengths) - 1

    @property
    def most_chosen(self) -> int:
        """The most blocks that a query can have chosen."""
        num_blocks = -(-self.num_tokens // self.block_size)
        return num_blocks if self.top_k is None else min(self.top_k, num_blocks)

    @property
    def most_elsewhere(self) -> int:
        """The most of them that a rank may not have: all but the block that a causal query stands in."""
        return max(self.most_chosen - self.is_causal, 0)

    @property
    def bytes_of_token(self) -> int:
        """Of its keys and values."""
        return self.batch * self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    @property
    def gathered_bytes(self) -> int:
        """What a rank sends so that all have all keys and values; shorter parts are padded to the longest."""
        return self.num_others * max(self.lengths) * self.bytes_of_token

    def bytes_of_row(self, most_owned: int) -> tuple[int, int]:
        """What a query of one head costs that goes to one rank and back, forward and backward."""
        size, sums = self.dtype.itemsize, sum_dtype(self.dtype).itemsize
        slots = 4 * max(1, min(self.most_elsewhere, most_owned))
        forward = (self.head_dim + self.value_dim) * size + slots + 2 * sums
        return forward, (2 * self.head_dim + self.value_dim) * size + slots + 3 * sums

    def known_bytes(self, most_owned: int) -> int:
        """What a rank sends so that all know all centroids, and how many rows they send each other."""
        of_centroids = most_owned * self.head_dim * sum_dtype(self.dtype).itemsize
        return self.num_others * self.batch * self.num_kv_heads * (of_centroids + 8)


def cheaper(shapes: Shapes, *, with_backward: bool) -> str:
    """The way by which the rank that sends most sends less, at most: from shapes alone, so the same on all ranks."""
    longest = max(shapes.lengths)
    rows = longest * shapes.batch * shapes.num_heads * min(shapes.most_elsewhere, shapes.num_others)
    most_owned = -(-longest // shapes.block_size) + 1
    forward, backward = shapes.bytes_of_row(most_owned)
    # Both ends of a stretch, of which there may be two, may lie in a block.
    across = 4 * min(shapes.block_size - 1, longest) * shapes.bytes_of_token if shapes.num_others else 0
    gathered = shapes.gathered_bytes
    exchanged = rows * forward + across + shapes.known_bytes(most_owned)
    if with_backward:
        gathered += shapes.gathered_bytes + (shapes.num_tokens - min(shapes.lengths)) * shapes.bytes_of_token
        exchanged += rows * backward + 2 * across
    return "gather" if gathered <= exchanged else "exchange"


@dataclass(frozen=True)
class Way:
    """What one way of attention over ranks costs a rank, in the mean over ranks, for one layer.

    Args:
        forward_bytes: bytes that it sends in a forward.
        backward_bytes: bytes that it sends in a backward.
        memory_bytes: what it holds of other ranks, and for them, at a time, beside what one device holds of its tokens.
        seconds: of forward and backward, as far as arithmetic and links tell.
    """

    forward_bytes: float
    backward_bytes: float
    memory_bytes: float
    seconds: float

    @property
    def num_bytes(self) -> float:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``print`` shows a table.

    Args:
        gather: keys and values travel to all ranks.
        exchange: queries travel to the blocks they chose.
        ring: dense ring attention of the same shapes.
        method: the way that :func:`moba_attention` takes by itself, in training.
        num_tokens: tokens of all ranks.
        num_ranks: ranks.
    """

    gather: Way
    exchange: Way
    ring: Way
    method: str
    num_tokens: int
    num_ranks: int

    def __str__(self) -> str:
        lines = [f"{'':<12}{'sent a token, forward':>24}{'backward':>12}{'held':>12}{'time':>12}"]
        tokens = max(self.num_tokens / self.num_ranks, 1)
        for name, way in (("gather", self.gather), ("exchange", self.exchange), ("dense ring", self.ring)):
            sent = [_bytes(number / tokens) for number in (way.forward_bytes, way.backward_bytes)]
            mark = " <-" if name == self.method else ""
            lines.append(
                f"{name:<12}{sent[0]:>24}{sent[1]:>12}{_bytes(way.memory_bytes):>12}{way.seconds * 1e3:>9.3g} ms{mark}"
            )
        return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def plan(
    num_tokens: int,
    num_ranks: int,
    num_heads: int,
    head_dim: int,
    *,
    num_kv_heads: int | None = None,
    value_dim: int | None = None,
    batch_size: int = 1,
    block_size: int = 128,
    top_k: int | None = 8,
    is_causal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    placement: str = "zigzag",
    max_gathered_bytes: int = 1 << 30,
    owners_per_query: float | None = None,
    bandwidth: float = 50e9,
    latency: float = 20e-6,
    flops: float = 400e12,
) -> Plan:
    """What a layer of :func:`moba_attention` over ranks costs, each way, and dense ring attention (arXiv 2310.01889).

    Nothing runs: the formulas of ``docs/distributed.md``, for any number of ranks. Bytes are exact, but for
    ``owners_per_query``, which depends on what queries choose.

    Args:
        num_tokens: tokens of a sequence, of all ranks together.
        num_ranks: ranks that they are spread over.
        num_heads: query heads.
        head_dim: numbers of a key.
        num_kv_heads: key heads; ``num_heads`` if None.
        value_dim: numbers of a value; ``head_dim`` if None.
        batch_size: sequences.
        block_size, top_k, is_causal: as in :func:`topgather.moba_attention`.
        dtype: of query, key and value.
        placement, max_gathered_bytes: as in :func:`moba_attention`.
        owners_per_query: how many other ranks have blocks that a query chose, in the mean. None: as many as can be.
        bandwidth: bytes a second that a rank can send.
        latency: seconds that a collective takes beside its bytes.
        flops: multiply-adds of a rank count two; so many a second.

    Returns:
        A :class:`Plan`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a count below 1, heads that do not divide, an unknown placement.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    value_dim = head_dim if value_dim is None else value_dim
    counts = {
        "num_tokens": num_tokens, "num_ranks": num_ranks, "num_heads": num_heads, "head_dim": head_dim,
        "num_kv_heads": num_kv_heads, "value_dim": value_dim, "batch_size": batch_size, "block_size": block_size,
        "max_gathered_bytes": max_gathered_bytes,
    }  # fmt: skip
    for name, count in counts.items():
        checks.check_count(name, count)
    if top_k is not None:
        checks.check_count("top_k", top_k)
    checks.check_flag("is_causal", is_causal)
    check_placement(placement)
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")
    if placement == "zigzag":
        stretches = zigzag(num_tokens, num_ranks)
    else:
        size, longer = divmod(num_tokens, num_ranks)
        stretches = contiguous([size + (rank < longer) for rank in range(num_ranks)])
    lengths = [sum(stretch.length for stretch in of_rank) for of_rank in stretches]
    shapes = Shapes(
        lengths, batch_size, num_heads, num_kv_heads, head_dim, value_dim, dtype, block_size, top_k, is_causal
    )
    machine = _Machine(bandwidth, latency, flops)
    return Plan(
        _gather(shapes, stretches, machine, max_gathered_bytes),
        _exchange(shapes, stretches, machine, max_gathered_bytes, owners_per_query),
        _ring(shapes, machine),
        cheaper(shapes, with_backward=True),
        num_tokens,
        num_ranks,
    )


class _Machine(NamedTuple):
    bandwidth: float
    latency: float
    flops: float

    def sending(self, num_bytes: float, num_messages: float) -> float:
        return num_bytes / self.bandwidth + num_messages * self.latency

    def attending(self, shapes: Shapes, keys_of_query: float) -> float:
        """Two products of the forward and five of the backward, of as wide rows as there are."""
        queries = shapes.num_tokens / len(shapes.lengths) * shapes.batch * shapes.num_heads
        return 3.5 * queries * keys_of_query * 2 * (shapes.head_dim + shapes.value_dim) / self.flops

    def choosing(self, shapes: Shapes) -> float:
        queries = shapes.num_tokens / len(shapes.lengths) * shapes.batch * shapes.num_heads
        blocks = shapes.num_tokens / shapes.block_size / (2 if shapes.is_causal else 1)
        return queries * blocks * 2 * shapes.head_dim / self.flops


def _gather(shapes: Shapes, stretches: list[list[Stretch]], machine: _Machine, max_bytes: int) -> Way:
    # Gradients go back of all keys that some query of the rank may see.
    seen = [_end(of_rank) if shapes.is_causal else shapes.num_tokens for of_rank in stretches]
    returned = sum(max(end - length, 0) for end, length in zip(seen, shapes.lengths, strict=True)) / len(stretches)
    forward = shapes.gathered_bytes
    backward = shapes.gathered_bytes + returned * shapes.bytes_of_token
    of_head = held_bytes_of_head(
        shapes.batch, shapes.head_dim + shapes.value_dim, shapes.dtype.itemsize, max(shapes.lengths),
        len(shapes.lengths), shapes.num_tokens,
    )  # fmt: skip
    step = max(1, min(shapes.num_kv_heads, max_bytes // max(of_head, 1)))
    calls = 5 * -(-shapes.num_kv_heads // step)
    work = machine.attending(shapes, shapes.most_chosen * shapes.block_size) + machine.choosing(shapes)
    sending = machine.sending(forward + backward, calls)
    # The next heads travel while these are attended to; the first ones do not.
    seconds = max(work, sending) + min(work, sending) * step / shapes.num_kv_heads
    return Way(forward, backward, step * of_head, seconds)


def _exchange(
    shapes: Shapes,
    stretches: list[list[Stretch]],
    machine: _Machine,
    max_bytes: int,
    owners_per_query: float | None,
) -> Way:
    num_ranks, size, bounds = len(stretches), shapes.block_size, (0, shapes.num_tokens)
    across, owned = 0, []
    for of_rank in stretches:
        mine = [stretch for stretch in of_rank if stretch.length > 0]
        owned.append(sum(-(-stretch.end // size) - -(-stretch.start // size) for stretch in mine))
        for stretch in mine:
            needed = reach_of(stretch, bounds, size, is_causal=shapes.is_causal)
            has = sum(max(0, min(other.end, needed.end) - max(other.start, needed.start)) for other in mine)
            across += needed.length - has
    if owners_per_query is None:
        owners_per_query = min(shapes.most_elsewhere, shapes.num_others)
    rows = owners_per_query * shapes.num_tokens / num_ranks * shapes.batch * shapes.num_heads
    of_row = shapes.bytes_of_row(max(owned))
    fetched = across / num_ranks * shapes.bytes_of_token
    forward = rows * of_row[0] + fetched + shapes.known_bytes(max(owned))
    backward = rows * of_row[1] + 2 * fetched
    # Rows that came in, and those of one's own that go nowhere, of as many heads as fit; and what step 1 copies.
    of_rows = 2 * (rows + shapes.num_tokens / num_ranks * shapes.batch * shapes.num_heads)
    of_rows *= (shapes.head_dim + shapes.value_dim) * shapes.dtype.itemsize
    held = min(of_rows, max(max_bytes, of_rows / shapes.num_kv_heads))
    chunks = -(-of_rows // max(held, 1))
    held += (shapes.num_tokens + across) / num_ranks * shapes.bytes_of_token
    work = machine.attending(shapes, shapes.most_chosen * size) + machine.choosing(shapes)
    return Way(forward, backward, held, work + machine.sending(forward + backward, 10 + 9 * chunks))


def _ring(shapes: Shapes, machine: _Machine) -> Way:
    """Keys and values go round; in the backward their gradients, in the dtype of sums, go with them and home."""
    part = shapes.num_tokens / len(shapes.lengths) * shapes.bytes_of_token
    gradients = part * sum_dtype(shapes.dtype).itemsize / shapes.dtype.itemsize
    forward = shapes.num_others * part
    backward = shapes.num_others * part + (len(shapes.lengths) * gradients if shapes.num_others else 0)
    work = machine.attending(shapes, shapes.num_tokens / (2 if shapes.is_causal else 1))
    seconds = max(work, machine.sending(forward + backward, 2 * shapes.num_others))
    return Way(forward, backward, 2 * (part + gradients), seconds)


def _end(of_rank: list[Stretch]) -> int:
    """Where the last of a rank's tokens ends."""
    return max((stretch.end for stretch in of_rank if stretch.length > 0), default=0)

"""The problems that times are predicted for, and what a description of a kernel consists of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from model.paths import Passes


@dataclass(frozen=True)
class Problem:
    """Causal block attention of a dense batch in bfloat16; every query head has a key head of its own."""

    num_tokens: int
    head_dim: int
    block_size: int
    batch_size: int = 2
    num_heads: int = 16
    top_k: int = 8

    @property
    def name(self) -> str:
        if self == PROFILED:
            return "profiled"
        return f"{self.num_tokens // 1024}K, D {self.head_dim}, block {self.block_size}"

    @property
    def num_blocks(self) -> int:
        """Key blocks of a unit."""
        return -(-self.num_tokens // self.block_size)

    @property
    def num_units(self) -> int:
        return self.batch_size * self.num_heads

    @property
    def num_rows(self) -> int:
        """Queries of all heads."""
        return self.num_units * self.num_tokens

    @property
    def num_entries(self) -> int:
        """Choices of all queries; the first ones of a sequence, which see fewer blocks, are counted in full."""
        return self.num_rows * self.top_k

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_dim


@dataclass(frozen=True)
class Launch:
    """What a problem runs of a kernel: ``thread_blocks`` in each of ``launches``, all of which take the same way.

    ``passes``: trip counts, with those of the tile loop, which may be a fraction. ``bytes``: of device memory, of all
    launches together.
    """

    thread_blocks: float
    passes: Sequence[Passes]
    bytes: float
    launches: float = 1
    rare: Sequence[str] = ()


@dataclass(frozen=True)
class KernelModel:
    """How a kernel is walked.

    ``symbol``: a part of the mangled name, by head_dim. ``source``: the file it is compiled from, without its ending.
    ``unit``: what one pass of the hot loop does, in words. ``launches``: what a problem launches of it in a direction,
    "forward" or "backward". ``tile``: the beginning of the source line of the hot loop; empty: the whole kernel is one.
    ``threads``: of a thread block, where docs/kernels.md does not say.
    """

    name: str
    source: str
    symbol: Callable[[int], str]
    unit: str
    launches: Callable[[Problem, str], list[Launch]]
    tile: str = ""
    threads: int = 256
    rare: Sequence[str] = ()
    directions: tuple[str, ...] = ("forward",)
    head_dims: tuple[int, ...] = (64, 128)


PROBLEMS = tuple(
    Problem(num_tokens * 1024, head_dim, block_size)
    for num_tokens in (8, 64, 512)
    for head_dim in (64, 128)
    for block_size in (64, 128)
)
PROFILED = Problem(32 * 1024, 128, 128, batch_size=1, num_heads=4)
"""What `make gpu` measures: bench/gpu/profile_cases.py."""
COUNTED = {head_dim: Problem(64 * 1024, head_dim, 128) for head_dim in (64, 128)}
"""The problems whose hot loops are counted."""


@lru_cache
def insertions(num_blocks: int, list_length: int, group_width: int, columns: int = 32, trials: int = 200) -> float:
    """Rounds of insertions that a warp's pass over some columns makes in a tile of scores, on average over a sequence.

    Scores are taken to be random. A warp's ``32 / group_width`` rows look at ``group_width`` columns at once; a round
    enters one candidate of every row that has one.
    """
    generator = random.Random(0)
    groups = 32 // group_width
    steps = -(-num_blocks // group_width)
    rounds = [0.0] * steps
    for _ in range(trials):
        lists: list[list[float]] = [[] for _ in range(groups)]
        for step in range(steps):
            most = 0
            for kept in lists:
                entered = 0
                for score in [generator.random() for _ in range(group_width)]:
                    if len(kept) < list_length or score > kept[-1]:
                        kept.append(score)
                        kept.sort(reverse=True)
                        del kept[list_length:]
                        entered += 1
                most = max(most, entered)
            rounds[step] += most / trials
    # Query i of n sees i / n of the steps.
    total = sum(sum(rounds[: step + 1]) for step in range(steps)) / steps
    return total / ((steps + 1) / 2)

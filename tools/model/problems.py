"""The problems that times are predicted for, and what a description of a kernel consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

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
        """Choices of all queries. The first ones of a sequence see fewer blocks than they may choose."""
        return round(self.num_units * self.num_blocks * self.entries_of_block)

    @property
    def entries_of_block(self) -> float:
        """Choices of a block, on average."""
        missing = sum(max(self.top_k - seen, 0) for seen in range(1, self.num_blocks + 1))
        return self.block_size * (self.top_k - missing / self.num_blocks)

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_dim


@dataclass(frozen=True)
class Launch:
    """What a problem runs of a kernel: ``thread_blocks`` in each of ``launches``, all of which take the same way.

    ``passes``: trip counts, with those of the tile loop, which may be a fraction. ``bytes``: of device memory, of all
    launches together. ``other``: the way, passes and what is rare, of every second thread block; those side by side are
    then at different turns.
    """

    thread_blocks: float
    passes: Sequence[Passes]
    bytes: float
    launches: float = 1
    rare: Sequence[str] = ()
    other: Launch | None = None


@dataclass(frozen=True)
class KernelModel:
    """How a kernel is walked.

    ``symbol``: a part of the mangled name, by head_dim. ``source``: the file it is compiled from, without its ending.
    ``unit``: what one pass of the hot loop does, in words. ``launches``: what a problem launches of it in a direction,
    "forward" or "backward". ``tile``: the beginning of the source line of the hot loop; empty: the whole kernel is one.
    ``threads``: of a thread block, where docs/kernels.md does not say. ``variant``: what follows the name there.
    ``block_sizes``: of the problems that take this kernel; empty: all do. ``shared_bytes``: dynamic shared memory,
    where docs/kernels.md does not say. ``counted_tokens``: of the problem whose hot loop is counted, where it is not
    the usual one.
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
    variant: str = ""
    block_sizes: tuple[int, ...] = ()
    shared_bytes: int = 0
    counted_tokens: int = 0

    def counted(self, head_dim: int) -> Problem:
        """The problem whose hot loop is counted."""
        problem = COUNTED.get(head_dim, COUNTED[128])
        if self.counted_tokens:
            problem = Problem(self.counted_tokens, head_dim, 128)
        return replace(problem, block_size=self.block_sizes[0]) if self.block_sizes else problem

    def takes(self, problem: Problem) -> bool:
        return not self.block_sizes or problem.block_size in self.block_sizes


@dataclass(frozen=True)
class Case:
    """A problem of an op other than block attention, bfloat16.

    ``launches``: of every kernel, in order. ``copied``: bytes that have to be read and written, each once: what a copy
    of as many bytes is compared with; 0: no copy is.
    """

    name: str
    launches: Sequence[tuple[KernelModel, Launch]]
    copied: float = 0.0


OTHER = "other ops"
"""The direction of the kernels of a :class:`Case`."""


def of_one_size(
    name: str, source: str, symbol: str, unit: str, counted: Launch, size: int = 0, **more: Any
) -> KernelModel:
    """A kernel of which one problem's hot loop is counted. ``size``: its head_dim in the table of thread blocks."""
    return KernelModel(
        name, source, lambda _: symbol, unit, lambda *_: [counted], directions=(OTHER,), head_dims=(size,), **more
    )


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
def insertions(num_blocks: int, list_length: int, rows: int = 32, columns: int = 32) -> float:
    """Insertions that a warp waits for in a tile of scores, on average over a causal sequence.

    Each of its ``rows`` enters those of ``columns`` new scores that beat the worst it kept before the tile; the warp
    goes on when the row with the most of them is done. Scores are taken to be exchangeable: of n seen, a new one is as
    likely to fall between any two.
    """
    tiles = -(-num_blocks // columns)
    most = [_most_marked(tile * columns, list_length, rows, columns) for tile in range(tiles)]
    # Query i of n sees i / n of the tiles.
    total = sum(sum(most[: tile + 1]) for tile in range(tiles)) / tiles
    return total / ((tiles + 1) / 2)


def _most_marked(num_seen: int, list_length: int, rows: int, columns: int) -> float:
    """The expected largest number, over the rows, of new scores above the list_length-th best of those seen."""
    if num_seen < list_length:
        return float(columns)
    chance = [1.0]  # of so many marked
    for i in range(columns):
        above = [(list_length + marked) / (num_seen + 1 + i) for marked in range(len(chance))]
        stays = [p * (1 - a) for p, a in zip(chance, above, strict=True)]
        grows = [p * a for p, a in zip(chance, above, strict=True)]
        chance = [s + g for s, g in zip([*stays, 0.0], [0.0, *grows], strict=True)]
    expected, below = 0.0, 0.0
    for p in chance[:-1]:
        below += p
        expected += 1 - below**rows
    return expected

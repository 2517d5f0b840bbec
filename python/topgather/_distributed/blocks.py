"""Which blocks ranks own, and what travels so that an owner has all of a block: :mod:`exchange` goes by it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .placement import Placement, Stretch
from .transfer import Transfer


class Mine(NamedTuple):
    """This rank's blocks, in the order of positions."""

    num_blocks: int
    block_bounds: Tensor  # [num_blocks + 1] where they are among their tokens
    key_counts: Tensor  # [sequences] tokens
    slices: list[slice]  # of the fetched tokens: those of its blocks


class Places(NamedTuple):
    """Where this rank's tokens stand, and the sequences that the choice of their blocks is made by."""

    sequence: Tensor  # [n]
    own_block: Tensor  # [n] counted from the sequence's first
    first_block: Tensor  # [n] the number of the sequence's first block among all
    padded_tokens: Tensor  # [P] tokens, from the start of a block to the end of one; any where there is none
    padded_places: Tensor  # [n] where a token is among them
    query_bounds: Tensor  # of the sequences of queries: padded blocks where causal, else tokens
    block_bounds: Tensor  # of the blocks that they see
    visible_blocks: Tensor  # numbers of those among all
    most_queries: int
    most_blocks: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of all sequences are numbered one after the other; a rank has those that begin in its stretches.

    ``transfer`` brings each stretch what it needs: from the start of a block, where causal the one that the stretch
    begins in, to the end of one.
    """

    block_size: int
    num_sequences: int
    num_blocks: int
    owner: Tensor  # [blocks] ranks
    number_at_owner: Tensor  # [blocks] counted from the owner's first of the same sequence
    num_owned: list[int]  # by rank
    most_owned: int  # of one sequence by one rank
    gathered_at: Tensor  # [blocks] rows of what is gathered of all ranks, padded to as many
    transfer: Transfer
    mine: Mine
    places: Places
    home: tuple[Tensor, Tensor, Tensor, int, int] | None

    def slots_at_owner(self, top_k: int | None, *, is_causal: bool) -> int:
        """The most blocks that a query can have chosen of one owner, but for the one that it stands in."""
        return max(1, self.most_owned if top_k is None else min(top_k - is_causal, self.most_owned))

    def owned(self, around: Tensor) -> Tensor:
        """The tokens of this rank's blocks among those fetched."""
        slices = self.mine.slices
        parts = [around[part] for part in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else around[:0]

    def add_owned(self, around: Tensor, gradient: Tensor) -> None:
        """Add what has the places of :meth:`owned`."""
        first = 0
        for part in self.mine.slices:
            length = part.stop - part.start
            around[part] += gradient[first : first + length]
            first += length

    def home_choice(self, device: torch.device) -> Tensor:
        """``[1, n, 1]``: the own block of every token, counted from the first key that its call of attention has."""
        assert self.home is not None
        return self.home[0].to(device)

    def home_sequences(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """What the ops take of this rank's queries, each up to its own place, over the fetched tokens."""
        assert self.home is not None
        _, query_bounds, key_bounds, most_queries, most_keys = self.home
        return query_bounds.to(device), key_bounds.to(device), most_queries, most_keys


def _block_at(token: int, bounds: Sequence[int], block_size: int) -> tuple[int, int]:
    """Start and end of the block that a token is in."""
    sequence = bisect_right(bounds, token) - 1
    start = bounds[sequence] + (token - bounds[sequence]) // block_size * block_size
    return start, min(start + block_size, bounds[sequence + 1])


def reach_of(stretch: Stretch, bounds: Sequence[int], block_size: int, *, is_causal: bool) -> Stretch:
    """The tokens that a stretch needs around it, its own among them."""
    first, after = _block_at(stretch.start, bounds, block_size)
    if not is_causal and first < stretch.start:
        first = after  # of a block that another rank owns
    last, end = _block_at(stretch.end - 1, bounds, block_size)
    if last < stretch.start:  # one block, of another rank
        end = max(first, stretch.end)
    return Stretch(first, end - first)


def blocks_of(layout: Placement, bounds: list[int], block_size: int, *, is_causal: bool) -> Blocks:
    """The blocks of sequences with these boundaries, among which ``layout`` has its stretches."""
    stretches = tuple(tuple(of_rank) for of_rank in layout.stretches)
    return _blocks(stretches, tuple(bounds), block_size, is_causal, layout.rank)


# Layers of a model ask for the same again and again.
@lru_cache(maxsize=8)
def _blocks(
    all_stretches: tuple[tuple[Stretch, ...], ...], bounds: tuple[int, ...], block_size: int, is_causal: bool, rank: int
) -> Blocks:
    num_ranks, num_sequences = len(all_stretches), len(bounds) - 1
    stretches = [[stretch for stretch in of_rank if stretch.length > 0] for of_rank in all_stretches]
    edges = torch.tensor(bounds, device="cpu")
    lengths = edges.diff()
    counts = (lengths + block_size - 1) // block_size
    first_blocks = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    num_blocks = int(first_blocks[-1])
    sequence_of_block = torch.arange(num_sequences, device="cpu").repeat_interleave(counts)
    number = torch.arange(num_blocks, device="cpu") - first_blocks[sequence_of_block]
    start = edges[sequence_of_block] + number * block_size
    size = torch.minimum(edges[sequence_of_block + 1] - start, torch.tensor(block_size, device="cpu"))

    ordered = sorted((stretch.start, owner) for owner, of_rank in enumerate(stretches) for stretch in of_rank)
    if ordered:
        at = torch.searchsorted(torch.tensor([first for first, _ in ordered], device="cpu"), start, right=True) - 1
        owner = torch.tensor([of_rank for _, of_rank in ordered], device="cpu")[at]
    else:
        owner = start.new_zeros(0)
    owned = owner.bincount(minlength=num_ranks)
    by_owner = owner.sort(stable=True).indices
    place_at_owner = torch.empty_like(by_owner)
    place_at_owner[by_owner] = torch.arange(num_blocks, device="cpu") - (owned.cumsum(0) - owned)[owner[by_owner]]
    pair = owner * num_sequences + sequence_of_block
    of_pair = pair.bincount(minlength=num_ranks * num_sequences)
    by_pair = pair.sort(stable=True).indices
    number_at_owner = torch.empty_like(by_pair)
    number_at_owner[by_pair] = torch.arange(num_blocks, device="cpu") - (of_pair.cumsum(0) - of_pair)[pair[by_pair]]

    reach = [
        [reach_of(stretch, bounds, block_size, is_causal=is_causal) for stretch in of_rank] for of_rank in stretches
    ]
    mine = owner == rank
    around, slices = 0, []
    for stretch, needed in zip(stretches[rank], reach[rank], strict=True):
        first, after = _block_at(stretch.start, bounds, block_size)
        owned_start = stretch.start if first == stretch.start else after
        if owned_start < stretch.end:
            slices.append(slice(around + owned_start - needed.start, around + needed.length))
        around += needed.length
    key_counts = torch.zeros(num_sequences, dtype=torch.int64, device="cpu").index_add_(
        0, sequence_of_block[mine], size[mine]
    )
    return Blocks(
        block_size=block_size,
        num_sequences=num_sequences,
        num_blocks=num_blocks,
        owner=owner,
        number_at_owner=number_at_owner,
        num_owned=owned.tolist(),
        most_owned=int(of_pair.max()) if of_pair.numel() else 0,
        gathered_at=owner * max(owned.tolist()) + place_at_owner,
        transfer=Transfer(stretches, reach),
        mine=Mine(
            int(mine.sum()),
            torch.cat([size.new_zeros(1), size[mine].cumsum(0)]),
            key_counts,
            slices,
        ),
        places=_places(stretches[rank], bounds, first_blocks.tolist(), counts.tolist(), block_size, is_causal),
        home=_home(stretches[rank], reach[rank], bounds, block_size) if is_causal else None,
    )


def _sequences_of(stretch: Stretch, bounds: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(sequence, from, to) of the tokens of a stretch."""
    sequence = bisect_right(bounds, stretch.start) - 1
    while sequence < len(bounds) - 1 and bounds[sequence] < stretch.end:
        start, end = max(stretch.start, bounds[sequence]), min(stretch.end, bounds[sequence + 1])
        if start < end:
            yield sequence, start, end
        sequence += 1


def _places(
    mine: list[Stretch],
    bounds: tuple[int, ...],
    first_blocks: list[int],
    counts: list[int],
    block_size: int,
    is_causal: bool,
) -> Places:
    sequence, own, first_block, padded, places, visible = [], [], [], [], [], []
    num_queries, num_visible = [], []
    num_tokens = num_padded = 0
    for stretch in mine:
        for number, start, end in _sequences_of(stretch, bounds):
            tokens = torch.arange(start, end, device="cpu") - bounds[number]
            count, before = end - start, int(tokens[0]) % block_size
            sequence.append(torch.full((count,), number, device="cpu"))
            own.append(tokens // block_size)
            first_block.append(torch.full((count,), first_blocks[number], device="cpu"))
            num_rows = -(-(before + count) // block_size)
            rows = torch.arange(num_rows * block_size, device="cpu") - before
            padded.append(num_tokens + rows.clamp(0, count - 1))
            # As the choice comes: by blocks, and there by offsets.
            places.append(num_padded + before + torch.arange(count, device="cpu"))
            last = int(tokens[-1]) // block_size + 1 if is_causal else counts[number]
            visible.append(torch.arange(first_blocks[number], first_blocks[number] + last, device="cpu"))
            num_queries.append(num_rows if is_causal else count)
            num_visible.append(last)
            num_tokens, num_padded = num_tokens + count, num_padded + num_rows * block_size

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    query_bounds, key_bounds = (
        torch.tensor([0, *numbers], device="cpu").cumsum(0) for numbers in (num_queries, num_visible)
    )
    return Places(
        joined(sequence), joined(own), joined(first_block), joined(padded), joined(places),
        query_bounds, key_bounds, joined(visible),
        max(num_queries, default=0), max(num_visible, default=0),
    )  # fmt: skip


def _home(
    mine: list[Stretch], reach: list[Stretch], bounds: tuple[int, ...], block_size: int
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """The call of attention of queries to their own blocks: choice, boundaries of queries and of fetched tokens."""
    choice, num_queries, num_keys = [], [], []
    for stretch, needed in zip(mine, reach, strict=True):
        for number, start, end in _sequences_of(stretch, bounds):
            # A call has a sequence's keys from the start of a block on.
            first = max(needed.start, bounds[number])
            choice.append((torch.arange(start, end, device="cpu") - first) // block_size)
            num_queries.append(end - start)
            num_keys.append(end - first)
        if needed.end > stretch.end:  # the owner's, behind its own tokens: nobody's here
            num_queries.append(0)
            num_keys.append(needed.end - stretch.end)
    own = torch.cat(choice) if choice else torch.empty(0, dtype=torch.int64, device="cpu")
    query_bounds, key_bounds = (
        torch.tensor([0, *numbers], device="cpu").cumsum(0) for numbers in (num_queries, num_keys)
    )
    return (
        own.to(torch.int32)[None, :, None], query_bounds, key_bounds, max(num_queries, default=0),
        max(num_keys, default=0),
    )  # fmt: skip

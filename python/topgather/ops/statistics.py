"""Numbers that tell what a choice of blocks is like, for a training loop to log."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import checks
from .routing import BlockRouting


@dataclass(frozen=True)
class RoutingStatistics:
    """What :func:`routing_statistics` says of a choice of blocks.

    Args:
        num_choices: blocks chosen, over all heads and queries.
        distance_shares: share of the choices that lie so many blocks before the query's own, which is number 0.
        later_share: share of the choices that lie behind the query's own block, as they may where attention is not
            causal.
        first_share: share of the choices that are a sequence's first block.
        mean_distance: mean distance in blocks, later ones counted as negative; NaN without choices.
        entropy: of a head's use of blocks, in nats, mean of the heads: the log of the number of blocks where all are
            used alike, 0 where one has all use; NaN without choices.
        entropy_per_head: the same by head.
        overlap: of two heads' blocks for a query, the share that they have in common, mean of all pairs, weighed by how
            many they could have; NaN with one head. The own block counts, so it is hardly ever 0.
    """

    num_choices: int
    distance_shares: tuple[float, ...]
    later_share: float
    first_share: float
    mean_distance: float
    entropy: float
    entropy_per_head: tuple[float, ...]
    overlap: float

    def numbers(self, prefix: str = "") -> dict[str, float]:
        """What stands for itself, by name, as loggers take it.

        Args:
            prefix: put before every name, for example ``"layer_3/"``.
        """
        shares = {
            "own_share": self.distance_shares[0] if self.distance_shares else 0.0,
            "first_share": self.first_share,
            "mean_distance": self.mean_distance,
            "entropy": self.entropy,
            "overlap": self.overlap,
        }
        return {prefix + name: value for name, value in shares.items()}


class Choices(NamedTuple):
    """A choice as rows: ``H`` heads, ``T`` queries of all batch entries."""

    blocks: Tensor  # [H, T, K] int64, counted from each sequence's first key; -1 for none
    positions: Tensor  # [T] of the queries in their sequences
    sequences: Tensor  # [T] number of the query's batch entry or packed sequence
    starts: Tensor  # [T] where the sequence starts among packed tokens, else 0


def choices_of(routing: BlockRouting, first_query: int, cu_seqlens: Tensor | None) -> Choices:
    """The choices of ``routing`` as rows, on its device; raises for what :func:`routing_statistics` refuses."""
    if not isinstance(routing, BlockRouting):
        raise TypeError(f"routing must be a topgather.BlockRouting, got {type(routing).__name__}")
    checks.check_count("first_query", first_query, least=0)
    blocks = routing.block_indices.detach().long()
    device = blocks.device
    if blocks.ndim == 4:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None for a choice that is not packed")
        batch, heads, queries, slots = blocks.shape
        positions = torch.arange(queries, device=device).add_(first_query).repeat(batch)
        sequences = torch.arange(batch, device=device).repeat_interleave(queries)
        blocks = blocks.transpose(0, 1).reshape(heads, batch * queries, slots)
        return Choices(blocks, positions, sequences, torch.zeros_like(positions))
    if cu_seqlens is None:
        raise ValueError("cu_seqlens must be given for a choice of packed sequences")
    checks.check_tensor("cu_seqlens", cu_seqlens)
    bounds = cu_seqlens.to(device=device, dtype=torch.int64)
    if bounds.ndim != 1 or bounds.numel() < 2 or int(bounds[-1]) != blocks.size(1) or int(bounds[0]) != 0:
        raise ValueError(f"cu_seqlens must delimit the {blocks.size(1)} queries of the choice, got {bounds.tolist()}")
    sequences = torch.repeat_interleave(torch.arange(bounds.numel() - 1, device=device), bounds.diff())
    starts = bounds[sequences]
    positions = torch.arange(blocks.size(1), device=device) - starts + first_query
    return Choices(blocks, positions, sequences, starts)


def routing_statistics(
    routing: BlockRouting, first_query: int = 0, cu_seqlens: Tensor | None = None
) -> RoutingStatistics:
    """Where the chosen blocks lie, how evenly they are used and how far heads agree (MoBA, arXiv 2502.13189).

    Runs on the choice's device and waits for it.

    Args:
        routing: the choice, dense or packed.
        first_query: position of the first query in its sequence; ``Nk - Nq`` where keys are more than queries.
        cu_seqlens: ``[num_sequences + 1]``, boundaries of packed queries; None where they are not packed.

    Returns:
        A :class:`RoutingStatistics`, plain numbers.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``first_query`` is negative, or ``cu_seqlens`` missing, given or not fitting.
    """
    blocks, positions, sequences, _ = choices_of(routing, first_query, cu_seqlens)
    is_chosen = blocks >= 0
    num_choices = int(is_chosen.sum())
    num_heads = blocks.size(0)
    if num_choices == 0:
        nothing = (math.nan,) * num_heads
        return RoutingStatistics(0, (), 0.0, 0.0, math.nan, math.nan, nothing, math.nan)
    entropies = _entropies(blocks, sequences)
    known = [entropy for entropy in entropies if not math.isnan(entropy)]
    distances = (positions[None, :, None] // routing.block_size - blocks)[is_chosen]
    shares = torch.bincount(distances[distances >= 0]).double() / num_choices
    return RoutingStatistics(
        num_choices=num_choices,
        distance_shares=tuple(shares.tolist()),
        later_share=int((distances < 0).sum()) / num_choices,
        first_share=int((blocks == 0).sum()) / num_choices,
        mean_distance=float(distances.double().mean()),
        entropy=sum(known) / len(known),
        entropy_per_head=entropies,
        overlap=_overlap(blocks, is_chosen),
    )


def _entropies(blocks: Tensor, sequences: Tensor) -> tuple[float, ...]:
    """Blocks of different sequences are different blocks."""
    numbers = sequences[:, None] * (int(blocks.max()) + 1) + blocks
    entropies = []
    for head, chosen in zip(numbers, blocks >= 0, strict=True):
        use = torch.bincount(head[chosen]).double()
        entropies.append(float(torch.special.entr(use / use.sum()).sum()) if bool(chosen.any()) else math.nan)
    return tuple(entropies)


def _overlap(blocks: Tensor, is_chosen: Tensor) -> float:
    """A block that c heads chose for a query is common to c (c - 1) / 2 pairs of heads."""
    num_heads, num_rows, _ = blocks.shape
    if num_heads < 2:
        return math.nan
    rows = torch.arange(num_rows, device=blocks.device)[None, :, None] * (int(blocks.max()) + 1)
    counts = torch.unique((rows + blocks)[is_chosen], return_counts=True)[1]
    # Of two heads the one with fewer blocks says how many they could share.
    sizes = is_chosen.sum(-1).sort(dim=0, descending=True).values
    most = int((sizes * torch.arange(num_heads, device=blocks.device)[:, None]).sum())
    return int((counts * (counts - 1) // 2).sum()) / most if most > 0 else math.nan

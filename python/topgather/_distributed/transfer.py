"""Tokens that go from the ranks that have them to those that need them, and their gradients back."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._common.library import sum_dtype
from . import collectives
from .placement import Placement, Stretch


class Transfer(NamedTuple):
    """Who has which stretches of tokens, each rank's in ascending order, and who needs which."""

    stretches: list[list[Stretch]]
    reach: list[list[Stretch]]

    def _pieces(self, sender: int, receiver: int) -> Iterator[tuple[int, int, int]]:
        """(first among the sender's tokens, first among what the receiver has around it, tokens), in order."""
        starts = [stretch.start for stretch in self.stretches[sender]]
        firsts = [0]
        for stretch in self.stretches[sender]:
            firsts.append(firsts[-1] + stretch.length)
        around = 0
        for needed in self.reach[receiver]:
            index = max(bisect_right(starts, needed.start) - 1, 0)
            while index < len(starts) and starts[index] < needed.end:
                has = self.stretches[sender][index]
                start, end = max(has.start, needed.start), min(has.end, needed.end)
                if start < end:
                    yield firsts[index] + start - has.start, around + start - needed.start, end - start
                index += 1
            around += needed.length

    def fetch(self, tensor: Tensor, layout: Placement, what: str) -> Tensor:
        """``[n, heads, dim]`` of this rank's tokens to those of its ``reach``."""
        me, num_ranks = layout.rank, layout.num_ranks
        around = tensor.new_empty((sum(needed.length for needed in self.reach[me]), *tensor.shape[1:]))
        for first, place, count in self._pieces(me, me):
            around[place : place + count] = tensor[first : first + count]
        width, others = math.prod(tensor.shape[1:]), [rank for rank in range(num_ranks) if rank != me]
        outgoing = {rank: list(self._pieces(me, rank)) for rank in others}
        incoming = {rank: list(self._pieces(rank, me)) for rank in others}
        parts = [tensor[first : first + count].reshape(-1) for rank in others for first, _, count in outgoing[rank]]
        sizes = [
            [width * sum(count for _, _, count in pieces.get(rank, ())) for rank in range(num_ranks)]
            for pieces in (outgoing, incoming)
        ]
        sent = torch.cat(parts) if parts else tensor.new_empty(0)
        received = collectives.all_to_all(sent, sizes[0], sizes[1], layout.group, what)
        position = 0
        for rank in others:
            for _, place, count in incoming[rank]:
                part = around[place : place + count]
                part.copy_(received[position : position + part.numel()].view(part.shape))
                position += part.numel()
        return around

    def give_back(self, grad_around: Tensor, like: Tensor, layout: Placement, what: str) -> Tensor:
        """The transpose of :meth:`fetch`: sums, in the order of ranks, of what is in the dtype of sums."""
        me, num_ranks = layout.rank, layout.num_ranks
        width, others = math.prod(like.shape[1:]), [rank for rank in range(num_ranks) if rank != me]
        outgoing = {rank: list(self._pieces(rank, me)) for rank in others}
        incoming = {rank: list(self._pieces(me, rank)) for rank in range(num_ranks)}
        parts = [
            grad_around[place : place + count].reshape(-1).to(like.dtype)
            for rank in others
            for _, place, count in outgoing[rank]
        ]
        sent_sizes = [width * sum(count for _, _, count in outgoing.get(rank, ())) for rank in range(num_ranks)]
        received_sizes = [
            0 if rank == me else width * sum(count for _, _, count in incoming[rank]) for rank in range(num_ranks)
        ]
        sent = torch.cat(parts) if parts else like.new_empty(0)
        received = collectives.all_to_all(sent, sent_sizes, received_sizes, layout.group, what)
        total = torch.zeros(like.shape, dtype=sum_dtype(like.dtype), device=like.device)
        position = 0
        for rank in range(num_ranks):
            for first, place, count in incoming[rank]:
                part = total[first : first + count]
                if rank == me:
                    part += grad_around[place : place + count]
                else:
                    part += received[position : position + part.numel()].view(part.shape)
                    position += part.numel()
        return total.to(like.dtype)

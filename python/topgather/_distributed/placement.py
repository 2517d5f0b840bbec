"""Which tokens of a sequence the ranks of a group have."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._common import checks

PLACEMENTS = ("contiguous", "zigzag")


class Stretch(NamedTuple):
    """Tokens of a rank that follow each other in the sequence."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Placement(NamedTuple):
    """Which tokens each rank of a group has, in the order in which it has them."""

    group: dist.ProcessGroup
    rank: int
    stretches: list[list[Stretch]]

    @property
    def num_ranks(self) -> int:
        return len(self.stretches)

    @property
    def mine(self) -> list[Stretch]:
        return self.stretches[self.rank]

    def num_tokens(self, rank: int) -> int:
        return sum(stretch.length for stretch in self.stretches[rank])

    @property
    def total(self) -> int:
        return sum(self.num_tokens(rank) for rank in range(self.num_ranks))


def zigzag(num_tokens: int, num_ranks: int) -> list[list[Stretch]]:
    """The sequence in 2 R stretches as equal as can be; rank r has stretches r and 2 R - 1 - r."""
    size, longer = divmod(num_tokens, 2 * num_ranks)
    starts = [i * size + min(i, longer) for i in range(2 * num_ranks + 1)]
    stretches = [Stretch(start, end - start) for start, end in pairwise(starts)]
    return [[stretches[rank], stretches[2 * num_ranks - 1 - rank]] for rank in range(num_ranks)]


def contiguous(lengths: list[int]) -> list[list[Stretch]]:
    """One stretch a rank."""
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [[Stretch(start, length)] for start, length in zip(starts, lengths, strict=True)]


def group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; name one, as in mesh['cp']")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def check_placement(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")


def shard_sequence(
    tensor: Tensor, mesh: DeviceMesh | dist.ProcessGroup, dim: int, placement: str = "contiguous"
) -> Tensor:
    """This rank's tokens of a tensor that has those of all ranks.

    Args:
        tensor: any shape, the same on all ranks.
        mesh: a mesh of one dimension, or a group.
        dim: the dimension of tokens.
        placement: ``"contiguous"``: rank r has the r-th of as many parts as there are ranks; ``"zigzag"``: the r-th of
            twice as many, and the r-th from the end, which balances the work of causal attention. Parts differ by at
            most one token, earlier ones being longer.

    Returns:
        A new tensor with fewer tokens. No communication; differentiable.

    Raises:
        TypeError: ``mesh`` is neither a mesh nor a group.
        ValueError: a mesh of several dimensions, or an unknown ``placement``.
    """
    checks.check_tensor("tensor", tensor)
    check_placement(placement)
    group = group_of(mesh)
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if placement == "contiguous":
        return tensor.tensor_split(num_ranks, dim)[rank].contiguous()
    return torch.cat([tensor.narrow(dim, *stretch) for stretch in zigzag(tensor.size(dim), num_ranks)[rank]], dim)


def placement_of(placement: str, group: dist.ProcessGroup, lengths: list[int]) -> Placement:
    rank = dist.get_rank(group)
    if placement == "contiguous":
        return Placement(group, rank, contiguous(lengths))
    found = Placement(group, rank, zigzag(sum(lengths), len(lengths)))
    expected = [found.num_tokens(other) for other in range(len(lengths))]
    if lengths != expected:
        raise ValueError(f"zigzag placement of {sum(lengths)} tokens gives the ranks {expected}, got {lengths}")
    return found

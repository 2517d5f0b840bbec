"""What the sharded ops tell each other before and while they send: facts that must agree, flat parts to each rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# The newer name of the same.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_numbers(numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """For each of the numbers, those of all ranks. The host waits."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = mine.new_empty(dist.get_world_size(group) * len(numbers))
    all_gather(gathered, mine, group=group)
    return [list(column) for column in zip(*gathered.view(-1, len(numbers)).tolist(), strict=True)]


def require_same(meanings: Iterable[str], columns: Iterable[list[int]]) -> None:
    """Raise ``ValueError``, the same on all ranks, for the first meaning whose numbers differ by rank."""
    for meaning, column in zip(meanings, columns, strict=False):
        if len(set(column)) > 1:
            raise ValueError(f"all ranks of the group must have the same {meaning}, got {column} by rank")


def all_to_all(sent: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Flat parts to each rank against flat parts from each."""
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    return received

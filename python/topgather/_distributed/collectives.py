"""What the sharded ops tell each other before and while they send: facts that must agree, flat parts to each rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The newer name of the same.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_counts: list[dict[str, int]] = []


@contextmanager
def count_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes that this process's calls of :mod:`topgather.distributed` send to other ranks.

    Yields:
        A dict that grows: ``"all_gather"`` and ``"all_to_all"``, in bytes. What ranks agree on before a call counts
        too.
    """
    counts = {"all_gather": 0, "all_to_all": 0}
    _counts.append(counts)
    try:
        yield counts
    finally:
        # Not the first that is equal: one around it may have counted the same.
        _counts[:] = [other for other in _counts if other is not counts]


def _count(name: str, num_bytes: int) -> None:
    for counts in _counts:
        counts[name] += num_bytes


def all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """What each rank sends, one after the other, on all ranks."""
    _count("all_gather", sent.nbytes * (dist.get_world_size(group) - 1))
    return _all_gather(received, sent, group=group, async_op=async_op)


@contextmanager
def naming(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """What a backend raises, such as a timeout because a rank has died, begins with what it was doing."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        kind = type(error) if isinstance(error, dist.DistError) else RuntimeError
        raise kind(f"topgather: {what} failed on rank {dist.get_rank(group)} of the group: {error}") from error


def agreement_device(group: dist.ProcessGroup) -> torch.device:
    """Where facts are gathered. Not the tensors': what one rank passes may be no tensor, or on another device."""
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def gather_numbers(
    numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device, what: str
) -> list[list[int]]:
    """For each of the numbers, those of all ranks. The host waits."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = mine.new_empty(dist.get_world_size(group) * len(numbers))
    with naming(what, group):
        all_gather(gathered, mine, group=group)
        return [list(column) for column in zip(*gathered.view(-1, len(numbers)).tolist(), strict=True)]


_KINDS: dict[str, type[Exception]] = {"TypeError": TypeError, "IndexError": IndexError}


def require_same(meanings: Iterable[str], columns: Iterable[list[int]]) -> None:
    """Raise ``ValueError``, the same on all ranks, for the first meaning whose numbers differ by rank."""
    for meaning, column in zip(meanings, columns, strict=False):
        if len(set(column)) > 1:
            raise ValueError(f"all ranks of the group must have the same {meaning}, got {column} by rank")


def raise_everywhere(error: Exception | None, has_error: Sequence[int], group: dist.ProcessGroup, what: str) -> None:
    """Raise on every rank what one was refused for; ``has_error`` says of each whether it was."""
    if not any(has_error):
        return
    # Rare, and the same on all ranks: what was refused, in words.
    texts: list[tuple[str, str] | None] = [None] * len(has_error)
    with naming(what, group):
        dist.all_gather_object(texts, None if error is None else (type(error).__name__, str(error)), group=group)
    if error is not None:
        raise error
    rank = next(rank for rank, is_refused in enumerate(has_error) if is_refused)
    kind, text = texts[rank] or ("ValueError", "")
    raise _KINDS.get(kind, ValueError)(f"rank {rank} of the group was refused: {text}")


def all_to_all(
    sent: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup, what: str
) -> Tensor:
    """Flat parts to each rank against flat parts from each."""
    received = sent.new_empty(sum(received_sizes))
    _count("all_to_all", (sent.numel() - sent_sizes[dist.get_rank(group)]) * sent.element_size())
    with naming(what, group):
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    return received

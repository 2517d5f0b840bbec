"""Ranks that are threads of one process, for many small cases of what real ones are too slow for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from topgather._distributed import attention, collectives, context, placement


class PretendedGroup:
    """A rank's view of a group: what ranks post under one number of a collective all of them see."""

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        self.rank, self.shared = rank, shared

    def post(self, value: Any) -> list[Any]:
        self.shared["posted"][self.rank] = value
        self.shared["barrier"].wait()
        everything = list(self.shared["posted"])
        self.shared["barrier"].wait()
        return everything


class _Done:
    def wait(self) -> None:
        pass


def _all_gather(received: Tensor, sent: Tensor, group: PretendedGroup, async_op: bool = False) -> _Done:
    received.copy_(torch.cat(group.post(sent.clone())).view(received.shape))
    return _Done()


def _all_to_all(
    received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], group: PretendedGroup
) -> None:
    posted = group.post(sent.clone().split(sent_sizes))
    parts = [parts[group.rank] for parts in posted]
    assert [part.numel() for part in parts] == received_sizes
    received.copy_(torch.cat(parts))


def _all_gather_object(gathered: list[Any], sent: Any, group: PretendedGroup) -> None:
    gathered[:] = group.post(sent)


def on_pretended_ranks(num_ranks: int, run: Callable[[Any], Any]) -> list[Any]:
    """``run(group)`` on every rank; results by rank. What one raises is raised."""
    shared = {"posted": [None] * num_ranks, "barrier": threading.Barrier(num_ranks, timeout=20)}
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = run(PretendedGroup(rank, shared))
        except BaseException as error:
            errors.append(error)
            shared["barrier"].abort()

    with (
        mock.patch.object(collectives, "_all_gather", _all_gather),
        mock.patch.object(dist, "all_to_all_single", _all_to_all),
        mock.patch.object(dist, "all_gather_object", _all_gather_object),
        mock.patch.object(dist, "get_rank", lambda group: group.rank),
        mock.patch.object(dist, "get_world_size", lambda group: num_ranks),
        mock.patch.object(dist, "get_backend", lambda group: "pretended"),
        mock.patch.object(attention, "group_of", lambda mesh: mesh),
        mock.patch.object(context, "group_of", lambda mesh: mesh),
        mock.patch.object(placement, "group_of", lambda mesh: mesh),
    ):
        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results

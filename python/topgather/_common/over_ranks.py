"""What layers attend with while sequences are spread over ranks: ``topgather.distributed.context_parallel`` sets it.

Knows no ``torch.distributed``, which layers must not import. Set for the whole process: backward passes, which repeat
what was checkpointed, run in threads of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class OverRanks(Protocol):
    """Attention and convolution of this rank's tokens among those of all."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_size: int,
        top_k: int | None,
        is_causal: bool = True,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """``[B, H, n, D]`` to ``[B, H, n, Dv]``; with ``cu_seqlens`` ``[n, H, D]`` to ``[n, H, Dv]``."""
        ...

    def key_conv(self, key: Tensor, weight: Tensor) -> Tensor:
        """``[B, H, n, D]`` to the same."""
        ...

    def positions(self, like: Tensor) -> Tensor | None:
        """``[n]`` where this rank's tokens stand, if that is known, where ``like`` is."""
        ...


_active: list[OverRanks] = []


def active() -> OverRanks | None:
    """What to attend with; None: as ever."""
    return _active[-1] if _active else None


@contextmanager
def attending(over_ranks: OverRanks) -> Iterator[None]:
    """While open, layers attend with ``over_ranks``."""
    _active.append(over_ranks)
    try:
        yield
    finally:
        _active.remove(over_ranks)

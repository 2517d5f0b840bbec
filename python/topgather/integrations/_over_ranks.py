"""Models in ``topgather.distributed.context_parallel``: what the attention function does with one rank's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._common.over_ranks import OverRanks
from . import _forward
from ._arguments import Scores, by_us
from ._attend import Settings
from ._models import is_local


def check_mask_over_ranks(attention_mask: Tensor | None, local_size: int | None) -> None:
    """Raise ``ValueError`` for masks that would need the tokens of other ranks."""
    if local_size is not None:
        raise ValueError("layers that attend to a window or chunk are not supported within context_parallel")
    if attention_mask is not None and (attention_mask.ndim != 2 or not bool(attention_mask.all())):
        raise ValueError("attention_mask must leave out no token within context_parallel: pack sequences instead")


def check_over_ranks(
    module: nn.Module,
    ranks: OverRanks,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    layer: Any,
    arguments: dict[str, Any],
) -> None:
    """Raise ``ValueError`` for what attention over ranks does not know."""
    where = f"within context_parallel {by_us(module)}"
    if attention_mask is not None:
        raise ValueError(f"attention_mask must be None {where}")
    if is_local(module, arguments.get("sliding_window")):
        raise ValueError(f"sliding_window must be None {where}")
    if layer is not None or query.shape[2] != key.shape[2]:
        raise ValueError(f"use_cache must be False {where}: topgather.distributed.ShardedCache decodes over ranks")
    if arguments.get("block_indices") is not None:
        raise ValueError(f"block_indices must be None {where}")
    if arguments.get("seq_idx") is not None:
        raise ValueError(f"seq_idx must be None {where}: cu_seq_lens_q, of all ranks' tokens, tells packed sequences")
    positions = arguments.get("position_ids")
    if arguments.get("cu_seq_lens_q") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    if not _forward.remembered(_are_of_rank, positions, ranks):
        raise ValueError(
            f"position_ids must be those of this rank's tokens {where}: put torch.arange(tokens) among buffers and "
            f"hand it to the model"
        )


def _are_of_rank(positions: Tensor, ranks: OverRanks) -> bool:
    expected = ranks.positions(positions)
    return expected is None or torch.equal(positions, expected.to(positions.dtype).expand_as(positions))


def attend_over_ranks(
    ranks: OverRanks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scores: Scores,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """``[B, H, n, D]`` to ``[B, H, n, Dv]``; dense layers attend to every block."""
    if settings.of_op != Settings(settings.block_size, settings.top_k).of_op:
        raise ValueError(
            "force_first, force_last and window must be 0, 1 and None within context_parallel, got "
            f"{settings.force_first}, {settings.force_last} and {settings.window}"
        )
    options: dict[str, Any] = {"block_size": settings.block_size, "top_k": settings.top_k, **scores.of_op}
    if cu_seqlens is None:
        return ranks.attend(query, key, value, **options)
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q needs a batch of one row that holds all sequences, got {query.shape[0]} rows")
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return ranks.attend(*packed, cu_seqlens=cu_seqlens, **options).transpose(0, 1)[None]

"""A multi-head attention layer whose key blocks are chosen by a trained indexer."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from .._common import checks
from ..ops import BlockRouting, index_loss, index_route, moba_attention, replay
from ..ops.indexer import index_route_op
from ._init import reset_modules
from .moba import PositionEmbedding, sizes_of_heads

STAGES = ("dense", "sparse")


class IndexedAttention(nn.Module):
    """Block attention with an indexer (MiniMax Sparse Attention, arXiv 2606.13392) and all projections.

    Beside queries, keys and values ``x [B, N, dim]`` is projected to an index query for each key head and one index
    key. They choose ``top_k`` key blocks for each key head (:func:`topgather.index_route`), which all its query heads
    attend to. The choice has no gradient: the indexer learns from :func:`topgather.index_loss`, of which the forward
    returns the value. It reads ``x`` detached, so that loss trains the indexer alone and the others' loss everything
    else; add both and call ``backward`` once::

        out, index_loss = layer(x, stage="dense")    # some steps, then "sparse"
        (task_loss(out) + index_loss).backward()

    Queries, keys, index queries and index keys pass through an ``nn.RMSNorm`` each, over a head's channels.

    Args:
        dim: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, and index query heads, a divisor of ``num_heads``; ``num_heads`` if None.
        head_dim: channels of a head; ``dim // num_heads`` if None, which ``num_heads`` must then divide.
        index_dim: channels of an index head; ``head_dim`` if None. On CUDA at most 256.
        block_size: keys per block, at least 1.
        top_k: blocks per query, the forced ones included, at least 1.
        reduction: ``"max"`` or ``"mean"`` of an index query's products with a block's keys.
        force_first: how many of the first blocks are always chosen.
        force_last: how many of the newest blocks are, with ``is_causal``; with ``force_first`` at most ``top_k``.
        bias: whether the four projections of attention add a bias; those of the indexer never do.
        is_causal: whether a token sees only itself and earlier tokens.
        position_embedding: for example a rotary embedding. Called on ``query [B, num_heads, N, head_dim]`` and ``key
            [B, num_kv_heads, N, head_dim]``, then on the index query ``[B, num_kv_heads, N, index_dim]`` and the index
            key ``[B, 1, N, index_dim]``; returns both in the same shapes. An ``nn.Module`` becomes a submodule. None
            leaves them as they are.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, more forced blocks than ``top_k``, ``num_kv_heads`` that does not divide
            ``num_heads``, ``num_heads`` that does not divide ``dim`` where ``head_dim`` is None, or another
            ``reduction``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        index_dim: int | None = None,
        block_size: int = 128,
        top_k: int = 16,
        reduction: str = "max",
        force_first: int = 0,
        force_last: int = 1,
        bias: bool = False,
        is_causal: bool = True,
        position_embedding: PositionEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = sizes_of_heads(dim, num_heads, num_kv_heads, head_dim)
        if index_dim is None:
            index_dim = head_dim
        checks.check_count("index_dim", index_dim)
        checks.check_count("block_size", block_size)
        checks.check_count("top_k", top_k)
        if not isinstance(reduction, str):
            raise TypeError(f"reduction must be a str, got {type(reduction).__name__}")
        if reduction not in ("max", "mean"):
            raise ValueError(f"reduction must be 'max' or 'mean', got {reduction!r}")
        checks.check_count("force_first", force_first, least=0)
        checks.check_flag("is_causal", is_causal)
        if force_first + checks.forced_last(force_last, is_causal) > top_k:
            raise ValueError(
                f"force_first and force_last must together be at most top_k, {top_k}, got {force_first} and "
                f"{force_last}"
            )
        checks.check_flag("bias", bias)
        if position_embedding is not None and not callable(position_embedding):
            raise TypeError(f"position_embedding must be callable or None, got {type(position_embedding).__name__}")

        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.index_dim = index_dim
        self.block_size = block_size
        self.top_k = top_k
        self.reduction = reduction
        self.force_first = force_first
        self.force_last = force_last
        self.is_causal = is_causal
        self.position_embedding = position_embedding
        query_dim, key_dim = num_heads * head_dim, num_kv_heads * head_dim
        self.query_proj = nn.Linear(dim, query_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj = nn.Linear(dim, key_dim, bias=bias, device=device, dtype=dtype)
        self.value_proj = nn.Linear(dim, key_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(query_dim, dim, bias=bias, device=device, dtype=dtype)
        self.index_query_proj = nn.Linear(dim, num_kv_heads * index_dim, bias=False, device=device, dtype=dtype)
        self.index_key_proj = nn.Linear(dim, index_dim, bias=False, device=device, dtype=dtype)
        self.query_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype)
        self.key_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype)
        self.index_query_norm = nn.RMSNorm(index_dim, device=device, dtype=dtype)
        self.index_key_norm = nn.RMSNorm(index_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew but those of ``position_embedding``, which is the caller's."""
        reset_modules(self.query_proj, self.key_proj, self.value_proj, self.out_proj)
        reset_modules(self.index_query_proj, self.index_key_proj)
        reset_modules(self.query_norm, self.key_norm, self.index_query_norm, self.index_key_norm)

    def indexer_parameters(self) -> list[nn.Parameter]:
        """What the loss of the indexer trains, for an optimizer's group of their own."""
        modules = (self.index_query_proj, self.index_key_proj, self.index_query_norm, self.index_key_norm)
        return [parameter for module in modules for parameter in module.parameters()]

    @overload
    def forward(self, x: Tensor, stage: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, stage: Literal["dense", "sparse"]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, stage: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each sequence of ``x [B, N, dim]``; returns ``[B, N, dim]`` in the dtype of ``x``.

        Args:
            x: the input.
            stage: None: attend to the chosen blocks. ``"sparse"``: the same, and return the loss of the indexer over
                them. ``"dense"``, the warm-up: attend to everything, and return its loss over all blocks.

        Returns:
            The output, or the pair of output and loss.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers, or ``stage`` not a str.
            ValueError: ``x`` has not the shape ``[B, N, dim]``, or ``stage`` is another.
        """
        checks.check_tensor("x", x)
        checks.check_ndim("x", x, 3, "[batch, tokens, dim]")
        checks.check_floating("x", x)
        checks.check_size("x", x, 2, self.dim, "dim of the layer")
        if stage is not None and not isinstance(stage, str):
            raise TypeError(f"stage must be a str or None, got {type(stage).__name__}")
        if stage not in (None, *STAGES):
            raise ValueError(f"stage must be 'dense', 'sparse' or None, got {stage!r}")
        query = self.query_norm(self._split_heads(self.query_proj(x), self.head_dim))
        key = self.key_norm(self._split_heads(self.key_proj(x), self.head_dim))
        value = self._split_heads(self.value_proj(x), self.head_dim)
        index_query = self.index_query_norm(self._split_heads(self.index_query_proj(x.detach()), self.index_dim))
        index_key = self.index_key_norm(self._split_heads(self.index_key_proj(x.detach()), self.index_dim))
        if self.position_embedding is not None:
            query, key = self.position_embedding(query, key)
            index_query, index_key = self.position_embedding(index_query, index_key)
        routing = None if stage == "dense" else self._choose(index_query, index_key, query)
        out, lse = moba_attention(
            query, key, value, self.block_size, is_causal=self.is_causal, routing=routing, return_lse=True
        )
        # The op lays its output out as the query is, so the heads of a token already lie side by side.
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        if stage is None:
            return projected
        loss = index_loss(
            index_query,
            index_key,
            query.detach(),
            key.detach(),
            lse.detach(),
            routing,
            self.block_size,
            self.reduction,
            self.is_causal,
        )
        return projected, loss

    def _choose(self, index_query: Tensor, index_key: Tensor, query: Tensor) -> BlockRouting:
        """By the indexer; inside ``record_routing`` and ``replay_routing``, and in checkpoints, as those say."""
        last = checks.forced_last(self.force_last, self.is_causal)
        options = (self.block_size, self.top_k, self.reduction, self.is_causal, self.force_first, last)
        if not replay.state.is_watched:
            return index_route(index_query, index_key, *options)
        per_query = (query.size(0), self.num_heads, query.size(2))
        call = replay.Call(per_query, self.num_kv_heads, query.size(2), self.block_size, self.top_k, query.device)
        arguments = (index_query, index_key, *options, self.num_kv_heads)
        return BlockRouting(replay.choose(index_route_op, arguments, call), self.block_size)

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, index_dim={self.index_dim}, block_size={self.block_size}, "
            f"top_k={self.top_k}, reduction={self.reduction!r}, force_first={self.force_first}, "
            f"force_last={self.force_last}, is_causal={self.is_causal}"
        )

    def _split_heads(self, projected: Tensor, head_dim: int) -> Tensor:
        """``[B, N, heads * head_dim]`` as a view ``[B, heads, N, head_dim]``."""
        return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)

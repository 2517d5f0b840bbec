"""A multi-head attention layer whose heads are block attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._common import checks, over_ranks
from ..ops import key_conv, moba_attention
from ..ops.key_conv import MAX_WIDTH, MIN_WIDTH
from ._init import reset_modules

PositionEmbedding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sizes_of_heads(dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """``num_kv_heads`` and ``head_dim`` of a layer of attention, those that are None by its other sizes."""
    checks.check_count("dim", dim)
    checks.check_count("num_heads", num_heads)
    if num_kv_heads is None:
        num_kv_heads = num_heads
    checks.check_count("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")
    if head_dim is None:
        if dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, {dim}, unless head_dim is given, got {num_heads}")
        head_dim = dim // num_heads
    checks.check_count("head_dim", head_dim)
    return num_kv_heads, head_dim


class MobaAttention(nn.Module):
    """Multi-head block attention (MoBA, arXiv 2502.13189, section 2) with its four projections.

    Takes the place of a dense self-attention layer: ``x [B, N, dim]`` is projected to queries, keys and
    values, each query attends to ``top_k`` key blocks (causal: its own and the best-scoring earlier ones),
    and the heads are projected back to ``[B, N, dim]``. Splitting and joining heads costs no copy.

    Args:
        dim: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; ``num_heads`` if None.
        head_dim: channels of a head; ``dim // num_heads`` if None, which ``num_heads`` must then divide.
        block_size: keys per block, at least 1.
        top_k: blocks per query, the own one included, at least 1.
        bias: whether the four projections add a bias.
        is_causal: whether a token sees only itself and earlier tokens.
        position_embedding: for example a rotary embedding. Called on ``query [B, num_heads, N, head_dim]``
            and ``key [B, num_kv_heads, N, head_dim]`` before the blocks are chosen; returns both in the same
            shapes. An ``nn.Module`` becomes a submodule. None leaves them as they are.
        kernel_size: taps of a short causal convolution of the keys (:func:`topgather.key_conv`; FlashMoBA, arXiv
            2511.11571, has 3 and 5), from 2 to 8. It sees the keys as the choice of blocks would, after
            ``position_embedding``, so that a cache can apply it to the keys it is given. Its weight
            ``key_conv_weight [num_kv_heads, head_dim, kernel_size]`` starts as zeros, which change no key and have a
            gradient. None: no convolution.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, a ``kernel_size`` out of range, ``num_kv_heads`` that does not divide
            ``num_heads``, or ``num_heads`` that does not divide ``dim`` where ``head_dim`` is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block_size: int = 128,
        top_k: int = 8,
        bias: bool = False,
        is_causal: bool = True,
        position_embedding: PositionEmbedding | None = None,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = sizes_of_heads(dim, num_heads, num_kv_heads, head_dim)
        checks.check_count("block_size", block_size)
        checks.check_count("top_k", top_k)
        checks.check_flag("bias", bias)
        checks.check_flag("is_causal", is_causal)
        if position_embedding is not None and not callable(position_embedding):
            raise TypeError(f"position_embedding must be callable or None, got {type(position_embedding).__name__}")
        if kernel_size is not None:
            checks.check_count("kernel_size", kernel_size)
            if not MIN_WIDTH <= kernel_size <= MAX_WIDTH:
                raise ValueError(f"kernel_size must be between {MIN_WIDTH} and {MAX_WIDTH}, got {kernel_size}")

        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.top_k = top_k
        self.is_causal = is_causal
        self.position_embedding = position_embedding
        self.kernel_size = kernel_size
        query_dim, key_dim = num_heads * head_dim, num_kv_heads * head_dim
        self.query_proj = nn.Linear(dim, query_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj = nn.Linear(dim, key_dim, bias=bias, device=device, dtype=dtype)
        self.value_proj = nn.Linear(dim, key_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(query_dim, dim, bias=bias, device=device, dtype=dtype)
        if kernel_size is None:
            self.register_parameter("key_conv_weight", None)
        else:
            taps = torch.empty(num_kv_heads, head_dim, kernel_size, device=device, dtype=dtype)
            self.key_conv_weight = nn.Parameter(taps)
        self._reset_own()

    def _reset_own(self) -> None:
        if self.key_conv_weight is not None:
            nn.init.zeros_(self.key_conv_weight)

    def reset_parameters(self) -> None:
        """Draw all parameters anew but those of ``position_embedding``, which is the caller's."""
        self._reset_own()
        reset_modules(self.query_proj, self.key_proj, self.value_proj, self.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sequence of ``x [B, N, dim]``; returns ``[B, N, dim]`` in the dtype of ``x``.

        Within ``topgather.distributed.context_parallel`` ``x`` has the tokens of this rank.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: ``x`` has not the shape ``[B, N, dim]``.
        """
        checks.check_tensor("x", x)
        checks.check_ndim("x", x, 3, "[batch, tokens, dim]")
        checks.check_floating("x", x)
        checks.check_size("x", x, 2, self.dim, "dim of the layer")
        query = self._split_heads(self.query_proj(x), self.num_heads)
        key = self._split_heads(self.key_proj(x), self.num_kv_heads)
        value = self._split_heads(self.value_proj(x), self.num_kv_heads)
        if self.position_embedding is not None:
            query, key = self.position_embedding(query, key)
        ranks = over_ranks.active()
        if self.key_conv_weight is not None:
            convolve = key_conv if ranks is None else ranks.key_conv
            key = convolve(key, self.key_conv_weight)
        attend = moba_attention if ranks is None else ranks.attend
        out = attend(query, key, value, block_size=self.block_size, top_k=self.top_k, is_causal=self.is_causal)
        # The op lays its output out as the query is, so the heads of a token already lie side by side.
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, block_size={self.block_size}, top_k={self.top_k}, "
            f"is_causal={self.is_causal}" + ("" if self.kernel_size is None else f", kernel_size={self.kernel_size}")
        )

    def _split_heads(self, projected: Tensor, num_heads: int) -> Tensor:
        """``[B, N, num_heads * head_dim]`` as a view ``[B, num_heads, N, head_dim]``."""
        return projected.view(*projected.shape[:2], num_heads, self.head_dim).transpose(1, 2)

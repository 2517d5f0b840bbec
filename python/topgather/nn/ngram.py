"""An n-gram memory: the last tokens, hashed, choose rows of trained tables, and the context gates them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import checks
from ..ops import memory_lookup, ngram_table_rows
from ..ops.ngram import (
    NO_TOKEN,
    STATE_OF_PACKED,
    check_tables,
    check_tokens,
    check_vocabulary,
    hash_ngrams,
    place_in_document,
)
from ._init import FanInNormalLinear, reset_modules
from ._tables import SparseTables, TableModule, check_number

SEED_STEP = 10007
"""By which the seeds of layers differ."""


class NgramState(NamedTuple):
    """What a :class:`NgramMemory` has to know of the tokens before a call.

    Args:
        tokens: ``[B, max(orders) - 1]`` int64, the last tokens.
        values: ``[B, (kernel_size - 1) * max(orders), num_streams * dim]``, what the convolution last read.
    """

    tokens: Tensor
    values: Tensor


class _StreamNorm(nn.Module):
    """Root mean square normalisation of each stream, with a scale for every channel of all streams."""

    def __init__(
        self, num_streams: int, dim: int, eps: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_streams, dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., num_streams, dim]``."""
        return F.rms_norm(x, (x.size(-1),), None, self.eps) * self.weight


class NgramMemory(TableModule):
    """Tables of n-grams with a gate and a short convolution (Engram, arXiv 2601.07372; the numbers are those of the
    per-layer embedding of ``qwen4_exp`` in transformers).

    The n-grams that end at a token are hashed to a row in each of ``len(orders) * num_tables`` tables
    (:func:`topgather.ngram_hash`), and the rows stand side by side as the token's embedding ``e [embed_dim]``. With
    ``x`` what the model knows of the token,

        ``g = dot(norm(key_proj(e)), norm(x)) / sqrt(dim)``
        ``v = sigmoid(sign(g) * sqrt(max(abs(g), 1e-6))) * value_proj(e)``
        ``out_t = v_t + silu(sum_l conv_weight[:, kernel_size - 1 - l] * norm(v)_(t - l * max(orders)))``

    with root mean square norms that have scales. What is read depends on tokens alone, so that a table in host memory
    can be read ahead. The output is added to ``x`` by whoever calls.

    Args:
        dim: channels of a stream.
        vocab_size: of the tokens, from 1 to 2**31.
        orders: lengths of n-grams, ascending.
        num_tables: of each order.
        rows: no table has fewer; they have :func:`topgather.ngram_table_rows` of it.
        embed_dim: channels of the rows of all tables together, a multiple of ``len(orders) * num_tables``; ``dim`` if
            None.
        kernel_size: taps of the convolution, ``max(orders)`` tokens apart.
        num_streams: how many residual streams ``x`` has, side by side (hyper-connections). Each has a gate of its own.
        end_token: the token that ends documents: n-grams do not reach over it. The convolution does. None: no token.
        layer_idx: of this layer among those with n-gram memories: each hashes differently.
        seed: of the hashes.
        eps: of the norms.
        sparse_grad: whether ``values`` gets a sparse gradient: see :class:`MemoryPool`.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Attributes:
        values: ``[sum(table_rows), embed_dim / (len(orders) * num_tables)]``, all tables one after the other, at first
            normal with a standard deviation of the inverse root of its columns. It is in the group ``"values"`` of
            :func:`memory_parameter_groups`, and row optimizers take it.
        table_rows: how many rows each table has.
        conv_weight: ``[num_streams * dim, kernel_size]``, the last tap that of the current token, at first 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size out of range, or an ``embed_dim`` that does not divide.
    """

    TABLES: ClassVar[dict[str, str]] = {"values": "values"}

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        orders: Sequence[int] = (2, 3),
        num_tables: int = 8,
        rows: int = 2**16,
        embed_dim: int | None = None,
        kernel_size: int = 4,
        num_streams: int = 1,
        end_token: int | None = None,
        layer_idx: int = 0,
        seed: int = 1234,
        eps: float = 1e-6,
        sparse_grad: bool | str = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim)
        check_vocabulary(vocab_size, end_token)
        num_all_tables = len(check_tables(orders, num_tables, rows))
        checks.check_count("rows", rows)
        embed_dim = dim if embed_dim is None else embed_dim
        checks.check_count("embed_dim", embed_dim)
        if embed_dim % num_all_tables != 0:
            raise ValueError(f"embed_dim must be a multiple of the number of tables, {num_all_tables}, got {embed_dim}")
        checks.check_count("kernel_size", kernel_size)
        checks.check_count("num_streams", num_streams)
        checks.check_count("layer_idx", layer_idx, least=0)
        checks.check_count("seed", seed, least=0)
        check_number("eps", eps)
        checks.check_sparse_grad(sparse_grad)
        self.dim = dim
        self.vocab_size = vocab_size
        self.orders = tuple(orders)
        self.num_tables = num_tables
        self.embed_dim = embed_dim
        self.kernel_size = kernel_size
        self.num_streams = num_streams
        self.end_token = end_token
        self.seed = seed + SEED_STEP * layer_idx
        self.sparse_grad = sparse_grad
        self.table_rows = ngram_table_rows(rows, num_all_tables, layer_idx * num_all_tables)
        width = embed_dim // num_all_tables
        self.values = nn.Parameter(torch.empty(sum(self.table_rows), width, device=device, dtype=dtype))
        self.key_proj = FanInNormalLinear(embed_dim, num_streams * dim, bias=False, device=device, dtype=dtype)
        self.value_proj = FanInNormalLinear(embed_dim, dim, bias=False, device=device, dtype=dtype)
        self.key_norm = _StreamNorm(num_streams, dim, eps, device, dtype)
        self.query_norm = _StreamNorm(num_streams, dim, eps, device, dtype)
        self.conv_norm = _StreamNorm(num_streams, dim, eps, device, dtype)
        self.conv_weight = nn.Parameter(torch.empty(num_streams * dim, kernel_size, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.values, std=self.values.size(1) ** -0.5)
        nn.init.zeros_(self.conv_weight)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_own()
        reset_modules(self.key_proj, self.value_proj, self.key_norm, self.query_norm, self.conv_norm)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ``nn.Module.named_modules``; with ``sparse_grad`` the table comes first, as :class:`PeerMemory` has it.

        Args:
            memo: modules already met, which are left out; extended. Default: none.
            prefix: put before every name. Default: empty.
            remove_duplicate: whether a module that stands in several places comes once. Default: ``True``.
        """
        if self._gives_sparse and (memo is None or self not in memo) and not torch.compiler.is_compiling():
            yield prefix, SparseTables(self, ("values",))
        yield from super().named_modules(memo, prefix, remove_duplicate)

    @property
    def _gives_sparse(self) -> bool:
        return bool(self.sparse_grad) and self._are_parameters("values")

    @property
    def _absent(self) -> int:
        """What stands for a token that is not there."""
        return NO_TOKEN if self.end_token is None else self.end_token

    @property
    def _state_length(self) -> int:
        return (self.kernel_size - 1) * self.orders[-1]

    def make_state(self, batch_size: int) -> NgramState:
        """The state before any token, for the first of several calls.

        Args:
            batch_size: sequences that are continued side by side.

        Raises:
            TypeError: ``batch_size`` is no int.
            ValueError: it is below 0.
        """
        checks.check_count("batch_size", batch_size, least=0)
        weight: Tensor = self.conv_weight
        tokens = torch.full((batch_size, self.orders[-1] - 1), self._absent, dtype=torch.int64, device=weight.device)
        return NgramState(tokens, weight.new_zeros(batch_size, self._state_length, weight.size(0)))

    def rows_of(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Rows of ``values`` that a call without a state reads: to prefetch, or to know which ones to train.

        Args:
            tokens: ``[B, N]``, or packed ``[total]`` with ``cu_seqlens``.
            cu_seqlens: as in :meth:`forward`.

        Returns:
            ``[B, N, len(orders) * num_tables]`` int64, or ``[total, ...]``.
        """
        check_tokens(tokens, cu_seqlens)
        place = None if cu_seqlens is None else place_in_document(tokens.size(0), cu_seqlens)
        return self._hash(tokens, place, None)[0]

    def _hash(self, tokens: Tensor, place: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return hash_ngrams(
            tokens, self.orders, self.table_rows, place, state, self.vocab_size, self.end_token, self.seed
        )

    @overload
    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        state: None = None,
        mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, tokens: Tensor, cu_seqlens: None = None, *, state: NgramState, mask: Tensor | None = None
    ) -> tuple[Tensor, NgramState]: ...

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        state: NgramState | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, NgramState]:
        """What the last tokens add to ``x``.

        Args:
            x: ``[B, N, num_streams * dim]``, or packed ``[total, num_streams * dim]`` with ``cu_seqlens``.
            tokens: ``[B, N]`` or ``[total]``, int64 or int32.
            cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where packed documents start and end: neither n-grams
                nor the convolution reach from one into another. None: ``x`` is dense.
            state: of :meth:`make_state`, or of the call before. Dense tokens only.
            mask: bool, as ``tokens``; False for padding before a sequence, as batches of prompts have it. Padding
                counts as no token, and its ``out`` is what the convolution makes of zeros. None: there is none.

        Returns:
            ``out`` in the shape and dtype of ``x``; with ``state`` the pair of it and the next call's state.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, ``state`` beside ``cu_seqlens``, or what :func:`topgather.ngram_hash` refuses.
        """
        check_tokens(tokens, cu_seqlens)
        checks.check_tensor("x", x)
        checks.check_floating("x", x)
        if tuple(x.shape) != (*tokens.shape, self.num_streams * self.dim):
            expected = [*tokens.shape, self.num_streams * self.dim]
            raise ValueError(f"x must have shape {expected}, tokens and channels of all streams, got {tuple(x.shape)}")
        if mask is not None:
            checks.check_tensor("mask", mask)
            checks.check_dtype("mask", mask, torch.bool)
            if mask.shape != tokens.shape:
                raise ValueError(f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}")
            tokens = torch.where(mask, tokens, self._absent)
        if state is not None:
            if not isinstance(state, NgramState):
                raise TypeError(
                    f"state must be what make_state or a call before returned, or None, got {type(state).__name__}"
                )
            if cu_seqlens is not None:
                raise ValueError(STATE_OF_PACKED)
        place = None if cu_seqlens is None else place_in_document(tokens.size(0), cu_seqlens)
        indices, new_tokens = self._hash(tokens, place, None if state is None else state.tokens)
        embeddings = memory_lookup(self.values, indices.reshape(-1, 1), None, self._gives_sparse and self.sparse_grad)
        embeddings = embeddings.view(*tokens.shape, self.embed_dim)

        streams = (self.num_streams, self.dim)
        key = self.key_norm(self.key_proj(embeddings).unflatten(-1, streams))
        gate = (key * self.query_norm(x.unflatten(-1, streams))).sum(dim=-1, keepdim=True) * self.dim**-0.5
        gate = gate.abs().clamp(min=1e-6).sqrt() * gate.sign()
        gated = gate.sigmoid() * self.value_proj(embeddings).unsqueeze(-2)
        if mask is not None:
            gated = torch.where(mask[..., None, None], gated, 0)  # whatever padding holds
        normed = self.conv_norm(gated).flatten(-2)
        taken, new_values = self._convolve(normed, place, None if state is None else state.values)
        out = (gated.flatten(-2) + F.silu(taken)).to(x.dtype)
        if new_tokens is None:
            return out
        return out, NgramState(new_tokens, new_values)

    def _convolve(self, normed: Tensor, place: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sums of taps, and what the next call's taps read."""
        step, length, weight = self.orders[-1], self._state_length, self.conv_weight
        if place is None:
            if before is None:
                before = normed.new_zeros(normed.size(0), length, normed.size(2))
            elif tuple(before.shape) != (normed.size(0), length, normed.size(2)):
                expected = [normed.size(0), length, normed.size(2)]
                raise ValueError(f"state.values must have shape {expected}, got {tuple(before.shape)}")
            padded = torch.cat([before.to(normed.dtype), normed], dim=1)
            shifted = [padded.narrow(1, length - back * step, normed.size(1)) for back in range(self.kernel_size)]
            rest = padded.narrow(1, normed.size(1), length).clone().to(before.dtype)
        else:
            column = place.unsqueeze(1)
            shifted = [
                torch.where(column >= back * step, normed.roll(back * step, 0), 0) for back in range(self.kernel_size)
            ]
            rest = normed
        taken = shifted[0] * weight[:, -1]
        for back in range(1, self.kernel_size):
            taken = taken + shifted[back] * weight[:, -1 - back]
        return taken, rest

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return (
            f"dim={self.dim}, vocab_size={self.vocab_size}, orders={self.orders}, num_tables={self.num_tables}, "
            f"table_rows={sum(self.table_rows)}, embed_dim={self.embed_dim}, kernel_size={self.kernel_size}, "
            f"num_streams={self.num_streams}, end_token={self.end_token}, sparse_grad={self.sparse_grad}"
        )

"""Memory layers: tables of values looked up by product keys, and experts of one neuron."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import checks
from ..ops import expert_lookup, product_key_topk
from ..ops.memory import ACTIVATIONS
from ._init import FanInNormalLinear, XavierLinear, reset_modules
from ._tables import SparseTables, TableModule, check_number, copy_reference, linear_targets, parameter_to_load
from ._usage import UsageCounters
from .pool import MemoryPool, check_num_keys
from .quantized import QuantizedMemoryPool

QUERY_NORMS = ("batch", "rms", "layer")

SCORE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(dim=-1),
    "relu": F.relu,
}


class _ProductKeyLayer(TableModule, UsageCounters):
    """What the layers share: queries, product keys, the choice of rows and the count of their use."""

    TABLES: ClassVar[dict[str, str]] = {"keys": "keys"}

    def __init__(
        self,
        dim: int,
        num_keys: int,
        num_heads: int,
        top_k: int,
        key_dim: int,
        query_norm: str | None,
        key_norm: bool,
        value_dropout: float,
        bias: bool,
        track_usage: bool,
        query_dropout: float,
        score_activation: str,
        temperature: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim)
        checks.check_count("num_heads", num_heads)
        checks.check_count("top_k", top_k)
        checks.check_count("key_dim", key_dim)
        if top_k > num_keys**2:
            raise ValueError(f"top_k must be at most num_keys squared, {num_keys**2}, got {top_k}")
        if key_dim % 2 != 0:
            raise ValueError(f"key_dim must be even, got {key_dim}")
        if query_norm is not None and not isinstance(query_norm, str):
            raise TypeError(f"query_norm must be a str or None, got {query_norm!r} of type {type(query_norm).__name__}")
        if query_norm not in (None, *QUERY_NORMS):
            raise ValueError(f"query_norm must be one of {', '.join(QUERY_NORMS)} or None, got {query_norm!r}")
        checks.check_flag("key_norm", key_norm)
        for name, dropout in (("value_dropout", value_dropout), ("query_dropout", query_dropout)):
            check_number(name, dropout)
            if not 0 <= dropout < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {dropout}")
        if score_activation not in SCORE_ACTIVATIONS:
            raise ValueError(
                f"score_activation must be one of {', '.join(SCORE_ACTIVATIONS)}, got {score_activation!r}"
            )
        check_number("temperature", temperature)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        checks.check_flag("bias", bias)
        checks.check_flag("track_usage", track_usage)

        self.dim = dim
        self.num_keys = num_keys
        self.num_heads = num_heads
        self.top_k = top_k
        self.key_dim = key_dim
        self.key_norm = key_norm
        self.value_dropout = value_dropout
        self.query_dropout = query_dropout
        self.score_activation = score_activation
        self.temperature = temperature
        self.query_proj = XavierLinear(dim, num_heads * key_dim, bias=bias, device=device, dtype=dtype)
        self.query_norm: nn.Module | None = None
        if query_norm == "batch":
            self.query_norm = nn.BatchNorm1d(num_heads * key_dim, device=device, dtype=dtype)
        elif query_norm == "rms":
            self.query_norm = nn.RMSNorm(key_dim // 2, device=device, dtype=dtype)
        elif query_norm == "layer":
            self.query_norm = nn.LayerNorm(key_dim // 2, device=device, dtype=dtype)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim // 2, device=device, dtype=dtype))
        self._register_usage()
        self.track_usage = track_usage

    def _reset_retrieval(self) -> None:
        """Draw the parameters that the layer itself holds, its submodules left alone."""
        bound = self.key_dim**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        self.reset_usage()

    def _tokens(self, x: Tensor) -> Tensor:
        """``x [..., dim]``, checked, as ``[T, dim]``."""
        self._check_counting()
        checks.check_tensor("x", x)
        if x.ndim < 1:
            raise ValueError(f"x must have at least 1 dimension [..., dim], got shape {tuple(x.shape)}")
        checks.check_floating("x", x)
        checks.check_size("x", x, x.ndim - 1, self.dim, "dim of the layer")
        return x.reshape(-1, self.dim)

    def _choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights of each token's bag, ``[T, num_heads * top_k]``: the heads' bags side by side."""
        query: Tensor = self.query_proj(tokens)
        keys: Tensor = self.keys
        # Batch statistics of no tokens would be NaN, and stay so.
        if isinstance(self.query_norm, nn.BatchNorm1d) and tokens.size(0) > 0:
            query = self.query_norm(query)
        query = query.unflatten(-1, (self.num_heads, self.key_dim))
        if isinstance(self.query_norm, (nn.RMSNorm, nn.LayerNorm)):
            halves = query.unflatten(-1, (2, self.key_dim // 2))
            query = self.query_norm(halves.to(self.query_norm.weight.dtype)).flatten(-2)
        query = F.dropout(query, self.query_dropout, self.training)
        if self.key_norm:
            keys = F.normalize(keys, dim=-1)
        scores, indices = product_key_topk(query, keys, self.top_k)
        weights = SCORE_ACTIVATIONS[self.score_activation](scores / self.temperature)
        indices, weights = indices.flatten(1), weights.flatten(1)
        return indices, weights

    def _reference_targets(self) -> dict[str, Tensor]:
        """The published names of what all layers have."""
        if isinstance(self.query_norm, (nn.RMSNorm, nn.LayerNorm)) or self.key_norm:
            raise ValueError('the published layer has no query_norm="rms" or "layer" and no key_norm to load into')
        targets = {"keys": parameter_to_load(self, "keys")}
        targets |= linear_targets("query_proj.query_mlps.0", self.query_proj)
        if isinstance(self.query_norm, nn.BatchNorm1d):
            for name, tensor in self.query_norm.state_dict(keep_vars=True).items():
                targets[f"query_proj.query_mlps.1.{name}"] = tensor
        return targets

    def _retrieval_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, top_k={self.top_k}, key_dim={self.key_dim}, "
            f"key_norm={self.key_norm}, value_dropout={self.value_dropout}"
        )


class ProductKeyMemory(_ProductKeyLayer):
    """A memory layer: product keys choose rows of a table, whose weighted sum is the output (Memory Layers at Scale,
    arXiv 2412.09764, section 3; product keys, arXiv 1907.05242).

    Takes the place of a feed-forward layer, ``x [..., dim]`` to ``[..., out_dim]``. Each head turns a token into a
    query, finds the ``top_k`` best of ``num_keys ** 2`` keys, and weighs them by a softmax over their scores, in
    float32. The heads' rows are summed, to ``y [..., value_dim]``. Then

        gated (Memory+)    ``value_proj(y * silu(swilu_projection(x)))``
        not gated          ``value_proj(y)``, or ``y`` where there is no ``value_proj``

    Args:
        dim: channels of the input.
        pool: the table of values, or one in 8 bits, which is not trained. Layers that are given the same pool share
            it, and its gradients add up; each layer has keys of its own.
        num_heads: rows are chosen by so many queries.
        top_k: rows per head, from 1 to ``pool.num_keys ** 2``.
        key_dim: channels of a query, even: each half of it meets the half keys of one set.
        gated: whether the output is gated by the input (Memory+).
        query_norm: ``"batch"`` normalises queries over the batch, as arXiv 1907.05242 does: rows are then used more
            evenly. In training it needs at least 2 tokens. ``"rms"`` divides each half of a query by its root mean
            square and multiplies it by a learnt scale; by halves, for each half ranks half keys of its own. ``"layer"``
            is layer normalisation of each half. None leaves queries as they are.
        key_norm: whether each half key is scaled to length 1. Together with ``query_norm="rms"`` this is the
            query-key normalisation that arXiv 2412.09764 turns to where training large memories is not stable.
        value_dropout: probability with which a channel of ``y`` is dropped in training.
        out_dim: channels of the output; ``dim`` if None.
        has_value_proj: whether a ``value_proj`` follows. If None, where ``gated`` or where ``pool.value_dim`` is not
            ``out_dim``; neither works without one.
        bias: whether the projections add a bias, as the published layer's do.
        track_usage: whether lookups are counted for :meth:`usage`. An attribute too, to be switched at any time.
        query_dropout: probability with which a channel of a query is dropped in training.
        score_activation: ``"softmax"``, or ``"relu"``, with which the rows of a head do not compete: each weight is
            then its score itself where that is positive, else 0.
        temperature: what scores are divided by before ``score_activation``.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Keys are at first uniform within ``key_dim ** -0.5`` of 0, queries' weights Xavier uniform, and those of the other
    projections normal with the inverse root of their inputs as standard deviation, all as published. Values want a
    learning rate of their own: see :func:`memory_parameter_groups`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size out of range, an odd ``key_dim``, an unknown ``query_norm``, or ``has_value_proj=False``
            where a ``value_proj`` is needed.
    """

    def __init__(
        self,
        dim: int,
        pool: MemoryPool | QuantizedMemoryPool,
        num_heads: int = 4,
        top_k: int = 32,
        key_dim: int = 512,
        gated: bool = True,
        query_norm: str | None = None,
        key_norm: bool = False,
        value_dropout: float = 0.0,
        out_dim: int | None = None,
        has_value_proj: bool | None = None,
        bias: bool = True,
        track_usage: bool = False,
        query_dropout: float = 0.0,
        score_activation: str = "softmax",
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(pool, (MemoryPool, QuantizedMemoryPool)):
            raise TypeError(f"pool must be a topgather.nn.MemoryPool or QuantizedMemoryPool, got {type(pool).__name__}")
        if pool.mode != "sum":
            raise ValueError(f"pool must have mode 'sum', for a layer weighs its rows, got {pool.mode!r}")
        super().__init__(
            dim,
            pool.num_keys,
            num_heads,
            top_k,
            key_dim,
            query_norm,
            key_norm,
            value_dropout,
            bias,
            track_usage,
            query_dropout,
            score_activation,
            temperature,
            device,
            dtype,
        )
        checks.check_flag("gated", gated)
        if out_dim is None:
            out_dim = dim
        checks.check_count("out_dim", out_dim)
        needs_value_proj = gated or pool.value_dim != out_dim
        if has_value_proj is None:
            has_value_proj = needs_value_proj
        checks.check_flag("has_value_proj", has_value_proj)
        if needs_value_proj and not has_value_proj:
            raise ValueError(
                f"has_value_proj must be True where gated, or where pool.value_dim, {pool.value_dim}, "
                f"is not out_dim, {out_dim}"
            )

        self.out_dim = out_dim
        self.gated = gated
        self.pool = pool
        self.swilu_projection: nn.Linear | None = None
        self.value_proj: nn.Linear | None = None
        if gated:
            self.swilu_projection = FanInNormalLinear(dim, pool.value_dim, bias=bias, device=device, dtype=dtype)
        if has_value_proj:
            self.value_proj = FanInNormalLinear(pool.value_dim, out_dim, bias=bias, device=device, dtype=dtype)
        self._reset_retrieval()

    def reset_parameters(self) -> None:
        """Draw all parameters anew but those of the pool, which has a ``reset_parameters`` of its own, and forget the
        usage counted so far.
        """
        self._reset_retrieval()
        reset_modules(self.query_proj, self.query_norm, self.swilu_projection, self.value_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory for each token of ``x [..., dim]``; returns ``[..., out_dim]``.

        Under autocast the output has the autocast dtype where there is a ``value_proj``, else that of ``x``.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: the last dimension of ``x`` is not ``dim``.
        """
        tokens = self._tokens(x)
        indices, weights = self._choose(tokens)
        out: Tensor = self.pool(indices, weights).to(x.dtype)
        out = F.dropout(out, self.value_dropout, self.training)
        if self.swilu_projection is not None:
            out = out * F.silu(self.swilu_projection(tokens))
        if self.value_proj is not None:
            out = self.value_proj(out)
        self._count(indices, weights)
        return out.view(*x.shape[:-1], self.out_dim)

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy in the parameters of the layer published with arXiv 2412.09764, by their names there.

        ========================================  =====================================================
        name                                      shape
        ========================================  =====================================================
        ``keys``                                  ``[num_heads * 2 * num_keys, key_dim / 2]``, or ``[num_heads, 2,
                                                  num_keys, key_dim / 2]``
        ``values.weight``                         ``[num_keys ** 2, value_dim]``; may be absent, where another layer
                                                  has the shared pool's
        ``query_proj.query_mlps.0.weight, bias``  ``[num_heads * key_dim, dim]``, ``[num_heads * key_dim]``
        ``query_proj.query_mlps.1.*``             the entries of an ``nn.BatchNorm1d``, with ``query_norm="batch"``
        ``swilu_projection.weight, bias``         ``[value_dim, dim]``, ``[value_dim]``, where gated
        ``value_proj.weight, bias``               ``[out_dim, value_dim]``, ``[out_dim]``, where there is one
        ========================================  =====================================================

        Args:
            state_dict: tensors by name, for example of a whole model.
            prefix: what stands before the names above, a final dot included. Other entries are passed over.

        Raises:
            TypeError: ``state_dict`` is not a mapping to tensors or ``prefix`` not a str.
            ValueError: names are missing or unknown (all are listed), a shape is wrong, or the layer has a norm that
                the published one has not. Nothing is copied then.
        """
        targets = self._reference_targets()
        targets["values.weight"] = parameter_to_load(self.pool, "values")
        if self.swilu_projection is not None:
            targets |= linear_targets("swilu_projection", self.swilu_projection)
        if self.value_proj is not None:
            targets |= linear_targets("value_proj", self.value_proj)
        copy_reference(targets, state_dict, prefix, may_miss=("values.weight",))

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return f"{self._retrieval_repr()}, gated={self.gated}, out_dim={self.out_dim}"


class PeerMemory(_ProductKeyLayer):
    """A layer of experts of one hidden neuron, chosen by product keys (PEER, arXiv 2407.04153, section 2; the PEER
    variant of arXiv 2412.09764).

    Takes the place of a feed-forward layer, ``x [..., dim]`` to ``[..., dim]``: the sum over the chosen experts ``i``
    of all heads of ``weight_i * activation(dot(x, values_in[i])) * values_out[i]``, with a softmax over each head's
    ``top_k`` scores, in float32, as weights.

    Args:
        dim: channels of the input and the output.
        num_keys: keys of a half; there are ``num_keys ** 2`` experts. From 1 to 46340.
        num_heads: experts are chosen by so many queries.
        top_k: experts per head, from 1 to ``num_keys ** 2``.
        key_dim: channels of a query, even: each half of it meets the half keys of one set.
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.
        query_norm: ``"batch"``, as arXiv 2407.04153 has it, ``"rms"``, ``"layer"`` or None: see
            :class:`ProductKeyMemory`.
        key_norm: whether each half key is scaled to length 1: see :class:`ProductKeyMemory`.
        value_dropout: probability with which a channel of the output is dropped in training.
        bias: whether the queries' projection adds a bias.
        sparse_grad: whether both tables get sparse gradients: see :class:`MemoryPool`. Where one of them is computed,
            both get dense ones.
        track_usage: whether lookups are counted for :meth:`usage`. An attribute too, to be switched at any time.
        query_dropout: probability with which a channel of a query is dropped in training.
        score_activation: ``"softmax"``, or ``"relu"``, with which the rows of a head do not compete: each weight is
            then its score itself where that is positive, else 0.
        temperature: what scores are divided by before ``score_activation``.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Attributes:
        values_in: ``[num_keys ** 2, dim]``, the weights into each expert's neuron.
        values_out: ``[num_keys ** 2, dim]``, the weights out of it. Both are at first normal with a standard deviation
            of ``dim ** -0.5``, all else as in :class:`ProductKeyMemory`. To share experts between layers, assign
            ``other.values_in = layer.values_in`` and ``values_out`` likewise.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size out of range, an odd ``key_dim``, an unknown ``activation`` or ``query_norm``.
    """

    TABLES: ClassVar[dict[str, str]] = {"keys": "keys", "values_in": "values", "values_out": "values"}

    def __init__(
        self,
        dim: int,
        num_keys: int,
        num_heads: int = 8,
        top_k: int = 16,
        key_dim: int = 128,
        activation: str = "gelu",
        query_norm: str | None = None,
        key_norm: bool = False,
        value_dropout: float = 0.0,
        bias: bool = True,
        sparse_grad: bool | str = False,
        track_usage: bool = False,
        query_dropout: float = 0.0,
        score_activation: str = "softmax",
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_num_keys(num_keys)
        super().__init__(
            dim,
            num_keys,
            num_heads,
            top_k,
            key_dim,
            query_norm,
            key_norm,
            value_dropout,
            bias,
            track_usage,
            query_dropout,
            score_activation,
            temperature,
            device,
            dtype,
        )
        if not isinstance(activation, str):
            raise TypeError(f"activation must be a str, got {activation!r} of type {type(activation).__name__}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        checks.check_sparse_grad(sparse_grad)
        self.activation = activation
        self.sparse_grad = sparse_grad
        self.values_in = nn.Parameter(torch.empty(num_keys**2, dim, device=device, dtype=dtype))
        self.values_out = nn.Parameter(torch.empty(num_keys**2, dim, device=device, dtype=dtype))
        self._reset_retrieval()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ``nn.Module.named_modules``. With ``sparse_grad`` the tables come first, under their own names, as those
        of another module that is a kind of ``nn.EmbeddingBag``: see :class:`MemoryPool`. It has no part in the layer.

        Args:
            memo: modules already met, which are left out; extended. Default: none.
            prefix: put before every name. Default: empty.
            remove_duplicate: whether a module that stands in several places comes once. Default: ``True``.
        """
        if self._gives_sparse and (memo is None or self not in memo) and not torch.compiler.is_compiling():
            yield prefix, SparseTables(self, ("values_in", "values_out"))
        yield from super().named_modules(memo, prefix, remove_duplicate)

    @property
    def _gives_sparse(self) -> bool:
        return bool(self.sparse_grad) and self._are_parameters("values_in", "values_out")

    def _reset_retrieval(self) -> None:
        super()._reset_retrieval()
        nn.init.normal_(self.values_in, std=self.dim**-0.5)
        nn.init.normal_(self.values_out, std=self.dim**-0.5)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, and forget the usage counted so far."""
        self._reset_retrieval()
        reset_modules(self.query_proj, self.query_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Run each token of ``x [..., dim]`` through its experts; returns ``[..., dim]`` in the dtype of ``x``.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: the last dimension of ``x`` is not ``dim``.
        """
        tokens = self._tokens(x)
        indices, weights = self._choose(tokens)
        sparse_grad = self._gives_sparse and self.sparse_grad
        out = expert_lookup(tokens, self.values_in, self.values_out, indices, weights, self.activation, sparse_grad).to(
            x.dtype
        )
        self._count(indices, weights)
        return F.dropout(out, self.value_dropout, self.training).view(x.shape)

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy in the parameters of the PEER variant published with arXiv 2412.09764, by their names there.

        ``keys`` and ``query_proj.query_mlps.*`` are those of :meth:`ProductKeyMemory.load_reference_state_dict`,
        ``values_u.weight`` is ``values_in`` and ``values_v.weight`` is ``values_out``. Both may be absent, where
        another layer has the shared tables. Entries of ``value_proj`` and ``swilu_projection``, which the published
        variant has without using them, are passed over.

        Args:
            state_dict: tensors by name, for example of a whole model.
            prefix: what stands before the names above, a final dot included. Other entries are passed over.

        Raises:
            TypeError: ``state_dict`` is not a mapping to tensors or ``prefix`` not a str.
            ValueError: names are missing or unknown (all are listed), a shape is wrong, or the layer has a norm that
                the published one has not. Nothing is copied then.
        """
        targets = self._reference_targets()
        targets["values_u.weight"] = parameter_to_load(self, "values_in")
        targets["values_v.weight"] = parameter_to_load(self, "values_out")
        unused = [f"{proj}.{name}" for proj in ("value_proj", "swilu_projection") for name in ("weight", "bias")]
        copy_reference(targets, state_dict, prefix, may_miss=("values_u.weight", "values_v.weight"), unused=unused)

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return (
            f"{self._retrieval_repr()}, num_keys={self.num_keys}, activation={self.activation}, "
            f"sparse_grad={self.sparse_grad}"
        )

"""Tables, sequences, caches and heads over a group of processes: ``docs/distributed.md`` says which is for what.

Sequences: :func:`moba_attention`, :func:`key_conv`, :func:`shard_sequence` and, for whole models,
:func:`context_parallel`; what they cost :func:`plan` and :func:`count_bytes` tell. Caches: :class:`ShardedCache`.
Heads: :class:`MobaHeadwise`, and rules by which ops take DTensors. The rest of this page is about tables: memory pools
whose table is sharded by its columns, or, with :class:`MemoryRowwise`, by its rows.

:class:`MemoryColwise` is a style for torch's own ``parallelize_module``. The table becomes a DTensor sharded over the
value width, so that optimizers, ``fully_shard`` over a data-parallel axis and ``torch.distributed.checkpoint`` take it
as any other parameter::

    mesh = init_device_mesh("cuda", (num_replicas, group_size), mesh_dim_names=("replicas", "memory"))
    parallelize_module(model, mesh["memory"], {"layers.*.memory.pool": MemoryColwise()})
    fully_shard(model.pool, mesh=mesh["replicas"])  # where there are replicas: the rows of each shard over them
    fully_shard(model, mesh=mesh_of_all_ranks, ignored_params={model.pool.values})  # everything else, if wished

Importing topgather does not import this module; ``import topgather.distributed`` does.

Every rank of the group brings tokens of its own, as many as it has: for everything but the table the group is one more
data-parallel axis. One lookup takes these steps:

1. the numbers of tokens are gathered, one small message, which a GPU waits for (not with ``equal_token_counts``);
2. indices, as int32, and weights are gathered: every rank then has those of all the group's tokens;
3. every rank sums its own columns for all of these tokens with :func:`topgather.memory_lookup`;
4. an all-to-all brings each rank all the columns of its own tokens.

Backward runs the same steps from the last to the first: an all-to-all of the rows' gradients, the gradients of the
local columns and of all weights, an all-to-all of the latter. A rank has only part of a weight's dot product; the
parts are added by the token's rank, in the order of ranks and in the dtype of the sums. No gradient of the table is
sent within the group.

What one token with K entries and rows of W numbers costs in a group of G ranks, in bytes sent, where ``s`` is the size
of a number of the table and ``w`` that of a weight (a sum is 4 bytes, or 8 for float64):

========  =====================================  ==========================
..        entries                                row
========  =====================================  ==========================
forward   ``(G - 1) * K * (4 + w)``              ``(G - 1) / G * W * s``
backward  ``(G - 1) * K * 4``                    ``(G - 1) / G * W * s``
========  =====================================  ==========================

In step 2 ranks with fewer tokens than the one with the most send padding up to as many. From then on each rank holds
``K`` entries of all the group's tokens, and ``W / G`` columns of their rows: where ranks have equally many tokens, as
many numbers as its own tokens' full rows.

By rows a rank asks for each row that its tokens name, once, with 4 bytes where another rank has it; it gets the row,
``W * s`` bytes, and sends as many back for its gradient. That is less where tokens share rows, where rows are short, or
where ranks are many; :func:`plan_memory` counts both.

Scale of gradients. All are those of one process that has all the group's tokens and whose loss is the **sum** of the
ranks' losses. Data parallelism averages instead: a parameter that DDP or FSDP averages over N ranks gets 1 / N of the
gradient of the summed loss. The table is already summed over the G ranks of its group, and ``fully_shard`` over the
D = N / G replicas divides by D only (with one replica, by nothing). So where every rank's loss is the mean over its own
tokens, the table's gradient is G times that of the mean over all ranks. Adam does not see the factor, but for its
epsilon; SGD, weight decay added to gradients, and clipping by norm do. What takes it out, once, after the last backward
pass and before clipping and the optimizer::

    pool.values.grad.div_(group_size)

Clipping and optimizers. ``fully_shard(model, mesh=mesh["memory"], ignored_params={pool.values})``, over the table's own
mesh, makes DTensors of all other parameters too: torch's ``clip_grad_norm_``, ``GradScaler`` and optimizers with
``foreach=True`` or ``fused=True`` then work as they are. Otherwise a model with a sharded table has parameters of two
kinds, tensors and DTensors, which those cannot treat in one call; :func:`clip_grad_norm_` here can, and takes sparse
gradients too, and optimizers with ``foreach=True`` or ``fused=True`` need each kind in a group of its own, as
:func:`topgather.nn.memory_parameter_groups` makes them where only pools are sharded.

All ranks of a group must run the same lookups, forward and backward, in the same order, one with no tokens too (with
``[0, K]`` indices), or the others wait for it. An index out of range raises on all ranks, wherever it would alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ._common import checks, tensors
from ._common.library import DTYPE_CODES, sum_dtype
from ._common.transforms import refuse_transforms
from ._distributed import collectives
from ._distributed.attention import moba_attention
from ._distributed.cache import ShardedCache
from ._distributed.collectives import count_bytes
from ._distributed.context import context_parallel, key_conv
from ._distributed.placement import shard_sequence
from ._distributed.plan import Plan, plan
from ._distributed.tensor_parallel import MobaHeadwise
from .nn._tables import check_number
from .nn.memory import MemoryPool
from .ops import _memory_update, memory_lookup
from .ops._memory_ops import check_indices, check_weights
from .optim._clip import factor_to_clip, refuse_recorded, strided_gradient

__all__ = [
    "MemoryColwise",
    "MemoryPlan",
    "MemoryRowwise",
    "MobaHeadwise",
    "Plan",
    "RowShardedMemoryPool",
    "ShardedCache",
    "ShardedMemoryPool",
    "clip_grad_norm_",
    "context_parallel",
    "count_bytes",
    "key_conv",
    "moba_attention",
    "plan",
    "plan_memory",
    "shard_sequence",
]


class _MemoryStyle(ParallelStyle):
    """What the styles of memory tables share: which pools they take, and the change in place."""

    DIM: ClassVar[int]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """What ``parallelize_module`` calls."""
        name, sharded_class = type(self).__name__, self._pool_class()
        pool = module if isinstance(module, MemoryPool) else getattr(module, "pool", None)
        if not isinstance(pool, MemoryPool):
            raise TypeError(
                f"{name} shards a topgather.nn.MemoryPool or a layer with one as its pool, got {type(module).__name__}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, such as mesh['memory'], got {device_mesh}")
        values: Tensor = pool.values
        if isinstance(values, DTensor):
            if isinstance(pool, sharded_class) and values.device_mesh == device_mesh:
                return module
            raise ValueError(
                f"the pool's values are sharded already, over {values.device_mesh}; "
                f"apply {name} once, and before fully_shard"
            )
        if type(pool) is not MemoryPool:
            raise TypeError(f"the pool must be a MemoryPool itself, not of a derived class, got {type(pool).__name__}")
        if _memory_update.recorder_of(values) is not None:
            raise ValueError("the pool must have no row optimizer yet: make it of the sharded table")
        if pool.sparse_grad:
            raise ValueError("the pool must have sparse_grad=False: a DTensor holds no sparse gradient")
        if (pool.mode, pool.padding_idx, pool.include_last_offset) != ("sum", None, False):
            raise ValueError(
                f"the pool must have mode='sum', padding_idx=None and include_last_offset=False: a sharded one takes "
                f"weighted bags of one size, got {pool}"
            )
        sharded = _shard_table(values, device_mesh, self.DIM, getattr(self, "src_data_rank", 0))
        pool.register_parameter("values", nn.Parameter(sharded, requires_grad=values.requires_grad))
        # As fully_shard does: a class of its own has no state that a copy or a state dict could miss.
        pool.__class__ = sharded_class
        self._finish(pool)
        return module

    def _pool_class(self) -> type[MemoryPool]:
        raise NotImplementedError

    def _finish(self, pool: MemoryPool) -> None:
        """Set what a pool of that class has besides."""


class MemoryColwise(_MemoryStyle):
    """Shards the table of a :class:`topgather.nn.MemoryPool` by its columns, for ``parallelize_module``.

    The pool becomes a :class:`ShardedMemoryPool` in place: called with the same arguments, with the tokens of this rank
    alone, it returns their full rows. Its ``values`` become a DTensor sharded over dimension 1, split as
    ``torch.chunk`` splits: the width need not be a multiple of the group, and ranks at its end may have no column.
    Rank 0's table is what is sharded, as with torch's own styles (``src_data_rank`` of ``parallelize_module``). A table
    too large for one device is made on the ``meta`` device, sharded, and then given memory with ``to_empty`` and
    numbers with ``reset_parameters`` or a checkpoint. On the CPU ``reset_parameters`` draws each shard from its rank's
    own generator: seed ranks differently for that.

    A plan may name a pool, or a layer with a submodule ``pool``, which stands for that. A pool shared by several
    layers may be named by each. ``fully_shard`` comes after, over another axis of the same mesh.

    Args:
        equal_token_counts: promises that in every call all ranks of the group have the same number of tokens. They
            then tell each other nothing beforehand, and a GPU is not waited for. If the promise is broken, the ranks
            may wait for each other forever.

    Example::

        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"memory.pool": MemoryColwise()})

    Raises:
        TypeError: from ``parallelize_module``, for a module that is not a pool as ``topgather.nn`` makes it.
        ValueError: from ``parallelize_module``, for a mesh that is not one-dimensional, a table that is sharded
            already or that a row optimizer has, or a pool with ``sparse_grad``, as a DTensor holds no sparse gradient,
            or with a ``mode``, ``padding_idx`` or ``include_last_offset`` of its own: a sharded pool takes weighted
            bags of one size.
    """

    DIM = 1

    def __init__(self, *, equal_token_counts: bool = False) -> None:
        super().__init__()
        checks.check_flag("equal_token_counts", equal_token_counts)
        self.equal_token_counts = equal_token_counts

    def __repr__(self) -> str:
        return f"{type(self).__name__}(equal_token_counts={self.equal_token_counts})"

    def _pool_class(self) -> type[MemoryPool]:
        return ShardedMemoryPool

    def _finish(self, pool: MemoryPool) -> None:
        cast(ShardedMemoryPool, pool).equal_token_counts = self.equal_token_counts


class MemoryRowwise(_MemoryStyle):
    """Shards the table of a :class:`topgather.nn.MemoryPool` by its rows, for ``parallelize_module``.

    As :class:`MemoryColwise`, but for what travels. A rank asks each row that its tokens name, once however many of
    them do, of the rank that has it, and sums the rows of its own tokens; :func:`plan_memory` counts which of the two
    sends less. ``values`` become a DTensor sharded over dimension 0, split as ``torch.chunk`` splits. Checkpoints of
    one are checkpoints of the other.

    The pool becomes a :class:`RowShardedMemoryPool` in place. Numbers of tokens and of entries per token may differ
    between ranks.

    Example::

        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"memory.pool": MemoryRowwise()})

    Raises:
        TypeError: from ``parallelize_module``, as :class:`MemoryColwise` does.
        ValueError: from ``parallelize_module``, as :class:`MemoryColwise` does.
    """

    DIM = 0

    def __init__(self) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _pool_class(self) -> type[MemoryPool]:
        return RowShardedMemoryPool


class ShardedMemoryPool(MemoryPool):
    """A memory pool whose ``values`` are a DTensor sharded by columns: what :class:`MemoryColwise` makes of a pool.

    It is not made by calling it, though it has the arguments of its base: ``num_keys``, ``value_dim``, ``sparse_grad``,
    ``device``, ``dtype``, ``mode``, ``padding_idx`` and ``include_last_offset``.
    """

    equal_token_counts: bool = False

    # Collectives and counts that only a run knows: torch.compile leaves this to eager mode, and fuses what is around.
    @torch.compiler.disable
    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Rows of this rank's tokens; ``indices [T, K]``, ``weights [T, K]`` to ``[T, value_dim]``.

        Raises:
            TypeError: an argument of the wrong type or dtype, or ``values`` that are no DTensor.
            ValueError: a wrong shape or device, ``values`` that are not sharded by columns alone, or entries per token,
                dtypes or need of a gradient that differ within the group.
            IndexError: an index of any rank that is out of range, as in :func:`topgather.memory_lookup`.
        """
        values = _sharded_along(self.values, 1)
        local_values = values.to_local()
        weights = _checked_weights(indices, weights, local_values)
        layout = _make_layout(values, indices, weights, self.equal_token_counts)
        # Every row has a number of 31 bits; what names no row must not become one that does.
        rows = _gather_tokens(indices.clamp(-1, values.size(0)).to(torch.int32), layout)
        all_weights = _GatherWeights.apply(weights, layout, sum_dtype(values.dtype))
        columns = _memory_update.sharded_lookup(self.values, local_values, rows, all_weights)
        if columns is None:
            columns = memory_lookup(local_values, rows, all_weights)
        out: Tensor = _ExchangeColumns.apply(columns, layout)
        return out


class RowShardedMemoryPool(MemoryPool):
    """A memory pool whose ``values`` are a DTensor sharded by rows: what :class:`MemoryRowwise` makes of a pool.

    It is not made by calling it, though it has the arguments of its base: ``num_keys``, ``value_dim``, ``sparse_grad``,
    ``device``, ``dtype``, ``mode``, ``padding_idx`` and ``include_last_offset``.
    """

    @torch.compiler.disable
    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Rows of this rank's tokens; ``indices [T, K]``, ``weights [T, K]`` to ``[T, value_dim]``.

        Raises:
            TypeError: an argument of the wrong type or dtype, or ``values`` that are no DTensor.
            ValueError: a wrong shape or device, ``values`` that are not sharded by rows alone, or need of their
                gradient that differs within the group.
            IndexError: an index of any rank that is out of range; on CUDA too, where the host waits anyway.
        """
        values = _sharded_along(self.values, 0)
        local_values = values.to_local()
        weights = _checked_weights(indices, weights, local_values)
        group, rank = values.device_mesh.get_group(), values.device_mesh.get_local_rank()
        num_ranks, num_rows = dist.get_world_size(group), values.size(0)
        most_rows = -(-num_rows // num_ranks)  # as torch.chunk splits, and DTensor with it

        rows, places = torch.unique(indices, return_inverse=True)  # ascending: those of one rank stand together
        bounds = torch.arange(num_ranks + 1, device=rows.device).mul(most_rows).clamp(max=num_rows)
        asked_sizes = torch.searchsorted(rows.to(torch.int64), bounds).diff().tolist()
        error = None
        if rows.numel() > 0 and (int(rows[0]) < 0 or int(rows[-1]) >= num_rows):
            error = IndexError(f"indices must be between 0 and {num_rows - 1}, got {int(rows[0])} to {int(rows[-1])}")
        needs_grad = torch.is_grad_enabled() and values.requires_grad
        what = "agreeing on a memory lookup"
        facts = [int(error is not None), int(needs_grad), *asked_sizes]
        has_error, need_grads, *sizes = collectives.gather_numbers(facts, group, indices.device, what)
        collectives.raise_everywhere(error, has_error, group, what)
        collectives.require_same(("need of a gradient for values",), [need_grads])
        served_sizes = sizes[rank]

        numbers = rows.remainder(most_rows).to(torch.int32)
        served = collectives.all_to_all(numbers, asked_sizes, served_sizes, group, "asking for rows of a memory")
        # Rows that several ranks ask for are entries of one row, whose gradients are added rank by rank.
        sent = memory_lookup(local_values, served.unsqueeze(1))
        received = _ExchangeRows.apply(sent, served_sizes, asked_sizes, group)
        return memory_lookup(received, places, weights)


class _ExchangeRows(torch.autograd.Function):
    """Rows to the ranks that asked for them; their gradients go back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent_sizes, ctx.received_sizes, ctx.group = sent_sizes, received_sizes, group
        return _send_rows(rows, sent_sizes, received_sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _send_rows(grad, ctx.received_sizes, ctx.sent_sizes, ctx.group), None, None, None


def _send_rows(rows: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    width = rows.size(1)
    sent_numbers, received_numbers = ([size * width for size in sizes] for sizes in (sent_sizes, received_sizes))
    what = "sending rows of a memory lookup"
    received = collectives.all_to_all(rows.reshape(-1), sent_numbers, received_numbers, group, what)
    return received.view(-1, width)


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank sends for one lookup, forward and backward: :func:`plan_memory`.

    Args:
        colwise_bytes: with :class:`MemoryColwise`.
        rowwise_bytes: with :class:`MemoryRowwise`.
        style: the class of the one that sends less; of equals :class:`MemoryColwise`.
    """

    colwise_bytes: int
    rowwise_bytes: int
    style: type[ParallelStyle]


def plan_memory(
    indices: Tensor,
    num_rows: int,
    value_dim: int,
    num_ranks: int,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """Count the bytes that one rank sends to others for a lookup with gradients, by columns and by rows.

    Not counted is what ranks agree on before, a few numbers. By rows what others ask of this rank is taken for as much
    as this rank asks of them.

    Args:
        indices: ``[T, K]``, of one rank's tokens; the other ranks have as many.
        num_rows: of the table.
        value_dim: columns of the table.
        num_ranks: of the group.
        rank: whose tokens these are.
        dtype: of the table.
        weights_dtype: of the weights; ``dtype`` if None.

    Returns:
        The bytes of both, and the style that sends less.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape, or a number out of range.
    """
    checks.check_tensor("indices", indices)
    checks.check_dtype("indices", indices, torch.int64, torch.int32)
    checks.check_ndim("indices", indices, 2, "[tokens, entries]")
    for name, number in (("num_rows", num_rows), ("value_dim", value_dim), ("num_ranks", num_ranks)):
        checks.check_count(name, number)
    checks.check_count("rank", rank, least=0)
    if rank >= num_ranks:
        raise ValueError(f"rank must be below num_ranks, {num_ranks}, got {rank}")
    num_others, num_tokens = num_ranks - 1, indices.size(0)
    weight_bytes = (dtype if weights_dtype is None else weights_dtype).itemsize
    most_columns = -(-value_dim // num_ranks)
    own_columns = max(0, min(most_columns, value_dim - rank * most_columns))
    entry_bytes = num_others * indices.size(1) * (4 + weight_bytes + sum_dtype(dtype).itemsize)
    row_bytes = (num_others * own_columns + value_dim - own_columns) * dtype.itemsize
    colwise = num_tokens * (entry_bytes + row_bytes)
    rows = indices.unique()
    num_asked = int((rows // -(-num_rows // num_ranks) != rank).sum())
    rowwise = num_asked * (4 + 2 * value_dim * dtype.itemsize)
    return MemoryPlan(colwise, rowwise, MemoryRowwise if rowwise < colwise else MemoryColwise)


def _checked_weights(indices: Tensor, weights: Tensor, local_values: Tensor) -> Tensor:
    """The weights as autocast leaves them, both arguments of a lookup checked."""
    checks.check_tensor("indices", indices)
    checks.check_tensor("weights", weights)
    device_type = weights.device.type
    if torch.is_autocast_enabled(device_type):
        weights = tensors.autocast_to_sums(weights, local_values, device_type)
    check_indices(indices, local_values)
    check_weights(weights, indices, local_values)
    return weights


def _shard_table(values: Tensor, device_mesh: DeviceMesh, dim: int, src_data_rank: int | None) -> DTensor:
    # The argument is younger than the oldest torch that topgather takes.
    options = {} if src_data_rank == 0 else {"src_data_rank": src_data_rank}
    sharded = distribute_tensor(values.detach(), device_mesh, [Shard(dim)], **options)
    local = sharded.to_local().detach()
    if local.untyped_storage().nbytes() == local.nbytes:
        return sharded
    # Where the split is uneven, narrow shards come as views of memory as wide as the widest.
    local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, device_mesh, [Shard(dim)], run_check=False, shape=values.shape, stride=values.stride()
    )


def _sharded_along(values: Tensor, dim: int) -> DTensor:
    """``values``, checked."""
    name, parts = (("RowShardedMemoryPool", "rows"), ("ShardedMemoryPool", "columns"))[dim]
    refuse_transforms(name, "ranks send each other rows")
    if not isinstance(values, DTensor):
        raise TypeError(f"values of a {name} must be a DTensor, got {type(values).__name__}")
    if tuple(values.placements) != (Shard(dim),):
        raise ValueError(
            f"values must be sharded by {parts} alone where they are looked up, got {values.placements} over "
            f"{values.device_mesh}; if fully_shard has cut the rows too, call the module that it was applied to"
        )
    return values


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients of ``parameters`` so that their norm, taken together, is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, for parameters that are partly tensors and partly DTensors, of one mesh or
    several, and for sparse gradients, dense ones beside them. All ranks of a DTensor's mesh must call it. A parameter
    that is a plain tensor counts with this rank's gradient: where it differs between ranks, so would the scale, so it
    has to be reduced before, as data parallelism does.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: what the norm may be at most.
        norm_type: the exponent of the norm, or infinity.
        error_if_nonfinite: whether a norm that is NaN or infinite raises, before anything is scaled.

    Returns:
        The norm before scaling, ``[]``, float32 or float64, the same on all ranks.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``norm_type`` not above 0, ``max_norm`` below, or a table of a row optimizer, whose recorded
            gradients :func:`topgather.optim.clip_grad_norm_` counts.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
    """
    for name, number in (("max_norm", max_norm), ("norm_type", norm_type)):
        check_number(name, number)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    refuse_recorded(parameters)
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norms: dict[Any, list[Tensor]] = {}
    numbers: list[Tensor] = []  # what is scaled: tensors without structure
    for parameter in with_gradient:
        grad = strided_gradient(parameter)
        numbers.append(grad.to_local() if isinstance(grad, DTensor) else grad)
        kind = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=sum_dtype(grad.dtype))
        norms.setdefault((kind, norm.dtype, norm.device), []).append(norm)
    if not norms:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    device = numbers[0].device
    # One collective for all DTensors that are spread alike.
    parts = [torch.linalg.vector_norm(torch.stack(group), norm_type) for group in norms.values()]
    whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    dtype = max((part.dtype for part in whole), key=lambda dtype: dtype.itemsize)
    total = torch.linalg.vector_norm(torch.stack([part.to(device, dtype) for part in whole]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}, so they cannot be clipped"
        )
    factor = factor_to_clip(total, max_norm)
    with torch.no_grad():
        for tensor in numbers:
            tensor.mul_(factor.to(tensor.device, sum_dtype(tensor.dtype)))
    return total


# --- who has what ---------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How tokens and columns are spread over the ranks of a group."""

    group: dist.ProcessGroup
    rank: int
    token_counts: list[int]
    column_counts: list[int]

    @property
    def num_tokens(self) -> int:
        """Of this rank."""
        return self.token_counts[self.rank]

    @property
    def num_columns(self) -> int:
        """Of this rank."""
        return self.column_counts[self.rank]


def _make_layout(values: DTensor, indices: Tensor, weights: Tensor, equal_token_counts: bool) -> _Layout:
    group, rank = values.device_mesh.get_group(), values.device_mesh.get_local_rank()
    num_ranks, width = dist.get_world_size(group), values.size(1)
    # As torch.chunk splits, and DTensor with it.
    most_columns = -(-width // num_ranks)
    column_counts = [max(0, min(most_columns, width - rank * most_columns)) for rank in range(num_ranks)]
    if equal_token_counts:
        token_counts = [indices.size(0)] * num_ranks
    else:
        token_counts = _exchange_token_counts(indices, weights, group)
    return _Layout(group, rank, token_counts, column_counts)


def _exchange_token_counts(indices: Tensor, weights: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Tokens of each rank. What would make ranks wait for messages that others never send raises here, on all."""
    needs_grad = torch.is_grad_enabled() and weights.requires_grad
    facts = [indices.size(0), indices.size(1), DTYPE_CODES[weights.dtype], int(needs_grad)]
    token_counts, *others = collectives.gather_numbers(facts, group, indices.device, "agreeing on a memory lookup")
    collectives.require_same(
        ("entries per token", "dtype of weights (by its code)", "need of a gradient for weights"), others
    )
    return token_counts


# --- what is sent ---------------------------------------------------------------------------------------------------


def _gather_tokens(entries: Tensor, layout: _Layout) -> Tensor:
    """``[T, K]`` of every rank to ``[tokens of the group, K]`` on all, in the order of ranks."""
    num_entries, most_tokens = entries.size(1), max(layout.token_counts)
    if num_entries == 0 or most_tokens == 0:
        return entries.new_empty((sum(layout.token_counts), num_entries))
    # Collectives of unequal parts are not to be had on every backend.
    padded = F.pad(entries, (0, 0, 0, most_tokens - layout.num_tokens)).contiguous()
    gathered = entries.new_empty((len(layout.token_counts) * most_tokens, num_entries))
    with collectives.naming("gathering entries of a memory lookup", layout.group):
        collectives.all_gather(gathered, padded, group=layout.group)
    if min(layout.token_counts) == most_tokens:
        return gathered
    parts = gathered.split(most_tokens)
    return torch.cat([part[:count] for part, count in zip(parts, layout.token_counts, strict=True)])


def _all_to_all(sent: Tensor, sent_sizes: list[int], received_sizes: list[int], layout: _Layout) -> Tensor:
    """Flat parts to each rank against flat parts from each."""
    return collectives.all_to_all(sent, sent_sizes, received_sizes, layout.group, "sending rows of a memory lookup")


class _GatherWeights(torch.autograd.Function):
    """Weights of this rank's tokens to those of all tokens, in the dtype of sums; gradients come home and are added."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, layout: _Layout, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.dtype = layout, weights.dtype
        return _gather_tokens(weights, layout).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layout, num_entries = ctx.layout, grad.size(1)
        num_ranks = len(layout.token_counts)
        if grad.numel() == 0:
            return grad.new_zeros((layout.num_tokens, num_entries), dtype=ctx.dtype), None, None
        sent_sizes = [count * num_entries for count in layout.token_counts]
        received_sizes = [layout.num_tokens * num_entries] * num_ranks
        received = _all_to_all(grad.reshape(-1), sent_sizes, received_sizes, layout)
        parts = received.view(num_ranks, layout.num_tokens, num_entries)
        return parts.sum(dim=0).to(ctx.dtype), None, None


class _ExchangeColumns(torch.autograd.Function):
    """This rank's columns of all tokens to all columns of this rank's tokens; backward the other way."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, layout: _Layout) -> Tensor:  # type: ignore[override]
        ctx.layout = layout
        num_tokens = layout.num_tokens
        if sum(layout.token_counts) == 0:
            return columns.new_empty((0, sum(layout.column_counts)))
        sent_sizes = [count * layout.num_columns for count in layout.token_counts]
        received_sizes = [num_tokens * count for count in layout.column_counts]
        received = _all_to_all(columns.reshape(-1), sent_sizes, received_sizes, layout)
        parts = zip(received.split(received_sizes), layout.column_counts, strict=True)
        return torch.cat([part.view(num_tokens, count) for part, count in parts], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layout = ctx.layout
        num_tokens, num_all_tokens = layout.num_tokens, sum(layout.token_counts)
        if num_all_tokens == 0:
            return grad.new_empty((0, layout.num_columns)), None
        sent_sizes = [num_tokens * count for count in layout.column_counts]
        received_sizes = [count * layout.num_columns for count in layout.token_counts]
        sent = grad.new_empty(grad.numel())
        for target, part in zip(sent.split(sent_sizes), grad.split(layout.column_counts, dim=1), strict=True):
            target.view(part.shape).copy_(part)
        received = _all_to_all(sent, sent_sizes, received_sizes, layout)
        return received.view(num_all_tokens, layout.num_columns), None

"""A memory layer's table in host memory, for a model on a device: only the rows that a batch names travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._common import checks
from .._common.library import in_forward_mode
from .._common.sparse import keep_coalesced
from .._common.transforms import refuse_tangent, refuse_transforms
from ..ops import memory_lookup
from ._tables import refuse_sharded
from .mapped import MappedMemoryPool
from .pool import MemoryPool

MAX_PENDING = 64
"""Prefetches that are remembered."""


@dataclass(frozen=True)
class CacheUsage:
    """What the cache of an :class:`OffloadedMemoryPool` was good for.

    Args:
        hits: rows that lookups took from the cache, each counted once a lookup.
        misses: rows that travelled.
        bytes_sent: of these, to the device.
        hit_rate: ``hits / (hits + misses)``, 0 before the first lookup.
    """

    hits: int
    misses: int
    bytes_sent: int
    hit_rate: float


class _Table(NamedTuple):
    """A table as it was at some time."""

    values: Tensor
    version: int | None
    """How often it had changed; None for one made in inference mode, of which torch does not count that."""

    def is_still(self, other: _Table | None) -> bool:
        """Whether ``other`` is the same table, known to be unchanged."""
        return other is not None and self.values is other.values and self.version == other.version is not None


class _Rows(NamedTuple):
    """The rows of a batch, on the device or on their way to it."""

    indices: Tensor  # as they were when the rows were sent, on their own device
    rows: Tensor  # [U] int64, ascending, on the host
    places: Tensor  # of each entry among them, on the device
    values: Tensor  # [U, W] on the device
    arrived: Any  # event of the side stream, None on the CPU
    table: _Table


class OffloadedMemoryPool(MemoryPool):
    """A :class:`MemoryPool` whose table stays in host memory, for layers on ``compute_device``.

    A lookup sends each row that its entries name to the device once, through pinned memory and on a stream of its own,
    and the gradient of these rows comes back as a sparse one, which lies in ``values.grad`` on the host: for
    ``torch.optim.SparseAdam`` or ``SGD``, or a row optimizer of :mod:`topgather.optim`. The table may so be larger than
    the device's memory, which holds the rows of a batch and the cache.

    Indices are read by the host, which waits for them: where they are known ahead, as those of n-grams are,
    :meth:`prefetch` sends the rows of a later layer while the device works on an earlier one.

    Args:
        num_keys: as in :class:`MemoryPool`.
        value_dim: as in :class:`MemoryPool`.
        compute_device: where tokens are, and results.
        cache_rows: so many rows, those that lookups read most often, stay on the device. They are valid until the table
            changes, in whatever way: throughout inference, and within a training step for layers that share the pool.
            Takes 4 bytes a row of the table in host memory.
        dtype: of the table.
        mode: as in :class:`MemoryPool`.
        padding_idx: as in :class:`MemoryPool`.
        include_last_offset: as in :class:`MemoryPool`.

    Attributes:
        values: ``[num_keys ** 2, value_dim]`` on the CPU. ``module.to`` neither moves nor converts it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size out of range.
    """

    def __init__(
        self,
        num_keys: int,
        value_dim: int,
        compute_device: torch.device | str,
        cache_rows: int = 0,
        dtype: torch.dtype | None = None,
        mode: str = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> None:
        checks.check_count("cache_rows", cache_rows, least=0)
        super().__init__(num_keys, value_dim, True, "cpu", dtype, mode, padding_idx, include_last_offset)
        self.compute_device = torch.device(compute_device)
        self.cache_rows = cache_rows
        self._forget()

    @classmethod
    def from_pool(
        cls, pool: MemoryPool, compute_device: torch.device | str, cache_rows: int = 0
    ) -> OffloadedMemoryPool:
        """A pool with the table of another one, shared where that is on the CPU, else copied there.

        Args:
            pool: whose table and options are taken.
            compute_device: as in the constructor.
            cache_rows: as in the constructor.

        Raises:
            TypeError: ``pool`` is no :class:`MemoryPool`, or its table is sharded or in a file.
        """
        if not isinstance(pool, MemoryPool):
            raise TypeError(f"pool must be a MemoryPool, got {type(pool).__name__}")
        if isinstance(pool, MappedMemoryPool):
            raise TypeError(
                f"pool must have its table in memory, not in the file {pool.path}, which is trained in place"
            )
        refuse_sharded(pool.values, "an OffloadedMemoryPool")
        options = (pool.values.dtype, pool.mode, pool.padding_idx, pool.include_last_offset)
        made = cls.__new__(cls)
        with torch.device("meta"):  # nothing is drawn
            MemoryPool.__init__(made, pool.num_keys, pool.value_dim, True, "meta", *options)
        checks.check_count("cache_rows", cache_rows, least=0)
        made.values = nn.Parameter(pool.values.detach().cpu(), requires_grad=pool.values.requires_grad)
        made.compute_device, made.cache_rows = torch.device(compute_device), cache_rows
        made._forget()
        return made.train(pool.training)

    def _forget(self) -> None:
        self._hits = self._misses = 0
        num_counts = self.values.size(0) if self.cache_rows > 0 else 0
        self._counts = torch.zeros(num_counts, dtype=torch.int32, device="cpu")
        self._pending: list[tuple[Tensor, _Rows]] = []
        self._side_stream: Any = None
        self.clear_cache()

    def clear_cache(self) -> None:
        """Drop all cached rows; for changes of the table that torch does not see, through ``.data`` for one."""
        self._cache: Tensor | None = None
        self._cached_rows = torch.empty(0, dtype=torch.int64, device="cpu")  # ascending
        self._cached_table: _Table | None = None

    def usage(self) -> CacheUsage:
        """How many rows of the lookups so far came from the cache."""
        row_bytes = self.value_dim * self.values.element_size()
        total = max(self._hits + self._misses, 1)
        return CacheUsage(self._hits, self._misses, self._misses * row_bytes, self._hits / total)

    def prefetch(self, indices: Tensor) -> None:
        """Send the rows of a coming lookup, which is given the same tensor. Rows that were sent before the table
        changed are sent again, and so are those of indices on the CPU that changed. On a device the host does not
        look: where indices changed there meanwhile, the lookup is NaN.

        Args:
            indices: as the lookup takes them; on the CPU nothing is waited for. The last 64 of these calls are
                remembered until their lookup.
        """
        checks.check_tensor("indices", indices)
        self._pending.append((indices, self._send(indices)))
        del self._pending[:-MAX_PENDING]

    # The host reads indices: torch.compile leaves this to eager mode, and fuses what is around.
    @torch.compiler.disable
    def forward(  # type: ignore[override]
        self, indices: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        """Sums or means of rows, ``[T, value_dim]`` on ``compute_device``, as :meth:`MemoryPool.forward`.

        Args:
            indices: ``[T, K]``, or ``[E]`` with ``offsets``; on any device.
            weights: of the shape of ``indices``; ones if None.
            offsets: as in :meth:`MemoryPool.forward`.

        Raises:
            IndexError: an index that names no row, on every device.
        """
        checks.check_tensor("indices", indices)
        refuse_transforms("OffloadedMemoryPool", "the host reads which rows to send")
        if in_forward_mode():
            refuse_tangent("an OffloadedMemoryPool sends rows without it", values=self.values)
        sent, is_valid = self._take(indices)
        if sent.arrived is not None:
            stream = torch.cuda.current_stream(self.compute_device)
            stream.wait_event(sent.arrived)
            for tensor in (sent.values, sent.places):
                tensor.record_stream(stream)
        rows: Tensor = sent.values
        if is_valid is not None:
            rows = torch.where(is_valid, rows, torch.nan)
        if self.values.requires_grad and torch.is_grad_enabled():
            rows = _Arrived.apply(self.values, sent.rows, rows)  # type: ignore[no-untyped-call]
        padding = None
        if self.padding_idx is not None:
            place = int(torch.searchsorted(sent.rows, self.padding_idx))
            if place < len(sent.rows) and int(sent.rows[place]) == self.padding_idx:
                padding = place
        includes_last = self.include_last_offset and offsets is not None
        # Sparse: not every row that was sent is named by an entry of a bag.
        return memory_lookup(rows, sent.places, weights, True, offsets, self.mode, padding, includes_last)

    # --- rows on their way ------------------------------------------------------------------------------------------

    def _take(self, indices: Tensor) -> tuple[_Rows, Tensor | None]:
        """The rows, and whether they are still those of ``indices`` where the host does not know."""
        for i, (asked_for, sent) in enumerate(self._pending):
            if asked_for is indices:
                del self._pending[i]
                if not sent.table.is_still(self._table()):
                    break
                if indices.device.type != "cpu":
                    return sent, (indices == sent.indices).all()
                if torch.equal(indices, sent.indices):
                    return sent, None
                break
        return self._send(indices), None

    def _send(self, indices: Tensor) -> _Rows:
        checks.check_dtype("indices", indices, torch.int32, torch.int64)
        on_host = indices.detach().cpu().long()
        rows, places = on_host.unique(return_inverse=True)
        num_rows = self.values.size(0)
        if rows.numel() > 0 and (int(rows[0]) < 0 or int(rows[-1]) >= num_rows):
            wrong = int(rows[0]) if int(rows[0]) < 0 else int(rows[-1])
            raise IndexError(f"indices must be between 0 and {num_rows - 1}, got {wrong}")
        table = self._table()
        if not table.is_still(self._cached_table):
            self.clear_cache()
        copy = indices.detach().clone()
        at = torch.searchsorted(self._cached_rows, rows)
        is_cached = torch.zeros(rows.shape, dtype=torch.bool, device="cpu")
        if self._cached_rows.numel() > 0:
            is_cached = self._cached_rows[at.clamp(max=self._cached_rows.numel() - 1)] == rows
        missing = rows[~is_cached]
        self._hits += int(is_cached.sum())
        self._misses += missing.numel()
        if self.compute_device.type != "cuda":
            return self._join(copy, rows, places, at[is_cached], is_cached, self._read(missing), table)
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self.compute_device)
        # The cache may be of the caller's stream.
        self._side_stream.wait_stream(torch.cuda.current_stream(self.compute_device))
        with torch.cuda.stream(self._side_stream):
            sent = self._join(copy, rows, places, at[is_cached], is_cached, self._read(missing), table)
        return sent._replace(arrived=self._side_stream.record_event())

    def _table(self) -> _Table:
        values: Tensor = self.values
        return _Table(values, None if values.is_inference() else values._version)

    def _read(self, rows: Tensor) -> Tensor:
        """Rows of the table, on the device."""
        values: Tensor = self.values.detach()
        is_pinned = self.compute_device.type == "cuda"
        shape = rows.numel(), self.value_dim
        read = torch.empty(shape, dtype=values.dtype, device="cpu", pin_memory=is_pinned)
        torch.index_select(values, 0, rows, out=read)
        return read.to(self.compute_device, non_blocking=True)

    def _join(
        self,
        indices: Tensor,
        rows: Tensor,
        places: Tensor,
        cached_at: Tensor,
        is_cached: Tensor,
        read: Tensor,
        table: _Table,
    ) -> _Rows:
        """Rows that were read and rows of the cache, in order; the last ones stay in the cache."""
        values = read
        if cached_at.numel() > 0:
            assert self._cache is not None
            values = read.new_empty((rows.numel(), self.value_dim))
            values[self._to_device(is_cached.nonzero().flatten())] = self._cache[self._to_device(cached_at)]
            values[self._to_device((~is_cached).nonzero().flatten())] = read
        if self.cache_rows > 0:
            self._counts[rows] += 1
            self._keep(rows, values, table)
        return _Rows(indices, rows, self._to_device(places), values, None, table)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.compute_device.type == "cuda":
            numbers = numbers.pin_memory()
        return numbers.to(self.compute_device, non_blocking=True)

    def _keep(self, rows: Tensor, values: Tensor, table: _Table) -> None:
        """Those of this batch and of before that were read most often."""
        tables, numbers = [values], [rows]
        if self._cache is not None:
            others = (~torch.isin(self._cached_rows, rows)).nonzero().flatten()
            tables.append(self._cache[self._to_device(others)])
            numbers.append(self._cached_rows[others])
        candidates = torch.cat(numbers)
        hottest = self._counts[candidates].sort(descending=True, stable=True).indices[: self.cache_rows]
        self._cached_rows, order = candidates[hottest].sort()
        self._cache = torch.cat(tables)[self._to_device(hottest[order])]
        self._cached_table = table

    # --- as a module ------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OffloadedMemoryPool:
        """The table stays in host memory, with its dtype, when a model is moved or converted."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is on its way, the cache and the stream."""
        state = dict(self.__dict__)
        for name in ("_pending", "_side_stream", "_cache", "_cached_rows", "_cached_table", "_counts"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        hits, misses = self._hits, self._misses
        self._forget()
        self._hits, self._misses = hits, misses

    def extra_repr(self) -> str:
        """The table's options, as ``print`` shows them."""
        return f"{super().extra_repr()}, compute_device={str(self.compute_device)!r}, cache_rows={self.cache_rows}"


class _Arrived(torch.autograd.Function):
    """The rows of a batch as what they are of the table, whose gradient is sparse."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows, ctx.shape = rows, table.shape
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if not grad.is_sparse:  # of several backward passes at once
            return grad.new_zeros(ctx.shape, device="cpu").index_add(0, ctx.rows, grad.cpu()), None, None
        named = ctx.rows[grad._indices()[0].cpu()]
        keep_coalesced(named)
        sparse = torch.sparse_coo_tensor(
            named.unsqueeze(0), grad._values().cpu(), ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None, None

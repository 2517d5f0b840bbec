"""The table of values of memory layers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._common import checks
from ..ops import memory_lookup
from ..ops._bags import check_mode, row_of_padding
from ..ops._memory_ops import MAX_KEYS
from ..ops.quantized import quantize_rows
from ._tables import TableModule, refuse_sharded
from .quantized import QuantizedMemoryPool

if TYPE_CHECKING:
    from .mapped import MappedMemoryPool


class MemoryPool(TableModule, nn.EmbeddingBag):
    """The table of values of memory layers, made once and handed to every layer that shares it (Memory Layers at Scale,
    arXiv 2412.09764, section 3).

    Args:
        num_keys: keys of a half; the table has ``num_keys ** 2`` rows, one for each pair. From 1 to 46340.
        value_dim: channels of a row.
        sparse_grad: whether ``values`` gets a sparse gradient, over the touched rows alone, for
            ``torch.optim.SparseAdam`` or ``SGD``: the cost of a step then does not grow with the table. A table that
            a parametrisation or pruning computes, whole at every call, has dense gradients all the same. ``"padded"``:
            of a size that data does not say, as :func:`topgather.memory_lookup` has it.
        device: where the table is created; torch's default if None.
        dtype: of the table; torch's default if None.
        mode: ``"sum"``, or ``"mean"`` for lookups without weights: see :func:`topgather.memory_lookup`. A layer takes
            a pool of ``"sum"`` alone.
        padding_idx: row whose entries count for nothing: see :func:`topgather.memory_lookup`. It is at first 0.
        include_last_offset: whether offsets come with the end of the last bag: see :func:`topgather.memory_lookup`.

    To torch it is a kind of ``nn.EmbeddingBag``, with ``values`` as its weight, so that ``DistributedDataParallel``,
    which asks for that type, knows whether to expect a sparse gradient.

    Attributes:
        values: ``[num_keys ** 2, value_dim]``, at first normal with a standard deviation of ``value_dim ** -0.5``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size out of range.
    """

    TABLES: ClassVar[dict[str, str]] = {"values": "values"}

    # What an nn.EmbeddingBag has besides, and pools of earlier releases, unpickled, have not.
    mode = "sum"
    padding_idx: int | None = None
    include_last_offset = False
    # What nobody would read is not to be set.
    max_norm = property(lambda self: None)
    norm_type = property(lambda self: 2.0)
    scale_grad_by_freq = property(lambda self: False)

    def __init__(
        self,
        num_keys: int,
        value_dim: int,
        sparse_grad: bool | str = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        check_num_keys(num_keys)
        checks.check_count("value_dim", value_dim)
        checks.check_sparse_grad(sparse_grad)
        check_mode(mode)
        checks.check_flag("include_last_offset", include_last_offset)
        self.num_keys = num_keys
        self.value_dim = value_dim
        self.sparse_grad = sparse_grad
        self.mode = mode
        self.padding_idx = row_of_padding(padding_idx, num_keys**2)
        self.include_last_offset = include_last_offset
        self.values = nn.Parameter(torch.empty(num_keys**2, value_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``values`` anew."""
        nn.init.normal_(self.values, std=self.value_dim**-0.5)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.values[self.padding_idx].zero_()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``values``, under the name that it has in an ``nn.EmbeddingBag``."""
        return self.values

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Whether gradients are sparse, under the name that it has in an ``nn.EmbeddingBag``."""
        return bool(self.sparse_grad) and self._are_parameters("values")

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """Rows of the table."""
        return self.num_keys**2

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        """``value_dim``, under the name that it has in an ``nn.EmbeddingBag``."""
        return self.value_dim

    def forward(  # type: ignore[override]
        self, indices: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        """Sums or means of rows, ``[T, value_dim]``: :func:`topgather.memory_lookup` of ``values``.

        Args:
            indices: ``[T, K]``, or ``[E]`` with ``offsets``.
            weights: of the shape of ``indices``; ones if None.
            offsets: ``[T]``, where each bag begins, and with ``include_last_offset`` the end of the last, ``[T + 1]``.

        Raises:
            TypeError: an argument of the wrong type, or of a dtype that cannot index or weigh rows.
            ValueError: shapes that do not fit, or offsets that do not ascend within the entries.
            IndexError: an index that is no row of the table, on the CPU.
        """
        includes_last = self.include_last_offset and offsets is not None
        return memory_lookup(
            self.values,
            indices,
            weights,
            self.sparse and self.sparse_grad,
            offsets,
            self.mode,
            self.padding_idx,
            includes_last,
        )

    def quantize(self, dtype: torch.dtype = torch.int8, group_size: int | None = None) -> QuantizedMemoryPool:
        """The table as it is now in 8 bits: a pool of its own, for inference and frozen tables.

        In a model it takes the place of this one by ``layer.pool = layer.pool.quantize()``; layers that share a pool
        are given one quantised pool alike.

        Args:
            dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
            group_size: columns that share a scale: see :func:`topgather.nn.quantize_rows`. Default: a row.

        Returns:
            A :class:`topgather.nn.QuantizedMemoryPool` on the same device with the same options, in the same mode.
        """
        values: Tensor = self.values
        refuse_sharded(values, "a QuantizedMemoryPool")
        pool = QuantizedMemoryPool(
            self.num_keys,
            self.value_dim,
            dtype,
            group_size,
            device="meta",
            dtype=values.dtype,
            mode=self.mode,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
        )
        pool.values, pool.scales = quantize_rows(values.detach(), dtype, group_size)
        return pool.train(self.training)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file that :meth:`from_file` opens, and safetensors reads; one that is there is replaced.

        Args:
            path: of the file. It has its name once it is whole.

        Raises:
            TypeError: the table is sharded over ranks.
            BlockingIOError: a file of this name is open to train.
        """
        from .mapped import pool_to_file  # whose pools are of this class

        pool_to_file(self, path)

    @staticmethod
    def from_file(
        path: str | os.PathLike[str],
        num_keys: int | None = None,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        trainable: bool = True,
        mode: str = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> MappedMemoryPool:
        """A pool on the CPU whose table is a file, and may be larger than memory: a lookup reads the pages, of 4096
        bytes, that its rows lie in, and nothing else.

        It trains as any pool with ``sparse_grad=True``: an optimizer changes rows in memory, and ``flush()`` writes
        those back that had gradients. A process that is killed, whenever, leaves a file that opens as it was after the
        last ``flush()`` that ended, or, killed within one, after that one. The table is no part of the ``state_dict``,
        but for ``step``, the step that the file is at; a ``state_dict`` of another step is refused. Of all processes
        one may have the file open to train, or any number with ``trainable=False``. Linux alone.

        Args:
            path: of a file that :meth:`to_file` wrote. Where there is none, it is made, with rows drawn as the
                constructor draws them.
            num_keys: keys of a half; needed to make a file, else those of the file.
            value_dim: channels of a row; needed to make a file, else those of the file.
            dtype: of the table. Default: that of the file, torch's where it is made.
            trainable: whether rows are trained and written back.
            mode: as in the constructor.
            padding_idx: as in the constructor.
            include_last_offset: as in the constructor.

        Returns:
            A pool with three methods more: ``flush(step=None)`` writes back, ``prefetch(indices)`` asks for rows ahead
            of their lookup, many at a time, ``mark_rows(rows)`` adds rows to those to write back; and with ``step``.

        Raises:
            FileNotFoundError: there is no file, and ``num_keys`` or ``value_dim`` is not given.
            BlockingIOError: another process has it open to train, or, where ``trainable``, at all.
            ValueError: it is no table or damaged, or has another size or dtype than is given.
        """
        from .mapped import pool_from_file

        options = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
        return pool_from_file(path, num_keys, value_dim, dtype, trainable, options)

    def extra_repr(self) -> str:
        """The table's options, as ``print`` shows them."""
        text = f"num_keys={self.num_keys}, value_dim={self.value_dim}, sparse_grad={self.sparse_grad}"
        text += "" if self.mode == "sum" else f", mode={self.mode!r}"
        text += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return text + (", include_last_offset=True" if self.include_last_offset else "")


def check_num_keys(num_keys: Any) -> None:
    """Raise unless ``num_keys`` is how many keys a half may have."""
    checks.check_count("num_keys", num_keys)
    if num_keys > MAX_KEYS:
        raise ValueError(f"num_keys must be at most {MAX_KEYS}, got {num_keys}")

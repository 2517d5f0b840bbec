"""A memory layer's table in a file: read page by page, trained, and written back row by row."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._common import checks
from ..ops import _memory_update
from ._row_file import RowFile, create
from ._tables import refuse_sharded
from .pool import MemoryPool

# Rows that are drawn at a time, and indices that are kept before those that stand several times are struck out.
CHUNK_NUMBERS = 2**22


class MappedMemoryPool(MemoryPool):
    """A :class:`MemoryPool` whose table is a file: what :meth:`MemoryPool.from_file` returns.

    Attributes:
        values: ``[num_keys ** 2, value_dim]``, mapped: a lookup reads the pages of the rows that it names.
        path: of the file.
        step: the step that the file is at.
    """

    def __init__(self, path: Path, file: RowFile, num_keys: int, trainable: bool, options: Mapping[str, Any]) -> None:
        super().__init__(num_keys, file.row_dim, True, device="meta", dtype=file.dtype, **options)
        self.path = path
        self._file = file
        self._pending: list[Tensor] = []
        self.values = nn.Parameter(file.values, requires_grad=trainable)
        if trainable:
            # A table that nobody holds any more is let go of at once, with its file.
            self.values.register_hook(_Hook(self._record))
            _memory_update.listen(self.values, weakref.WeakMethod(self.mark_rows))

    @property
    def step(self) -> int:
        """The step that the file is at: that of the last :meth:`flush`, 0 at first."""
        return self._file.step

    def reset_parameters(self) -> None:
        """Nothing: a table in a file stays what it is."""

    def _record(self, gradient: Tensor) -> None:
        if not gradient.is_sparse:
            raise RuntimeError(
                "the table of MemoryPool.from_file must have sparse gradients alone: a dense one changes every row"
            )
        self.mark_rows(gradient._indices()[0])

    def mark_rows(self, rows: Tensor) -> None:
        """Say that rows are changed, or about to be: the next :meth:`flush` writes them back.

        The rows of every gradient that backward computes are marked, and those that an optimizer of torch's or of
        :mod:`topgather.optim` steps, by momentum alone too. Only what changes ``values`` otherwise needs this.

        Args:
            rows: integers of any shape.
        """
        checks.check_tensor("rows", rows)
        checks.check_dtype("rows", rows, torch.int32, torch.int64)
        self._pending.append(rows.detach().reshape(-1).to(torch.int64))
        if sum(part.numel() for part in self._pending) > CHUNK_NUMBERS and len(self._pending) > 1:
            self._pending = [torch.cat(self._pending).unique()]

    def flush(self, step: int | None = None) -> int:
        """Write the changed rows back and wait until they last: from here on the file is at ``step``.

        A process that is killed at any moment, within this call too, leaves a file that opens either at the step before
        or at this one, never between. Until here, changed pages take memory; from here on they do not. Each changed row
        is written twice, to a log and in its place.

        Args:
            step: above that of the file; the next one if None.

        Returns:
            The step.

        Raises:
            TypeError: ``step`` is no int.
            ValueError: it is not above the file's.
            RuntimeError: the table was opened with ``trainable=False``, or ``values`` are another tensor now.
            OSError: something could not be written, for want of space for one. It may be tried again.
        """
        if not self._file.is_writable:
            raise RuntimeError(f"{self.path} was opened with trainable=False and is not written to")
        step = self.step + 1 if step is None else step
        checks.check_count("step", step)
        if step <= self.step:
            raise ValueError(f"step must be above {self.step}, that of the file, got {step}")
        if self.values.data_ptr() != self._file.values.data_ptr():
            raise RuntimeError(f"values of a pool of {self.path} were replaced: they are changed in place")
        rows = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *self._pending]).unique()
        with torch.no_grad():
            self._file.write_back(rows, step)
        # An optimizer may still take the step of a gradient that is there.
        grad = self.values.grad
        self._pending = [] if grad is None else [_memory_update.rows_of_gradient(grad)]
        return step

    def prefetch(self, indices: Tensor) -> None:
        """Ask the system for the rows that a lookup is about to read: it then reads many at a time from the disk, where
        the lookup alone waits for one after the other. Returns at once.

        Args:
            indices: integers of any shape, each that of a row.
        """
        checks.check_tensor("indices", indices)
        self._file.prefetch(indices.detach().reshape(-1).to(torch.int64).unique())

    def close(self) -> None:
        """Let go of the file, so that it may be opened anew; what was not flushed is never written. The pool must not
        be used any more.
        """
        self._file.close()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MappedMemoryPool:
        """Nothing is moved or converted: the table stays in its file, with its dtype, when a model is."""
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "step"] = torch.tensor(self.step, device="cpu")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        missing, unexpected, errors = lists
        name = prefix + "step"
        if name in state_dict:
            step = int(state_dict[name])
            if step != self.step:
                errors.append(f"{name} is {step}, but {self.path} is at step {self.step}")
        elif strict:
            missing.append(name)
        if strict and prefix + "values" in state_dict:
            unexpected.append(prefix + "values")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a table in a file is not copied or pickled: open {self.path} where it is needed")

    def extra_repr(self) -> str:
        """The table's options, as ``print`` shows them."""
        return f"{super().extra_repr()}, path={str(self.path)!r}, step={self.step}"


class _Hook:
    """A hook on the gradient of a table, where there is one."""

    def __init__(self, record: Callable[[Tensor], None]) -> None:
        self._record = weakref.WeakMethod(record)
        setattr(self, _memory_update.TAKES_NONE, True)  # a row optimizer's tables have no gradient

    def __call__(self, gradient: Tensor | None) -> None:
        record = self._record()
        if record is not None and gradient is not None:
            record(gradient)


def _chunks(num_rows: int, row_dim: int, dtype: torch.dtype, padding_row: int | None) -> Iterator[Tensor]:
    """The rows that a :class:`MemoryPool` draws, some at a time."""
    step = max(CHUNK_NUMBERS // row_dim, 1)
    for first in range(0, num_rows, step):
        rows = torch.empty(min(step, num_rows - first), row_dim, dtype=dtype, device="cpu").normal_(std=row_dim**-0.5)
        if padding_row is not None and first <= padding_row < first + len(rows):
            rows[padding_row - first] = 0
        yield rows


def pool_to_file(pool: MemoryPool, path: str | os.PathLike[str]) -> None:
    """Write the table of a pool, in chunks."""
    values: Tensor = pool.values
    refuse_sharded(values, "a file")
    chunk = max(CHUNK_NUMBERS // pool.value_dim, 1)
    num_rows, row_dim = values.shape
    create(_path(path), num_rows, row_dim, values.dtype, iter(values.detach().split(chunk)))


def pool_from_file(
    path: str | os.PathLike[str],
    num_keys: int | None,
    value_dim: int | None,
    dtype: torch.dtype | None,
    trainable: bool,
    options: Mapping[str, Any],
) -> MappedMemoryPool:
    """What :meth:`MemoryPool.from_file` does."""
    path = _path(path)
    checks.check_flag("trainable", trainable)
    if not path.exists():
        if num_keys is None or value_dim is None:
            raise FileNotFoundError(f"there is no file {path}: to make one, num_keys and value_dim must be given")
        like = MemoryPool(num_keys, value_dim, device="meta", dtype=dtype, **options)
        rows = _chunks(num_keys**2, value_dim, like.values.dtype, like.padding_idx)
        create(path, num_keys**2, value_dim, like.values.dtype, rows)
    file = RowFile(path, trainable)
    try:
        found = round(file.num_rows**0.5)
        if found**2 != file.num_rows:
            raise ValueError(f"{path} must have a square number of rows, has {file.num_rows}")
        for name, value, there in (
            ("num_keys", num_keys, found),
            ("value_dim", value_dim, file.row_dim),
            ("dtype", dtype, file.dtype),
        ):
            if value is not None and value != there:
                raise ValueError(f"{name} must be {there}, as in {path}, got {value}")
        return MappedMemoryPool(path, file, found, trainable, options)
    except BaseException:
        file.close()
        raise


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {path!r} of type {type(path).__name__}")
    return Path(path)

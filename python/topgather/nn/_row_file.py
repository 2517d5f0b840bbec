"""A table of rows in a file: its format, a private mapping of it, and changes of rows that a crash cannot tear.

The file is one of safetensors with a single tensor, ``values``, whose header is padded to a page and names a step in
its metadata. Rows are changed in two stages. What they become is written beside the file, as ``<path>.log``, and
synced; only then are they changed in place and synced, with the step, and the log is removed. A process that ends
before the log has its name leaves the table as it was; one that ends later leaves a log that the next opening replays.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import sys
import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if sys.platform != "win32":  # the package imports there; opening a table is refused
    import fcntl

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FORMAT = "topgather.memory_pool"
STEP_DIGITS = 20
PAGE = 4096
LOG_MAGIC = b"TGROWLOG"
LOG_HEADER = struct.Struct("<8sQQQQ")  # magic, step, rows, bytes of a row, checksum of what follows
CHUNK_BYTES = 16 * 2**20


def write_all(descriptor: int, data: Any) -> None:
    """Write every byte of a buffer."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor, as a buffer of bytes. The tensor must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_ubyte * size).from_address(tensor.data_ptr()) if size else b""


def sync_folder(path: Path) -> None:
    """Make names in the folder of ``path`` last."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(num_rows: int, row_dim: int, dtype: torch.dtype, step: int) -> bytes:
    name = next(name for name, each in DTYPES.items() if each == dtype)
    num_bytes = num_rows * row_dim * dtype.itemsize
    content = {
        "__metadata__": {"format": FORMAT, "step": f"{step:0{STEP_DIGITS}d}"},
        "values": {"dtype": name, "shape": [num_rows, row_dim], "data_offsets": [0, num_bytes]},
    }
    text = json.dumps(content).encode()
    size = -(-(len(text) + 8) // PAGE) * PAGE - 8
    return struct.pack("<Q", size) + text.ljust(size)


def create(
    path: Path, num_rows: int, row_dim: int, dtype: torch.dtype, chunks: Iterator[Tensor] | None, step: int = 0
) -> None:
    """Write a table, whole or not at all: rows ``[n, row_dim]`` one chunk after the other; holes, that read as zeros,
    if None.

    Raises:
        BlockingIOError: there is a file of this name, which is open to be written to.
    """
    if sys.platform.startswith("linux"):
        _make_way(path)
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        header = _header(num_rows, row_dim, dtype, step)
        write_all(descriptor, header)
        for chunk in chunks or ():
            rows = chunk.detach().to("cpu", dtype).contiguous()
            write_all(descriptor, bytes_of(rows))
        os.ftruncate(descriptor, len(header) + num_rows * row_dim * dtype.itemsize)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(new, path)
    sync_folder(path)


def _lock(descriptor: int, kind: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{path} is open in another process, or in this one, that may change it") from None


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + ".log")


def _make_way(path: Path) -> None:
    """See that a file may take the place of ``path``: nobody writes there, and no log is left of what was there, which
    would be replayed in the new one.
    """
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _lock(descriptor, fcntl.LOCK_SH, path)  # who reads keeps what is read
        finally:
            os.close(descriptor)
        if _log_of(path).exists():
            with suppress(ValueError):  # no table, or a damaged one
                RowFile(path, is_writable=True).close()
    with suppress(FileNotFoundError):
        os.unlink(_log_of(path))


class RowFile:
    """An open table. ``values`` is a private mapping: what is written to it stays in this process until
    :meth:`write_back`.

    Args:
        path: of a file that :func:`create` made.
        is_writable: whether rows may be written back. Of all processes at most one may open a file so, and then no
            other may open it.

    Attributes:
        values: ``[rows, row_dim]``, pages that come from the file when they are touched.
        step: the step that the table is at.

    Raises:
        FileNotFoundError: there is no such file.
        BlockingIOError: another process has it open to write, or, where ``is_writable``, at all.
        ValueError: it is no table, or it or its log is damaged.
    """

    def __init__(self, path: Path, is_writable: bool) -> None:
        if not sys.platform.startswith("linux"):
            raise NotImplementedError("tables in files need Linux")
        self.path = path
        self.log_path = _log_of(path)
        self.is_writable = is_writable
        has_log = self.log_path.exists()
        self._descriptor = os.open(path, os.O_RDWR if is_writable or has_log else os.O_RDONLY)
        self._closes = weakref.finalize(self, os.close, self._descriptor)
        try:
            _lock(self._descriptor, fcntl.LOCK_EX if is_writable or has_log else fcntl.LOCK_SH, path)
            self._read_header()
            if is_writable or has_log:
                self._shared = mmap.mmap(self._descriptor, self._num_bytes)
                self._replay()
            if not is_writable:
                _lock(self._descriptor, fcntl.LOCK_SH, path)
            self._map()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        problem = f"{self.path} is no table that MemoryPool.to_file or from_file wrote"
        size_bytes = os.pread(self._descriptor, 8, 0)
        size = struct.unpack("<Q", size_bytes)[0] if len(size_bytes) == 8 else 0
        if (size + 8) % PAGE != 0 or size > 2**20 or size == 0:
            raise ValueError(problem)
        text = os.pread(self._descriptor, size, 8)
        try:
            content = json.loads(text)
            metadata, entry = content["__metadata__"], content["values"]
            self.dtype = DTYPES[entry["dtype"]]
            self.num_rows, self.row_dim = entry["shape"]
            self.step = int(metadata["step"])
            is_table = metadata["format"] == FORMAT and len(metadata["step"]) == STEP_DIGITS
        except (ValueError, KeyError, TypeError):
            raise ValueError(problem) from None
        if not is_table:
            raise ValueError(problem)
        self._start = size + 8
        self._step_offset = 8 + text.index(metadata["step"].encode())
        self._num_bytes = self._start + self.num_rows * self.row_bytes
        if os.fstat(self._descriptor).st_size != self._num_bytes:
            raise ValueError(f"{self.path} is damaged: it should have {self._num_bytes} bytes")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(self.row_dim * self.dtype.itemsize)

    def _map(self) -> None:
        # Without a reservation: what is touched needs memory, the rest of the table none.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._private = mmap.mmap(
            self._descriptor, self._num_bytes, mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
        )
        # Rows lie anywhere: to read ahead would read for nothing.
        self._private.madvise(mmap.MADV_RANDOM)
        self.values = self._rows_of(self._private)

    def _rows_of(self, mapping: mmap.mmap) -> Tensor:
        count = self.num_rows * self.row_dim
        if count == 0:
            return torch.empty(self.num_rows, self.row_dim, dtype=self.dtype, device="cpu")
        rows = torch.frombuffer(mapping, dtype=self.dtype, count=count, offset=self._start)
        return rows.view(self.num_rows, self.row_dim)

    def prefetch(self, rows: Tensor) -> None:
        """Ask the system for the pages of rows, sorted and unique, many at a time instead of one by one."""
        first = (rows * self.row_bytes + self._start) // PAGE
        end = ((rows + 1) * self.row_bytes + self._start + PAGE - 1) // PAGE
        if rows.numel() == 0:
            return
        starts_run = torch.ones_like(rows, dtype=torch.bool)
        starts_run[1:] = first[1:] > end[:-1]
        ends_run = torch.ones_like(starts_run)
        ends_run[:-1] = starts_run[1:]
        for page, end_page in zip(first[starts_run].tolist(), end[ends_run].tolist(), strict=True):
            length = min(end_page * PAGE, self._num_bytes) - page * PAGE
            self._private.madvise(mmap.MADV_WILLNEED, page * PAGE, length)

    # --- changes ------------------------------------------------------------------------------------------------------

    def write_back(self, rows: Tensor, step: int) -> None:
        """Make ``values`` of these rows, sorted and unique int64, those of the file, which is then at ``step``.

        Returns once that lasts. Everything that was written to other rows is forgotten.
        """
        self._write_log(rows, step)
        self._apply_chunks(((part, self.values[part]) for part in rows.split(self._rows_per_chunk())), step)
        # Private copies of pages are given back; the file has the same.
        self._private.madvise(mmap.MADV_DONTNEED)

    def _rows_per_chunk(self) -> int:
        return max(CHUNK_BYTES // max(self.row_bytes, 1), 1)

    def _write_log(self, rows: Tensor, step: int) -> None:
        new = self.log_path.with_name(self.log_path.name + ".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.lseek(descriptor, LOG_HEADER.size, os.SEEK_SET)
            checksum = zlib.crc32(bytes_of(rows))
            write_all(descriptor, bytes_of(rows))
            for part in rows.split(self._rows_per_chunk()):
                chunk = self.values[part]
                checksum = zlib.crc32(bytes_of(chunk), checksum)
                write_all(descriptor, bytes_of(chunk))
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, LOG_HEADER.pack(LOG_MAGIC, step, rows.numel(), self.row_bytes, checksum))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(new, self.log_path)
        sync_folder(self.log_path)

    def _apply_chunks(self, chunks: Any, step: int) -> None:
        """Change rows in place, then the step, and remove the log."""
        shared = self._rows_of(self._shared)
        for part, chunk in chunks:
            shared[part] = chunk
        self._shared[self._step_offset : self._step_offset + STEP_DIGITS] = f"{step:0{STEP_DIGITS}d}".encode()
        self._shared.flush()
        os.fsync(self._descriptor)
        self._shared.madvise(mmap.MADV_DONTNEED)
        self.step = step
        os.unlink(self.log_path)
        sync_folder(self.log_path)

    def _replay(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.log_path.with_name(self.log_path.name + ".new"))
        if not self.log_path.exists():
            return
        with open(self.log_path, "rb") as log:
            header = log.read(LOG_HEADER.size)
            fields = LOG_HEADER.unpack(header) if len(header) == LOG_HEADER.size else (b"", 0, 0, 0, 0)
            magic, step, num_rows, row_bytes, checksum = fields
            is_log = magic == LOG_MAGIC and row_bytes == self.row_bytes
            if not is_log or self._checksum(log, num_rows) != checksum:
                raise ValueError(f"{self.log_path} is damaged, and {self.path} may be: rows of it were being changed")
            log.seek(LOG_HEADER.size)
            rows = torch.frombuffer(bytearray(log.read(8 * num_rows)), dtype=torch.int64) if num_rows else None
            self._apply_chunks(self._chunks_of_log(log, rows), step)

    def _checksum(self, log: Any, num_rows: int) -> int:
        size = num_rows * (8 + self.row_bytes)
        if os.fstat(log.fileno()).st_size != LOG_HEADER.size + size:
            return -1
        checksum = 0
        while data := log.read(CHUNK_BYTES):
            checksum = zlib.crc32(data, checksum)
        return checksum

    def _chunks_of_log(self, log: Any, rows: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        for part in () if rows is None else rows.split(self._rows_per_chunk()):
            data = bytearray(log.read(part.numel() * self.row_bytes))
            if data:
                yield part, torch.frombuffer(data, dtype=self.dtype).view(-1, self.row_dim)

    def close(self) -> None:
        """Let other processes have the file. The mapping stays as long as tensors of it."""
        if self._closes.alive:
            # Mappings have descriptors of their own, which share the lock.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._closes()

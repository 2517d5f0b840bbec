"""Memory as the kernel sees it: the caller's regions, shared memory per block, local memory per thread.

All of it lies in one array, the arena, so that a load whose threads point into several state spaces is one gather. An
address is checked against the region it must lie in and for alignment, then becomes an offset into the arena.

Copies of ``cp.async`` are in flight until the thread that issued them waits. Their destinations keep the old bytes, and
touching them before is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parser import (
    LOCAL_START,
    LOCAL_WINDOW,
    MODULE_START,
    PARAM_START,
    PARAM_WINDOW,
    SHARED_START,
    SHARED_WINDOW,
)
from .scalar_types import Array, PtxError

_ARENA_ALIGN = 256
_WINDOW_SHIFT = 60
POISON = 0xFF


class MemoryAccessError(PtxError):
    """An access outside every region, misaligned, or to a copy still in flight. ``which`` is the first bad element."""

    def __init__(self, message: str, which: int) -> None:
        super().__init__(message)
        self.message = message
        self.which = which


@dataclass
class Blocks:
    """The part of memory that one batch of blocks owns."""

    num_blocks: int
    threads_per_block: int
    shared_end: int  # one past the last valid shared address
    local_end: int

    @property
    def shared_stride(self) -> int:
        return -(-self.shared_end // _ARENA_ALIGN) * _ARENA_ALIGN

    @property
    def local_stride(self) -> int:
        return -(-self.local_end // 16) * 16


class Memory:
    """The arena and the way from addresses to offsets in it."""

    def __init__(
        self, regions: Mapping[int, bytes | bytearray], module_data: Mapping[int, bytes], params: bytes, blocks: Blocks
    ) -> None:
        self._blocks = blocks
        offset = _ARENA_ALIGN
        placed: list[tuple[int, int, int]] = []
        everything = {**regions, **module_data}
        for address in sorted(everything):
            if address in regions and address >= SHARED_WINDOW:
                raise PtxError(f"the region at {address:#x} lies in a window of the generic space")
            if placed and address < placed[-1][1]:
                raise PtxError(f"the regions at {placed[-1][0]:#x} and {address:#x} overlap")
            offset = -(-offset // _ARENA_ALIGN) * _ARENA_ALIGN + address % _ARENA_ALIGN
            placed.append((address, address + len(everything[address]), offset))
            offset += len(everything[address])
        self._placed = placed
        self._starts = np.array([start for start, _, _ in placed] or [0], np.int64)
        self._ends = np.array([end for _, end, _ in placed] or [0], np.int64)
        self._shifts = np.array([at - start for start, _, at in placed] or [0], np.int64)
        self._param_at = -(-offset // _ARENA_ALIGN) * _ARENA_ALIGN
        self._param_bytes = len(params)
        self._shared_at = -(-(self._param_at + len(params)) // _ARENA_ALIGN) * _ARENA_ALIGN
        self._local_at = self._shared_at + blocks.num_blocks * blocks.shared_stride
        num_threads = blocks.num_blocks * blocks.threads_per_block
        end = self._local_at + num_threads * blocks.local_stride
        self._arena = np.full(-(-end // _ARENA_ALIGN) * _ARENA_ALIGN, POISON, np.uint8)
        self._views: dict[tuple[int, int], Array] = {}
        for start, _, at in placed:
            data = everything[start]
            self._arena[at : at + len(data)] = np.frombuffer(data, np.uint8)
        self._arena[self._param_at : self._param_at + len(params)] = np.frombuffer(params, np.uint8)
        self._in_flight = np.zeros((self._local_at - self._shared_at) // 4, np.uint8)
        self._num_in_flight = 0
        self._is_float32 = np.zeros(len(self._arena) // 4, np.bool_)  # by word: last stored as .f32

    def start_batch(self) -> None:
        """Forget what the last blocks left in shared and local memory."""
        self._arena[self._shared_at :] = POISON
        self._in_flight[:] = 0
        self._num_in_flight = 0

    def region_bytes(self) -> dict[int, bytes]:
        """The caller's regions as they are now."""
        return {
            start: self._arena[at : at + end - start].tobytes()
            for start, end, at in self._placed
            if start < MODULE_START
        }

    def float32_words(self) -> dict[int, Array]:
        """For every region of the caller's, which of its words of 4 bytes were last stored as float32."""
        return {
            start: self._is_float32[at // 4 : at // 4 + (end - start) // 4]
            for start, end, at in self._placed
            if start < MODULE_START
        }

    def note_stores(self, offsets: Array, num_bytes: int, is_float32: bool) -> None:
        """Remember as what type these bytes were stored."""
        for word in range(max(1, num_bytes // 4)):
            self._is_float32[offsets // 4 + word] = is_float32

    def view(self, num_bytes: int, count: int = 1) -> Array:
        """The arena as unsigned integers of ``num_bytes``; for a ``count`` above 1, as rows of so many of them."""
        found = self._views.get((num_bytes, count))
        if found is None:
            found = self._arena.view(f"u{num_bytes}")
            if count > 1:
                found = found.reshape(-1, count)
            self._views[num_bytes, count] = found
        return found

    def offsets(self, space: str, addresses: Array, num_bytes: int, threads: Array) -> Array:
        """Where in the arena ``num_bytes`` at every address lie; ``threads`` says whose shared and local memory."""
        if np.any(addresses & np.int64(num_bytes - 1)):
            which = int(np.flatnonzero(addresses & np.int64(num_bytes - 1))[0])
            raise MemoryAccessError(f"{int(addresses[which]):#x} is not aligned to {num_bytes} bytes", which)
        if space == "shared":
            return self._shared_offsets(addresses, num_bytes, threads)
        if space in ("global", "const"):
            return self._global_offsets(addresses, num_bytes)
        if space == "local":
            return self._local_offsets(addresses, num_bytes, threads)
        if space == "param":
            if len(addresses) and addresses[0] < PARAM_START:
                return self._local_offsets(addresses, num_bytes, threads)
            return self._param_offsets(addresses, num_bytes)
        return self._generic_offsets(addresses, num_bytes, threads)

    def _generic_offsets(self, addresses: Array, num_bytes: int, threads: Array) -> Array:
        windows = addresses >> np.int64(_WINDOW_SHIFT)
        offsets = np.empty(len(addresses), np.int64)
        for window in np.unique(windows):
            chosen = np.flatnonzero(windows == window)
            base = np.int64(int(window) << _WINDOW_SHIFT)
            try:
                if base == SHARED_WINDOW:
                    found = self._shared_offsets(addresses[chosen] - base, num_bytes, threads[chosen])
                elif base == LOCAL_WINDOW:
                    found = self._local_offsets(addresses[chosen] - base, num_bytes, threads[chosen])
                elif base == PARAM_WINDOW:
                    found = self._param_offsets(addresses[chosen] - base, num_bytes)
                else:
                    found = self._global_offsets(addresses[chosen], num_bytes)
            except MemoryAccessError as error:
                raise MemoryAccessError(error.message, int(chosen[error.which])) from None
            offsets[chosen] = found
        return offsets

    def _global_offsets(self, addresses: Array, num_bytes: int) -> Array:
        region = np.searchsorted(self._starts, addresses, "right") - 1
        is_bad = (region < 0) | (addresses + np.int64(num_bytes) > self._ends[region])
        self._refuse(is_bad, addresses, num_bytes, "lie in no region of global memory")
        return addresses + self._shifts[region]

    def _shared_offsets(self, addresses: Array, num_bytes: int, threads: Array) -> Array:
        blocks = self._blocks
        is_bad = (addresses < SHARED_START) | (addresses + np.int64(num_bytes) > blocks.shared_end)
        self._refuse(is_bad, addresses, num_bytes, "lie outside the block's shared memory")
        offsets = addresses + (threads // blocks.threads_per_block) * blocks.shared_stride + self._shared_at
        if self._num_in_flight:
            words = max(1, num_bytes // 4)
            flags = self._in_flight.view(f"u{words}")[(offsets - self._shared_at) // (4 * words)]
            self._refuse(flags != 0, addresses, num_bytes, "of shared memory are still in flight (cp.async, no wait)")
        return offsets

    def _local_offsets(self, addresses: Array, num_bytes: int, threads: Array) -> Array:
        is_bad = (addresses < LOCAL_START) | (addresses + np.int64(num_bytes) > self._blocks.local_end)
        self._refuse(is_bad, addresses, num_bytes, "lie outside the thread's local memory")
        return addresses + threads * self._blocks.local_stride + self._local_at

    def _param_offsets(self, addresses: Array, num_bytes: int) -> Array:
        is_bad = (addresses < PARAM_START) | (addresses + np.int64(num_bytes) > PARAM_START + self._param_bytes)
        self._refuse(is_bad, addresses, num_bytes, "lie outside the kernel's parameters")
        return addresses + np.int64(self._param_at - PARAM_START)

    @staticmethod
    def _refuse(is_bad: Array, addresses: Array, num_bytes: int, why: str) -> None:
        if is_bad.any():
            which = int(np.flatnonzero(is_bad)[0])
            raise MemoryAccessError(f"{num_bytes} bytes at {int(addresses[which]):#x} {why}", which)

    def is_shared(self, offsets: Array) -> Array:
        """Which offsets of the arena belong to shared memory."""
        return (offsets >= self._shared_at) & (offsets < self._local_at)

    def mark_in_flight(self, offsets: Array, num_bytes: int, is_in_flight: bool) -> None:
        """Note that copies to these offsets were issued, or have landed."""
        words = num_bytes // 4
        flags = self._in_flight.view(f"u{words}")
        flags[(offsets - self._shared_at) // (4 * words)] = np.iinfo(flags.dtype).max if is_in_flight else 0
        self._num_in_flight += len(offsets) if is_in_flight else -len(offsets)


@dataclass
class AsyncCopy:
    """One cp.async of some threads: what lands where, and in which of the thread's groups."""

    threads: Array
    offsets: Array
    data: Array
    groups: Array


class AsyncCopies:
    """The copies in flight. Groups are numbered per thread from 0; ``num_committed`` is the number of the open one."""

    def __init__(self, num_threads: int) -> None:
        self.num_committed = np.zeros(num_threads, np.int64)
        self._pending: list[AsyncCopy] = []

    def issue(self, memory: Memory, threads: Array, offsets: Array, data: Array) -> None:
        """Start copying ``data`` (one row of words a thread) to ``offsets`` of shared memory."""
        memory.mark_in_flight(offsets, data.shape[1] * 4, True)
        self._pending.append(AsyncCopy(threads, offsets, data, self.num_committed[threads]))

    def wait(self, memory: Memory, threads: Any, num_pending: int) -> None:
        """Land what these threads issued, but for their ``num_pending`` latest groups."""
        first_kept = np.full(len(self.num_committed), -1, np.int64)
        first_kept[threads] = self.num_committed[threads] - num_pending
        still_pending = []
        for copy in self._pending:
            lands = copy.groups < first_kept[copy.threads]
            if lands.any():
                num_words = copy.data.shape[1]
                memory.mark_in_flight(copy.offsets[lands], num_words * 4, False)
                memory.view(4, num_words)[copy.offsets[lands] // (4 * num_words)] = copy.data[lands].reshape(
                    (-1, num_words) if num_words > 1 else -1
                )
            if not lands.all():
                rest = ~lands
                still_pending.append(
                    AsyncCopy(copy.threads[rest], copy.offsets[rest], copy.data[rest], copy.groups[rest])
                )
        self._pending = still_pending

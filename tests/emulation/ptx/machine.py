"""Threads that diverge, meet again, wait and finish.

All threads of a batch of blocks run together. Those at the same place form a group, and the group furthest back in the
program goes first, which is how groups that parted meet again. A group stops where it cannot go on alone:

- at a barrier, until every thread of its block that has not finished is at that barrier;
- at an instruction of a whole warp, until the threads it names are all there.

If nobody can go on, the program is stuck and says where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import arithmetic, conversions, loads_stores, warp
from .decoder import SPECIAL_REGISTERS, Decoder, Execute, Lanes, Read, Write
from .memory import AsyncCopies, Blocks, Memory, MemoryAccessError
from .parser import Instruction, Kernel, Label
from .scalar_types import TYPES, Array, PtxError, collecting_no_garbage

WARP_SIZE = warp.WARP_SIZE
MAX_THREADS_PER_BATCH = 8192
MAX_SHARED_BYTES_PER_BATCH = 64 << 20
MAX_STEPS = 5_000_000
NUM_BARRIERS = 16
INSTRUCTION_MODULES = (arithmetic, conversions, loads_stores, warp)  # imported for the tables they fill

_VIEW_KINDS = {
    1: ("bool",),
    16: ("uint16", "int16", "float16"),
    32: ("uint32", "int32", "float32"),
    64: ("uint64", "int64", "float64"),
}


@dataclass
class Barrier:
    """``bar.sync`` and ``bar.red``: which barrier, how many threads, and what the reduction is of."""

    read_id: Read
    read_count: Read | None
    reduction: str | None = None
    read_value: Read | None = None
    write: Write | None = None


@dataclass
class Step:
    """An instruction, decoded."""

    text: str
    kind: str  # plain, branch, table, barrier, collective, exit
    predicate: Read | None = None
    execute: Execute | None = None
    target: int = -1
    targets: tuple[int, ...] = ()
    read_index: Read | None = None
    barrier: Barrier | None = None
    read_mask: Read | None = None


@dataclass
class Program:
    """A kernel, decoded: once, for every launch."""

    steps: list[Step]
    is_leader: list[bool]  # where groups may stand: labels and after branches
    num_rows: dict[int, int]
    special_rows: dict[str, int]


@cache
def decode(kernel: Kernel) -> Program:
    """The kernel as steps, kept for the next launch."""
    with collecting_no_garbage():
        decoder = Decoder(kernel)
        steps = [_decode_step(decoder, kernel, instruction) for instruction in kernel.instructions]
    steps.append(Step("the end of the program", "exit"))
    is_leader = [False] * len(steps)
    for label in kernel.labels.values():
        is_leader[label] = True
    for i, step in enumerate(steps):
        if step.kind != "plain":
            is_leader[i] = True
            if i + 1 < len(steps):
                is_leader[i + 1] = True
    return Program(steps, is_leader, decoder.num_rows, decoder.special_rows)


def _decode_step(decoder: Decoder, kernel: Kernel, instruction: Instruction) -> Step:
    step = Step(instruction.text, "plain")
    if instruction.predicate is not None:
        step.predicate = decoder.read(instruction, instruction.predicate, TYPES["pred"])
    root = instruction.root
    if root == "bra":
        label = instruction.operands[0]
        if not isinstance(label, Label):
            raise PtxError(f"not a label: {instruction.text}")
        step.kind, step.target = "branch", kernel.labels[label.name]
    elif root == "brx":
        index, table = instruction.operands
        if not isinstance(table, Label):
            raise PtxError(f"not a table of labels: {instruction.text}")
        step.kind = "table"
        step.read_index = decoder.read(instruction, index, TYPES["u32"])
        step.targets = tuple(kernel.labels[name] for name in kernel.branch_targets[table.name])
    elif root in ("ret", "exit"):
        step.kind = "exit"
    elif root in ("bar", "barrier") and not warp.is_collective(instruction):
        step.kind, step.barrier = "barrier", _decode_barrier(decoder, instruction)
    else:
        step.execute = decoder.decode(instruction)
        if warp.is_collective(instruction):
            step.kind = "collective"
            step.read_mask = warp.read_member_mask(decoder, instruction)
    return step


def _decode_barrier(decoder: Decoder, instruction: Instruction) -> Barrier:
    modifiers = [part for part in instruction.modifiers if part not in ("cta", "aligned")]
    operands = list(instruction.operands)
    if modifiers == ["sync"] and 1 <= len(operands) <= 2:
        count = operands[1] if len(operands) == 2 else None
        return Barrier(
            decoder.read(instruction, operands[0], TYPES["u32"]),
            None if count is None else decoder.read(instruction, count, TYPES["u32"]),
        )
    if len(modifiers) == 3 and modifiers[0] == "red" and 3 <= len(operands) <= 4:
        if modifiers[1:] not in (["popc", "u32"], ["and", "pred"], ["or", "pred"]):
            raise PtxError(f"cannot execute: {instruction.text}")
        count = operands[2] if len(operands) == 4 else None
        return Barrier(
            decoder.read(instruction, operands[1], TYPES["u32"]),
            None if count is None else decoder.read(instruction, count, TYPES["u32"]),
            modifiers[1],
            decoder.read(instruction, operands[-1], TYPES["pred"]),
            decoder.write(instruction, operands[0], TYPES[modifiers[2]]),
        )
    raise PtxError(f"cannot execute: {instruction.text}")


class Batch:
    """Registers and copies in flight of the blocks that run together; what the instructions work on.

    Threads are numbered block by block, each block filled up to whole warps with threads that never run.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        first_block: int,
        num_blocks: int,
    ) -> None:
        self.memory = memory
        self.block_threads = block[0] * block[1] * block[2]
        self.padded_threads = -(-self.block_threads // WARP_SIZE) * WARP_SIZE
        self.num_threads = num_blocks * self.padded_threads
        self.first_block, self.grid, self.block = first_block, grid, block
        self.copies = AsyncCopies(self.num_threads)
        self._thread_indices = np.arange(self.num_threads)
        self.rows: dict[str, list[Array]] = {}
        for bits, kinds in _VIEW_KINDS.items():
            storage = np.zeros((program.num_rows[bits], self.num_threads), kinds[0])
            for kind in kinds:
                self.rows[kind] = list(storage.view(kind))
        self._set_special_registers(program)

    def _set_special_registers(self, program: Program) -> None:
        in_block = self._thread_indices % self.padded_threads
        blocks = self._thread_indices // self.padded_threads + self.first_block
        lane = in_block % WARP_SIZE
        values: dict[str, Any] = {"%laneid": lane}
        for axis, thread, size, block, grid in zip(
            "xyz",
            _coordinates(in_block, self.block),
            self.block,
            _coordinates(blocks, self.grid),
            self.grid,
            strict=True,
        ):
            values |= {f"%tid.{axis}": thread, f"%ntid.{axis}": size, f"%ctaid.{axis}": block, f"%nctaid.{axis}": grid}
        own = np.left_shift(np.int64(1), lane)
        below = own - 1
        values |= {"%lanemask_eq": own, "%lanemask_lt": below, "%lanemask_le": below | own}
        values |= {"%lanemask_gt": 0xFFFFFFFF & ~(below | own), "%lanemask_ge": 0xFFFFFFFF & ~below}
        for name in SPECIAL_REGISTERS:
            self.rows["uint32"][program.special_rows[name]][:] = values[name]

    def exists(self) -> Array:
        """Which threads are real, not there to fill a warp."""
        return self._thread_indices % self.padded_threads < self.block_threads

    def threads(self, lanes: Lanes) -> Array:
        """The lanes as indices of threads."""
        return self._thread_indices[lanes] if isinstance(lanes, slice) else lanes

    def count(self, lanes: Lanes) -> int:
        """How many lanes there are."""
        return len(self._thread_indices[lanes]) if isinstance(lanes, slice) else len(lanes)

    def as_array(self, values: Any, lanes: Lanes) -> Array:
        """One element a lane, also of a constant."""
        values = np.asarray(values)
        return values if values.ndim else np.full(self.count(lanes), values)

    def offsets(self, space: str, addresses: Array, num_bytes: int, lanes: Lanes) -> Array:
        """Where in memory the addresses lie, for these threads."""
        threads = self.threads(lanes)
        try:
            return self.memory.offsets(space, addresses, num_bytes, threads)
        except MemoryAccessError as error:
            thread = int(threads[error.which])
            raise PtxError(f"{error.message}; {self.describe(thread)}") from None

    def describe(self, thread: int) -> str:
        """Say which thread that is."""
        in_block = tuple(int(each) for each in _coordinates(np.int64(thread % self.padded_threads), self.block))
        block_index = np.int64(thread // self.padded_threads + self.first_block)
        block = tuple(int(each) for each in _coordinates(block_index, self.grid))
        return f"thread {in_block} of block {block}"

    def require_active(self, threads: Array, lanes: Lanes, instruction: Instruction) -> None:
        """Refuse to read from threads that do not execute the instruction."""
        if isinstance(lanes, slice) and lanes.start == 0 and lanes.stop == self.num_threads:
            return
        is_active = np.zeros(self.num_threads, np.bool_)
        is_active[lanes] = True
        if not is_active[threads].all():
            thread = int(threads[~is_active[threads]][0])
            raise PtxError(f"reads from a thread that takes no part, {self.describe(thread)}: {instruction.text}")


def _coordinates(index: Any, size: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    return index % size[0], index // size[0] % size[1], index // (size[0] * size[1])


def _as_lanes(threads: Array) -> Lanes:
    """Neighbours as a slice, which needs no gather."""
    if len(threads) and threads[-1] - threads[0] + 1 == len(threads):
        return slice(int(threads[0]), int(threads[-1]) + 1)
    return threads


class Scheduler:
    """Runs one batch to its end."""

    def __init__(self, program: Program, batch: Batch) -> None:
        self._program, self._batch = program, batch
        self._is_alive = batch.exists()
        self._ready: dict[int, list[Array]] = {0: [np.flatnonzero(self._is_alive)]}
        self._parked: dict[int, list[Array]] = {}  # at an instruction of a warp that is not complete
        self._waiting: list[tuple[int, Array, Array | None]] = []  # at a barrier, with the reduction's values
        self.num_steps = 0

    def run(self) -> None:
        """Until every thread has finished."""
        while self._ready or self._release():
            place = min(self._ready)
            groups = self._ready.pop(place)
            threads = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
            self._advance(place, threads)
        stuck = sorted({place for place, _, _ in self._waiting} | self._parked.keys())
        if stuck:
            where = "; ".join(self._program.steps[place].text for place in stuck)
            raise PtxError(f"threads wait forever, at: {where}")

    def _add(self, place: int, threads: Array) -> None:
        if len(threads):
            self._ready.setdefault(place, []).append(threads)

    def _select(self, step: Step, lanes: Lanes) -> Lanes:
        """The lanes whose predicate lets them execute."""
        if step.predicate is None:
            return lanes
        is_chosen = self._batch.as_array(step.predicate(self._batch, lanes), lanes)
        if is_chosen.all():
            return lanes
        return _as_lanes(self._batch.threads(lanes)[is_chosen])

    def _advance(self, place: int, threads: Array) -> None:
        """Run one group until it parts, waits, ends, or may meet another."""
        steps, is_leader, batch = self._program.steps, self._program.is_leader, self._batch
        lanes = _as_lanes(threads)
        while True:
            step = steps[place]
            self.num_steps += 1
            if self.num_steps > MAX_STEPS:
                raise PtxError(f"more than {MAX_STEPS} steps, at: {step.text}")
            if step.kind == "plain":
                chosen = self._select(step, lanes)
                if batch.count(chosen):
                    self._execute(step, chosen)
                place += 1
            else:
                after = self._control(step, place, lanes)
                if after is None:
                    return
                place, lanes = after
            if is_leader[place] and self._ready:
                self._add(place, batch.threads(lanes))
                return

    def _execute(self, step: Step, lanes: Lanes) -> None:
        try:
            step.execute(self._batch, lanes)  # type: ignore[misc]
        except PtxError as error:
            raise PtxError(f"{error}: {step.text}" if step.text not in str(error) else str(error)) from None

    def _control(self, step: Step, place: int, lanes: Lanes) -> tuple[int, Lanes] | None:
        """What is not plain. Where the lanes go if they stay together, None if they were sent on or wait."""
        batch = self._batch
        if step.kind == "collective":
            return self._meet(step, place, lanes)
        if step.kind == "barrier":
            if step.predicate is not None and batch.count(self._select(step, lanes)) != batch.count(lanes):
                raise PtxError(f"a barrier for some threads of a group only: {step.text}")
            values = None
            if step.barrier is not None and step.barrier.read_value is not None:
                values = batch.as_array(step.barrier.read_value(batch, lanes), lanes).copy()
            self._waiting.append((place, batch.threads(lanes), values))
            return None
        chosen = self._select(step, lanes)
        is_everyone = batch.count(chosen) == batch.count(lanes)
        if step.kind == "branch":
            if is_everyone:
                return step.target, lanes
            if not batch.count(chosen):
                return place + 1, lanes
            self._add(step.target, batch.threads(chosen))
        elif step.kind == "table":
            index = batch.as_array(step.read_index(batch, chosen), chosen)  # type: ignore[misc]
            if batch.count(chosen) and index.max() >= len(step.targets):
                raise PtxError(f"beyond the table: {step.text}")
            for each in np.unique(index):
                self._add(step.targets[int(each)], batch.threads(chosen)[index == each])
        else:
            self._is_alive[chosen] = False
        if not is_everyone:
            self._add(place + 1, np.setdiff1d(batch.threads(lanes), batch.threads(chosen), assume_unique=True))
        return None

    def _meet(self, step: Step, place: int, lanes: Lanes) -> tuple[int, Lanes] | None:
        """An instruction of a warp: the warps that are complete execute it, the others wait here."""
        batch = self._batch
        if place in self._parked:
            lanes = _as_lanes(np.sort(np.concatenate([batch.threads(lanes), *self._parked.pop(place)])))
        chosen = self._select(step, lanes)
        complete = self._complete(step, chosen)
        if complete is None:
            if batch.count(chosen):
                self._execute(step, chosen)
            return place + 1, lanes
        together, threads = complete, batch.threads(chosen)
        if together.any():
            self._execute(step, _as_lanes(threads[together]))
        if not together.all():
            self._parked.setdefault(place, []).append(threads[~together])
        passed = np.setdiff1d(batch.threads(lanes), threads[~together], assume_unique=True)
        self._add(place + 1, passed)
        return None

    def _complete(self, step: Step, lanes: Lanes) -> Array | None:
        """Which lanes find all threads that their mask names present; None if all do."""
        batch = self._batch
        if not batch.count(lanes):
            return None
        mask = None if step.read_mask is None else step.read_mask(batch, lanes)
        is_full_mask = mask is None or bool(np.all(mask == np.uint32(0xFFFFFFFF)))
        if is_full_mask and self._is_whole_warps(lanes):
            return None
        threads = batch.threads(lanes)
        warps = threads // WARP_SIZE
        num_warps = batch.num_threads // WARP_SIZE
        bits = np.left_shift(np.int64(1), threads % WARP_SIZE)
        present = np.bincount(warps, bits.astype(np.float64), num_warps).astype(np.int64)
        alive_threads = np.flatnonzero(self._is_alive)
        alive_bits = np.left_shift(np.int64(1), alive_threads % WARP_SIZE).astype(np.float64)
        alive = np.bincount(alive_threads // WARP_SIZE, alive_bits, num_warps).astype(np.int64)
        if mask is None:
            required = np.full(len(threads), 0xFFFFFFFF, np.int64)
            if (alive[warps] != 0xFFFFFFFF).any():
                raise PtxError(f"not every thread of the warp is there to execute: {step.text}")
        else:
            required = batch.as_array(mask, lanes).astype(np.int64)
            if (required & bits == 0).any():
                raise PtxError(f"a thread that its own mask leaves out executes: {step.text}")
            required = required & alive[warps]
        is_complete = (required & ~present[warps]) == 0
        return None if is_complete.all() else is_complete

    @staticmethod
    def _is_whole_warps(lanes: Lanes) -> bool:
        if isinstance(lanes, slice):
            return lanes.start % WARP_SIZE == 0 and lanes.stop % WARP_SIZE == 0
        if len(lanes) % WARP_SIZE:
            return False
        firsts = lanes[::WARP_SIZE]
        return bool((firsts % WARP_SIZE == 0).all() and (lanes[WARP_SIZE - 1 :: WARP_SIZE] - firsts == 31).all())

    def _release(self) -> bool:
        """Let go whom nothing holds any longer; whether that was anyone."""
        for place in list(self._parked):
            for threads in self._parked.pop(place):
                self._add(place, threads)
            step = self._program.steps[place]
            threads = np.sort(np.concatenate(self._ready[place]))
            complete = self._complete(step, _as_lanes(threads))
            if complete is not None and not complete.any():
                self._parked[place] = self._ready.pop(place)
        if self._waiting:
            self._release_barriers()
        return bool(self._ready)

    def _release_barriers(self) -> None:
        batch, steps = self._batch, self._program.steps
        num_keys = batch.num_threads // batch.padded_threads * NUM_BARRIERS
        alive_per_block = np.bincount(
            np.flatnonzero(self._is_alive) // batch.padded_threads, minlength=num_keys // NUM_BARRIERS
        )
        required = np.repeat(alive_per_block, NUM_BARRIERS)
        arrived = np.zeros(num_keys, np.int64)
        num_true = np.zeros(num_keys, np.int64)
        keys = []
        for place, threads, values in self._waiting:
            barrier = steps[place].barrier
            if barrier is None:
                raise PtxError("not a barrier")
            identity = batch.as_array(barrier.read_id(batch, threads), threads).astype(np.int64)
            key = threads // batch.padded_threads * NUM_BARRIERS + identity
            keys.append(key)
            arrived += np.bincount(key, minlength=num_keys)
            if values is not None:
                num_true += np.bincount(key[values], minlength=num_keys)
            if barrier.read_count is not None:
                required[key] = batch.as_array(barrier.read_count(batch, threads), threads)
        is_open = (arrived > 0) & (arrived >= required)
        still_waiting = []
        for (place, threads, values), key in zip(self._waiting, keys, strict=True):
            passes = is_open[key]
            barrier = steps[place].barrier
            if passes.any():
                if barrier is not None and barrier.write is not None:
                    results = {"popc": num_true, "or": num_true > 0, "and": num_true == arrived}
                    result = results[barrier.reduction or ""][key[passes]]
                    barrier.write(batch, threads[passes], result)
                self._add(place + 1, threads[passes])
            if not passes.all():
                still_waiting.append((place, threads[~passes], None if values is None else values[~passes]))
        self._waiting = still_waiting


def run(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    params: bytes,
    regions: Mapping[int, bytes | bytearray],
) -> Memory:
    """As :func:`launch`, but returns the memory itself."""
    if len(params) != kernel.param_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.param_bytes} bytes of parameters, not {len(params)}")
    program = decode(kernel)
    block_threads = block[0] * block[1] * block[2]
    padded_threads = -(-block_threads // WARP_SIZE) * WARP_SIZE
    num_blocks = grid[0] * grid[1] * grid[2]
    if not 0 < block_threads <= 1024 or num_blocks < 1:
        raise PtxError(f"no launch of {grid} blocks of {block} threads")
    shared_end = kernel.dynamic_shared_start + shared_bytes if shared_bytes else kernel.static_shared_end
    most_blocks = min(MAX_THREADS_PER_BATCH // padded_threads, MAX_SHARED_BYTES_PER_BATCH // shared_end, num_blocks)
    blocks = Blocks(max(most_blocks, 1), padded_threads, shared_end, kernel.local_bytes)
    memory = Memory(regions, kernel.module_data, params, blocks)
    with np.errstate(all="ignore"):
        for first_block in range(0, num_blocks, blocks.num_blocks):
            memory.start_batch()
            count = min(blocks.num_blocks, num_blocks - first_block)
            Scheduler(program, Batch(program, memory, grid, block, first_block, count)).run()
    return memory


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    params: bytes,
    regions: Mapping[int, bytes | bytearray],
) -> dict[int, bytes]:
    """Run a kernel and return the regions as it leaves them.

    Args:
        kernel: The entry, from :meth:`Module.kernel`.
        grid: Blocks along x, y and z.
        block: Threads of a block along x, y and z.
        shared_bytes: Dynamic shared memory per block.
        params: The bytes of the kernel's parameters, laid out as the PTX declares them.
        regions: Global memory: disjoint pieces by address. Nothing outside them may be touched.

    Raises:
        PtxError: for an instruction that is not known, an access that is not allowed, or threads that wait forever. The
            message holds the instruction.
    """
    return run(kernel, grid, block, shared_bytes, params, regions).region_bytes()

"""Loads, stores, atomics and asynchronous copies."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .decoder import Decoder, Execute, Lanes, Modifiers, decodes, require_operands
from .parser import LOCAL_WINDOW, MODULE_START, PARAM_WINDOW, SHARED_WINDOW, Immediate, Instruction, Operand, Vector
from .scalar_types import TYPES, Array, PtxError, ScalarType

SPACES = ("param", "local", "shared", "global", "const", "shared::cta")
# Ordering and caching say nothing here: blocks run one after the other, and every store is seen at once.
ORDERINGS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "cluster", "gpu", "sys", "nc")
CACHE_HINTS = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
    *(f"{level}::{hint}" for level in ("L1", "L2") for hint in ("evict_last", "evict_first", "evict_normal")),
    *("L1::no_allocate", "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B"),
)


def _take_space(modifiers: Modifiers) -> str:
    space = modifiers.take(*SPACES) or "generic"
    return space.removesuffix("::cta")


def _take_access(instruction: Instruction) -> tuple[str, int, ScalarType]:
    """State space, number of elements and type of a load or store."""
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    count = int((modifiers.take("v2", "v4", "v8") or "v1")[1:])
    space = _take_space(modifiers)
    modifiers.take_any(*ORDERINGS, *CACHE_HINTS)
    modifiers.finish()
    return space, count, scalar


def _elements(instruction: Instruction, operand: Operand, count: int) -> Operand:
    if count != (len(operand.elements) if isinstance(operand, Vector) else 1):
        raise PtxError(f"wrong number of registers: {instruction.text}")
    return operand


@decodes("ld", "ldu")
def _load(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    space, count, scalar = _take_access(instruction)
    target, source = instruction.operands
    writes = decoder.write_all(instruction, _elements(instruction, target, count), scalar)
    read_address = decoder.address(instruction, source)
    num_bytes, dtype = scalar.num_bytes, scalar.dtype
    if count == 1:
        write = writes[0]

        def load(batch: Any, lanes: Lanes) -> None:
            offsets = batch.offsets(space, read_address(batch, lanes), num_bytes, lanes)
            write(batch, lanes, batch.memory.view(num_bytes)[offsets // num_bytes].view(dtype))

        return load
    total = num_bytes * count

    def load_vector(batch: Any, lanes: Lanes) -> None:
        offsets = batch.offsets(space, read_address(batch, lanes), total, lanes)
        rows = batch.memory.view(num_bytes, count)[offsets // total].view(dtype)
        for i, write_element in enumerate(writes):
            write_element(batch, lanes, rows[:, i])

    return load_vector


@decodes("st")
def _store(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    space, count, scalar = _take_access(instruction)
    if space == "const":
        raise PtxError(f"constant memory is not written: {instruction.text}")
    target, source = instruction.operands
    reads = decoder.read_all(instruction, _elements(instruction, source, count), scalar)
    read_address = decoder.address(instruction, target)
    num_bytes = scalar.num_bytes
    total, unsigned = num_bytes * count, np.dtype(f"u{num_bytes}")
    is_noted = space in ("global", "generic")

    def store(batch: Any, lanes: Lanes) -> None:
        offsets = batch.offsets(space, read_address(batch, lanes), total, lanes)
        values = [np.asarray(read(batch, lanes)).view(unsigned) for read in reads]
        if count == 1:
            batch.memory.view(num_bytes)[offsets // num_bytes] = values[0]
        else:
            rows = np.empty((len(offsets), count), unsigned)
            for i, value in enumerate(values):
                rows[:, i] = value
            batch.memory.view(num_bytes, count)[offsets // total] = rows
        if is_noted:
            batch.memory.note_stores(offsets, total, scalar.name == "f32")

    return store


REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


def _flushed(values: Any) -> Any:
    """Zeros of their sign for subnormal numbers."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def _add_flushed(cells: Array, indices: Array, values: Any) -> None:
    """Sums of float32 as global memory makes them, one after the other."""
    values = np.broadcast_to(_flushed(np.asarray(values, np.float32)), indices.shape)
    for index, value in zip(indices, values, strict=True):
        cells[index] = _flushed(_flushed(cells[index]) + value)


def _increment(old: Any, limit: Any) -> Any:
    return type(old)(0) if old >= limit else old + type(old)(1)


def _decrement(old: Any, limit: Any) -> Any:
    return limit if old == 0 or old > limit else old - type(old)(1)


@decodes("atom", "red")
def _atomic(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    count = int((modifiers.take("v2", "v4") or "v1")[1:])
    space = _take_space(modifiers)
    name = modifiers.take(*REDUCTIONS, "exch", "cas", "inc", "dec")
    modifiers.take_any(*ORDERINGS)
    modifiers.take("noftz")
    modifiers.finish()
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.root == "atom" else None
    if len(operands) != (3 if name == "cas" else 2) or name is None or scalar.bits not in (32, 64):
        raise PtxError(f"cannot execute: {instruction.text}")
    if scalar.is_float and name not in ("add", "exch"):
        raise PtxError(f"no atomic .{name} of floats: {instruction.text}")
    read_address = decoder.address(instruction, operands[0])
    reads = decoder.read_all(instruction, _elements(instruction, operands[1], count), scalar)
    if target is None:
        if name not in REDUCTIONS:
            raise PtxError(f"cannot execute: {instruction.text}")
        return _reduction(space, count, scalar, REDUCTIONS[name], read_address, reads)
    if count != 1:
        raise PtxError(f"no vector results of atomics: {instruction.text}")
    write = decoder.write(instruction, target, scalar)
    read_value = reads[0]
    read_new = decoder.read(instruction, operands[2], scalar) if name == "cas" else None
    functions: dict[str, Callable[[Any, Any], Any]] = {
        **REDUCTIONS,
        "exch": lambda old, value: value,
        "inc": _increment,
        "dec": _decrement,
    }

    def execute(batch: Any, lanes: Lanes) -> None:
        offsets = batch.offsets(space, read_address(batch, lanes), scalar.num_bytes, lanes)
        cells = batch.memory.view(scalar.num_bytes).view(scalar.dtype)
        values = batch.as_array(read_value(batch, lanes), lanes)
        new_values = None if read_new is None else batch.as_array(read_new(batch, lanes), lanes)
        old_values = np.empty(len(offsets), scalar.dtype)
        # One thread after the other, in the order of their indices: one of the orders a device may take.
        for i, cell in enumerate(offsets // scalar.num_bytes):
            old = cells[cell]
            old_values[i] = old
            if new_values is None:
                cells[cell] = functions[name](old, values[i])
            elif old == values[i]:
                cells[cell] = new_values[i]
        write(batch, lanes, old_values)

    return execute


def _reduction(
    space: str, count: int, scalar: ScalarType, function: np.ufunc, read_address: Any, reads: list[Any]
) -> Execute:
    def execute(batch: Any, lanes: Lanes) -> None:
        offsets = batch.offsets(space, read_address(batch, lanes), scalar.num_bytes * count, lanes)
        cells = batch.memory.view(scalar.num_bytes).view(scalar.dtype)
        is_flushed = space == "global" and scalar.name == "f32" and function is np.add
        for i, read in enumerate(reads):
            indices, values = offsets // scalar.num_bytes + i, read(batch, lanes)
            if is_flushed:
                _add_flushed(cells, indices, values)
            else:
                function.at(cells, indices, values)
        batch.memory.note_stores(offsets, scalar.num_bytes * count, scalar.name == "f32")

    return execute


@decodes("cp")
def _copy_async(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    if modifiers.take("async") is None:
        raise PtxError(f"cannot execute: {instruction.text}")
    control = modifiers.take("commit_group", "wait_group", "wait_all")
    if control is not None:
        modifiers.finish()
        return _copy_async_control(instruction, control)
    cache = modifiers.take("ca", "cg")
    destination, source = modifiers.take("shared", "shared::cta"), modifiers.take("global")
    modifiers.take_any(*CACHE_HINTS)
    modifiers.finish()
    require_operands(instruction, 3, 4)
    to_address, from_address, size_operand = instruction.operands[:3]
    if destination is None or source is None or not isinstance(size_operand, Immediate):
        raise PtxError(f"cannot execute: {instruction.text}")
    size = int(size_operand.text, 0)
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise PtxError(f"no copies of this size: {instruction.text}")
    read_to, read_from = decoder.address(instruction, to_address), decoder.address(instruction, from_address)
    read_source_size = decoder.read(
        instruction, Immediate(str(size)) if len(instruction.operands) == 3 else instruction.operands[3], TYPES["u32"]
    )
    num_words = size // 4

    def execute(batch: Any, lanes: Lanes) -> None:
        threads = batch.threads(lanes)
        source_size = batch.as_array(read_source_size(batch, lanes), lanes)
        if (source_size > size).any():
            raise PtxError(f"copies more than {size} bytes: {instruction.text}")
        to_offsets = batch.offsets("shared", read_to(batch, lanes), size, lanes)
        addresses = read_from(batch, lanes)
        data = np.zeros((len(threads), size), np.uint8)
        # Bytes past the source size become zeros and are not read: their addresses may point anywhere.
        for num_bytes in np.unique(source_size):
            if num_bytes:
                chosen = np.flatnonzero(source_size == num_bytes)
                data[chosen, :num_bytes] = _read_bytes(batch, addresses[chosen], size, int(num_bytes), threads[chosen])
        batch.copies.issue(batch.memory, threads, to_offsets, data.view(np.uint32).reshape(-1, num_words))

    return execute


def _read_bytes(batch: Any, addresses: Array, size: int, num_bytes: int, threads: Array) -> Array:
    if num_bytes == size:
        offsets = batch.offsets("global", addresses, size, threads)
        return batch.memory.view(1, size)[offsets // size]
    columns = [batch.memory.view(1)[batch.offsets("global", addresses + i, 1, threads)] for i in range(num_bytes)]
    return np.stack(columns, axis=1)


def _copy_async_control(instruction: Instruction, control: str) -> Execute:
    if control == "commit_group":
        require_operands(instruction, 0)

        def commit(batch: Any, lanes: Lanes) -> None:
            batch.copies.num_committed[lanes] += 1

        return commit
    if control == "wait_all":
        require_operands(instruction, 0)
        num_pending = -1  # the open group lands too
    else:
        require_operands(instruction, 1)
        operand = instruction.operands[0]
        if not isinstance(operand, Immediate):
            raise PtxError(f"the number of groups is no constant: {instruction.text}")
        num_pending = int(operand.text, 0)
    return lambda batch, lanes: batch.copies.wait(batch.memory, lanes, num_pending)


@decodes("membar", "fence")
def _fence(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    modifiers.take_any(*ORDERINGS, "sc", "gl")
    modifiers.finish()
    return lambda batch, lanes: None


@decodes("prefetch", "prefetchu", "nanosleep")
def _hint(decoder: Decoder, instruction: Instruction) -> Execute:
    return lambda batch, lanes: None


@decodes("isspacep")
def _is_space(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    space = _take_space(modifiers)
    modifiers.finish()
    if space != "global" and space not in windows:
        raise PtxError(f"cannot execute: {instruction.text}")
    write = decoder.write(instruction, instruction.operands[0], TYPES["pred"])
    read = decoder.read(instruction, instruction.operands[1], TYPES["u64"])
    shift = np.uint64(60)

    def execute(batch: Any, lanes: Lanes) -> None:
        window = read(batch, lanes) >> shift
        if space == "global":
            write(batch, lanes, (window == 0) | (window == MODULE_START >> 60))
        else:
            write(batch, lanes, window == windows[space] >> 60)

    return execute

"""What the threads of a warp do together: shuffles, votes, matches, matrix loads and products.

The machine calls these with every thread that takes part present. Layouts are those of the PTX ISA's figures for
``ldmatrix`` .m8n8.b16 and ``mma`` .m16n8k16: with ``group = lane / 4`` and ``member = lane % 4``,

    A[16][16]  register i, half j: row group + 8 (i & 1), column 2 member + j + 8 (i >> 1)
    B[16][8]   register i, half j: row 2 member + j + 8 i, column group
    C[16][8]   register i: row group + 8 (i >> 1), column 2 member + (i & 1)
    matrix of ldmatrix: the register holds row group, columns 2 member and 2 member + 1 (.trans: of the transpose)
"""

from typing import Any

import numpy as np

from .decoder import Decoder, Execute, Lanes, Modifiers, Read, decodes, require_operands
from .parser import Instruction, Operand, Pair, Vector
from .scalar_types import TYPES, Array, PtxError, ScalarType, bfloat16_to_float

WARP_SIZE = 32
U32, B32, PRED = TYPES["u32"], TYPES["b32"], TYPES["pred"]

# Which operand says who takes part; every other collective is of the whole warp.
MEMBER_MASK_OPERAND = {"shfl": -1, "vote": -1, "match": -1, "redux": -1, "bar": 0}
WHOLE_WARP = ("mma", "ldmatrix")


def is_collective(instruction: Instruction) -> bool:
    """Whether the threads of a warp execute this together."""
    if instruction.root in ("bar", "barrier"):
        return "warp" in instruction.modifiers
    return instruction.root in MEMBER_MASK_OPERAND or instruction.root in WHOLE_WARP


def read_member_mask(decoder: Decoder, instruction: Instruction) -> Read | None:
    """Reader of the mask of lanes that take part; None for the whole warp."""
    if instruction.root in WHOLE_WARP:
        return None
    return decoder.read(instruction, instruction.operands[MEMBER_MASK_OPERAND[instruction.root]], U32)


def _warps(batch: Any, lanes: Lanes) -> Array:
    return np.asarray(batch.threads(lanes)) // WARP_SIZE


def _require_sync(modifiers: Modifiers, instruction: Instruction) -> None:
    if modifiers.take("sync") is None:
        raise PtxError(f"without .sync: {instruction.text}")


@decodes("shfl")
def _shuffle(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 5)
    modifiers = Modifiers(instruction)
    modifiers.take_type()
    _require_sync(modifiers, instruction)
    mode = modifiers.take("up", "down", "bfly", "idx")
    modifiers.finish()
    target, value, lane_operand, clamp_operand = instruction.operands[:4]
    is_pair = isinstance(target, Pair)
    write = decoder.write(instruction, target.first if isinstance(target, Pair) else target, B32)
    write_inside = decoder.write(instruction, target.second if isinstance(target, Pair) else None, PRED)
    read_everywhere = decoder.whole_row(instruction, value, B32)
    read_lane, read_clamp = (decoder.read(instruction, each, U32) for each in (lane_operand, clamp_operand))

    def execute(batch: Any, lanes: Lanes) -> None:
        threads = batch.threads(lanes)
        lane = threads % WARP_SIZE
        b = np.asarray(read_lane(batch, lanes)).astype(np.int64) & 31
        c = np.asarray(read_clamp(batch, lanes)).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        last = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - b
            is_inside = source >= last
        elif mode == "down":
            source = lane + b
            is_inside = source <= last
        elif mode == "bfly":
            source = lane ^ b
            is_inside = source <= last
        else:
            source = (lane & segment) | (b & ~segment)
            is_inside = source <= last
        source = threads - lane + np.where(is_inside, source, lane)
        batch.require_active(source, lanes, instruction)
        write(batch, lanes, read_everywhere(batch, lanes)[source])
        if is_pair:
            write_inside(batch, lanes, is_inside)

    return execute


def _bits_per_warp(batch: Any, threads: Array, is_set: Array) -> Array:
    """One word a warp with the bits of the threads for which ``is_set`` holds."""
    bits = np.where(is_set, np.left_shift(np.int64(1), threads % WARP_SIZE), np.int64(0))
    words = np.bincount(threads // WARP_SIZE, bits.astype(np.float64), batch.num_threads // WARP_SIZE)
    return words.astype(np.int64).astype(np.uint32)


@decodes("vote")
def _vote(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    _require_sync(modifiers, instruction)
    mode = modifiers.take("ballot", "any", "all", "uni")
    modifiers.finish()
    write = decoder.write(instruction, instruction.operands[0], scalar)
    read = decoder.read(instruction, instruction.operands[1], PRED)
    read_mask = decoder.read(instruction, instruction.operands[2], U32)

    def execute(batch: Any, lanes: Lanes) -> None:
        threads = batch.threads(lanes)
        is_set = batch.as_array(read(batch, lanes), lanes)
        votes = _bits_per_warp(batch, threads, is_set)[threads // WARP_SIZE] & read_mask(batch, lanes)
        voters = _bits_per_warp(batch, threads, np.ones(len(threads), np.bool_))[threads // WARP_SIZE]
        voters = voters & read_mask(batch, lanes)
        results = {
            "ballot": votes,
            "any": votes != 0,
            "all": votes == voters,
            "uni": (votes == voters) | (votes == 0),
        }
        write(batch, lanes, results[mode or ""])

    return execute


@decodes("match")
def _match(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    _require_sync(modifiers, instruction)
    is_all = modifiers.take("any", "all") == "all"
    modifiers.finish()
    target, value = instruction.operands[:2]
    write = decoder.write(instruction, target.first if isinstance(target, Pair) else target, U32)
    write_all = decoder.write(instruction, target.second if isinstance(target, Pair) else None, PRED)
    read = decoder.read(instruction, value, scalar)
    read_mask = decoder.read(instruction, instruction.operands[2], U32)

    def execute(batch: Any, lanes: Lanes) -> None:
        threads = batch.threads(lanes)
        values = batch.as_array(read(batch, lanes), lanes)
        mask = batch.as_array(read_mask(batch, lanes), lanes)
        matches = np.zeros(len(threads), np.uint32)
        for i, thread in enumerate(threads):
            same = (threads // WARP_SIZE == thread // WARP_SIZE) & (values == values[i])
            matches[i] = np.bitwise_or.reduce(np.uint32(1) << (threads[same] % WARP_SIZE).astype(np.uint32))
        matches &= mask
        if not is_all:
            write(batch, lanes, matches)
            return
        is_whole = matches == mask
        write(batch, lanes, np.where(is_whole, mask, np.uint32(0)))
        write_all(batch, lanes, is_whole)

    return execute


@decodes("redux")
def _reduce(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    _require_sync(modifiers, instruction)
    functions: dict[str, tuple[np.ufunc, int]] = {
        "add": (np.add, 0),
        "min": (np.minimum, 0 if scalar.is_float else int(np.iinfo(scalar.dtype).max)),
        "max": (np.maximum, 0 if scalar.is_float else int(np.iinfo(scalar.dtype).min)),
        "and": (np.bitwise_and, -1),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }
    function, neutral = functions[modifiers.take(*functions) or ""]
    modifiers.finish()
    if scalar.is_float or scalar.bits != 32:
        raise PtxError(f"cannot execute: {instruction.text}")
    write = decoder.write(instruction, instruction.operands[0], scalar)
    read = decoder.read(instruction, instruction.operands[1], scalar)

    def execute(batch: Any, lanes: Lanes) -> None:
        warps = _warps(batch, lanes)
        start = np.array([neutral & 0xFFFFFFFF], np.uint32).view(scalar.dtype)[0]
        results = np.full(batch.num_threads // WARP_SIZE, start, scalar.dtype)
        function.at(results, warps, batch.as_array(read(batch, lanes), lanes))
        write(batch, lanes, results[warps])

    return execute


@decodes("bar")
def _warp_barrier(decoder: Decoder, instruction: Instruction) -> Execute:
    """Only ``bar.warp.sync`` comes here: the machine has seen to it that the threads met."""
    return lambda batch, lanes: None


@decodes("activemask")
def _active_mask(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 1)
    write = decoder.write(instruction, instruction.operands[0], U32)

    def execute(batch: Any, lanes: Lanes) -> None:
        threads = batch.threads(lanes)
        write(batch, lanes, _bits_per_warp(batch, threads, np.ones(len(threads), np.bool_))[threads // WARP_SIZE])

    return execute


@decodes("ldmatrix")
def _load_matrix(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    _require_sync(modifiers, instruction)
    has_shape = modifiers.take("aligned") is not None and modifiers.take("m8n8") is not None
    num_matrices = int((modifiers.take("x1", "x2", "x4") or "x0")[1:])
    is_transposed = modifiers.take("trans") is not None
    space = modifiers.take("shared", "shared::cta")
    modifiers.finish()
    writes = decoder.write_all(instruction, instruction.operands[0], B32)
    read_address = decoder.address(instruction, instruction.operands[1])
    if not has_shape or scalar.name != "b16" or len(writes) != num_matrices:
        raise PtxError(f"cannot execute: {instruction.text}")

    def execute(batch: Any, lanes: Lanes) -> None:
        # Lanes 8 m to 8 m + 7 give the rows of matrix m; the addresses of the others do not count.
        addresses = read_address(batch, lanes).reshape(-1, WARP_SIZE)[:, : 8 * num_matrices].ravel()
        threads = batch.threads(lanes).reshape(-1, WARP_SIZE)[:, : 8 * num_matrices].ravel()
        offsets = batch.offsets("shared" if space else "generic", addresses, 16, threads)
        if not space and not batch.memory.is_shared(offsets).all():
            raise PtxError(f"a row outside shared memory: {instruction.text}")
        rows = batch.memory.view(4, 4)[offsets // 16]  # every row is four words, one for each of four lanes
        matrices = rows.reshape(-1, num_matrices, WARP_SIZE)
        if is_transposed:
            elements = rows.view(np.uint16).reshape(-1, num_matrices, 8, 8)
            matrices = np.ascontiguousarray(elements.transpose(0, 1, 3, 2)).view(np.uint32)
            matrices = matrices.reshape(-1, num_matrices, WARP_SIZE)
        for i, write in enumerate(writes):
            write(batch, lanes, matrices[:, i].ravel())

    return execute


def _read_registers(
    decoder: Decoder, instruction: Instruction, operand: Operand, scalar: ScalarType, count: int
) -> Any:
    """Reader of a fragment as [register, warp, group, member]."""
    if not isinstance(operand, Vector) or len(operand.elements) != count:
        raise PtxError(f"a fragment of another size: {instruction.text}")
    reads = decoder.read_all(instruction, operand, scalar)

    def read(batch: Any, lanes: Lanes) -> Array:
        values = [batch.as_array(read_one(batch, lanes), lanes) for read_one in reads]
        return np.stack(values).reshape(count, -1, 8, 4)

    return read


def _halves(registers: Array, element: str) -> Array:
    """[register, warp, group, member] words to [register, warp, group, member, half] float32."""
    halves = registers.view(np.uint16).reshape(*registers.shape, 2)
    if element == "bf16":
        return bfloat16_to_float(halves)
    return halves.view(np.float16).astype(np.float32)


@decodes("mma")
def _multiply_matrices(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 4)
    shape = instruction.modifiers
    if shape[:5] != ("sync", "aligned", "m16n8k16", "row", "col") or len(shape) != 9:
        raise PtxError(f"cannot execute: {instruction.text}")
    d_type, a_type, b_type, c_type = shape[5:]
    if (d_type, c_type) != ("f32", "f32") or a_type != b_type or a_type not in ("bf16", "f16"):
        raise PtxError(f"cannot execute: {instruction.text}")
    operand_d, operand_a, operand_b, operand_c = instruction.operands
    read_a = _read_registers(decoder, instruction, operand_a, U32, 4)
    read_b = _read_registers(decoder, instruction, operand_b, U32, 2)
    read_c = _read_registers(decoder, instruction, operand_c, TYPES["f32"], 4)
    writes = decoder.write_all(instruction, operand_d, TYPES["f32"])
    if len(writes) != 4:
        raise PtxError(f"a fragment of another size: {instruction.text}")

    def execute(batch: Any, lanes: Lanes) -> None:
        a = _halves(read_a(batch, lanes), a_type)
        num_warps = a.shape[1]
        # Register i = 2 i1 + i0. A: [i1, i0, warp, group, member, half] to [warp, (i0, group), (i1, member, half)].
        a = a.reshape(2, 2, num_warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(num_warps, 16, 16)
        b = _halves(read_b(batch, lanes), a_type).transpose(1, 0, 3, 4, 2).reshape(num_warps, 16, 8)
        # C: [i1, i0, warp, group, member] to [warp, (i1, group), (member, i0)].
        c = read_c(batch, lanes).reshape(2, 2, num_warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(num_warps, 16, 8)
        d = np.matmul(a, b) + c
        d = d.reshape(num_warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for i, write in enumerate(writes):
            write(batch, lanes, d[i])

    return execute

"""Arithmetic, comparison and bits: what happens inside one thread."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .decoder import Decoder, Execute, Lanes, Modifiers, decodes, require_operands
from .parser import Instruction, Pair
from .scalar_types import (
    ROUNDING_MODES,
    TYPES,
    Array,
    PtxError,
    ScalarType,
    add_to_odd,
    clamp_to_unit,
    flush_subnormals,
    narrow,
)

U32, S32, F32, PRED = TYPES["u32"], TYPES["s32"], TYPES["f32"], TYPES["pred"]
Function = Callable[..., Any]


def elementwise(decoder: Decoder, instruction: Instruction, scalar: ScalarType, function: Function) -> Execute:
    """``function`` of all operands but the first, written to the first; all of one type."""
    operands = instruction.operands
    write = decoder.write_number(instruction, operands[0], scalar)
    reads = [decoder.read_number(instruction, operand, scalar) for operand in operands[1:]]
    if len(reads) == 1:
        read_only = reads[0]
        return lambda batch, lanes: write(batch, lanes, function(read_only(batch, lanes)))
    if len(reads) == 2:
        read_a, read_b = reads
        return lambda batch, lanes: write(batch, lanes, function(read_a(batch, lanes), read_b(batch, lanes)))
    return lambda batch, lanes: write(batch, lanes, function(*[read(batch, lanes) for read in reads]))


def _with_flush(function: Function) -> Function:
    return lambda *inputs: flush_subnormals(function(*(flush_subnormals(each) for each in inputs)))


def _float_function(modifiers: Modifiers, scalar: ScalarType, exact: Function, plain: Function | None) -> Function:
    """``plain`` rounds to nearest in the type itself; ``exact`` computes in a wider one, to be rounded as asked."""
    mode = modifiers.take(*ROUNDING_MODES) or "rn"
    is_flushed = modifiers.take("ftz")
    is_saturated = modifiers.take("sat")
    if mode == "rn" and plain is not None:
        function = plain
    else:
        wide = np.longdouble if scalar.bits == 64 else np.float64
        dtype = np.dtype(np.float32) if scalar.bits == 16 else scalar.dtype

        def function(*inputs: Any) -> Any:
            return narrow(exact(*(np.asarray(each).astype(wide) for each in inputs)), dtype, mode)

    if is_flushed:
        function = _with_flush(function)
    if not is_saturated:
        return function
    return lambda *inputs: clamp_to_unit(function(*inputs))


def _add_exactly(a: Any, b: Any) -> Any:
    return add_to_odd(a, b) if a.dtype == np.float64 else a + b


def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` of float32 in float64, good enough to be rounded to float32: the product is exact there."""
    if a.dtype != np.float64:
        return a * b + c
    nearly = a * b + c
    # Only what looks like a tie of float32 can round to the wrong side.
    looks_like_tie = nearly.view(np.int64) & 0x1FFFFFFF == 0x10000000
    return add_to_odd(a * b, c) if looks_like_tie.any() else nearly


def high_product(a: Any, b: Any) -> Any:
    """The upper half of a product of integers."""
    if np.asarray(a).dtype.itemsize < 8:
        dtype = np.asarray(a).dtype
        wide = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}")
        product = np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        return (product >> wide.type(dtype.itemsize * 8)).astype(dtype)
    # 64 bits by halves of 32, unsigned; a negative factor then counts 2^64 too much.
    x, y = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    half, low_mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x_low, x_high, y_low, y_high = x & low_mask, x >> half, y & low_mask, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)
    crossed = x_low * y_high + (middle & low_mask)
    high = x_high * y_high + (middle >> half) + (crossed >> half)
    if np.asarray(a).dtype == np.int64:
        high = high - np.where(np.asarray(a) < 0, y, np.uint64(0)) - np.where(np.asarray(b) < 0, x, np.uint64(0))
        return high.astype(np.int64)
    return high


@decodes("add", "sub")
def _add_sub(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    plain = np.add if instruction.root == "add" else np.subtract
    function: Function = plain
    if scalar.is_float:
        is_sum = plain is np.add
        function = _float_function(modifiers, scalar, lambda a, b: _add_exactly(a, b if is_sum else -b), plain)
    elif modifiers.take("sat"):
        raise PtxError(f"no saturating integers: {instruction.text}")
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, function)


@decodes("mul", "mad", "fma", "mul24", "mad24")
def _multiply(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    root = instruction.root
    has_addend = root in ("mad", "fma", "mad24")
    require_operands(instruction, 4 if has_addend else 3)
    if scalar.is_float:
        if has_addend:
            is_nearest = not modifiers.has("rz", "rm", "rp")
            exact = _multiply_add if is_nearest else lambda a, b, c: _add_exactly(a * b, c)
            function = _float_function(modifiers, scalar, exact, None)
        else:
            function = _float_function(modifiers, scalar, np.multiply, np.multiply)
        modifiers.finish()
        return elementwise(decoder, instruction, scalar, function)
    part = modifiers.take("lo", "hi", "wide")
    modifiers.finish()
    product: Function
    if root in ("mul24", "mad24"):
        if part != "lo" or scalar.bits != 32:
            raise PtxError(f"only .lo of 24-bit products: {instruction.text}")
        shift = scalar.dtype.type(8)

        def product_of_24_bits(a: Any, b: Any) -> Any:
            return ((a << shift) >> shift) * ((b << shift) >> shift)

        product = product_of_24_bits
    elif part == "lo":
        product = np.multiply
    elif part == "hi":
        product = high_product
    elif part == "wide":
        wide = TYPES[f"{scalar.kind}{scalar.bits * 2}"]
        read_a, read_b = (decoder.read(instruction, operand, scalar) for operand in instruction.operands[1:3])
        write = decoder.write(instruction, instruction.operands[0], wide)
        dtype = wide.dtype
        if not has_addend:
            return lambda batch, lanes: write(
                batch,
                lanes,
                np.multiply(read_a(batch, lanes), read_b(batch, lanes), dtype=dtype),
            )
        read_c = decoder.read(instruction, instruction.operands[3], wide)
        return lambda batch, lanes: write(
            batch,
            lanes,
            np.multiply(read_a(batch, lanes), read_b(batch, lanes), dtype=dtype) + read_c(batch, lanes),
        )
    else:
        raise PtxError(f"which part of the product: {instruction.text}")
    if has_addend:
        return elementwise(decoder, instruction, scalar, lambda a, b, c: product(a, b) + c)
    return elementwise(decoder, instruction, scalar, product)


def _divide(a: Any, b: Any) -> Any:
    """Integers toward zero; PTX leaves division by zero open, so all bits are set to make it seen."""
    a, b = np.asarray(a), np.asarray(b)
    is_zero = b == 0
    divisor = np.where(is_zero, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient = quotient + ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(is_zero, ~a.dtype.type(0), quotient)


def _remainder(a: Any, b: Any) -> Any:
    return np.asarray(a) - _divide(a, b) * np.asarray(b)


@decodes("div")
def _div(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    function: Function = _divide
    if scalar.is_float:
        modifiers.take("full", "approx")
        function = _float_function(modifiers, scalar, np.divide, np.divide)
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, function)


@decodes("rem")
def _rem(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, _remainder)


def _flip_sign(values: Any, mask: int, is_kept: bool) -> Any:
    values = np.asarray(values)
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    bits = np.atleast_1d(values).view(unsigned)
    sign = unsigned.type(mask << (unsigned.itemsize * 8 - 1))
    return (bits ^ sign if is_kept else bits & ~sign).view(values.dtype).reshape(values.shape)


@decodes("neg", "abs")
def _neg_abs(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    is_negated = instruction.root == "neg"
    function: Function = np.negative if is_negated else np.abs
    if scalar.is_float:

        def function(a: Any) -> Any:
            return _flip_sign(a, 1, is_negated)

        if modifiers.take("ftz"):
            function = _with_flush(function)
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, function)


def _float_extreme(is_max: bool, keeps_nan: bool) -> Function:
    functions = {(True, True): np.maximum, (True, False): np.fmax, (False, True): np.minimum, (False, False): np.fmin}
    choose: Function = functions[is_max, keeps_nan]

    def function(a: Any, b: Any) -> Any:
        result = choose(a, b)
        is_zero = (result == 0) & (a == b)
        if np.any(is_zero):  # +0 counts as larger than -0
            is_negative = np.signbit(a) & np.signbit(b) if is_max else np.signbit(a) | np.signbit(b)
            result = np.where(is_zero, np.where(is_negative, result.dtype.type(-0.0), result.dtype.type(0)), result)
        return result

    return function


@decodes("min", "max")
def _min_max(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    is_max = instruction.root == "max"
    function: Function = np.maximum if is_max else np.minimum
    if scalar.is_float:
        function = _float_extreme(is_max, modifiers.take("NaN") is not None)
        if modifiers.take("ftz"):
            function = _with_flush(function)
    modifiers.finish()
    require_operands(instruction, 3)
    return elementwise(decoder, instruction, scalar, function)


@decodes("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def _special_function(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    if not scalar.is_float:
        raise PtxError(f"not of floating point: {instruction.text}")
    functions: dict[str, Function] = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": lambda a: a.dtype.type(1) / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }
    modifiers.take("approx")  # computed as exactly as float64 gives it: no table of the hardware's is known here
    function = _float_function(modifiers, scalar, functions[instruction.root], None)
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, function)


@decodes("copysign")
def _copysign(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    return elementwise(decoder, instruction, scalar, lambda sign, magnitude: np.copysign(magnitude, sign))


@decodes("testp")
def _testp(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
    }
    test = tests[modifiers.take(*tests) or ""]
    modifiers.finish()
    write = decoder.write(instruction, instruction.operands[0], PRED)
    read = decoder.read_number(instruction, instruction.operands[1], scalar)
    return lambda batch, lanes: write(batch, lanes, test(read(batch, lanes)))


def _is_ordered(a: Any, b: Any) -> Any:
    return ~(np.isnan(a) | np.isnan(b))


COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    # Unordered forms are true if a NaN takes part: the negation of the opposite ordered form.
    "equ": lambda a, b: np.equal(a, b) | ~_is_ordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~np.greater_equal(a, b),
    "leu": lambda a, b: ~np.greater(a, b),
    "gtu": lambda a, b: ~np.less_equal(a, b),
    "geu": lambda a, b: ~np.less(a, b),
    "num": _is_ordered,
    "nan": lambda a, b: ~_is_ordered(a, b),
}
COMBINATIONS: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(modifiers: Modifiers, scalar: ScalarType) -> Function:
    name = modifiers.take("ne", *COMPARISONS)
    if name == "ne":
        compare = (lambda a, b: np.not_equal(a, b) & _is_ordered(a, b)) if scalar.is_float else np.not_equal
    else:
        compare = COMPARISONS[name or ""]
    return compare if not modifiers.take("ftz") else lambda a, b: compare(flush_subnormals(a), flush_subnormals(b))


@decodes("setp", "set")
def _setp(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    result_type = PRED if instruction.root == "setp" else modifiers.take_type()
    combine = COMBINATIONS.get(modifiers.take(*COMBINATIONS) or "")
    compare = _comparison(modifiers, scalar)
    modifiers.finish()
    require_operands(instruction, 3 if combine is None else 4)
    target, a, b = instruction.operands[:3]
    read_a, read_b = decoder.read_number(instruction, a, scalar), decoder.read_number(instruction, b, scalar)
    read_c = None if combine is None else decoder.read(instruction, instruction.operands[3], PRED)

    def combined(batch: Any, lanes: Lanes, is_true: Any) -> Any:
        return is_true if combine is None or read_c is None else combine(is_true, read_c(batch, lanes))

    if instruction.root == "set":
        write = decoder.write(instruction, target, result_type)
        true = result_type.dtype.type(1.0) if result_type.is_float else ~np.zeros(1, result_type.dtype)[0]
        false = result_type.dtype.type(0)
        return lambda batch, lanes: write(
            batch,
            lanes,
            np.where(combined(batch, lanes, compare(read_a(batch, lanes), read_b(batch, lanes))), true, false),
        )
    if isinstance(target, Pair):
        write_true, write_false = (decoder.write(instruction, each, PRED) for each in (target.first, target.second))

        def execute(batch: Any, lanes: Lanes) -> None:
            is_true = compare(read_a(batch, lanes), read_b(batch, lanes))
            positive, negative = combined(batch, lanes, is_true), combined(batch, lanes, ~is_true)
            write_true(batch, lanes, positive)
            write_false(batch, lanes, negative)

        return execute
    write = decoder.write(instruction, target, PRED)
    if combine is None:
        return lambda batch, lanes: write(batch, lanes, compare(read_a(batch, lanes), read_b(batch, lanes)))
    return lambda batch, lanes: write(
        batch, lanes, combined(batch, lanes, compare(read_a(batch, lanes), read_b(batch, lanes)))
    )


@decodes("selp", "slct")
def _select(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 4)
    modifiers = Modifiers(instruction)
    control = PRED if instruction.root == "selp" else modifiers.take_type()
    scalar = modifiers.take_type()
    modifiers.take("ftz")
    modifiers.finish()
    target, a, b, c = instruction.operands
    write = decoder.write(instruction, target, scalar)
    read_a, read_b = decoder.read(instruction, a, scalar), decoder.read(instruction, b, scalar)
    read_c = decoder.read(instruction, c, control)
    if instruction.root == "selp":
        return lambda batch, lanes: write(
            batch, lanes, np.where(read_c(batch, lanes), read_a(batch, lanes), read_b(batch, lanes))
        )
    return lambda batch, lanes: write(
        batch, lanes, np.where(read_c(batch, lanes) >= 0, read_a(batch, lanes), read_b(batch, lanes))
    )


@decodes("and", "or", "xor", "not")
def _logic(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    functions: dict[str, Function] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.bitwise_not,
    }
    require_operands(instruction, 2 if instruction.root == "not" else 3)
    return elementwise(decoder, instruction, scalar, functions[instruction.root])


@decodes("shl", "shr")
def _shift(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 3)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    target, a, b = instruction.operands
    write, read_a = decoder.write(instruction, target, scalar), decoder.read(instruction, a, scalar)
    read_count = decoder.read(instruction, b, U32)
    bits, dtype, is_left = np.uint32(scalar.bits), scalar.dtype, instruction.root == "shl"

    def execute(batch: Any, lanes: Lanes) -> None:
        values, count = read_a(batch, lanes), read_count(batch, lanes)
        # Amounts beyond the width shift everything out, or leave copies of the sign.
        inside = np.minimum(count, bits - np.uint32(1)).astype(dtype)
        if is_left:
            result = np.where(count < bits, np.left_shift(values, inside), dtype.type(0))
        elif scalar.kind == "s":
            result = np.right_shift(values, inside)
        else:
            result = np.where(count < bits, np.right_shift(values, inside), dtype.type(0))
        write(batch, lanes, result)

    return execute


def _sources(decoder: Decoder, instruction: Instruction, *scalars: ScalarType) -> Any:
    require_operands(instruction, len(scalars) + 1)
    reads = [
        decoder.read(instruction, operand, scalar)
        for operand, scalar in zip(instruction.operands[1:], scalars, strict=True)
    ]
    return lambda batch, lanes: [batch.as_array(read(batch, lanes), lanes) for read in reads]


@decodes("shf")
def _funnel_shift(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    is_left = modifiers.take("l", "r") == "l"
    is_wrapped = modifiers.take("wrap", "clamp") == "wrap"
    modifiers.finish()
    read = _sources(decoder, instruction, scalar, scalar, U32)
    write = decoder.write(instruction, instruction.operands[0], scalar)

    def execute(batch: Any, lanes: Lanes) -> None:
        low, high, count = read(batch, lanes)
        count = (count & np.uint32(31) if is_wrapped else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        shifted = (both << count) >> np.uint64(32) if is_left else both >> count
        write(batch, lanes, shifted.astype(np.uint32))

    return execute


def _low_mask(count: Array, bits: int) -> Array:
    """``count`` ones, for counts up to ``bits``, as uint64."""
    full = np.uint64((1 << bits) - 1)
    shifted = ~(~np.uint64(0) << np.minimum(count, 63).astype(np.uint64))
    return np.where(count >= bits, full, shifted & full)


@decodes("bfe")
def _bit_field_extract(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    read = _sources(decoder, instruction, scalar, U32, U32)
    write = decoder.write(instruction, instruction.operands[0], scalar)
    bits = scalar.bits

    def execute(batch: Any, lanes: Lanes) -> None:
        values, position, length = read(batch, lanes)
        position, length = (np.asarray(each & np.uint32(0xFF)).astype(np.int64) for each in (position, length))
        raw = values.astype(np.uint64) & np.uint64((1 << bits) - 1)
        field = np.where(position < bits, raw >> np.minimum(position, bits - 1).astype(np.uint64), np.uint64(0))
        mask = _low_mask(length, bits)
        field = field & mask
        if scalar.kind == "s":
            top = np.minimum(position + length - 1, bits - 1)
            sign = ((raw >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)) & (length > 0).astype(np.uint64)
            reach = np.minimum(length, np.maximum(bits - position, 0))
            field = np.where(sign == 1, field | ~_low_mask(reach, bits), field)
        write(batch, lanes, (field & np.uint64((1 << bits) - 1)).astype(f"uint{bits}").view(scalar.dtype))

    return execute


@decodes("bfi")
def _bit_field_insert(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    read = _sources(decoder, instruction, scalar, scalar, U32, U32)
    write = decoder.write(instruction, instruction.operands[0], scalar)
    bits = scalar.bits

    def execute(batch: Any, lanes: Lanes) -> None:
        field, base, position, length = read(batch, lanes)
        position, length = (np.asarray(each & np.uint32(0xFF)).astype(np.int64) for each in (position, length))
        place = np.minimum(position, 63).astype(np.uint64)
        mask = np.where(position < bits, _low_mask(length, bits) << place, np.uint64(0))
        inserted = (base.astype(np.uint64) & ~mask) | ((field.astype(np.uint64) << place) & mask)
        write(batch, lanes, (inserted & np.uint64((1 << bits) - 1)).astype(scalar.dtype))

    return execute


@decodes("prmt")
def _permute_bytes(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    modifiers.take_type()
    modifiers.finish()
    read = _sources(decoder, instruction, U32, U32, U32)
    write = decoder.write(instruction, instruction.operands[0], U32)

    def execute(batch: Any, lanes: Lanes) -> None:
        low, high, selector = (each.astype(np.uint64) for each in read(batch, lanes))
        both = (high << np.uint64(32)) | low
        result = np.zeros(len(both), np.uint64)
        for i in range(4):
            control = (selector >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((control & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            signs = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result |= np.where(control & np.uint64(8), signs, byte) << np.uint64(8 * i)
        write(batch, lanes, result.astype(np.uint32))

    return execute


def bit_length(values: Array) -> Array:
    """Position of the highest set bit plus one; 0 for 0."""
    length = np.zeros(values.shape, np.int64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        if step >= values.dtype.itemsize * 8:
            continue
        is_high = rest >> rest.dtype.type(step) != 0
        length += np.where(is_high, step, 0)
        rest = np.where(is_high, rest >> rest.dtype.type(step), rest)
    return length + (rest != 0)


def _reverse_bits(values: Array) -> Array:
    as_bytes = np.ascontiguousarray(values)[:, None].view(np.uint8)
    bits = np.unpackbits(as_bytes, axis=1)[:, ::-1]  # byte order and bit order both turn round
    return np.packbits(bits, axis=1).view(values.dtype)[:, 0]


@decodes("popc", "clz", "brev", "bfind")
def _bit_counts(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    is_shift_amount = modifiers.take("shiftamt") is not None
    modifiers.finish()
    unsigned = TYPES[f"u{scalar.bits}"]
    read = _sources(decoder, instruction, scalar)
    bits = scalar.bits
    result_type = unsigned if instruction.root == "brev" else U32
    write = decoder.write(instruction, instruction.operands[0], result_type)

    def find_highest(values: Array) -> Array:
        if scalar.kind == "s":
            values = np.where(values < 0, ~values, values)
        length = bit_length(values.view(unsigned.dtype))
        found = bits - length if is_shift_amount else length - 1
        return np.where(length == 0, 0xFFFFFFFF, found).astype(np.uint32)

    functions: dict[str, Function] = {
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": lambda a: (bits - bit_length(a)).astype(np.uint32),
        "brev": _reverse_bits,
        "bfind": find_highest,
    }
    function = functions[instruction.root]
    return lambda batch, lanes: write(batch, lanes, function(read(batch, lanes)[0]))


@decodes("lop3")
def _lookup_logic(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 5)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    target, *operands, table_operand = instruction.operands
    write = decoder.write(instruction, target, scalar)
    reads = [decoder.read(instruction, operand, scalar) for operand in operands]
    table = int(decoder.read(instruction, table_operand, U32)(None, None))  # type: ignore[arg-type]

    def execute(batch: Any, lanes: Lanes) -> None:
        a, b, c = (read(batch, lanes) for read in reads)
        result = scalar.dtype.type(0)
        for i in range(8):
            if table >> i & 1:
                term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                result = result | term
        write(batch, lanes, result)

    return execute

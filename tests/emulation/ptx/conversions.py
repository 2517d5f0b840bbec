"""Moves and conversions: mov, cvta, cvt."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .decoder import Decoder, Execute, Lanes, Modifiers, decodes, require_operands
from .parser import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Immediate, Instruction, Vector
from .scalar_types import (
    ROUNDING_MODES,
    TYPES,
    PtxError,
    ScalarType,
    bfloat16_to_float,
    clamp_to_unit,
    float_to_bfloat16,
    float_to_half,
    flush_subnormals,
    narrow,
    round_to_integral,
)

INTEGRAL_MODES = ("rni", "rzi", "rmi", "rpi")


@decodes("mov")
def _mov(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    modifiers.finish()
    target, source = instruction.operands
    if isinstance(target, Vector):
        return _unpack(decoder, instruction, scalar, target)
    write = decoder.write(instruction, target, scalar)
    if isinstance(source, Vector):
        parts = decoder.read_all(instruction, source, TYPES[f"u{scalar.bits // len(source.elements)}"])
        unsigned = np.dtype(f"u{scalar.num_bytes}")
        write_bits = decoder.write(instruction, target, TYPES[f"u{scalar.bits}"])

        def pack(batch: Any, lanes: Lanes) -> None:
            value: Any = unsigned.type(0)
            for i, read_part in enumerate(parts):
                value = value | (
                    np.asarray(read_part(batch, lanes)).astype(unsigned) << unsigned.type(i * scalar.bits // len(parts))
                )
            write_bits(batch, lanes, value)

        return pack
    read = decoder.read(instruction, source, scalar)
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes))


def _unpack(decoder: Decoder, instruction: Instruction, scalar: ScalarType, target: Vector) -> Execute:
    part = TYPES[f"u{scalar.bits // len(target.elements)}"]
    writes = decoder.write_all(instruction, target, part)
    read = decoder.read(instruction, instruction.operands[1], TYPES[f"u{scalar.bits}"])
    unsigned = np.dtype(f"u{scalar.num_bytes}")

    def execute(batch: Any, lanes: Lanes) -> None:
        value = np.asarray(read(batch, lanes)).copy()
        for i, write in enumerate(writes):
            write(batch, lanes, (value >> unsigned.type(i * part.bits)).astype(part.dtype))

    return execute


@decodes("cvta")
def _convert_address(decoder: Decoder, instruction: Instruction) -> Execute:
    require_operands(instruction, 2)
    modifiers = Modifiers(instruction)
    scalar = modifiers.take_type()
    to_space = modifiers.take("to") is not None
    space = modifiers.take("global", "shared", "shared::cta", "local", "const", "param")
    modifiers.finish()
    windows = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    window = windows.get(space or "", 0)
    if scalar.bits != 64:
        raise PtxError(f"addresses have 64 bits here: {instruction.text}")
    delta = np.uint64((-window if to_space else window) & ((1 << 64) - 1))
    target, source = instruction.operands
    write = decoder.write(instruction, target, TYPES["u64"])
    read = decoder.read(instruction, source, TYPES["u64"])
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes) + delta)


@decodes("cvt")
def _cvt(decoder: Decoder, instruction: Instruction) -> Execute:
    modifiers = Modifiers(instruction)
    source_type, target_type = modifiers.take_type(), modifiers.take_type()
    mode = modifiers.take(*ROUNDING_MODES, *INTEGRAL_MODES)
    has_relu = modifiers.take("relu") is not None
    if target_type.name in ("bf16x2", "f16x2"):
        modifiers.finish()
        require_operands(instruction, 3)
        return _convert_pair(decoder, instruction, target_type, source_type, mode or "rn", has_relu)
    if has_relu and not target_type.is_float:
        raise PtxError(f"cannot execute: {instruction.text}")
    is_flushed = modifiers.take("ftz") is not None
    is_saturated = modifiers.take("sat") is not None
    modifiers.finish()
    require_operands(instruction, 2)
    target, source = instruction.operands
    if isinstance(source, Immediate):
        raise PtxError(f"a constant is converted: {instruction.text}")
    convert = _conversion(source_type, target_type, mode)
    if is_flushed:
        unflushed = convert
        convert = lambda a: _flush_results(unflushed(flush_subnormals(a) if source_type.is_float else a))  # noqa: E731
    if is_saturated and target_type.is_float:
        unbounded = convert
        convert = lambda a: clamp_to_unit(unbounded(a))  # noqa: E731
    elif is_saturated and not source_type.is_float:
        convert = lambda a: _clamp_integers(a, target_type)  # noqa: E731
    if has_relu:
        signed = convert
        convert = lambda a: _relu(signed(a))  # noqa: E731
    read = decoder.read_number(instruction, source, source_type)
    write = decoder.write_number(instruction, target, target_type)
    return lambda batch, lanes: write(batch, lanes, convert(np.asarray(read(batch, lanes))))


def _flush_results(values: Any) -> Any:
    return flush_subnormals(values) if values.dtype == np.float32 else values


def _relu(values: Any) -> Any:
    return np.where(values < 0, values.dtype.type(0), values)


def _clamp_integers(values: Any, target: ScalarType) -> Any:
    limits = np.iinfo(target.dtype)
    source_limits = np.iinfo(values.dtype)
    low, high = max(limits.min, source_limits.min), min(limits.max, source_limits.max)
    return np.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(target.dtype)


def _conversion(source: ScalarType, target: ScalarType, mode: str | None) -> Callable[[Any], Any]:
    if not source.is_float and not target.is_float:
        return lambda a: a.astype(target.dtype)
    if not source.is_float:
        dtype = _number_dtype(target)
        return lambda a: narrow(a, dtype, mode or "rn")
    if not target.is_float:
        if mode not in INTEGRAL_MODES:
            raise PtxError(f"a conversion to integers rounds to integers, not by .{mode}")
        return lambda a: _to_integer(a, source, target, mode or "")
    if mode in INTEGRAL_MODES:
        return lambda a: round_to_integral(a, mode or "").astype(_number_dtype(target))
    if target.bits == 16 and mode not in (None, "rn"):
        return lambda a: _round_to_16_bits(a, target, mode or "")
    if target.bits == 16:
        return lambda a: a  # the writer rounds to nearest
    return lambda a: narrow(a, target.dtype, mode or "rn")


def _round_to_16_bits(values: Any, target: ScalarType, mode: str) -> Any:
    if target.name == "bf16":
        return bfloat16_to_float(float_to_bfloat16(values, mode))
    return float_to_half(values, mode).astype(np.float32)


def _number_dtype(scalar: ScalarType) -> np.dtype[Any]:
    """What the values of a float type travel as."""
    return np.dtype(np.float32) if scalar.bits == 16 else scalar.dtype


def _to_integer(values: Any, source: ScalarType, target: ScalarType, mode: str) -> Any:
    """Round, then clamp to the type's range. NaN becomes 0, or the value with only the top bit set for 64 bits."""
    limits = np.iinfo(target.dtype)
    whole = round_to_integral(values.astype(np.longdouble), mode)
    is_nan = np.isnan(values)
    bounded = np.clip(np.where(is_nan, 0, whole), np.longdouble(limits.min), np.longdouble(limits.max))
    if limits.min == 0:
        result = bounded.astype(np.uint64).astype(target.dtype)
    else:
        result = bounded.astype(np.int64).astype(target.dtype)
    if source.bits == 64 or target.bits == 64:
        top_bit = np.array([1 << (target.bits - 1)], f"u{target.num_bytes}").view(target.dtype)[0]
        result = np.where(is_nan, top_bit, result)
    return result


def _convert_pair(
    decoder: Decoder, instruction: Instruction, target: ScalarType, source: ScalarType, mode: str, has_relu: bool
) -> Execute:
    """Two float32 to one register of halves: the first source becomes the upper half."""
    if source.name != "f32" or mode not in ("rn", "rz"):
        raise PtxError(f"cannot execute: {instruction.text}")
    write = decoder.write(instruction, instruction.operands[0], TYPES["b32"])
    read_high, read_low = (decoder.read(instruction, each, source) for each in instruction.operands[1:])

    def halves(values: Any) -> Any:
        values = np.asarray(values)
        if has_relu:
            values = _relu(values)
        if target.name == "bf16x2":
            return float_to_bfloat16(values, mode).astype(np.uint32)
        return float_to_half(values, mode).view(np.uint16).astype(np.uint32)

    def execute(batch: Any, lanes: Lanes) -> None:
        high, low = halves(read_high(batch, lanes)), halves(read_low(batch, lanes))
        write(batch, lanes, (high << np.uint32(16)) | low)

    return execute

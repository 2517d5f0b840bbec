"""What single instructions compute, in Python's own whole numbers and fractions, and a way to run them.

``run_case`` writes a kernel of one instruction, feeds it values that are likely to go wrong and compares every result.
The functions here follow the text of the PTX ISA and share nothing with the interpreter.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, product
from typing import Any

import numpy as np

from . import launch, parse_module

Value = Any  # int, float or bool


@dataclass(frozen=True)
class InstructionCase:
    """``text`` is an opcode; ``types`` are of the result and of each operand, by name of a PTX type."""

    text: str
    types: tuple[str, ...]
    expected: Callable[..., Value]
    suffix: str = ""  # operands that are constants
    allows: Callable[..., bool] = lambda *operands: True

    def __str__(self) -> str:
        return self.text + self.suffix.replace(", ", "-")


def _bits_of(type_name: str) -> int:
    return int(type_name.removeprefix("b").removeprefix("f").lstrip("us"))


def _decode(raw: int, type_name: str) -> Value:
    bits = _bits_of(type_name)
    raw &= (1 << bits) - 1
    if type_name == "bf16":
        return struct.unpack("<f", struct.pack("<I", raw << 16))[0]
    if type_name[0] == "f":
        formats = {16: ("<H", "<e"), 32: ("<I", "<f"), 64: ("<Q", "<d")}[bits]
        return struct.unpack(formats[1], struct.pack(formats[0], raw))[0]
    return raw - (1 << bits) if type_name[0] == "s" and raw >> (bits - 1) else raw


def _operand_values(type_name: str) -> list[int]:
    """Raw bits of a few values of a type that are likely to go wrong."""
    bits = _bits_of(type_name)
    if type_name in ("f32", "f64", "f16", "bf16"):
        numbers = [0.0, -0.0, 1.0, -1.5, 0.5, 2.5, 3.5, -2.5, 1e-3, 2.7, 65504.0, 1e9, -3e9, 1e19, -1e19, 3e38, 1e-40]
        numbers += [math.inf, -math.inf, math.nan, 16777217.0, 1 / 3]
        if bits == 64:
            return [struct.unpack("<Q", struct.pack("<d", number))[0] for number in numbers]
        singles = np.array(numbers, np.float64).astype(np.float32)
        if type_name == "f32":
            return [int(each) for each in singles.view(np.uint32)]
        if type_name == "bf16":
            return [int(each) >> 16 for each in singles.view(np.uint32)]
        with np.errstate(over="ignore"):
            return [int(each) for each in singles.astype(np.float16).view(np.uint16)]
    top = 1 << (bits - 1)
    numbers_of_bits = [
        0,
        1,
        2,
        5,
        7,
        8,
        31,
        32,
        33,
        0x0804,
        -1,
        -2,
        -7,
        top,
        top - 1,
        top + 1,
        0x3F1,
        0x9E3779B97F4A7C15,
    ]
    return [number & ((1 << bits) - 1) for number in numbers_of_bits]


def _combinations(case: InstructionCase) -> Iterator[tuple[int, ...]]:
    lists = [_operand_values(type_name) for type_name in case.types[1:]]
    if len(lists) == 3:  # the third operand in every position, the others in turn
        lists = [lists[0][::2], lists[1][1::2], lists[2]]
    elif len(lists) > 3:
        lists = [lists[0][::4], lists[1][1::4], lists[2][::2], lists[3][::2]]
    for raw in product(*lists):
        if case.allows(*(_decode(each, name) for each, name in zip(raw, case.types[1:], strict=True))):
            yield raw


def _kernel_text(case: InstructionCase) -> str:
    names = ["%d", "%a", "%b", "%c", "%e"][: len(case.types)]
    widths = [max(16, _bits_of(type_name)) for type_name in case.types]
    declarations = "\n".join(f".reg .b{width} {name};" for name, width in zip(names, widths, strict=True))
    loads = "\n".join(
        f"ld.global.b{width} {name}, [%address+{8 * i}];"
        for i, (name, width) in enumerate(zip(names[1:], widths[1:], strict=True))
    )
    operands = ", ".join(names) + case.suffix
    instruction = f"{case.text} {operands};"
    if case.text.startswith("setp"):
        instruction = f"{case.text} %p, {', '.join(names[1:])}; selp.b32 %d, 1, 0, %p;"
    return f"""
.version 9.0
.target sm_80
.address_size 64
.visible .entry case(.param .u64 case_param_0, .param .u64 case_param_1) {{
  .reg .pred %p; .reg .b32 %thread; .reg .b64 %address, %result, %offset;
  {declarations}
  ld.param.u64 %address, [case_param_0];
  ld.param.u64 %result, [case_param_1];
  mov.u32 %thread, %ctaid.x;
  mad.lo.s32 %thread, %thread, 64, %thread;
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %offset, %thread, 32;
  add.s64 %address, %address, %offset;
  mul.wide.u32 %offset, %thread, 8;
  add.s64 %result, %result, %offset;
  {loads}
  {instruction}
  st.global.b{widths[0]} [%result], %d;
  ret;
}}
"""


def run_case(case: InstructionCase) -> int:
    """Run an instruction on many operands; the number of results compared."""
    module = parse_module(_kernel_text(case))
    combinations = _combinations(case)
    num_compared = 0
    while chunk := list(islice(combinations, 1024)):
        table = np.zeros((len(chunk), 4), np.uint64)
        for i, raw in enumerate(chunk):
            table[i, : len(raw)] = raw
        regions = {1 << 20: table.tobytes(), 1 << 30: bytes(8 * len(chunk))}
        params = struct.pack("<QQ", 1 << 20, 1 << 30)
        after = launch(module.kernel("case"), (1, 1, 1), (len(chunk), 1, 1), 0, params, regions)
        for raw, result in zip(chunk, np.frombuffer(after[1 << 30], np.uint64), strict=True):
            operands = [_decode(each, name) for each, name in zip(raw, case.types[1:], strict=True)]
            _compare(case, operands, case.expected(*operands), int(result))
            num_compared += 1
    return num_compared


def _compare(case: InstructionCase, operands: list[Value], expected: Value, raw: int) -> None:
    actual = _decode(raw, case.types[0])
    if isinstance(expected, float) or case.types[0][0] == "f":
        is_same = math.isnan(actual) if math.isnan(expected) else actual == expected
        is_same = is_same and (math.isnan(expected) or math.copysign(1, actual) == math.copysign(1, expected))
    else:
        is_same = (int(expected) - actual) % (1 << _bits_of(case.types[0])) == 0
    assert is_same, f"{case.text} of {operands}: {actual}, expected {expected}"


# --- floats by fractions ----------------------------------------------------------------------------------------------


def round_to_float(exact: Fraction | float, mode: str = "rn", digits: int = 24, least_exponent: int = -149) -> float:
    """An exact value in binary floating point of this many digits; float32 unless said otherwise."""
    if isinstance(exact, float) and not math.isfinite(exact):
        return exact
    value = Fraction(exact)
    if value == 0:
        return exact if isinstance(exact, float) else 0.0
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least_exponent)
    scaled = value / unit
    rounding: dict[str, Callable[[Fraction], int]] = {
        "rn": round,
        "rz": math.trunc,
        "rm": math.floor,
        "rp": math.ceil,
    }
    whole = rounding[mode](scaled)
    limit = 2**digits * Fraction(2) ** (104 if digits == 24 else 971)
    rounded = whole * unit
    if digits == 24 and abs(rounded) >= limit:
        toward_zero = mode == "rz" or mode == ("rm" if value > 0 else "rp")
        return math.copysign(3.4028234663852886e38 if toward_zero else math.inf, value)
    return math.copysign(float(rounded), value)


def _fma(mode: str) -> Callable[[float, float, float], float]:
    def fma(a: float, b: float, c: float) -> float:
        if not all(map(math.isfinite, (a, b, c))):
            return a * b + c
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact == 0:
            return a * b + c if mode == "rn" or Fraction(a) * Fraction(b) == 0 else 0.0
        return round_to_float(exact, mode)

    return fma


def _to_integer(rounding: Callable[[float], int], low: int, high: int, nan: int) -> Callable[[float], int]:
    def convert(value: float) -> int:
        if math.isnan(value):
            return nan
        if math.isinf(value):
            return high if value > 0 else low
        return min(max(rounding(value), low), high)

    return convert


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _extract(bits: int, is_signed: bool) -> Callable[[int, int, int], int]:
    def extract(value: int, position: int, length: int) -> int:
        position, length = position & 0xFF, length & 0xFF
        raw = value & ((1 << bits) - 1)
        sign = raw >> min(position + length - 1, bits - 1) & 1 if is_signed and length else 0
        taken = [raw >> (position + i) & 1 if i < length and position + i < bits else sign for i in range(bits)]
        return sum(bit << i for i, bit in enumerate(taken))

    return extract


def _insert(field: int, base: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(min(length, max(32 - position, 0))):
        base = base & ~(1 << (position + i)) | (field >> i & 1) << (position + i)
    return base


def _permute(low: int, high: int, selector: int) -> int:
    source = (low | high << 32).to_bytes(8, "little")
    picked = []
    for i in range(4):
        control = selector >> 4 * i & 15
        byte = source[control & 7]
        picked.append((0xFF if byte & 0x80 else 0) if control & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def _extreme(choose: Callable[..., float], keeps_nan: bool) -> Callable[[float, float], float]:
    def extreme(a: float, b: float) -> float:
        if math.isnan(a) or math.isnan(b):
            return math.nan if keeps_nan else b if math.isnan(a) else a
        return choose(a, b, key=lambda value: (value, math.copysign(1, value)))

    return extreme


def _is_unordered(a: float, b: float) -> bool:
    return math.isnan(a) or math.isnan(b)


def _half(value: float, digits: int, least_exponent: int, limit: float) -> float:
    rounded = round_to_float(value, "rn", digits, least_exponent)
    return math.copysign(math.inf, value) if abs(rounded) >= limit else rounded


def _highest(value: int) -> int:
    return value.bit_length() - 1 if value >= 0 else (~value).bit_length() - 1


def _same(count: int, type_name: str) -> tuple[str, ...]:
    return (type_name,) * count


S32, U32, S64, F32 = (_same(3, name) for name in ("s32", "u32", "s64", "f32"))
INTEGER_CASES = [
    InstructionCase("add.s32", S32, lambda a, b: a + b),
    InstructionCase("sub.s64", S64, lambda a, b: a - b),
    InstructionCase("mul.lo.s32", S32, lambda a, b: a * b),
    InstructionCase("mul.hi.s32", S32, lambda a, b: a * b >> 32),
    InstructionCase("mul.hi.u32", U32, lambda a, b: a * b >> 32),
    InstructionCase("mul.hi.s64", S64, lambda a, b: a * b >> 64),
    InstructionCase("mul.hi.u64", _same(3, "u64"), lambda a, b: a * b >> 64),
    InstructionCase("mul.wide.s32", ("s64", "s32", "s32"), lambda a, b: a * b),
    InstructionCase("mul.wide.u32", ("u64", "u32", "u32"), lambda a, b: a * b),
    InstructionCase("mul.wide.u16", ("u32", "u16", "u16"), lambda a, b: a * b),
    InstructionCase("mad.lo.s32", _same(4, "s32"), lambda a, b, c: a * b + c),
    InstructionCase("mad.hi.s32", _same(4, "s32"), lambda a, b, c: (a * b >> 32) + c),
    InstructionCase("mad.wide.u32", ("u64", "u32", "u32", "u64"), lambda a, b, c: a * b + c),
    InstructionCase("mad.wide.s32", ("s64", "s32", "s32", "s64"), lambda a, b, c: a * b + c),
    InstructionCase("mul24.lo.u32", U32, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    InstructionCase("div.s32", S32, _divide, allows=lambda a, b: b != 0),
    InstructionCase("div.u64", _same(3, "u64"), _divide, allows=lambda a, b: b != 0),
    InstructionCase("rem.s32", S32, lambda a, b: a - b * _divide(a, b), allows=lambda a, b: b != 0),
    InstructionCase("rem.u32", U32, lambda a, b: a % b, allows=lambda a, b: b != 0),
    InstructionCase("neg.s32", ("s32", "s32"), lambda a: -a),
    InstructionCase("abs.s64", ("s64", "s64"), abs),
    InstructionCase("min.s32", S32, min),
    InstructionCase("max.u32", U32, max),
    InstructionCase("and.b32", _same(3, "b32"), lambda a, b: a & b),
    InstructionCase("or.b64", _same(3, "b64"), lambda a, b: a | b),
    InstructionCase("xor.b16", _same(3, "b16"), lambda a, b: a ^ b),
    InstructionCase("not.b32", _same(2, "b32"), lambda a: ~a),
    InstructionCase("shl.b32", ("b32", "b32", "u32"), lambda a, b: a << b if b < 32 else 0),
    InstructionCase("shl.b64", ("b64", "b64", "u32"), lambda a, b: a << b if b < 64 else 0),
    InstructionCase("shr.s32", ("s32", "s32", "u32"), lambda a, b: a >> min(b, 31)),
    InstructionCase("shr.u64", ("u64", "u64", "u32"), lambda a, b: a >> b if b < 64 else 0),
    InstructionCase("shf.l.wrap.b32", _same(4, "b32"), lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    InstructionCase("shf.r.wrap.b32", _same(4, "b32"), lambda a, b, c: (b << 32 | a) >> (c & 31)),
    InstructionCase("shf.l.clamp.b32", _same(4, "b32"), lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    InstructionCase("shf.r.clamp.b32", _same(4, "b32"), lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    InstructionCase("bfe.u32", _same(4, "u32"), _extract(32, False)),
    InstructionCase("bfe.s32", ("s32", "s32", "u32", "u32"), _extract(32, True)),
    InstructionCase("bfe.s64", ("s64", "s64", "u32", "u32"), _extract(64, True)),
    InstructionCase("bfi.b32", ("b32", "b32", "b32", "u32", "u32"), _insert),
    InstructionCase("prmt.b32", _same(4, "b32"), _permute),
    InstructionCase("popc.b64", ("u32", "b64"), int.bit_count),
    InstructionCase("clz.b32", ("u32", "b32"), lambda a: 32 - a.bit_length()),
    InstructionCase("brev.b32", ("b32", "b32"), lambda a: int(f"{a:032b}"[::-1], 2)),
    InstructionCase("bfind.u32", ("u32", "u32"), _highest),
    InstructionCase("bfind.s64", ("u32", "s64"), _highest),
    InstructionCase("bfind.shiftamt.u32", ("u32", "u32"), lambda a: 31 - _highest(a) if a else -1),
    InstructionCase("lop3.b32", _same(4, "b32"), lambda a, b, c: (a & b) ^ c, suffix=f", {(0xF0 & 0xCC) ^ 0xAA}"),
    InstructionCase("slct.b32.s32", ("b32", "b32", "b32", "s32"), lambda a, b, c: a if c >= 0 else b),
    InstructionCase("setp.lt.s32", ("b32", "s32", "s32"), lambda a, b: a < b),
    InstructionCase("setp.hi.u32", ("b32", "u32", "u32"), lambda a, b: a > b),
    InstructionCase("set.ge.u32.s32", ("u32", "s32", "s32"), lambda a, b: -1 if a >= b else 0),
    InstructionCase("cvt.s64.s32", ("s64", "s32"), lambda a: a),
    InstructionCase("cvt.u64.u32", ("u64", "u32"), lambda a: a),
    InstructionCase("cvt.s32.s8", ("s32", "s32"), lambda a: (a + 128 & 0xFF) - 128),
    InstructionCase("cvt.u32.u16", ("u32", "u16"), lambda a: a),
    InstructionCase("cvt.sat.s16.s32", ("s16", "s32"), lambda a: min(max(a, -(1 << 15)), (1 << 15) - 1)),
]
FLOAT_CASES = [
    InstructionCase("add.f32", F32, lambda a, b: round_to_float(a + b)),
    InstructionCase("add.rz.f32", F32, lambda a, b: _fma("rz")(a, 1.0, b)),
    InstructionCase("mul.f32", F32, lambda a, b: round_to_float(a * b)),
    InstructionCase("fma.rn.f32", _same(4, "f32"), _fma("rn")),
    InstructionCase("fma.rm.f32", _same(4, "f32"), _fma("rm"), allows=lambda *each: all(map(math.isfinite, each))),
    InstructionCase(
        "div.rn.f32",
        F32,
        lambda a, b: round_to_float(Fraction(a) / Fraction(b)),
        allows=lambda a, b: math.isfinite(a) and math.isfinite(b) and a * b != 0,
    ),
    InstructionCase("neg.f32", ("f32", "f32"), lambda a: -a),
    InstructionCase("abs.f32", ("f32", "f32"), abs),
    InstructionCase("copysign.f32", F32, lambda a, b: math.copysign(b, a)),
    InstructionCase("min.f32", F32, _extreme(min, False)),
    InstructionCase("max.f32", F32, _extreme(max, False)),
    InstructionCase("max.NaN.f32", F32, _extreme(max, True)),
    InstructionCase("setp.ne.f32", ("b32", "f32", "f32"), lambda a, b: not _is_unordered(a, b) and a != b),
    InstructionCase("setp.neu.f32", ("b32", "f32", "f32"), lambda a, b: _is_unordered(a, b) or a != b),
    InstructionCase("setp.equ.f32", ("b32", "f32", "f32"), lambda a, b: _is_unordered(a, b) or a == b),
    InstructionCase("setp.ltu.f32", ("b32", "f32", "f32"), lambda a, b: _is_unordered(a, b) or a < b),
    InstructionCase("setp.ge.f32", ("b32", "f32", "f32"), lambda a, b: a >= b),
    InstructionCase("setp.nan.f32", ("b32", "f32", "f32"), _is_unordered),
    InstructionCase("cvt.rzi.s32.f32", ("s32", "f32"), _to_integer(math.trunc, -(1 << 31), (1 << 31) - 1, 0)),
    InstructionCase("cvt.rni.s32.f32", ("s32", "f32"), _to_integer(round, -(1 << 31), (1 << 31) - 1, 0)),
    InstructionCase("cvt.rmi.s32.f32", ("s32", "f32"), _to_integer(math.floor, -(1 << 31), (1 << 31) - 1, 0)),
    InstructionCase("cvt.rpi.u32.f32", ("u32", "f32"), _to_integer(math.ceil, 0, (1 << 32) - 1, 0)),
    InstructionCase("cvt.rzi.s64.f32", ("s64", "f32"), _to_integer(math.trunc, -(1 << 63), (1 << 63) - 1, -(1 << 63))),
    InstructionCase("cvt.rzi.u64.f64", ("u64", "f64"), _to_integer(math.trunc, 0, (1 << 64) - 1, 1 << 63)),
    InstructionCase("cvt.rn.f32.s32", ("f32", "s32"), lambda a: round_to_float(Fraction(a))),
    InstructionCase("cvt.rz.f32.u32", ("f32", "u32"), lambda a: round_to_float(Fraction(a), "rz")),
    InstructionCase("cvt.rp.f32.s64", ("f32", "s64"), lambda a: round_to_float(Fraction(a), "rp")),
    InstructionCase("cvt.rn.f64.u64", ("f64", "u64"), lambda a: round_to_float(Fraction(a), "rn", 53, -1074)),
    InstructionCase("cvt.rn.f32.f64", ("f32", "f64"), round_to_float),
    InstructionCase("cvt.rm.f32.f64", ("f32", "f64"), lambda a: round_to_float(a, "rm")),
    InstructionCase("cvt.f64.f32", ("f64", "f32"), lambda a: a),
    InstructionCase("cvt.f32.f16", ("f32", "f16"), lambda a: a),
    InstructionCase("cvt.f32.bf16", ("f32", "bf16"), lambda a: a),
    InstructionCase("cvt.rn.f16.f32", ("f16", "f32"), lambda a: _half(a, 11, -24, 65520.0)),
    InstructionCase("cvt.rn.bf16.f32", ("bf16", "f32"), lambda a: _half(a, 8, -133, 2.0**128)),
    InstructionCase(
        "cvt.rmi.f32.f32", ("f32", "f32"), lambda a: float(math.floor(a)) if a else a, allows=math.isfinite
    ),
    InstructionCase("cvt.sat.f32.f32", ("f32", "f32"), lambda a: 0.0 if math.isnan(a) or a <= 0 else min(a, 1.0)),
]
CASES = INTEGER_CASES + FLOAT_CASES

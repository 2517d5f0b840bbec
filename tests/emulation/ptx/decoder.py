"""Operands to functions that read and write them, and the table of instructions.

An instruction is decoded once per kernel into a function of the batch and its lanes: the threads that execute it, as a
slice or as an ascending array of indices. Readers return one element a lane, or a numpy scalar for a constant.
"""

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parser import Address, Immediate, Instruction, Kernel, Operand, Register, Vector
from .scalar_types import (
    TYPES,
    Array,
    PtxError,
    ScalarType,
    bfloat16_to_float,
    float_to_bfloat16,
    float_to_half,
)

if TYPE_CHECKING:
    from .machine import Batch

Lanes = Any  # slice | Array
Execute = Callable[["Batch", Lanes], None]
Read = Callable[["Batch", Lanes], Any]
Write = Callable[["Batch", Lanes, Any], None]
ReadAddress = Callable[["Batch", Lanes], Array]

SPECIAL_REGISTERS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
    *(f"%lanemask_{comparison}" for comparison in ("eq", "lt", "le", "gt", "ge")),
)

DECODERS: dict[str, Callable[["Decoder", Instruction], Execute]] = {}


def decodes(*roots: str) -> Callable[[Callable[["Decoder", Instruction], Execute]], Any]:
    """Enter a function into the table, for opcodes that begin with one of ``roots``."""

    def enter(decode: Callable[["Decoder", Instruction], Execute]) -> Callable[["Decoder", Instruction], Execute]:
        for root in roots:
            DECODERS[root] = decode
        return decode

    return enter


class Modifiers:
    """The parts of an opcode after its first. Every one must be taken: what nobody understands is not skipped."""

    def __init__(self, instruction: Instruction) -> None:
        self._instruction = instruction
        self._left = list(instruction.modifiers)

    def take(self, *names: str) -> str | None:
        """The first of ``names`` that is there, taken; None if none is."""
        for name in names:
            if name in self._left:
                self._left.remove(name)
                return name
        return None

    def has(self, *names: str) -> bool:
        """Whether one of ``names`` is there."""
        return any(name in self._left for name in names)

    def take_any(self, *names: str) -> None:
        """Take all of ``names`` that are there and change nothing here, such as cache hints."""
        while self.take(*names):
            pass

    def take_type(self) -> ScalarType:
        """The type, which is the last part."""
        if not self._left or self._left[-1] not in TYPES:
            raise PtxError(f"no type known here: {self._instruction.text}")
        return TYPES[self._left.pop()]

    def finish(self) -> None:
        """Refuse the instruction if anything is left."""
        if self._left:
            raise PtxError(f"cannot execute (.{'.'.join(self._left)}): {self._instruction.text}")


def require_operands(instruction: Instruction, *counts: int) -> None:
    """Refuse an instruction with another number of operands."""
    if len(instruction.operands) not in counts:
        raise PtxError(f"{len(instruction.operands)} operands: {instruction.text}")


class Decoder:
    """Knows where a kernel's registers are kept."""

    def __init__(self, kernel: Kernel) -> None:
        self.slots: dict[str, tuple[int, int]] = {}  # name to width in bits and row among registers of that width
        self.num_rows = {1: 0, 16: 0, 32: 0, 64: 0}
        for name, type_name in kernel.registers.items():
            bits = TYPES[type_name].bits
            if bits not in self.num_rows:
                raise PtxError(f"no registers of type .{type_name}")
            self._add(name, bits)
        self.special_rows = {name: self._add(name, 32) for name in SPECIAL_REGISTERS}

    def _add(self, name: str, bits: int) -> int:
        row = self.num_rows[bits]
        self.slots[name] = (bits, row)
        self.num_rows[bits] = row + 1
        return row

    def _slot(self, register: Register, instruction: Instruction) -> tuple[int, int]:
        if register.name not in self.slots:
            raise PtxError(f"{register.name} is not available: {instruction.text}")
        return self.slots[register.name]

    def decode(self, instruction: Instruction) -> Execute:
        """The function that executes the instruction."""
        if instruction.root not in DECODERS:
            raise PtxError(f"cannot execute: {instruction.text}")
        try:
            return DECODERS[instruction.root](self, instruction)
        except PtxError:
            raise
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise PtxError(f"cannot execute ({error!r}): {instruction.text}") from error

    def read(self, instruction: Instruction, operand: Operand | None, scalar: ScalarType) -> Read:
        """Reader of an operand as ``scalar``, bit for bit; bfloat16 comes as uint16."""
        if isinstance(operand, Immediate):
            constant = _constant(operand.text, scalar)
            return lambda batch, lanes: constant
        if not isinstance(operand, Register):
            raise PtxError(f"expected a register or a constant: {instruction.text}")
        bits, row = self._slot(operand, instruction)
        if scalar.kind == "p":
            if bits != 1:
                raise PtxError(f"{operand.name} is not a predicate: {instruction.text}")
            if operand.is_negated:
                return lambda batch, lanes: ~batch.rows["bool"][row][lanes]
            return lambda batch, lanes: batch.rows["bool"][row][lanes]
        if bits < scalar.bits or bits == 1 or operand.is_negated:
            raise PtxError(f"{operand.name} cannot be read as .{scalar.name}: {instruction.text}")
        if bits == scalar.bits:
            kind = scalar.kind_name
            return lambda batch, lanes: batch.rows[kind][row][lanes]
        if scalar.is_float:
            raise PtxError(f"{operand.name} is too wide for .{scalar.name}: {instruction.text}")
        raw, dtype = f"uint{bits}", scalar.dtype
        return lambda batch, lanes: batch.rows[raw][row][lanes].astype(dtype)

    def read_number(self, instruction: Instruction, operand: Operand | None, scalar: ScalarType) -> Read:
        """As :meth:`read`, but 16-bit floats come as the float32 they stand for."""
        read = self.read(instruction, operand, scalar)
        if scalar.name == "f16":
            return lambda batch, lanes: np.asarray(read(batch, lanes)).astype(np.float32)
        if scalar.name == "bf16":
            return lambda batch, lanes: bfloat16_to_float(read(batch, lanes))
        return read

    def write(self, instruction: Instruction, operand: Operand | None, scalar: ScalarType) -> Write:
        """Writer of values that have the type's dtype; a wider register is filled by sign or with zeros."""
        if operand is None:
            return lambda batch, lanes, values: None
        if not isinstance(operand, Register) or operand.is_negated:
            raise PtxError(f"cannot be written: {instruction.text}")
        bits, row = self._slot(operand, instruction)
        if bits == scalar.bits:
            kind = scalar.kind_name
        elif bits > scalar.bits > 1 and not scalar.is_float:
            kind = f"int{bits}" if scalar.kind == "s" else f"uint{bits}"
        else:
            raise PtxError(f"{operand.name} cannot hold .{scalar.name}: {instruction.text}")

        def write(batch: "Batch", lanes: Lanes, values: Any) -> None:
            batch.rows[kind][row][lanes] = values

        return write

    def write_number(self, instruction: Instruction, operand: Operand | None, scalar: ScalarType) -> Write:
        """As :meth:`write`, but 16-bit floats are rounded from float32 or float64."""
        write = self.write(instruction, operand, scalar)
        if scalar.name == "f16":
            return lambda batch, lanes, values: write(batch, lanes, float_to_half(values))
        if scalar.name == "bf16":
            return lambda batch, lanes, values: write(batch, lanes, float_to_bfloat16(values))
        return write

    def read_all(self, instruction: Instruction, operand: Operand, scalar: ScalarType) -> list[Read]:
        """Readers of a vector's elements, or of one operand."""
        elements = operand.elements if isinstance(operand, Vector) else (operand,)
        return [self.read(instruction, element, scalar) for element in elements]

    def write_all(self, instruction: Instruction, operand: Operand, scalar: ScalarType) -> list[Write]:
        """Writers of a vector's elements, or of one operand."""
        elements = operand.elements if isinstance(operand, Vector) else (operand,)
        return [self.write(instruction, element, scalar) for element in elements]

    def whole_row(self, instruction: Instruction, operand: Operand | None, scalar: ScalarType) -> Read:
        """Reader of a register's value in every thread of the batch, whoever executes."""
        read = self.read(instruction, operand, scalar)
        return lambda batch, lanes: batch.as_array(read(batch, slice(None)), slice(None))

    def address(self, instruction: Instruction, operand: Operand) -> ReadAddress:
        """Reader of an address as int64, one a lane."""
        if not isinstance(operand, Address):
            raise PtxError(f"expected an address: {instruction.text}")
        offset = np.int64(operand.offset)
        if operand.base is None:
            return lambda batch, lanes: np.full(batch.count(lanes), offset, np.int64)
        bits, row = self._slot(operand.base, instruction)
        if bits == 64:
            return lambda batch, lanes: batch.rows["int64"][row][lanes] + offset
        if bits != 32:
            raise PtxError(f"{operand.base.name} holds no address: {instruction.text}")
        return lambda batch, lanes: batch.rows["uint32"][row][lanes].astype(np.int64) + offset


def _constant(text: str, scalar: ScalarType) -> Any:
    prefix = text[:2].lower()
    if prefix in ("0f", "0d"):
        width = 32 if prefix == "0f" else 64
        bits = int(text[2:], 16)
        if scalar.is_float and scalar.bits != width:
            number = struct.unpack("<f" if width == 32 else "<d", bits.to_bytes(width // 8, "little"))[0]
            return scalar.dtype.type(number)
        if scalar.bits != width:
            raise PtxError(f"{text} is no constant of type .{scalar.name}")
    elif scalar.is_float and ("." in text or "e" in text.lower()) and prefix != "0x":
        return scalar.dtype.type(float(text))
    else:
        digits = text.rstrip("U")
        is_octal = digits.lstrip("-").isdigit() and digits.lstrip("-").startswith("0")
        bits = int(digits, 8 if is_octal else 0)
        if scalar.kind == "p":
            return np.bool_(bits != 0)
        if scalar.bits >= 32 and scalar.is_float:
            return scalar.dtype.type(bits)
    raw = np.array([bits & ((1 << scalar.bits) - 1)], f"uint{scalar.bits}")
    return raw.view(scalar.dtype)[0]

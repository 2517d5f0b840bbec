"""The scalar types of PTX as numpy types, and the rounding of exact values to them.

bfloat16 has no numpy type: its values travel as float32 and are stored as the upper 16 bits.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class PtxError(Exception):
    """The program does what PTX does not allow, or what this interpreter does not know."""


@dataclass(frozen=True)
class ScalarType:
    """A PTX type: ``kind`` is b(its), u(nsigned), s(igned), f(loat) or p(redicate)."""

    name: str
    kind: str
    bits: int
    dtype: np.dtype[Any]
    kind_name: str  # of the dtype; looking it up there takes long

    @property
    def num_bytes(self) -> int:
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "f"


def _scalar_types() -> dict[str, ScalarType]:
    dtypes = {"pred": ("p", 1, "bool"), "bf16": ("f", 16, "uint16")}
    for bits in (8, 16, 32, 64):
        dtypes |= {f"b{bits}": ("b", bits, f"uint{bits}"), f"u{bits}": ("u", bits, f"uint{bits}")}
        dtypes[f"s{bits}"] = ("s", bits, f"int{bits}")
    for bits in (16, 32, 64):
        dtypes[f"f{bits}"] = ("f", bits, f"float{bits}")
    # Two halves in one register: the instructions that know them take them apart.
    dtypes |= {"f16x2": ("b", 32, "uint32"), "bf16x2": ("b", 32, "uint32")}
    return {name: ScalarType(name, kind, bits, np.dtype(dtype), dtype) for name, (kind, bits, dtype) in dtypes.items()}


TYPES = _scalar_types()


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """For making many small objects that all stay: searching them for garbage takes longer than making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


ROUNDING_MODES = ("rn", "rz", "rm", "rp")


def bfloat16_to_float(bits: Array) -> Array:
    """Widen bfloat16 bits to the float32 they stand for."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat16(values: Array, mode: str = "rn") -> Array:
    """Round float32 to bfloat16 bits; every NaN becomes the one NaN that PTX knows, 0x7fff."""
    values = np.asarray(values, np.float32)
    bits = np.atleast_1d(values.view(np.uint32))
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    elif mode == "rz":
        rounded = bits
    else:
        raise PtxError(f"no rounding .{mode} to bfloat16")
    rounded = (rounded >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values.reshape(rounded.shape))] = 0x7FFF
    return rounded.reshape(values.shape)


def float_to_half(values: Array, mode: str = "rn") -> Array:
    """Round to float16; every NaN becomes 0x7fff, as in PTX."""
    half = np.atleast_1d(narrow(values, np.dtype(np.float16), mode))
    half.view(np.uint16)[np.isnan(half)] = 0x7FFF
    return half.reshape(np.shape(values))


def narrow(exact: Array, dtype: np.dtype[Any], mode: str) -> Array:
    """Round values held in a wider type to ``dtype``: rn to nearest even, rz to zero, rm down, rp up."""
    exact = np.asarray(exact)
    nearest = exact.astype(dtype)
    if mode == "rn":
        return nearest
    # 64 bits of significand hold every integer of 64 bits and every float64 exactly.
    wide = exact.astype(np.longdouble)
    back = nearest.astype(np.longdouble)
    toward_zero = np.abs(back) > np.abs(wide)
    is_wrong = {
        "rz": toward_zero,
        "rm": back > wide,
        "rp": back < wide,
    }[mode]
    goal = {"rz": dtype.type(0), "rm": dtype.type(-np.inf), "rp": dtype.type(np.inf)}[mode]
    return np.where(is_wrong, np.nextafter(nearest, goal), nearest)


def add_to_odd(a: Array, b: Array) -> Array:
    """Sum of float64; where it is not exact, the neighbour whose last bit is 1, so that rounding it again is right.

    Rounding to nearest twice may round a tie that was none. Rounded to odd first, nothing inexact looks like a tie, nor
    like a number of the narrower type.
    """
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    bits = np.atleast_1d(total).view(np.int64).reshape(total.shape)
    grows = (error > 0) == (total > 0)
    is_inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    step = np.where(grows, np.int64(1), np.int64(-1))
    return np.where(is_inexact, bits + step, bits).view(np.float64)


def clamp_to_unit(values: Array) -> Array:
    """What ``.sat`` does to floats: between 0 and 1, NaN to 0."""
    return np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))


def round_to_integral(values: Array, mode: str) -> Array:
    """Round to a whole number: rni to nearest even, rzi to zero, rmi down, rpi up."""
    functions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    return functions[mode](values)


def flush_subnormals(values: Array) -> Array:
    """What ``.ftz`` does to inputs and results: subnormal numbers become zero and keep their sign."""
    is_subnormal = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(is_subnormal, np.copysign(np.float32(0), values), values)

"""What the kernels of ``primitives.cu`` must write, in closed form.

Each check runs a kernel of the compiled file and asserts on what it wrote. Fragments are filled and read lane by lane
by the PTX ISA's formulas; conversions are torch's; sums are of whole numbers, hence exact.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from . import Module, launch

Array = NDArray[Any]
ELEMENTS = {"BFloat16": torch.bfloat16, "Float16": torch.float16}
A_ADDRESS, B_ADDRESS, OUTPUT_ADDRESS = 0x7F12_3456_7000, 0x7F12_4000_0010, 0x7F20_0000_0020


class Kernels:
    """The kernels of one compiled file."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def entry(self, name: str, argument: str = "") -> str:
        """The mangled name of ``name<argument>``."""
        template = {"": "ENS0_", "float": "IfE", "uint4": "I5uint4E", "true": "ILb1EE", "false": "ILb0EE"}.get(argument)
        suffix = template or f"INS_{len(argument)}{argument}E"
        found = [entry for entry in self._module.entries if f"ptx{len(name)}{name}{suffix}" in entry]
        assert len(found) == 1, (name, argument, self._module.entries)
        return found[0]

    def run(
        self,
        name: str,
        argument: str,
        a: Array,
        b: Array,
        output: Array,
        count: int = 0,
        *,
        num_blocks: int = 1,
        num_threads: int = 32,
        shared_bytes: int = 0,
    ) -> Array:
        """Run a kernel on these arrays and return the output's new contents."""
        regions = {A_ADDRESS: a.tobytes(), B_ADDRESS: b.tobytes(), OUTPUT_ADDRESS: output.tobytes()}
        params = struct.pack("<QQQq", *regions, count)
        kernel = self._module.kernel(self.entry(name, argument))
        after = launch(kernel, (num_blocks, 1, 1), (num_threads, 1, 1), shared_bytes, params, regions)
        assert after[A_ADDRESS] == a.tobytes()
        assert after[B_ADDRESS] == b.tobytes()
        return np.frombuffer(after[OUTPUT_ADDRESS], output.dtype).reshape(output.shape)


NOTHING = np.zeros(0, np.float32)


def _bits(values: Array, element: str) -> Array:
    """Rounded to 16 bits, as uint16."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(ELEMENTS[element])
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _floats(bits: Array, element: str) -> Array:
    stored = torch.from_numpy(bits.copy().view(np.int16)).view(ELEMENTS[element])
    return stored.to(torch.float32).numpy()


def _interesting_floats() -> Array:
    """Ties to both sides, halves of the smallest number, overflow, signed zeros, infinities, NaN, and random ones."""
    rng = np.random.default_rng(3)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 3 * 2.0**-8], np.float32)
    edges = np.array([65504, 65519.9, 65520, 3.39e38, -3.4e38, 2.0**-24, 2.0**-25, 2.0**-133, 2.0**-134, 1e-45])
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    scales = 2.0 ** rng.integers(-30, 30, 80)
    values = np.concatenate([ties, edges, special, rng.standard_normal(80) * scales])
    return values.astype(np.float32)


def _assert_same_numbers(actual: Array, expected: Array) -> None:
    """Bit for bit, but any NaN for any NaN."""
    assert_array_equal(np.isnan(actual), np.isnan(expected))
    is_number = ~np.isnan(expected)
    assert_array_equal(np.signbit(actual[is_number]), np.signbit(expected[is_number]))
    assert_array_equal(actual[is_number], expected[is_number])


def check_multiply_accumulate(kernels: Kernels, element: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 9, (2, 16, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (2, 16, 8)).astype(np.float32)
    c = rng.integers(-50, 51, (2, 16, 8)).astype(np.float32)
    a_bits, b_bits = _bits(a, element), _bits(b, element)
    a_registers = np.zeros((2, 32, 4, 2), np.uint16)
    b_registers = np.zeros((2, 32, 2, 2), np.uint16)
    c_registers = np.zeros((2, 32, 4), np.float32)
    places = []
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(8):  # element i of A is half i % 2 of register i / 2
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = member * 2 + (i & 1) + (8 if i >= 4 else 0)
            a_registers[:, lane, i // 2, i % 2] = a_bits[:, row, column]
        for i in range(4):
            row = member * 2 + (i & 1) + (8 if i >= 2 else 0)
            b_registers[:, lane, i // 2, i % 2] = b_bits[:, row, group]
        for i in range(4):
            place = (group if i < 2 else group + 8, member * 2 + (i & 1))
            c_registers[:, lane, i] = c[:, place[0], place[1]]
            places.append((lane, i, *place))
    d_registers = kernels.run(
        "multiply_accumulate", element, a_registers, b_registers, c_registers, num_threads=64
    ).reshape(2, 32, 4)
    d = np.full((2, 16, 8), np.nan, np.float32)
    for lane, i, row, column in places:
        d[:, row, column] = d_registers[:, lane, i]
    assert_array_equal(d, np.einsum("wik,wkj->wij", a, b) + c)


def check_load_matrix(kernels: Kernels, transposed: str) -> None:
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)  # lane 8 m + r holds row r of matrix m
    order = rng.permutation(32).astype(np.int32)
    output = np.zeros((32, 4), np.uint32)
    actual = kernels.run("load_matrix", transposed, matrices, order, output, shared_bytes=512)
    for lane in range(32):
        for i in range(4):
            matrix = matrices[i].T if transposed == "true" else matrices[i]
            low, high = (int(matrix[lane // 4, lane % 4 * 2 + half]) for half in (0, 1))
            assert actual[lane, i] == low | high << 16, (lane, i)


def check_copy_async(kernels: Kernels, word: str) -> None:
    rng = np.random.default_rng(2)
    num_words = 1 if word == "float" else 4
    source = rng.integers(1, 1 << 32, (3, 64, num_words)).astype(np.uint32)
    output = np.zeros((3, 64, num_words), np.uint32)
    for num_copied in (0, 70, 192):
        expected = source.copy().reshape(192, num_words)
        expected[num_copied:] = 0
        actual = kernels.run(
            "copy_async", word, source, NOTHING, output, num_copied, num_threads=64, shared_bytes=3 * 64 * 16
        )
        assert_array_equal(actual, expected.reshape(3, 64, num_words)[:, ::-1])


def check_pack(kernels: Kernels, element: str) -> None:
    low = _interesting_floats()
    high = np.roll(low, 7)
    packed = kernels.run("pack", element, low, high, np.zeros(len(low), np.uint32), len(low))
    _assert_same_numbers(_floats(packed.astype(np.uint16), element), _floats(_bits(low, element), element))
    _assert_same_numbers(_floats((packed >> 16).astype(np.uint16), element), _floats(_bits(high, element), element))


def check_unpack(kernels: Kernels, element: str) -> None:
    bits = np.random.default_rng(4).integers(0, 1 << 16, (90, 2)).astype(np.uint16)
    actual = kernels.run("unpack", element, bits, NOTHING, np.zeros((90, 2), np.float32), 90)
    _assert_same_numbers(actual, _floats(bits, element))


def check_from_float(kernels: Kernels, element: str) -> None:
    values = _interesting_floats()
    if element == "float":
        actual = kernels.run("from_float", element, values, NOTHING, np.zeros(len(values), np.float32), len(values))
        _assert_same_numbers(actual, values)
        return
    bits = kernels.run("from_float", element, values, NOTHING, np.zeros(len(values), np.uint16), len(values))
    _assert_same_numbers(_floats(bits, element), _floats(_bits(values, element), element))


def check_to_float(kernels: Kernels, element: str) -> None:
    if element == "float":
        stored = values = _interesting_floats()
    else:
        stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)[::37].copy()
        values = _floats(stored, element)
    actual = kernels.run("to_float", element, stored, NOTHING, np.zeros(len(values), np.float32), len(values))
    _assert_same_numbers(actual, values)


def check_exp2_approximate(kernels: Kernels, _: str) -> None:
    special = [0, -0.0, 1, -1, 127.5, 128, -125.5, -126.5, -149, np.inf, -np.inf, np.nan, 1e-40]
    x = np.concatenate([special, np.random.default_rng(5).uniform(-40, 20, 100)]).astype(np.float32)
    actual = kernels.run("exp2_approximate", "", x, NOTHING, np.zeros(len(x), np.float32), len(x))
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    expected[expected < np.finfo(np.float32).tiny] = 0
    assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=2**-22, atol=0)  # the approximation is good to 2 ulp


def check_reciprocal_approximate(kernels: Kernels, _: str) -> None:
    special = [0, -0.0, 1, -1, 3, 2**126, 2**127, -(2**127), np.inf, -np.inf, np.nan, 1e-40, np.finfo(np.float32).max]
    x = np.concatenate([special, np.random.default_rng(6).uniform(1, 1000, 100)]).astype(np.float32)
    actual = kernels.run("reciprocal_approximate", "", x, NOTHING, np.zeros(len(x), np.float32), len(x))
    tiny = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore"):
        expected = (1 / np.where(np.abs(x) < tiny, np.copysign(0, x), x).astype(np.float64)).astype(np.float32)
    expected[np.abs(expected) < tiny] = 0
    assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=2**-23, atol=0)  # good to 1 ulp


def check_max_or_nan(kernels: Kernels, _: str) -> None:
    a = np.array([1, 2, np.nan, 0, np.nan, -np.inf, np.inf, -0.0, 0.0, -3], np.float32)
    b = np.array([2, 1, 0, np.nan, np.nan, -5, np.nan, 0.0, -0.0, -4], np.float32)
    expected = np.array([2, 2, np.nan, np.nan, np.nan, -5, np.nan, 0, 0, -3], np.float32)
    actual = kernels.run("max_or_nan", "", a, b, np.zeros(10, np.float32), 10)
    _assert_same_numbers(actual, expected)


def _check_atomic(kernels: Kernels, name: str, width: int, dtype: type, function: np.ufunc) -> None:
    rng = np.random.default_rng(6)
    # Negative numbers too: as unsigned they are the largest.
    values = rng.integers(-1000, 1001, (192, width)).astype(np.int32)
    if dtype is np.float32:
        values = values.astype(np.float32)
    cells = rng.integers(0, 8, 192).astype(np.int32)
    output: Array = np.full((8, width), 5, dtype)
    expected = output.copy()
    function.at(expected, cells, values.view(dtype))
    actual = kernels.run(name, "", values, cells, output, num_blocks=3, num_threads=64)
    assert_array_equal(actual, expected)
    if dtype is not np.float32:
        return
    # Subnormal operands and sums are zeros: what is added in 192 parts of 2^-127 is lost.
    small = np.full((192, width), 2.0**-127, np.float32)
    small[:64] = [[3 * 2.0**-127]]
    zeros = np.zeros((8, width), np.float32)
    actual = kernels.run(name, "", small, np.arange(192, dtype=np.int32) // 64, zeros, num_blocks=3, num_threads=64)
    assert_array_equal(actual[0], np.full(width, 192 * 2.0**-127, np.float32))
    assert_array_equal(actual[1:], zeros[1:])


def check_add_atomic_float(kernels: Kernels, _: str) -> None:
    _check_atomic(kernels, "add_atomic_float", 1, np.float32, np.add)


def check_add_atomic_pair(kernels: Kernels, _: str) -> None:
    _check_atomic(kernels, "add_atomic_pair", 2, np.float32, np.add)


def check_add_atomic_quad(kernels: Kernels, _: str) -> None:
    _check_atomic(kernels, "add_atomic_quad", 4, np.float32, np.add)


def check_add_atomic_int(kernels: Kernels, _: str) -> None:
    _check_atomic(kernels, "add_atomic_int", 1, np.int32, np.add)


def check_max_atomic(kernels: Kernels, _: str) -> None:
    _check_atomic(kernels, "max_atomic", 1, np.uint32, np.maximum)


def check_shared_memory(kernels: Kernels, _: str) -> None:
    actual = kernels.run("shared_memory", "", NOTHING, NOTHING, np.zeros((32, 2), np.uint32), shared_bytes=32)
    assert_array_equal(actual[:, 0], np.zeros(32))
    assert_array_equal(actual[:, 1], 3 * np.arange(32)[::-1])


def check_warp_intrinsics(kernels: Kernels, _: str) -> None:
    values = (np.arange(64) * 7 % 64).astype(np.int32)
    lanes = np.arange(32)
    warps = values.reshape(2, 32)
    sources = [np.full(64, 5), values, np.tile(lanes ^ 8, 2), np.tile(np.where(lanes < 3, lanes, lanes - 3), 2)]
    rows: list[Any] = [np.take_along_axis(warps, source.reshape(2, 32) % 32, 1).ravel() for source in sources]
    ballots = (warps % 3 == 0) @ (1 << lanes.astype(np.int64))
    rows.append(np.repeat(ballots, 32).astype(np.uint32).view(np.int32))
    rows.append(np.repeat((warps == 63 * 7 % 64).any(1), 32))
    rows.append(np.take_along_axis(warps, np.where(lanes < 16, lanes ^ 1, lanes ^ 2)[None].repeat(2, 0), 1).ravel())
    rows.append([_counts(int(value)) for value in values])
    rows.append(values.astype(np.float32).view(np.int32))
    for wanted, is_there in ((9, 1), (64, 0)):
        actual = kernels.run(
            "warp_intrinsics", "", values, NOTHING, np.zeros((10, 64), np.int32), wanted, num_threads=64
        )
        for i, row in enumerate([*rows, np.full(64, is_there)]):
            assert_array_equal(actual[i], row, err_msg=f"row {i}")


def _counts(value: int) -> int:
    lowest = (value & -value).bit_length()
    return value.bit_count() + 100 * lowest + 10000 * (32 - value.bit_length())


def check_divergence(kernels: Kernels, _: str) -> None:
    num_blocks = 3
    expected = np.zeros((num_blocks, 64), np.int32)
    for block in range(num_blocks):
        for thread in range(64):
            for i in range(thread + block + 1):
                expected[block, 63 - thread] += i if i % 3 == thread % 3 else -thread if i % 7 == 5 else 0
    actual = kernels.run(
        "divergence", "", NOTHING, NOTHING, np.zeros((3, 64), np.int32), num_blocks=3, num_threads=128, shared_bytes=256
    )
    assert_array_equal(actual, expected)


Check = Callable[[Kernels, str], None]
CHECKS: dict[str, tuple[Check, str]] = {
    f"{check.__name__.removeprefix('check_')}{f'-{argument}' if argument else ''}": (check, argument)
    for check, arguments in [
        (check_multiply_accumulate, ("BFloat16", "Float16")),
        (check_load_matrix, ("false", "true")),
        (check_copy_async, ("float", "uint4")),
        (check_pack, ("BFloat16", "Float16")),
        (check_unpack, ("BFloat16", "Float16")),
        (check_from_float, ("float", "BFloat16", "Float16")),
        (check_to_float, ("float", "BFloat16", "Float16")),
        (check_exp2_approximate, ("",)),
        (check_reciprocal_approximate, ("",)),
        (check_max_or_nan, ("",)),
        (check_add_atomic_float, ("",)),
        (check_add_atomic_pair, ("",)),
        (check_add_atomic_quad, ("",)),
        (check_add_atomic_int, ("",)),
        (check_max_atomic, ("",)),
        (check_shared_memory, ("",)),
        (check_warp_intrinsics, ("",)),
        (check_divergence, ("",)),
    ]
    for argument in arguments
}

"""Launches the emulator recorded, run once more from the PTX of the same sources, and what they wrote compared.

Each launch starts from the memory the emulator had before it, so that a difference is this launch's own.
"""

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import Kernel, Module, parse_module
from .machine import run
from .scalar_types import bfloat16_to_float
from .toolchain import PROJECT, SOURCES, compile_to_ptx, included_files

Array = NDArray[Any]

# A region holds one of these, or in the workspace anything.
FLOAT_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Of the larger of the two values, and again in units of 1, the size of the values in the cases here. The two sides
# contract and order sums differently and have their own exp2: a few dozen roundings of float32, and a 16-bit result may
# round to the other neighbour.
FLOAT32_TOLERANCE = 1e-5
RELATIVE_TOLERANCES = {"float32": FLOAT32_TOLERANCE, "bfloat16": 2.0**-7, "float16": 2.0**-10}
# Weights are rounded to the case's type before they are multiplied. In a few sums one comes out as the other neighbour.
LOOSE_TOLERANCES = {"float32": FLOAT32_TOLERANCE, "bfloat16": 2.0**-8, "float16": 2.0**-11}
MOST_LOOSE = 1 / 50
# Sums of grad_query wait for the scale, 1 / sqrt(head_dim), until they are written: here up to 16 times a gradient.
LARGER_SUMS = {"moba_attend_blocks_backward": 16.0}
# What a workspace holds, the kernel's stores say: float32, or words that are integers or pairs of 16-bit floats. They
# are floats where most around them lie within these bounds, which small integers do not. Integers must agree exactly.
PLAUSIBLE_HALVES = {"bfloat16": (2.0**-30, 64.0), "float16": (2.0**-14, 64.0)}
HALVES_PER_STRETCH = 128


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch as the emulator saw it; ``before`` and ``after`` are memory by address."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: bytes
    before: dict[int, bytes]
    after: dict[int, bytes]

    @property
    def kernel(self) -> str:
        """The kernel's name without namespace and template arguments."""
        return unmangled_name(self.name)


def unmangled_name(symbol: str) -> str:
    """The last of the nested names at the start of a mangled symbol."""
    rest, name = symbol.removeprefix("_ZN"), ""
    while found := re.match(r"(\d+)", rest):
        end = found.end() + int(found.group())
        name, rest = rest[found.end() : end], rest[end:]
    return name


def emulation_folder() -> str:
    """Where the emulated modules are."""
    return os.environ.get("TOPGATHER_EMULATION") or str(PROJECT / "build" / "emulation")


def load_emulated(name: str) -> ModuleType | None:
    """An emulated module, or None if it was not built."""
    folder = emulation_folder()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def take_recording(module: ModuleType) -> list[RecordedLaunch]:
    """What the emulator recorded since ``start_recording``."""
    return [
        RecordedLaunch(
            entry["name"],
            entry["grid"],
            entry["block"],
            entry["shared_bytes"],
            entry["arguments"],
            dict(entry["before"]),
            dict(entry["after"]),
        )
        for entry in module.take_recording()
    ]


def kernel_sources() -> list[Path]:
    """The files that hold the project's kernels, those that the build writes among them."""
    return [*sorted(SOURCES.glob("*/*_cuda.cu")), *sorted((Path(emulation_folder()) / "instances").glob("*_cuda.cu"))]


def global_functions() -> set[str]:
    """Names of all kernels, from the text of the sources."""
    names: set[str] = set()
    for path in [*kernel_sources(), *SOURCES.glob("*/*.cuh")]:
        names |= set(re.findall(r"__global__[^;{]*?\b(\w+)\(const \w+ \w+\)", path.read_text()))
    return names


class PtxOfKernels:
    """The PTX of all kernels, compiled and read file by file as launches ask for them."""

    def __init__(self, sources: list[Path]) -> None:
        self._left = list(sources)
        self._modules: list[Module] = []

    def kernel(self, name: str) -> Kernel:
        """The entry of this symbol."""
        for module in self._modules:
            if name in module.entries:
                return module.kernel(name)
        while self._left:
            module = parse_module(compile_to_ptx(self._left.pop(0), "compute_80"))
            self._modules.append(module)
            if name in module.entries:
                return module.kernel(name)
        raise LookupError(f"no source defines {name}")


def newer_sources(module: ModuleType) -> list[str]:
    """Sources of kernels that changed after the emulated module was built, which is reason enough to differ from it."""
    built = Path(module.__file__ or "").stat().st_mtime
    files = {path for source in kernel_sources() for path in included_files(source, [SOURCES])}
    return sorted(path.name for path in files if path.stat().st_mtime > built)


@dataclass(frozen=True)
class ReplayedLaunch:
    """What the PTX of a launch left in memory, and by region which words it stored as float32."""

    after: dict[int, bytes]
    float32_words: dict[int, Array]


def replay(recorded: RecordedLaunch, kernels: PtxOfKernels) -> ReplayedLaunch:
    """The launch as the PTX runs it."""
    memory = run(
        kernels.kernel(recorded.name),
        recorded.grid,
        recorded.block,
        recorded.shared_bytes,
        recorded.arguments,
        recorded.before,
    )
    return ReplayedLaunch(memory.region_bytes(), memory.float32_words())


def differences(recorded: RecordedLaunch, replayed: ReplayedLaunch, types: Mapping[int, str], dtype: str) -> list[str]:
    """Where the two disagree, in words. ``types`` are of tensors by address; ``dtype`` is that of the case."""
    found = []
    for address, expected in recorded.after.items():
        actual = replayed.after[address]
        if actual == expected:
            continue
        kind = types.get(address, "workspace")
        if kind == "workspace":
            size = LARGER_SUMS.get(recorded.kernel.partition("<")[0], 1.0)
            bad, unit = _workspace_disagreements(expected, actual, replayed.float32_words[address], dtype, size), 4
        else:
            bad, unit = _tensor_disagreements(expected, actual, kind, dtype)
        if len(bad):
            first = int(bad[0])
            values = [data[first * unit : (first + 1) * unit].hex() for data in (expected, actual)]
            found.append(
                f"{recorded.kernel}: {len(bad)} of {len(expected) // unit} {kind} elements at {address:#x}, the first "
                f"at {first}: emulated {values[0]}, PTX {values[1]}"
            )
    return found


def _tensor_disagreements(expected: bytes, actual: bytes, kind: str, dtype: str) -> tuple[Array, int]:
    """Indices of the elements that differ, and the bytes of an element."""
    size = 2 if kind in PLAUSIBLE_HALVES else 4
    pair = [np.frombuffer(data, f"u{size}") for data in (expected, actual)]
    if kind in RELATIVE_TOLERANCES:
        return np.flatnonzero(~_is_close(pair[0], pair[1], kind, dtype)), size
    return np.flatnonzero(pair[0] != pair[1]), size


def _workspace_disagreements(expected: bytes, actual: bytes, is_float32: Array, dtype: str, size: float) -> Array:
    """Indices of the words that differ; ``size`` of float32 values, in units of a gradient's."""
    words = [np.frombuffer(data[: 4 * len(is_float32)], np.uint32) for data in (expected, actual)]
    agrees = (words[0] == words[1]) | (is_float32 & _is_close(words[0], words[1], "float32", dtype, size))
    if dtype != "float32":
        halves = [each.view(np.uint16) for each in words]
        is_half = _is_among_halves(halves[0], ~np.repeat(is_float32, 2), dtype)
        is_close = is_half & _is_close(halves[0], halves[1], dtype, dtype)
        agrees |= ~is_float32 & is_close.reshape(-1, 2).all(1)
    return np.flatnonzero(~agrees)


def _numbers(bits: Array, kind: str) -> Array:
    if kind == "float32":
        return bits.view(np.float32)
    return bfloat16_to_float(bits) if kind == "bfloat16" else bits.view(np.float16).astype(np.float32)


def _is_close(expected: Array, actual: Array, kind: str, dtype: str, size: float = 1.0) -> Array:
    """Which bits stand for nearly the same number; what was never written is all ones, and must be so on both sides."""
    all_ones = expected.dtype.type(np.iinfo(expected.dtype).max)
    x, y = _numbers(expected, kind), _numbers(actual, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(x - y) - RELATIVE_TOLERANCES[kind] * np.maximum(np.abs(x), np.abs(y))
    is_same = (expected == actual) | (np.isnan(x) & np.isnan(y)) | (x == y)
    tolerances = (FLOAT32_TOLERANCE * size, LOOSE_TOLERANCES[dtype] * size)
    is_tight, is_loose = (is_same | (error <= tolerance) for tolerance in tolerances)
    num_changed = np.count_nonzero(is_loose & ~is_tight)
    is_close = is_loose if num_changed <= MOST_LOOSE * len(expected) else is_tight
    return is_close & ((expected == all_ones) == (actual == all_ones))


def _is_among_halves(halves: Array, is_candidate: Array, kind: str) -> Array:
    """Whether most candidates around each element, those that are 0 or unwritten aside, look like 16-bit floats."""
    low, high = PLAUSIBLE_HALVES[kind]
    size = np.abs(_numbers(halves, kind))
    is_telling = is_candidate & (halves != 0xFFFF) & (halves & 0x7FFF != 0)
    is_plausible = is_telling & (size >= low) & (size <= high)
    stretches = np.arange(len(halves)) // HALVES_PER_STRETCH
    num_telling, num_plausible = (np.bincount(stretches, each) for each in (is_telling, is_plausible))
    return (2 * num_plausible > num_telling)[stretches]

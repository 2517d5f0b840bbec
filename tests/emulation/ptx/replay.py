"""Launches the emulator recorded, run once more from the PTX of the same sources, and what they wrote compared.

Each launch starts from the memory the emulator had before it, so that a difference is this launch's own.
"""

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import Module, launch, parse_module
from .scalar_types import bfloat16_to_float
from .toolchain import PROJECT, SOURCES, compile_to_ptx

Array = NDArray[Any]

# A region holds one of these, or in the workspace anything.
FLOAT_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}

# Of the larger of the two values, and again in units of 1, which is the size of the values in the cases here. The two
# sides contract and order sums differently and have their own exp2: a few dozen roundings of float32. A 16-bit result may
# round to the other neighbour.
FLOAT32_TOLERANCE = 1e-5
RELATIVE_TOLERANCES = {"float32": FLOAT32_TOLERANCE, "bfloat16": 2.0**-7, "float16": 2.0**-10}
# A float32 in the workspace may be a sum of terms that were rounded to 16 bits, one or two of them to the other neighbour.
# Such sums are few.
LOOSE_TOLERANCES = {"float32": FLOAT32_TOLERANCE, "bfloat16": 2.0**-8, "float16": 2.0**-11}
MOST_LOOSE = 1 / 50
# Integers must agree exactly. In a workspace, bits that stand for a smaller float32 than this are taken for one; so is a
# stretch of memory most of whose 16-bit floats lie outside these bounds.
LEAST_FLOAT32 = 1e-30
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


@dataclass(frozen=True)
class Case:
    """A small problem. ``boundaries`` packs sequences of these lengths, which must sum to the number of tokens."""

    dtype: torch.dtype
    head_dim: int = 64
    value_dim: int = 64
    num_tokens: int = 80
    block_size: int = 32
    top_k: int = 2
    is_causal: bool = True
    lengths: tuple[int, ...] = ()
    num_heads: int = 2
    num_kv_heads: int = 1
    is_deterministic: bool = False

    def __str__(self) -> str:
        parts = [FLOAT_TYPES[self.dtype], f"{self.head_dim}x{self.value_dim}", "causal" if self.is_causal else "full"]
        return "-".join(parts + ["packed"] * bool(self.lengths) + ["deterministic"] * self.is_deterministic)


class Recorder:
    """Runs the entry points of the emulated module on one case and keeps every launch."""

    def __init__(self, module: ModuleType, case: Case) -> None:
        self._module, self._case = module, case
        self.launches: list[RecordedLaunch] = []
        self.types: dict[int, str] = {}  # what is stored at an address; workspaces are not listed
        self._kept: list[Tensor] = []

    def _new(self, heads: int, dim: int, dtype: torch.dtype, fill: str) -> Tensor:
        shape = (1, heads, self._case.num_tokens, dim)
        tensor = torch.randn(shape).to(dtype) if fill == "random" else torch.zeros(shape, dtype=dtype)
        self._kept.append(tensor)
        self.types[tensor.data_ptr()] = FLOAT_TYPES.get(dtype, "int32")
        return tensor

    def _problem(self) -> tuple[Any, ...]:
        case = self._case
        boundaries = [0, 0]
        if case.lengths:
            starts = torch.tensor([0, *np.cumsum(case.lengths)], dtype=torch.int64)
            self._kept += [starts, starts.clone()]
            boundaries = [each.data_ptr() for each in self._kept[-2:]]
        sizes = (len(case.lengths) or 1, case.num_heads, case.num_kv_heads, case.num_tokens, case.num_tokens)
        scale = case.head_dim**-0.5
        return (
            DTYPE_CODES[case.dtype],
            *sizes,
            case.head_dim,
            case.value_dim,
            case.block_size,
            case.top_k,
            case.is_causal,
            scale,
            *boundaries,
            1,
        )

    def _call(self, kind: str, entry_point: str, problem: tuple[Any, ...], tensors: list[Tensor], *more: Any) -> None:
        num_bytes = self._module.moba_cuda_workspace_bytes(kind, problem, 0)
        workspace = torch.zeros(max(num_bytes, 1), dtype=torch.uint8)
        self._kept.append(workspace)
        rows = [(tensor.data_ptr(), *tensor.stride()[:3]) for tensor in tensors]
        self._module.start_recording()
        getattr(self._module, entry_point)(problem, *rows, (workspace.data_ptr(), num_bytes), *more, 0, 0)
        self.launches += take_recording(self._module)

    def run(self) -> None:
        """Centroids, routing, forward and backward."""
        torch.manual_seed(1)
        case = self._case
        problem = self._problem()
        heads, kv_heads, dtype = case.num_heads, case.num_kv_heads, case.dtype
        query = self._new(heads, case.head_dim, dtype, "random")
        key = self._new(kv_heads, case.head_dim, dtype, "random")
        value = self._new(kv_heads, case.value_dim, dtype, "random")
        block_indices = self._new(heads, case.top_k, torch.int32, "zeros")
        out = self._new(heads, case.value_dim, dtype, "zeros")
        lse = self._new(heads, 1, torch.float32, "zeros")
        self._call("route", "moba_route_cuda", problem, [query, key, block_indices])
        self._call("forward", "moba_forward_cuda", problem, [query, key, value, block_indices, out, lse])
        saved = [query, key, value, block_indices, out, lse]
        incoming = [self._new(heads, case.value_dim, dtype, "random"), self._new(heads, 1, torch.float32, "random")]
        gradients = [
            self._new(heads, case.head_dim, dtype, "zeros"),
            self._new(kv_heads, case.head_dim, dtype, "zeros"),
            self._new(kv_heads, case.value_dim, dtype, "zeros"),
        ]
        kind = "backward_deterministic" if case.is_deterministic else "backward"
        self._call(kind, "moba_backward_cuda", problem, saved + incoming + gradients, case.is_deterministic)


def kernel_sources() -> list[Any]:
    """The files that hold the project's kernels."""
    return sorted(SOURCES.glob("moba/*_cuda.cu"))


def global_functions() -> set[str]:
    """Names of all kernels, from the text of the sources."""
    names: set[str] = set()
    for path in [*kernel_sources(), *SOURCES.glob("moba/*.cuh")]:
        names |= set(re.findall(r"__global__[^;{]*?\b(\w+)\(const \w+ args\)", path.read_text()))
    return names


class PtxOfKernels:
    """The PTX of all kernels, compiled and read file by file as launches ask for them."""

    def __init__(self, sources: list[Any], **compile_arguments: Any) -> None:
        self._left = list(sources)
        self._arguments = compile_arguments
        self._modules: list[Module] = []

    def kernel(self, name: str) -> Any:
        """The entry of this symbol."""
        for module in self._modules:
            if name in module.entries:
                return module.kernel(name)
        while self._left:
            module = parse_module(compile_to_ptx(self._left.pop(0), "compute_80", **self._arguments))
            self._modules.append(module)
            if name in module.entries:
                return module.kernel(name)
        raise LookupError(f"no source defines {name}")


def replay(recorded: RecordedLaunch, kernels: PtxOfKernels) -> RecordedLaunch:
    """The launch as the PTX runs it."""
    after = launch(
        kernels.kernel(recorded.name),
        recorded.grid,
        recorded.block,
        recorded.shared_bytes,
        recorded.arguments,
        recorded.before,
    )
    return replace(recorded, after=after)


def differences(recorded: RecordedLaunch, replayed: RecordedLaunch, types: Mapping[int, str], dtype: str) -> list[str]:
    """Where two runs of a launch disagree, in words. ``dtype`` is the 16-bit type a workspace may hold."""
    found = []
    for address, expected in recorded.after.items():
        actual = replayed.after[address]
        if actual == expected:
            continue
        kind = types.get(address, "workspace")
        bad, unit = _disagreements(expected, actual, kind, dtype)
        if len(bad):
            first = int(bad[0])
            values = [data[first * unit : (first + 1) * unit].hex() for data in (expected, actual)]
            found.append(
                f"{recorded.kernel}: {len(bad)} of {len(expected) // unit} {kind} elements at {address:#x}, the first at "
                f"{first}: emulated {values[0]}, PTX {values[1]}"
            )
    return found


def _disagreements(expected: bytes, actual: bytes, kind: str, dtype: str) -> tuple[Array, int]:
    """Indices of the elements that differ, and the bytes of an element."""
    if kind in RELATIVE_TOLERANCES:
        size = 4 if kind == "float32" else 2
        pair = [np.frombuffer(data, f"u{size}") for data in (expected, actual)]
        return np.flatnonzero(~_is_close(pair[0], pair[1], kind)), size
    length = len(expected) // 4 * 4
    words = [np.frombuffer(data[:length], np.uint32) for data in (expected, actual)]
    agrees = words[0] == words[1]
    if kind == "workspace":
        agrees |= _is_close(words[0], words[1], "float32") & _is_float32(words[0], words[1])
        if dtype != "float32":
            halves = [each.view(np.uint16) for each in words]
            is_close = _is_close(halves[0], halves[1], dtype) & _is_among_halves(halves[0], dtype)
            agrees |= is_close.reshape(-1, 2).all(1)
            loose = _is_close(words[0], words[1], "float32", LOOSE_TOLERANCES[dtype]) & _is_float32(words[0], words[1])
            if np.count_nonzero(loose & ~agrees) <= MOST_LOOSE * len(agrees):
                agrees |= loose
    return np.flatnonzero(~agrees), 4


def _numbers(bits: Array, kind: str) -> Array:
    if kind == "float32":
        return bits.view(np.float32)
    return bfloat16_to_float(bits) if kind == "bfloat16" else bits.view(np.float16).astype(np.float32)


def _is_close(expected: Array, actual: Array, kind: str, tolerance: float = FLOAT32_TOLERANCE) -> Array:
    """Which bits stand for nearly the same number. What was never written is all ones, and must be so on both sides."""
    all_ones = expected.dtype.type(np.iinfo(expected.dtype).max)
    x, y = _numbers(expected, kind), _numbers(actual, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.maximum(np.abs(x), np.abs(y))
        is_close = np.abs(x - y) <= RELATIVE_TOLERANCES[kind] * size + tolerance
    is_close |= (np.isnan(x) & np.isnan(y)) | (x == y)
    return ((expected == actual) | is_close) & ((expected == all_ones) == (actual == all_ones))


def _is_float32(expected: Array, actual: Array) -> Array:
    with np.errstate(invalid="ignore"):
        size = np.maximum(np.abs(expected.view(np.float32)), np.abs(actual.view(np.float32)))
    return ~(size < LEAST_FLOAT32)


def _is_among_halves(halves: Array, kind: str) -> Array:
    """Whether most of what was written around each element looks like 16-bit floats."""
    low, high = PLAUSIBLE_HALVES[kind]
    padded = np.full(-(-len(halves) // HALVES_PER_STRETCH) * HALVES_PER_STRETCH, 0xFFFF, np.uint16)
    padded[: len(halves)] = halves
    stretches = padded.reshape(-1, HALVES_PER_STRETCH)
    size = np.abs(_numbers(padded, kind)).reshape(stretches.shape)
    num_plausible = ((size >= low) & (size <= high)).sum(1)
    num_written = (stretches != 0xFFFF).sum(1)
    return np.repeat(2 * num_plausible > num_written, HALVES_PER_STRETCH)[: len(halves)]

"""The ``torch.ops.topgather`` namespace: one low-level library that every op registers in.

A low-level ``Library`` with an ``autograd.Function`` adds about two thirds of what a ``torch.library.custom_op`` with
autograd adds to a call (``bench/overhead.py`` measures it; figures in docs/performance.md), so the low-level way it is.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from .. import _native

library = torch.library.Library("topgather", "DEF")

# The numbers that the native side knows dtypes by (csrc/common/dtype.h).
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.int8: 6,
}

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def refuse_jit_trace() -> NoReturn:
    """Raise ``NotImplementedError``: a number that follows from a size would be a constant of the trace."""
    raise NotImplementedError(
        "topgather: torch.jit.trace keeps numbers that follow from sizes, such as how many blocks there are, as "
        "constants, with which other sizes give something else; torch.export.export with dynamic shapes, or "
        "torch.compile, does not"
    )


# Sizes in graphs must not be compared, or a graph would serve one kind of them. Dynamo makes torch.sym_min of the
# builtin, and up to torch 2.10 takes that function itself of symbols alone. Sizes within torch.jit.trace are tensors.
def smaller(left: int, right: int) -> int:
    """The smaller of two sizes."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        refuse_jit_trace()
    least: int = min(left, right) if is_dynamo_compiling() else torch.sym_min(left, right)
    return least


def larger(left: int, right: int) -> int:
    """The larger of two sizes."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        refuse_jit_trace()
    most: int = max(left, right) if is_dynamo_compiling() else torch.sym_max(left, right)
    return most


def use_exchange(module: Any) -> bool:
    """Let a native module read tensors by DLPack's C interface, which torch 2.10 and later offer."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    # For tests and measurements on a new torch: tensors described in Python, as for older ones.
    if os.environ.get("TOPGATHER_DESCRIBE_TENSORS", "") not in ("", "0"):
        capsule = None
    return bool(module.use_exchange(capsule))


# Whether native entry points take tensors themselves, or what describe() makes of them.
reads_tensors = use_exchange(_native)


def describe(value: Any) -> Any:
    """A tensor as (address, dtype code, sizes, strides); anything else as it is."""
    if isinstance(value, Tensor):
        return value.data_ptr(), DTYPE_CODES[value.dtype], tuple(value.shape), value.stride()
    return value


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, sums, centroids and lse: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_device(device: torch.device) -> str:
    """The type of device whose autocast bears on tensors of ``device``; the meta device has none of its own."""
    return "cpu" if device.type == "meta" else device.type


def below_autograd() -> Any:
    """A context in which calling an op reaches its kernel, past its autograd registration."""
    return torch._C._AutoDispatchBelowAutograd()


def in_forward_mode() -> bool:
    """Whether dual numbers are about."""
    return forward_ad._current_level >= 0


def refuse_onnx(name: str) -> None:
    """Raise ``NotImplementedError`` where an op is traced for ``torch.onnx.export``."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"topgather: {name} cannot be exported to ONNX, which has no such operator; torch.export.export takes it, "
            f"for a process that imports topgather"
        )

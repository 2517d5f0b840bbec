"""Entry points called by name, with tensors that have no memory: for what follows from shapes alone."""

from typing import Any

import torch

from topgather._common.library import DTYPE_CODES

ADDRESS = 1 << 20  # aligned, and never followed

Described = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def described(*shape: int, dtype: torch.dtype) -> Described:
    """A contiguous tensor as a native module takes it where it cannot read torch's own."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return ADDRESS, DTYPE_CODES[dtype], shape, tuple(strides)


def workspace_bytes(native: Any, entry: str, **fields: Any) -> int:
    """Workspace that a CUDA entry point asks for on device 0."""
    count = f"{entry}_workspace_bytes"
    fields = {"num_threads": 1, "device": 0, **fields}
    bytes_needed: int = getattr(native, count)(*(fields[name] for name in native.argument_names[count]))
    return bytes_needed

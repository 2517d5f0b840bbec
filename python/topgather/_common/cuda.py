"""What the CUDA kernels of every op need: their module, the caller's device and stream, aligned rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _native

# Asynchronous copies move 16 bytes at a time.
ROW_BYTES = 16

# Every kernel of the dispatcher's CUDA key, by op; the tests' emulator takes them from here.
KERNELS: dict[str, Callable[..., Any]] = {}


def native_module() -> Any:
    """The module that holds the kernels; the tests put the emulated one in its place."""
    if not _native.has_cuda:
        raise RuntimeError("tensors are on a CUDA device, but this build of topgather has no CUDA kernels")
    return _native


_ALREADY_CURRENT = nullcontext()


def place(device: torch.device) -> tuple[int, int, AbstractContextManager[Any]]:
    """Device number and the caller's stream, as kernels take them, and what makes the device current meanwhile.

    That is torch's own guard, which does not go back to a device that the program has not used yet: that would create a
    context there.
    """
    is_current = device.index == torch.cuda.current_device()
    guard = _ALREADY_CURRENT if is_current else torch.cuda.device(device)
    return device.index, torch.cuda.current_stream(device).cuda_stream, guard


def gets(tensor: Tensor) -> bool:
    """Whether a CUDA kernel will get the tensor; so say the tests' emulated kernels of any."""
    return tensor.is_cuda


def runner(native: str) -> Callable[..., None]:
    """A function that calls ``<native>_cuda`` on the device of a tensor, with the fields of its parameter struct.

    Workspace comes from torch's caching allocator, so that it belongs to the caller's stream and to a captured graph.
    Nothing here waits for the device.
    """

    def run(like: Tensor, *fields: Any) -> None:
        module = native_module()
        device, stream, guard = place(like.device)
        count = getattr(module, f"{native}_workspace_bytes", None)
        with guard:
            num_bytes = 0 if count is None else count(*fields, device)
            workspace = like.new_empty(num_bytes, dtype=torch.uint8)
            getattr(module, f"{native}_cuda")(*fields, workspace.data_ptr(), num_bytes, device, stream)

    return run


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` for float64, which no CUDA kernel takes."""
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{name} must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
            f"got torch.float64"
        )


def aligned(tensor: Tensor | None) -> Tensor | None:
    """The same values with rows on 16-byte boundaries, zeros behind them up to whole multiples of 16 bytes.

    Itself where it is so already: a last dimension that is a multiple of 8 (float32: of 4), and strides that are.
    """
    if tensor is None or tensor.numel() == 0:
        return tensor
    per_row = ROW_BYTES // tensor.element_size()
    dim = tensor.size(-1)
    strides = (stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1)
    if dim % per_row == 0 and tensor.data_ptr() % ROW_BYTES == 0 and all(stride % per_row == 0 for stride in strides):
        return tensor
    padded = tensor.new_zeros((*tensor.shape[:-1], -(-dim // per_row) * per_row))
    return padded[..., :dim].copy_(tensor)

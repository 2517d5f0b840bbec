"""The key convolution's CUDA kernels behind the dispatcher. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as checks
from . import _cuda
from ._key_conv_kernels import (
    NOTHING,
    check_backward,
    check_problem,
    empty_gradients,
    problem_of,
)
from ._library import sum_dtype
from ._moba_kernels import rows_of


def _check_kernels_take(key: Tensor) -> None:
    if key.dtype == torch.float64:
        raise TypeError("key must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
                        "got torch.float64")  # fmt: skip


def _weight_in_sum_dtype(weight: Tensor, key: Tensor) -> Tensor:
    return weight.to(sum_dtype(key.dtype)).contiguous()


def _boundaries_on_device(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def _keys_of(tensor: Tensor | None, packed: bool) -> tuple[int, int, int, int]:
    """Address and strides; strides that lead nowhere count as 0, so that they do not forbid vectors."""
    if tensor is None or tensor.numel() == 0:
        return NOTHING
    address, *strides = rows_of(tensor, packed)
    sizes = (1, tensor.size(1), tensor.size(0)) if packed else tensor.shape[:3]
    batch, head, row = (stride if size > 1 else 0 for stride, size in zip(strides, sizes, strict=True))
    return address, batch, head, row


def key_conv_cuda(key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """CUDA kernel of ``topgather::key_conv``."""
    check_problem(key, weight, state, cu_seqlens)
    _check_kernels_take(key)
    boundaries = _boundaries_on_device(cu_seqlens)
    packed = boundaries is not None
    out = torch.empty_like(key)
    taps = _weight_in_sum_dtype(weight, key)
    _cuda.native_module().key_conv_forward_cuda(
        problem_of(key, taps, boundaries),
        _keys_of(key, packed),
        _keys_of(state, packed),
        taps.data_ptr(),
        _keys_of(out, packed),
        *_cuda.place(key.device),
    )
    return out


def key_conv_backward_cuda(
    grad_out: Tensor,
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA kernel of ``topgather::key_conv_backward``."""
    check_problem(key, weight, state, cu_seqlens)
    _check_kernels_take(key)
    check_backward(grad_out, key)
    boundaries = _boundaries_on_device(cu_seqlens)
    packed = boundaries is not None
    grad_out = checks.contiguous_rows(grad_out)
    taps = _weight_in_sum_dtype(weight, key)
    gradients = empty_gradients(key, weight, state, needs_grad_weight)
    grad_key, grad_weight, grad_state = gradients
    problem = problem_of(key, taps, boundaries)
    module = _cuda.native_module()
    num_bytes = module.key_conv_backward_workspace_bytes(problem, needs_grad_weight)
    workspace = key.new_empty(num_bytes, dtype=torch.uint8)
    module.key_conv_backward_cuda(
        problem,
        (_keys_of(grad_out, packed), _keys_of(key, packed), _keys_of(state, packed)),
        taps.data_ptr(),
        (_keys_of(grad_key, packed), _keys_of(None if state is None else grad_state, packed)),
        grad_weight.data_ptr() if needs_grad_weight else 0,
        (workspace.data_ptr(), num_bytes),
        *_cuda.place(key.device),
    )
    return gradients


_cuda.register_kernels({"key_conv": key_conv_cuda, "key_conv_backward": key_conv_backward_cuda})

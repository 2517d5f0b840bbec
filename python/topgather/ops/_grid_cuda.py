"""Grid and window attention's CUDA kernels behind the dispatcher. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as checks
from . import _cuda
from ._grid_kernels import (
    _address,
    _empty_gradients,
    _empty_results,
    bias_in_sum_dtype,
    check_backward,
    check_problem,
    image_of,
    problem_of,
)

MOST_HEAD_DIM = 128


def _check_kernels_take(query: Tensor) -> None:
    if query.dtype == torch.float64:
        raise TypeError("query must have one of the dtypes torch.float32, torch.bfloat16, torch.float16 on CUDA, "
                        "got torch.float64")  # fmt: skip
    if query.size(-1) > MOST_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MOST_HEAD_DIM} on CUDA, got {query.size(-1)}")


def grid_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """CUDA kernel of ``topgather::grid_attention``."""
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    checks.check_scale(scale)
    _check_kernels_take(query)
    out, lse = _empty_results(query)
    bias = bias_in_sum_dtype(bias, query)
    inputs = [_cuda.aligned(tensor) for tensor in (query, key, value)]
    _cuda.native_module().grid_forward_cuda(
        problem_of(query, partition, rows_step, columns_step, scale),
        *(image_of(tensor) for tensor in inputs),
        _address(bias),
        image_of(out),
        lse.data_ptr(),
        *_cuda.place(query.device),
    )
    return out, lse


def grid_attention_backward_cuda(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    partition: str,
    rows_step: int,
    columns_step: int,
    scale: float,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CUDA kernel of ``topgather::grid_attention_backward``."""
    check_problem(query, key, value, bias, partition, rows_step, columns_step)
    checks.check_scale(scale)
    _check_kernels_take(query)
    check_backward(grad_out, query, out, lse)
    gradients = _empty_gradients(query, key, value, bias, needs_grad_bias)
    needs_grad_bias = needs_grad_bias and bias is not None
    bias = bias_in_sum_dtype(bias, query)
    lse = lse.contiguous()
    inputs = [_cuda.aligned(checks.contiguous_rows(tensor)) for tensor in (query, key, value, out, grad_out)]
    problem = problem_of(query, partition, rows_step, columns_step, scale)
    module = _cuda.native_module()
    num_bytes = module.grid_backward_workspace_bytes(problem, needs_grad_bias)
    workspace = query.new_empty(num_bytes, dtype=torch.uint8)
    module.grid_backward_cuda(
        problem,
        tuple(image_of(tensor) for tensor in inputs),
        _address(bias),
        lse.data_ptr(),
        tuple(image_of(tensor) for tensor in gradients[:3]),
        gradients[3].data_ptr() if needs_grad_bias else 0,
        (workspace.data_ptr(), num_bytes),
        *_cuda.place(query.device),
    )
    return gradients


_cuda.register_kernels(
    {
        "grid_attention": grid_attention_cuda,
        "grid_attention_backward": grid_attention_backward_cuda,
    }
)

"""Compiled kernels. Addresses and strides in, nothing out: what tuples hold is in csrc/*/*_arguments.h."""

from typing import Any

compiler: str
build_type: str
has_cuda: bool

def cpu_target() -> str: ...
def set_cpu_target(name: str, /) -> None: ...
def available_cpu_targets() -> list[str]: ...
def cuda_architectures() -> str: ...
def cuda_toolkit() -> str: ...
def cuda_devices() -> list[str]: ...

_Tensor = tuple[int, int, int, int]
_Problem = tuple[Any, ...]
_Workspace = tuple[int, int]

def moba_cuda_set_budget(bytes: int, /) -> int: ...
def moba_cuda_kernel_facts() -> list[tuple[str, int, int, int, int]]: ...

_Rows = tuple[int, int]

def product_key_topk_cpu(fields: tuple[int, ...], /) -> None: ...
def product_key_topk_cuda(fields: tuple[int, ...], device: int, stream: int, /) -> None: ...
def memory_lookup_cpu(problem: _Problem, values: _Rows, indices: int, weights: int, out: int, /) -> None: ...
def memory_lookup_cuda(
    problem: _Problem, values: _Rows, indices: int, weights: int, out: int, device: int, stream: int, /
) -> None: ...
def memory_dot_cpu(problem: _Problem, values: _Rows, indices: int, x: _Rows, out: int, /) -> None: ...
def memory_dot_cuda(
    problem: _Problem, values: _Rows, indices: int, x: _Rows, out: int, device: int, stream: int, /
) -> None: ...
def memory_backward_workspace_bytes(problem: _Problem, /) -> int: ...
def memory_backward_cpu(
    problem: _Problem,
    values: _Rows,
    sorted_entries: tuple[int, int, int],
    weights: int,
    grad_out: _Rows,
    num_targets: int,
    grad_rows: int,
    grad_weights: int,
    /,
) -> None: ...
def memory_backward_cuda(
    problem: _Problem,
    values: _Rows,
    sorted_entries: tuple[int, int, int],
    weights: int,
    grad_out: _Rows,
    num_targets: int,
    grad_rows: int,
    grad_weights: int,
    workspace: _Workspace,
    device: int,
    stream: int,
    /,
) -> None: ...
def moba_cache_append_cpu(
    problem: _Problem,
    key: _Tensor,
    value: _Tensor,
    key_pages: _Tensor,
    value_pages: _Tensor,
    centroids: _Tensor,
    /,
) -> None: ...
def moba_decode_route_cpu(problem: _Problem, query: _Tensor, centroids: _Tensor, block_indices: _Tensor, /) -> None: ...
def moba_decode_cpu(
    problem: _Problem,
    query: _Tensor,
    key_pages: _Tensor,
    value_pages: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    /,
) -> None: ...
def moba_cache_append_cuda(
    problem: _Problem,
    key: _Tensor,
    value: _Tensor,
    key_pages: _Tensor,
    value_pages: _Tensor,
    centroids: _Tensor,
    device: int,
    stream: int,
    /,
) -> None: ...
def moba_decode_route_workspace_bytes(problem: _Problem, /) -> int: ...
def moba_decode_route_cuda(
    problem: _Problem,
    query: _Tensor,
    centroids: _Tensor,
    block_indices: _Tensor,
    workspace: tuple[int, int],
    device: int,
    stream: int,
    /,
) -> None: ...
def moba_decode_workspace_bytes(problem: _Problem, /) -> int: ...
def moba_decode_cuda(
    problem: _Problem,
    query: _Tensor,
    key_pages: _Tensor,
    value_pages: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    workspace: tuple[int, int],
    device: int,
    stream: int,
    /,
) -> None: ...

_Image = tuple[int, ...]

def grid_forward_cpu(
    problem: _Problem, query: _Image, key: _Image, value: _Image, bias: int, out: _Image, lse: int, /
) -> None: ...
def grid_backward_cpu(
    problem: _Problem,
    inputs: tuple[_Image, ...],
    bias: int,
    lse: int,
    gradients: tuple[_Image, ...],
    grad_bias: int,
    /,
) -> None: ...
def memory_cuda_kernel_facts() -> list[tuple[str, int, int, int, int]]: ...
def grid_forward_cuda(
    problem: _Problem,
    query: _Image,
    key: _Image,
    value: _Image,
    bias: int,
    out: _Image,
    lse: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def grid_backward_workspace_bytes(problem: _Problem, needs_grad_bias: bool, /) -> int: ...
def grid_backward_cuda(
    problem: _Problem,
    inputs: tuple[_Image, ...],
    bias: int,
    lse: int,
    gradients: tuple[_Image, ...],
    grad_bias: int,
    workspace: tuple[int, int],
    device: int,
    stream: int,
    /,
) -> None: ...
def grid_cuda_kernel_facts() -> list[tuple[str, int, int, int, int]]: ...
def key_conv_forward_cpu(problem: _Problem, key: _Tensor, state: _Tensor, weight: int, out: _Tensor, /) -> None: ...
def key_conv_backward_cpu(
    problem: _Problem,
    inputs: tuple[_Tensor, ...],
    weight: int,
    gradients: tuple[_Tensor, ...],
    grad_weight: int,
    /,
) -> None: ...
def key_conv_forward_cuda(
    problem: _Problem, key: _Tensor, state: _Tensor, weight: int, out: _Tensor, device: int, stream: int, /
) -> None: ...
def key_conv_backward_workspace_bytes(problem: _Problem, needs_grad_weight: bool, /) -> int: ...
def key_conv_backward_cuda(
    problem: _Problem,
    inputs: tuple[_Tensor, ...],
    weight: int,
    gradients: tuple[_Tensor, ...],
    grad_weight: int,
    workspace: _Workspace,
    device: int,
    stream: int,
    /,
) -> None: ...

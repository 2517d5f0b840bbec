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

# What the entry points of ops take, `<name>_cpu` and `<name>_cuda`, in order: the fields of their parameter structs.
argument_names: dict[str, list[str]]
aligned_arguments: dict[str, list[str]]

def use_exchange(capsule: object, /) -> bool: ...
def memory_cuda_kernel_facts() -> list[tuple[str, int, int, int, int]]: ...

_Tensor = tuple[int, int, int, int]
_Problem = tuple[Any, ...]
_Workspace = tuple[int, int]

def moba_centroids_cpu(problem: _Problem, key: _Tensor, centroids: _Tensor, /) -> None: ...
def moba_centroids_cuda(problem: _Problem, key: _Tensor, centroids: _Tensor, device: int, stream: int, /) -> None: ...
def moba_route_cpu(problem: _Problem, query: _Tensor, key: _Tensor, block_indices: _Tensor, /) -> None: ...
def moba_forward_cpu(
    problem: _Problem,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    /,
) -> None: ...
def moba_backward_cpu(
    problem: _Problem,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    grad_out: _Tensor,
    grad_lse: _Tensor,
    grad_query: _Tensor,
    grad_key: _Tensor,
    grad_value: _Tensor,
    /,
) -> None: ...
def moba_cuda_workspace_bytes(kind: str, problem: _Problem, device: int, /) -> int: ...
def moba_cuda_set_budget(bytes: int, /) -> int: ...
def moba_cuda_kernel_facts() -> list[tuple[str, int, int, int, int]]: ...
def moba_route_cuda(
    problem: _Problem,
    query: _Tensor,
    key: _Tensor,
    block_indices: _Tensor,
    workspace: _Workspace,
    device: int,
    stream: int,
    /,
) -> None: ...
def moba_forward_cuda(
    problem: _Problem,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    workspace: _Workspace,
    device: int,
    stream: int,
    /,
) -> None: ...
def moba_backward_cuda(
    problem: _Problem,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    block_indices: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    grad_out: _Tensor,
    grad_lse: _Tensor,
    grad_query: _Tensor,
    grad_key: _Tensor,
    grad_value: _Tensor,
    workspace: _Workspace,
    is_deterministic: bool,
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

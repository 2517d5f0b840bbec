"""Compiled kernels. Addresses and strides in, nothing out: see csrc/moba/moba_params.h for what each tuple holds."""

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

"""What caches check beside what every op does (:mod:`topgather._common.checks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .._common import checks


def check_counts(name: str, value: Any, num_sequences: int, allowed: str = "an int or ints") -> list[int]:
    """The ints of ``value``, one a sequence and none negative; raises ``TypeError`` or ``ValueError`` otherwise."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    counts = list(value)
    if len(counts) != num_sequences:
        raise ValueError(f"{name} must have one number a sequence, {num_sequences}, got {len(counts)}")
    for count in counts:
        checks.check_count(name, count, least=0)
    return counts


def check_sizes(
    batch_size: int, num_kv_heads: int, head_dim: int, block_size: int, max_seq_len: int, value_dim: int | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise unless these are what a cache can be made of."""
    checks.check_count("batch_size", batch_size, least=0)
    checks.check_count("num_kv_heads", num_kv_heads)
    checks.check_count("head_dim", head_dim)
    checks.check_count("block_size", block_size)
    checks.check_count("max_seq_len", max_seq_len)
    if value_dim is not None:
        checks.check_count("value_dim", value_dim, least=0)
    if dtype not in checks.FLOATING_DTYPES:
        allowed = ", ".join(str(allowed) for allowed in checks.FLOATING_DTYPES)
        raise TypeError(f"dtype must be one of {allowed}, got {dtype}")


def check_device_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``TypeError`` for a dtype that no kernel of the device takes."""
    if dtype == torch.float64 and device.type == "cuda":
        raise TypeError("dtype must be one of torch.float32, torch.bfloat16, torch.float16 on CUDA, got torch.float64")


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) wraps the tensor."""
    return not is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_no_gradient(name: str, tensor: Tensor, advice: str) -> None:
    """Raise where gradients would be recorded through ``tensor``, in either mode and beneath ``torch.vmap`` too.

    Raises:
        ValueError: it requires grad where gradients are recorded; the message ends with ``advice``.
        NotImplementedError: it has a tangent (forward mode), or ``torch.jit.trace`` watches.
    """
    if not is_compiling() and torch.jit.is_tracing():
        raise NotImplementedError(
            "topgather: torch.jit.trace cannot follow a cache, of which it would keep the lengths as constants; "
            "torch.compile can"
        )
    while True:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad: {advice}")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} must not have a tangent: there is no forward-mode derivative of a cache")
        if not _is_wrapped(tensor):
            return
        tensor = torch._C._functorch.get_unwrapped(tensor)


def check_not_transformed(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that a transform of ``torch.func`` wraps: it cannot be stored."""
    if _is_wrapped(tensor):
        raise ValueError(f"{name} must not be wrapped by torch.vmap or another transform of torch.func: "
                         "a cache is written to in place")  # fmt: skip


def check_not_fake(name: str, tensor: Tensor, pages: Tensor) -> None:
    """Raise ``ValueError`` for a tensor without numbers (``FakeTensorMode``) for a cache that has some."""
    if not is_compiling() and isinstance(tensor, FakeTensor) and not isinstance(pages, FakeTensor):
        raise ValueError(f"{name} must not be a fake tensor: it has no numbers, and the cache is a real one")

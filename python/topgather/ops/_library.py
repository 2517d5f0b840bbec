"""The ``torch.ops.topgather`` namespace: one low-level library that every op registers in.

A low-level ``Library`` with an ``autograd.Function`` adds about two thirds of what a ``torch.library.custom_op`` with
autograd adds to a call (``bench/overhead.py`` measures it; figures in docs/performance.md), so the low-level way it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

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
}

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


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


def below_autograd() -> Any:
    """A context in which calling an op reaches its kernel, past its autograd registration."""
    return torch._C._AutoDispatchBelowAutograd()


def in_forward_mode() -> bool:
    """Whether dual numbers are about."""
    return forward_ad._current_level >= 0


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments is to be differentiated."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an op from Python: ``op(*args)``, past its autograd registration where that would only pass it on.

    That registration is Python: some microseconds a call, and tens of them where its code has left the caches. Under
    transforms of torch.func a wrapped tensor does not tell what the tensor inside requires.
    """
    if is_compiling() or torch._C._are_functorch_transforms_active() or in_forward_mode() or needs_grad(args):
        return op(*args, **kwargs)
    with below_autograd():
        return op(*args, **kwargs)


# --- until every op is an Op ---

from collections.abc import Callable

def define(schema: str) -> None:
    """Declare an op by its schema."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_fake(name: str, kernel: Callable[..., Any]) -> None:
    """Register what shapes, dtypes and strides the op returns, for tracing and the meta device."""
    torch.library.register_fake(f"topgather::{name}", kernel, lib=library)



class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, name: str, *args: Any) -> Any:  # type: ignore[override]
        ctx.name = name
        with below_autograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        raise RuntimeError(f"topgather: {ctx.name} has no double backward; its gradients cannot be differentiated")


def register_once_differentiable(backward: str, name: str) -> None:
    """Register autograd of the op ``backward``, which makes the gradients of ``name``.

    ``create_graph=True`` passes; differentiating the gradients says that ``name`` has no double backward.
    """
    op = getattr(torch.ops.topgather, backward).default

    def kernel(*args: Any) -> Any:
        if needs_grad(args):
            return _OnceDifferentiable.apply(op, name, *args)
        with below_autograd():
            return op(*args)

    library.impl(backward, kernel, "Autograd")


def register_autocast(name: str, num_inputs: int) -> None:
    """Make the op cast its first ``num_inputs`` tensors to the autocast dtype, as matrix products are.

    float64 tensors are left alone, as torch does; so are tensors of other devices.
    """

    def cast_first(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = torch.get_autocast_dtype(device_type)
        return (*(_cast(arg, device_type, dtype) for arg in args[:num_inputs]), *args[num_inputs:])

    register_autocast_rule(name, cast_first)


def register_autocast_rule(name: str, cast: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Make the op run on what ``cast`` makes of a device type and its arguments where autocast is on."""
    op = getattr(torch.ops.topgather, name).default

    def kernel_for(device_type: str, key: str) -> Callable[..., Any]:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            cast_args = cast(device_type, args)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast_args, **kwargs)

        return kernel

    for device_type, key in AUTOCAST_KEYS.items():
        library.impl(name, kernel_for(device_type, key), key)


def _cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.device.type != device_type:
        return value
    if not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)

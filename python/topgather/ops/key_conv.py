"""The key convolution: a short causal convolution of each channel of the keys, before blocks are chosen."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from . import _checks as checks
from . import _key_conv_cuda  # noqa: F401  register torch.ops.topgather
from ._library import call

_ops = torch.ops.topgather


@overload
def key_conv(key: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None, state: None = None) -> Tensor: ...


@overload
def key_conv(key: Tensor, weight: Tensor, cu_seqlens: None, state: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def key_conv(key: Tensor, weight: Tensor, cu_seqlens: None = None, *, state: Tensor) -> tuple[Tensor, Tensor]: ...


def key_conv(
    key: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None, state: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel of the keys with a few taps of its own (FlashMoBA, arXiv 2511.11571).

    ``out_t = key_t + silu(sum_l weight[..., W - 1 - l] * key_{t - l})``, the sum over ``l`` from 0 to ``W - 1``, keys
    before the first token counting as zeros. Neighbouring keys that go together are drawn towards each other, so that
    a block's mean tells more of what is in it. A weight of zeros leaves the keys as they are.

    Args:
        key: ``[B, Hkv, N, D]``, or packed ``[total, Hkv, D]`` with ``cu_seqlens``; float32, bfloat16, float16, or
            float64 (CPU only). Any strides with a contiguous last dimension.
        weight: ``[Hkv, D, W]`` with ``W`` from 2 to 8, the dtype of ``key`` or float32 (float64 for float64).
            ``weight[..., W - 1]`` belongs to the current token.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, where packed sequences start and end; they do not mix. None:
            ``key`` is dense.
        state: ``[B, Hkv, W - 1, D]`` in the dtype of ``key``: the keys just before this call, as they were before the
            convolution. Dense keys only. The result of a sequence then does not depend on how it is cut into calls.
            Start with zeros. None: there are no keys before.

    Returns:
        ``out`` in the shape, dtype and layout of ``key``; with ``state`` the pair ``(out, new_state)``, a tensor of its
        own for the next call. Differentiable with respect to key, weight and state, once. The same bits every time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride or device; ``state`` beside ``cu_seqlens``; ``cu_seqlens`` that do not start
            with 0, decrease, or do not end with the number of tokens. That is looked at on the CPU; on CUDA tokens of
            no sequence are NaN, and boundaries that decrease lead to some sequence or none.
    """
    checks.check_tensor("key", key)
    checks.check_tensor("weight", weight)
    if cu_seqlens is not None:
        checks.check_tensor("cu_seqlens", cu_seqlens)
    if state is None:
        out: Tensor = call(_ops.key_conv.default, key, weight, None, cu_seqlens)
        return out
    checks.check_tensor("state", state)
    out = call(_ops.key_conv.default, key, weight, state, cu_seqlens)
    length, num_tokens = state.size(2), key.size(2)
    if num_tokens >= length:
        return out, key.narrow(2, num_tokens - length, length).clone(memory_format=torch.contiguous_format)
    return out, torch.cat([state.narrow(2, num_tokens, length - num_tokens), key], dim=2)

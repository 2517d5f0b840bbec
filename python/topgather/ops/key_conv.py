"""The key convolution: a short causal convolution of each channel of the keys, before blocks are chosen."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .._common import checks, cuda, tensors
from .._common.library import sum_dtype
from .._common.spec import Op, register

MIN_WIDTH, MAX_WIDTH = 2, 8


@overload
def key_conv(
    key: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    state: None = None,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor: ...


@overload
def key_conv(
    key: Tensor,
    weight: Tensor,
    cu_seqlens: None,
    state: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]: ...


@overload
def key_conv(
    key: Tensor,
    weight: Tensor,
    cu_seqlens: None = None,
    *,
    state: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]: ...


def key_conv(
    key: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel of the keys with a few taps of its own (FlashMoBA, arXiv 2511.11571).

    ``out_t = key_t + silu(bias + sum_l weight[..., W - 1 - l] * key_{t - l})``, the sum over ``l`` from 0 to ``W - 1``,
    keys before the first token counting as zeros, and so does a bias that is not given. Neighbouring keys that go
    together are drawn towards each other, so that a block's mean tells more of what is in it. A weight of zeros leaves
    the keys as they are.

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
        bias: ``[Hkv, D]``, the dtype of ``key`` or float32 (float64 for float64), added to each channel's sum. None:
            no bias.
        activation: ``"silu"``, or None, which adds the sums to the keys as they are.

    Returns:
        ``out`` in the shape, dtype and layout of ``key``; with ``state`` the pair ``(out, new_state)``, a tensor of its
        own for the next call. Differentiable with respect to key, weight, bias and state, once. The same bits every
        time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, stride or device; an unknown ``activation``; ``state`` beside ``cu_seqlens``;
            ``cu_seqlens`` that do not start with 0, decrease, or do not end with the number of tokens. That is looked
            at on the CPU; on CUDA tokens of no sequence are NaN, and boundaries that decrease lead to some sequence or
            none.
    """
    checks.check_tensor("key", key)
    checks.check_tensor("weight", weight)
    if cu_seqlens is not None:
        checks.check_tensor("cu_seqlens", cu_seqlens)
    if bias is not None:
        checks.check_tensor("bias", bias)
    check_activation(activation)
    if state is None:
        out: Tensor = _key_conv(key, weight, None, cu_seqlens, bias, activation)
        return out
    checks.check_tensor("state", state)
    out = _key_conv(key, weight, state, cu_seqlens, bias, activation)
    length, num_tokens = state.size(2), key.size(2)
    if num_tokens >= length:
        return out, key.narrow(2, num_tokens - length, length).clone(memory_format=torch.contiguous_format)
    return out, torch.cat([state.narrow(2, num_tokens, length - num_tokens), key], dim=2)


# --- the ops --------------------------------------------------------------------------------------------------------


@checks.option
def check_activation(activation: Any) -> None:
    """Raise unless it is the name of an activation that kernels have, or None."""
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation must be a str or None, got {activation!r} of type {type(activation).__name__}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def _check(
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
) -> None:
    packed = cu_seqlens is not None
    layout = "[total_tokens, heads, head_dim]" if packed else "[batch, heads, tokens, head_dim]"
    checks.check_ndim("key", key, 3 if packed else 4, layout)
    checks.check_floating("key", key)
    checks.check_contiguous_rows("key", key)
    if key.size(-1) < 1:
        raise ValueError(f"key must have a head_dim of at least 1, got shape {tuple(key.shape)}")
    checks.check_ndim("weight", weight, 3, "[heads, head_dim, kernel_width]")
    checks.check_sum_operand("weight", weight, "key", key)
    checks.check_size("weight", weight, 0, key.size(1), "heads of key")
    checks.check_size("weight", weight, 1, key.size(-1), "head_dim of key")
    width = weight.size(2)
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ValueError(f"weight must have between {MIN_WIDTH} and {MAX_WIDTH} taps, got shape {tuple(weight.shape)}")
    if bias is not None:
        checks.check_sum_operand("bias", bias, "key", key)
        if tuple(bias.shape) != (key.size(1), key.size(-1)):
            raise ValueError(
                f"bias must have shape {[key.size(1), key.size(-1)]} [heads, head_dim], got {tuple(bias.shape)}"
            )
    if cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, "key", key)
    if state is None:
        return
    if packed:
        raise ValueError("state must be None where cu_seqlens is given: packed sequences start from nothing")
    checks.check_same_dtype("state", state, "key", key)
    checks.check_same_device("state", state, "key", key)
    expected = (key.size(0), key.size(1), width - 1, key.size(3))
    if tuple(state.shape) != expected:
        raise ValueError(
            f"state must have shape {list(expected)} [batch, heads, kernel_width - 1, head_dim], "
            f"got {tuple(state.shape)}"
        )
    checks.check_contiguous_rows("state", state)


def _check_backward(
    grad_out: Tensor,
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check(key, weight, state, cu_seqlens, bias)
    checks.check_same_dtype("grad_out", grad_out, "key", key)
    checks.check_same_device("grad_out", grad_out, "key", key)
    if grad_out.shape != key.shape:
        raise ValueError(f"grad_out must have the shape of key, {tuple(key.shape)}, got {tuple(grad_out.shape)}")


def _check_content(key: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        checks.check_boundaries("cu_seqlens", cu_seqlens, key.size(0), "key", "max_seqlen", key.size(0))


def _cuda_check(key: Tensor) -> None:
    cuda.check_dtype("key", key)


def _weight(tensor: Tensor, key: Tensor, on_cuda: bool) -> Tensor:
    return tensors.sums_like(tensor, key) if on_cuda else tensor.contiguous()


def _weight_follows(tensor: Tensor, key: Tensor, device_type: str) -> Tensor:
    return tensors.autocast_to_sums(tensor, key, device_type)


def _bias(tensor: Tensor, key: Tensor) -> Tensor:
    return tensors.sums_like(tensor, key)


def _has_silu(activation: str | None) -> bool:
    return activation is not None


def _has_grad_bias(bias: Tensor | None, needs_grad_bias: bool) -> bool:
    return needs_grad_bias and bias is not None


def _gradients(
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    needs_grad_weight: bool,
    bias: Tensor | None,
    needs_grad_bias: bool,
) -> tuple[Tensor, ...]:
    """Where one is not asked for, an empty tensor."""
    bias_shape = (key.size(1), key.size(-1)) if _has_grad_bias(bias, needs_grad_bias) else (0,)
    grad_bias = key.new_empty(bias_shape, dtype=sum_dtype(key.dtype))
    grad_weight = key.new_empty(weight.shape if needs_grad_weight else (0,), dtype=sum_dtype(key.dtype))
    # Zeros: where there are no tokens, no kernel writes them.
    grad_state = key.new_empty(0) if state is None else key.new_zeros(state.shape)
    return torch.empty_like(key), grad_weight, grad_state, grad_bias


def _sums_of_taps(key: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``sum_l weight[..., W - 1 - l] * key_{t - l}`` in the dtype of sums, by torch's own ops."""
    key, weight = (tensor.to(sum_dtype(key.dtype)) for tensor in (key, weight))
    width = weight.size(2)
    if cu_seqlens is None:
        before = key.new_zeros((*key.shape[:2], width - 1, key.size(3))) if state is None else state.to(key.dtype)
        padded, taps = torch.cat([before, key], dim=2), weight[:, None]
        shifted = [padded.narrow(2, width - 1 - back, key.size(2)) for back in range(width)]
    else:
        tokens, starts = torch.arange(key.size(0), device=key.device), cu_seqlens.to(torch.int64)
        sequences = torch.searchsorted(starts, tokens, right=True) - 1
        place, taps = (tokens - starts[sequences])[:, None, None], weight
        shifted = [torch.where(place >= back, key.roll(back, 0), 0) for back in range(width)]
    return sum((keys * taps[..., width - 1 - back] for back, keys in enumerate(shifted)), key.new_zeros(()))


def _per_channel(bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[Hkv, D]`` beside keys."""
    return bias[:, None] if cu_seqlens is None else bias


def _forward_mode(
    key: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    tangent_key: Tensor | None,
    tangent_weight: Tensor | None,
    tangent_state: Tensor | None,
    tangent_bias: Tensor | None,
) -> Tensor:
    """``d_key + silu'(s) d_s``; the sum over taps ``s`` is linear in keys, those before them included, and in taps."""
    d_key = torch.zeros_like(key) if tangent_key is None else tangent_key
    d_sums = _sums_of_taps(d_key, weight, tangent_state, cu_seqlens)
    if tangent_weight is not None:
        d_sums = d_sums + _sums_of_taps(key, tangent_weight, state, cu_seqlens)
    if tangent_bias is not None:
        d_sums = d_sums + _per_channel(tangent_bias, cu_seqlens)
    if activation is None:
        return (d_key + d_sums).to(key.dtype)
    sums = _sums_of_taps(key, weight, state, cu_seqlens)
    if bias is not None:
        sums = sums + _per_channel(bias, cu_seqlens)
    sigmoid = sums.sigmoid()
    return (d_key + sigmoid * (1 + sums * (1 - sigmoid)) * d_sums).to(key.dtype)


def _folds(cu_seqlens: Tensor | None) -> bool:
    return cu_seqlens is None


register(
    Op(
        schema="key_conv_backward(Tensor grad_out, Tensor key, Tensor weight, Tensor? state, Tensor? cu_seqlens, "
        "bool needs_grad_weight, Tensor? bias=None, str? activation='silu', bool needs_grad_bias=False) "
        "-> (Tensor grad_key, Tensor grad_weight, Tensor grad_state, Tensor grad_bias)",
        check=_check_backward,
        check_content=_check_content,
        cuda_check=_cuda_check,
        locals={"has_silu": _has_silu},
        inputs={
            "grad_out": tensors.contiguous_rows,
            "weight": _weight,
            "bias": _bias,
            "cu_seqlens": tensors.boundaries,
            "grad_weight": lambda tensor, needs_grad_weight: tensor if needs_grad_weight else None,
            "grad_state": lambda tensor, state: None if state is None else tensor,
            "grad_bias": lambda tensor, bias, needs_grad_bias: (
                tensor if _has_grad_bias(bias, needs_grad_bias) else None
            ),
        },
        results=_gradients,
        derivative_of="key_conv",
        batch={"grad_out": 0, "key": 0, "state": 0, "grad_key": 0, "grad_state": 0},
        folds=_folds,
    )
)
_key_conv = register(
    Op(
        schema="key_conv(Tensor key, Tensor weight, Tensor? state, Tensor? cu_seqlens, Tensor? bias=None, "
        "str? activation='silu') -> Tensor out",
        check=_check,
        check_content=_check_content,
        cuda_check=_cuda_check,
        locals={"has_silu": _has_silu},
        inputs={"weight": _weight, "bias": _bias, "cu_seqlens": tensors.boundaries},
        results=lambda key: torch.empty_like(key),
        backward="key_conv_backward",
        forward_mode=_forward_mode,
        autocast={
            "key": tensors.autocast,
            "state": tensors.autocast,
            "weight": _weight_follows,
            "bias": _weight_follows,
        },
        batch={"key": 0, "state": 0, "out": 0},
        folds=_folds,
    )
)

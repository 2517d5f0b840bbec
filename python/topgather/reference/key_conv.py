"""The key convolution in plain float64 PyTorch.

Source: FlashMoBA, arXiv 2511.11571: a depthwise causal convolution of the keys, SiLU and a residual. Taps are stored as
causal convolutions of torch store them: the last one belongs to the current token.

Notation used in every docstring: B batch, Hkv heads, N tokens, D head dimension, W taps.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

__all__ = ["key_conv"]


def key_conv(
    key: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """``key_t + silu(bias + sum_l weight[..., W - 1 - l] * key_{t - l})`` for every token, head and channel.

    Args:
        key: ``[B, Hkv, N, D]``, any floating dtype; with ``cu_seqlens`` packed ``[total, Hkv, D]``.
        weight: ``[Hkv, D, W]``.
        cu_seqlens: ``[num_sequences + 1]``, boundaries of packed sequences, each of which is convolved alone.
        state: ``[B, Hkv, W - 1, D]``, the keys before the first; zeros if None.
        bias: ``[Hkv, D]``; zeros if None.
        activation: ``"silu"``, or None for sums as they are.

    Returns:
        float64, the shape of ``key``, differentiable; with ``state`` a pair of it and the last ``W - 1`` keys of state
        and key together.
    """
    key, weight = key.double(), weight.double()
    bias = key.new_zeros(weight.shape[:2]) if bias is None else bias.double()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            _convolve(key[first:last].transpose(0, 1)[None], weight, None, bias, activation)[0].transpose(0, 1)
            for first, last in pairwise(bounds)
        ]
        return torch.cat(parts) if parts else key.clone()
    if state is None:
        return _convolve(key, weight, None, bias, activation)
    state = state.double()
    return _convolve(key, weight, state, bias, activation), torch.cat([state, key], dim=2)[:, :, key.shape[2] :]


def _convolve(key: Tensor, weight: Tensor, state: Tensor | None, bias: Tensor, activation: str | None) -> Tensor:
    batch, num_heads, num_tokens, head_dim = key.shape
    width = weight.shape[-1]
    if state is None:
        state = key.new_zeros(batch, num_heads, width - 1, head_dim)
    padded = torch.cat([state, key], dim=2)
    sums = torch.zeros_like(key) + bias[:, None]
    for tap in range(width):  # tap width - 1 stands on the current token
        sums = sums + weight[:, None, :, tap] * padded[:, :, tap : tap + num_tokens]
    return key + (sums if activation is None else silu(sums))

"""Whole models over ranks: :func:`context_parallel`, and the convolution of keys that layers may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .._common import checks, over_ranks
from .._common.library import DTYPE_CODES, sum_dtype
from .._common.transforms import refuse_transforms
from ..ops import key_conv as key_conv_of_one
from . import collectives
from .attention import METHODS, moba_attention
from .placement import PLACEMENTS, Placement, Stretch, check_placement, group_of, placement_of, shard_sequence
from .transfer import Transfer


class _OverRanks:
    """What layers attend with in a :func:`context_parallel`."""

    def __init__(self, group: dist.ProcessGroup, placement: str, method: str | None, num_tokens: int | None) -> None:
        self.group, self.placement, self.method, self.num_tokens = group, placement, method, num_tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = moba_attention(query, key, value, self.group, placement=self.placement, method=self.method, **options)
        assert isinstance(out, Tensor)
        return out

    def key_conv(self, key: Tensor, weight: Tensor) -> Tensor:
        return key_conv(key, weight, self.group, placement=self.placement)

    def positions(self, like: Tensor) -> Tensor | None:
        if self.num_tokens is None:
            return None
        return shard_sequence(torch.arange(self.num_tokens, device=like.device), self.group, 0, self.placement)


@contextmanager
def context_parallel(
    mesh: DeviceMesh | dist.ProcessGroup,
    buffers: Sequence[Tensor] = (),
    seq_dims: Sequence[int] = (),
    *,
    placement: str = "zigzag",
    method: str | None = None,
    no_restore_buffers: Sequence[Tensor] = (),
) -> Iterator[None]:
    """Context in which a model's sequences are spread over the ranks of ``mesh``, as torch's own of this name.

    ``buffers`` are cut in place to this rank's tokens, and are what they were when the context ends. Within it
    :class:`topgather.nn.MobaAttention`, and transformers models with ``attn_implementation="moba"``, attend to the
    tokens of all ranks. Everything a model does token by token needs nothing; what depends on positions
    (``position_ids``, rotary tables, labels that are shifted by one) goes into ``buffers``.

    ::

        positions, targets = torch.arange(N)[None], tokens.roll(-1, dims=1)
        with tgd.context_parallel(mesh["cp"], [tokens, positions, targets], [1, 1, 1]):
            loss = F.cross_entropy(model(tokens, position_ids=positions).logits.flatten(0, 1), targets.flatten())
            loss.backward()

    The backward belongs inside where layers are checkpointed (``torch.utils.checkpoint``). Set for the whole process.

    Args:
        mesh: a mesh of one dimension, or a group.
        buffers: tensors with the tokens of all ranks, the same on all; no parameters, and not views of others.
        seq_dims: the dimension of tokens of each. All have equally many.
        placement, method: as in :func:`moba_attention`.
        no_restore_buffers: those of ``buffers`` that may stay cut, which saves a copy of each.

    Raises:
        TypeError: ``mesh`` is neither a mesh nor a group, or a buffer is no tensor.
        ValueError: as many ``seq_dims`` as ``buffers`` there are not, buffers of different lengths, one that requires
            grad or stands there twice, one of ``no_restore_buffers`` that is not among them, or an unknown option.
    """
    group = group_of(mesh)
    check_placement(placement)
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
    if len(buffers) != len(seq_dims):
        raise ValueError(
            f"seq_dims must have as many numbers as there are buffers, {len(buffers)}, got {len(seq_dims)}"
        )
    for buffer in buffers:
        checks.check_tensor("buffers", buffer)
        if buffer.requires_grad:
            raise ValueError("buffers must not require grad: they are cut in place")
    if len({id(buffer) for buffer in buffers}) < len(buffers):
        raise ValueError("buffers must name each tensor once: they are cut in place")
    if any(all(buffer is not other for other in buffers) for buffer in no_restore_buffers):
        raise ValueError("no_restore_buffers must be among buffers")
    lengths = {buffer.size(dim) for buffer, dim in zip(buffers, seq_dims, strict=True)}
    if len(lengths) > 1:
        raise ValueError(f"buffers must have equally many tokens, got {sorted(lengths)}")
    whole = [None if any(buffer is other for other in no_restore_buffers) else buffer.clone() for buffer in buffers]
    try:
        for buffer, dim in zip(buffers, seq_dims, strict=True):
            _become(buffer, shard_sequence(buffer, group, dim, placement).clone())
        with over_ranks.attending(_OverRanks(group, placement, method, lengths.pop() if lengths else None)):
            yield
    finally:
        for buffer, before in zip(buffers, whole, strict=True):
            if before is not None:
                _become(buffer, before)


def _become(buffer: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        buffer.resize_(other.shape)
        buffer.copy_(other)


# --- the convolution of keys ----------------------------------------------------------------------------------------


class _WithBefore(torch.autograd.Function):
    """``[B, H, n, D]`` as it is, and the tokens before each stretch, ``[tokens, B * H, D]``.

    As it is so that a rank whose tokens nobody stands behind has its backward too, for which the others wait.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, layout: Placement, transfer: Transfer) -> tuple[Tensor, Tensor]:
        ctx.calls = layout, transfer, key.dtype
        before = transfer.fetch(key.detach().flatten(0, 1).transpose(0, 1), layout, _SENDING)
        return key.view_as(key), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_before: Tensor) -> tuple[Tensor, None, None]:
        layout, transfer, dtype = ctx.calls
        by_token = grad_key.flatten(0, 1).transpose(0, 1)
        returned = transfer.give_back(grad_before.to(sum_dtype(dtype)), by_token, layout, _SENDING)
        return grad_key + returned.transpose(0, 1).view(grad_key.shape), None, None


_SENDING = "sending the keys before a rank's to key_conv"


def key_conv(
    key: Tensor,
    weight: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    placement: str = "contiguous",
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """:func:`topgather.key_conv` (FlashMoBA, arXiv 2511.11571) of a sequence whose tokens are spread over ranks.

    A rank gets the ``W - 1`` keys before each of its stretches. All ranks of the group must call it in the same order
    with the same options, forward and backward.

    Args:
        key: ``[B, Hkv, n, D]``, the ``n`` tokens of this rank.
        weight, bias, activation: as in :func:`topgather.key_conv`; gradients are those of this rank's tokens.
        mesh, placement: as in :func:`moba_attention`.

    Returns:
        The shape and dtype of ``key``. Differentiable with respect to key, weight and bias, once.

    Raises:
        TypeError: an argument of the wrong type or dtype, on every rank.
        ValueError: a wrong shape or option, or ranks that differ in them, on every rank.
    """
    refuse_transforms("distributed.key_conv", "ranks send each other tokens")
    group = group_of(mesh)
    error: Exception | None = None
    numbers = [0] * 9
    meanings = ["batch", "key heads", "head_dim", "dtype (by its code)", "width", "placement"]
    meanings.append("need of a gradient for key")
    try:
        check_placement(placement)
        for name, tensor, layout in (
            ("key", key, "[batch, heads, tokens, dim]"),
            ("weight", weight, "[heads, dim, W]"),
        ):
            checks.check_tensor(name, tensor)
            checks.check_ndim(name, tensor, len(layout.split(",")), layout)
            checks.check_floating(name, tensor)
        numbers = [
            0, key.size(2), key.size(0), key.size(1), key.size(3), DTYPE_CODES[key.dtype], weight.size(2),
            PLACEMENTS.index(placement), int(torch.is_grad_enabled() and key.requires_grad),
        ]  # fmt: skip
        # A call of no token says everything else.
        key_conv_of_one(key.detach()[:, :, :0], weight.detach(), bias=bias, activation=activation)
    except (TypeError, ValueError) as raised:
        error, numbers[0] = raised, 1
    what = "agreeing on a call of key_conv"
    device = collectives.agreement_device(group)
    has_error, lengths, *others = collectives.gather_numbers(numbers, group, device, what)
    collectives.raise_everywhere(error, has_error, group, what)
    collectives.require_same(meanings, others)
    placed = placement_of(placement, group, lengths)
    num_before = weight.size(2) - 1
    stretches = [[stretch for stretch in of_rank if stretch.length > 0] for of_rank in placed.stretches]
    reach = [
        [Stretch(max(stretch.start - num_before, 0), min(stretch.start, num_before)) for stretch in of_rank]
        for of_rank in stretches
    ]
    key, before = _WithBefore.apply(key, placed, Transfer(stretches, reach))
    outs, first, place = [], 0, 0
    for stretch, needed in zip(stretches[placed.rank], reach[placed.rank], strict=True):
        state = before[place : place + needed.length].transpose(0, 1).unflatten(0, key.shape[:2])
        state = torch.nn.functional.pad(state, (0, 0, num_before - needed.length, 0))
        part = key[:, :, first : first + stretch.length]
        outs.append(key_conv_of_one(part, weight, state=state, bias=bias, activation=activation)[0])
        first, place = first + stretch.length, place + needed.length
    return torch.cat(outs, dim=2) if outs else key_conv_of_one(key, weight, bias=bias, activation=activation)

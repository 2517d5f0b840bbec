"""The way ``gather`` of block attention over ranks: keys and values travel.

Steps of a forward, for some key heads at a time (``max_gathered_bytes``), the next ones travelling meanwhile:

1. an all-gather of keys and values: every rank has those of all tokens, in the order of positions;
2. for each stretch of this rank's tokens, from token s up to token e, :func:`topgather.moba_route` and the attention of
   queries s to e over keys 0 to e (over all keys without ``is_causal``). Queries are aligned to the end of the keys,
   and blocks are counted from key 0, so the choice is the one that a single process makes.

Kept for the backward is what a single process keeps of this rank's tokens. The backward gathers keys and values again,
and an all-to-all brings each rank the parts of its own keys' gradients, which it adds in the order of ranks in the
dtype of sums. :mod:`topgather._distributed.plan` says what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common import tensors
from .._common.library import sum_dtype
from ..ops import _moba_ops
from . import collectives
from .placement import Placement, Stretch

_ops = torch.ops.topgather


# --- what a rank's tokens attend to ---------------------------------------------------------------------------------


class Options(NamedTuple):
    block_size: int
    top_k: int | None
    is_causal: bool
    scale: float
    deterministic: bool
    softcap: float | None
    max_gathered_bytes: int


class Choice(NamedTuple):
    """Blocks of the rank's queries, ``[B, Hq, n, slots]`` or packed ``[Hq, n, slots]``: -1 for none."""

    given: Tensor | None = None  # to attend to
    made: Tensor | None = None  # to be filled in, where none is given


class Part(NamedTuple):
    """A call of the attention: some of the rank's queries and a range of the gathered keys.

    ``sequences`` is what the ops take of packed sequences, or nothing of a dense batch.
    """

    queries: slice
    keys: slice
    sequences: tuple[Tensor | None, Tensor | None, int, int]


DENSE = (None, None, 0, 0)


def parts_of(layout: Placement, bounds: list[int] | None, is_causal: bool, device: torch.device) -> list[Part]:
    parts, first = [], 0
    for stretch in layout.mine:
        queries = slice(first, first + stretch.length)
        first += stretch.length
        if stretch.length == 0:
            continue
        if bounds is None:
            parts.append(Part(queries, slice(0, stretch.end if is_causal else layout.total), DENSE))
            continue
        within = [(start, end) for start, end in pairwise(bounds) if max(start, stretch.start) < min(end, stretch.end)]
        num_queries = [min(end, stretch.end) - max(start, stretch.start) for start, end in within]
        num_keys = [(min(end, stretch.end) if is_causal else end) - start for start, end in within]
        keys = slice(within[0][0], within[0][0] + sum(num_keys))
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, *numbers], dtype=torch.int64, device="cpu").cumsum(0).to(device)
            for numbers in (num_queries, num_keys)
        )
        parts.append(Part(queries, keys, (cu_seqlens_q, cu_seqlens_k, max(num_queries), max(num_keys))))
    return parts


def seen_by(layout: Placement, bounds: list[int] | None, is_causal: bool, rank: int) -> list[tuple[int, int]]:
    """The ranges of keys that a rank's calls take: what it has gradients of."""
    other = layout._replace(rank=rank)
    return [(part.keys.start, part.keys.stop) for part in parts_of(other, bounds, is_causal, torch.device("cpu"))]


def overlap(stretch: Stretch, seen: list[tuple[int, int]]) -> Stretch:
    """From the first to the last token of the stretch that is seen."""
    clipped = [(max(stretch.start, start), min(stretch.end, end)) for start, end in seen]
    clipped = [(start, end) for start, end in clipped if start < end]
    if not clipped:
        return Stretch(stretch.start, 0)
    start = min(start for start, _ in clipped)
    return Stretch(start, max(end for _, end in clipped) - start)


# --- what is sent ---------------------------------------------------------------------------------------------------

_GATHERING = "gathering keys and values of moba_attention"


class Gathering:
    """Keys or values of some heads, on their way from all ranks."""

    def __init__(self, tensor: Tensor, layout: Placement, tokens_dim: int) -> None:
        self.layout, self.tokens_dim, self.tensor = layout, tokens_dim, tensor
        longest = max(layout.num_tokens(rank) for rank in range(layout.num_ranks))
        shape = list(tensor.shape)
        shape[tokens_dim] = longest
        if tensor.size(tokens_dim) == longest:
            self.sent = tensor.contiguous()
        else:  # collectives of unequal parts are not to be had on every backend
            self.sent = tensor.new_zeros(shape)
            self.sent.narrow(tokens_dim, 0, tensor.size(tokens_dim)).copy_(tensor)
        self.received = tensor.new_empty((layout.num_ranks, *shape))
        self.work: Any = None
        if self.sent.numel() > 0:
            with collectives.naming(_GATHERING, layout.group):
                self.work = collectives.all_gather(
                    self.received.view(-1), self.sent.view(-1), group=layout.group, async_op=True
                )

    def finish(self) -> Tensor:
        """All tokens, in the order of positions."""
        if self.work is not None:
            with collectives.naming(_GATHERING, self.layout.group):
                self.work.wait()
        shape = list(self.sent.shape)
        shape[self.tokens_dim] = self.layout.total
        whole = self.sent.new_empty(shape)
        for rank, stretches in enumerate(self.layout.stretches):
            first = 0
            for stretch in stretches:
                part = self.received[rank].narrow(self.tokens_dim, first, stretch.length)
                whole.narrow(self.tokens_dim, *stretch).copy_(part)
                first += stretch.length
        return whole


def gathered(
    key: Tensor, value: Tensor, layout: Placement, heads: list[slice], tokens_dim: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of key heads with the keys and values of all tokens; those of the next slice travel meanwhile."""

    def begin(some: slice) -> tuple[Gathering, Gathering]:
        return tuple(Gathering(tensor[:, some], layout, tokens_dim) for tensor in (key, value))  # type: ignore[return-value]

    under_way = begin(heads[0])
    for index, some in enumerate(heads):
        arrived = under_way
        if index + 1 < len(heads):
            under_way = begin(heads[index + 1])
        yield some, arrived[0].finish(), arrived[1].finish()


def held_bytes_of_head(batch: int, dims: int, itemsize: int, longest: int, num_ranks: int, num_tokens: int) -> int:
    """What a rank holds of a key head: what is sent and received, twice as the next ones travel, and all in order."""
    return batch * dims * itemsize * (2 * longest * (num_ranks + 1) + num_tokens)


def slices_of_heads(key: Tensor, value: Tensor, layout: Placement, max_bytes: int) -> list[slice]:
    """As many key heads at a time as two slices of, as sent, received and in order, fit in ``max_bytes``."""
    batch = key.size(0) if key.dim() == 4 else 1
    longest = max(layout.num_tokens(rank) for rank in range(layout.num_ranks))
    held = held_bytes_of_head(
        batch, key.size(-1) + value.size(-1), key.element_size(), longest, layout.num_ranks, layout.total
    )
    step = max(1, min(key.size(1), max_bytes // max(held, 1)))
    return [slice(first, min(first + step, key.size(1))) for first in range(0, key.size(1), step)]


def return_gradients(
    grad: Tensor, like: Tensor, layout: Placement, seen: list[list[tuple[int, int]]], tokens_dim: int
) -> Tensor:
    """The sum over ranks, in their order, of what each has for this rank's tokens. ``grad`` has all tokens."""
    rank = layout.rank

    def flat(stretches: list[Stretch]) -> list[Tensor]:
        return [grad.narrow(tokens_dim, *stretch).reshape(-1) for stretch in stretches]

    numbers_a_token = grad.numel() // max(layout.total, 1)
    to_send = [[overlap(stretch, seen[rank]) for stretch in stretches] for stretches in layout.stretches]
    to_receive = [[overlap(stretch, seen[other]) for stretch in layout.mine] for other in range(layout.num_ranks)]
    sent = torch.cat([part for stretches in to_send for part in flat(stretches)])
    sent_sizes, received_sizes = (
        [numbers_a_token * sum(stretch.length for stretch in stretches) for stretches in of_ranks]
        for of_ranks in (to_send, to_receive)
    )
    received = collectives.all_to_all(
        sent, sent_sizes, received_sizes, layout.group, "returning the gradients of keys and values"
    )
    total = torch.zeros(like.shape, dtype=sum_dtype(like.dtype), device=like.device)
    position = 0
    for stretches in to_receive:
        first = 0
        for mine, stretch in zip(layout.mine, stretches, strict=True):
            part = total.narrow(tokens_dim, first + stretch.start - mine.start, stretch.length)
            part += received[position : position + part.numel()].view(part.shape)
            position += part.numel()
            first += mine.length
    return total.to(like.dtype)


# --- attention ------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """Both results of the rank's tokens, from tensors of the rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Placement,
        bounds: list[int] | None,
        options: Options,
        choice: Choice,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (tensors.contiguous_rows(tensor.detach()) for tensor in (query, key, value))
        is_packed = bounds is not None
        tokens_dim, group_size = (0 if is_packed else 2), query.size(1) // key.size(1)
        out, lse, terms = _moba_ops._attention(query, value)
        parts = parts_of(layout, bounds, options.is_causal, query.device)
        heads = slices_of_heads(key, value, layout, options.max_gathered_bytes)
        choices = []
        for some, all_keys, all_values in gathered(key, value, layout, heads, tokens_dim):
            wide = slice(some.start * group_size, some.stop * group_size)
            for part in parts:
                queries = at(query, part.queries, wide, is_packed)
                keys, values = (at(tensor, part.keys, slice(None), is_packed) for tensor in (all_keys, all_values))
                longest = part.sequences[3] if is_packed else keys.size(2)
                if choice.given is not None:
                    chosen = rows_at(choice.given, part.queries, wide, is_packed).contiguous()
                else:
                    slots = _moba_ops.num_slots(options.top_k, longest, options.block_size)
                    chosen = _ops.moba_route.default(
                        queries, keys, options.block_size, slots, options.is_causal, *part.sequences
                    )
                    if choice.made is not None:
                        # As wide as it will be given to a repetition.
                        made = rows_at(choice.made, part.queries, wide, is_packed)
                        made[..., :slots] = chosen
                        chosen = made.contiguous()
                results = _ops.moba_attention.default(
                    queries, keys, values, chosen, options.block_size, options.is_causal, options.scale,
                    *part.sequences, options.deterministic, options.softcap,
                )  # fmt: skip
                at(out, part.queries, wide, is_packed).copy_(results[0])
                for whole, result in ((lse, results[1]), (terms, results[2])):
                    rows_at(whole, part.queries, wide, is_packed).copy_(result)
                choices.append(chosen)
        ctx.save_for_backward(query, key, value, out, lse, terms, *choices)
        ctx.calls = layout, bounds, options, parts, heads
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, terms, *choices = tensors.saved_rows(ctx)
        layout, bounds, options, parts, heads = ctx.calls
        is_packed = bounds is not None
        tokens_dim, group_size = (0 if is_packed else 2), query.size(1) // key.size(1)
        # The others wait for this rank's part, whatever its own gradients are.
        grad_out = torch.zeros_like(out) if grad_out is None else tensors.contiguous_rows(grad_out)
        seen = [seen_by(layout, bounds, options.is_causal, rank) for rank in range(layout.num_ranks)]
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        remaining = iter(choices)
        for some, all_keys, all_values in gathered(key, value, layout, heads, tokens_dim):
            wide = slice(some.start * group_size, some.stop * group_size)
            # Stretches see keys in common: their gradients are added here, in the dtype of sums.
            sums = [torch.zeros_like(tensor, dtype=sum_dtype(tensor.dtype)) for tensor in (all_keys, all_values)]
            for part in parts:
                keys, values = (at(tensor, part.keys, slice(None), is_packed) for tensor in (all_keys, all_values))
                of_lse = None if grad_lse is None else rows_at(grad_lse, part.queries, wide, is_packed).contiguous()
                found = _ops.moba_attention_backward.default(
                    at(grad_out, part.queries, wide, is_packed), of_lse,
                    at(query, part.queries, wide, is_packed), keys, values,
                    at(out, part.queries, wide, is_packed),
                    rows_at(lse, part.queries, wide, is_packed).contiguous(), next(remaining),
                    options.block_size, options.is_causal, options.scale, *part.sequences, options.deterministic,
                    options.softcap, rows_at(terms, part.queries, wide, is_packed).contiguous(),
                )  # fmt: skip
                at(gradients[0], part.queries, wide, is_packed).copy_(found[0])
                for total, gradient in zip(sums, found[1:], strict=True):
                    at(total, part.keys, slice(None), is_packed).add_(gradient)
            for gradient, total, tensor in zip(gradients[1:], sums, (key, value), strict=True):
                returned = return_gradients(total.to(tensor.dtype), tensor[:, some], layout, seen, tokens_dim)
                gradient[:, some] = returned
        return (*gradients, None, None, None, None)


def at(tensor: Tensor, tokens: slice, heads: slice, is_packed: bool) -> Tensor:
    """Some tokens and heads of ``[B, H, N, D]``, or of ``[N, H, D]``."""
    return tensor[tokens, heads] if is_packed else tensor[:, heads, tokens]


def rows_at(tensor: Tensor, tokens: slice, heads: slice, is_packed: bool) -> Tensor:
    """The same of what stands once a head and query, ``[B, H, N, ...]`` or ``[H, N, ...]``."""
    return tensor[heads, tokens] if is_packed else tensor[:, heads, tokens]

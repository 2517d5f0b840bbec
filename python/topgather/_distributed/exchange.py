"""The way ``exchange`` of block attention over ranks: queries travel to where their blocks are.

A block belongs to the rank that has its first token. Every sequence of a batch, or of a packed one, has blocks of its
own; the tensors of a rank are ``[tokens, heads, dim]`` here, entries of a batch one after the other. Steps:

1. tokens of blocks that lie across ranks travel both ways, less than a block for each end of a stretch: the owner of a
   block has all of it, and a causal query's rank has its own block up to the query (:mod:`blocks`);
2. the centroids of all blocks are gathered, and every rank chooses for its queries: the block a query stands in as
   moba_route does, the others by ``moba_route`` itself over centroids that are keys of blocks of one;
3. a query attends to its own block at home (causal). For the other blocks its row, and the numbers that its blocks
   have at their owner, go to each of the owners, for some key heads at a time (``max_gathered_bytes``);
4. an owner attends with each row to its blocks among those chosen, rows by key head and sequence, as to packed
   sequences; outputs and softmax terms go back and are merged in the order of ranks.

The backward walks the same way: rows of queries and of gradients, with the merged softmax terms, go to the owners,
whose gradients of keys stay, and whose gradients of queries come back; step 1 in reverse gives tokens of blocks that
lie across ranks their gradients. Nothing is added atomically. :mod:`topgather._distributed.plan` says what is sent.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common import tensors
from .._common.library import sum_dtype
from ..ops import _moba_ops
from . import collectives
from .blocks import Blocks, blocks_of
from .gather import Choice, Options
from .placement import Placement

_ops = torch.ops.topgather
_TO_OWNERS = "completing blocks that lie across ranks in moba_attention"

# --- the choice -----------------------------------------------------------------------------------------------------


def all_centroids(keys: Tensor, blocks: Blocks, layout: Placement, block_size: int) -> Tensor:
    """``[blocks of all ranks, Hkv, D]`` in the dtype of sums, from the keys of this rank's blocks."""
    dtype, heads, dim = sum_dtype(keys.dtype), keys.size(1), keys.size(2)
    most = max(blocks.num_owned)
    sent = keys.new_zeros((most, heads, dim), dtype=dtype)
    mine = blocks.mine
    if mine.num_blocks > 0:
        # Each as a sequence of one block: what is padded to the longest of them is nothing.
        found = _ops.block_centroids.default(keys, block_size, mine.block_bounds.to(keys.device), block_size)
        sent[: mine.num_blocks] = found[:, :, 0]
    received = sent.new_empty((layout.num_ranks * most, heads, dim))
    if sent.numel() > 0:
        with collectives.naming("gathering centroids of moba_attention", layout.group):
            collectives.all_gather(received.view(-1), sent.view(-1), group=layout.group)
    return received.index_select(0, blocks.gathered_at.to(keys.device))


def choose(query: Tensor, centroids: Tensor, blocks: Blocks, top_k: int | None, *, is_causal: bool) -> Tensor:
    """``[Hq, n, slots]`` int32: the blocks of each of this rank's queries, counted from their sequence's first.

    Where causal, a query of offset j in its block is the query of a head of its own: the heads of one offset see one
    query a block, whose position is the block's, among keys that are the blocks' centroids.
    """
    places, (num_tokens, num_heads, dim) = blocks.places, query.shape
    slots = _moba_ops.num_slots(top_k, places.most_blocks, 1)
    if num_tokens == 0:
        return torch.empty((num_heads, 0, slots), dtype=torch.int32, device=query.device)
    query = query.to(centroids.dtype)
    keys = centroids.index_select(0, places.visible_blocks.to(query.device))
    if is_causal:
        size = blocks.block_size
        rows = query.index_select(0, places.padded_tokens.to(query.device)).view(-1, size, num_heads, dim)
        query = rows.permute(0, 2, 1, 3).reshape(-1, num_heads * size, dim)
    chosen: Tensor = _ops.moba_route.default(
        query, keys, 1, slots, is_causal, places.query_bounds.to(query.device), places.block_bounds.to(query.device),
        places.most_queries, places.most_blocks,
    )  # fmt: skip
    if not is_causal:
        return chosen
    by_token = chosen.view(num_heads, blocks.block_size, -1, slots).transpose(1, 2).flatten(1, 2)
    return by_token.index_select(1, places.padded_places.to(query.device))


def _choose_by_heads(query: Tensor, centroids: Tensor, blocks: Blocks, options: Options) -> Tensor:
    """As many key heads at a time as queries fit in ``max_gathered_bytes``, of which the choice makes copies."""
    num_kv_heads, group_size = centroids.size(1), query.size(1) // centroids.size(1)
    of_head = 3 * blocks.places.padded_tokens.numel() * group_size * query.size(2) * centroids.element_size()
    step = max(1, min(num_kv_heads, options.max_gathered_bytes // max(of_head, 1)))
    parts = [
        choose(
            query[:, first * group_size : (first + step) * group_size], centroids[:, first : first + step], blocks,
            options.top_k, is_causal=options.is_causal,
        )
        for first in range(0, num_kv_heads, step)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- which rows travel ----------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows that this rank sends, in the order of ranks and there of segments: key heads, and their sequences."""

    row: Tensor  # [P] head * tokens + token, of the heads at hand
    ordinal: Tensor  # [P] which of its row's
    block_indices: Tensor  # [P, slots] int32, as the owner numbers the blocks of the row's segment
    counts: Tensor  # [R, key heads * sequences]


def _far(choice: Tensor, blocks: Blocks, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Owners and the numbers that blocks have there, ``[heads, n, slots]``, each row by owner, R for nothing."""
    device = choice.device
    own, first = blocks.places.own_block.to(device)[:, None], blocks.places.first_block.to(device)[:, None]
    is_far = choice >= 0
    if is_causal:
        is_far &= choice != own
    number = (choice + first).clamp(min=0, max=max(blocks.num_blocks - 1, 0)).long()
    owner = torch.where(is_far, blocks.owner.to(device)[number], len(blocks.num_owned))
    owner, order = owner.sort(dim=-1, stable=True)
    return owner, blocks.number_at_owner.to(device)[number].gather(-1, order)


def _is_first(owner: Tensor, num_ranks: int) -> Tensor:
    """Whether a slot is the first of its row's with its owner."""
    differs = torch.ones_like(owner, dtype=torch.bool)
    differs[..., 1:] = owner[..., 1:] != owner[..., :-1]
    return differs & (owner < num_ranks)


def _segments(owner: Tensor, blocks: Blocks, group_size: int) -> Tensor:
    """``[heads, n, 1]``: key head and sequence of a row."""
    key_head = torch.arange(owner.size(0), device=owner.device) // group_size
    sequence = blocks.places.sequence.to(owner.device)
    return (key_head[:, None] * blocks.num_sequences + sequence)[..., None]


def _rows_to_send(choice: Tensor, blocks: Blocks, group_size: int, options: Options) -> _Rows:
    num_heads, num_slots = choice.size(0), choice.size(2)
    num_ranks, num_segments = len(blocks.num_owned), num_heads // group_size * blocks.num_sequences
    owner, number = _far(choice, blocks, is_causal=options.is_causal)
    is_first = _is_first(owner, num_ranks)
    ordinal = is_first.cumsum(-1) - 1
    place = torch.arange(num_slots, device=choice.device).expand_as(owner)
    slot = place - torch.where(is_first, place, 0).cummax(-1).values
    key = (owner * num_segments + _segments(owner, blocks, group_size))[is_first]
    # One number a row and owner, in the order of rows; then in that of owners and segments.
    pair = is_first.flatten().cumsum(0).view(owner.shape) - 1
    order = key.sort(stable=True).indices
    width = blocks.slots_at_owner(options.top_k, is_causal=options.is_causal)
    indices = torch.full((key.numel(), width), -1, dtype=torch.int32, device=choice.device)
    there = owner < num_ranks
    indices[pair[there], slot[there]] = number[there].to(torch.int32)
    row = is_first.flatten(0, 1).nonzero()[:, 0]
    counts = key.bincount(minlength=num_ranks * num_segments).view(num_ranks, num_segments)
    return _Rows(row[order], ordinal[is_first][order], indices[order], counts)


class _Traffic(NamedTuple):
    """How many rows go where, ``[R, key heads, sequences]`` on the host, and which key heads go together."""

    sent: Tensor
    received: Tensor
    heads: list[slice]

    def sizes(self, some: slice) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each, of some key heads."""
        return tuple(counts[:, some].sum((1, 2)).tolist() for counts in (self.sent, self.received))  # type: ignore[return-value]


def _count_rows(
    choice: Tensor, blocks: Blocks, layout: Placement, num_kv_heads: int, bytes_a_row: int, options: Options
) -> _Traffic:
    group_size = choice.size(0) // num_kv_heads
    counts = []
    for head in range(num_kv_heads):
        owner, _ = _far(choice[head * group_size : (head + 1) * group_size], blocks, is_causal=options.is_causal)
        key = owner * blocks.num_sequences + _segments(owner, blocks, group_size)
        chosen = key[_is_first(owner, layout.num_ranks)]
        counts.append(chosen.bincount(minlength=layout.num_ranks * blocks.num_sequences))
    sent = torch.stack(counts).view(num_kv_heads, layout.num_ranks, -1).transpose(0, 1).contiguous()
    sizes = [sent[0].numel()] * layout.num_ranks
    what = "counting the rows that ranks send each other in moba_attention"
    received = collectives.all_to_all(sent.view(-1), sizes, sizes, layout.group, what).view(sent.shape)
    sent, received = sent.cpu(), received.cpu()
    # All ranks go through the same heads at a time: as many as fit on the fullest of them.
    fullest = (sent.sum((0, 2)) + received.sum((0, 2))).tolist()
    device = collectives.agreement_device(layout.group)
    rows = [max(column) for column in collectives.gather_numbers(fullest, layout.group, device, what)]
    heads, first, held = [], 0, 0
    for head, count in enumerate(rows):
        if head > first and held + count * bytes_a_row > options.max_gathered_bytes:
            heads.append(slice(first, head))
            first, held = head, 0
        held += count * bytes_a_row
    heads.append(slice(first, num_kv_heads))
    return _Traffic(sent, received, heads)


class _Trip:
    """Rows of some key heads: to their owners, into the order of segments, and back."""

    def __init__(self, rows: _Rows, traffic: _Traffic, some: slice, blocks: Blocks, layout: Placement) -> None:
        self.layout, self.rows, self.device = layout, rows, rows.row.device
        self.sent, self.received = traffic.sizes(some)
        counts = traffic.received[:, some].flatten(1)  # [R, segments]
        segment = torch.arange(counts.size(1), device="cpu").repeat(counts.size(0)).repeat_interleave(counts.flatten())
        self.order = segment.sort(stable=True).indices.to(self.device)
        of_segments = counts.sum(0)
        self.longest = int(of_segments.max()) if of_segments.numel() else 0
        self.bounds = torch.cat([of_segments.new_zeros(1), of_segments.cumsum(0)]).to(self.device)
        num_keys = blocks.mine.key_counts.repeat(some.stop - some.start)
        self.key_bounds = torch.cat([num_keys.new_zeros(1), num_keys.cumsum(0)]).to(self.device)

    def out(self, numbers: Tensor, what: str) -> Tensor:
        """``[rows sent, width]`` to ``[rows received, width]`` by segment."""
        return self._travel(numbers, self.sent, self.received, what).index_select(0, self.order)

    def back(self, numbers: Tensor, what: str) -> Tensor:
        """``[rows received, width]`` by segment to ``[rows sent, width]``."""
        ordered = torch.empty_like(numbers)
        ordered[self.order] = numbers
        return self._travel(ordered, self.received, self.sent, what)

    def _travel(self, numbers: Tensor, sent: list[int], received: list[int], what: str) -> Tensor:
        width = numbers.size(1)
        sent_sizes, received_sizes = ([count * width for count in counts] for counts in (sent, received))
        what = f"sending {what} of moba_attention"
        flat = collectives.all_to_all(numbers.reshape(-1), sent_sizes, received_sizes, self.layout.group, what)
        return flat.view(sum(received), width)

    @property
    def sequences(self) -> tuple[Tensor, Tensor, int, int]:
        """What the ops take of the segments."""
        longest = int(self.key_bounds.diff().max()) if self.key_bounds.numel() > 1 else 0
        return self.bounds, self.key_bounds, self.longest, longest


def _select(tensor: Tensor, row: Tensor) -> Tensor:
    """Rows ``head * tokens + token`` of ``[tokens, heads, dim]``."""
    num_tokens = max(tensor.size(0), 1)
    return tensor[row % num_tokens, row // num_tokens]


def _by_head(tensor: Tensor) -> Tensor:
    """``[tokens, heads, dim]`` as ``[heads * tokens, 1, dim]``."""
    return tensor.transpose(0, 1).reshape(-1, 1, tensor.size(-1))


def _by_token(rows: Tensor, num_heads: int) -> Tensor:
    """``[heads * tokens, dim]`` as ``[tokens, heads, dim]``."""
    return rows.view(num_heads, -1, rows.size(-1)).transpose(0, 1)


# --- merging --------------------------------------------------------------------------------------------------------


class _Merged:
    """Rows' outputs, with the largest scores in base 2 and the sums of weights that they are over."""

    def __init__(self, out: Tensor, terms: Tensor, lse: Tensor) -> None:
        self.parts: list[tuple[Any, Tensor, Tensor, Tensor]]
        largest, weight = _marked(terms, lse)
        self.parts = [(slice(None), out, largest, weight)]
        self.largest = largest.clone()

    def add(self, row: Tensor, ordinal: Tensor, out: Tensor, terms: Tensor) -> None:
        """Parts that came back. Those of one ordinal are of different rows."""
        largest, factor = terms.unbind(-1)
        weight = torch.where(largest == -torch.inf, 0.0, 1 / factor)
        self.largest.scatter_reduce_(0, row, largest, "amax")
        for number in range(int(ordinal.max()) + 1 if ordinal.numel() else 0):
            chosen = (ordinal == number).nonzero()[:, 0]
            self.parts.append((row[chosen], out[chosen], largest[chosen], weight[chosen]))

    def finish(self, sees_a_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Out, lse and softmax terms (csrc/common/softmax_terms.h), in the dtype of sums."""
        total = torch.zeros_like(self.largest)
        out = total.new_zeros((total.size(0), self.parts[0][1].size(1)))
        for row, part, largest, weight in self.parts:
            share = torch.where(weight == 0, 0.0, weight * torch.exp2(largest - self.largest[row]))
            total[row] += share
            # A part that weighs nothing may be 0 / 0.
            out[row] += share[:, None] * part.masked_fill((share == 0)[:, None], 0.0)
        is_nothing = total == 0
        out = torch.where(is_nothing[:, None], torch.where(sees_a_key, torch.nan, 0.0)[:, None], out / total[:, None])
        lse = (self.largest + total.log2()) * math.log(2)
        largest = torch.where(is_nothing, 0.0, self.largest)
        factor = torch.where(is_nothing & sees_a_key, torch.nan, 1 / total)
        return out, torch.where(is_nothing, -torch.inf, lse), torch.stack((largest, factor), -1)


def _marked(terms: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Largest scores and sums of weights; -inf and 0 where a row has no score above -inf."""
    is_nothing = lse == -torch.inf
    largest, factor = terms.unbind(-1)
    return largest.masked_fill(is_nothing, -torch.inf), (1 / factor).masked_fill(is_nothing, 0.0)


# --- attention ------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """Both results of the rank's tokens, from tensors ``[tokens, heads, dim]`` of the rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Placement, bounds: list[int], options: Options,
        asked: Choice,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        query, key, value = (tensors.contiguous_rows(tensor.detach()) for tensor in (query, key, value))
        blocks = blocks_of(layout, bounds, options.block_size, is_causal=options.is_causal)
        around = [blocks.transfer.fetch(tensor, layout, _TO_OWNERS) for tensor in (key, value)]
        if asked.given is not None:
            choice = asked.given
            # It may have no own block, and so one more of others.
            options = options._replace(top_k=choice.size(2) + 1)
        else:
            centroids = all_centroids(blocks.owned(around[0]), blocks, layout, options.block_size)
            choice = _choose_by_heads(query, centroids, blocks, options)
            if asked.made is not None:
                asked.made[..., : choice.size(2)] = choice
                choice = asked.made
        num_kv_heads, group_size = key.size(1), query.size(1) // key.size(1)
        traffic = _count_rows(choice, blocks, layout, num_kv_heads, _bytes_of_row(query, value), options)
        out = query.new_empty((*query.shape[:2], value.size(2)))
        lse = torch.empty(choice.shape[:2], dtype=sum_dtype(query.dtype), device=query.device)
        terms = lse.new_empty((*lse.shape, 2))
        for some in traffic.heads:
            wide = slice(some.start * group_size, some.stop * group_size)
            queries, keys, values = query[:, wide], around[0][:, some], around[1][:, some]
            merged = _at_home(queries, keys, values, choice[wide], blocks, options)
            rows = _rows_to_send(choice[wide], blocks, group_size, options)
            trip = _Trip(rows, traffic, some, blocks, layout)
            far = _ops.moba_attention.default(
                trip.out(_select(queries, rows.row), "queries")[:, None], _by_head(blocks.owned(keys)),
                _by_head(blocks.owned(values)), trip.out(rows.block_indices, "choices")[None], options.block_size,
                False, options.scale, *trip.sequences, options.deterministic, options.softcap,
            )  # fmt: skip
            largest, weight = _marked(far[2][0], far[1][0])
            part = trip.back(far[0][:, 0], "outputs")
            part_terms = trip.back(torch.stack((largest, 1 / weight), -1), "softmax terms")
            merged.add(rows.row, rows.ordinal, part, part_terms)
            sees_a_key = (choice[wide] >= 0).any(-1).flatten()
            whole, whole_lse, whole_terms = merged.finish(sees_a_key)
            out[:, wide] = _by_token(whole, queries.size(1)).to(out.dtype)
            lse[wide] = whole_lse.view(lse[wide].shape)
            terms[wide] = whole_terms.view(terms[wide].shape)
        ctx.save_for_backward(query, key, value, out, lse, terms, choice)
        ctx.calls = layout, blocks, options, traffic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, terms, choice = ctx.saved_tensors
        layout, blocks, options, traffic = ctx.calls
        group_size, dtype = query.size(1) // key.size(1), sum_dtype(query.dtype)
        # The others wait for this rank's part, whatever its own gradients are.
        grad_out = torch.zeros_like(out) if grad_out is None else tensors.contiguous_rows(grad_out)
        delta = (out.to(dtype) * grad_out.to(dtype)).sum(-1).transpose(0, 1)
        delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
        around = [blocks.transfer.fetch(tensor, layout, _TO_OWNERS) for tensor in (key, value)]
        grad_query = torch.empty_like(query)
        grad_around = [torch.zeros_like(tensor, dtype=dtype) for tensor in around]
        for some in traffic.heads:
            wide = slice(some.start * group_size, some.stop * group_size)
            queries, keys, values = query[:, wide], around[0][:, some], around[1][:, some]
            grads = grad_out[:, wide]
            rows = _rows_to_send(choice[wide], blocks, group_size, options)
            trip = _Trip(rows, traffic, some, blocks, layout)
            # Of a row, what its other parts have changed: the softmax terms, and its product with the gradient.
            row_terms = torch.cat((terms[wide], delta[wide][..., None]), -1).flatten(0, 1)
            far_terms = trip.out(row_terms[rows.row], "softmax terms")
            far_query = trip.out(_select(queries, rows.row), "queries")[:, None]
            far_grads = trip.out(_select(grads, rows.row), "gradients")[:, None]
            no_out = far_grads.new_zeros((1, 1, far_grads.size(2))).expand(far_grads.shape)
            far = _ops.moba_attention_backward.default(
                far_grads, -far_terms[None, :, 2], far_query, _by_head(blocks.owned(keys)),
                _by_head(blocks.owned(values)), no_out, far_terms[None, :, 0].contiguous(),
                trip.out(rows.block_indices, "choices")[None], options.block_size, False, options.scale,
                *trip.sequences, options.deterministic, options.softcap, far_terms[None, :, :2].contiguous(),
            )  # fmt: skip
            total = _grad_at_home(
                grads, None if grad_lse is None else grad_lse[wide], queries, keys, values, out[:, wide], lse[wide],
                terms[wide], choice[wide], [gradient[:, some] for gradient in grad_around], blocks, options,
            )  # fmt: skip
            part = trip.back(far[0][:, 0], "gradients of queries")
            for number in range(int(rows.ordinal.max()) + 1 if rows.ordinal.numel() else 0):
                chosen = (rows.ordinal == number).nonzero()[:, 0]
                total[rows.row[chosen]] += part[chosen].to(dtype)
            grad_query[:, wide] = _by_token(total, queries.size(1)).to(query.dtype)
            for gradient, found in zip(grad_around, far[1:], strict=True):
                blocks.add_owned(gradient[:, some], _by_token(found[:, 0], some.stop - some.start))
        returned = (
            blocks.transfer.give_back(gradient, like, layout, _TO_OWNERS)
            for gradient, like in zip(grad_around, (key, value), strict=True)
        )
        return (grad_query, *returned, None, None, None, None)


def _bytes_of_row(query: Tensor, value: Tensor) -> int:
    """What a row takes where it is attended to, in the backward, which is more."""
    return 2 * (query.size(-1) + value.size(-1)) * query.element_size()


def _own_blocks(choice: Tensor, blocks: Blocks) -> Tensor:
    """``[heads, n, 1]``: each row's own block as its call of attention counts it, -1 where it was not chosen."""
    own = blocks.places.own_block.to(choice.device)
    return torch.where((choice == own[:, None]).any(-1, keepdim=True), blocks.home_choice(choice.device), -1)


def _at_home(
    queries: Tensor, keys: Tensor, values: Tensor, choice: Tensor, blocks: Blocks, options: Options
) -> _Merged:
    """Each row's own block; without a causal mask it is one of the others."""
    num_rows, dtype = queries.size(0) * queries.size(1), sum_dtype(queries.dtype)
    if not options.is_causal:
        lse = torch.full((num_rows,), -torch.inf, dtype=dtype, device=queries.device)
        terms = lse.new_tensor((0.0, torch.inf)).expand(num_rows, 2)
        return _Merged(queries.new_zeros((num_rows, values.size(2))), terms, lse)
    out, lse, terms = _ops.moba_attention.default(
        queries, keys, values, _own_blocks(choice, blocks), options.block_size, True, options.scale,
        *blocks.home_sequences(queries.device), options.deterministic, options.softcap,
    )  # fmt: skip
    return _Merged(_by_head(out)[:, 0], terms.flatten(0, 1), lse.flatten())


def _grad_at_home(
    grads: Tensor, grad_lse: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor,
    terms: Tensor, choice: Tensor, grad_around: list[Tensor], blocks: Blocks, options: Options,
) -> Tensor:  # fmt: skip
    """Rows' gradients of queries by their own blocks, ``[heads * tokens, D]``; those of keys and values are added."""
    dtype = sum_dtype(queries.dtype)
    if not options.is_causal:
        return queries.new_zeros((queries.size(0) * queries.size(1), queries.size(2)), dtype=dtype)
    found = _ops.moba_attention_backward.default(
        grads, grad_lse, queries, keys, values, out, lse.contiguous(), _own_blocks(choice, blocks),
        options.block_size, True, options.scale, *blocks.home_sequences(queries.device), options.deterministic,
        options.softcap, terms.contiguous(),
    )  # fmt: skip
    for total, gradient in zip(grad_around, found[1:], strict=True):
        total += gradient
    return _by_head(found[0])[:, 0].to(dtype)

"""Block attention over a sequence whose tokens are spread over the ranks of a group. See :func:`moba_attention`.

Steps of a forward, for some key heads at a time (``max_gathered_bytes``), the next ones travelling meanwhile:

1. an all-gather of keys and values: every rank has those of all tokens, in the order of positions;
2. for each stretch of this rank's tokens, from token s up to token e, :func:`topgather.moba_route` and the attention of
   queries s to e over keys 0 to e (over all keys without ``is_causal``). Queries are aligned to the end of the keys,
   and blocks are counted from key 0, so the choice is the one that a single process makes.

Kept for the backward is what a single process keeps of this rank's tokens. The backward gathers keys and values again,
and an all-to-all brings each rank the parts of its own keys' gradients, which it adds in the order of ranks in the
dtype of sums. What a rank sends, for N tokens over R ranks, head_dim D and value_dim Dv, s bytes a number:

========  ==========================================================================================
forward   ``(R - 1) * N / R * Hkv * (D + Dv) * s`` for each sequence of the batch
backward  the same, and gradients of the keys seen, at most as much
========  ==========================================================================================

With contiguous placement the gradients of keys that no query of the rank may see are not sent: half of them. With
zigzag placement ranks have equal work, and most of them see most keys.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from . import _collectives
from ._common import checks, tensors
from ._common.library import DTYPE_CODES, sum_dtype
from .ops import _moba_ops

PLACEMENTS = ("contiguous", "zigzag")
_ops = torch.ops.topgather


class _Stretch(NamedTuple):
    """Tokens of a rank that follow each other in the sequence."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class _Placement(NamedTuple):
    """Which tokens each rank of a group has, in the order in which it has them."""

    group: dist.ProcessGroup
    rank: int
    stretches: list[list[_Stretch]]

    @property
    def num_ranks(self) -> int:
        return len(self.stretches)

    @property
    def mine(self) -> list[_Stretch]:
        return self.stretches[self.rank]

    def num_tokens(self, rank: int) -> int:
        return sum(stretch.length for stretch in self.stretches[rank])

    @property
    def total(self) -> int:
        return sum(self.num_tokens(rank) for rank in range(self.num_ranks))


def _zigzag(num_tokens: int, num_ranks: int) -> list[list[_Stretch]]:
    """The sequence in 2 R stretches as equal as can be; rank r has stretches r and 2 R - 1 - r."""
    size, longer = divmod(num_tokens, 2 * num_ranks)
    starts = [i * size + min(i, longer) for i in range(2 * num_ranks + 1)]
    stretches = [_Stretch(start, end - start) for start, end in pairwise(starts)]
    return [[stretches[rank], stretches[2 * num_ranks - 1 - rank]] for rank in range(num_ranks)]


def _contiguous(lengths: list[int]) -> list[list[_Stretch]]:
    """One stretch a rank."""
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [[_Stretch(start, length)] for start, length in zip(starts, lengths, strict=True)]


def _group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; name one, as in mesh['cp']")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def _check_placement(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")


def shard_sequence(
    tensor: Tensor, mesh: DeviceMesh | dist.ProcessGroup, dim: int, placement: str = "contiguous"
) -> Tensor:
    """This rank's tokens of a tensor that has those of all ranks.

    Args:
        tensor: any shape, the same on all ranks.
        mesh: a mesh of one dimension, or a group.
        dim: the dimension of tokens.
        placement: ``"contiguous"``: rank r has the r-th of as many parts as there are ranks; ``"zigzag"``: the r-th of
            twice as many, and the r-th from the end, which balances the work of causal attention. Parts differ by at
            most one token, earlier ones being longer.

    Returns:
        A new tensor with fewer tokens. No communication; differentiable.

    Raises:
        TypeError: ``mesh`` is neither a mesh nor a group.
        ValueError: a mesh of several dimensions, or an unknown ``placement``.
    """
    checks.check_tensor("tensor", tensor)
    _check_placement(placement)
    group = _group_of(mesh)
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if placement == "contiguous":
        return tensor.tensor_split(num_ranks, dim)[rank].contiguous()
    return torch.cat([tensor.narrow(dim, *stretch) for stretch in _zigzag(tensor.size(dim), num_ranks)[rank]], dim)


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    block_size: int = 128,
    top_k: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    placement: str = "contiguous",
    cu_seqlens: Tensor | None = None,
    deterministic: bool | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    max_gathered_bytes: int = 1 << 30,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`topgather.moba_attention` of a sequence whose tokens are spread over ranks (context parallelism).

    Local tokens in, local tokens out. Blocks are chosen among those of the whole sequence, exactly as one process
    chooses them (MoBA, arXiv 2502.13189, section 2.2), and may lie across ranks; results differ from those of one
    process by the order of sums alone, and are the same bits every time where those of one process are. All ranks of
    the group must call it in the same order with the same options, forward and backward, one without tokens too.

    Args:
        query: ``[B, Hq, n, D]``, the ``n`` tokens of this rank; with ``cu_seqlens`` ``[n, Hq, D]``.
        key: ``[B, Hkv, n, D]`` of the same tokens; with ``cu_seqlens`` ``[n, Hkv, D]``.
        value: ``[B, Hkv, n, Dv]``; with ``cu_seqlens`` ``[n, Hkv, Dv]``.
        mesh: a mesh of one dimension, such as ``mesh["cp"]``, or a group.
        block_size, top_k, is_causal, scale, return_lse, deterministic, softcap: as in
            :func:`topgather.moba_attention`.
        placement: which tokens a rank has. ``"contiguous"``: any number each, in the order of ranks. ``"zigzag"``: two
            stretches, as :func:`shard_sequence` cuts them.
        cu_seqlens: int32 or int64 ``[num_sequences + 1]``, boundaries of packed sequences among the tokens of all
            ranks, the same on all. Read on the host.
        sinks: ``[Hq]``, as in :func:`topgather.moba_attention`; its gradient is that of this rank's tokens.
        max_gathered_bytes: bound on the gathered keys and values that a rank holds at a time, next ones included. At
            least one key head of all tokens is gathered.

    Returns:
        ``out [B, Hq, n, Dv]``, or ``[n, Hq, Dv]``, in query's dtype, and with ``return_lse`` also ``lse [B, Hq, n]``,
        or ``[Hq, n]``. Differentiable with respect to query, key, value and sinks, once; the gradient is that of the
        sum of the ranks' losses.

    Raises:
        TypeError: an argument of the wrong type or dtype, on every rank.
        ValueError: a wrong shape, device or option, ranks that differ in them, or numbers of tokens that are not those
            of ``placement`` or ``cu_seqlens``, on every rank.
    """
    group = _group_of(mesh)
    try:
        error = None
        _check(query, key, value, block_size, top_k, is_causal, scale, return_lse, placement, cu_seqlens)
        checks.OPTIONS["softcap"](softcap)
        checks.OPTIONS["sinks"](sinks)
        checks.check_count("max_gathered_bytes", max_gathered_bytes)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        checks.check_flag("deterministic", deterministic)
        scale = float(query.size(-1) ** -0.5 if scale is None else scale)
        bounds = None if cu_seqlens is None else [int(bound) for bound in cu_seqlens.tolist()]
        facts = {
            "whether a gradient is asked for": int(
                torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
            ),
            "dtype (by its code)": DTYPE_CODES[query.dtype],
            "batch": query.size(0) if bounds is None else -1,
            "query heads": query.size(1),
            "key heads": key.size(1),
            "head_dim": query.size(-1),
            "value_dim": value.size(-1),
            "block_size": block_size,
            "top_k": -1 if top_k is None else top_k,
            "is_causal": int(is_causal),
            "scale (its bits)": _bits(scale),
            "softcap (its bits)": _bits(softcap),
            "placement": PLACEMENTS.index(placement),
            "max_gathered_bytes": max_gathered_bytes,
            "deterministic": int(deterministic),
            "cu_seqlens (a checksum)": _checksum(bounds),
        }
    except (TypeError, ValueError) as raised:
        error, facts, bounds = raised, {}, None
    lengths = _agree(group, error, facts, query, is_packed=bounds is not None)
    layout = _placement_of(placement, group, lengths)
    if bounds is not None and bounds[-1] != layout.total:
        raise ValueError(f"cu_seqlens must end with the ranks' tokens together, {layout.total}, got {bounds[-1]}")
    options = _Options(
        block_size, top_k, is_causal, float(scale or 0), bool(deterministic), softcap, max_gathered_bytes
    )
    out, lse = _Attention.apply(query, key, value, layout, bounds, options)
    if sinks is not None:
        # As ops/_moba_ops.py says it; a query that sees no key has an output of 0 whatever its share is.
        logits = sinks.to(lse.dtype)[:, None]
        is_nothing = (lse == -torch.inf) & (logits == -torch.inf)
        share = torch.sigmoid((lse - logits).masked_fill(is_nothing, torch.inf))
        share = share.transpose(0, 1) if bounds is not None else share
        out = (out * share[..., None]).to(out.dtype)
    return (out, lse) if return_lse else out


# --- what ranks must agree on ---------------------------------------------------------------------------------------

NUM_FACTS = 16


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    top_k: int | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    placement: str,
    cu_seqlens: Tensor | None,
) -> None:
    _check_placement(placement)
    layout = "[batch, heads, tokens, dim]" if cu_seqlens is None else "[tokens, heads, dim]"
    tokens_dim = 2 if cu_seqlens is None else 0
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
        checks.check_ndim(name, tensor, 4 if cu_seqlens is None else 3, layout)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.size(tokens_dim) != query.size(tokens_dim):
            raise ValueError(f"{name} must have query's {query.size(tokens_dim)} tokens, got {tensor.size(tokens_dim)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    if key.size(1) == 0 or query.size(1) % key.size(1) != 0:
        raise ValueError(f"query's heads must be a multiple of key's, got {query.size(1)} and {key.size(1)}")
    if value.size(1) != key.size(1):
        raise ValueError(f"value must have key's {key.size(1)} heads, got {value.size(1)}")
    if key.size(-1) != query.size(-1) or query.size(-1) == 0:
        raise ValueError(f"key must have query's head_dim {query.size(-1)}, at least 1, got {key.size(-1)}")
    if cu_seqlens is None and not query.size(0) == key.size(0) == value.size(0):
        raise ValueError(f"key and value must have query's batch {query.size(0)}, got {key.size(0)}, {value.size(0)}")
    checks.check_count("block_size", block_size)
    if top_k is not None:
        checks.check_count("top_k", top_k)
    checks.check_flag("is_causal", is_causal)
    checks.check_scale(scale)
    checks.check_flag("return_lse", return_lse)
    if cu_seqlens is not None:
        checks.check_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        checks.check_ndim("cu_seqlens", cu_seqlens, 1, "[num_sequences + 1]")
        if cu_seqlens.numel() == 0 or int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError("cu_seqlens must begin with 0 and not descend")


def _bits(number: float | None) -> int:
    return -1 if number is None else int.from_bytes(struct.pack("<d", number), "little", signed=True)


def _checksum(bounds: list[int] | None) -> int:
    return -1 if bounds is None else hash(tuple(bounds)) & (1 << 62) - 1


def _agree(
    group: dist.ProcessGroup, error: Exception | None, facts: dict[str, int], query: Any, *, is_packed: bool
) -> list[int]:
    """The tokens of each rank. What one rank refuses, and what ranks differ in, raises here on all of them."""
    # Not the tensors': what one rank passes may be no tensor, or on another device.
    is_nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    num_tokens = 0 if error is not None else query.size(0 if is_packed else 2)
    numbers = [int(error is not None), num_tokens, *facts.values()]
    numbers += [0] * (2 + NUM_FACTS - len(numbers))
    has_error, lengths, *others = _collectives.gather_numbers(numbers, group, device)
    if any(has_error):
        # Rare, and the same on all ranks: what was refused, in words.
        texts: list[tuple[str, str] | None] = [None] * len(has_error)
        dist.all_gather_object(texts, None if error is None else (type(error).__name__, str(error)), group=group)
        if error is not None:
            raise error
        rank = has_error.index(1)
        kind, text = texts[rank] or ("ValueError", "")
        raise (TypeError if kind == "TypeError" else ValueError)(f"rank {rank} of the group was refused: {text}")
    _collectives.require_same(facts, others)
    return lengths


def _placement_of(placement: str, group: dist.ProcessGroup, lengths: list[int]) -> _Placement:
    rank = dist.get_rank(group)
    if placement == "contiguous":
        return _Placement(group, rank, _contiguous(lengths))
    found = _Placement(group, rank, _zigzag(sum(lengths), len(lengths)))
    expected = [found.num_tokens(other) for other in range(len(lengths))]
    if lengths != expected:
        raise ValueError(f"zigzag placement of {sum(lengths)} tokens gives the ranks {expected}, got {lengths}")
    return found


# --- what a rank's tokens attend to ---------------------------------------------------------------------------------


class _Options(NamedTuple):
    block_size: int
    top_k: int | None
    is_causal: bool
    scale: float
    deterministic: bool
    softcap: float | None
    max_gathered_bytes: int


class _Part(NamedTuple):
    """A call of the attention: some of the rank's queries and a range of the gathered keys.

    ``sequences`` is what the ops take of packed sequences, or nothing of a dense batch.
    """

    queries: slice
    keys: slice
    sequences: tuple[Tensor | None, Tensor | None, int, int]


_DENSE = (None, None, 0, 0)


def _parts(layout: _Placement, bounds: list[int] | None, is_causal: bool, device: torch.device) -> list[_Part]:
    parts, first = [], 0
    for stretch in layout.mine:
        queries = slice(first, first + stretch.length)
        first += stretch.length
        if stretch.length == 0:
            continue
        if bounds is None:
            parts.append(_Part(queries, slice(0, stretch.end if is_causal else layout.total), _DENSE))
            continue
        within = [(start, end) for start, end in pairwise(bounds) if max(start, stretch.start) < min(end, stretch.end)]
        num_queries = [min(end, stretch.end) - max(start, stretch.start) for start, end in within]
        num_keys = [(min(end, stretch.end) if is_causal else end) - start for start, end in within]
        keys = slice(within[0][0], within[0][0] + sum(num_keys))
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, *numbers], dtype=torch.int64).cumsum(0).to(device) for numbers in (num_queries, num_keys)
        )
        parts.append(_Part(queries, keys, (cu_seqlens_q, cu_seqlens_k, max(num_queries), max(num_keys))))
    return parts


def _seen(layout: _Placement, bounds: list[int] | None, is_causal: bool, rank: int) -> list[tuple[int, int]]:
    """The ranges of keys that a rank's calls take: what it has gradients of."""
    other = layout._replace(rank=rank)
    return [(part.keys.start, part.keys.stop) for part in _parts(other, bounds, is_causal, torch.device("cpu"))]


def _overlap(stretch: _Stretch, seen: list[tuple[int, int]]) -> _Stretch:
    """From the first to the last token of the stretch that is seen."""
    clipped = [(max(stretch.start, start), min(stretch.end, end)) for start, end in seen]
    clipped = [(start, end) for start, end in clipped if start < end]
    if not clipped:
        return _Stretch(stretch.start, 0)
    start = min(start for start, _ in clipped)
    return _Stretch(start, max(end for _, end in clipped) - start)


# --- what is sent ---------------------------------------------------------------------------------------------------


class _Gathering:
    """Keys or values of some heads, on their way from all ranks."""

    def __init__(self, tensor: Tensor, layout: _Placement, tokens_dim: int) -> None:
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
            self.work = _collectives.all_gather(
                self.received.view(-1), self.sent.view(-1), group=layout.group, async_op=True
            )

    def finish(self) -> Tensor:
        """All tokens, in the order of positions."""
        if self.work is not None:
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


def _gathered(
    key: Tensor, value: Tensor, layout: _Placement, heads: list[slice], tokens_dim: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of key heads with the keys and values of all tokens; those of the next slice travel meanwhile."""

    def begin(some: slice) -> tuple[_Gathering, _Gathering]:
        return tuple(_Gathering(tensor[:, some], layout, tokens_dim) for tensor in (key, value))  # type: ignore[return-value]

    under_way = begin(heads[0])
    for index, some in enumerate(heads):
        arrived = under_way
        if index + 1 < len(heads):
            under_way = begin(heads[index + 1])
        yield some, arrived[0].finish(), arrived[1].finish()


def _slices_of_heads(key: Tensor, value: Tensor, layout: _Placement, max_bytes: int) -> list[slice]:
    """As many key heads at a time as two slices of, as sent, received and in order, fit in ``max_bytes``."""
    batch = key.size(0) if key.dim() == 4 else 1
    longest = max(layout.num_tokens(rank) for rank in range(layout.num_ranks))
    bytes_of_head = batch * (key.size(-1) + value.size(-1)) * key.element_size()
    held = bytes_of_head * (2 * longest * (layout.num_ranks + 1) + layout.total)
    step = max(1, min(key.size(1), max_bytes // max(held, 1)))
    return [slice(first, min(first + step, key.size(1))) for first in range(0, key.size(1), step)]


def _return_gradients(
    grad: Tensor, like: Tensor, layout: _Placement, seen: list[list[tuple[int, int]]], tokens_dim: int
) -> Tensor:
    """The sum over ranks, in their order, of what each has for this rank's tokens. ``grad`` has all tokens."""
    rank = layout.rank

    def flat(stretches: list[_Stretch]) -> list[Tensor]:
        return [grad.narrow(tokens_dim, *stretch).reshape(-1) for stretch in stretches]

    numbers_a_token = grad.numel() // max(layout.total, 1)
    to_send = [[_overlap(stretch, seen[rank]) for stretch in stretches] for stretches in layout.stretches]
    to_receive = [[_overlap(stretch, seen[other]) for stretch in layout.mine] for other in range(layout.num_ranks)]
    sent = torch.cat([part for stretches in to_send for part in flat(stretches)])
    sent_sizes, received_sizes = (
        [numbers_a_token * sum(stretch.length for stretch in stretches) for stretches in of_ranks]
        for of_ranks in (to_send, to_receive)
    )
    received = _collectives.all_to_all(sent, sent_sizes, received_sizes, layout.group)
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


class _Attention(torch.autograd.Function):
    """Both results of the rank's tokens, from tensors of the rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: _Placement,
        bounds: list[int] | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (tensors.contiguous_rows(tensor.detach()) for tensor in (query, key, value))
        is_packed = bounds is not None
        tokens_dim, group_size = (0 if is_packed else 2), query.size(1) // key.size(1)
        out, lse, terms = _moba_ops._attention(query, value)
        parts = _parts(layout, bounds, options.is_causal, query.device)
        heads = _slices_of_heads(key, value, layout, options.max_gathered_bytes)
        choices = []
        for some, all_keys, all_values in _gathered(key, value, layout, heads, tokens_dim):
            wide = slice(some.start * group_size, some.stop * group_size)
            for part in parts:
                queries = _at(query, part.queries, wide, is_packed)
                keys, values = (_at(tensor, part.keys, slice(None), is_packed) for tensor in (all_keys, all_values))
                longest = part.sequences[3] if is_packed else keys.size(2)
                slots = _moba_ops.num_slots(options.top_k, longest, options.block_size)
                chosen = _ops.moba_route.default(
                    queries, keys, options.block_size, slots, options.is_causal, *part.sequences
                )
                results = _ops.moba_attention.default(
                    queries, keys, values, chosen, options.block_size, options.is_causal, options.scale,
                    *part.sequences, options.deterministic, options.softcap,
                )  # fmt: skip
                _at(out, part.queries, wide, is_packed).copy_(results[0])
                for whole, result in ((lse, results[1]), (terms, results[2])):
                    _rows_at(whole, part.queries, wide, is_packed).copy_(result)
                choices.append(chosen)
        ctx.save_for_backward(query, key, value, out, lse, terms, *choices)
        ctx.calls = layout, bounds, options, parts, heads
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, terms, *choices = ctx.saved_tensors
        layout, bounds, options, parts, heads = ctx.calls
        is_packed = bounds is not None
        tokens_dim, group_size = (0 if is_packed else 2), query.size(1) // key.size(1)
        # The others wait for this rank's part, whatever its own gradients are.
        grad_out = torch.zeros_like(out) if grad_out is None else tensors.contiguous_rows(grad_out)
        seen = [_seen(layout, bounds, options.is_causal, rank) for rank in range(layout.num_ranks)]
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        remaining = iter(choices)
        for some, all_keys, all_values in _gathered(key, value, layout, heads, tokens_dim):
            wide = slice(some.start * group_size, some.stop * group_size)
            # Stretches see keys in common: their gradients are added here, in the dtype of sums.
            sums = [torch.zeros_like(tensor, dtype=sum_dtype(tensor.dtype)) for tensor in (all_keys, all_values)]
            for part in parts:
                keys, values = (_at(tensor, part.keys, slice(None), is_packed) for tensor in (all_keys, all_values))
                of_lse = None if grad_lse is None else _rows_at(grad_lse, part.queries, wide, is_packed).contiguous()
                found = _ops.moba_attention_backward.default(
                    _at(grad_out, part.queries, wide, is_packed), of_lse,
                    _at(query, part.queries, wide, is_packed), keys, values,
                    _at(out, part.queries, wide, is_packed),
                    _rows_at(lse, part.queries, wide, is_packed).contiguous(), next(remaining),
                    options.block_size, options.is_causal, options.scale, *part.sequences, options.deterministic,
                    options.softcap, _rows_at(terms, part.queries, wide, is_packed).contiguous(),
                )  # fmt: skip
                _at(gradients[0], part.queries, wide, is_packed).copy_(found[0])
                for total, gradient in zip(sums, found[1:], strict=True):
                    _at(total, part.keys, slice(None), is_packed).add_(gradient)
            for gradient, total, tensor in zip(gradients[1:], sums, (key, value), strict=True):
                returned = _return_gradients(total.to(tensor.dtype), tensor[:, some], layout, seen, tokens_dim)
                gradient[:, some] = returned
        return (*gradients, None, None, None)


def _at(tensor: Tensor, tokens: slice, heads: slice, is_packed: bool) -> Tensor:
    """Some tokens and heads of ``[B, H, N, D]``, or of ``[N, H, D]``."""
    return tensor[tokens, heads] if is_packed else tensor[:, heads, tokens]


def _rows_at(tensor: Tensor, tokens: slice, heads: slice, is_packed: bool) -> Tensor:
    """The same of what stands once a head and query, ``[B, H, N, ...]`` or ``[H, N, ...]``."""
    return tensor[heads, tokens] if is_packed else tensor[:, heads, tokens]

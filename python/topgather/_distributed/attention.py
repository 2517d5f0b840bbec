"""Block attention over a sequence whose tokens are spread over the ranks of a group. See :func:`moba_attention`.

What ranks must agree on is agreed on here; :mod:`gather` and :mod:`exchange` are the two ways that tensors travel.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._common import checks, tensors
from .._common.library import DTYPE_CODES
from .._common.transforms import refuse_transforms
from ..ops import _moba_ops, replay
from . import collectives, exchange, gather
from .gather import Choice, Options
from .placement import PLACEMENTS, Placement, Stretch, check_placement, group_of, placement_of
from .plan import METHODS, Shapes, cheaper


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
    method: str | None = None,
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
        max_gathered_bytes: bound on what of others a rank holds at a time, for which some key heads go after others: of
            gathered keys and values, next ones included, or of exchanged rows. At least one key head is attended to.
        method: what travels. ``"gather"``: keys and values of all tokens, to every rank. ``"exchange"``: queries, to
            the ranks that have the blocks they chose, and their outputs back. None: what sends fewer bytes, by shapes
            alone (:func:`plan` has the formulas).

    Returns:
        ``out [B, Hq, n, Dv]``, or ``[n, Hq, Dv]``, in query's dtype, and with ``return_lse`` also ``lse [B, Hq, n]``,
        or ``[Hq, n]``. Differentiable with respect to query, key, value and sinks, once; the gradient is that of the
        sum of the ranks' losses.

    Raises:
        TypeError: an argument of the wrong type or dtype, on every rank.
        ValueError: a wrong shape, device or option, ranks that differ in them, or numbers of tokens that are not those
            of ``placement`` or ``cu_seqlens``, on every rank.
    """
    refuse_transforms("distributed.moba_attention", "ranks send each other tokens")
    group = group_of(mesh)
    query, key, value = (_as_autocast_has_it(tensor) for tensor in (query, key, value))
    try:
        error = None
        _check(query, key, value, block_size, top_k, is_causal, scale, return_lse, placement, cu_seqlens)
        checks.OPTIONS["softcap"](softcap)
        checks.OPTIONS["sinks"](sinks)
        checks.check_count("max_gathered_bytes", max_gathered_bytes)
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        checks.check_flag("deterministic", deterministic)
        scale = float(query.size(-1) ** -0.5 if scale is None else scale)
        bounds = None if cu_seqlens is None else [int(bound) for bound in cu_seqlens.tolist()]
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        facts = {
            "whether a gradient is asked for": int(needs_grad),
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
            "method": -1 if method is None else METHODS.index(method),
            "cu_seqlens (a checksum)": _checksum(bounds),
        }
        call, chosen, is_noted = None, None, False
        if top_k is not None and replay.state.is_watched:
            call = replay.Call(_moba_ops.per_query(query), key.size(1), None, block_size, top_k, query.device)
            chosen, is_noted = replay.given(call)
        facts["record_routing or replay_routing"] = 2 if chosen is not None else int(is_noted)
    except (TypeError, ValueError) as raised:
        error, facts, bounds, needs_grad = raised, {}, None, False
    lengths = _agree(group, error, facts, query, is_packed=bounds is not None)
    layout = placement_of(placement, group, lengths)
    if bounds is not None and bounds[-1] != layout.total:
        raise ValueError(f"cu_seqlens must end with the ranks' tokens together, {layout.total}, got {bounds[-1]}")
    choice = Choice()
    if chosen is not None:
        choice = Choice(given=_checked_choice(chosen, query, layout, bounds, block_size, is_causal))
    elif is_noted:
        longest = layout.total if bounds is None else max((end - start for start, end in pairwise(bounds)), default=0)
        slots = _moba_ops.num_slots(top_k, longest, block_size)
        shape = _moba_ops.per_query(query, slots)
        choice = Choice(made=torch.full(shape, -1, dtype=torch.int32, device=query.device))
    options = Options(block_size, top_k, is_causal, float(scale or 0), bool(deterministic), softcap, max_gathered_bytes)
    if method is None:
        batch = query.size(0) if bounds is None else 1
        method = cheaper(
            Shapes(
                lengths, batch, query.size(1), key.size(1), query.size(-1), value.size(-1), query.dtype,
                block_size, top_k, is_causal,
            ),
            with_backward=needs_grad,
        )  # fmt: skip
    if method == "gather" or layout.total == 0 or query.size(1) * (1 if bounds is not None else query.size(0)) == 0:
        out, lse = gather.Attention.apply(query, key, value, layout, bounds, options, choice)
    elif bounds is not None:
        out, lse = exchange.Attention.apply(query, key, value, layout, bounds, options, choice)
    else:
        out, lse = _exchange_batch(query, key, value, layout, options, choice)
    if choice.made is not None and call is not None:
        replay.note(choice.made, call)
    if sinks is not None:
        # As ops/_moba_ops.py says it; a query that sees no key has an output of 0 whatever its share is.
        logits = sinks.to(lse.dtype)[:, None]
        is_nothing = (lse == -torch.inf) & (logits == -torch.inf)
        share = torch.sigmoid((lse - logits).masked_fill(is_nothing, torch.inf))
        share = share.transpose(0, 1) if bounds is not None else share
        out = (out * share[..., None]).to(out.dtype)
    return (out, lse) if return_lse else out


def _as_autocast_has_it(tensor: Any) -> Any:
    """A tensor as :func:`topgather.moba_attention` takes it under autocast; what is none is refused later."""
    if not isinstance(tensor, Tensor) or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensors.autocast(tensor, tensor.device.type)


def _exchange_batch(
    query: Tensor, key: Tensor, value: Tensor, layout: Placement, options: Options, choice: Choice
) -> tuple[Tensor, Tensor]:
    """A batch as packed sequences of one length, of which a rank has the same stretches each."""
    batch, _, num_tokens, _ = query.shape
    bounds = [entry * layout.total for entry in range(batch + 1)]
    stretches = [
        [Stretch(first + stretch.start, stretch.length) for first in bounds[:-1] for stretch in of_rank]
        for of_rank in layout.stretches
    ]
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    # [B, Hq, n, slots] and [Hq, B * n, slots].
    given, made = (None if rows is None else rows.transpose(0, 1).flatten(1, 2) for rows in choice)
    placed = layout._replace(stretches=stretches)
    out, lse = exchange.Attention.apply(*packed, placed, bounds, options, Choice(given, made))
    if choice.made is not None and made is not None:
        choice.made.copy_(made.unflatten(1, (batch, num_tokens)).transpose(0, 1))
    out = out.unflatten(0, (batch, num_tokens)).transpose(1, 2)
    if query.stride(1) >= query.stride(2):
        out = out.contiguous()
    return out, lse.unflatten(1, (batch, num_tokens)).transpose(0, 1).contiguous()


# --- what ranks must agree on ---------------------------------------------------------------------------------------

NUM_FACTS = 18


def _checked_choice(
    chosen: Tensor, query: Tensor, layout: Placement, bounds: list[int] | None, block_size: int, is_causal: bool
) -> Tensor:
    """A choice that this rank's queries were given, ``[B, Hq, n, slots]`` or ``[Hq, n, slots]``, without future blocks.

    Raises:
        IndexError: a block that does not exist, on every rank.
        ValueError: a block twice in a row, on every rank.
    """
    edges = torch.tensor([0, layout.total] if bounds is None else bounds, device="cpu")
    positions = torch.cat([torch.arange(stretch.start, stretch.end, device="cpu") for stretch in layout.mine])
    sequence = torch.searchsorted(edges, positions, right=True) - 1
    own = ((positions - edges[sequence]) // block_size).to(chosen.device)[:, None]
    counts = ((edges.diff()[sequence] + block_size - 1) // block_size).to(chosen.device)[:, None]
    error: Exception | None = None
    if bool(((chosen < -1) | (chosen >= counts)).any()):
        error = IndexError("record must name blocks that exist, -1 for none, got others")
    elif _moba_ops.repeated_blocks(chosen).numel() > 0:
        error = ValueError("record must name a block once for a query, got one twice")
    what = "agreeing on the choice of a record"
    device = collectives.agreement_device(layout.group)
    (has_error,) = collectives.gather_numbers([int(error is not None)], layout.group, device, what)
    collectives.raise_everywhere(error, has_error, layout.group, what)
    num_heads, of_heads = query.size(1), chosen.size(-3)
    chosen = chosen.repeat_interleave(num_heads // of_heads, dim=-3) if of_heads < num_heads else chosen
    return chosen.masked_fill(chosen > own, -1) if is_causal else chosen


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
    check_placement(placement)
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
    num_tokens = 0 if error is not None else query.size(0 if is_packed else 2)
    numbers = [int(error is not None), num_tokens, *facts.values()]
    numbers += [0] * (2 + NUM_FACTS - len(numbers))
    what = "agreeing on a call of moba_attention"
    device = collectives.agreement_device(group)
    has_error, lengths, *others = collectives.gather_numbers(numbers, group, device, what)
    collectives.raise_everywhere(error, has_error, group, what)
    collectives.require_same(facts, others)
    return lengths

"""What the tests share: problems, their inputs in every memory layout, and checks against the float64 oracle.

The checks raise AssertionError; ``test_helpers.py`` plants wrong data and demands that they do.
"""

from dataclasses import dataclass, fields
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import assert_close, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference
from topgather.reference.moba import visible_keys

LAYOUTS = ["contiguous", "transposed", "offset", "padded_rows", "expanded_batch", "fused_qkv"]


@dataclass(frozen=True)
class AttentionCase:
    """One problem size. ``value_dim`` and ``num_kv_heads`` of None mean head_dim and num_heads."""

    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int | None = None
    query_len: int = 64
    key_len: int | None = None
    head_dim: int = 16
    value_dim: int | None = None
    block_size: int = 16
    top_k: int = 2
    is_causal: bool = True
    scale: float | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def keys(self) -> int:
        return self.query_len if self.key_len is None else self.key_len

    @property
    def value_head_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def num_blocks(self) -> int:
        return -(-self.keys // self.block_size)

    def __str__(self) -> str:
        """Test id: the fields that differ from the default."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "default"


@dataclass
class AttentionResult:
    """Everything one forward and backward pass gives."""

    out: Tensor
    lse: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values ``[B, H, N, D]`` with other strides or another offset; last dimension contiguous."""
    batch, num_heads, length, head_dim = tensor.shape
    if layout in ("contiguous", "fused_qkv"):
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        # One element past the allocation's start: aligned to the element and to nothing wider.
        storage = tensor.new_empty(tensor.numel() + 1)
        view = storage[1:].view(tensor.shape)
        view.copy_(tensor)
        return view
    if layout == "padded_rows":
        storage = tensor.new_full((batch, num_heads + 1, length + 2, head_dim + 3), float("nan"))
        view = storage[:, 1:, 1 : length + 1, 2 : head_dim + 2]
        view.copy_(tensor)
        return view
    if layout == "expanded_batch":
        return tensor[:1].clone().expand(batch, -1, -1, -1)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int = 0, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value of ``case``, leaves that require grad, in the given layout."""
    query = random_tensor((case.batch, case.num_heads, case.query_len, case.head_dim), dtype, device, seed)
    key = random_tensor((case.batch, case.kv_heads, case.keys, case.head_dim), dtype, device, seed + 1)
    value = random_tensor((case.batch, case.kv_heads, case.keys, case.value_head_dim), dtype, device, seed + 2)
    if layout == "fused_qkv":
        # One projection's output [B, N, Hq + 2 * Hkv, D], cut into three views.
        fused = torch.cat([query, key, value], dim=1).transpose(1, 2).contiguous()
        sizes = [case.num_heads, case.kv_heads, case.kv_heads]
        query, key, value = (part.transpose(1, 2) for part in fused.split(sizes, dim=2))
    else:
        query, key, value = (with_layout(tensor, layout) for tensor in (query, key, value))
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def make_gradients(case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    shape = (case.batch, case.num_heads, case.query_len)
    grad_out = random_tensor((*shape, case.value_head_dim), dtype, device, seed + 3)
    return grad_out, random_tensor(shape, accumulation_dtype(dtype), device, seed + 4)


def run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    case: AttentionCase,
    routing: "tg.BlockRouting | None" = None,
    deterministic: bool | None = None,
) -> AttentionResult:
    """Forward and backward of the op under test."""
    out, lse = tg.moba_attention(
        query,
        key,
        value,
        block_size=case.block_size,
        top_k=case.top_k if routing is None else None,
        is_causal=case.is_causal,
        scale=case.scale,
        return_lse=True,
        routing=routing,
        deterministic=deterministic,
    )
    gradients = torch.autograd.grad((out, lse), (query, key, value), (grad_out, grad_lse))
    return AttentionResult(out.detach(), lse.detach(), *gradients)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    block_indices: Tensor,
    case: AttentionCase,
) -> AttentionResult:
    """Forward and backward of the oracle on the given support."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    out, lse = reference.moba_attention(*leaves, block_indices, case.block_size, case.is_causal, case.scale)
    gradients = torch.autograd.grad((out, lse), leaves, (grad_out.double(), grad_lse.double()))
    return AttentionResult(out.detach(), lse.detach(), *gradients)


@dataclass
class Magnitudes:
    """Root sum of squares of the terms of each element of each result, and 1 + the largest |score|."""

    by_name: dict[str, Tensor]
    score_factor: float


def attention_magnitudes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    block_indices: Tensor,
    case: AttentionCase,
) -> Magnitudes:
    """How large the terms are that rounding errors of each result are proportional to (float64).

    Non-finite inputs count as 0: they make results that are compared by their NaN and inf masks alone.
    """
    finite = (torch.nan_to_num(tensor.detach().double(), 0.0, 0.0, 0.0) for tensor in (query, key, value, grad_out))
    query, key, value, grad_out = finite
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale

    visible = visible_keys(block_indices, key.shape[2], case.block_size, case.is_causal)
    sees_any = visible.any(dim=-1, keepdim=True)
    scores = torch.where(visible, query @ key.transpose(-2, -1) * scale, -torch.inf)
    weights = torch.where(sees_any & visible, torch.where(sees_any, scores, 0.0).softmax(dim=-1), 0.0)
    out = weights @ value

    def root_sum_square(left: Tensor, right: Tensor) -> Tensor:
        return (left.square() @ right.square()).sqrt()

    dot_magnitude = root_sum_square(query, key.transpose(-2, -1)) * abs(scale)
    largest = torch.where(visible, scores.abs() + dot_magnitude, 0.0)
    score_factor = 1.0 + (float(largest.max()) if largest.numel() else 0.0)

    d_weights = grad_out @ value.transpose(-2, -1)
    row_dot_magnitude = root_sum_square(grad_out[..., None, :], out[..., None])[..., 0]
    row_terms = (
        (grad_out * out).sum(dim=-1, keepdim=True).abs() + row_dot_magnitude + grad_lse.double().abs()[..., None]
    )
    d_scores = weights * (d_weights.abs() + root_sum_square(grad_out, value.transpose(-2, -1)) + row_terms)
    # The error of a row's dot product with grad_out is shared by all its scores: it adds up with their signs.
    shared = row_dot_magnitude * (weights @ key).abs()

    def over_group(magnitude: Tensor) -> Tensor:
        batch, num_heads, *rest = magnitude.shape
        return magnitude.square().reshape(batch, num_heads // group, group, *rest).sum(dim=2).sqrt()

    return Magnitudes(
        {
            "out": root_sum_square(weights, value),
            "lse": torch.ones(query.shape[:3], dtype=torch.float64, device=query.device),
            "d_query": (root_sum_square(d_scores, key) + shared) * abs(scale),
            "d_key": over_group(root_sum_square(d_scores.transpose(-2, -1), query)) * abs(scale),
            "d_value": over_group(root_sum_square(weights.transpose(-2, -1), grad_out)),
        },
        score_factor,
    )


def assert_attention_close(
    actual: AttentionResult,
    inputs: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    block_indices: Tensor,
    case: AttentionCase,
) -> None:
    """Every result of the op equals the oracle's on the same support, up to the table's tolerance."""
    dtype = inputs[0].dtype
    expected = reference_attention(*inputs, *gradients, block_indices, case).tensors()
    magnitudes = attention_magnitudes(*inputs, *gradients, block_indices, case)
    group = case.num_heads // case.kv_heads if case.kv_heads else 1
    forward_length = case.head_dim + case.keys
    backward_length = forward_length + case.value_head_dim + group * case.query_len
    result_dtype = dict.fromkeys(expected, dtype) | {"lse": accumulation_dtype(dtype)}
    for name, tensor in actual.tensors().items():
        assert tensor.dtype == result_dtype[name], f"{name}: dtype {tensor.dtype}, expected {result_dtype[name]}"
        assert_close(
            name,
            tensor,
            expected[name],
            magnitudes.by_name[name],
            TOLERANCES["moba_attention", name],
            dtype,
            backward_length if name.startswith("d_") else forward_length,
            magnitudes.score_factor,
        )


def check_attention(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
    deterministic: bool | None = None,
) -> AttentionResult:
    """Route, attend and differentiate a random problem; check the choice, then every result on it."""
    inputs = make_inputs(case, dtype, device, seed, layout)
    gradients = make_gradients(case, dtype, device, seed)
    query, key, _ = (tensor.detach() for tensor in inputs)
    routing = tg.moba_route(query, key, case.block_size, case.top_k, case.is_causal)
    assert_routing_contract(routing.block_indices, query, key, case.block_size, case.top_k, case.is_causal)
    result = run_attention(*inputs, *gradients, case, deterministic=deterministic)
    assert_attention_close(result, inputs, gradients, routing.block_indices, case)
    return result


class Packed:
    """A packed problem, and each sequence's dense part of any packed tensor."""

    def __init__(
        self,
        lengths: tuple[list[int], list[int]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        value_dim: int = 12,
        cu_dtype: torch.dtype = torch.int32,
    ) -> None:
        self.lengths_q, self.lengths_k = lengths
        self.starts_q = list(accumulate(self.lengths_q, initial=0))
        self.starts_k = list(accumulate(self.lengths_k, initial=0))
        total_q, total_k = self.starts_q[-1], self.starts_k[-1]
        self.query = random_tensor((total_q, num_heads, head_dim), dtype, device, 0).requires_grad_()
        self.key = random_tensor((total_k, num_kv_heads, head_dim), dtype, device, 1).requires_grad_()
        self.value = random_tensor((total_k, num_kv_heads, value_dim), dtype, device, 2).requires_grad_()
        self.grad_out = random_tensor((total_q, num_heads, value_dim), dtype, device, 3)
        self.grad_lse = random_tensor((num_heads, total_q), accumulation_dtype(dtype), device, 4)
        self.cu_seqlens = (
            torch.tensor(self.starts_q, dtype=cu_dtype, device=device),
            torch.tensor(self.starts_k, dtype=cu_dtype, device=device),
            max(self.lengths_q, default=0),
            max(self.lengths_k, default=0),
        )
        self.dims = (num_heads, num_kv_heads, head_dim, value_dim)

    def case(self, seq_idx: int, block_size: int, top_k: int, is_causal: bool) -> AttentionCase:
        num_heads, num_kv_heads, head_dim, value_dim = self.dims
        query_len, key_len = self.lengths_q[seq_idx], self.lengths_k[seq_idx]
        return AttentionCase(
            1, num_heads, num_kv_heads, query_len, key_len, head_dim, value_dim, block_size, top_k, is_causal
        )

    def tokens(self, tensor: Tensor, seq_idx: int, of_key: bool = False) -> Tensor:
        """``[total, H, D]`` to ``[1, H, N, D]``."""
        starts = self.starts_k if of_key else self.starts_q
        return tensor[starts[seq_idx] : starts[seq_idx + 1]].transpose(0, 1)[None]

    def columns(self, tensor: Tensor, seq_idx: int) -> Tensor:
        """``[H, total, ...]`` to ``[1, H, N, ...]``."""
        return tensor[:, self.starts_q[seq_idx] : self.starts_q[seq_idx + 1]][None]

    def run(
        self,
        block_size: int,
        top_k: int | None,
        is_causal: bool,
        routing: "tg.BlockRouting | None" = None,
        deterministic: bool | None = None,
    ) -> AttentionResult:
        out, lse = tg.moba_attention_varlen(
            self.query,
            self.key,
            self.value,
            *self.cu_seqlens,
            block_size=block_size,
            top_k=top_k,
            is_causal=is_causal,
            return_lse=True,
            routing=routing,
            deterministic=deterministic,
        )
        leaves = (self.query, self.key, self.value)
        gradients = torch.autograd.grad((out, lse), leaves, (self.grad_out, self.grad_lse))
        return AttentionResult(out.detach(), lse.detach(), *gradients)

    def check(
        self, result: AttentionResult, block_indices: Tensor, block_size: int, top_k: int, is_causal: bool
    ) -> None:
        """Every sequence's part of every result, against the oracle on that sequence alone."""
        total_q, num_heads, value_dim = self.grad_out.shape
        assert result.out.shape == (total_q, num_heads, value_dim) and result.lse.shape == (
            num_heads,
            total_q,
        )
        for seq_idx in range(len(self.lengths_q)):
            part = AttentionResult(
                self.tokens(result.out, seq_idx),
                self.columns(result.lse, seq_idx),
                self.tokens(result.d_query, seq_idx),
                self.tokens(result.d_key, seq_idx, of_key=True),
                self.tokens(result.d_value, seq_idx, of_key=True),
            )
            inputs = (
                self.tokens(self.query, seq_idx),
                self.tokens(self.key, seq_idx, of_key=True),
                self.tokens(self.value, seq_idx, of_key=True),
            )
            gradients = (self.tokens(self.grad_out, seq_idx), self.columns(self.grad_lse, seq_idx))
            indices = self.columns(block_indices, seq_idx)
            assert_attention_close(part, inputs, gradients, indices, self.case(seq_idx, block_size, top_k, is_causal))


def eligible_blocks(query_len: int, key_len: int, block_size: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The blocks each query may choose, bool ``[Nq, num_blocks]``, and its own (-1: none), ``[Nq]``."""
    num_blocks = -(-key_len // block_size)
    eligible = torch.zeros(query_len, num_blocks, dtype=torch.bool)
    own_block = torch.full((query_len,), -1)
    for query_idx in range(query_len):
        position = query_idx + key_len - query_len
        if not is_causal:
            eligible[query_idx] = True
        elif position >= 0:
            own_block[query_idx] = position // block_size
            eligible[query_idx, : position // block_size + 1] = True
    return eligible, own_block


def score_margins(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """By how much a kernel's rounding may move each routing score, float64 ``[B, Hq, Nq, num_blocks]``.

    From the rounding of float32 (float64 for float64) sums: a centroid's elements, sums of ``block_size``
    terms, then their dot product with the query, a sum of D terms.
    """
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    num_blocks = -(-key.shape[2] // block_size)
    block_len = torch.full((num_blocks, 1), block_size, dtype=torch.float64, device=key.device)
    block_len[-1:] = key.shape[2] - (num_blocks - 1) * block_size
    mean_square = reference.block_centroids(key.double().square(), block_size)
    centroid_magnitude = reference.block_centroids(key, block_size).abs() + (mean_square / block_len).sqrt()
    centroid_magnitude = centroid_magnitude.repeat_interleave(group, dim=1)
    magnitude = (query.double().square() @ centroid_magnitude.square().transpose(-2, -1)).sqrt()
    magnitude = magnitude + reference.block_scores(query, key, block_size).abs()
    length = query.shape[-1] + block_size
    return TOLERANCES["block_scores", "forward"].relative(query.dtype, length) * magnitude


def assert_routing_contract(
    block_indices: Tensor, query: Tensor, key: Tensor, block_size: int, top_k: int, is_causal: bool
) -> None:
    """The choice keeps its promises: dtype, shape, order, padding, count, range, own block, highest scores.

    A score may lose to a lower one only by the tie margin (``score_margins``); everything else is exact.
    """
    batch, num_heads, query_len, _ = query.shape
    key_len = key.shape[2]
    assert block_indices.dtype == torch.int32, f"block_indices: dtype {block_indices.dtype}"
    assert block_indices.shape == (batch, num_heads, query_len, top_k), f"shape {tuple(block_indices.shape)}"

    query, key, chosen = query.detach().cpu(), key.detach().cpu(), block_indices.detach().cpu().long()
    eligible, own_block = eligible_blocks(query_len, key_len, block_size, is_causal)
    num_blocks = eligible.shape[1]
    is_used = chosen >= 0

    _assert_all(chosen >= -1, chosen, "an index below -1")
    _assert_all(chosen < num_blocks, chosen, f"an index past the last of {num_blocks} blocks")
    count = eligible.sum(dim=-1).clamp(max=top_k)
    _assert_all(is_used.sum(dim=-1) == count, chosen, "not min(top_k, eligible blocks) of them")
    slot_idx = torch.arange(top_k)
    _assert_all(is_used == (slot_idx < count[:, None]), chosen, "padding before the end")
    ascends = (chosen[..., 1:] > chosen[..., :-1]) | ~is_used[..., 1:]
    _assert_all(ascends, chosen, "not strictly ascending")

    is_chosen = torch.zeros(batch, num_heads, query_len, num_blocks + 1, dtype=torch.bool)
    is_chosen = is_chosen.scatter(-1, torch.where(is_used, chosen, num_blocks), True)[..., :num_blocks]
    _assert_all(eligible | ~is_chosen, chosen, "a block that is not eligible")
    is_own = torch.arange(num_blocks) == own_block[:, None]
    _assert_all(is_chosen | ~is_own, chosen, "the own block missing")

    if prod(is_chosen.shape) == 0:
        return
    scores = reference.block_scores(query, key, block_size)
    margins = torch.where(scores.isfinite(), score_margins(query, key, block_size), 0.0)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    weakest_chosen = torch.where(is_chosen & ~is_own, scores + margins, torch.inf).amin(dim=-1)
    strongest_left = torch.where(eligible & ~is_chosen, scores - margins, -torch.inf).amax(dim=-1)
    _assert_all(weakest_chosen >= strongest_left, chosen, "a block left out that scores higher than one chosen")


def _assert_all(holds: Tensor, chosen: Tensor, what: str) -> None:
    """``holds`` is [B, Hq, Nq], perhaps with one more dimension; names the first row that fails."""
    if not holds.all():
        where = tuple((~holds).nonzero()[0].tolist())[:3]
        raise AssertionError(f"block_indices at (batch, head, query) {where} are {chosen[where].tolist()}: {what}")


def assert_same_support(block_indices: Tensor, other: Tensor) -> None:
    """Both choices hold the same set of blocks for every query, in whatever order and padding."""
    assert block_indices.shape[:-1] == other.shape[:-1], f"{tuple(block_indices.shape)} against {tuple(other.shape)}"
    num_slots = max(block_indices.shape[-1], other.shape[-1])

    def canonical(indices: Tensor) -> Tensor:
        padding = indices.new_full((*indices.shape[:-1], num_slots - indices.shape[-1]), -1)
        return torch.cat([indices, padding], dim=-1).long().sort(dim=-1).values

    left, right = canonical(block_indices), canonical(other)
    differs = (left != right).any(dim=-1)
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} queries chose other blocks, first {where}: "
            f"{left[where].tolist()} against {right[where].tolist()}"
        )

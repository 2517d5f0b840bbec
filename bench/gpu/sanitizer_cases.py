"""Every CUDA kernel once or more on small problems, for compute-sanitizer to watch.

    compute-sanitizer --tool racecheck python bench/gpu/sanitizer_cases.py

Sizes are odd on purpose: short last blocks, rows that end inside a vector, sequences of unequal length. Each case is
compared with the reference, so that a run also says whether the sanitizer watched something that worked. A sanitized
kernel runs some hundred times slower, so the sizes stay small; set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or an access past
the end of a tensor lands in torch's own pool and is not seen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import topgather as tg

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error relative to the largest entry: only gross faults matter; tests/common/tolerances.py has fine ones."""


@dataclass(frozen=True)
class Case:
    """One problem."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    num_tokens: int
    block_size: int
    top_k: int
    num_heads: int = 2
    num_kv_heads: int = 1
    is_causal: bool = True
    is_deterministic: bool = False
    is_packed: bool = False


CASES = (
    Case(torch.bfloat16, 64, 64, 300, 64, 3),
    Case(torch.bfloat16, 128, 128, 300, 128, 2, is_deterministic=True),
    Case(torch.float16, 72, 40, 203, 32, 4),
    Case(torch.float16, 256, 256, 130, 16, 8, is_causal=False),
    Case(torch.float32, 64, 64, 203, 48, 2),
    Case(torch.float32, 128, 96, 150, 64, 2, is_deterministic=True),
    Case(torch.float32, 256, 256, 100, 32, 3),
    Case(torch.bfloat16, 16, 16, 520, 16, 33, num_heads=1),
    Case(torch.bfloat16, 64, 64, 1200, 16, 70, num_heads=1),
    Case(torch.bfloat16, 128, 128, 301, 64, 3, is_packed=True),
    Case(torch.float16, 64, 64, 301, 32, 3, is_packed=True, is_deterministic=True),
)


@dataclass(frozen=True)
class MemoryCase:
    """Top-k over product keys, a lookup of what it chose, and all gradients."""

    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    num_keys: int
    head_dim: int
    top_k: int
    row_dim: int


MEMORY_CASES = (
    MemoryCase(torch.bfloat16, 70, 2, 33, 128, 8, 136),
    MemoryCase(torch.float16, 33, 1, 20, 34, 40, 77),
    MemoryCase(torch.float32, 40, 2, 65, 512, 33, 260),
    MemoryCase(torch.float32, 300, 1, 2, 16, 4, 5),  # four rows in all: each is in every bag
    MemoryCase(torch.bfloat16, 9, 1, 40, 256, 128, 1032),
)


@dataclass(frozen=True)
class GridCase:
    """Attention inside grids of stride ``step``, or inside windows of that size, and all gradients."""

    dtype: torch.dtype
    batch_size: int
    num_rows: int
    num_columns: int
    head_dim: int
    step: tuple[int, int]
    is_window: bool = False
    has_bias: bool = True


GRID_CASES = (
    GridCase(torch.bfloat16, 2, 11, 9, 64, (4, 3)),
    GridCase(torch.float16, 1, 21, 20, 72, (2, 2), has_bias=False),  # groups of more than one tile
    GridCase(torch.float32, 1, 13, 17, 33, (7, 5), is_window=True),
    GridCase(torch.float32, 2, 10, 9, 128, (1, 1)),
    GridCase(torch.bfloat16, 1, 9, 30, 100, (3, 9), is_window=True),
    GridCase(torch.float16, 3, 8, 8, 16, (4, 4)),  # many images a bias' gradient is summed over
)


@dataclass(frozen=True)
class DecodeCase:
    """Two sequences in a cache of pages, appended to in two steps, and ``query_len`` queries of each."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    length: int
    query_len: int
    block_size: int
    top_k: int


DECODE_CASES = (
    DecodeCase(torch.bfloat16, 64, 64, 300, 1, 16, 5),
    DecodeCase(torch.float16, 72, 40, 203, 3, 96, 2),
    DecodeCase(torch.float32, 33, 17, 150, 2, 1, 30),  # rows that no vector load can read
    DecodeCase(torch.bfloat16, 256, 264, 129, 5, 8, 20),
)


@dataclass(frozen=True)
class KeyConvCase:
    """The key convolution of a sequence, and all gradients."""

    dtype: torch.dtype
    num_tokens: int
    head_dim: int
    width: int


KEY_CONV_CASES = (
    KeyConvCase(torch.bfloat16, 301, 64, 3),
    KeyConvCase(torch.float16, 130, 72, 8),
    KeyConvCase(torch.float32, 77, 33, 5),  # rows that no vector load can read
)


@dataclass(frozen=True)
class IndexCase:
    """An indexer's choice, of small integers: what is exact is chosen alike."""

    dtype: torch.dtype
    dim: int
    num_tokens: int = 150
    block_size: int = 9
    top_k: int = 4
    reduction: str = "max"


INDEX_CASES = (
    IndexCase(torch.bfloat16, 72),
    IndexCase(torch.float16, 200, block_size=40, top_k=2),
    IndexCase(torch.float32, 24, reduction="relu_sum"),
)


def inputs_of(case: Case, device: torch.device) -> list[Tensor]:
    """query, key, value ``[1, H, N, D]``, leaves of the graph, and grad_out."""
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int, depth: int) -> Tensor:
        return torch.randn(1, num_heads, case.num_tokens, depth, generator=generator).to(device, case.dtype)

    query, key = random(case.num_heads, case.head_dim), random(case.num_kv_heads, case.head_dim)
    value, grad_out = random(case.num_kv_heads, case.value_dim), random(case.num_heads, case.value_dim)
    return [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out]


def bounds_of(case: Case) -> list[int]:
    """Where the sequences of a packed case start and end; one of them is empty."""
    return [0, 1, 1, case.num_tokens // 3, case.num_tokens] if case.is_packed else [0, case.num_tokens]


def run_case(case: Case, device: torch.device) -> list[Tensor]:
    """``out`` and the gradients of query, key and value."""
    *leaves, grad_out = inputs_of(case, device)
    options = {"block_size": case.block_size, "top_k": case.top_k, "is_causal": case.is_causal}
    if case.is_packed:
        bounds = torch.tensor(bounds_of(case), dtype=torch.int32, device=device)
        longest = int(bounds.diff().max())
        packed = [leaf[0].transpose(0, 1) for leaf in leaves]
        out = tg.moba_attention_varlen(*packed, bounds, bounds, longest, longest, **options)
        out = out.transpose(0, 1)[None]
    else:
        out = tg.moba_attention(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def expected_of(case: Case, device: torch.device) -> list[Tensor]:
    """The same from the float64 reference, a sequence at a time, over the blocks that topgather chose."""
    *leaves, grad_out = inputs_of(case, device)
    outs = []
    bounds = bounds_of(case)
    for start, end in pairwise(bounds):
        if start == end:
            continue
        query, key, value = (leaf[:, :, start:end] for leaf in leaves)
        options = {"block_size": case.block_size, "is_causal": case.is_causal}
        blocks = tg.moba_route(query.detach(), key.detach(), top_k=case.top_k, **options).block_indices
        outs.append(tg.reference.moba_attention(query, key, value, blocks, **options)[0])
    out = torch.cat(outs, dim=2)
    return [out, *torch.autograd.grad(out, leaves, grad_out.double())]


def memory_results(case: MemoryCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What topgather and the reference make of it: scores, hidden, out and the gradients of every input."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype).requires_grad_()

    query = random(case.num_tokens, case.num_heads, case.head_dim)
    keys = random(case.num_heads, 2, case.num_keys, case.head_dim // 2)
    values, x = random(case.num_keys**2, case.row_dim), random(case.num_tokens, case.row_dim)
    leaves = [query, keys, values, x]
    scores, indices = tg.product_key_topk(query, keys, case.top_k)
    bags = indices.flatten(1)
    out = tg.memory_lookup(values, bags, scores.flatten(1) / case.head_dim)
    experts = tg.expert_lookup(x, values, values, bags, torch.ones_like(bags, dtype=case.dtype), "identity")
    actual = [scores, out, experts, *torch.autograd.grad([scores.sum(), out.sum(), experts.sum()], leaves)]

    scores = tg.reference.product_key_scores(query, keys).gather(-1, indices)
    out = tg.reference.memory_lookup(values, bags, scores.flatten(1) / case.head_dim)
    experts = tg.reference.expert_lookup(x, values, values, bags, torch.ones_like(bags), "identity")
    expected = [scores, out, experts, *torch.autograd.grad([scores.sum(), out.sum(), experts.sum()], leaves)]
    return actual, expected


def grid_results(case: GridCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What topgather and the reference make of it: out and the gradients of every input."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, 2, case.num_rows, case.num_columns, case.head_dim)
    *leaves, grad_out = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(4))
    if case.has_bias:
        step_rows, step_columns = case.step
        group_rows = step_rows if case.is_window else -(-case.num_rows // step_rows)
        group_columns = step_columns if case.is_window else -(-case.num_columns // step_columns)
        size = group_rows * group_columns
        leaves.append(torch.randn(2, size, size, generator=generator).to(device))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query, key, value = leaves[:3]
    bias = leaves[3] if case.has_bias else None
    results = []
    for module in (tg, tg.reference):
        attention = module.window_attention if case.is_window else module.grid_attention
        step = {"window_size" if case.is_window else "stride": case.step}
        out = attention(query, key, value, bias=bias, **step)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))])
    actual, expected = results
    return actual, expected


def decode_results(case: DecodeCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What topgather and the reference make of it: out of every query, over the blocks that topgather chose."""
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int, length: int, depth: int) -> Tensor:
        return torch.randn(2, num_heads, length, depth, generator=generator).to(device, case.dtype)

    query = random(4, case.query_len, case.head_dim)
    key, value = random(2, case.length, case.head_dim), random(2, case.length, case.value_dim)
    cache = tg.PagedMobaCache(
        2, 2, case.head_dim, value_dim=case.value_dim, block_size=case.block_size, max_seq_len=case.length,
        dtype=case.dtype, device=device,
    )  # fmt: skip
    first = case.length - case.query_len
    cache.append(key[:, :, :first], value[:, :, :first])
    cache.append(key[:, :, first:], value[:, :, first:])
    out = tg.moba_decode(query, cache, top_k=case.top_k)
    blocks = tg.moba_route(query, key, case.block_size, case.top_k).block_indices
    expected = tg.reference.moba_attention(query, key, value, blocks, case.block_size)[0]
    return [out], [expected]


def key_conv_results(case: KeyConvCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What topgather and the reference make of it: out and the gradients of key and weight."""
    generator = torch.Generator().manual_seed(0)
    key, grad_out = (
        torch.randn(2, 2, case.num_tokens, case.head_dim, generator=generator).to(device, case.dtype) for _ in range(2)
    )
    weight = torch.randn(2, case.head_dim, case.width, generator=generator).to(device)
    leaves = [key.requires_grad_(), weight.requires_grad_()]
    results = []
    for module in (tg, tg.reference):
        out = module.key_conv(key, weight)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))])
    actual, expected = results
    return actual, expected


def index_results(case: IndexCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Choices, as numbers."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, heads, case.num_tokens, case.dim) for heads in (4, 2)]
    query, key = (torch.randint(-2, 3, shape, generator=generator).to(device, case.dtype) for shape in shapes)
    options = (case.block_size, case.top_k, case.reduction, True, 1)
    actual = tg.index_route(query, key, *options).block_indices
    return [actual.float()], [tg.reference.index_route(query, key, *options).float()]


def main() -> int:
    """Run every case; returns 0 if all agree with the reference."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    num_failed = 0
    cases = (*CASES, *MEMORY_CASES, *GRID_CASES, *DECODE_CASES, *KEY_CONV_CASES, *INDEX_CASES)
    for case in cases:
        if isinstance(case, MemoryCase):
            actual, expected = memory_results(case, device)
        elif isinstance(case, GridCase):
            actual, expected = grid_results(case, device)
        elif isinstance(case, DecodeCase):
            actual, expected = decode_results(case, device)
        elif isinstance(case, KeyConvCase):
            actual, expected = key_conv_results(case, device)
        elif isinstance(case, IndexCase):
            actual, expected = index_results(case, device)
        else:
            torch.use_deterministic_algorithms(case.is_deterministic)
            actual = run_case(case, device)
            torch.use_deterministic_algorithms(False)
            expected = expected_of(case, device)
        error = max(
            ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
            for got, wanted in zip(actual, expected, strict=True)
        )
        agrees = error <= TOLERANCES[case.dtype]
        num_failed += not agrees
        print(f"{'ok' if agrees else 'FAILED'}: error {error:.1e}, {case}", flush=True)
    print(f"{len(cases) - num_failed} of {len(cases)} cases agree with the reference")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())

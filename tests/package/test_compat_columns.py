"""The functions of published packages that bring their choice of blocks by columns, or count blocks otherwise."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import topgather as tg
from tests.common.tensors import assert_bitwise_equal

BOUNDARIES, BLOCK_SIZE = [0, 40, 40, 75], 8


def packed() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(75, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    return [tensor.requires_grad_() for tensor in tensors], torch.tensor(BOUNDARIES, dtype=torch.int32)


def columns_of(block_indices: Tensor, boundaries: list[int], spare: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A choice by queries ``[H, total, top_k]``, entry by entry, as the published package has it by columns.

    Columns beyond a sequence's blocks hold numbers that mean nothing.
    """
    num_heads = block_indices.size(0)
    num_columns = -(-max(b - a for a, b in pairwise(boundaries)) // BLOCK_SIZE) + spare
    offsets = torch.full((len(boundaries) - 1, num_heads, num_columns), 10**6)
    counts = torch.full(offsets.shape, 77, dtype=torch.int32)
    rows: list[int] = []
    for sequence, (start, end) in enumerate(pairwise(boundaries)):
        for head in range(num_heads):
            for block in range(-(-(end - start) // BLOCK_SIZE)):
                chosen = (block_indices[head, start:end] == block).any(-1).nonzero()[:, 0].tolist()
                offsets[sequence, head, block], counts[sequence, head, block] = len(rows), len(chosen)
                rows += chosen
    return offsets, counts, torch.tensor(rows, dtype=torch.int32)


def test_choices_by_columns() -> None:
    """The bits of the same choice by queries, forward and backward."""
    inputs, cu_seqlens = packed()
    routing = tg.moba_route_varlen(inputs[0], inputs[1], cu_seqlens, cu_seqlens, 40, 40, BLOCK_SIZE, 3)
    columns = columns_of(routing.block_indices, BOUNDARIES)
    arguments = (*inputs, cu_seqlens, cu_seqlens, 40, 40)
    expected, expected_lse = tg.moba_attention_varlen(
        *arguments, block_size=BLOCK_SIZE, routing=routing, scale=0.3, return_lse=True, deterministic=True
    )
    function = tg.compat.flash_moba_attn_varlen_func
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True, "deterministic": True}
    out, lse, probabilities = function(*arguments, *columns, 128, BLOCK_SIZE, **options, return_attn_probs=True)
    assert probabilities is None
    assert_bitwise_equal("lse", lse.detach(), expected_lse.detach())
    assert_bitwise_equal("out", out.detach(), expected.detach())
    assert_bitwise_equal("out", function(*arguments, *columns, 64, BLOCK_SIZE, **options).detach(), expected.detach())
    for left, right in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_bitwise_equal("gradient", left, right)


def test_any_choice_by_columns() -> None:
    """Not causal, queries of no block and of all: against dense attention with a mask."""
    inputs, _ = packed()
    cu_seqlens = torch.tensor([0, 75])
    is_chosen = torch.rand(4, 75, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    is_chosen[:, 0], is_chosen[:, 1] = False, True
    block_indices = torch.where(is_chosen, torch.arange(10), -1)
    columns = columns_of(block_indices, [0, 75], spare=0)
    arguments = (*inputs, cu_seqlens, cu_seqlens, 75, 75)
    out = tg.compat.flash_moba_attn_varlen_func(*arguments, *columns, lg_block_n=BLOCK_SIZE)
    mask = is_chosen.repeat_interleave(BLOCK_SIZE, dim=2)[:, :, :75]
    query, key, value = (tensor.transpose(0, 1) for tensor in inputs)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(0, 1)
    torch.testing.assert_close(out[1:], expected[1:])
    assert (out[0] == 0).all()


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"),
        ({"softcap": 1.0}, NotImplementedError, "softcap"),
        ({"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes"),
        ({"moba_col_offsets": torch.zeros(3, 4, 5)}, TypeError, "moba_col_offsets"),
        ({"moba_col_offsets": torch.zeros(2, 4, 7, dtype=torch.int64)}, ValueError, "moba_col_offsets"),
        ({"moba_col_nnz": torch.zeros(3, 2, 7, dtype=torch.int64)}, ValueError, "moba_col_nnz"),
        ({"moba_col_nnz": torch.full((3, 4, 7), 10**5)}, IndexError, "moba_col_nnz"),
        ({"moba_row_indices": torch.full((10**4,), 40)}, IndexError, "moba_row_indices"),
        ({"moba_row_indices": torch.full((10**4,), -1)}, IndexError, "moba_row_indices"),
        ({"lg_block_n": 0}, ValueError, "lg_block_n"),
    ],
    ids=str,
)
def test_bad_columns(changed: dict[str, Any], error: type[Exception], named: str) -> None:
    inputs, cu_seqlens = packed()
    routing = tg.moba_route_varlen(inputs[0], inputs[1], cu_seqlens, cu_seqlens, 40, 40, BLOCK_SIZE, 3)
    names = ("moba_col_offsets", "moba_col_nnz", "moba_row_indices")
    columns = dict(zip(names, columns_of(routing.block_indices, BOUNDARIES), strict=True))
    arguments = {**columns, "lg_block_n": BLOCK_SIZE, **changed}
    with pytest.raises(error, match=named):
        tg.compat.flash_moba_attn_varlen_func(*inputs, cu_seqlens, cu_seqlens, 40, 40, **arguments)


@pytest.mark.parametrize("topk", [1, 2, 3, 100])
def test_parallel_moba(topk: int) -> None:
    inputs, cu_seqlens = packed()
    batched = [tensor[None] for tensor in inputs]
    out = tg.compat.parallel_moba(*batched, cu_seqlens, 40, BLOCK_SIZE, topk)
    expected = tg.compat.moba_attn_varlen(*inputs, cu_seqlens, 40, BLOCK_SIZE, 100 if topk == 1 else topk)
    assert_bitwise_equal("out", out[0].detach(), expected.detach())
    if topk == 1:
        query, key, value = (tensor[:40].transpose(0, 1)[None] for tensor in inputs)
        dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[0, :40], dense[0].transpose(0, 1))


def test_parallel_moba_without_boundaries() -> None:
    query, key, value = (torch.randn(3, 20, 2, 8) for _ in range(3))
    out = tg.compat.parallel_moba(query, key, value, None, 20, 4, 2)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    expected = tg.moba_attention(query, key, value, block_size=4, top_k=2).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="q must have a batch of 1 with cu_seqlens"):
        tg.compat.parallel_moba(*(torch.randn(2, 4, 1, 8) for _ in range(3)), torch.tensor([0, 4]), 4, 4, 2)

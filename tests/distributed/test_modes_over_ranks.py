"""Attention and convolutions over ranks in torch's modes: autocast, another default device, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
import topgather.distributed as tgd
from tests.distributed.pretended_ranks import on_pretended_ranks
from topgather._distributed.plan import METHODS

NUM_RANKS, BLOCK_SIZE, TOP_K = 2, 4, 2


def problem() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 14, 8, generator=generator) for _ in range(3)]


def mine(tensors: list[Tensor], group: Any) -> list[Tensor]:
    return [tensor.chunk(NUM_RANKS, dim=2)[group.rank].clone().requires_grad_() for tensor in tensors]


def attend(tensors: list[Tensor], group: Any, method: str) -> Any:
    return tgd.moba_attention(*tensors, group, block_size=BLOCK_SIZE, top_k=TOP_K, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_casts_as_on_one_rank(method: str) -> None:
    """Queries of a projection and keys that a rotation left in float32, too."""
    whole = problem()
    with torch.autocast("cpu", torch.bfloat16):
        expected = tg.moba_attention(*whole, block_size=BLOCK_SIZE, top_k=TOP_K)

    def run(group: Any) -> None:
        leaves = mine(whole, group)
        with torch.autocast("cpu", torch.bfloat16):
            out = attend([leaves[0].to(torch.bfloat16), *leaves[1:]], group, method)
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected.chunk(NUM_RANKS, dim=2)[group.rank], atol=2e-2, rtol=2e-2)
        out.sum().backward()
        assert leaves[1].grad is not None and leaves[1].grad.dtype == torch.float32

    on_pretended_ranks(NUM_RANKS, run)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_is_left_alone(method: str) -> None:
    """The meta device, from which nothing can be copied, stands for any other. Plans are kept: sizes are this test's
    alone.
    """
    whole = [tensor[:, :, :10] for tensor in problem()]

    def run(group: Any) -> None:
        with torch.device("meta"):
            found = attend(mine(whole, group), group, method)
            found.sum().backward()
            convolved = tgd.key_conv(mine(whole, group)[1], whole[0].new_ones(2, 8, 3), group)
            convolved.sum().backward()
        assert torch.equal(found, attend(mine(whole, group), group, method))

    on_pretended_ranks(NUM_RANKS, run)


def test_transforms_are_refused_in_words() -> None:
    def run(group: Any) -> None:
        leaves = [tensor.detach() for tensor in mine(problem(), group)]
        with pytest.raises(
            NotImplementedError, match=r"distributed\.moba_attention cannot be called under torch\.vmap"
        ):
            torch.vmap(lambda query: attend([query, *leaves[1:]], group, "gather"))(leaves[0][None])
        with pytest.raises(NotImplementedError, match=r"distributed\.key_conv cannot be called under torch\.vmap"):
            torch.func.grad(lambda key: tgd.key_conv(key, torch.ones(2, 8, 3), group).sum())(leaves[1])

    on_pretended_ranks(NUM_RANKS, run)


def test_ranks_of_which_one_alone_wants_a_gradient_do_not_wait_for_each_other() -> None:
    def run(group: Any) -> None:
        key = mine(problem(), group)[1].requires_grad_(group.rank == 0)
        with pytest.raises(ValueError, match="the same need of a gradient for key"):
            tgd.key_conv(key, torch.ones(2, 8, 3), group)

    on_pretended_ranks(NUM_RANKS, run)


def test_a_count_within_a_count_ends_alone() -> None:
    def run(group: Any) -> None:
        tgd.key_conv(mine(problem(), group)[1], torch.ones(2, 8, 3), group)

    with tgd.count_bytes() as outer:
        with tgd.count_bytes() as inner:
            pass
        on_pretended_ranks(NUM_RANKS, run)
    assert sum(outer.values()) > 0
    assert sum(inner.values()) == 0


def test_a_buffer_is_cut_once() -> None:
    def run(group: Any) -> None:
        tokens = torch.arange(8)[None]
        with (
            pytest.raises(ValueError, match="buffers must name each tensor once"),
            tgd.context_parallel(group, [tokens, tokens], [1, 1]),
        ):
            pass
        # A buffer that cannot be cut leaves the one before it whole.
        with torch.inference_mode():
            fixed = torch.arange(8)[None]
        with pytest.raises(RuntimeError), tgd.context_parallel(group, [tokens, fixed], [1, 1], placement="contiguous"):
            pass
        assert torch.equal(tokens, torch.arange(8)[None])

    on_pretended_ranks(NUM_RANKS, run)

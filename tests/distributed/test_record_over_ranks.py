"""Choices of sequences that are spread over ranks: each rank records its own tokens', and goes by them again.

Ranks are threads here; ``mesh_worker.py`` has a model on real ones.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import topgather as tg
from tests.distributed.pretended_ranks import on_pretended_ranks
from tests.distributed.sequence_worker import TENSORS, SequenceCase
from topgather._distributed.placement import contiguous, zigzag
from topgather._distributed.plan import METHODS
from topgather.distributed import moba_attention

CASES = {
    "zigzag": SequenceCase(3, num_tokens=31, placement="zigzag", options={"block_size": 4}),
    "a_head_at_a_time": SequenceCase(2, num_tokens=22, options={"block_size": 4, "max_gathered_bytes": 1}),
    "not_causal": SequenceCase(3, num_tokens=20, options={"block_size": 4, "is_causal": False}),
    "packed": SequenceCase(3, num_tokens=30, cu_seqlens=(0, 7, 7, 30), options={"block_size": 4}),
}


def mine(case: SequenceCase, tensor: Tensor, rank: int, dim: int) -> Tensor:
    lengths = [len(part) for part in torch.arange(case.num_tokens).tensor_split(case.num_ranks)]
    stretches = zigzag(case.num_tokens, case.num_ranks) if case.placement == "zigzag" else contiguous(lengths)
    return torch.cat([tensor.narrow(dim, *stretch) for stretch in stretches[rank]], dim)


def run(case: SequenceCase, group: Any, method: str, is_checkpointed: bool = False) -> list[Tensor]:
    """The rank's output and gradients."""
    whole, dim = case.problem(), case.tokens_dim
    leaves = [mine(case, whole[name], group.rank, dim).requires_grad_() for name in TENSORS]
    given = {**case.arguments(), "placement": case.placement, "method": method}
    if case.cu_seqlens is not None:
        given["cu_seqlens"] = torch.tensor(case.cu_seqlens)

    def attend(*tensors: Tensor) -> Any:
        return moba_attention(*tensors, group, **given)

    out = checkpoint(attend, *leaves, use_reentrant=False) if is_checkpointed else attend(*leaves)
    return [out.detach(), *torch.autograd.grad((out * mine(case, whole["grad_out"], group.rank, dim)).sum(), leaves)]


def alone(case: SequenceCase, routing: tg.BlockRouting | None = None) -> tuple[Tensor, list[Tensor]]:
    """One process's choice, and output and gradients."""
    whole, given = case.problem(), case.arguments()
    leaves = [whole[name].requires_grad_() for name in TENSORS]
    size, top_k, is_causal = given["block_size"], given["top_k"], given.get("is_causal", True)
    if case.cu_seqlens is None:
        routing = routing or tg.moba_route(*leaves[:2], size, top_k, is_causal)
        out = tg.moba_attention(*leaves, size, None, is_causal, routing=routing)
    else:
        edges = torch.tensor(case.cu_seqlens)
        sequences = (edges, edges, int(edges.diff().max()), int(edges.diff().max()))
        routing = routing or tg.moba_route_varlen(*leaves[:2], *sequences, size, top_k, is_causal)
        out = tg.moba_attention_varlen(*leaves, *sequences, size, None, is_causal, routing=routing)
    gradients = torch.autograd.grad((out * whole["grad_out"]).sum(), leaves)
    return routing.block_indices, [out.detach(), *gradients]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_saved_loaded_and_replayed(name: str, method: str, tmp_path: Path) -> None:
    """The record has the choices of one process, and a replay the bits of what was recorded."""
    case = CASES[name]
    choice, expected = alone(case)

    def body(group: Any) -> None:
        with tg.record_routing() as record:
            found = run(case, group, method, is_checkpointed=True)
        assert record.num_calls == 1
        assert torch.equal(record[0].block_indices, mine(case, choice, group.rank, choice.ndim - 2))
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, mine(case, wanted, group.rank, case.tokens_dim), atol=1e-12, rtol=1e-12)
        path = tmp_path / f"{group.rank}.safetensors"
        record.save(path)
        for is_checkpointed in (False, True):
            with tg.replay_routing(tg.RoutingRecord.load(path)):
                again = run(case, group, method, is_checkpointed)
            assert all(torch.equal(actual, wanted) for actual, wanted in zip(again, found, strict=True))

    on_pretended_ranks(case.num_ranks, body)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("name", ["zigzag", "packed"])
def test_another_choice(name: str, num_heads: int, method: str) -> None:
    """By hand: for fewer heads, in any order, without the own block, of nothing, and of what is not seen yet."""
    case = CASES[name]
    counts = [case.num_tokens] if case.cu_seqlens is None else torch.tensor(case.cu_seqlens).diff().tolist()
    generator = torch.Generator().manual_seed(4)
    rows = []
    for count in counts:
        num_blocks = -(-count // 4)
        ranked = torch.rand(num_heads, count, max(num_blocks, 3), generator=generator).argsort(-1)[..., :3]
        hidden = (ranked >= num_blocks) | (torch.rand(ranked.shape, generator=generator) < 0.5)
        rows.append(ranked.masked_fill(hidden, -1))
    choice = torch.cat(rows, dim=1).to(torch.int32)
    choice[:, 9] = -1
    choice = choice if case.cu_seqlens is not None else choice[None].repeat(2, 1, 1, 1)
    own = torch.cat([torch.arange(count) // 4 for count in counts])[:, None]
    assert (choice > own).any() and ((choice != own).all(-1) & (choice >= 0).any(-1)).any()
    assert (choice < 0).all(-1).any()
    _, expected = alone(case, tg.BlockRouting(choice, 4))

    def body(group: Any) -> None:
        cut = mine(case, choice, group.rank, choice.ndim - 2)
        with tg.replay_routing(tg.RoutingRecord([tg.BlockRouting(cut, 4)])):
            found = run(case, group, method)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, mine(case, wanted, group.rank, case.tokens_dim), atol=1e-12, rtol=1e-12)

    on_pretended_ranks(case.num_ranks, body)


@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        (IndexError, "record must name blocks that exist", lambda choice: choice + 100),
        (ValueError, "record must name a block once", lambda choice: torch.zeros_like(choice)),
        (ValueError, "record does not fit", lambda choice: choice[:, :, 1:]),
        (ValueError, "the same record_routing or replay_routing, got", None),
    ],
)
def test_what_one_rank_cannot_replay_raises_everywhere(kind: type[Exception], words: str, change: Any) -> None:
    """Instead of leaving the others waiting."""
    case = CASES["zigzag"]
    choice, _ = alone(case)
    seen = []

    def body(group: Any) -> None:
        cut = mine(case, choice, group.rank, 2)
        if group.rank == 1 and change is not None:
            cut = change(cut)
        record = tg.RoutingRecord([tg.BlockRouting(cut, 4)])
        try:
            if group.rank == 1 and change is None:
                run(case, group, "gather")
            else:
                with tg.replay_routing(record):
                    run(case, group, "gather")
        except kind as raised:
            assert words in str(raised)
            seen.append(group.rank)

    on_pretended_ranks(case.num_ranks, body)
    assert sorted(seen) == [0, 1, 2]

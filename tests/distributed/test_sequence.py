"""Block attention of sequences spread over one, two and four processes (gloo, CPU), against one that has all tokens.

All processes are started once, by ``sequence_worker.py``; each test looks at what one of its cases left.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import topgather as tg
from tests.common.tolerances import UNIT_ROUNDOFF
from tests.distributed.ranks import results_in, run_once
from tests.distributed.sequence_worker import CASES, TENSORS, WORLD_SIZE, SequenceCase
from topgather._context_parallel import _contiguous, _overlap, _parts, _Placement, _seen, _Stretch, _zigzag

# Sums in another order, and in 16 bits each rank's part of a key's gradient rounded once more.
ROUNDINGS = 16


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results, by case; pytest's workers, if there are several, share one run."""
    folder = run_once(tmp_path_factory, "sequence_distributed", ["-m", "tests.distributed.sequence_worker"])
    results = results_in(folder, WORLD_SIZE)
    for rank, result in enumerate(results):
        assert "failed" not in result, f"rank {rank}: {result['failed']}"
    return results


def placement_of(case: SequenceCase) -> list[list[_Stretch]]:
    if case.placement == "zigzag":
        return _zigzag(case.num_tokens, case.num_ranks)
    size, longer = divmod(case.num_tokens, case.num_ranks)
    return _contiguous(list(case.lengths or [size + (rank < longer) for rank in range(case.num_ranks)]))


def in_order(parts: list[Tensor], case: SequenceCase, dim: int) -> Tensor:
    """What ranks have of a tensor, in the order of positions."""
    pieces = {}
    for part, stretches in zip(parts, placement_of(case), strict=True):
        lengths = [stretch.length for stretch in stretches]
        for stretch, piece in zip(stretches, part.split(lengths, dim), strict=True):
            pieces[stretch.start, stretch.end] = piece
    return torch.cat([pieces[key] for key in sorted(pieces)], dim)


def alone(case: SequenceCase) -> dict[str, Tensor]:
    """Results and gradients of one process that has all tokens."""
    whole = case.problem()
    leaves = {name: whole[name].requires_grad_() for name in (*TENSORS, "sinks") if name in whole}
    arguments = {**case.arguments(), "return_lse": True, "sinks": leaves.get("sinks")}
    arguments.pop("max_gathered_bytes", None)
    if case.cu_seqlens is not None:
        bounds = torch.tensor(case.cu_seqlens)
        longest = int(bounds.diff().max())
        sequences = (bounds, bounds, longest, longest)
        out, lse = tg.moba_attention_varlen(*(leaves[name] for name in TENSORS), *sequences, **arguments)
    else:
        out, lse = tg.moba_attention(*(leaves[name] for name in TENSORS), **arguments)
    finite = lse.isfinite()
    loss = (out * whole["grad_out"]).sum() + (lse[finite] * whole["grad_lse"][finite]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel() == 0:
        return
    scale = expected.double().abs().max().clamp(min=1.0)
    error = (actual.double() - expected.double()).abs().max()
    assert error <= ROUNDINGS * UNIT_ROUNDOFF[expected.dtype] * scale, (name, float(error))


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Results and all gradients, and with them the choice of blocks: another block would show in float64."""
    case = CASES[name]
    expected = alone(case)
    for first in range(0, WORLD_SIZE, case.num_ranks):
        results = [result[name] for result in ranks[first : first + case.num_ranks]]
        for part, tensor in expected.items():
            parts = [result[part] for result in results]
            if part == "grad_sinks":
                actual = torch.stack(parts).sum(0)
            else:
                rows = 2 if case.cu_seqlens is None else 1
                actual = in_order(parts, case, rows if part == "lse" else case.tokens_dim)
            assert_close(f"{name} {part}", actual, tensor)
    if case.is_transposed:
        assert all(result[name]["layout"] for result in ranks)


def test_the_same_bits_again(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        for part in ("out", "lse", *(f"grad_{name}" for name in TENSORS)):
            assert torch.equal(result["again"][part], result["float32"][part])


def test_without_a_gradient(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert not result["no gradient"].requires_grad
        assert torch.equal(result["no gradient"], result["four"]["out"])


def test_a_rank_without_a_gradient_of_its_own(ranks: list[dict[str, Any]]) -> None:
    case = SequenceCase()
    whole = case.problem()
    leaves = [whole[name].requires_grad_() for name in TENSORS]
    out = tg.moba_attention(*leaves, **case.arguments())
    stretch = placement_of(case)[1][0]
    weight = torch.ones(case.num_tokens, dtype=torch.float64)
    weight[stretch.start : stretch.end] = 0
    gradients = torch.autograd.grad((out * weight[:, None]).sum(), leaves)
    for name, gradient in zip(TENSORS, gradients, strict=True):
        parts = [result["no gradient of its own"][f"grad_{name}"] for result in ranks]
        assert_close(name, in_order(parts, case, 2), gradient)


@pytest.mark.parametrize("name", ["four", "four_zigzag", "packed", "not_causal", "a_head_at_a_time"])
def test_bytes_are_those_of_the_formula(name: str, ranks: list[dict[str, Any]]) -> None:
    """Forward and backward gather keys and values once each; gradients go to those whose keys were seen."""
    case = CASES[name]
    placement = placement_of(case)
    longest = max(sum(stretch.length for stretch in stretches) for stretches in placement)
    batch = 2 if case.cu_seqlens is None else 1
    per_token = batch * case.num_kv_heads * (case.head_dim + case.value_dim) * case.dtype.itemsize
    is_causal = case.options.get("is_causal", True)
    bounds = list(case.cu_seqlens) if case.cu_seqlens is not None else None
    for rank, result in enumerate(ranks):
        layout = _Placement(None, rank, placement)  # type: ignore[arg-type]
        seen = _seen(layout, bounds, is_causal, rank)
        others = [stretch for other, stretches in enumerate(placement) if other != rank for stretch in stretches]
        tokens = sum(_overlap(stretch, seen).length for stretch in others)
        assert result[name]["bytes"]["gather"] == 2 * (case.num_ranks - 1) * longest * per_token
        assert result[name]["bytes"]["exchange"] == tokens * per_token
    if name == "four":  # contiguous: a rank sends gradients to the ranks before it
        sent = [result[name]["bytes"]["exchange"] for result in ranks]
        assert sent[0] == 0 and sent == sorted(sent)


REFUSED = {
    "block_size": "ValueError: all ranks of the group must have the same block_size, got [4, 4, 4, 8] by rank",
    "is_causal": "ValueError: all ranks of the group must have the same is_causal, got [1, 1, 1, 0] by rank",
    "softcap": "ValueError: all ranks of the group must have the same softcap (its bits), got",
    "zigzag": "ValueError: zigzag placement of 28 tokens gives the ranks [7, 7, 7, 7], got [6, 6, 6, 10]",
    "placement": "ValueError: placement must be one of contiguous, zigzag, got 'striped'",
    "cu_seqlens": "ValueError: cu_seqlens must end with the ranks' tokens together, 24, got 23",
    "fine": "nothing",
}


@pytest.mark.parametrize("name", REFUSED)
def test_ranks_that_differ_raise_everywhere(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["refusals"][name].startswith(REFUSED[name])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("one rank's dtype", "TypeError", "key must have query's dtype torch.int32"),
        ("one rank's top_k", "ValueError", "top_k must be between 1 and 2**31 - 1, got 0"),
        ("a tensor", "TypeError", "query must be a torch.Tensor, got list"),
    ],
)
def test_what_one_rank_is_refused_raises_everywhere(
    name: str, kind: str, words: str, ranks: list[dict[str, Any]]
) -> None:
    found = [result["refusals"][name] for result in ranks]
    assert found[3].startswith(f"{kind}: {words}")
    assert all(text.startswith(f"{kind}: rank 3 of the group was refused: {words}") for text in found[:3])


# --- placements, in one process --------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 9))
def test_zigzag_covers_the_sequence(num_tokens: int, num_ranks: int) -> None:
    stretches = sorted(stretch for stretches in _zigzag(num_tokens, num_ranks) for stretch in stretches)
    assert sum(stretch.length for stretch in stretches) == num_tokens
    assert max(stretch.length for stretch in stretches) - min(stretch.length for stretch in stretches) <= 1
    for rank, (front, back) in enumerate(_zigzag(num_tokens, num_ranks)):
        assert front.start <= back.start and (rank + 1 < num_ranks or front.end == back.start)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.lists(st.integers(0, 40), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_calls_attend_to_what_one_process_attends_to(
    lengths: list[int], cuts: list[int], is_packed: bool, is_causal: bool
) -> None:
    """Every query sees its own sequence's keys, up to itself where causal, whichever rank has it."""
    total = sum(lengths)
    bounds = [0, *sorted(min(cut, total) for cut in cuts), total] if is_packed else None
    expected = {}
    for start, end in zip(bounds or [0], (bounds or [0, total])[1:], strict=False):
        expected |= {i: (start, i + 1 if is_causal else end) for i in range(start, end)}
    found = {}
    for rank, stretches in enumerate(_contiguous(lengths)):
        layout = _Placement(None, rank, _contiguous(lengths))  # type: ignore[arg-type]
        for part in _parts(layout, bounds, is_causal, torch.device("cpu")):
            of_queries, of_keys = (
                [0, count] if given is None else given.tolist()
                for given, count in zip(
                    part.sequences[:2],
                    (part.queries.stop - part.queries.start, part.keys.stop - part.keys.start),
                    strict=True,
                )
            )
            for i in range(len(of_queries) - 1):
                num_queries, num_keys = of_queries[i + 1] - of_queries[i], of_keys[i + 1] - of_keys[i]
                for q in range(num_queries):
                    token = stretches[0].start + part.queries.start + of_queries[i] + q
                    last = num_keys - num_queries + q + 1 if is_causal else num_keys
                    first_key = part.keys.start + of_keys[i]
                    found[token] = (first_key, first_key + last)
    assert found == expected

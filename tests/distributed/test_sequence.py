"""Block attention of sequences spread over one, two and four processes (gloo, CPU), against one that has all tokens.

All processes are started once, by ``sequence_worker.py``; each test looks at what one of its cases left.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import topgather as tg
from tests.common.tolerances import UNIT_ROUNDOFF
from tests.distributed.pretended_ranks import on_pretended_ranks
from tests.distributed.ranks import results_in, run_once
from tests.distributed.sequence_worker import CASES, TENSORS, WORLD_SIZE, SequenceCase
from topgather._distributed.gather import overlap, parts_of, seen_by
from topgather._distributed.placement import Placement, Stretch, contiguous, zigzag
from topgather._distributed.plan import METHODS, Shapes, cheaper
from topgather.distributed import moba_attention, plan

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


def placement_of(case: SequenceCase) -> list[list[Stretch]]:
    if case.placement == "zigzag":
        return zigzag(case.num_tokens, case.num_ranks)
    size, longer = divmod(case.num_tokens, case.num_ranks)
    return contiguous(list(case.lengths or [size + (rank < longer) for rank in range(case.num_ranks)]))


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process(name: str, method: str, ranks: list[dict[str, Any]]) -> None:
    """Results and all gradients, and with them the choice of blocks: another block would show in float64."""
    case = CASES[name]
    expected = alone(case)
    for first in range(0, WORLD_SIZE, case.num_ranks):
        results = [result[name, method] for result in ranks[first : first + case.num_ranks]]
        for part, tensor in expected.items():
            parts = [result[part] for result in results]
            if part == "grad_sinks":
                actual = torch.stack(parts).sum(0)
            else:
                rows = 2 if case.cu_seqlens is None else 1
                actual = in_order(parts, case, rows if part == "lse" else case.tokens_dim)
            assert_close(f"{name} {part}", actual, tensor)
    if case.cu_seqlens is None:
        assert all(result[name, method]["layout"] in (None, case.is_transposed) for result in ranks)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_again(method: str, ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        for part in ("out", "lse", *(f"grad_{name}" for name in TENSORS)):
            assert torch.equal(result["again", method][part], result["float32", method][part])


@pytest.mark.parametrize("method", METHODS)
def test_without_a_gradient(method: str, ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert not result["no gradient", method].requires_grad
        assert torch.equal(result["no gradient", method], result["four", method]["out"])


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_without_a_gradient_of_its_own(method: str, ranks: list[dict[str, Any]]) -> None:
    case = SequenceCase()
    whole = case.problem()
    leaves = [whole[name].requires_grad_() for name in TENSORS]
    out = tg.moba_attention(*leaves, **case.arguments())
    stretch = placement_of(case)[1][0]
    weight = torch.ones(case.num_tokens, dtype=torch.float64)
    weight[stretch.start : stretch.end] = 0
    gradients = torch.autograd.grad((out * weight[:, None]).sum(), leaves)
    for name, gradient in zip(TENSORS, gradients, strict=True):
        parts = [result["no gradient of its own", method][f"grad_{name}"] for result in ranks]
        assert_close(name, in_order(parts, case, 2), gradient)


@pytest.mark.parametrize("name", ["four", "four_zigzag", "packed", "not_causal", "a_head_at_a_time"])
def test_gathered_bytes_are_those_of_the_formula(name: str, ranks: list[dict[str, Any]]) -> None:
    """Forward and backward gather keys and values once each; gradients go to those whose keys were seen."""
    case = CASES[name]
    placement = placement_of(case)
    longest = max(sum(stretch.length for stretch in stretches) for stretches in placement)
    batch = 2 if case.cu_seqlens is None else 1
    per_token = batch * case.num_kv_heads * (case.head_dim + case.value_dim) * case.dtype.itemsize
    is_causal = case.options.get("is_causal", True)
    bounds = list(case.cu_seqlens) if case.cu_seqlens is not None else None
    for rank, result in enumerate(ranks):
        layout = Placement(None, rank, placement)  # type: ignore[arg-type]
        seen = seen_by(layout, bounds, is_causal, rank)
        others = [stretch for other, stretches in enumerate(placement) if other != rank for stretch in stretches]
        tokens = sum(overlap(stretch, seen).length for stretch in others)
        assert result[name, "gather"]["bytes"]["gather"] == 2 * (case.num_ranks - 1) * longest * per_token
        assert result[name, "gather"]["bytes"]["exchange"] == tokens * per_token
    if name == "four":  # contiguous: a rank sends gradients to the ranks before it
        sent = [result[name, "gather"]["bytes"]["exchange"] for result in ranks]
        assert sent[0] == 0 and sent == sorted(sent)


def sent_by(result: dict[Any, Any], name: str, method: str) -> int:
    """Bytes, but for agreements."""
    return sum(count for kind, count in result[name, method]["bytes"].items() if kind in ("gather", "exchange"))


def test_heads_one_after_the_other_hold_less(ranks: list[dict[Any, Any]]) -> None:
    """``max_gathered_bytes`` bounds what a rank receives at a time: of one key head where it is too little for more."""
    of_all, of_one = (
        {method: max(result[name, method]["bytes"]["most at a time"] for result in ranks) for method in METHODS}
        for name in ("four", "a_head_at_a_time")
    )
    assert of_one["gather"] * 2 == of_all["gather"] == 2 * 2 * 4 * 23 * 8 * 8
    assert of_one["exchange"] < of_all["exchange"]


@pytest.mark.parametrize("method", METHODS)
def test_public_counts_of_bytes(method: str, ranks: list[dict[Any, Any]]) -> None:
    for result in ranks:
        counts, public = result["four", method]["bytes"], result["four", method]["public"]
        assert public["all_gather"] == counts["gather"] + counts["agreements"]
        assert public["all_to_all"] == counts["exchange"]


def rows_elsewhere(case: SequenceCase) -> int:
    """Pairs of a query of a head and another rank with a block that it chose, by the choice of one process."""
    whole = case.problem()
    top_k, size = case.arguments()["top_k"], case.arguments()["block_size"]
    is_causal = case.options.get("is_causal", True)
    if case.cu_seqlens is None:
        chosen = tg.moba_route(whole["query"], whole["key"], size, top_k, is_causal).block_indices
        bounds = [0, case.num_tokens]
    else:
        edges = torch.tensor(case.cu_seqlens)
        longest = int(edges.diff().max())
        sequences = (edges, edges, longest, longest)
        chosen = tg.moba_route_varlen(whole["query"], whole["key"], *sequences, size, top_k, is_causal).block_indices
        chosen, bounds = chosen[None], list(case.cu_seqlens)
    rank_of = {}
    for rank, stretches in enumerate(placement_of(case)):
        for stretch in stretches:
            rank_of |= dict.fromkeys(range(stretch.start, stretch.end), rank)
    rows = 0
    for token in range(case.num_tokens):
        start = max(bound for bound in bounds[:-1] if bound <= token)
        for blocks in chosen[:, :, token].flatten(0, 1).tolist():
            far = {start + block * size for block in blocks if block >= 0}
            far -= {start + (token - start) // size * size} if is_causal else set()
            rows += len({rank_of[first] for first in far} - {rank_of[token]})
    return rows


@pytest.mark.parametrize("name", ["pair", "four", "four_zigzag", "pair_zigzag", "not_causal", "float32", "bfloat16"])
def test_bytes_are_those_of_the_plan(name: str, ranks: list[dict[str, Any]]) -> None:
    """Of all ranks together, both ways; what an exchange sends depends on how many owners queries have."""
    case = CASES[name]
    rows = rows_elsewhere(case)
    found = plan(
        case.num_tokens, case.num_ranks, case.num_heads, case.head_dim, num_kv_heads=case.num_kv_heads,
        value_dim=case.value_dim, batch_size=2, dtype=case.dtype, placement=case.placement,
        owners_per_query=rows / (2 * case.num_heads * case.num_tokens), **case.arguments(),
    )  # fmt: skip
    for method in METHODS:
        sent = sum(sent_by(result, name, method) for result in ranks[: case.num_ranks])
        assert round(case.num_ranks * getattr(found, method).num_bytes, 3) == sent


def test_exchanged_bytes_of_packed_sequences(ranks: list[dict[str, Any]]) -> None:
    """Rows that go elsewhere are those of the choice of one process; nothing else depends on what was chosen."""
    case = CASES["packed_on_edges"]
    forward, backward = (8 + 6) * 8 + 2 * 4 + 2 * 8, (2 * 8 + 6) * 8 + 2 * 4 + 3 * 8
    num_sequences, owned = 3, 3
    known = 4 * 3 * 2 * (owned * 8 * 8 + num_sequences * 8)
    sent = sum(sent_by(result, "packed_on_edges", "exchange") for result in ranks)
    assert sent == rows_elsewhere(case) * (forward + backward) + known


REFUSED = {
    "block_size": "ValueError: all ranks of the group must have the same block_size, got [4, 4, 4, 8] by rank",
    "is_causal": "ValueError: all ranks of the group must have the same is_causal, got [1, 1, 1, 0] by rank",
    "softcap": "ValueError: all ranks of the group must have the same softcap (its bits), got",
    "zigzag": "ValueError: zigzag placement of 28 tokens gives the ranks [7, 7, 7, 7], got [6, 6, 6, 10]",
    "method": "ValueError: all ranks of the group must have the same method, got [-1, -1, -1, 1] by rank",
    "no method": "ValueError: method must be one of gather, exchange or None, got 'ring'",
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


def test_a_rank_that_dies_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    words = "topgather: counting the rows that ranks send each other in moba_attention failed on rank 0 of the group: "
    for result in ranks[::2]:
        kind, message = result["died"].split(": ", 1)
        assert kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
        assert message.startswith(words) and len(message) > len(words)


def test_what_sends_less_is_chosen() -> None:
    """Few ranks gather; the more there are, the less a query that goes to its blocks sends beside all keys."""
    shapes = Shapes([4096] * 4, 1, 32, 8, 128, 128, torch.bfloat16, 128, 8, True)
    assert cheaper(shapes, with_backward=True) == "gather"
    assert cheaper(shapes._replace(lengths=[4096] * 64), with_backward=True) == "exchange"
    # A row of one choice goes to one rank.
    assert cheaper(shapes._replace(top_k=1), with_backward=False) == "exchange"
    assert cheaper(shapes._replace(lengths=[4096]), with_backward=True) == "gather"
    assert plan(4096 * 64, 64, 32, 128, num_kv_heads=8).method == "exchange"


def test_a_plan_as_a_table() -> None:
    found = plan(1 << 20, 64, 32, 128, num_kv_heads=8)
    rows = str(found).splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == ["gather", "exchange", "dense ring"]
    assert "<-" in rows[2] and "258 KB" in rows[1]  # 63 tokens' keys and values of 8 heads
    assert found.exchange.seconds < found.gather.seconds < found.ring.seconds
    assert plan(1 << 20, 1, 32, 128).gather.num_bytes == plan(1 << 20, 1, 32, 128).ring.num_bytes == 0
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, 8, got 3"):
        plan(64, 2, 8, 16, num_kv_heads=3)
    with pytest.raises(ValueError, match="placement must be one of"):
        plan(64, 2, 8, 16, placement="striped")


# --- placements, in one process --------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 9))
def test_zigzag_covers_the_sequence(num_tokens: int, num_ranks: int) -> None:
    stretches = sorted(stretch for stretches in zigzag(num_tokens, num_ranks) for stretch in stretches)
    assert sum(stretch.length for stretch in stretches) == num_tokens
    assert max(stretch.length for stretch in stretches) - min(stretch.length for stretch in stretches) <= 1
    for rank, (front, back) in enumerate(zigzag(num_tokens, num_ranks)):
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
    for rank, stretches in enumerate(contiguous(lengths)):
        layout = Placement(None, rank, contiguous(lengths))  # type: ignore[arg-type]
        for part in parts_of(layout, bounds, is_causal, torch.device("cpu")):
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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=5),
    cuts=st.none() | st.lists(st.integers(0, 60), max_size=4),
    is_zigzag=st.booleans(),
    block_size=st.integers(1, 9),
    top_k=st.none() | st.integers(1, 5),
    is_causal=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_any_placement_is_one_process(
    lengths: list[int],
    cuts: list[int] | None,
    is_zigzag: bool,
    block_size: int,
    top_k: int | None,
    is_causal: bool,
    method: str,
) -> None:
    """Ranks are threads here."""
    total, num_ranks = sum(lengths), len(lengths)
    stretches = zigzag(total, num_ranks) if is_zigzag else contiguous(lengths)
    case = SequenceCase(
        num_ranks, num_tokens=total, num_heads=2, num_kv_heads=1, head_dim=3, value_dim=2,
        cu_seqlens=None if cuts is None else (0, *sorted(min(cut, total) for cut in cuts), total),
        placement="zigzag" if is_zigzag else "contiguous",
        options={"block_size": block_size, "top_k": top_k, "is_causal": is_causal},
    )  # fmt: skip
    expected, whole, dim = alone(case), case.problem(), case.tokens_dim

    def mine(tensor: Tensor, rank: int, dim: int) -> Tensor:
        return torch.cat([tensor.narrow(dim, *stretch) for stretch in stretches[rank]], dim)

    def run(group: Any) -> dict[str, Tensor]:
        leaves = [mine(whole[name], group.rank, dim).requires_grad_() for name in TENSORS]
        given = {**case.arguments(), "placement": case.placement, "method": method}
        if case.cu_seqlens is not None:
            given["cu_seqlens"] = torch.tensor(case.cu_seqlens)
        out, lse = moba_attention(*leaves, group, return_lse=True, **given)
        grad_lse = mine(whole["grad_lse"], group.rank, 2 if dim == 2 else 1)
        loss = (out * mine(whole["grad_out"], group.rank, dim)).sum() + (lse * grad_lse).sum()
        gradients = torch.autograd.grad(loss, leaves)
        named = {f"grad_{name}": gradient for name, gradient in zip(TENSORS, gradients, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    results = on_pretended_ranks(num_ranks, run)
    for part, tensor in expected.items():
        of_rows = (2 if dim == 2 else 1) if part == "lse" else dim
        for rank, result in enumerate(results):
            assert_close(f"{part} of rank {rank}", result[part], mine(tensor, rank, of_rows))


@pytest.mark.parametrize("method", METHODS)
def test_scores_that_are_not_finite(method: str) -> None:
    """Rows without a score above -inf, parts of rows without one, and values that are not finite."""
    case = SequenceCase(3, num_tokens=24, num_heads=2, num_kv_heads=1, options={"block_size": 4, "top_k": None})
    whole = case.problem()
    whole["query"] = whole["query"].abs() + 0.1
    whole["key"][:, :, :10] = -torch.inf  # two blocks, and half of one
    whole["value"][:, :, 13] = torch.inf
    expected = tg.moba_attention(*(whole[name] for name in TENSORS), return_lse=True, **case.arguments())
    assert expected[0].isnan().any() and (expected[1] == -torch.inf).any() and expected[1].isfinite().any()

    def run(group: Any) -> Any:
        leaves = [whole[name].chunk(3, dim=2)[group.rank] for name in TENSORS]
        return moba_attention(*leaves, group, return_lse=True, method=method, **case.arguments())

    for rank, results in enumerate(on_pretended_ranks(3, run)):
        for name, actual, tensor in zip(("out", "lse"), results, expected, strict=True):
            wanted = tensor.chunk(3, dim=2)[rank]
            assert torch.equal(actual.isnan(), wanted.isnan()), name
            torch.testing.assert_close(actual, wanted, equal_nan=True, msg=name)

"""The indexer's choice: membership, ties, forced blocks and order, against the definition in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import topgather as tg
from tests.common.tensors import DTYPES, assert_bitwise_equal, integer_tensor, with_layout
from tests.indexer.helpers import IndexCase, check_route, make_index
from topgather import reference

pytestmark = pytest.mark.sanitize
CPU = torch.device("cpu")

SUM = IndexCase(num_index_heads=4, num_key_heads=2, reduction="relu_sum", num_choices=2, has_weights=True)
CASES = [
    IndexCase(batch=2, query_len=150, dim=20, num_index_heads=4, num_key_heads=2),
    IndexCase(query_len=90, block_size=7, top_k=5, force_last=2, force_first=1),
    IndexCase(query_len=60, key_len=101, block_size=5, force_last=0, top_k=3, dim=3),
    IndexCase(query_len=70, key_len=45, block_size=4, is_causal=False, force_first=1),
    IndexCase(query_len=70, block_size=1, top_k=9, dim=1, force_last=0),
    IndexCase(query_len=80, block_size=40, top_k=1, force_last=0, dim=33, reduction="mean"),
    IndexCase(query_len=140, top_k=5, reduction="mean"),
    IndexCase(query_len=50, block_size=4, top_k=3, force_first=1, force_last=2),
    replace(SUM, query_len=90),
    replace(SUM, num_choices=1, force_last=0, block_size=3, query_len=60),
    replace(SUM, num_choices=None, has_weights=False, query_len=40, key_len=70, block_size=1),
    IndexCase(query_len=30, block_size=4, top_k=40),
    IndexCase(query_len=150, dim=64, block_size=64, top_k=1, force_last=0),
    IndexCase(query_len=50, block_size=1, top_k=20, dim=3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: IndexCase, dtype: torch.dtype, device: torch.device) -> None:
    check_route(case, dtype, device)


@pytest.mark.usefixtures("cpu_target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES[:3], CASES[6], SUM, IndexCase(block_size=300, query_len=700)], ids=str)
def test_contract_on_every_instruction_set(case: IndexCase, dtype: torch.dtype) -> None:
    """The last case: a block is scored in several chunks of keys."""
    check_route(case, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["max", "mean", "relu_sum"])
def test_nan_and_inf(reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN ranks as +inf and ties with it; -inf ranks last and is chosen where slots are left."""
    case = IndexCase(num_index_heads=2, num_key_heads=2, query_len=70, dim=4, reduction=reduction, force_last=0)
    inputs = make_index(case, dtype, device, is_integer=True)
    key, query = inputs["index_key"], inputs["index_query"]
    key[0, 0, 9], key[0, 0, 33], key[0, 0, 50] = torch.nan, torch.inf, -torch.inf
    key[0, 1] = -torch.inf
    query[0, 1] = 1
    query[0, 1, 40] = torch.nan
    for top_k in (1, 2, 6):
        options = {**case.route(), "top_k": top_k}
        chosen = tg.index_route(**inputs, **options).block_indices
        assert torch.equal(chosen.cpu(), reference.index_route(**inputs, **options).cpu())


def test_every_choice_of_kinds_of_scores(device: torch.device) -> None:
    """Three blocks, each scoring -inf, 0, 1, +inf or NaN: the 125 problems, a head each."""
    kinds = torch.tensor(list(product((-torch.inf, 0.0, 1.0, torch.inf, torch.nan), repeat=3)))
    key = kinds.view(1, 125, 3, 1).to(device)
    for top_k, force_last in product((1, 2), (0, 1)):
        options = {"block_size": 1, "top_k": top_k, "force_last": force_last}
        chosen = tg.index_route(torch.ones_like(key), key, **options).block_indices
        expected = reference.index_route(torch.ones_like(key).cpu(), key.cpu(), **options)
        assert torch.equal(chosen.cpu(), expected)


def test_a_single_key_of_a_block_is_found(device: torch.device) -> None:
    """What a mean of keys misses: one key in a block that points where the query does, the others the other way."""
    key = -torch.ones(1, 1, 64, 1, device=device)
    key[0, 0, 21] = 1
    query = torch.ones_like(key)
    assert tg.index_route(query, key, 8, 2).block_indices[0, 0, 63].tolist() == [2, 7]
    assert tg.index_route(query, key, 8, 2, "mean").block_indices[0, 0, 63].tolist() == [2, 7]
    key[0, 0, 16:21] = -2
    assert tg.index_route(query, key, 8, 2).block_indices[0, 0, 63].tolist() == [2, 7]
    assert tg.index_route(query, key, 8, 2, "mean").block_indices[0, 0, 63].tolist() == [0, 7]
    assert tg.moba_route(query, key, 8, 2).block_indices[0, 0, 63].tolist() == [0, 7]


def test_keys_behind_the_query_do_not_count(device: torch.device) -> None:
    """Nor in its own block, where nothing is forced."""
    key = torch.zeros(1, 1, 16, 1, device=device)
    key[0, 0, 6], key[0, 0, 1] = 5, 1
    chosen = tg.index_route(torch.ones_like(key), key, 4, 1, force_last=0).block_indices[0, 0, :, 0].tolist()
    assert chosen == [0] * 6 + [1] * 10


def test_a_sum_with_blocks_of_one_key_is_deepseeks(device: torch.device) -> None:
    """Token scores sum_h w_h relu(q_h k), and the best of them by torch's own topk."""
    case = replace(SUM, num_choices=1, num_key_heads=1, block_size=1, top_k=6, force_last=0, query_len=40)
    inputs = make_index(case, torch.float32, device)
    products = (inputs["index_query"] @ inputs["index_key"].transpose(-2, -1)).relu()
    scores = (inputs["weights"][..., None] * products).sum(1)
    scores = scores.masked_fill(torch.ones(40, 40, device=device).triu(1).bool(), -torch.inf)
    chosen = tg.index_route(**inputs, **case.route()).block_indices[:, 0, 6:].long()
    # Sums of nothing are 0 and tie: the same scores, of whichever tokens.
    found = scores[:, 6:].gather(-1, chosen).sort(-1, descending=True).values
    torch.testing.assert_close(found, scores[:, 6:].topk(6).values)


@pytest.mark.parametrize("layout", ["offset", "padded", "transposed", "expanded"])
def test_layout_does_not_matter(layout: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = replace(SUM, batch=2, query_len=40, dim=20)
        inputs = {name: with_layout(tensor, layout) for name, tensor in make_index(case, dtype, device).items()}
        expected = tg.index_route(**{name: t.contiguous() for name, t in inputs.items()}, **case.route())
        found = tg.index_route(**inputs, **case.route())
        assert_bitwise_equal(layout, found.block_indices, expected.block_indices)


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 1, 1), (1, 9, 3)])
def test_empty_and_single(batch: int, query_len: int, key_len: int, device: torch.device) -> None:
    for is_causal in (True, False):
        case = IndexCase(batch=batch, query_len=query_len, key_len=key_len, is_causal=is_causal, block_size=3)
        check_route(case, torch.float32, device)


def test_attention_takes_the_choice(device: torch.device) -> None:
    """One choice a key head, as MiniMax-M3 has it, is what ``moba_attention`` takes."""
    routing = tg.index_route(**make_index(IndexCase(), torch.float32, device), block_size=8, top_k=4)
    query, key = (integer_tensor((1, heads, 100, 8), torch.float32, device, heads) for heads in (4, 2))
    out = tg.moba_attention(query, key, key, 8, routing=routing)
    expected, _ = reference.moba_attention(query, key, key, routing.block_indices, 8)
    torch.testing.assert_close(out, expected.float())


def test_it_is_the_choice_of_minimax_m3(device: torch.device) -> None:
    """The arithmetic of transformers (MiniMaxM3VLIndexer of 5.24) on scores that are exact, written out densely."""
    case = IndexCase(query_len=90, num_index_heads=2, dim=4, top_k=5, force_last=2)
    inputs = make_index(case, torch.float32, device)
    positions = torch.arange(90, device=device)
    scores = inputs["index_query"] @ inputs["index_key"].transpose(-2, -1)
    scores = scores.masked_fill(positions > positions[:, None], -torch.inf)
    blocks = torch.nn.functional.pad(scores, (0, 6), value=-torch.inf).unflatten(-1, (12, 8)).amax(-1)
    newest = (positions[:, None] // 8 - torch.arange(2, device=device)).clamp(min=0)
    blocks = blocks.scatter(-1, newest.expand(1, 2, -1, -1), torch.inf)
    best, chosen = blocks.topk(5)
    chosen = chosen.masked_fill(best == -torch.inf, 12).sort(-1).values
    found = tg.index_route(**inputs, **case.route()).block_indices.long()
    assert torch.equal(torch.where(found < 0, 12, found), chosen)

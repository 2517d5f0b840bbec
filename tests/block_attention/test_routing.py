"""Routing: membership, tie rule and order are three promises, each tested on its own."""

from itertools import product

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    LAYOUTS,
    AttentionCase,
    assert_routing_contract,
    assert_same_support,
    make_inputs,
    with_layout,
)
from tests.common.tensors import DTYPES, assert_bitwise_equal, integer_tensor
from topgather import reference

pytestmark = pytest.mark.sanitize

CASES = [
    AttentionCase(),
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=200, head_dim=32, block_size=16, top_k=4),
    AttentionCase(num_heads=8, num_kv_heads=1, query_len=130, head_dim=3, block_size=7, top_k=5),
    AttentionCase(query_len=333, head_dim=80, block_size=32, top_k=3),
    AttentionCase(query_len=100, head_dim=1, block_size=1, top_k=8),
    AttentionCase(query_len=600, head_dim=96, block_size=512, top_k=1),
    AttentionCase(query_len=700, head_dim=256, block_size=100, top_k=2),
    AttentionCase(query_len=50, block_size=4, top_k=64),
    AttentionCase(query_len=40, key_len=200, block_size=16, top_k=4),
    AttentionCase(query_len=1, key_len=257, block_size=16, top_k=4),
    AttentionCase(query_len=90, key_len=33, block_size=8, top_k=2),
    AttentionCase(query_len=1, block_size=16, top_k=3),
    AttentionCase(query_len=2100, head_dim=8, block_size=2, top_k=16, num_heads=1),
]


def route(query: Tensor, key: Tensor, block_size: int, top_k: int, is_causal: bool = True) -> Tensor:
    return tg.moba_route(query, key, block_size=block_size, top_k=top_k, is_causal=is_causal).block_indices


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract_on_random_scores(
    case: AttentionCase, dtype: torch.dtype, is_causal: bool, device: torch.device
) -> None:
    query, key, _ = make_inputs(case, dtype, device)
    query, key = query.detach(), key.detach()
    routing = tg.moba_route(query, key, case.block_size, case.top_k, is_causal)
    assert routing.block_size == case.block_size and routing.top_k == case.top_k
    assert_routing_contract(routing.block_indices, query, key, case.block_size, case.top_k, is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_len", "key_len"), [(120, 120), (30, 120), (120, 70), (65, 130)])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 40])
def test_tie_rule_on_exact_scores(
    top_k: int, query_len: int, key_len: int, dtype: torch.dtype, is_causal: bool, device: torch.device
) -> None:
    """Small integers: every score is exact and many tie, so the choice equals the reference's exactly."""
    query = integer_tensor((2, 4, query_len, 5), dtype, device, 0)
    key = integer_tensor((2, 2, key_len, 5), dtype, device, 1)
    # A block of one fill keeps the short last block's mean exact too.
    key[:, :, key_len // 8 * 8 :] = 1
    chosen = route(query, key, 8, top_k, is_causal)
    assert torch.equal(chosen, reference.moba_route(query, key, 8, top_k, is_causal).to(device))


@pytest.mark.parametrize("num_blocks", [3, 8, 17, 64, 129])
@pytest.mark.parametrize("top_k", [2, 5, 9])
def test_all_scores_equal_chooses_the_lowest_blocks(num_blocks: int, top_k: int, device: torch.device) -> None:
    query = torch.ones(1, 1, num_blocks, 4, device=device)
    chosen = route(query, query, 1, top_k)[0, 0]
    for query_idx, row in enumerate(chosen.tolist()):
        expected = [*range(min(top_k - 1, query_idx)), query_idx]
        assert row == expected + [-1] * (top_k - len(expected))
    chosen = route(query, query, 1, top_k, is_causal=False)[0, 0]
    expected = list(range(min(top_k, num_blocks)))
    assert (chosen == torch.tensor(expected + [-1] * (top_k - len(expected)), device=device)).all()


def test_signed_zero_scores_tie(device: torch.device) -> None:
    query = torch.ones(1, 1, 6, 1, device=device)
    key = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0, 0.0], device=device).reshape(1, 1, 6, 1)
    assert route(query, key, 1, 2, is_causal=False)[0, 0, 0].tolist() == [0, 1]
    assert route(query, key, 1, 3)[0, 0, 5].tolist() == [0, 1, 5]


@pytest.mark.parametrize("is_causal", [True, False])
def test_order_ascends_whatever_the_scores(is_causal: bool, device: torch.device) -> None:
    """Scores that fall, rise and alternate along the blocks: order is by index, not by score."""
    ramp = torch.arange(64, dtype=torch.float32, device=device)
    for scores in (ramp, -ramp, ramp * (1 - 2 * (ramp % 2))):
        key = scores.reshape(1, 1, 64, 1)
        chosen = route(torch.ones_like(key), key, 4, 4, is_causal)[0, 0]
        used = chosen >= 0
        assert ((chosen[:, 1:] > chosen[:, :-1]) | ~used[:, 1:]).all()
        assert (used[:, :-1] | ~used[:, 1:]).all()
        assert torch.equal(chosen, reference.moba_route(torch.ones_like(key), key, 4, 4, is_causal)[0, 0].to(device))


def test_best_earlier_blocks_are_members(device: torch.device) -> None:
    """Scores written by hand: block scores 3, 1, 4, 1, 5; the last query may choose two beside its own."""
    key = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0], device=device).repeat_interleave(2).reshape(1, 1, 10, 1)
    chosen = route(torch.ones_like(key), key, 2, 3)[0, 0].tolist()
    assert chosen[9] == chosen[8] == [0, 2, 4]
    assert chosen[7] == chosen[6] == [0, 2, 3]
    assert chosen[5] == [0, 1, 2]
    assert chosen[3] == [0, 1, -1]
    assert chosen[0] == [0, -1, -1]
    # The first query, not causal, sees all: the two highest, and a negative query the two lowest.
    assert route(torch.ones_like(key), key, 2, 2, is_causal=False)[0, 0, 0].tolist() == [2, 4]
    assert route(-torch.ones_like(key), key, 2, 2, is_causal=False)[0, 0, 0].tolist() == [1, 3]


def test_own_block_always_counts(device: torch.device) -> None:
    """The own block scores lowest of all, and is still one of the top_k; top_k = 1 is the own block alone."""
    key = -torch.arange(40, dtype=torch.float32, device=device).reshape(1, 1, 40, 1)
    query = torch.ones_like(key)
    for top_k in (1, 2, 3):
        chosen = route(query, key, 4, top_k)[0, 0]
        own = torch.arange(40, device=device) // 4
        assert (chosen == own[:, None]).sum(dim=-1).eq(1).all()
    assert torch.equal(route(query, key, 4, 1)[0, 0, :, 0].long(), torch.arange(40, device=device) // 4)


def test_later_blocks_never_win(device: torch.device) -> None:
    """Later blocks score 1e30 more, and are never chosen."""
    key = torch.logspace(0, 30, 32, device=device).reshape(1, 1, 32, 1)
    chosen = route(torch.ones_like(key), key, 2, 4)[0, 0]
    assert (chosen <= (torch.arange(32, device=device) // 2)[:, None]).all()


@pytest.mark.parametrize(("query_len", "key_len"), [(5, 12), (12, 5), (1, 9), (9, 1), (7, 7)])
def test_causal_alignment_is_bottom_right(query_len: int, key_len: int, device: torch.device) -> None:
    query = torch.ones(1, 1, query_len, 2, device=device)
    key = torch.ones(1, 1, key_len, 2, device=device)
    chosen = route(query, key, 2, 1)[0, 0, :, 0].tolist()
    for query_idx, block in enumerate(chosen):
        position = query_idx + key_len - query_len
        assert block == (position // 2 if position >= 0 else -1)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 4, 12])
def test_nan_and_inf_scores(top_k: int, dtype: torch.dtype, is_causal: bool, device: torch.device) -> None:
    """NaN ranks as +inf and ties with it; -inf ranks last and is still chosen when slots are left."""
    query = integer_tensor((1, 3, 80, 4), dtype, device, 0)
    key = integer_tensor((1, 3, 80, 4), dtype, device, 1)
    key[0, 0, 9], key[0, 0, 33], key[0, 0, 50] = float("nan"), float("inf"), float("-inf")
    key[0, 1] = float("-inf")
    key[0, 2, ::16] = float("nan")
    query[0, 1] = 1
    query[0, 1, 60] = float("nan")
    query[0, 2, 70] = float("inf")
    chosen = route(query, key, 8, top_k, is_causal)
    assert torch.equal(chosen, reference.moba_route(query, key, 8, top_k, is_causal).to(device))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_every_choice_of_kinds_of_scores(top_k: int, device: torch.device) -> None:
    """Four blocks, each scoring -inf, 0, 1, +inf or NaN: the 625 problems, a head each, and the same from a cache."""
    kinds = torch.tensor(list(product((-torch.inf, 0.0, 1.0, torch.inf, torch.nan), repeat=4)))
    key = kinds.view(1, 625, 4, 1).to(device)
    query = torch.ones_like(key)
    for is_causal in (True, False):
        expected = reference.moba_route(query.cpu(), key.cpu(), 1, top_k, is_causal)
        assert torch.equal(route(query, key, 1, top_k, is_causal).cpu(), expected)
    expected = reference.moba_route(query.cpu(), key.cpu(), 1, top_k)
    for kind in (tg.MobaCache, tg.PagedMobaCache):
        cache = kind(1, 625, 1, block_size=1, max_seq_len=4, device=device)
        cache.append(key, key)
        places = (cache.seq_lens, cache.page_table, None, 1, cache.page_size, top_k)
        assert torch.equal(torch.ops.topgather.moba_decode_route(query, cache.centroids, *places).cpu(), expected)


def test_nan_everywhere_stays_in_bounds(device: torch.device) -> None:
    nan = torch.full((2, 2, 150, 8), float("nan"), device=device)
    for top_k in (1, 3, 8, 33):
        for is_causal in (True, False):
            assert_routing_contract(route(nan, nan, 16, top_k, is_causal), nan, nan, 16, top_k, is_causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "fused_qkv"])
def test_layout_does_not_matter(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    case = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=77, head_dim=20)
    query, key, _ = (with_layout(tensor.detach(), layout) for tensor in make_inputs(case, dtype, device))
    expected = route(query.contiguous(), key.contiguous(), 16, 3)
    assert_bitwise_equal(layout, route(query, key, 16, 3), expected)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0), (2, 1, 1)])
def test_empty_and_single(batch: int, query_len: int, key_len: int, is_causal: bool, device: torch.device) -> None:
    query = torch.randn(batch, 4, query_len, 6, device=device)
    key = torch.randn(batch, 2, key_len, 6, device=device)
    assert_routing_contract(route(query, key, 3, 2, is_causal), query, key, 3, 2, is_causal)


def test_no_gradient_flows_through_the_choice(device: torch.device) -> None:
    query, key, _ = make_inputs(AttentionCase(), torch.float32, device)
    block_indices = tg.moba_route(query, key, 16, 2).block_indices
    assert not block_indices.requires_grad and block_indices.is_contiguous()


def test_top_k_beyond_the_blocks_chooses_all(device: torch.device) -> None:
    query, key, _ = make_inputs(AttentionCase(query_len=45, block_size=8), torch.float32, device)
    chosen = route(query, key, 8, 20, is_causal=False)
    assert_same_support(chosen, torch.arange(6, device=device).expand(1, 2, 45, 6))
    assert (chosen[..., 6:] == -1).all()


def test_attention_routes_as_route_does(device: torch.device) -> None:
    """moba_attention(top_k=k) gives the bits of moba_attention(routing=moba_route(top_k=k))."""
    case = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=150, top_k=3)
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.float32, device))
    routing = tg.moba_route(query, key, 16, 3)
    out = tg.moba_attention(query, key, value, 16, top_k=3)
    assert_bitwise_equal("out", tg.moba_attention(query, key, value, 16, routing=routing), out)
    assert_bitwise_equal("out", tg.moba_attention(query, key, value, 16, top_k=3, routing=routing), out)

"""Blocks that are in every choice: the first of the sequence and the newest, whatever they score."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_inputs
from tests.block_attention.test_filtered_routing import HALF_TYPES
from tests.common.tensors import DTYPES, assert_bitwise_equal, integer_tensor
from tests.decoding.helpers import DecodeCase, filled_cache
from topgather import reference

pytestmark = pytest.mark.sanitize

FORCED = [(0, 1), (2, 1), (1, 2), (0, 3), (3, 0)]


def exact(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, whole: int) -> Tensor:
    """Small integers, whose scores are exact and often tie; the tokens from ``whole`` on are ones."""
    tensor = integer_tensor(shape, dtype, device, seed)
    tensor[:, :, whole:] = 1
    return tensor


def check_choice(query: Tensor, key: Tensor, block_size: int, top_k: int, is_causal: bool, forced: Any) -> None:
    chosen = tg.moba_route(query, key, block_size, top_k, is_causal, *forced).block_indices
    expected = reference.moba_route(query.cpu(), key.cpu(), block_size, top_k, is_causal, *forced)
    assert torch.equal(chosen.cpu(), expected), "another choice"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_len", "key_len", "top_k"), [(90, 90, 5), (20, 140, 3), (70, 50, 4), (120, 120, 22)])
def test_choices_are_the_references(
    query_len: int, key_len: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Few and many slots, none left to be chosen by score, queries before the first key."""
    query = exact((2, 4, query_len, 5), dtype, device, 0, query_len)
    key = exact((2, 2, key_len, 5), dtype, device, 1, key_len // 4 * 4)
    for forced in FORCED:
        if forced[1] > 0:
            check_choice(query, key, 4, top_k, True, forced)
        if forced[1] < 2:
            check_choice(query, key, 4, top_k, False, forced)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("forced", [(2, 3), (40, 1)], ids=str)
def test_of_bounded_scores(forced: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """So many blocks that CUDA bounds their scores first; the best of them are among those that are forced."""
    query = exact((1, 1, 40, 64), dtype, device, 0, 40)
    key = exact((1, 1, 300, 64), dtype, device, 1, 300)
    key[:, :, :2], key[:, :, 290:] = query[:, :, :1] * 3, query[:, :, :1] * 3
    check_choice(query, key, 1, sum(forced) + 4, True, forced)


def test_packed_choices_are_each_sequences(device: torch.device) -> None:
    query, key = (exact((1, 2, 70, 8), torch.float32, device, seed, 70) for seed in range(2))
    starts = [0, 3, 3, 39, 70]
    boundaries = torch.tensor(starts, device=device)
    packed = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key)]
    chosen = tg.moba_route_varlen(*packed, boundaries, boundaries, 36, 36, 1, 5, True, 2, 2).block_indices
    for first, end in pairwise(starts):
        alone = reference.moba_route(query[:, :, first:end].cpu(), key[:, :, first:end].cpu(), 1, 5, True, 2, 2)
        assert torch.equal(chosen[None, :, first:end].cpu(), alone)


def test_newest_blocks_by_hand(device: torch.device) -> None:
    """Block 1 scores highest, 0 and the newest lowest; overlapping blocks count once."""
    key = torch.tensor([-9.0, 5.0, 1.0, 2.0, -8.0, -9.0], device=device).view(1, 1, 6, 1)
    chosen = tg.moba_route(torch.ones_like(key), key, 1, 4, force_first=1, force_last=2).block_indices[0, 0].tolist()
    assert chosen == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 5]]


@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize(("forced", "top_k"), [((2, 1), 4), ((1, 2), 4), ((0, 3), 3), ((1, 1), 9)], ids=str)
def test_decoding(forced: tuple[int, int], top_k: int, pages: int, device: torch.device) -> None:
    """The choice of the reference, and moba_decode chooses so."""
    case = DecodeCase(((60, 9), (3, 2)), num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, pages=pages)
    cache, tokens = filled_cache(case, torch.float32, device)
    counts = torch.tensor(case.steps[-1], dtype=torch.int32, device=device)
    query = integer_tensor((2, 4, 3, 8), torch.float32, device, 5)
    places = (cache.seq_lens, cache.page_table, counts, 4, cache.page_size, top_k)
    chosen = torch.ops.topgather.moba_decode_route(query, cache.centroids, *places, *forced)
    out = tg.moba_decode(query, cache, top_k, num_tokens=counts, force_first=forced[0], force_last=forced[1])
    routing = tg.BlockRouting(chosen, 4)
    assert_bitwise_equal("out", tg.moba_decode(query, cache, routing=routing, num_tokens=counts), out)
    for b, count in enumerate(case.steps[-1]):
        length = torch.tensor([case.lengths[b]])
        alone = (query[b : b + 1, :, :count].cpu(), tokens.key[b].cpu(), length)
        expected = reference.moba_decode_route(*alone, 4, top_k, None, *forced)
        assert torch.equal(chosen[b : b + 1, :, :count].cpu(), expected)


def test_attention_chooses_as_route_does(device: torch.device) -> None:
    case = AttentionCase(num_heads=4, num_kv_heads=2, query_len=75, block_size=8, top_k=5)
    inputs = [tensor.detach() for tensor in make_inputs(case, torch.float32, device)]
    routing = tg.moba_route(*inputs[:2], 8, 5, True, 2, 2)
    expected = tg.moba_attention(*inputs, 8, routing=routing)
    assert_bitwise_equal("out", tg.moba_attention(*inputs, 8, 5, force_first=2, force_last=2), expected)
    packed = [tensor[0].transpose(0, 1).contiguous() for tensor in inputs]
    bounds = torch.tensor([0, 75], device=device)
    out = tg.moba_attention_varlen(*packed, bounds, bounds, 75, 75, 8, 5, force_first=2, force_last=2)
    assert_bitwise_equal("out", out.transpose(0, 1)[None], expected)
    # Of fewer blocks than are forced, all.
    few = [tensor[:, :, :20] for tensor in inputs]
    out = tg.moba_attention(*few, 8, 9, force_first=4, force_last=4)
    assert_bitwise_equal("out", out, tg.moba_attention(*few, 8, 3))


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"force_first": 3, "force_last": 3}, ValueError, "top_k must be at least .* 6, got 5"),
        ({"force_first": 5}, ValueError, "top_k must be at least .* 6, got 5"),
        ({"force_last": 0}, ValueError, "force_last must be at least 1"),
        ({"force_first": -1}, ValueError, "force_first must be between 0"),
        ({"force_first": 1.0}, TypeError, "force_first must be an int"),
        ({"force_last": True}, TypeError, "force_last must be an int"),
        ({"force_last": 2, "is_causal": False}, ValueError, "force_last must be 1, or 0, without is_causal"),
        ({"force_first": 6, "is_causal": False}, ValueError, "top_k must be at least .* 6, got 5"),
        ({"force_first": 1, "routing": True, "top_k": None}, ValueError, "force_first and force_last must be 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], exception: type[Exception], named: str) -> None:
    case = AttentionCase(query_len=75, block_size=8)
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.float32, torch.device("cpu")))
    options = {"top_k": 5, **options}
    if "routing" in options:
        options["routing"] = tg.moba_route(query, key, 8, 5)
    else:
        with pytest.raises(exception, match=named):
            tg.moba_route(query, key, 8, **options)
    with pytest.raises(exception, match=named):
        tg.moba_attention(query, key, value, 8, **options)
    if "is_causal" not in options:
        cache = tg.MobaCache(1, 2, 16, block_size=8, max_seq_len=100)
        cache.append(key, value)
        with pytest.raises(exception, match=named):
            tg.moba_decode(query, cache, **options)


@pytest.mark.parametrize("forced", [(6, 0), (5, 1), (-1, 1), (0, 0)], ids=str)
def test_the_op_refuses_them_too(forced: tuple[int, int]) -> None:
    query = torch.ones(1, 1, 40, 4)
    with pytest.raises(ValueError, match=r"force_first|force_last"):
        torch.ops.topgather.moba_route(query, query, 4, 5, True, None, None, 0, 0, *forced)

"""Numbers of a choice of blocks, against choices made by hand."""

import math

import pytest
import torch

import topgather as tg


def choice(*heads: list[list[int]], block_size: int = 2) -> tg.BlockRouting:
    """``[1, H, N, K]``."""
    return tg.BlockRouting(torch.tensor([heads], dtype=torch.int32), block_size)


def test_statistics_of_a_choice_made_by_hand() -> None:
    # Six queries in blocks of two: the own block, and for the last two the first or the second one.
    own = [[0, -1], [0, -1], [1, -1], [1, -1]]
    found = tg.routing_statistics(choice([*own, [0, 2], [0, 2]], [*own, [2, 1], [0, 2]]))
    assert found.num_choices == 16
    assert found.distance_shares == (12 / 16, 1 / 16, 3 / 16)
    assert found.later_share == 0 and found.first_share == 7 / 16
    assert found.mean_distance == pytest.approx((1 + 2 * 3) / 16)
    first = -sum(share * math.log(share) for share in (4 / 8, 2 / 8, 2 / 8))
    second = -sum(share * math.log(share) for share in (3 / 8, 3 / 8, 2 / 8))
    assert found.entropy_per_head == pytest.approx((first, second))
    assert found.entropy == pytest.approx((first + second) / 2)
    assert found.overlap == 7 / 8  # of eight blocks that both could share, all but one
    assert found.numbers("layer_3/")["layer_3/own_share"] == 0.75
    assert all(isinstance(number, float) for number in found.numbers().values())


def test_overlap_of_three_heads() -> None:
    """Pairs share 1, 0 and 1 blocks of at most 1, 1 and 2."""
    found = tg.routing_statistics(choice([[0, -1]], [[0, 1]], [[1, 2]], block_size=16))
    assert found.overlap == 2 / 4
    assert found.later_share == 3 / 5


def test_first_query_and_several_sequences_count() -> None:
    block_indices = torch.tensor([[[[1], [1]]], [[[0], [1]]]], dtype=torch.int32)  # [2, 1, 2, 1]
    found = tg.routing_statistics(tg.BlockRouting(block_indices, 4), first_query=6)
    assert found.distance_shares == (0.75, 0.25)
    assert found.entropy == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    assert math.isnan(found.overlap)


def test_packed_is_as_dense() -> None:
    query, key = torch.randn(2, 3, 48, 8), torch.randn(2, 1, 48, 8)
    dense = tg.routing_statistics(tg.moba_route(query, key, 8, 3))
    bounds = torch.tensor([0, 48, 96])
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key))
    packed = tg.moba_route_varlen(*rows, bounds, bounds, 48, 48, 8, 3)
    assert tg.routing_statistics(packed, cu_seqlens=bounds) == dense


def test_a_choice_of_nothing() -> None:
    found = tg.routing_statistics(choice([[-1, -1]], [[-1, -1]]))
    assert found.num_choices == 0 and math.isnan(found.entropy) and math.isnan(found.overlap)


def test_bad_arguments() -> None:
    packed = tg.BlockRouting(torch.zeros(1, 4, 1, dtype=torch.int32), 2)
    with pytest.raises(TypeError, match="routing"):
        tg.routing_statistics(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_query"):
        tg.routing_statistics(choice([[0]]), first_query=-1)
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        tg.routing_statistics(packed)
    with pytest.raises(ValueError, match="cu_seqlens must delimit"):
        tg.routing_statistics(packed, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        tg.routing_statistics(choice([[0]]), cu_seqlens=torch.tensor([0, 1]))

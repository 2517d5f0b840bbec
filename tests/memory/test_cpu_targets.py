"""Every instruction set this machine has runs the same compact set of memory layers' cases."""

import pytest
import torch

import topgather as tg
from tests.common.tensors import DTYPES, integer_tensor, random_tensor
from tests.memory.helpers import LookupCase, TopkCase, assert_topk_contract, check_experts, check_lookup, check_topk
from topgather import reference

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target")]
CPU = torch.device("cpu")

SEARCHES = [
    TopkCase(num_tokens=37, num_keys=64, head_dim=64, top_k=32),
    TopkCase(num_tokens=9, num_keys=45, head_dim=34, top_k=17),
    TopkCase(num_tokens=5, num_keys=130, head_dim=512, top_k=5),
    TopkCase(num_tokens=3, num_heads=1, num_keys=300, head_dim=16, top_k=200),
    TopkCase(num_tokens=1, num_heads=5, num_keys=3, head_dim=2, top_k=9),
    TopkCase(num_tokens=19, num_heads=1, num_keys=1, head_dim=30, top_k=1),
    TopkCase(num_tokens=3, num_heads=1, num_keys=40, head_dim=6, top_k=1600),
]
LOOKUPS = [
    LookupCase(width=64, width_in=64, bag_size=32),
    LookupCase(width=1, width_in=1),
    LookupCase(width=15, width_in=17, bag_size=9),
    LookupCase(width=33, width_in=31, bag_size=1),
    LookupCase(width=257, width_in=129, num_tokens=5),
    LookupCase(num_rows=9, width=1030, width_in=1030, num_tokens=3, bag_size=5),
    LookupCase(num_rows=200, width=24, num_tokens=120, bag_size=20, pattern="power_law"),
    LookupCase(num_rows=5, width=40, num_tokens=150, bag_size=9, pattern="hot"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEARCHES, ids=str)
def test_search(case: TopkCase, dtype: torch.dtype) -> None:
    check_topk(case, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_lookups(case: LookupCase, dtype: torch.dtype) -> None:
    check_lookup(case, dtype, CPU)
    check_lookup(case, dtype, CPU, seed=1, sparse_grad=True)
    check_experts(case, dtype, CPU)


@pytest.mark.parametrize("layout", ["offset", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(dtype: torch.dtype, layout: str) -> None:
    check_topk(TopkCase(num_tokens=21, num_keys=37, head_dim=74), dtype, CPU, layout)
    check_lookup(LookupCase(width=37), dtype, CPU, layout)
    check_experts(LookupCase(width=19, width_in=37), dtype, CPU, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype: torch.dtype) -> None:
    query = integer_tensor((12, 2, 20), dtype, CPU, 0)
    for num_keys in (5, 64, 150):
        keys = integer_tensor((2, 2, num_keys, 10), dtype, CPU, 1)
        # Half of all scores are equal.
        keys[:, :, ::2] = 1
        for top_k in (1, 2, 16, 25, 33, 100, 300):
            if top_k <= num_keys**2:
                scores, indices = tg.product_key_topk(query, keys, top_k)
                expected_scores, expected = reference.product_key_topk(query, keys, top_k)
                assert torch.equal(indices, expected) and torch.equal(scores.double(), expected_scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_are_not_finite(dtype: torch.dtype) -> None:
    query = random_tensor((9, 2, 12), dtype, CPU, 0).abs()
    keys = random_tensor((2, 2, 70, 6), dtype, CPU, 1)
    for number, row in ((torch.nan, 9), (torch.inf, 33), (-torch.inf, 50)):
        keys[0, :, row] = number
        keys[1, :, row:] = number
        for top_k in (1, 2, 9, 64, 500, 4900):
            assert_topk_contract(*tg.product_key_topk(query, keys, top_k), query, keys, top_k)

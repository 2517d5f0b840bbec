"""Memory layers give the same bits from run to run, for any number of threads, and from several Python threads."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.runs import assert_all_equal, assert_concurrent_calls_agree, run_in_fork
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.memory.helpers import LookupCase, TopkCase, make_lookup, make_topk_inputs, run_experts, run_lookup

CPU = torch.device("cpu")
NUM_THREADS = [1, 2, 3, 5]
SEARCHES = [
    TopkCase(num_tokens=203, num_heads=3, num_keys=90, head_dim=40, top_k=32),
    TopkCase(num_tokens=3, num_heads=1, num_keys=700, head_dim=64, top_k=9),
]
LOOKUPS = [
    LookupCase(num_rows=3000, width=50, num_tokens=200, bag_size=40, width_in=33),
    LookupCase(num_rows=3000, width=50, num_tokens=200, bag_size=40, width_in=7, pattern="power_law"),
    LookupCase(num_rows=30, width=5, num_tokens=900, bag_size=16, width_in=64, pattern="hot"),
    LookupCase(num_rows=6000, width=300, num_tokens=2, bag_size=300),
]
SMALL_SEARCH = TopkCase(num_tokens=40, num_keys=30, head_dim=24)
SMALL_LOOKUP = LookupCase(num_rows=100, width=20, num_tokens=60, pattern="power_law")


def search(case: TopkCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    query, keys = make_topk_inputs(case, dtype, device, seed)
    scores, indices = tg.product_key_topk(query, keys, case.top_k)
    grad_scores = random_tensor(tuple(scores.shape), scores.dtype, device, seed + 2)
    gradients = torch.autograd.grad(scores, (query, keys), grad_scores)
    return {"scores": scores.detach(), "indices": indices, "d_query": gradients[0], "d_keys": gradients[1]}


def look_up(case: LookupCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every result of lookups, and the parts of sparse gradients."""
    lookup = make_lookup(case, dtype, device, seed)
    results = {}
    for name, run in (("lookup", run_lookup), ("experts", run_experts)):
        for sparse_grad in (False, True):
            for part, tensor in run(lookup, sparse_grad=sparse_grad).items():
                if tensor.is_sparse:
                    results[f"{name} rows of {part}"] = tensor.indices()
                results[f"{name} {part} {sparse_grad}"] = tensor.values() if tensor.is_sparse else tensor
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEARCHES, ids=str)
def test_bits_of_the_search_do_not_depend_on_the_number_of_threads(case: TopkCase, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = search(case, dtype, CPU)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        for run_idx in range(2):
            assert_all_equal(search(case, dtype, CPU), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_bits_of_lookups_do_not_depend_on_the_number_of_threads(case: LookupCase, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = look_up(case, dtype, CPU)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        assert_all_equal(look_up(case, dtype, CPU), expected, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run(dtype: torch.dtype, device: torch.device) -> None:
    first = search(SMALL_SEARCH, dtype, device), look_up(SMALL_LOOKUP, dtype, device)
    for run_idx in range(2):
        assert_all_equal(search(SMALL_SEARCH, dtype, device), first[0], f"run {run_idx}")
        assert_all_equal(look_up(SMALL_LOOKUP, dtype, device), first[1], f"run {run_idx}")


def test_the_order_of_tokens_does_not_change_their_sums(device: torch.device) -> None:
    """A bag is summed in the order of its entries, whichever token it is."""
    lookup = make_lookup(SMALL_LOOKUP, torch.float32, device)
    with torch.no_grad():
        out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights)
        dots = torch.ops.topgather.memory_dot(lookup.values_in, lookup.indices, lookup.x)
        indices, weights, x = (t.roll(7, 0) for t in (lookup.indices, lookup.weights, lookup.x))
        assert_bitwise_equal("out", tg.memory_lookup(lookup.values, indices, weights), out.roll(7, 0))
        rolled = torch.ops.topgather.memory_dot(lookup.values_in, indices, x)
        assert_bitwise_equal("dots", rolled, dots.roll(7, 0))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_concurrent_calls_give_the_same_bits(num_threads: int, device: torch.device) -> None:
    """Six Python threads at once, each on another problem, each several times."""
    torch.set_num_threads(num_threads)

    def everything(seed: int) -> dict[str, Tensor]:
        return search(SMALL_SEARCH, torch.float32, device, seed) | look_up(SMALL_LOOKUP, torch.float32, device, seed)

    assert_concurrent_calls_agree(everything, num_threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_call() -> None:
    """The parent used its threads; the child, which inherits none of them, gets the same bits and does not hang."""
    torch.set_num_threads(3)
    query, keys = (tensor.detach() for tensor in make_topk_inputs(SEARCHES[0], torch.float32, CPU))
    lookup = make_lookup(LOOKUPS[0], torch.float32, CPU)
    values, weights = lookup.values.detach(), lookup.weights.detach()
    scores = tg.product_key_topk(query, keys, 8)[0].numpy()
    out = torch.ops.topgather.memory_lookup(values, lookup.indices, weights).numpy()

    def work() -> bool:
        # torch's own threads do not survive a fork; aminmax, which looks at indices, would use them.
        torch.set_num_threads(1)
        again = tg.product_key_topk(query, keys, 8)[0].numpy()
        summed = torch.ops.topgather.memory_lookup(values, lookup.indices, weights).numpy()
        return bool((again == scores).all() and (summed == out).all())

    assert run_in_fork(work) == 0

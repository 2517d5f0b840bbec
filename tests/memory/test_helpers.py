"""The checks of memory layers are checked: right data passes, planted wrong data fails."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common.tensors import LAYOUTS, random_tensor, with_layout
from tests.common.tolerances import accumulation_dtype
from tests.memory.helpers import (
    PATTERNS,
    Lookup,
    LookupCase,
    TopkCase,
    assert_experts_close,
    assert_lookup_close,
    assert_topk_contract,
    assert_topk_gradients,
    half_scores,
    longest_run,
    make_indices,
    make_lookup,
    make_topk_inputs,
    sums_of_pairs,
)
from topgather import reference

CPU = torch.device("cpu")
TOPK = TopkCase(num_tokens=5)
LOOKUP = LookupCase(num_tokens=30, pattern="power_law")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def right_search(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, keys = (tensor.detach() for tensor in make_topk_inputs(TOPK, dtype, CPU))
    scores, indices = reference.product_key_topk(query, keys, 8)
    return scores.to(accumulation_dtype(dtype)), indices, query, keys


@pytest.mark.parametrize("dtype", DTYPES)
def test_search_check_accepts_the_reference(dtype: torch.dtype) -> None:
    assert_topk_contract(*right_search(dtype), 8)


def repeat_one(scores: Tensor, indices: Tensor) -> None:
    scores[2, 1, 3], indices[2, 1, 3] = scores[2, 1, 2], indices[2, 1, 2]


def swap_two(scores: Tensor, indices: Tensor) -> None:
    indices[2, 1, 2:4] = indices[2, 1, 2:4].flip(0)
    scores[2, 1, 2:4] = scores[2, 1, 2:4].flip(0)


def swap_indices_alone(scores: Tensor, indices: Tensor) -> None:
    indices[2, 1, 2:4] = indices[2, 1, 2:4].flip(0)


def out_of_range(scores: Tensor, indices: Tensor) -> None:
    indices[4, 0, 7] = 400


def below_zero(scores: Tensor, indices: Tensor) -> None:
    indices[4, 0, 7] = -1


def leave_the_best_out(scores: Tensor, indices: Tensor) -> None:
    query, keys = (tensor.detach() for tensor in make_topk_inputs(TOPK, torch.float32, CPU))
    more, others = reference.product_key_topk(query, keys, 9)
    scores[0, 0], indices[0, 0] = more[0, 0, 1:].float(), others[0, 0, 1:]


def leave_the_last_out(scores: Tensor, indices: Tensor) -> None:
    query, keys = (tensor.detach() for tensor in make_topk_inputs(TOPK, torch.float32, CPU))
    more, others = reference.product_key_topk(query, keys, 9)
    scores[0, 0, 7], indices[0, 0, 7] = more[0, 0, 8].float(), others[0, 0, 8]


def shift_a_score(scores: Tensor, indices: Tensor) -> None:
    scores[3, 1, 0] *= 1 + 2e-5


def one_nan(scores: Tensor, indices: Tensor) -> None:
    scores[3, 1, 0] = torch.nan


def round_scores(scores: Tensor, indices: Tensor) -> None:
    scores.copy_(scores.bfloat16())


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (repeat_one, "twice"),
        (swap_two, "order"),
        (swap_indices_alone, "scores"),
        (out_of_range, "not below 20 squared"),
        (below_zero, "not below 20 squared"),
        (leave_the_best_out, "left out"),
        (leave_the_last_out, "left out"),
        (shift_a_score, "scores"),
        (one_nan, "NaN mask"),
        (round_scores, "scores"),
    ],
)
def test_search_check_rejects(plant: Callable[[Tensor, Tensor], None], message: str) -> None:
    scores, indices, query, keys = right_search()
    plant(scores, indices)
    with pytest.raises(AssertionError, match=message):
        assert_topk_contract(scores, indices, query, keys, 8)


def test_search_check_rejects_dtypes_and_shapes() -> None:
    scores, indices, query, keys = right_search()
    for wrong in (
        (scores.double(), indices),
        (scores, indices.int()),
        (scores[..., :7], indices),
        (scores, indices[:, :1]),
        (scores.bfloat16(), indices),
    ):
        with pytest.raises(AssertionError, match=r"dtype|shape"):
            assert_topk_contract(*wrong, query, keys, 8)


def test_search_check_rejects_ties_in_the_wrong_order() -> None:
    query, keys = torch.zeros(1, 1, 4), torch.zeros(1, 2, 3, 2)
    assert_topk_contract(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 2]]]), query, keys, 3)
    with pytest.raises(AssertionError, match="order"):
        assert_topk_contract(torch.zeros(1, 1, 3), torch.tensor([[[0, 2, 1]]]), query, keys, 3)


def test_search_check_ranks_what_is_not_finite() -> None:
    """NaN as +inf, opposite infinities last; a NaN passed over is noticed."""
    query = torch.ones(1, 1, 2)
    keys = torch.tensor([[0.0, torch.nan], [1.0, -torch.inf]])[None, ..., None]
    nan, inf = torch.nan, torch.inf
    right = torch.tensor([[[nan, 1.0, -inf, nan]]]), torch.tensor([[[2, 0, 1, 3]]])
    assert_topk_contract(*right, query, keys, 4)
    assert_topk_contract(right[0][..., :2], right[1][..., :2], query, keys, 2)
    for scores, order in (([1.0, nan, -inf, nan], [0, 2, 1, 3]), ([nan, 1.0, nan, -inf], [2, 0, 3, 1])):
        with pytest.raises(AssertionError, match="order"):
            assert_topk_contract(torch.tensor([[scores]]), torch.tensor([[order]]), query, keys, 4)
    with pytest.raises(AssertionError, match="left out"):
        assert_topk_contract(torch.tensor([[[1.0]]]), torch.tensor([[[0]]]), query, keys, 1)


def right_search_gradients() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    scores, indices, query, keys = right_search()
    leaves = [tensor.double().requires_grad_() for tensor in (query, keys)]
    grad_scores = random_tensor(tuple(scores.shape), torch.float32, CPU, 3)
    result = reference.product_key_scores(*leaves).gather(-1, indices)
    gradients = torch.autograd.grad(result, leaves, grad_scores.double())
    return tuple(gradient.float() for gradient in gradients), (query, keys, indices, grad_scores)


def test_search_gradient_check() -> None:
    gradients, problem = right_search_gradients()
    assert_topk_gradients((gradients[0], gradients[1]), *problem)
    for which, where in ((0, (3, 1, 5)), (1, (1, 0, 7, 2))):
        wrong = [gradient.clone() for gradient in gradients]
        wrong[which][where] += 1e-4
        with pytest.raises(AssertionError, match=("d_query", "d_keys")[which]):
            assert_topk_gradients((wrong[0], wrong[1]), *problem)
        wrong[which] = gradients[which].roll(1, 0)
        with pytest.raises(AssertionError, match=("d_query", "d_keys")[which]):
            assert_topk_gradients((wrong[0], wrong[1]), *problem)


def right_results(lookup: Lookup, experts: bool) -> dict[str, Tensor]:
    """The oracle's, in the dtypes of the op."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in lookup.leaves(experts).items()}
    if experts:
        x, values_in, values, weights = leaves.values()
        out = reference.expert_lookup(x, values_in, values, lookup.indices, weights)
    else:
        out = reference.memory_lookup(leaves["d_values"], lookup.indices, leaves["d_weights"])
    gradients = torch.autograd.grad(out, tuple(leaves.values()), lookup.grad_out.double())
    results = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
    dtypes = {name: leaf.dtype for name, leaf in lookup.leaves(experts).items()}
    return {name: tensor.to(dtypes.get(name, lookup.values.dtype)) for name, tensor in results.items()}


CHECKS: dict[bool, Callable[[dict[str, Tensor], Lookup], None]] = {
    False: assert_lookup_close,
    True: assert_experts_close,
}


@pytest.mark.parametrize("experts", [False, True], ids=["lookup", "experts"])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup_check_accepts_the_reference(
    dtype: torch.dtype, weights_dtype: torch.dtype | None, experts: bool
) -> None:
    weights_dtype = None if dtype == torch.float64 else weights_dtype
    lookup = make_lookup(LOOKUP, dtype, CPU, weights_dtype=weights_dtype)
    CHECKS[experts](right_results(lookup, experts), lookup)


@pytest.mark.parametrize("experts", [False, True], ids=["lookup", "experts"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["out", "d_values", "d_weights", "d_x", "d_values_in"])
def test_lookup_check_rejects(name: str, dtype: torch.dtype, experts: bool) -> None:
    """An element off by a hundred roundings (of experts, a thousand), a NaN, rows of others, another dtype."""
    lookup = make_lookup(LOOKUP, dtype, CPU)
    right = right_results(lookup, experts)
    if name not in right:
        return
    roundoff = max(torch.finfo(dtype).eps, torch.finfo(accumulation_dtype(dtype)).eps)
    largest = tuple((right[name].abs() == right[name].abs().max()).nonzero()[0].tolist())
    for wrong in ((1000 if experts else 100) * roundoff, torch.nan):
        results = {key: tensor.clone() for key, tensor in right.items()}
        results[name][largest] *= 1 + wrong
        with pytest.raises(AssertionError, match=name):
            CHECKS[experts](results, lookup)
    results = dict(right) | {name: right[name].roll(1, 0)}
    with pytest.raises(AssertionError, match=name):
        CHECKS[experts](results, lookup)
    results = dict(right) | {name: right[name].to(torch.float32 if dtype != torch.float32 else torch.float64)}
    with pytest.raises(AssertionError, match="dtype"):
        CHECKS[experts](results, lookup)


def test_one_entry_too_few_or_too_many_is_noticed() -> None:
    """In bfloat16, the coarsest: a run's sum without its last entry, a bag's with an entry twice."""
    lookup = make_lookup(replace(LOOKUP, pattern="hot"), torch.bfloat16, CPU)
    right = right_results(lookup, experts=False)
    row = int(lookup.indices[0, 0])
    term = lookup.weights.detach().double()[-1, -1] * lookup.grad_out.double()[-1]
    wrong = right["d_values"].clone()
    wrong[row] = (wrong[row].double() - term).bfloat16()
    with pytest.raises(AssertionError, match="d_values"):
        assert_lookup_close(right | {"d_values": wrong}, lookup)
    term = lookup.weights.detach().double()[3, 0] * lookup.values.detach().double()[row]
    wrong = right["out"].clone()
    wrong[3] = (wrong[3].double() + term).bfloat16()
    with pytest.raises(AssertionError, match="out"):
        assert_lookup_close(right | {"out": wrong}, lookup)


def test_sums_in_16_bits_are_noticed() -> None:
    """What the tolerances are for: running sums that are rounded to bfloat16 at every step."""
    lookup = make_lookup(LookupCase(bag_size=64, num_tokens=30), torch.bfloat16, CPU)
    right = right_results(lookup, experts=False)
    values, weights = lookup.values.detach(), lookup.weights.detach()
    out = torch.zeros_like(right["out"])
    for k in range(64):
        out = out + values[lookup.indices[:, k]] * weights[:, k : k + 1]
    with pytest.raises(AssertionError, match="out"):
        assert_lookup_close(right | {"out": out}, lookup)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 8), (3, 2, 5, 7)])
def test_layouts_keep_values(layout: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape, torch.float32, CPU, 0)
    view = with_layout(tensor, layout)
    expected = tensor[:1].expand(shape) if layout == "expanded" else tensor
    assert torch.equal(view, expected) and view.stride(-1) == 1
    assert view.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (view.data_ptr() % 16 == 0) == (layout not in ("offset", "padded")) or layout == "padded"


def test_unknown_layouts_and_patterns() -> None:
    with pytest.raises(ValueError, match="layout"):
        with_layout(torch.ones(2, 2), "diagonal")
    with pytest.raises(ValueError, match="pattern"):
        make_indices(replace(LOOKUP, pattern="diagonal"), CPU, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    case = LookupCase(num_rows=50, num_tokens=40, bag_size=10, pattern=pattern)
    indices = make_indices(case, CPU, 0)
    assert indices.shape == (40, 10) and indices.min() >= 0 and indices.max() < 50
    counts = indices.flatten().bincount(minlength=50)
    assert longest_run(indices) == counts.max()
    assert {
        "uniform": counts.max() < 25,
        "distinct": bool((counts == 8).all()),
        "hot": counts.max() == 400,
        "power_law": counts.max() > 100 and (counts > 0).sum() > 20,
    }[pattern]


def test_pairs_are_numbered_row_by_row() -> None:
    query, keys = make_topk_inputs(TopkCase(num_keys=3), torch.float64, CPU)
    halves, sizes = half_scores(query, keys)
    sums = sums_of_pairs(halves)
    assert sums.shape == (9, 2, 9) and torch.equal(sums[..., 5], halves[:, :, 0, 1] + halves[:, :, 1, 2])
    assert (sizes >= halves.abs()).all()

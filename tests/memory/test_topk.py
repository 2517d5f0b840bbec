"""product_key_topk against all n * n pairs: the choice, its order, its scores and its gradients."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES, LAYOUTS, assert_bitwise_equal, integer_tensor, random_tensor
from tests.memory.helpers import (
    TopkCase,
    assert_topk_contract,
    assert_topk_gradients,
    check_topk,
    half_scores,
    make_topk_inputs,
    sums_of_pairs,
)
from topgather import reference

pytestmark = pytest.mark.sanitize

CASES = [
    *(TopkCase(num_keys=n, top_k=k) for n, k in ((1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (5, 5), (5, 6), (5, 25))),
    *(TopkCase(num_keys=n, top_k=k) for n, k in ((33, 5), (33, 32), (33, 33), (33, 34), (64, 1), (64, 32), (64, 128))),
    *(TopkCase(num_tokens=3, num_keys=n, top_k=k) for n, k in ((300, 1), (300, 32), (300, 127), (9, 81))),
    *(TopkCase(num_tokens=5, num_keys=40, head_dim=d, top_k=9) for d in (2, 6, 24, 62, 64, 130, 256, 512)),
    *(TopkCase(num_tokens=t, num_heads=h) for t, h in ((0, 2), (9, 0), (0, 0), (1, 1), (70, 1), (2, 9))),
]
# More than a fused kernel keeps on chip.
LARGE = [
    TopkCase(num_tokens=2, num_keys=64, top_k=129),
    TopkCase(num_tokens=3, num_keys=17, top_k=289),
    TopkCase(num_tokens=2, num_heads=1, num_keys=300, top_k=700),
    TopkCase(num_tokens=3, num_keys=50, head_dim=514, top_k=7),
    TopkCase(num_tokens=2, num_heads=1, num_keys=40, head_dim=1024, top_k=200),
    TopkCase(num_tokens=0, num_keys=40, head_dim=1024),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_against_all_pairs(case: TopkCase, dtype: torch.dtype, device: torch.device) -> None:
    check_topk(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("head_dim", [14, 32, 528])
def test_layouts(head_dim: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    check_topk(TopkCase(num_tokens=5, num_heads=3, head_dim=head_dim), dtype, device, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_a_fused_projection(dtype: torch.dtype, device: torch.device) -> None:
    """Two queries cut from one projection, and one set of keys for all heads."""
    fused = random_tensor((7, 2, 3, 16), dtype, device, 0)
    keys = random_tensor((1, 2, 20, 8), dtype, device, 1).expand(3, -1, -1, -1)
    for query in fused.unbind(dim=1):
        scores, indices = tg.product_key_topk(query, keys, 5)
        assert_topk_contract(scores, indices, query, keys, 5)
        same = tg.product_key_topk(query.contiguous(), keys.contiguous(), 5)
        assert_bitwise_equal("scores", scores, same[0])
        assert_bitwise_equal("indices", indices, same[1])


def assert_exact(query: Tensor, keys: Tensor, top_k: int) -> None:
    """Where float32 is exact, so are scores, choice and order."""
    scores, indices = tg.product_key_topk(query, keys, top_k)
    expected_scores, expected = reference.product_key_topk(query, keys, top_k)
    assert_topk_contract(scores, indices, query, keys, top_k)
    assert torch.equal(indices, expected.to(indices.device)), "indices: ties not to the lower one"
    assert torch.equal(scores.double(), expected_scores), "scores: not exact"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", [1, 3, 20, 64, 300])
def test_ties_go_to_the_lower_index(num_keys: int, dtype: torch.dtype, device: torch.device) -> None:
    """Small integers: scores are exact and many tie, within a half and between pairs of different halves."""
    num_tokens = 3 if num_keys == 300 else 8
    query = integer_tensor((num_tokens, 2, 6), dtype, device, 0)
    keys = integer_tensor((2, 2, num_keys, 3), dtype, device, 1)
    for top_k in sorted({min(top_k, num_keys**2) for top_k in (1, 2, 9, 32, 100, 150)}):
        assert_exact(query, keys, top_k)


def test_all_scores_equal(device: torch.device) -> None:
    query, keys = torch.zeros(3, 1, 8, device=device), random_tensor((1, 2, 50, 4), torch.float32, device, 0)
    for top_k in (1, 7, 64, 128, 150):
        indices = tg.product_key_topk(query, keys, top_k)[1]
        assert torch.equal(indices, torch.arange(top_k, device=device).expand(3, 1, top_k))


def test_zeros_of_either_sign_tie(device: torch.device) -> None:
    """-0.0 does not rank below 0.0."""
    query = torch.ones(1, 1, 2, device=device)
    keys = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [-0.0, -0.0, 0.0, 0.0]], device=device)[None, ..., None]
    for top_k in (1, 5, 16):
        indices = tg.product_key_topk(query, keys, top_k)[1]
        assert torch.equal(indices, torch.arange(top_k, device=device)[None, None])


def planted(number: float) -> Callable[[Tensor, Tensor], None]:
    def plant(query: Tensor, keys: Tensor) -> None:
        keys[0, 0, 3, 0] = number
        keys[0, 1, 11, 2] = number
        keys[1, 1, 5] = number

    return plant


def plant_in_queries(query: Tensor, keys: Tensor) -> None:
    query[1, 0, 0] = torch.nan
    query[2, 1, 9] = torch.inf
    query[4] = torch.nan


def plant_everything(query: Tensor, keys: Tensor) -> None:
    keys[0, 0, ::2], keys[0, 1, 1::3], keys[0, 0, 5] = torch.nan, -torch.inf, torch.inf
    keys[1, 0, :] = torch.inf
    keys[1, 1, :] = -torch.inf


NONFINITE: dict[str, Callable[[Tensor, Tensor], None]] = {
    "nan": planted(torch.nan),
    "inf": planted(torch.inf),
    "-inf": planted(-torch.inf),
    "queries": plant_in_queries,
    "everything": plant_everything,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NONFINITE)
def test_nan_and_inf(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN half scores rank as +inf, opposite infinities as -inf; scores say what is true; rows without stay as is."""
    query = random_tensor((6, 2, 16), dtype, device, 0).abs()
    keys = random_tensor((2, 2, 20, 8), dtype, device, 1)
    NONFINITE[kind](query, keys)
    for top_k in (1, 8, 50, 128, 140, 400):
        scores, indices = tg.product_key_topk(query, keys, top_k)
        assert_topk_contract(scores, indices, query, keys, top_k)


def test_rank_of_each_kind_of_score(device: torch.device) -> None:
    """One query, halves of 0, NaN, +inf and -inf in that order, all 16 sums."""
    query = torch.ones(1, 1, 2, device=device)
    halves = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf], device=device)
    scores, indices = tg.product_key_topk(query, halves.view(1, 1, 4, 1).expand(1, 2, 4, 1), 16)
    # NaN or +inf with 0, NaN or +inf, by index; 0 and 0; anything with -inf, by index.
    assert indices.flatten().tolist() == [1, 2, 4, 5, 6, 8, 9, 10, 0, 3, 7, 11, 12, 13, 14, 15]
    nan, inf = torch.nan, torch.inf
    expected = [nan, inf, nan, nan, nan, inf, nan, inf, 0.0, -inf, nan, nan, -inf, nan, nan, -inf]
    torch.testing.assert_close(scores.flatten().tolist(), expected, equal_nan=True)


KINDS_OF_SCORES = (-torch.inf, 0.0, 1.0, torch.inf, torch.nan)


def assert_reference(halves: Tensor, top_k: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Half scores ``[H, 2, n]``, one token: choice, order and scores are the reference's, to the last one."""
    query = torch.ones(1, halves.shape[0], 2, dtype=dtype, device=device)
    keys = halves.unsqueeze(-1).to(device, dtype)
    scores, indices = tg.product_key_topk(query, keys, top_k)
    expected_scores, expected = reference.product_key_topk(query.cpu(), keys.cpu(), top_k)
    assert torch.equal(indices.cpu(), expected)
    assert torch.equal(scores.double().cpu().nan_to_num(7.5), expected_scores.nan_to_num(7.5))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_every_choice_of_kinds_of_half_scores(top_k: int, device: torch.device) -> None:
    """Two keys a half, each of -inf, 0, 1, +inf and NaN: the 625 problems, a head each."""
    assert_reference(torch.tensor(list(product(KINDS_OF_SCORES, repeat=4))).view(-1, 2, 2), top_k, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", [3, 9, 40, 70])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_infinite_sums_tie(share: float, num_keys: int, dtype: torch.dtype, device: torch.device) -> None:
    """Among equal infinite sums the lower index, however many there are, and the numbers between them in order."""
    generator = torch.Generator().manual_seed(num_keys)
    halves = torch.randint(-2, 3, (8, 2, num_keys), generator=generator).float()
    kinds = torch.tensor([torch.inf, -torch.inf, torch.nan])
    special = kinds[torch.randint(0, 3, halves.shape, generator=generator)]
    halves = torch.where(torch.rand(halves.shape, generator=generator) < share, special, halves)
    for top_k in (1, 2, 7, 33, 81, 128, 300):
        if top_k <= num_keys**2:
            assert_reference(halves, top_k, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_left", [0, 1, 2, 5])
def test_masked_keys(num_left: int, dtype: torch.dtype, device: torch.device) -> None:
    """Keys masked by -inf come last, by index, where fewer than top_k pairs are left."""
    halves = integer_tensor((4, 2, 24), torch.float32, torch.device("cpu"), 0)
    halves[:, 0, : 24 - num_left] = -torch.inf
    halves[:2, 1, num_left + 1 :] = -torch.inf
    for top_k in (1, 3, 16, 60, 128, 200):
        assert_reference(halves, top_k, device, dtype)


def test_sums_that_overflow_stay_between_the_infinite_ones(device: torch.device) -> None:
    """Two numbers whose sum is beyond float32 rank below +inf and above -inf."""
    huge = torch.finfo(torch.float32).max
    halves = torch.tensor([[[huge, -huge, torch.inf], [huge, -huge, 0.0]]])
    scores, indices = tg.product_key_topk(torch.ones(1, 1, 2, device=device), halves.unsqueeze(-1).to(device), 9)
    assert indices.flatten().tolist() == [6, 7, 8, 0, 2, 1, 3, 5, 4]
    assert scores.flatten().tolist() == [torch.inf] * 4 + [huge, 0.0, 0.0, -huge, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_tells_apart_what_the_dtype_does_not(dtype: torch.dtype, device: torch.device) -> None:
    """Half scores and sums are not rounded to 16 bits: keys that differ in the last bit of a large sum keep order."""
    query = torch.ones(1, 1, 4, dtype=dtype, device=device)
    keys = torch.zeros(1, 2, 16, 2, dtype=dtype, device=device)
    keys[..., 0] = 256
    keys[0, 0, :, 1] = torch.arange(16) / 64
    keys[0, 1, :, 1] = torch.arange(16).flip(0) / 1024
    assert_exact(query, keys, 100)


def assert_every_row_depends_on_its_own_query_alone(top_k: int, dtype: torch.dtype, device: torch.device) -> None:
    """The same bits among other tokens, other heads, and tokens that are NaN."""
    query, keys = (t.detach() for t in make_topk_inputs(TopkCase(num_tokens=37, num_heads=3), dtype, device))
    scores, indices = tg.product_key_topk(query, keys, top_k)
    parts = [(slice(5, 6), slice(0, 3)), (slice(3, 36), slice(1, 2)), (slice(0, 20), slice(2, 3))]
    for tokens, heads in parts:
        part = tg.product_key_topk(query[tokens, heads], keys[heads], top_k)
        assert_bitwise_equal("scores", part[0], scores[tokens, heads])
        assert_bitwise_equal("indices", part[1], indices[tokens, heads])
    rolled = tg.product_key_topk(query.roll((5, 1), (0, 1)), keys.roll(1, 0), top_k)
    assert_bitwise_equal("rolled scores", rolled[0], scores.roll((5, 1), (0, 1)))
    assert_bitwise_equal("rolled indices", rolled[1], indices.roll((5, 1), (0, 1)))
    disturbed = query.clone()
    disturbed[::2] = torch.nan
    beside = tg.product_key_topk(disturbed, keys, top_k)
    assert_bitwise_equal("scores beside NaN", beside[0][1::2], scores[1::2])
    assert_bitwise_equal("indices beside NaN", beside[1][1::2], indices[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_depends_on_its_own_query_alone(dtype: torch.dtype, device: torch.device) -> None:
    assert_every_row_depends_on_its_own_query_alone(8, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_many_choices_depends_on_its_own_query_alone(dtype: torch.dtype) -> None:
    """On the CPU: on CUDA torch's matrix product, which takes over here, makes no such promise."""
    assert_every_row_depends_on_its_own_query_alone(140, dtype, torch.device("cpu"))


def test_a_smaller_top_k_is_the_beginning_of_a_larger(device: torch.device) -> None:
    query, keys = (t.detach() for t in make_topk_inputs(TopkCase(num_keys=30), torch.float32, device))
    scores, indices = tg.product_key_topk(query, keys, 128)
    for top_k in (1, 5, 31, 64):
        part = tg.product_key_topk(query, keys, top_k)
        assert_bitwise_equal("scores", part[0], scores[..., :top_k])
        assert_bitwise_equal("indices", part[1], indices[..., :top_k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_layout(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Those of a sum arrive expanded; others may have any strides."""
    query, keys = make_topk_inputs(TopkCase(), dtype, device)
    scores, indices = tg.product_key_topk(query, keys, 8)
    grad_scores = random_tensor(tuple(scores.shape), scores.dtype, device, 3)
    if kind == "expanded":
        grad_scores = grad_scores[:1, :1, :1].expand(scores.shape)
    else:
        grad_scores = grad_scores.transpose(0, 2).contiguous().transpose(0, 2)
    gradients = torch.autograd.grad(scores, (query, keys), grad_scores)
    assert_topk_gradients((gradients[0], gradients[1]), query, keys, indices, grad_scores)


def test_gradient_of_a_choice_that_repeats_keys_of_a_half(device: torch.device) -> None:
    """All pairs chosen: every half key stands n times in a token's bag."""
    check_topk(TopkCase(num_tokens=4, num_keys=7, top_k=49), torch.float32, device)


def test_keys_never_chosen_have_gradients_of_zero(device: torch.device) -> None:
    query, keys = make_topk_inputs(TopkCase(num_tokens=2, num_keys=64, top_k=3), torch.float32, device)
    scores, indices = tg.product_key_topk(query, keys, 3)
    scores.sum().backward()
    assert keys.grad is not None
    is_chosen = torch.zeros(2, 2, 64, dtype=torch.bool)
    for head in range(2):
        of_head = indices[:, head].flatten().cpu()
        is_chosen[head, 0, of_head // 64] = True
        is_chosen[head, 1, of_head % 64] = True
    assert ((keys.grad != 0).any(-1).cpu() == is_chosen).all()


def test_keys_not_chosen_do_not_matter(device: torch.device) -> None:
    """Gradients come from the chosen alone, even where another key is -inf."""
    query, keys = make_topk_inputs(TopkCase(), torch.float32, device)
    keys = keys.detach().clone()
    query = query.detach().abs()
    keys[:, :, 7] = -torch.inf
    leaves = (query.requires_grad_(), keys.requires_grad_())
    scores, _ = tg.product_key_topk(*leaves, 8)
    assert scores.isfinite().all()
    gradients = torch.autograd.grad(scores.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][:, :, 7] == 0).all()


def test_inputs_are_left_alone_and_indices_have_no_gradient(device: torch.device) -> None:
    query, keys = make_topk_inputs(TopkCase(), torch.float32, device)
    copies = query.detach().clone(), keys.detach().clone()
    scores, indices = tg.product_key_topk(query, keys, 8)
    assert scores.requires_grad and not indices.requires_grad
    scores.sum().backward()
    assert torch.equal(query.detach(), copies[0]) and torch.equal(keys.detach(), copies[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_queries(dtype: torch.dtype, device: torch.device) -> None:
    """More tokens than a kernel takes at a time, not a whole number of its tiles."""
    check_topk(TopkCase(num_tokens=331, num_heads=1, num_keys=70, head_dim=40, top_k=16), dtype, device)


def test_the_most_keys(device: torch.device) -> None:
    """Pairs numbered up to 2^31, seen by their best alone."""
    num_keys = 46340
    query = torch.ones(1, 1, 2, device=device)
    keys = torch.zeros(1, 2, num_keys, 1, device=device)
    keys[0, 0, -3:, 0] = torch.tensor([1.0, 3.0, 2.0])
    keys[0, 1, -2:, 0] = torch.tensor([1.5, 2.5])
    scores, indices = tg.product_key_topk(query, keys, 6)
    last = num_keys - 1
    pairs = [(1, 0), (1, 1), (0, 0), (0, 1), (2, 0), (1, 2)]
    expected = [(last - i) * num_keys + (last - j if j < 2 else 0) for i, j in pairs]
    assert scores.flatten().tolist() == [5.5, 4.5, 4.5, 3.5, 3.5, 3.0]
    # Ties of sums: the lower index, that of the lower half key.
    assert set(indices.flatten().tolist()) == set(expected)
    assert indices.flatten().tolist() == [expected[0], expected[1], expected[2], expected[4], expected[3], expected[5]]


def test_helper_scores_are_the_references(device: torch.device) -> None:
    query, keys = (t.detach() for t in make_topk_inputs(TopkCase(), torch.bfloat16, device))
    torch.testing.assert_close(sums_of_pairs(half_scores(query, keys)[0]), reference.product_key_scores(query, keys))

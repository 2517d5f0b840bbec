"""The checks themselves are checked: right data passes, planted wrong data fails."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.block_attention.helpers import (
    LAYOUTS,
    AttentionCase,
    AttentionResult,
    assert_attention_close,
    assert_routing_contract,
    assert_same_support,
    make_gradients,
    make_inputs,
    reference_attention,
    score_margins,
    with_layout,
)
from tests.common.tensors import assert_bitwise_equal, assert_same_nonfinite, integer_tensor, random_tensor
from tests.common.tolerances import TOLERANCES, UNDERFLOW, UNIT_ROUNDOFF, accumulation_dtype
from topgather import reference

CPU = torch.device("cpu")
CASE = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=70, head_dim=16, block_size=8, top_k=3)


def routing_problem(is_causal: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    query, key, _ = make_inputs(CASE, torch.float32, CPU)
    query, key = query.detach(), key.detach()
    return query, key, reference.moba_route(query, key, CASE.block_size, CASE.top_k, is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
def test_routing_check_accepts_the_reference(is_causal: bool) -> None:
    query, key, block_indices = routing_problem(is_causal)
    assert_routing_contract(block_indices, query, key, CASE.block_size, CASE.top_k, is_causal)


def swap_two(indices: Tensor) -> None:
    indices[0, 0, -1] = indices[0, 0, -1].flip(0)


def drop_own(indices: Tensor) -> None:
    unchosen = next(block for block in range(8) if block not in indices[1, 2, -1].tolist())
    indices[1, 2, -1] = torch.tensor(sorted([*indices[1, 2, -1, :-1].tolist(), unchosen]))


def choose_later(indices: Tensor) -> None:
    indices[0, 1, 30] = torch.tensor([0, 3, 4])


def repeat_one(indices: Tensor) -> None:
    indices[0, 0, 50, 0] = indices[0, 0, 50, 1]


def pad_in_front(indices: Tensor) -> None:
    indices[0, 0, 3] = torch.tensor([-1, 0, -1])


def leave_one_out(indices: Tensor) -> None:
    indices[0, 0, -1, -1] = -1


def out_of_range(indices: Tensor) -> None:
    indices[0, 0, -1, -1] = 9


def below_minus_one(indices: Tensor) -> None:
    indices[0, 0, 3, -1] = -2


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (swap_two, "ascending"),
        (drop_own, "own block missing"),
        (choose_later, "not eligible"),
        (repeat_one, "ascending"),
        (pad_in_front, "padding before the end"),
        (leave_one_out, "eligible blocks"),
        (out_of_range, "past the last"),
        (below_minus_one, "below -1"),
    ],
)
def test_routing_check_refuses_planted_errors(plant: Callable[[Tensor], None], message: str) -> None:
    query, key, block_indices = routing_problem()
    plant(block_indices)
    with pytest.raises(AssertionError, match=message):
        assert_routing_contract(block_indices, query, key, CASE.block_size, CASE.top_k, True)


def test_routing_check_refuses_a_lower_score() -> None:
    """The weakest chosen block of one query changed for the strongest it left out."""
    query, key, block_indices = routing_problem(is_causal=False)
    scores = reference.block_scores(query, key, CASE.block_size)[1, 3, 40]
    ranked = scores.argsort(descending=True)
    assert scores[ranked[2]] - scores[ranked[3]] > 1e-4
    block_indices[1, 3, 40] = ranked[[0, 1, 3]].sort().values
    with pytest.raises(AssertionError, match="scores higher"):
        assert_routing_contract(block_indices, query, key, CASE.block_size, CASE.top_k, False)


def test_routing_check_refuses_wrong_dtype_and_shape() -> None:
    query, key, block_indices = routing_problem()
    for wrong in (block_indices.long(), block_indices[..., :2], block_indices[:, :, 1:]):
        with pytest.raises(AssertionError):
            assert_routing_contract(wrong, query, key, CASE.block_size, CASE.top_k, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tie_margin_covers_rounding_and_little_more(dtype: torch.dtype) -> None:
    """Scores computed in the accumulation dtype stay within the margin, which stays below 1e-4."""
    query, key = (random_tensor((2, 4, 128, 64), dtype, CPU, seed) for seed in (0, 1))
    wide = accumulation_dtype(dtype)
    centroids = key.to(wide).unflatten(2, (8, 16)).sum(dim=3) / 16
    scores = query.to(wide) @ centroids.transpose(-2, -1)
    margins = score_margins(query, key, 16)
    error = (scores.double() - reference.block_scores(query, key, 16)).abs()
    assert (error <= margins).all()
    assert margins.max() < 1e-4


def emulated_kernel(case: AttentionCase, dtype: torch.dtype) -> tuple[AttentionResult, Callable[..., None]]:
    """An honest computation in ``dtype`` by dense torch, and the check that must accept it."""
    inputs = make_inputs(case, dtype, CPU)
    gradients = make_gradients(case, dtype, CPU, 0)
    block_indices = reference.moba_route(inputs[0], inputs[1], case.block_size, case.top_k, case.is_causal)
    visible = reference.moba.visible_keys(block_indices, case.keys, case.block_size, case.is_causal)
    wide = accumulation_dtype(dtype)
    query, key, value = (tensor.detach().to(wide).requires_grad_() for tensor in inputs)
    group = case.num_heads // case.kv_heads
    scores = query @ key.repeat_interleave(group, 1).transpose(-2, -1) * case.head_dim**-0.5
    scores = torch.where(visible, scores, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp()
    # Straight-through rounding of the weights, as a kernel that multiplies in half precision does.
    weights = weights + (weights.to(dtype).to(wide) - weights).detach()
    out = weights @ value.repeat_interleave(group, 1)
    d_inputs = torch.autograd.grad((out, lse), (query, key, value), (gradients[0].to(wide), gradients[1]))
    tensors = [tensor.detach().to(dtype) for tensor in (out, *d_inputs)]
    result = AttentionResult(tensors[0], lse.detach(), *tensors[1:])

    def check(result: AttentionResult) -> None:
        assert_attention_close(result, inputs, gradients, block_indices, case)

    return result, check


DTYPES = list(UNIT_ROUNDOFF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, query_len=256, head_dim=64, block_size=32), replace(CASE, query_len=1)],
    ids=str,
)
def test_attention_check_accepts_an_honest_computation(case: AttentionCase, dtype: torch.dtype) -> None:
    result, check = emulated_kernel(case, dtype)
    check(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["out", "lse", "d_query", "d_key", "d_value"])
def test_attention_check_refuses_one_wrong_element(name: str, dtype: torch.dtype) -> None:
    """Off by a tenth of the tensor's root mean square: half precision must still see that."""
    result, check = emulated_kernel(CASE, dtype)
    tensor = result.tensors()[name]
    smallest = tuple((tensor.abs() == tensor.abs().min()).nonzero()[0].tolist())
    tensor[smallest] += 0.1 * float(tensor.double().square().mean().sqrt())
    with pytest.raises(AssertionError, match=name):
        check(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_check_refuses_another_support(dtype: torch.dtype) -> None:
    """One query of many that attends to one block too few."""
    result, check = emulated_kernel(CASE, dtype)
    inputs = make_inputs(CASE, dtype, CPU)
    gradients = make_gradients(CASE, dtype, CPU, 0)
    block_indices = reference.moba_route(inputs[0], inputs[1], CASE.block_size, CASE.top_k, True)
    block_indices[1, 2, 60, 0] = -1
    wrong = reference_attention(*inputs, *gradients, block_indices, CASE)
    for name, tensor in wrong.tensors().items():
        part = replace(result, **{name: tensor.to(result.tensors()[name].dtype)})
        with pytest.raises(AssertionError, match=name):
            check(part)


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), -float("inf")])
def test_masks_are_compared_first(planted: float) -> None:
    result, check = emulated_kernel(CASE, torch.float32)
    result.out[0, 0, 0, 0] = planted
    with pytest.raises(AssertionError, match="mask differs"):
        check(result)
    with pytest.raises(AssertionError, match="mask differs"):
        assert_same_nonfinite("zeros", torch.zeros(3), torch.tensor([0.0, planted, 0.0]))


def test_attention_check_refuses_wrong_dtype_and_shape() -> None:
    result, check = emulated_kernel(CASE, torch.float32)
    with pytest.raises(AssertionError, match="dtype"):
        check(replace(result, out=result.out.double()))
    with pytest.raises(AssertionError, match="shape"):
        check(replace(result, out=result.out[:, :, 1:]))


def test_same_support_check() -> None:
    left = torch.tensor([[[[0, 2, -1], [1, 3, 4]]]], dtype=torch.int32)
    assert_same_support(left, left.flip(-1))
    assert_same_support(left, torch.tensor([[[[2, 0, -1, -1], [4, -1, 1, 3]]]], dtype=torch.int32))
    for wrong in ([[0, 3, -1], [1, 3, 4]], [[0, 2, 3], [1, 3, 4]], [[0, -1, -1], [1, 3, 4]]):
        with pytest.raises(AssertionError, match="other blocks"):
            assert_same_support(left, torch.tensor([[wrong]], dtype=torch.int32))


def test_bitwise_check() -> None:
    zeros = torch.zeros(4)
    assert_bitwise_equal("zeros", zeros, zeros.clone())
    assert_bitwise_equal("nan", zeros / 0, zeros / 0)
    for wrong in (-zeros, zeros.double(), torch.zeros(5), torch.tensor([0.0, 0.0, 0.0, 1e-45])):
        with pytest.raises(AssertionError):
            assert_bitwise_equal("zeros", wrong, zeros)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded_batch"])
def test_layouts_keep_values(layout: str) -> None:
    tensor = random_tensor((2, 3, 5, 7), torch.float32, CPU, 0)
    moved = with_layout(tensor, layout)
    assert torch.equal(moved, tensor) and moved.stride(-1) == 1
    if layout not in ("contiguous", "fused_qkv"):
        assert moved.stride() != tensor.stride() or moved.storage_offset() != 0
    fused = make_inputs(CASE, torch.float32, CPU, layout="fused_qkv")
    for view, plain in zip(fused, make_inputs(CASE, torch.float32, CPU), strict=True):
        assert torch.equal(view, plain)
    assert fused[0].untyped_storage().data_ptr() == fused[2].untyped_storage().data_ptr()


def test_integer_inputs_make_exact_ties() -> None:
    """The tie tests mean something: scores are exact in float32, and many tie."""
    query, key = (integer_tensor((1, 2, 256, 4), torch.float32, CPU, seed) for seed in (0, 1))
    scores = reference.block_scores(query, key, 8)
    assert torch.equal(scores.float().double(), scores)
    assert (scores[..., 1:] == scores[..., :-1]).sum() > 20


def test_table_is_complete() -> None:
    assert set(UNIT_ROUNDOFF) == set(UNDERFLOW)
    for (op, result), tolerance in TOLERANCES.items():
        assert tolerance.reason, (op, result)
        assert 0 < tolerance.relative(torch.float32, 1) < 1e-4
    for dtype, roundoff in UNIT_ROUNDOFF.items():
        assert roundoff == torch.finfo(dtype).eps / 2
        assert UNDERFLOW[dtype] <= 2 * torch.finfo(dtype).eps ** 2

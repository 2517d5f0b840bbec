"""memory_lookup, memory_dot and expert_lookup against the oracle: results and every gradient."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES, LAYOUTS, assert_bitwise_equal, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from tests.memory.helpers import (
    LookupCase,
    assert_experts_close,
    assert_lookup_close,
    check_experts,
    check_lookup,
    make_lookup,
    root_sum_square,
    run_experts,
    run_lookup,
)

pytestmark = pytest.mark.sanitize

WIDTHS = [LookupCase(width=width, width_in=width) for width in (1, 2, 3, 7, 33, 64, 100, 256, 1030)]
BAGS = [LookupCase(bag_size=bag_size) for bag_size in (0, 1, 2, 7, 32, 33, 128)]
ROWS = [
    LookupCase(num_rows=1),
    LookupCase(num_rows=2, bag_size=1),
    LookupCase(num_rows=5000),
    LookupCase(num_rows=72, pattern="distinct"),
    LookupCase(num_rows=100, pattern="distinct"),
]
TOKENS = [LookupCase(num_tokens=num_tokens) for num_tokens in (0, 1, 2, 300)]
# Rows that many entries name, whose sums are cut into pieces.
HOT = [
    LookupCase(num_tokens=150, bag_size=16, width=20, pattern="hot"),
    LookupCase(num_tokens=150, bag_size=16, width=20, pattern="power_law"),
    LookupCase(num_tokens=40, bag_size=8, width=3, width_in=1, pattern="hot"),
    LookupCase(num_rows=3, num_tokens=90, bag_size=11, width=66, width_in=5),
]
# Sums of pieces that are many enough to be summed in pieces themselves.
LONG_RUNS = [
    LookupCase(num_tokens=3000, bag_size=10, width=3, width_in=2, pattern="hot"),
    LookupCase(num_rows=3, num_tokens=5000, bag_size=11, width=2, width_in=3),
]
CASES = WIDTHS + BAGS + ROWS + TOKENS + HOT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lookup_against_reference(
    case: LookupCase, sparse_grad: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check_lookup(case, dtype, device, sparse_grad=sparse_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_against_reference(case: LookupCase, dtype: torch.dtype, device: torch.device) -> None:
    check_experts(case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LONG_RUNS, ids=str)
def test_runs_of_thousands_of_entries(case: LookupCase, dtype: torch.dtype, device: torch.device) -> None:
    check_lookup(case, dtype, device)
    check_experts(case, dtype, device, sparse_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "identity"])
def test_activations(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    check_experts(LookupCase(width_in=21), dtype, device, activation=activation)


def test_gelu_is_the_default(device: torch.device) -> None:
    lookup = make_lookup(LookupCase(), torch.float32, device)
    arguments = (lookup.x, lookup.values_in, lookup.values, lookup.indices, lookup.weights)
    assert_bitwise_equal("out", tg.expert_lookup(*arguments), tg.expert_lookup(*arguments, "gelu", False))
    out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights)
    assert_bitwise_equal("out", out, tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dot_against_reference(case: LookupCase, dtype: torch.dtype, device: torch.device) -> None:
    lookup = make_lookup(case, dtype, device)
    out = torch.ops.topgather.memory_dot(lookup.values_in, lookup.indices, lookup.x)
    products = lookup.values_in.double()[lookup.indices] * lookup.x.double().unsqueeze(1)
    assert out.dtype == accumulation_dtype(dtype)
    tolerance = TOLERANCES["memory_dot", "out"]
    expected, magnitude = products.sum(-1).detach(), root_sum_square(products.detach(), -1)
    assert_close("out", out.detach(), expected, magnitude, tolerance, dtype, case.width_in)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("width", [5, 64])
def test_layouts(width: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Views of a larger table, rows at odd addresses, one row for all; weights, indices and grad_out likewise."""
    case = LookupCase(width=width, width_in=width + 2, num_tokens=20)
    check_lookup(case, dtype, device, layout)
    check_experts(case, dtype, device, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_layout(dtype: torch.dtype, device: torch.device) -> None:
    """grad_out arrives expanded (from a sum) or with a stride in its last dimension: the bits of its copy."""
    lookup = make_lookup(LookupCase(width=24), dtype, device)
    ones = torch.ones((), dtype=dtype, device=device)
    column = lookup.grad_out[:, :1]
    for grad_out in (ones.expand(12, 24), column.expand(12, 24), lookup.grad_out.T.contiguous().T):
        lookup.grad_out = grad_out
        strided, strided_experts = run_lookup(lookup), run_experts(lookup)
        assert_lookup_close(strided, lookup)
        assert_experts_close(strided_experts, lookup)
        lookup.grad_out = grad_out.contiguous()
        for name, tensor in run_lookup(lookup).items():
            assert_bitwise_equal(name, strided[name], tensor)
        for name, tensor in run_experts(lookup).items():
            assert_bitwise_equal(name, strided_experts[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_int32_indices_give_the_same(sparse_grad: bool, dtype: torch.dtype, device: torch.device) -> None:
    lookup = make_lookup(LookupCase(), dtype, device)
    expected = run_lookup(lookup, sparse_grad), run_experts(lookup, sparse_grad=sparse_grad)
    lookup.indices = lookup.indices.int()
    for actual, wanted in zip(
        (run_lookup(lookup, sparse_grad), run_experts(lookup, sparse_grad=sparse_grad)), expected, strict=True
    ):
        for name, tensor in actual.items():
            assert torch.equal(tensor.to_dense(), wanted[name].to_dense()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_float32_weights_of_16_bit_tables(sparse_grad: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Weights are not rounded on their way in, nor their gradients on the way out."""
    case = LookupCase(width=50, bag_size=9)
    result = check_lookup(case, dtype, device, sparse_grad=sparse_grad, weights_dtype=torch.float32)
    assert result["d_weights"].dtype == torch.float32
    check_experts(case, dtype, device, sparse_grad=sparse_grad, weights_dtype=torch.float32)
    # Of few bits, they are the same whichever dtype brings them.
    lookup = make_lookup(case, dtype, device)
    narrow = run_lookup(lookup, sparse_grad)
    lookup.weights = lookup.weights.detach().float().requires_grad_()
    wide = run_lookup(lookup, sparse_grad)
    for name, tensor in narrow.items():
        assert torch.equal(tensor.to_dense(), wide[name].to(dtype).to_dense()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_carried_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    """Many small terms beside a large one, and a large one that cancels: lost if sums or products were 16 bits wide."""
    num_entries = 258
    values = torch.ones(2, 8, dtype=dtype, device=device)
    weights = torch.full((1, num_entries), 0.25, device=device)
    weights[0, 0], weights[0, -1] = 4096.0, -4096.0
    indices = torch.zeros(1, num_entries, dtype=torch.int64, device=device)
    assert (tg.memory_lookup(values, indices, weights) == 64).all()
    x = torch.full((1, 8), 0.25, dtype=dtype, device=device)
    values[1] = torch.tensor([1024, 1, 1, 1, 1, 1, 1, -1024], dtype=dtype)
    assert torch.ops.topgather.memory_dot(values, indices[:, :3] + 1, x).tolist() == [[1.5, 1.5, 1.5]]
    # The gradient of one row over many tokens.
    table = values.detach().clone().requires_grad_()
    bags = torch.zeros(num_entries, 1, dtype=torch.int64, device=device)
    out = tg.memory_lookup(table, bags, torch.ones(num_entries, 1, device=device))
    (gradient,) = torch.autograd.grad(out, table, weights.T.to(dtype).expand(num_entries, 8))
    assert (gradient[0] == 64).all() and (gradient[1] == 0).all()


def test_a_row_may_stand_several_times_in_a_bag(device: torch.device) -> None:
    values = torch.eye(3, device=device, requires_grad=True)
    indices = torch.tensor([[1, 1, 2, 1]], device=device)
    weights = torch.tensor([[1.0, 2.0, 4.0, 8.0]], device=device, requires_grad=True)
    out = tg.memory_lookup(values, indices, weights)
    assert out.tolist() == [[0.0, 11.0, 4.0]]
    out.backward(torch.tensor([[1.0, 2.0, 3.0]], device=device))
    assert values.grad is not None and weights.grad is not None
    assert values.grad.tolist() == [[0.0, 0.0, 0.0], [11.0, 22.0, 33.0], [4.0, 8.0, 12.0]]
    assert weights.grad.tolist() == [[2.0, 2.0, 3.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_who_looks(dtype: torch.dtype, device: torch.device) -> None:
    """A row that is not finite reaches the tokens that name it, a weight its own, and no gradient of another row."""
    lookup = make_lookup(LookupCase(num_tokens=30), dtype, device)
    values, weights = lookup.values.detach().clone(), lookup.weights.detach().clone()
    values[3, 5], values[7, 0] = torch.nan, torch.inf
    weights[11, 2] = torch.nan
    weights[13, 0] = -torch.inf
    lookup.grad_out = lookup.grad_out.clone()
    lookup.grad_out[17, 4] = torch.inf
    lookup.values, lookup.weights = values.requires_grad_(), weights.requires_grad_()
    for sparse_grad in (False, True):
        result = run_lookup(lookup, sparse_grad)
        assert_lookup_close(result, lookup)
    touched = torch.zeros(30, dtype=torch.bool, device=device)
    touched |= ((lookup.indices == 3) | (lookup.indices == 7)).any(-1)
    touched[11] = touched[13] = True
    assert (result["out"].isfinite().all(-1) == ~touched).all()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        LookupCase(num_tokens=0),
        LookupCase(bag_size=0),
        LookupCase(width=0, width_in=0),
        LookupCase(num_rows=0, bag_size=0),
        LookupCase(num_rows=0, num_tokens=0),
        LookupCase(num_rows=0, num_tokens=0, bag_size=0, width=0, width_in=0),
    ],
    ids=str,
)
def test_empty(case: LookupCase, dtype: torch.dtype, sparse_grad: bool, device: torch.device) -> None:
    result = check_lookup(case, dtype, device, sparse_grad=sparse_grad)
    assert result["out"].shape == (case.num_tokens, case.width) and (result["out"] == 0).all()
    assert (result["d_values"].to_dense() == 0).all()
    check_experts(case, dtype, device, sparse_grad=sparse_grad)


def test_inputs_are_left_alone(device: torch.device) -> None:
    lookup = make_lookup(LookupCase(), torch.float32, device)
    tensors = (lookup.values, lookup.indices, lookup.weights, lookup.grad_out, lookup.x, lookup.values_in)
    copies = [tensor.detach().clone() for tensor in tensors]
    run_lookup(lookup)
    run_experts(lookup, sparse_grad=True)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_weights_of_zero_pass_nothing_on(device: torch.device) -> None:
    """An entry of weight 0 still counts: its row has a gradient of zero, its weight one of its own."""
    lookup = make_lookup(LookupCase(), torch.float32, device)
    lookup.weights = torch.zeros_like(lookup.weights).requires_grad_()
    result = run_lookup(lookup)
    assert (result["out"] == 0).all() and (result["d_values"] == 0).all()
    assert_lookup_close(result, lookup)


def embedding_bag(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")


def test_equals_torchs_embedding_bag(device: torch.device) -> None:
    """Another implementation of the same sum, gradients included."""
    lookup = make_lookup(LookupCase(num_tokens=50), torch.float32, device)
    result = run_lookup(lookup)
    values, weights = (t.detach().clone().requires_grad_() for t in (lookup.values, lookup.weights))
    out = embedding_bag(values, lookup.indices, weights)
    gradients = torch.autograd.grad(out, (values, weights), lookup.grad_out)
    for actual, expected in zip(result.values(), (out.detach(), *gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_lookup_of_random_rows_far_apart(device: torch.device) -> None:
    """A table of a million rows, its last one among those named."""
    values = random_tensor((1_000_003, 4), torch.float32, device, 0)
    indices = torch.tensor([[1_000_002, 0], [524_288, 1_000_002]], device=device)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    out = tg.memory_lookup(values, indices, weights)
    expected = (values[indices] * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)

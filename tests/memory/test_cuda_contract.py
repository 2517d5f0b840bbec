"""What holds of memory layers' CUDA kernels alone: indices that name no row, sizes left to torch's ops, schedules."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.schedules import CUDA_DTYPES, over_schedules
from tests.common.tensors import assert_bitwise_equal, integer_tensor
from tests.memory.helpers import (
    LookupCase,
    TopkCase,
    assert_topk_contract,
    check_experts,
    check_lookup,
    check_topk,
    crowded_rows,
    look_up,
    make_lookup,
    make_topk_inputs,
    run_experts,
    run_lookup,
    search,
)
from topgather import reference
from topgather.ops import _memory_ops

# The last row is named by the tests alone.
CASE = LookupCase(num_rows=41, width=20, num_tokens=15)
LAST = CASE.num_rows - 1
BAD_INDICES = [LAST + 1, LAST + 2, -1, 2**31 - 1, 2**31, -(2**31), 2**32, 2**32 + 5, 2**40, 2**63 - 1, -(2**63)]
# Token and entry of each fault: the first and the last, two of one token.
PLACES = [(0, 0), (6, 1), (6, 4), (14, 5)]


def faulty_indices(lookup_indices: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right indices, which name the last row at PLACES alone; the same with ``number`` there; who has one."""
    right = lookup_indices.clone()
    right[right == LAST] = 0
    wrong = right.clone()
    is_faulty = torch.zeros(right.shape, dtype=torch.bool, device=right.device)
    for place in PLACES:
        right[place], wrong[place], is_faulty[place] = LAST, number, True
    return right, wrong, is_faulty


def assert_same_but_for_faults(
    actual: dict[str, Tensor], expected: dict[str, Tensor], is_faulty: Tensor, tokens: set[str]
) -> None:
    """Results of faulty entries are NaN, in ``tokens`` those of all of a token; the rest keeps its bits."""
    for name, tensor in actual.items():
        if name in tokens or name == "d_weights":
            rows = is_faulty if name == "d_weights" else is_faulty.any(dim=1)
            assert tensor[rows].isnan().all(), f"{name}: of a faulty token, not NaN"
            assert_bitwise_equal(name, tensor[~rows], expected[name][~rows])
        else:
            dense, wanted = tensor.to_dense(), expected[name].to_dense()
            assert (dense[LAST] == 0).all() and (wanted[LAST] != 0).any(), f"{name}: a row that no entry names"
            assert torch.equal(dense[:LAST], wanted[:LAST]), f"{name}: another row than that of the faults"
            if tensor.is_sparse:
                assert LAST not in tensor.indices()[0].tolist() and tensor.is_coalesced()


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("number", BAD_INDICES)
def test_bad_index_is_nan_for_its_token_alone(
    number: int, sparse_grad: bool, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    """It is not followed, no gradient of a table has it, and its neighbours do not notice."""
    lookup = make_lookup(CASE, dtype, cuda_device)
    right, wrong, is_faulty = faulty_indices(lookup.indices, number)
    lookup.indices = right
    expected, expected_experts = run_lookup(lookup, sparse_grad), run_experts(lookup, sparse_grad=sparse_grad)
    lookup.indices = wrong
    assert_same_but_for_faults(run_lookup(lookup, sparse_grad), expected, is_faulty, {"out"})
    actual = run_experts(lookup, sparse_grad=sparse_grad)
    assert_same_but_for_faults(actual, expected_experts, is_faulty, {"out", "d_x"})


@pytest.mark.parametrize("number", [LAST + 1, -1, 2**31 - 1, -(2**31)])
def test_bad_int32_index(number: int, cuda_device: torch.device) -> None:
    lookup = make_lookup(CASE, torch.float32, cuda_device)
    right, wrong, is_faulty = faulty_indices(lookup.indices.int(), number)
    lookup.indices = right
    expected = run_lookup(lookup)
    lookup.indices = wrong
    assert_same_but_for_faults(run_lookup(lookup), expected, is_faulty, {"out"})


@pytest.mark.parametrize("number", BAD_INDICES)
def test_bad_index_of_a_dot_product(number: int, cuda_device: torch.device) -> None:
    """Only its own entry is NaN: the others of the token do not depend on it."""
    lookup = make_lookup(CASE, torch.float32, cuda_device)
    right, wrong, is_faulty = faulty_indices(lookup.indices, number)
    with torch.no_grad():
        expected = torch.ops.topgather.memory_dot(lookup.values_in, right, lookup.x)
        actual = torch.ops.topgather.memory_dot(lookup.values_in, wrong, lookup.x)
    assert actual[is_faulty].isnan().all()
    assert_bitwise_equal("out", actual[~is_faulty], expected[~is_faulty])


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_nothing_but_bad_indices(sparse_grad: bool, cuda_device: torch.device) -> None:
    lookup = make_lookup(CASE, torch.bfloat16, cuda_device)
    lookup.indices = torch.full_like(lookup.indices, -1)
    lookup.indices[:, ::2] = LAST + 1
    for result in (run_lookup(lookup, sparse_grad), run_experts(lookup, sparse_grad=sparse_grad)):
        for name, tensor in result.items():
            if name.startswith("d_values"):
                assert tensor.shape[0] == CASE.num_rows and (tensor.to_dense() == 0).all(), name
                assert not tensor.is_sparse or tensor._nnz() == 0
            else:
                assert tensor.isnan().all(), name


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_a_table_without_rows(sparse_grad: bool, cuda_device: torch.device) -> None:
    """Every index is a bad one."""
    lookup = make_lookup(LookupCase(), torch.float32, cuda_device)
    lookup.values = torch.empty(0, 16, device=cuda_device, requires_grad=True)
    lookup.values_in = torch.empty(0, 8, device=cuda_device, requires_grad=True)
    for result in (run_lookup(lookup, sparse_grad), run_experts(lookup, sparse_grad=sparse_grad)):
        assert result["out"].isnan().all() and result["d_weights"].isnan().all()
        assert result["d_values"].shape == (0, 16)


def test_indices_are_looked_at_on_request(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = make_lookup(CASE, torch.float32, cuda_device)
    arguments = (lookup.x, lookup.values_in, lookup.values, lookup.indices, lookup.weights)
    for value in ("", "0", None):
        if value is None:
            monkeypatch.delenv(_memory_ops.CHECK_INDICES_VARIABLE)
        else:
            monkeypatch.setenv(_memory_ops.CHECK_INDICES_VARIABLE, value)
        lookup.indices[3, 2] = -1
        assert tg.memory_lookup(lookup.values, lookup.indices, lookup.weights)[3].isnan().all()
    monkeypatch.setenv("TOPGATHER_CHECK_INDICES", "1")
    for number in (-1, LAST + 1, 2**40):
        lookup.indices[3, 2] = number
        with pytest.raises(IndexError, match="indices"):
            tg.memory_lookup(lookup.values, lookup.indices, lookup.weights)
        with pytest.raises(IndexError, match="indices"):
            tg.expert_lookup(*arguments)
    lookup.indices[3, 2] = LAST
    assert tg.memory_lookup(lookup.values, lookup.indices, lookup.weights).isfinite().all()
    assert tg.expert_lookup(*arguments).isfinite().all()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        TopkCase(num_tokens=5, num_keys=50, top_k=_memory_ops.MAX_TOP_K),
        TopkCase(num_tokens=5, num_keys=50, top_k=_memory_ops.MAX_TOP_K + 1),
        TopkCase(num_tokens=3, num_keys=20, head_dim=2 * _memory_ops.MAX_HALF_DIM),
        TopkCase(num_tokens=3, num_keys=20, head_dim=2 * _memory_ops.MAX_HALF_DIM + 2),
    ],
    ids=str,
)
def test_on_both_sides_of_what_the_kernel_takes(
    case: TopkCase, dtype: torch.dtype, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = []
    original = _memory_ops.composed_topk
    monkeypatch.setattr(_memory_ops, "composed_topk", lambda *args: composed.append(1) or original(*args))
    check_topk(case, dtype, cuda_device)
    fits = case.top_k <= _memory_ops.MAX_TOP_K and case.head_dim <= 2 * _memory_ops.MAX_HALF_DIM
    assert (not composed) == fits


@pytest.mark.parametrize("kind", ["integers", "nonfinite", "random"])
def test_the_composition_equals_the_kernel(kind: str, cuda_device: torch.device) -> None:
    """The same choice and order from both; with integers, the same bits."""
    query = integer_tensor((6, 2, 12), torch.float32, cuda_device, 0)
    keys = integer_tensor((2, 2, 30, 6), torch.float32, cuda_device, 1)
    if kind == "random":
        query, keys = (t.detach() for t in make_topk_inputs(TopkCase(6, 2, 30, 12), torch.float32, cuda_device))
    if kind == "nonfinite":
        query = query.abs() + 1
        keys[0, 0, 3], keys[0, 1, 5], keys[1, 1, 2:9], keys[1, 0, 0] = torch.nan, -torch.inf, torch.inf, torch.nan
    for top_k in (1, 9, 31, 128):
        scores, indices = tg.product_key_topk(query, keys, top_k)
        composed, composed_indices = _memory_ops.composed_topk(query.unflatten(2, (2, 6)), keys, top_k)
        assert torch.equal(indices, composed_indices)
        torch.testing.assert_close(scores, composed, rtol=1e-5, atol=1e-5, equal_nan=True)
        if kind == "integers":
            assert_bitwise_equal("scores", scores, composed)


@pytest.mark.parametrize("kind", ["random", "nonfinite"])
def test_the_composition_keeps_float32_where_products_are_rounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps 10 bits behind the first: choices and scores are exact to float32 all the same."""
    case = TopkCase(num_tokens=9, num_heads=2, num_keys=40, head_dim=64)
    query, keys = (t.detach() for t in make_topk_inputs(case, torch.float32, torch.device("cpu")))
    if kind == "nonfinite":
        keys[0, 0, 3], keys[0, 1, 5], keys[1, 1, 2:9] = torch.nan, -torch.inf, torch.inf
    exact_einsum = torch.einsum

    def rounded_einsum(equation: str, *operands: Tensor) -> Tensor:
        bits = (operand.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF for operand in operands)
        rounded = (torch.where(t.isfinite(), b.view(torch.float32), t) for t, b in zip(operands, bits, strict=True))
        return exact_einsum(equation, *rounded)

    monkeypatch.setattr(torch, "einsum", rounded_einsum)
    monkeypatch.setattr(_memory_ops, "_is_tf32_allowed", lambda: True)
    scores, indices = _memory_ops.composed_topk(query.unflatten(2, (2, 32)), keys, 50)
    monkeypatch.undo()
    assert_topk_contract(scores, indices, query, keys, 50)


def test_the_composition_asks_whether_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            assert _memory_ops._is_tf32_allowed() == (precision == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_composition_takes_tokens_by_chunks(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TopkCase(num_tokens=23, num_keys=20, top_k=150)
    query, keys = (t.detach() for t in make_topk_inputs(case, torch.float32, cuda_device))
    expected = tg.product_key_topk(query, keys, 150)
    for most_bytes in (1, 100_000, 200_000):
        monkeypatch.setattr(_memory_ops, "COMPOSED_BYTES", most_bytes)
        scores, indices = tg.product_key_topk(query, keys, 150)
        assert_topk_contract(scores, indices, query, keys, 150)
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 48, 64, 128, 200, 256, 320, 512])
def test_every_tile_shape_of_the_search(head_dim: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Depths that fill a tile, and those that do not; keys and tokens that end within one."""
    check_topk(TopkCase(num_tokens=21, num_heads=1, num_keys=75, head_dim=head_dim, top_k=10), dtype, cuda_device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 8, 16, 17, 32, 33, 64, 65, 100, 128])
def test_every_list_length_of_the_search(top_k: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Ascending scores, which every key beats anew, then random ones."""
    query = torch.ones(3, 1, 2, dtype=dtype, device=cuda_device)
    keys = torch.arange(150, device=cuda_device).to(dtype).expand(1, 2, 150).unsqueeze(-1)
    scores, indices = tg.product_key_topk(query, keys, top_k)
    expected_scores, expected = reference.product_key_topk(query, keys, top_k)
    assert torch.equal(indices, expected) and torch.equal(scores.double(), expected_scores)
    check_topk(TopkCase(num_tokens=5, num_heads=1, num_keys=90, head_dim=8, top_k=top_k), dtype, cuda_device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 30, 90])
def test_rows_with_and_without_room(top_k: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Some rows take a chunk of keys at once, others in parts; many scores tie where the dtype rounds them."""
    query, keys = crowded_rows(dtype, cuda_device)
    assert torch.equal(tg.product_key_topk(query, keys, top_k)[1], reference.product_key_topk(query, keys, top_k)[1])


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LookupCase(num_tokens=1, bag_size=700, width=8),
        LookupCase(num_rows=3, num_tokens=130, bag_size=5, width=4, width_in=3),
        LookupCase(num_tokens=3, bag_size=4, width=2100, width_in=1500),
        LookupCase(num_tokens=97, bag_size=1, width=12, width_in=12),
        LookupCase(num_rows=2, num_tokens=300, bag_size=3, width=5, pattern="hot"),
    ],
    ids=str,
)
def test_more_of_everything(case: LookupCase, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Bags, rows, runs and tokens beyond what a thread block takes at a time."""
    check_lookup(case, dtype, cuda_device)
    check_lookup(case, dtype, cuda_device, sparse_grad=True)
    check_experts(case, dtype, cuda_device)


# --- schedules and what is declared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule(dtype: torch.dtype, cuda_kind: str, cuda_device: torch.device) -> None:
    expected: dict[str, Tensor] = {}
    topk = TopkCase(num_tokens=20, num_heads=1, num_keys=40, head_dim=24, top_k=12)
    lookup = LookupCase(num_tokens=60, bag_size=9, width=12, pattern="power_law")
    for schedule in over_schedules(cuda_kind):
        results = search(topk, dtype, cuda_device) | look_up(lookup, dtype, cuda_device)
        expected = expected or results
        for name, tensor in results.items():
            assert_bitwise_equal(f"{name} with {schedule}", tensor, expected[name])

"""Gradients of tables: sparse beside dense, tables used twice or frozen, optimizers, and rows no one names."""

import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.memory.helpers import (
    PATTERNS,
    Lookup,
    LookupCase,
    TopkCase,
    assert_experts_close,
    assert_lookup_close,
    assert_topk_contract,
    make_lookup,
    make_topk_inputs,
    run_experts,
    run_lookup,
)
from topgather._common import sparse as _sparse

pytestmark = pytest.mark.sanitize

CASE = LookupCase(num_rows=60, num_tokens=20)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch hands out uninitialised is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_equals_dense(pattern: str, dtype: torch.dtype, device: torch.device) -> None:
    """The same bits, over exactly the rows named, coalesced, ascending."""
    case = LookupCase(num_rows=200, num_tokens=150, bag_size=9, width=13, pattern=pattern)
    lookup = make_lookup(case, dtype, device)
    for run in (run_lookup, run_experts):
        dense, sparse = run(lookup), run(lookup, sparse_grad=True)
        for name, tensor in sparse.items():
            assert tensor.is_sparse == name.startswith("d_values"), name
            if not tensor.is_sparse:
                assert_bitwise_equal(name, tensor, dense[name])
                continue
            assert tensor.is_coalesced() and tensor.shape == dense[name].shape
            rows = tensor.indices()[0]
            assert torch.equal(rows, lookup.indices.unique()) and tensor.values().is_contiguous()
            assert_bitwise_equal(name, tensor.values(), dense[name][rows])
            assert torch.equal(tensor.to_dense(), dense[name]), name


@pytest.mark.parametrize("experts", [False, True], ids=["lookup", "experts"])
def test_stored_sparse_gradient_is_coalesced(experts: bool, device: torch.device) -> None:
    lookup = make_lookup(CASE, torch.float32, device)
    if experts:
        arguments = (lookup.x, lookup.values_in, lookup.values, lookup.indices, lookup.weights)
        tg.expert_lookup(*arguments, sparse_grad=True).backward(lookup.grad_out)
        tables = [lookup.values_in, lookup.values]
    else:
        tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, True).backward(lookup.grad_out)
        tables = [lookup.values]
    for table in tables:
        assert table.grad is not None and table.grad.is_sparse and table.grad.is_coalesced()
        assert torch.equal(table.grad.indices()[0], lookup.indices.unique())


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_gradient_is_marked_when_nobody_works_on_it_any_more(from_the_start: bool, device: torch.device) -> None:
    """DistributedDataParallel's threads coalesce gradients until a callback that it queues when all are there, or, with
    ``static_graph``, in a callback that it queues when the backward starts.
    """
    lookup = make_lookup(CASE, torch.float32, device)
    table = lookup.values
    queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    seen: list[bool] = []

    def note() -> None:
        seen.append(table.grad.is_coalesced())

    out = tg.memory_lookup(table, lookup.indices, lookup.weights, True)
    if from_the_start:
        out.register_hook(lambda grad: queue_callback(lambda: queue_callback(note)))
    else:
        table.register_post_accumulate_grad_hook(lambda table: queue_callback(note))
    out.backward(lookup.grad_out)
    assert seen == [False] and table.grad.is_coalesced()


def test_a_backward_leaves_nothing_behind(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a gradient, of the table or of others: no hook, and not the touched rows."""
    lookup = make_lookup(CASE, torch.float32, device)
    table, weights = lookup.values, lookup.weights
    touched: list[weakref.ref[Tensor]] = []
    keep_coalesced = _sparse.keep_coalesced

    def noted(rows: Tensor) -> None:
        touched.append(weakref.ref(rows))
        keep_coalesced(rows)

    monkeypatch.setattr(_sparse, "keep_coalesced", noted)

    def backward(**options: Any) -> None:
        tg.memory_lookup(table, lookup.indices, weights, True).backward(lookup.grad_out, **options)

    def grad(of: Tensor) -> None:
        torch.autograd.grad(tg.memory_lookup(table, lookup.indices, weights, True), of, lookup.grad_out)

    for run in (backward, lambda: backward(inputs=[weights]), lambda: backward(inputs=[table]), lambda: grad(table)):
        run()
        table.grad = None
        assert not table._post_accumulate_grad_hooks and not table._backward_hooks
    assert touched and all(rows() is None for rows in touched)


def backward_into(lookup: Lookup, table: Tensor, sparse_grad: bool) -> Tensor:
    tg.memory_lookup(table, lookup.indices, lookup.weights, sparse_grad).backward(lookup.grad_out)
    assert table.grad is not None
    return table.grad


def test_gradients_of_two_calls_add_up(device: torch.device) -> None:
    """A sparse gradient on top of one of other rows, of the same rows, and of none."""
    first = make_lookup(LookupCase(num_rows=60, pattern="power_law"), torch.float32, device, seed=1)
    second = make_lookup(LookupCase(num_rows=60), torch.float32, device, seed=2)
    for lookups in ((first, second), (first, first), (second, first, second)):
        tables = [first.values.detach().clone().requires_grad_() for _ in range(2)]
        for lookup in lookups:
            dense = backward_into(lookup, tables[0], sparse_grad=False)
            sparse = backward_into(lookup, tables[1], sparse_grad=True)
        assert sparse.is_sparse
        torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-6, atol=1e-6)
        # Marked or not, what coalescing gives is the same.
        rows = torch.cat([lookup.indices.flatten() for lookup in lookups]).unique()
        coalesced = sparse.coalesce()
        assert torch.equal(coalesced.indices()[0], rows)
        torch.testing.assert_close(coalesced.to_dense(), dense, rtol=1e-6, atol=1e-6)


def test_a_gradient_replaced_by_another_of_as_many_rows(device: torch.device) -> None:
    """Only a gradient that is of just one call's rows is marked: here both calls touch three."""
    weights, grad_out = torch.ones(1, 3, device=device), torch.ones(1, 4, device=device)
    table = torch.zeros(9, 4, device=device, requires_grad=True)
    for rows in ([0, 1, 2], [2, 1, 5], [0, 1, 2]):
        out = tg.memory_lookup(table, torch.tensor([rows], device=device), weights, True)
        out.backward(grad_out)
    assert table.grad is not None
    expected = torch.tensor([2.0, 3, 3, 0, 0, 1, 0, 0, 0], device=device)
    assert torch.equal(table.grad.to_dense(), expected[:, None].expand(9, 4))
    assert torch.equal(table.grad.coalesce().to_dense(), expected[:, None].expand(9, 4))
    # A dense gradient that is already there stays dense.
    table.grad = torch.ones_like(table)
    tg.memory_lookup(table, torch.tensor([[0, 1, 2]], device=device), weights, True).backward(grad_out)
    assert not table.grad.is_sparse
    assert table.grad[:, 0].tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 1]


# torch itself adds no sparse tensors of float16 on the CPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_one_table_used_twice(sparse_grad: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Two lookups of one table in one graph: the gradients add."""
    first, second = (make_lookup(CASE, dtype, device, seed) for seed in (1, 2))
    second.values = first.values
    apart = run_lookup(first)["d_values"] + run_lookup(second)["d_values"]
    outs = [tg.memory_lookup(first.values, p.indices, p.weights, sparse_grad) for p in (first, second)]
    torch.autograd.backward(outs, (first.grad_out, second.grad_out))
    gradient = first.values.grad
    assert gradient is not None and gradient.is_sparse == sparse_grad
    # Equal but for the sign of zeros, which adding to an empty table loses.
    assert torch.equal(gradient.to_dense(), apart)
    assert torch.equal(gradient.to_sparse().coalesce().to_dense(), apart)


def test_one_table_for_both_sides_of_experts(device: torch.device) -> None:
    lookup = make_lookup(LookupCase(width=8), torch.float32, device)
    apart = run_experts(Lookup(**{**vars(lookup), "values_in": lookup.values.detach().clone().requires_grad_()}))
    for sparse_grad in (False, True):
        out = tg.expert_lookup(
            lookup.x, lookup.values, lookup.values, lookup.indices, lookup.weights, "gelu", sparse_grad
        )
        (gradient,) = torch.autograd.grad(out, lookup.values, lookup.grad_out)
        torch.testing.assert_close(gradient.to_dense(), apart["d_values"] + apart["d_values_in"])


def test_sparse_and_dense_gradients_of_one_table(device: torch.device) -> None:
    """One call asks for a sparse gradient and another for a dense one: their sum is dense."""
    lookup = make_lookup(CASE, torch.float32, device)
    expected = 2 * run_lookup(lookup)["d_values"]
    for flags in ((False, True), (True, False)):
        outs = [tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, flag) for flag in flags]
        (gradient,) = torch.autograd.grad(outs, lookup.values, (lookup.grad_out, lookup.grad_out))
        torch.testing.assert_close(gradient.to_dense(), expected)


OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    # With an epsilon to speak of they differ: it stands at another place.
    "sparse_adam": (torch.optim.Adam, torch.optim.SparseAdam, {"lr": 0.01, "eps": 1e-30}),
    "adagrad": (torch.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_equal_dense_ones(name: str, device: torch.device) -> None:
    """Three steps; lazily updated moments equal Adam's where every step touches the same rows."""
    dense_class, sparse_class, options = OPTIMIZERS[name]
    lookups = [make_lookup(LookupCase(num_rows=400), torch.float32, device, seed) for seed in range(3)]
    if name == "sparse_adam":
        for lookup in lookups:
            lookup.indices = lookups[0].indices
    tables = [lookups[0].values.detach().clone().requires_grad_() for _ in range(2)]
    optimizers = [dense_class([tables[0]], **options), sparse_class([tables[1]], **options)]
    for lookup in lookups:
        for table, optimizer, sparse_grad in zip(tables, optimizers, (False, True), strict=True):
            optimizer.zero_grad()
            backward_into(lookup, table, sparse_grad)
            optimizer.step()
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(tables[1], lookups[0].values)
    untouched = torch.ones(400, dtype=torch.bool, device=device)
    for lookup in lookups:
        untouched[lookup.indices.flatten()] = False
    assert torch.equal(tables[1][untouched], lookups[0].values[untouched]) and untouched.any()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=2) if any(w)])
def test_subsets_of_gradients_of_lookup(wanted: tuple[bool, bool], sparse_grad: bool, device: torch.device) -> None:
    """Frozen tables and frozen weights: only what is asked for, and right."""
    lookup = make_lookup(CASE, torch.bfloat16, device)
    lookup.values.requires_grad_(wanted[0])
    lookup.weights.requires_grad_(wanted[1])
    out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, sparse_grad)
    out.backward(lookup.grad_out)
    result = {"out": out.detach()}
    for want, name, tensor in zip(wanted, ("d_values", "d_weights"), (lookup.values, lookup.weights), strict=True):
        assert (tensor.grad is not None) == want
        if tensor.grad is not None:
            result[name] = tensor.grad
    assert_lookup_close(result, lookup)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=4) if any(w)])
def test_subsets_of_gradients_of_experts(wanted: tuple[bool, ...], sparse_grad: bool, device: torch.device) -> None:
    lookup = make_lookup(LookupCase(num_tokens=5), torch.float32, device)
    leaves = lookup.leaves(experts=True)
    for want, tensor in zip(wanted, leaves.values(), strict=True):
        tensor.requires_grad_(want)
    tables = (lookup.values_in, lookup.values)
    out = tg.expert_lookup(lookup.x, *tables, lookup.indices, lookup.weights, "silu", sparse_grad)
    out.backward(lookup.grad_out)
    result = {"out": out.detach()}
    for want, (name, tensor) in zip(wanted, leaves.items(), strict=True):
        assert (tensor.grad is not None) == want, name
        if tensor.grad is not None:
            result[name] = tensor.grad
    assert_experts_close(result, lookup, "silu")


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_subsets_of_gradients_of_the_search(wanted: tuple[bool, bool], device: torch.device) -> None:
    query, keys = make_topk_inputs(TopkCase(), torch.float32, device)
    expected = torch.autograd.grad(tg.product_key_topk(query, keys, 8)[0].square().sum(), (query, keys))
    part = [t.detach().clone().requires_grad_(want) for t, want in zip((query, keys), wanted, strict=True)]
    tg.product_key_topk(part[0], part[1], 8)[0].square().sum().backward()
    for tensor, want, gradient in zip(part, wanted, expected, strict=True):
        assert (tensor.grad is not None) == want
        if tensor.grad is not None:
            assert_bitwise_equal("gradient", tensor.grad, gradient)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        LookupCase(num_rows=700, num_tokens=4, width=5),
        LookupCase(num_rows=50, num_tokens=40, bag_size=30, pattern="hot"),
        LookupCase(num_rows=9, bag_size=0),
        LookupCase(num_rows=9, num_tokens=0),
    ],
    ids=str,
)
def test_all_of_every_result_is_written(case: LookupCase, dtype: torch.dtype, device: torch.device) -> None:
    """Rows that no entry names are zero, in memory that was not."""
    assert torch.empty(3).isnan().all()
    lookup = make_lookup(case, dtype, device)
    result = run_lookup(lookup)
    assert_lookup_close(result, lookup)
    assert_experts_close(run_experts(lookup), lookup)
    assert_lookup_close(run_lookup(lookup, sparse_grad=True), lookup)
    is_named = torch.zeros(case.num_rows, dtype=torch.bool, device=device)
    is_named[lookup.indices.flatten()] = True
    assert (result["d_values"][~is_named] == 0).all()
    query, keys = (t.detach() for t in make_topk_inputs(TopkCase(num_keys=9, top_k=81), dtype, device))
    assert_topk_contract(*tg.product_key_topk(query, keys, 81), query, keys, 81)


def test_tables_that_are_no_leaves(device: torch.device) -> None:
    """A table that other ops make: its sparse gradient goes on through them."""
    lookup = make_lookup(CASE, torch.float32, device)
    expected = run_lookup(lookup)["d_values"]
    for sparse_grad in (False, True):
        table = lookup.values.detach().clone().requires_grad_()
        tg.memory_lookup(table * 3, lookup.indices, lookup.weights, sparse_grad).backward(lookup.grad_out)
        assert table.grad is not None
        torch.testing.assert_close(table.grad.to_dense(), 3 * expected)

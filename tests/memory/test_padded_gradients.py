"""Sparse gradients of a size that data does not say: ``sparse_grad="padded"``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import topgather as tg
from tests.common.tensors import assert_bitwise_equal, random_tensor
from tests.memory.bag_helpers import BagCase, make_bags, run_bags
from tests.memory.helpers import Lookup, LookupCase, make_lookup, run_experts, run_lookup
from tests.memory.test_gradcheck import WithDenseGradient
from topgather._common import cuda, spec

CPU = torch.device("cpu")
CASE = LookupCase(num_tokens=9, bag_size=5, num_rows=30, width=7)


def assert_padded(grad: Tensor, dense: Tensor, num_entries: int) -> None:
    """The touched rows in order, then the last of them with zeros; together the dense gradient, to the last bit."""
    assert grad.is_sparse and not grad.is_coalesced() and grad._nnz() == num_entries
    rows, values = grad._indices()[0], grad._values()
    touched = rows.unique()
    assert torch.equal(rows[: len(touched)], touched), "rows are not in order"
    assert (rows[len(touched) :] == touched[-1]).all() and not values[len(touched) :].any(), "padding is no padding"
    assert_bitwise_equal("values", values[: len(touched)], dense[touched])
    assert_bitwise_equal("gradient", grad.to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_dense_gradient(dtype: torch.dtype, device: torch.device) -> None:
    lookup = make_lookup(CASE, dtype, device)
    dense, padded = run_lookup(lookup), run_lookup(lookup, "padded")
    assert_padded(padded["d_values"], dense["d_values"], 45)
    assert_bitwise_equal("d_weights", padded["d_weights"], dense["d_weights"])
    dense, padded = run_experts(lookup), run_experts(lookup, sparse_grad="padded")
    for name in ("d_values_in", "d_values"):
        assert_padded(padded[name], dense[name], 45)


@pytest.mark.parametrize("case", [BagCase(padding_idx=2), BagCase(rest=3), BagCase(sizes=None)], ids=str)
def test_bags(case: BagCase, device: torch.device) -> None:
    """What is padding, or nobody's, is an entry as well."""
    bags = make_bags(case, torch.float32, device)
    assert_padded(run_bags(bags, "padded")["d_values"], run_bags(bags)["d_values"], bags["indices"].numel())


def test_no_row_is_touched(device: torch.device) -> None:
    values = torch.ones(5, 3, device=device, requires_grad=True)
    for indices in (torch.full((4,), 2, device=device), torch.zeros(0, dtype=torch.int64, device=device)):
        offsets = torch.tensor([0, len(indices)], device=device)
        out = tg.memory_lookup(values, indices, None, "padded", offsets, padding_idx=2)
        (grad,) = torch.autograd.grad(out.sum(), values)
        assert grad._nnz() == len(indices) and not grad._indices().any() and not grad._values().any()
    empty = torch.ones(0, 3, device=device, requires_grad=True)
    nobody = torch.zeros(2, 0, dtype=torch.int64, device=device)
    out = tg.memory_lookup(empty, nobody, torch.zeros(2, 0, device=device), "padded")
    assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 3)


def test_bad_indices_touch_no_row(cuda_device: torch.device) -> None:
    lookup = make_lookup(CASE, torch.float32, cuda_device)
    lookup.indices[2, 1], lookup.indices[4, 0] = -1, CASE.num_rows
    assert_padded(run_lookup(lookup, "padded")["d_values"], run_lookup(lookup)["d_values"], 45)


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_optimizers_step_as_with_touched_rows(name: str) -> None:
    """Over several steps, and with a gradient that two calls and two backwards add to."""
    tables = {}
    for form in (True, "padded"):
        values = torch.nn.Parameter(random_tensor((30, 4), torch.float32, CPU, 0))
        optimizer = getattr(torch.optim, name)([values], lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            for call in range(2):
                indices = torch.randint(0, 30, (6, 3), generator=torch.Generator().manual_seed(5 * step + call))
                weights = random_tensor((6, 3), torch.float32, CPU, call)
                out = tg.memory_lookup(values, indices, weights, form)
                (out + tg.memory_lookup(values, indices + 0, weights * 2, form)).square().sum().backward()
            optimizer.step()
        tables[form] = values.detach()
    torch.testing.assert_close(tables["padded"], tables[True], rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    lookup = make_lookup(LookupCase(num_tokens=3, bag_size=4, num_rows=6, width=2), torch.float64, CPU)

    def look_up(values: Tensor, weights: Tensor) -> Tensor:
        return tg.memory_lookup(WithDenseGradient.apply(values), lookup.indices, weights, "padded")

    assert torch.autograd.gradcheck(look_up, (lookup.values, lookup.weights))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    """Two calls share a table: their gradients stand one behind the other."""
    lookup = make_lookup(CASE, torch.float32, CPU)

    def twice(values: Tensor, weights: Tensor) -> Tensor:
        once = tg.memory_lookup(values, lookup.indices, weights, "padded")
        return once + tg.memory_lookup(values, lookup.indices // 2, weights, "padded")

    torch._dynamo.reset()
    results = []
    for function in (twice, torch.compile(twice, fullgraph=True, backend=backend)):
        out = function(lookup.values, lookup.weights)
        results.append(torch.autograd.grad(out.square().sum(), (lookup.values, lookup.weights)))
    (grad, grad_weights), (compiled, compiled_weights) = results
    assert compiled._nnz() == 90 and not compiled.is_coalesced()
    torch.testing.assert_close(compiled.to_dense(), grad.to_dense())
    torch.testing.assert_close(compiled_weights, grad_weights)


def backward_arguments(lookup: Lookup, *form: bool) -> tuple[Any, ...]:
    leaves = (lookup.values.detach(), lookup.indices, lookup.weights.detach())
    grad_out = random_tensor((CASE.num_tokens, CASE.width), torch.float32, CPU, 3)
    return (grad_out, *leaves, True, "memory_lookup", None, *form)


def test_opcheck() -> None:
    """The fake result has the size of the real one, as no sparse one else has."""
    lookup = make_lookup(CASE, torch.float32, CPU)
    torch.library.opcheck(torch.ops.topgather.memory_backward_sparse.default, backward_arguments(lookup, True))
    tests = ("test_schema", "test_faketensor")
    arguments = (lookup.values, lookup.indices, lookup.weights, True, None, True)
    torch.library.opcheck(torch.ops.topgather.memory_lookup.default, arguments, test_utils=tests)


class NoWaits(TorchDispatchMode):
    """Refuses ops whose results' sizes, or results on the host, data says: each waits for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = set(func.tags) & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        is_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (tags and func is not torch.ops.aten.index.Tensor) or is_mask or "coalesce" in func.name():
            raise AssertionError(f"{func} waits")
        return func(*args, **(kwargs or {}))


@pytest.mark.emulator
def test_nothing_waits_for_the_device(cuda_device: torch.device) -> None:
    """Neither the op nor what it is made of, and the search finds what waits in the other form."""
    arguments = backward_arguments(make_lookup(CASE, torch.float32, cuda_device))
    kernel = cuda.KERNELS["memory_backward_sparse"]
    with NoWaits():
        grad, _ = kernel(*arguments, True)
    assert_padded(grad, kernel(*arguments, False)[0].to_dense(), 45)
    with pytest.raises(AssertionError, match="waits"), NoWaits():
        kernel(*arguments, False)
    assert spec.OPS["memory_backward_sparse"].native == "memory_backward"


def pool_and_memory(sparse_grad: bool | str) -> tg.nn.ProductKeyMemory:
    return tg.nn.ProductKeyMemory(8, tg.nn.MemoryPool(6, 8, sparse_grad=sparse_grad), num_heads=2, top_k=3)


LAYERS: dict[str, Callable[[bool | str], torch.nn.Module]] = {
    "product keys": pool_and_memory,
    "experts": lambda form: tg.nn.PeerMemory(8, num_keys=6, num_heads=2, top_k=3, sparse_grad=form),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_it(name: str) -> None:
    x = random_tensor((4, 8), torch.float32, CPU, 0)
    torch.manual_seed(0)
    padded = LAYERS[name]("padded")
    dense = LAYERS[name](False)
    dense.load_state_dict(padded.state_dict())
    for layer in (padded, dense):
        layer(x).sum().backward()
    grads = {name: parameter.grad for name, parameter in dense.named_parameters()}
    tables = [name for name, parameter in padded.named_parameters() if parameter.grad.is_sparse]
    assert tables and all("values" in name for name in tables)
    for name in tables:
        assert_padded(padded.get_parameter(name).grad, grads[name], 4 * 2 * 3)


def test_n_gram_memories_have_it() -> None:
    layer = tg.nn.NgramMemory(8, 30, num_tables=2, rows=20, sparse_grad="padded")
    layer(random_tensor((1, 7, 8), torch.float32, CPU, 0), torch.randint(0, 30, (1, 7))).sum().backward()
    grad = layer.values.grad
    # Of each token the tables of both orders.
    assert grad.is_sparse and not grad.is_coalesced() and grad._nnz() == 7 * 2 * 2
    with pytest.raises(TypeError, match="sparse_grad must be a bool or 'padded'"):
        tg.nn.NgramMemory(8, 30, num_tables=2, sparse_grad="padding")


def test_other_forms_are_refused() -> None:
    lookup = make_lookup(CASE, torch.float32, CPU)
    for form in ("coalesced", 1, None):
        with pytest.raises(TypeError, match="sparse_grad must be a bool or 'padded'"):
            run_lookup(lookup, form)

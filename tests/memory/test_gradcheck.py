"""Numerical gradients of memory layers in float64, on the CPU; second derivatives are right or refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.devices import widest_dtype
from tests.memory.helpers import LookupCase, TopkCase, make_lookup, make_topk_inputs
from topgather import reference

pytestmark = pytest.mark.sanitize

CPU = torch.device("cpu")


def gradcheck_both_modes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> bool:
    """Reverse and forward mode, and tangents and gradients under vmap."""
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    return torch.autograd.gradcheck(function, inputs, **modes)


@pytest.mark.parametrize(
    "case",
    [
        TopkCase(num_tokens=3, num_keys=5, head_dim=6, top_k=6),
        TopkCase(num_tokens=4, num_heads=1, num_keys=3, head_dim=2, top_k=9),
        TopkCase(num_tokens=1, num_heads=3, num_keys=1, head_dim=4, top_k=1),
    ],
    ids=str,
)
def test_search(case: TopkCase) -> None:
    """The choice has a margin far above gradcheck's step on this data, or this would fail."""
    inputs = make_topk_inputs(case, torch.float64, CPU)
    assert gradcheck_both_modes(lambda query, keys: tg.product_key_topk(query, keys, case.top_k)[0], inputs)


LOOKUPS = [
    LookupCase(num_rows=7, width=3, num_tokens=4, bag_size=3),
    LookupCase(num_rows=1, width=2, num_tokens=3, bag_size=4, width_in=1),
    LookupCase(num_rows=6, width=1, num_tokens=2, bag_size=1),
]


@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_lookup(case: LookupCase) -> None:
    lookup = make_lookup(case, torch.float64, CPU)
    inputs = (lookup.values, lookup.weights)
    assert gradcheck_both_modes(lambda values, weights: tg.memory_lookup(values, lookup.indices, weights), inputs)


class WithDenseGradient(torch.autograd.Function):
    """gradcheck wants dense gradients of dense inputs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert grad.is_sparse or not grad.any()
        return grad.to_dense()


@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_lookup_with_sparse_gradients(case: LookupCase) -> None:
    lookup = make_lookup(case, torch.float64, CPU)

    def look_up(values: Tensor, weights: Tensor) -> Tensor:
        return tg.memory_lookup(WithDenseGradient.apply(values), lookup.indices, weights, sparse_grad=True)

    assert torch.autograd.gradcheck(look_up, (lookup.values, lookup.weights))


@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_dot(case: LookupCase) -> None:
    lookup = make_lookup(case, torch.float64, CPU)

    def dot(values_in: Tensor, x: Tensor) -> Tensor:
        return torch.ops.topgather.memory_dot(values_in, lookup.indices, x)

    assert gradcheck_both_modes(dot, (lookup.values_in, lookup.x))


@pytest.mark.parametrize("activation", ["gelu", "silu", "identity"])
@pytest.mark.parametrize("case", LOOKUPS, ids=str)
def test_experts(case: LookupCase, activation: str) -> None:
    lookup = make_lookup(case, torch.float64, CPU)

    def experts(x: Tensor, values_in: Tensor, values_out: Tensor, weights: Tensor) -> Tensor:
        return tg.expert_lookup(x, values_in, values_out, lookup.indices, weights, activation)

    assert gradcheck_both_modes(experts, (lookup.x, lookup.values_in, lookup.values, lookup.weights))


def test_a_layer_of_both() -> None:
    """Search, softmax of the scores, lookup: gradients reach queries through the weights."""
    query, keys = make_topk_inputs(
        TopkCase(num_tokens=3, num_heads=1, num_keys=4, head_dim=4, top_k=3), torch.float64, CPU
    )
    values = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)

    def layer(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores, indices = tg.product_key_topk(query, keys, 3)
        return tg.memory_lookup(values, indices.flatten(1), scores.softmax(-1).flatten(1))

    assert gradcheck_both_modes(layer, (query, keys, values))


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_double_backward_of_a_table_is_refused(sparse_grad: bool, device: torch.device, device_kind: str) -> None:
    """Gradients may be asked for with create_graph=True; differentiating them says why it does not work."""
    lookup = make_lookup(LookupCase(), widest_dtype(device_kind), device)
    out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, sparse_grad)
    d_values, d_weights = torch.autograd.grad(out.square().sum(), (lookup.values, lookup.weights), create_graph=True)
    assert torch.equal(d_values.detach().to_dense(), _first_order(lookup.values, lookup.indices, lookup.weights))
    with pytest.raises(RuntimeError, match="memory_lookup has no double backward"):
        torch.autograd.grad(d_weights.square().sum(), lookup.weights)


def _first_order(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    out = tg.memory_lookup(values, indices, weights)
    return torch.autograd.grad(out.square().sum(), values)[0]


def test_double_backward_of_keys_is_refused(device: torch.device, device_kind: str) -> None:
    query, keys = make_topk_inputs(TopkCase(), widest_dtype(device_kind), device)
    scores, _ = tg.product_key_topk(query, keys, 8)
    (d_keys,) = torch.autograd.grad(scores.square().sum(), keys, create_graph=True)
    with pytest.raises(RuntimeError, match="product_key_topk has no double backward"):
        d_keys.sum().backward()
    lookup = make_lookup(LookupCase(), widest_dtype(device_kind), device)
    dots = torch.ops.topgather.memory_dot(lookup.values_in, lookup.indices, lookup.x)
    (d_values_in,) = torch.autograd.grad(dots.square().sum(), lookup.values_in, create_graph=True)
    with pytest.raises(RuntimeError, match=r"memory_dot, of expert_lookup or of .* has no double backward"):
        d_values_in.sum().backward()


def test_forward_mode_of_gradients_of_tables_is_refused() -> None:
    """In words that name the op that was called."""
    query, keys = (t.detach() for t in make_topk_inputs(TopkCase(), torch.float64, CPU))
    with pytest.raises(NotImplementedError, match=r"product_key_topk has no double backward.*in forward mode"):
        torch.func.hessian(lambda keys: tg.product_key_topk(query, keys, 8)[0].square().sum())(keys)


@pytest.mark.parametrize("mapped", [(0, 0), (None, 0), (0, None), (1, 1)], ids=str)
def test_transforms_equal_a_loop(mapped: tuple[int | None, ...]) -> None:
    """Outputs and gradients under vmap, whatever is mapped, and no warning of torch's."""
    query, keys = make_topk_inputs(TopkCase(), torch.float64, CPU)
    lookup = make_lookup(LookupCase(), torch.float64, CPU)
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda query, keys: tg.product_key_topk(query, keys, 8)[0], (query, keys)),
        (lambda values, weights: tg.memory_lookup(values, lookup.indices, weights), (lookup.values, lookup.weights)),
        (lambda values, x: torch.ops.topgather.memory_dot(values, lookup.indices, x), (lookup.values_in, lookup.x)),
    ]
    for function, tensors in functions:
        inputs = [
            tensor.detach() if dim is None else torch.stack([tensor.detach(), 2 * tensor.detach()], dim)
            for tensor, dim in zip(tensors, mapped, strict=True)
        ]
        gradient = torch.func.grad(lambda *args, f=function: f(*args).square().sum(), argnums=(0, 1))
        for each in (function, gradient):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                actual = torch.vmap(each, mapped)(*inputs)
            for row in range(2):
                one = [t if dim is None else t.select(dim, row) for t, dim in zip(inputs, mapped, strict=True)]
                expected = each(*(t.contiguous() for t in one))
                pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
                for left, right in pairs:
                    torch.testing.assert_close(left[row], right, rtol=1e-12, atol=1e-12)


def test_double_backward_past_the_table_is_right(device: torch.device, device_kind: str) -> None:
    """Where no gradient of a table is in between, second derivatives equal the oracle's."""
    dtype = widest_dtype(device_kind)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    query, keys = make_topk_inputs(TopkCase(), dtype, device)
    keys = keys.detach()

    def second(scores: Tensor, query: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((scores**3).sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), query)[0]

    scores, indices = tg.product_key_topk(query, keys, 8)
    wide = query.detach().double().requires_grad_()
    expected = second(reference.product_key_scores(wide, keys).gather(-1, indices), wide)
    actual = second(scores, query).double()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()

"""Numerical gradients of grid and window attention in float64, on the CPU; double backward is refused, everywhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import assert_bitwise_equal
from tests.grid.helpers import GridCase, attend, make_inputs, run_grid

pytestmark = pytest.mark.sanitize

CASES = [
    GridCase(batch=1, rows=5, columns=3, step=(2, 2), head_dim=3),
    GridCase(rows=3, columns=4, step=(2, 3), head_dim=2, partition="window", has_bias=True),
    GridCase(batch=2, num_heads=1, rows=4, columns=3, step=(1, 1), head_dim=1, has_bias=True, scale=1.7),
    GridCase(batch=1, num_heads=3, rows=1, columns=5, step=(1, 2), head_dim=5, has_bias=True),
    GridCase(batch=1, rows=2, columns=2, step=(2, 2), head_dim=3, has_bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numerical_gradients(case: GridCase) -> None:
    inputs = make_inputs(case, torch.float64, torch.device("cpu"))

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"bias": bias, "scale": case.scale}
        if case.partition == "window":
            return tg.window_attention(query, key, value, case.step, **options)
        return tg.grid_attention(query, key, value, stride=case.step, **options)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves().values()))


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_double_backward_is_refused(name: str, device: torch.device, device_kind: str) -> None:
    """Gradients may be asked for with create_graph=True; differentiating them says why it does not work."""
    case = GridCase(has_bias=True)
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    leaves = inputs.leaves()
    expected = run_grid(inputs, case)
    gradients = torch.autograd.grad(attend(inputs, case), tuple(leaves.values()), inputs.grad_out, create_graph=True)
    for of_leaf, gradient in zip(leaves, gradients, strict=True):
        assert_bitwise_equal(of_leaf, gradient.detach(), expected[of_leaf])
    gradient = gradients[list(leaves).index(f"d_{name}")]
    with pytest.raises(RuntimeError, match="grid_attention has no double backward"):
        torch.autograd.grad(gradient.square().sum(), inputs.query)


def test_out_alone_is_differentiable(device: torch.device) -> None:
    inputs = make_inputs(GridCase(), torch.float32, device)
    out, *saved = torch.ops.topgather.grid_attention(inputs.query, inputs.key, inputs.value, None, "grid", 3, 2, 0.25)
    assert out.requires_grad and not any(tensor.requires_grad for tensor in saved)

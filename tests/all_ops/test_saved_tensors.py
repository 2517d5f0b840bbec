"""Hooks of saved tensors (``torch.autograd.graph.saved_tensors_hooks``) may copy, move and lay out anew what a backward
gets: the gradients are those without them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import topgather as tg
from tests.common.ops import DIFFERENTIABLE, OpCase, every
from tests.common.runs import assert_all_equal

pytestmark = pytest.mark.usefixtures("deterministic")


def first_dimension_last(tensor: Tensor) -> Tensor:
    """A copy whose first dimension is contiguous in memory, as a hook that transposes or compresses may return."""
    return (
        tensor.detach().transpose(0, -1).contiguous().transpose(0, -1) if tensor.ndim > 1 else tensor.detach().clone()
    )


HOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone),
    "another layout": lambda: saved_tensors_hooks(first_dimension_last, lambda tensor: tensor),
}


@pytest.mark.parametrize("hooks", HOOKS)
@every(DIFFERENTIABLE)
def test_gradients_under_hooks(case: OpCase, hooks: str, device: torch.device) -> None:
    expected = case.everything(case.inputs(torch.float32, device, requires_grad=True))
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    with HOOKS[hooks]():
        found = case.everything(inputs)
    assert_all_equal(found, expected)


@pytest.mark.parametrize("hooks", HOOKS)
def test_steps_of_a_row_optimizer_under_hooks(hooks: str) -> None:
    """The lookups of a table that one has are functions of their own."""

    def stepped(make_hooks: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = tg.nn.PeerMemory(16, 4, 2, 3, 8)
        tables = [layer.values_in, layer.values_out]
        optimizer = tg.optim.RowSGD(tables, lr=0.1)
        x = torch.randn(5, 16, requires_grad=True)
        with make_hooks():
            layer(x).sin().sum().backward()
        optimizer.step()
        return [x.grad, *(table.detach() for table in tables)]

    for found, expected in zip(stepped(HOOKS[hooks]), stepped(nullcontext), strict=True):
        # The layer's projections are torch's, which round by the layout too.
        torch.testing.assert_close(found, expected)


def test_saved_tensors_are_read_in_one_way() -> None:
    """Who writes a backward by hand takes ``tensors.saved_rows``."""
    package = Path(tg.__file__).parent
    readers = {path.name for path in package.rglob("*.py") if ".saved_tensors" in path.read_text()}
    assert readers == {"spec.py", "tensors.py"}

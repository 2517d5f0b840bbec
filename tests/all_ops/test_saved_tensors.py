"""Hooks of saved tensors (``torch.autograd.graph.saved_tensors_hooks``) may copy, move and lay out anew what a backward
gets: the gradients are those without them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

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

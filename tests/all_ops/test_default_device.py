"""Every op with tensors on one device while torch's default device is another: nothing that a call makes lies there."""

import pytest
import torch
from torch import Tensor

from tests.common.ops import CASES, Inputs, OpCase
from tests.common.runs import assert_all_equal

CPU = torch.device("cpu")


def results_and_gradients(case: OpCase, inputs: Inputs) -> dict[str, Tensor]:
    results = case.run(inputs)
    outputs = [results[name] for name in case.differentiable_results if results[name].requires_grad]
    if outputs:
        leaves = [inputs[name] for name in case.differentiable]
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        gradients = zip(case.differentiable, found, strict=True)
        results |= {f"grad_{name}": grad.to_dense() if grad.is_sparse else grad for name, grad in gradients}
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_call_makes_is_where_its_arguments_are(case: OpCase) -> None:
    """The meta device, from which nothing can be copied, stands for any other."""
    expected = results_and_gradients(case, case.inputs(torch.float32, CPU, requires_grad=True))
    inputs = case.inputs(torch.float32, CPU, requires_grad=True)
    with torch.device("meta"):
        found = results_and_gradients(case, inputs)
    assert_all_equal(found, expected)

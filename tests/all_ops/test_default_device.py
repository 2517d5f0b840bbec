"""A default device of the user's is where the user's tensors are made, and none of the package's."""

import ast
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import topgather as tg
from tests.common.ops import CASES, Inputs, OpCase, every
from tests.common.runs import assert_all_equal

CPU = torch.device("cpu")
PACKAGE = Path(tg.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip
# Programs, which make what they show, and definitions, which are for the tests.
PROGRAMS = ("__main__.py", "advisor/", "viz.py", "reference/")


def results_and_gradients(case: OpCase, inputs: Inputs) -> dict[str, Tensor]:
    results = case.run(inputs)
    outputs = [results[name] for name in case.differentiable_results if results[name].requires_grad]
    if outputs:
        leaves = [inputs[name] for name in case.differentiable]
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        gradients = zip(case.differentiable, found, strict=True)
        results |= {f"grad_{name}": grad.to_dense() if grad.is_sparse else grad for name, grad in gradients}
    return results


@every(CASES)
def test_what_a_call_makes_is_where_its_arguments_are(case: OpCase) -> None:
    """The meta device, from which nothing can be copied, stands for any other."""
    expected = results_and_gradients(case, case.inputs(torch.float32, CPU, requires_grad=True))
    inputs = case.inputs(torch.float32, CPU, requires_grad=True)
    with torch.device("meta"):
        found = results_and_gradients(case, inputs)
    assert_all_equal(found, expected)


def without_device(source: str) -> Iterator[int]:
    """Lines that make a tensor and do not say where."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        # `**place` may hold a device.
        is_placed = any(keyword.arg in ("device", None) for keyword in node.keywords)
        if of_torch and node.func.attr in FACTORIES and not is_placed:
            yield node.lineno


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if not str(path.relative_to(PACKAGE)).startswith(PROGRAMS)]
    assert len(files) > 50
    found = {f"{path.relative_to(PACKAGE)}:{line}" for path in files for line in without_device(path.read_text())}
    assert not found


def test_the_scan_finds_what_it_is_for() -> None:
    assert list(
        without_device("import torch\ntorch.zeros(3)\ntorch.ones(3, device=here)\ntorch.empty(2, **place)")
    ) == [2]

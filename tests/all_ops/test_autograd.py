"""Every differentiable op in torch's autograd, and every public function where nothing is to be differentiated."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.common.ops import CASES, DIFFERENTIABLE, PUBLIC, OpCase, every
from tests.common.runs import assert_all_equal

pytestmark = pytest.mark.usefixtures("deterministic")
CPU = torch.device("cpu")


def loss_of(case: OpCase, results: dict[str, Tensor]) -> Tensor:
    return sum((results[name].square().sum() for name in case.differentiable_results), torch.zeros(()))


def gradients_of(case: OpCase, results: dict[str, Tensor], inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss_of(case, results), [inputs[name] for name in case.differentiable], **options)
    return {name: gradient.to_dense() for name, gradient in zip(case.differentiable, found, strict=True)}


@every(CASES)
def test_modes_without_gradient(case: OpCase, device: torch.device) -> None:
    """no_grad and inference_mode give the bits of a call that records, and keep no graph."""
    expected = case.run(case.inputs(torch.float32, device, requires_grad=True))
    for mode in (torch.no_grad, torch.inference_mode):
        inputs = case.inputs(torch.float32, device, requires_grad=True)
        with mode():
            results = case.run(inputs)
        assert not any(result.requires_grad for name, result in results.items() if name not in case.written)
        for name, result in results.items():
            assert torch.equal(result, expected[name].detach())


class Seen(TorchDispatchMode):
    """The names of topgather's ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "topgather":
            self.names.append(func._schema.name.removeprefix("topgather::"))
        return func(*args, **(kwargs or {}))


# The op that a public function calls once, where it is not its own name.
REACHES = {
    "moba_attention_varlen": "moba_attention",
    "moba_route_varlen": "moba_route",
    "window_attention": "grid_attention",
    "expert_lookup": "memory_dot",
    "quantized_lookup": "memory_lookup_quantized",
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no gradient", "gradient"])
@every(PUBLIC)
def test_dispatch_modes_see_the_op(case: OpCase, requires_grad: bool) -> None:
    """The way past autograd, where there is no gradient, leads past nothing else."""
    inputs = case.inputs(torch.float32, CPU, requires_grad=requires_grad)
    with Seen() as seen:
        case.run(inputs)
    function = case.function.__name__
    assert seen.names.count(REACHES.get(function, function)) == 1


@every(DIFFERENTIABLE)
def test_subsets_of_gradients(case: OpCase, device: torch.device) -> None:
    """Only what is asked for, and the same bits as when everything is; of lookups another kernel may do the part."""
    everything = case.everything(case.inputs(torch.float32, device, requires_grad=True))
    for wanted in product([True, False], repeat=len(case.differentiable)):
        inputs = case.inputs(torch.float32, device)
        for name, is_wanted in zip(case.differentiable, wanted, strict=True):
            inputs[name].requires_grad_(is_wanted)
        if any(wanted):
            found = case.everything(inputs)
            if "lookup" not in case.name:
                assert_all_equal(found, everything, str(wanted))
            for part, tensor in found.items():
                torch.testing.assert_close(tensor.detach(), everything[part].detach())
            parts = {part for part in found if part.startswith("grad_") and not part.endswith(" rows")}
            assert len(parts) == sum(wanted)


@every(DIFFERENTIABLE)
def test_backward_twice_needs_retain_graph(case: OpCase, device: torch.device) -> None:
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    results = case.run(inputs)
    first = gradients_of(case, results, inputs, retain_graph=True)
    assert_all_equal(gradients_of(case, results, inputs), first)
    # Linear: nothing is kept for the backward pass but where packed sequences start.
    if case.function.__name__.startswith("block_centroids") and "packed" not in case.name:
        assert_all_equal(gradients_of(case, results, inputs), first)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            gradients_of(case, results, inputs)


@every(DIFFERENTIABLE)
def test_a_tensor_changed_in_place_before_backward(case: OpCase, device: torch.device) -> None:
    """Refused, unless the backward pass has no use for it: never a wrong gradient."""
    expected = gradients_of(case, *_run(case, device))
    for name in (*case.tensors(), *case.differentiable_results):
        inputs = case.inputs(torch.float32, device, requires_grad=True)
        moved = {key: value * 1 if isinstance(value, Tensor) else value for key, value in inputs.items()}
        results = case.run(moved)
        loss = loss_of(case, results)
        {**moved, **results}[name].detach().add_(1)
        leaves = [inputs[key] for key in case.differentiable]
        try:
            found = torch.autograd.grad(loss, leaves)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            for key, gradient in zip(case.differentiable, found, strict=True):
                assert torch.equal(gradient.to_dense(), expected[key]), f"{name} changed: wrong gradient of {key}"


def _run(case: OpCase, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    return case.run(inputs), inputs


@every(DIFFERENTIABLE)
def test_checkpoint_recomputes_the_same(case: OpCase, device: torch.device) -> None:
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    expected = gradients_of(case, case.run(inputs), inputs)
    results = checkpoint(case.run, inputs, use_reentrant=False)
    assert_all_equal(gradients_of(case, results, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every(case for case in PUBLIC if case.differentiable)
def test_autocast_with_and_without_gradient(case: OpCase, dtype: torch.dtype, device: torch.device) -> None:
    """float32 inputs give the same bits of the same dtypes whether or not gradients are recorded."""
    found = []
    for requires_grad in (True, False):
        inputs = case.inputs(torch.float32, device, requires_grad=requires_grad)
        with torch.autocast(device.type, dtype):
            found.append(case.run(inputs))
    for name, result in found[0].items():
        assert result.dtype == found[1][name].dtype and torch.equal(result, found[1][name])
    assert all(found[0][name].requires_grad for name in case.differentiable_results)
    if case.function.__name__ in ("moba_attention", "key_conv", "grid_attention", "window_attention"):
        assert found[0]["out"].dtype == dtype

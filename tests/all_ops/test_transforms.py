"""Every op under torch.func: grad, vjp, jacrev, vmap and what they compose to, forward mode, second derivatives."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from tests.common.ops import CASES, DIFFERENTIABLE, Inputs, OpCase, every
from tests.common.tensors import random_tensor
from topgather._common.spec import OPS

CPU = torch.device("cpu")
SAMPLES = 3
# The op whose derivatives those of a public function are, where it is not its own name.
DERIVES = {"moba_attention_varlen": "moba_attention", "window_attention": "grid_attention"}
# A batch of sparse tensors is nothing that torch has.
DENSE = [case for case in DIFFERENTIABLE if "sparse" not in case.name]

Function = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """No transform falls back to something slow with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        yield


def op_of(case: OpCase) -> str:
    """Name of the registered op."""
    name = case.function.__name__.removesuffix(".default")
    return DERIVES.get(name, name)


def function_of(case: OpCase, inputs: Inputs) -> Function:
    """The differentiable results as a function of the differentiable arguments, by position."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = case.run(inputs | dict(zip(case.differentiable, tensors, strict=True)))
        return tuple(results[name] for name in case.differentiable_results)

    return function


def loss_of(case: OpCase, inputs: Inputs) -> Callable[..., Tensor]:
    function = function_of(case, inputs)
    return lambda *tensors: sum((result.sin().sum() for result in function(*tensors)), torch.zeros(()))


def leaves_of(case: OpCase, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].clone().requires_grad_() for name in case.differentiable]


def tensors_of(case: OpCase, inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in case.differentiable)


def positions(case: OpCase) -> tuple[int, ...]:
    return tuple(range(len(case.differentiable)))


def gradients_of(case: OpCase, inputs: Inputs) -> tuple[Tensor, ...]:
    """What plain backward gives."""
    leaves = leaves_of(case, inputs)
    return tuple(gradient.to_dense() for gradient in torch.autograd.grad(loss_of(case, inputs)(*leaves), leaves))


def stacked(case: OpCase, dtype: torch.dtype = torch.float64) -> tuple[list[Inputs], dict[str, Tensor]]:
    """Some problems, and their tensors with a first dimension to map over."""
    samples = [case.inputs(dtype, CPU, 10 * seed) for seed in range(SAMPLES)]
    return samples, {name: torch.stack([sample[name] for sample in samples]) for name in case.tensors()}


def tangents_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(random_tensor(tuple(t.shape), t.dtype, CPU, 70 + i) for i, t in enumerate(tensors))


def assert_rounded(found: Any, expected: Any) -> None:
    """Sums that come in another order, in float64, or in float32 where an op knows nothing wider."""
    for left, right in zip(found, expected, strict=True):
        is_wide = left.dtype == torch.float64
        torch.testing.assert_close(left, right, rtol=1e-10 if is_wide else 1e-5, atol=1e-10 if is_wide else 1e-4)


def assert_same(case: OpCase, found: Any, expected: Any) -> None:
    """The bits; where torch's own ops stand between ours, which round as the layout has it, the numbers."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "expert_lookup" in case.name else {"rtol": 0, "atol": 0}
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.to_dense(), right.to_dense(), equal_nan=True, **tolerance)


# --- reverse mode -----------------------------------------------------------------------------------------------------


@every(DIFFERENTIABLE)
def test_grad(case: OpCase) -> None:
    """Of everything at once and of each argument, the bits of a backward pass."""
    inputs = case.inputs(torch.float32, CPU)
    expected = gradients_of(case, inputs)
    assert_same(case, grad(loss_of(case, inputs), positions(case))(*tensors_of(case, inputs)), expected)
    for position in positions(case):
        found = grad(loss_of(case, inputs), position)(*tensors_of(case, inputs))
        torch.testing.assert_close(found.to_dense(), expected[position])


@every(DIFFERENTIABLE)
def test_several_backward_passes_at_once(case: OpCase) -> None:
    """What ``torch.autograd.grad`` loops over with ``is_grads_batched``, also where gradients would be sparse."""
    inputs = case.inputs(torch.float64, CPU)
    leaves = leaves_of(case, inputs)
    outputs = function_of(case, inputs)(*leaves)
    incoming = [random_tensor((SAMPLES, *output.shape), output.dtype, CPU, 80 + i) for i, output in enumerate(outputs)]
    found = torch.autograd.grad(outputs, leaves, incoming, is_grads_batched=True, retain_graph=True)
    for sample in range(SAMPLES):
        one = [each[sample] for each in incoming]
        expected = [each.to_dense() for each in torch.autograd.grad(outputs, leaves, one, retain_graph=True)]
        assert_rounded([each[sample] for each in found], expected)


@every(DIFFERENTIABLE)
def test_vjp(case: OpCase) -> None:
    inputs = case.inputs(torch.float32, CPU)
    leaves = leaves_of(case, inputs)
    expected = function_of(case, inputs)(*leaves)
    incoming = tuple(result.detach().cos() for result in expected)
    results, pullback = vjp(function_of(case, inputs), *tensors_of(case, inputs))
    assert_same(case, results, [result.detach() for result in expected])
    assert_same(case, pullback(incoming), torch.autograd.grad(expected, leaves, incoming))


@every(DENSE)
def test_jacrev(case: OpCase) -> None:
    """Of a few sums of the results: one backward pass for each."""
    inputs = case.inputs(torch.float64, CPU)

    def sums(*tensors: Tensor) -> Tensor:
        results = function_of(case, inputs)(*tensors)
        return torch.stack([(result * result.cos() ** power).sum() for result in results for power in range(2)])

    leaves = leaves_of(case, inputs)
    rows = [torch.autograd.grad(number, leaves, retain_graph=True) for number in sums(*leaves)]
    found = jacrev(sums, positions(case))(*tensors_of(case, inputs))
    assert_rounded(found, [torch.stack(parts) for parts in zip(*rows, strict=True)])


# --- vmap -------------------------------------------------------------------------------------------------------------


@every(case for case in CASES if not case.name.startswith("ops.memory_backward_sparse"))
def test_vmap_of_each_argument(case: OpCase) -> None:
    """Mapped alone, in front or at the end, and all together: the bits of a loop."""
    samples, together = stacked(case, torch.float32)
    names = list(case.tensors())
    if case.function.__name__ == "moba_decode":
        names.remove("num_tokens")
        with pytest.raises(NotImplementedError, match="topgather: num_tokens cannot be mapped by vmap"):
            vmap(lambda given: case.run(samples[0] | given))({"num_tokens": together["num_tokens"]})
    for mapped, dim in [*(([name], 0) for name in names), *(([name], -1) for name in names), (names, 0)]:
        given = {name: together[name].movedim(0, dim) for name in mapped}
        run = vmap(lambda given: case.run(samples[0] | given), in_dims=(dict.fromkeys(mapped, dim),))
        if case.written:
            with pytest.raises(
                NotImplementedError,
                match=f"topgather: {case.function._schema.name.removeprefix('topgather::')} writes its",
            ):
                run(given)
            continue
        found = run(given)
        loop = [case.run(samples[0] | {name: sample[name] for name in mapped}) for sample in samples]
        for name in case.results:
            assert_same(case, [found[name]], [torch.stack([results[name] for results in loop])])


@every(DENSE)
def test_vmap_of_grad_and_grad_of_vmap(case: OpCase) -> None:
    samples, together = stacked(case)
    leaves = {name: together[name] for name in case.differentiable}
    others = {name: together[name] for name in case.tensors() if name not in leaves}

    def loss(others: Inputs, *tensors: Tensor) -> Tensor:
        return loss_of(case, samples[0] | others)(*tensors)

    argnums = tuple(position + 1 for position in positions(case))
    loop = [gradients_of(case, samples[0] | {name: sample[name] for name in together}) for sample in samples]
    expected = [torch.stack(parts) for parts in zip(*loop, strict=True)]
    assert_rounded(vmap(grad(loss, argnums))(others, *leaves.values()), expected)
    assert_rounded(grad(lambda *given: vmap(loss)(*given).sum(), argnums)(others, *leaves.values()), expected)


@every(DENSE)
def test_vmap_over_what_requires_grad_outside(case: OpCase) -> None:
    """A mapped tensor, and one that the mapped function closes over, get their gradients."""
    samples, together = stacked(case)
    for closed_over in (None, *case.differentiable):
        leaves = {name: together[name].clone().requires_grad_() for name in case.differentiable}
        if closed_over is not None:
            leaves[closed_over] = samples[0][closed_over].clone().requires_grad_()
        given = {name: leaf for name, leaf in (together | leaves).items() if name != closed_over}
        if not given:
            continue
        fixed = samples[0] if closed_over is None else samples[0] | {closed_over: leaves[closed_over]}

        def loss(given: Inputs, fixed: Inputs = fixed) -> Tensor:
            inputs = fixed | given
            return loss_of(case, inputs)(*tensors_of(case, inputs))

        losses = vmap(loss)(given)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        loop = [gradients_of(case, samples[0] | {name: sample[name] for name in given}) for sample in samples]
        for name, gradient, *parts in zip(leaves, found, *loop, strict=True):
            expected = torch.stack(parts)
            assert_rounded([gradient], [expected.sum(0) if name == closed_over else expected])


# --- forward mode -----------------------------------------------------------------------------------------------------


def product_with_jacobian(case: OpCase, inputs: Inputs) -> tuple[Tensor, ...]:
    tensors = tensors_of(case, inputs)
    found: tuple[Tensor, ...] = jvp(function_of(case, inputs), tensors, tangents_of(tensors))[1]
    return found


def linear_map(case: OpCase, inputs: Inputs) -> Any:
    tensors = tensors_of(case, inputs)
    return linearize(function_of(case, inputs), *tensors)[1](*tangents_of(tensors))


def through_columns(case: OpCase, inputs: Inputs) -> Any:
    tensors = tensors_of(case, inputs)
    found = jacfwd(function_of(case, inputs), positions(case))(*tensors)
    return [
        sum(torch.tensordot(part, t, t.dim()) for part, t in zip(parts, tangents_of(tensors), strict=True))
        for parts in found
    ]


def dual_numbers(case: OpCase, inputs: Inputs, *names: str) -> list[Tensor]:
    """Tangents of the results for those of some arguments."""
    tangents = dict(zip(case.differentiable, tangents_of(tensors_of(case, inputs)), strict=True))
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(inputs[name], tangents[name]) for name in names}
        results = case.run(inputs | duals)
        return [forward_ad.unpack_dual(results[name]).tangent for name in case.differentiable_results]


FORWARD_MODES: dict[str, Callable[[OpCase, Inputs], Any]] = {
    "jvp": product_with_jacobian,
    "linearize": linear_map,
    "jacfwd": through_columns,
    "dual numbers": lambda case, inputs: dual_numbers(case, inputs, *case.differentiable),
}
HAVE_FORWARD_MODE = {name for name, op in OPS.items() if op.forward_mode is not None} | {
    "expert_lookup",
    "quantized_lookup",
}


def test_which_ops_have_a_forward_mode() -> None:
    """All but those whose second derivatives are refused for a reason: attention's weights would have to be remade."""
    without = {name for name, op in OPS.items() if op.backward is not None} - HAVE_FORWARD_MODE
    assert without == {"moba_attention", "grid_attention", "index_loss"}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@every(case for case in DIFFERENTIABLE if op_of(case) not in HAVE_FORWARD_MODE)
def test_forward_mode_is_refused(case: OpCase, mode: str) -> None:
    message = rf"topgather: {op_of(case)} has no derivative in forward mode \(jvp, linearize, jacfwd, dual numbers\)"
    with pytest.raises(NotImplementedError, match=message):
        FORWARD_MODES[mode](case, case.inputs(torch.float64, CPU))


@pytest.mark.parametrize("mode", FORWARD_MODES)
@every(case for case in DIFFERENTIABLE if op_of(case) in HAVE_FORWARD_MODE)
def test_forward_mode_is_the_transpose_of_reverse_mode(case: OpCase, mode: str) -> None:
    """``<u, J t> = <J' u, t>``, all tangents at once and one at a time."""
    inputs = case.inputs(torch.float64, CPU)
    leaves = leaves_of(case, inputs)
    results = function_of(case, inputs)(*leaves)
    incoming = tangents_of(tuple(result.detach() for result in results))
    gradients = [gradient.to_dense() for gradient in torch.autograd.grad(results, leaves, incoming)]
    tangents = tangents_of(tensors_of(case, inputs))
    products = [(gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True)]

    def assert_adjoint(found: Any, expected: Any) -> None:
        pairs = zip(incoming, found, strict=True)
        assert_rounded([sum((u * t).sum() for u, t in pairs if t is not None)], [expected])

    assert_adjoint(FORWARD_MODES[mode](case, inputs), sum(products))
    if mode == "dual numbers":
        for name, expected in zip(case.differentiable, products, strict=True):
            assert_adjoint(dual_numbers(case, inputs, name), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every(case for case in DIFFERENTIABLE if op_of(case) in HAVE_FORWARD_MODE)
def test_forward_mode_keeps_the_dtype(case: OpCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, CPU)
    results = function_of(case, inputs)(*tensors_of(case, inputs))
    for tangent, result in zip(product_with_jacobian(case, inputs), results, strict=True):
        assert tangent.dtype == result.dtype and tangent.shape == result.shape and tangent.isfinite().all()


# --- second derivatives -----------------------------------------------------------------------------------------------


def double_backward(case: OpCase, inputs: Inputs) -> None:
    leaves = leaves_of(case, inputs)
    gradients = torch.autograd.grad(loss_of(case, inputs)(*leaves), leaves, create_graph=True)
    torch.autograd.grad(gradients[0].sum(), leaves)


def of_the_loss(transform: Any) -> Callable[[OpCase, Inputs], Any]:
    return lambda case, inputs: transform(loss_of(case, inputs))(*tensors_of(case, inputs))


SECOND_DERIVATIVES: dict[str, Callable[[OpCase, Inputs], Any]] = {
    "double backward": double_backward,
    "hessian": of_the_loss(hessian),
    "jacrev of jacrev": of_the_loss(lambda loss: jacrev(jacrev(loss))),
    "grad of grad": of_the_loss(lambda loss: grad(lambda *tensors: grad(loss)(*tensors).sum())),
    "jvp of grad": lambda case, inputs: jvp(
        grad(loss_of(case, inputs), positions(case)), tensors_of(case, inputs), tangents_of(tensors_of(case, inputs))
    ),
}


def is_differentiable_once(case: OpCase) -> bool:
    return f"{op_of(case)}_backward" in OPS


@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
@every(case for case in DIFFERENTIABLE if is_differentiable_once(case))
def test_second_derivatives_are_refused(case: OpCase, way: str) -> None:
    """In words, with the op's name; forward mode first where the op has none."""
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        SECOND_DERIVATIVES[way](case, case.inputs(torch.float64, CPU))
    messages = [f"topgather: {op_of(case)} has no double backward", f"topgather: {op_of(case)} has no derivative in"]
    assert str(error.value).startswith(tuple(messages[: 1 if op_of(case) in HAVE_FORWARD_MODE else 2]))

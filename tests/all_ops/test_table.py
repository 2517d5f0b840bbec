"""The table of ops misses nothing, and what it says of each op is true."""

import inspect

import pytest
import torch

import topgather as tg
from tests.common.ops import CASES, PUBLIC, REGISTERED, SHARED, OpCase, every
from tests.common.runs import assert_all_equal

CPU = torch.device("cpu")
# Integer arithmetic in torch's ops, with no op of its own: memory/test_ngram.py has what the table would say of it.
COMPOSED = {"ngram_hash"}
# Those that take a tensor: others measure, or describe a choice.
FUNCTIONS = {
    name
    for name in tg.__all__
    if inspect.isfunction(function := getattr(tg, name)) and "Tensor" in inspect.get_annotations(function).values()
} - COMPOSED


# Takes sparse tensors, which no case of the table has; package/test_inductor.py has what calls it.
OF_SPARSE_TENSORS = {"sum_sparse"}


def registered_ops() -> set[str]:
    """Whatever stands under ``torch.ops.topgather`` and takes strided tensors."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("topgather::") for name in names if name.startswith("topgather::")} - OF_SPARSE_TENSORS


def missing_arguments(cases: list[OpCase], arguments: dict[str, set[str]]) -> dict[str, set[str]]:
    """Arguments of each function that no case gives."""
    for case in cases:
        arguments[case.function.__name__] -= set(case.example)
    return {name: left for name, left in arguments.items() if left}


def test_every_registered_op_stands_in_the_table() -> None:
    assert {case.function._schema.name.removeprefix("topgather::") for case in REGISTERED} == registered_ops()
    assert len(registered_ops()) >= 16


def test_every_public_function_stands_in_the_table() -> None:
    assert {case.function.__name__ for case in PUBLIC} == FUNCTIONS
    assert {case.function.__name__ for case in SHARED} == FUNCTIONS - {"moba_route_varlen", "moba_attention_varlen"}


def test_every_argument_of_a_public_function_is_given() -> None:
    arguments = {name: set(inspect.signature(getattr(tg, name)).parameters) for name in FUNCTIONS}
    assert missing_arguments(PUBLIC, arguments) == {}


def test_every_argument_of_a_registered_op_is_given() -> None:
    arguments = {
        case.function.__name__: {argument.name for argument in case.function._schema.arguments} for case in REGISTERED
    }
    assert missing_arguments(REGISTERED, arguments) == {}


def test_names_are_unique() -> None:
    for cases in (CASES, SHARED):
        assert len({case.name for case in cases}) == len(cases)


@every(CASES)
def test_inputs_depend_on_the_seed_alone(case: OpCase) -> None:
    results = [case.everything(case.inputs(torch.float32, CPU, seed)) for seed in (0, 0, 1)]
    assert_all_equal(results[0], results[1])
    with pytest.raises(AssertionError):
        assert_all_equal(results[0], results[2])


@every(CASES)
def test_what_is_said_to_be_differentiable_is(case: OpCase) -> None:
    inputs = case.inputs(torch.float32, CPU, requires_grad=True)
    results = case.run(inputs)
    assert tuple(results) == (case.written or case.results)
    assert {name for name, result in results.items() if result.requires_grad} == set(case.differentiable_results)
    found = case.everything(case.inputs(torch.float32, CPU, requires_grad=True))
    for name in case.differentiable:
        assert found[f"grad_{name}"].count_nonzero() > 0


@every(REGISTERED)
def test_what_is_said_to_be_written_is(case: OpCase) -> None:
    arguments = case.function._schema.arguments
    assert case.written == tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)

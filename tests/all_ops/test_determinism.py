"""Every op gives the same bits from run to run, for any number of threads, from several Python threads, after a fork.

Numbers of threads and forks concern the CPU alone; ``test_cuda_contract.py`` in an op's folder has what CUDA promises.
"""

import os

import pytest
import torch

from tests.common.ops import CASES, PUBLIC, SHARED, OpCase, every, one_of_each
from tests.common.runs import assert_all_equal, assert_concurrent_calls_agree, run_in_fork
from tests.common.tensors import DTYPES

pytestmark = pytest.mark.sanitize
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@every([*SHARED, *(case for case in PUBLIC if "varlen" in case.name)])
def test_bits_do_not_depend_on_the_number_of_threads(case: OpCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, CPU, requires_grad=True)
    torch.set_num_threads(1)
    expected = case.everything(inputs)
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        for run_idx in range(2):
            assert_all_equal(case.everything(inputs), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every(CASES)
def test_the_same_bits_from_run_to_run(case: OpCase, dtype: torch.dtype, device: torch.device) -> None:
    first = case.everything(case.inputs(dtype, device, requires_grad=True))
    for run_idx in range(2):
        assert_all_equal(case.everything(case.inputs(dtype, device, requires_grad=True)), first, f"run {run_idx}")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("num_threads", [1, 3])
@every(PUBLIC)
def test_concurrent_calls_give_the_same_bits(case: OpCase, num_threads: int, device: torch.device) -> None:
    """Six Python threads at once, each on other numbers, each several times."""
    torch.set_num_threads(num_threads)
    inputs = [case.inputs(torch.float32, device, seed, requires_grad=True) for seed in range(6)]
    assert_concurrent_calls_agree(lambda seed: case.everything(inputs[seed], seed), num_threads)


@every(one_of_each())
def test_concurrent_calls_that_share_threads(case: OpCase) -> None:
    inputs = [case.inputs(torch.float32, CPU, seed, requires_grad=True) for seed in range(4)]
    assert_concurrent_calls_agree(lambda seed: case.everything(inputs[seed], seed), 3, num_runs=1, num_callers=4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_threads", [1, 3])
@every(one_of_each())
def test_a_forked_child_can_call(case: OpCase, num_threads: int) -> None:
    """The parent used its threads; the child, which inherits none of them, gets the same bits and does not hang.

    The child itself calls no parallel op of torch, whose own threads do not survive a fork.
    """
    torch.set_num_threads(num_threads)
    inputs = case.inputs(torch.float32, CPU)
    expected = {name: result.numpy() for name, result in case.run(inputs).items()}

    def work() -> bool:
        # Torch's own are aminmax, which looks at indices, activations, and all of the indexer's loss.
        if "lookup" in case.name or "index_loss" in case.name:
            torch.set_num_threads(1)
        return all(bool((result.numpy() == expected[name]).all()) for name, result in case.run(inputs).items())

    assert run_in_fork(work) == 0
    assert work()

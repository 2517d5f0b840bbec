"""Grid and window attention give the same bits from run to run, for any number of threads, from Python threads."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.runs import assert_all_equal, assert_concurrent_calls_agree, run_in_fork
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.grid.helpers import PARTITIONS, GridCase, Inputs, make_inputs, run_grid

CPU = torch.device("cpu")
NUM_THREADS = [1, 2, 3, 5]
CASES = [
    GridCase(num_heads=3, rows=37, columns=41, step=(5, 4), head_dim=40, has_bias=True),
    GridCase(num_heads=3, rows=37, columns=41, step=(5, 4), head_dim=40, has_bias=True, partition="window"),
    # One group, which many threads share.
    GridCase(batch=1, num_heads=1, rows=27, columns=29, step=(1, 1), head_dim=33, has_bias=True),
    GridCase(batch=3, num_heads=2, rows=30, columns=30, step=(30, 30), head_dim=8),
]
SMALL = GridCase(rows=13, columns=11, step=(4, 3), head_dim=24, has_bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case: GridCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, CPU)
    torch.set_num_threads(1)
    expected = run_grid(inputs, case)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        for run_idx in range(2):
            assert_all_equal(run_grid(inputs, case), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_same_bits_from_run_to_run(partition: str, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(SMALL, partition=partition)
    first = run_grid(make_inputs(case, dtype, device), case)
    for run_idx in range(2):
        assert_all_equal(run_grid(make_inputs(case, dtype, device), case), first, f"run {run_idx}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Alone, or heads in another order: the same bits for its tokens. A bias sums over images, so it has none here."""
    case = replace(SMALL, batch=3, num_heads=3, has_bias=False)
    inputs = make_inputs(case, dtype, device)
    expected = run_grid(inputs, case)
    images = (inputs.query, inputs.key, inputs.value)
    alone = Inputs(*(t.detach()[1:2].requires_grad_() for t in images), inputs.grad_out[1:2])
    for name, tensor in run_grid(alone, replace(case, batch=1)).items():
        assert_bitwise_equal(name, tensor, expected[name][1:2])
    flipped = Inputs(*(t.detach().flip(1).requires_grad_() for t in images), inputs.grad_out.flip(1))
    for name, tensor in run_grid(flipped, case).items():
        assert_bitwise_equal(name, tensor, expected[name].flip(1))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_concurrent_calls_give_the_same_bits(num_threads: int, device: torch.device) -> None:
    """Six Python threads at once, each on another problem, each several times."""
    torch.set_num_threads(num_threads)
    cases = [replace(SMALL, rows=7 + seed, partition=PARTITIONS[seed % 2]) for seed in range(6)]

    def everything(seed: int) -> dict[str, Tensor]:
        return run_grid(make_inputs(cases[seed], torch.float32, device, seed), cases[seed])

    assert_concurrent_calls_agree(everything, num_threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_call() -> None:
    """The parent used its threads; the child, which inherits none of them, gets the same bits and does not hang."""
    torch.set_num_threads(3)
    inputs = make_inputs(CASES[0], torch.float32, CPU)
    images = (inputs.query.detach(), inputs.key.detach(), inputs.value.detach())
    out = tg.grid_attention(*images, stride=(5, 4)).numpy()

    def work() -> bool:
        return bool((tg.grid_attention(*images, stride=(5, 4)).numpy() == out).all())

    assert run_in_fork(work) == 0

"""The key convolution gives the same bits from run to run, for any number of threads, from Python threads."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.runs import assert_all_equal, assert_concurrent_calls_agree, run_in_fork
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.key_conv.helpers import Inputs, KeyConvCase, make_inputs, run_key_conv

CPU = torch.device("cpu")
NUM_THREADS = [1, 2, 3, 5]
CASES = [
    KeyConvCase(batch=3, num_heads=3, num_tokens=2000, head_dim=40, has_state=True),
    KeyConvCase(batch=200, num_heads=2, num_tokens=7, head_dim=33, width=5),
    KeyConvCase(lengths=(1500, 0, 1, 700, 33), num_heads=9, head_dim=64, width=8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case: KeyConvCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, CPU)
    torch.set_num_threads(1)
    expected = run_key_conv(inputs)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        for run_idx in range(2):
            assert_all_equal(run_key_conv(inputs), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run(dtype: torch.dtype, device: torch.device) -> None:
    case = KeyConvCase(num_tokens=200, has_state=True)
    first = run_key_conv(make_inputs(case, dtype, device))
    for run_idx in range(2):
        assert_all_equal(run_key_conv(make_inputs(case, dtype, device)), first, f"run {run_idx}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Alone, or heads in another order: the same bits. A weight sums over sequences, so its gradient is left out."""
    case = KeyConvCase(batch=3, num_heads=3, num_tokens=50, head_dim=24, has_state=True)
    inputs = make_inputs(case, dtype, device)
    expected = run_key_conv(inputs)
    assert inputs.state is not None
    key, state = inputs.key.detach(), inputs.state.detach()
    alone = Inputs(key[1:2].requires_grad_(), inputs.weight, inputs.grad_out[1:2], state[1:2].clone().requires_grad_())
    flipped = Inputs(
        key.flip(1).requires_grad_(),
        inputs.weight.detach().flip(0).requires_grad_(),
        inputs.grad_out.flip(1),
        state.flip(1).requires_grad_(),
    )
    for name, tensor in run_key_conv(alone).items():
        if name != "d_weight":
            assert_bitwise_equal(name, tensor, expected[name][1:2])
    for name, tensor in run_key_conv(flipped).items():
        assert_bitwise_equal(name, tensor, expected[name].flip(0 if name == "d_weight" else 1))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_concurrent_calls_give_the_same_bits(num_threads: int, device: torch.device) -> None:
    """Six Python threads at once, each on another problem, each several times."""
    torch.set_num_threads(num_threads)
    cases = [replace(KeyConvCase(has_state=True), num_tokens=30 + seed, width=2 + seed) for seed in range(6)]

    def everything(seed: int) -> dict[str, Tensor]:
        return run_key_conv(make_inputs(cases[seed], torch.float32, device, seed))

    assert_concurrent_calls_agree(everything, num_threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_call() -> None:
    """The parent used its threads; the child, which inherits none of them, gets the same bits and does not hang."""
    torch.set_num_threads(3)
    inputs = make_inputs(CASES[0], torch.float32, CPU)
    key, weight = inputs.key.detach(), inputs.weight.detach()
    out = tg.key_conv(key, weight).numpy()

    def work() -> bool:
        return bool((tg.key_conv(key, weight).numpy() == out).all())

    assert run_in_fork(work) == 0

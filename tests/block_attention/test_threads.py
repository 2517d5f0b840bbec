"""Calls run on torch's threads, other Python threads run on; all_ops/test_determinism.py has their bits."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_inputs

pytestmark = pytest.mark.sanitize

CPU = torch.device("cpu")


def assert_lock_is_released(case: AttentionCase, device: torch.device) -> None:
    """A second Python thread makes progress during one long call."""
    inputs = [tensor.detach() for tensor in make_inputs(case, torch.float32, device)]

    def timed_call() -> tuple[float, float]:
        start = time.perf_counter()
        tg.moba_attention(*inputs, block_size=case.block_size, top_k=case.top_k)
        return start, time.perf_counter()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(timed_call)
        ticks = []
        while not future.done():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
        start, end = future.result()
    # Had the call held the lock, no tick could fall well inside it.
    middle = [tick for tick in ticks if start + 0.25 * (end - start) < tick < end - 0.25 * (end - start)]
    assert middle, f"{len(ticks)} ticks, none in the middle half of a call of {end - start:.3f} s"


def test_the_lock_is_released_while_a_kernel_runs() -> None:
    torch.set_num_threads(1)
    assert_lock_is_released(AttentionCase(num_heads=4, query_len=6000, head_dim=64, block_size=64, top_k=8), CPU)


@pytest.mark.emulator
def test_the_lock_is_released_while_an_emulated_kernel_runs(cuda_device: torch.device) -> None:
    case = AttentionCase(num_heads=2, query_len=300, head_dim=32, block_size=32, top_k=4)
    assert_lock_is_released(case, cuda_device)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
@pytest.mark.parametrize("num_threads", [2, 3])
def test_calls_run_on_torchs_threads(num_threads: int) -> None:
    """A call starts no threads: those of torch's ops, which wait busily for the next, do the work."""
    torch.set_num_threads(num_threads)
    case = AttentionCase(num_heads=8, query_len=3000, head_dim=64, block_size=64, top_k=8)
    inputs = [tensor.detach() for tensor in make_inputs(case, torch.float32, CPU)]
    is_done = False

    def most_threads() -> int:
        most = 0
        while not is_done:
            most = max(most, len(os.listdir("/proc/self/task")))
        return most

    def call() -> int:
        nonlocal is_done
        torch.ones(1 << 20).exp()  # makes torch start what is missing of its threads
        is_done = False
        with ThreadPoolExecutor(1) as pool:
            count = pool.submit(most_threads)
            tg.moba_attention(*inputs, block_size=64, top_k=8)
            is_done = True
            return count.result()

    call()
    before = len(os.listdir("/proc/self/task"))
    assert call() <= before + 1  # the one that counts

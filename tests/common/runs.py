"""The same call over and over: in Python threads at once, in a forked process, and the comparison of all it gave."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from tests.common.tensors import assert_bitwise_equal


def assert_all_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    for name, tensor in actual.items():
        assert_bitwise_equal(f"{name}, {what}", tensor.detach(), expected[name].detach())


def assert_concurrent_calls_agree(
    run: Callable[[int], dict[str, Tensor]], num_threads: int, num_runs: int = 3, num_callers: int = 6
) -> None:
    """Python threads that all begin at once, each with a seed of its own, get the bits of a call alone every time."""
    seeds = range(num_callers)
    expected = [run(seed) for seed in seeds]
    barrier = Barrier(num_callers)

    def work(seed: int) -> list[dict[str, Tensor]]:
        torch.set_num_threads(num_threads)
        barrier.wait(timeout=60)
        return [run(seed) for _ in range(num_runs)]

    with ThreadPoolExecutor(num_callers) as pool:
        for seed, runs in zip(seeds, pool.map(work, seeds), strict=True):
            for run_idx, result in enumerate(runs):
                assert_all_equal(result, expected[seed], f"seed {seed}, run {run_idx}")


def run_in_fork(work: Callable[[], bool], timeout_s: float = 60.0) -> int:
    """Exit code of ``work`` in a forked child: 0 for True, 1 for False, 2 for an exception, -9 for a hang."""
    child = os.fork()
    if child == 0:
        exit_code = 2
        try:
            exit_code = 0 if work() else 1
        finally:
            os._exit(exit_code)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

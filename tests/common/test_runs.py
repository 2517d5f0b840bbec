"""The helpers that run a call over and over see what goes wrong."""

import signal
import time

import pytest
import torch

from tests.common.runs import assert_concurrent_calls_agree, run_in_fork


def test_fork_helper_reports_failures() -> None:
    assert run_in_fork(lambda: False) == 1
    assert run_in_fork(lambda: time.sleep(60) is None, timeout_s=0.2) == -signal.SIGKILL


def test_concurrent_calls_that_differ_are_seen() -> None:
    numbers = iter(range(10**6))
    with pytest.raises(AssertionError, match="out, seed 0, run 0"):
        assert_concurrent_calls_agree(lambda seed: {"out": torch.tensor([next(numbers)])}, num_threads=1)

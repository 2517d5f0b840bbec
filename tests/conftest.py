"""Fixtures every test file shares: the devices to run on, and global state put back after each test."""

import os
from collections.abc import Iterator

# Read when torch is first imported: on a busy machine its idle threads would otherwise spin against each
# other, and thousands of small problems take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

import topgather as tg

# Derandomised: two runs of the suite on the same commit must agree. Bounded by each test's max_examples.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_WORKERS))


def available_devices() -> list[str]:
    """Devices whose kernels this build has and this machine can run."""
    return ["cpu"]


@pytest.fixture(params=available_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn: all of them run the same cases."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers whichever tests ran before, in whichever worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_num_threads() -> Iterator[None]:
    """Put torch's thread count back, whatever the test set it to."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def restore_cpu_target() -> Iterator[None]:
    """Put the instruction set in use back, whatever the test set it to."""
    cpu_target = tg._native.cpu_target()
    yield
    tg._native.set_cpu_target(cpu_target)

"""Fixtures every test file shares: the devices to run on, and global state put back after each test."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

# Read when torch is first imported: on a busy machine its idle threads would otherwise spin against each
# other, and thousands of small problems take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What is built while tests run and not kept afterwards, for all of pytest's workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TOPGATHER_TEST_FOLDER"] = tempfile.mkdtemp(prefix="topgather-tests-")
# What torch.compile keeps on disk names the arguments of ops as they were when it was written, and is found again by
# what stands in the graph alone. Tests therefore see nothing compiled before this run.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["TOPGATHER_TEST_FOLDER"], "inductor")
# Processes that only import torch to compile what is small, and compiling to learn what the processor can do, take
# longer than the tests that they serve.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from hypothesis import settings

import topgather as tg
from tests.common.devices import CPU_TARGETS, CUDA_KINDS, KINDS, file_of, schedule_of, select
from tests.common.emulated import emulated_cuda

# Derandomised: two runs of the suite on the same commit must agree. Bounded by each test's max_examples.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_WORKERS))


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this suite: `-m gpu` selects what runs on a GPU, `-k emulated_cuda` what the emulator runs."""
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    config.addinivalue_line("markers", "emulator: needs what only the emulator shows, such as a record of launches")
    config.addinivalue_line("markers", "sanitize: reaches the CPU kernels, for a build with sanitizers")
    config.addinivalue_line("markers", "unchecked: on the emulator without its checks, which keep books on all memory")


def pytest_unconfigure() -> None:
    """Nothing built by this run is left behind."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["TOPGATHER_TEST_FOLDER"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -k: what a rule leaves out does not depend on what else is asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the rules of ``common/devices.py`` say."""
    items[:], left_out = select(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Tens of thousands of tests and all modules stay to the end: not to be looked through at each collection."""
    gc.collect()
    gc.freeze()


def kind_parameters(kinds: list[str]) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.gpu if kind == "cuda" else ()) for kind in kinds]


@pytest.fixture(params=kind_parameters(KINDS))
def device_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of device in turn: all of them run the same cases."""
    return request.param


@pytest.fixture(params=kind_parameters(CUDA_KINDS))
def cuda_kind(request: pytest.FixtureRequest) -> str:
    """The kinds that run CUDA kernels, for what holds of them alone."""
    return request.param


def device_of(kind: str, request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if kind == "emulated_cuda" and request.node.get_closest_marker("unchecked"):
        with emulated_cuda(checked=False, order="random", cp_async="mixed"):
            yield torch.device("cpu")
    elif kind == "emulated_cuda":
        schedule = schedule_of(f"{file_of(request.node)}::{request.node.name}")
        print(f"emulated with {schedule}")
        with emulated_cuda(checked=True, **schedule):
            yield torch.device("cpu")
    else:
        yield torch.device(kind)


@pytest.fixture
def device(device_kind: str, request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test puts its tensors; under ``emulated_cuda`` the CPU, whose ops then run the CUDA kernels."""
    yield from device_of(device_kind, request)


@pytest.fixture
def cuda_device(cuda_kind: str, request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The same for the kinds that run CUDA kernels."""
    yield from device_of(cuda_kind, request)


@pytest.fixture(params=CPU_TARGETS)
def cpu_target(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine in turn, in use by the CPU kernels."""
    tg._native.set_cpu_target(request.param)
    assert tg._native.cpu_target() == request.param
    return request.param


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Gradients are the same bits from call to call, for tests that compare bits."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that is not touched must stay so in all_ops/test_large_offsets.py.
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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

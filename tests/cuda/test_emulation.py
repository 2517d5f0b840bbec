"""The emulator that runs the CUDA sources on the CPU: primitives against closed forms, planted faults reported.

The kernels stand in ``tests/emulation/micro``. Every fault kernel is right with option 0 and wrong with others.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.common.emulated import emulated_cuda

FOLDER = os.environ.get("TOPGATHER_EMULATION", "")
pytestmark = pytest.mark.skipif(
    not FOLDER,
    reason="TOPGATHER_EMULATION does not name the folder with the emulated modules; see tests/emulation/CMakeLists.txt",
)

WARP = (32, 1, 1)
TWO_WARPS = (64, 1, 1)
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = [
    {"order": "ascending", "cp_async": "at_wait"},
    {"order": "descending", "cp_async": "at_issue"},
    {"order": "random", "cp_async": "mixed", "seed": 7},
]


def load(name: str) -> ModuleType:
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    return importlib.import_module(name)


@pytest.fixture(params=["plain", "checked"])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The two builds of the micro kernels, each left as found."""
    yield from restored(load("_emulation_micro" if request.param == "plain" else "_emulation_micro_checked"))


@pytest.fixture
def checked() -> Iterator[ModuleType]:
    yield from restored(load("_emulation_micro_checked"))


@pytest.fixture
def plain() -> Iterator[ModuleType]:
    yield from restored(load("_emulation_micro"))


def restored(module: ModuleType) -> Iterator[ModuleType]:
    before = module.options()
    yield module
    module.set_options(**before)


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: schedule["order"])
def schedule(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Three ways to order threads and to land asynchronous copies."""
    return request.param


def memory(tensor: Tensor, kind: str) -> tuple[int, int, str]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size(), kind


def run(
    module: ModuleType,
    name: str,
    output: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    option: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = WARP,
    shared_bytes: int = 4096,
    kinds: tuple[str, str, str] = ("input", "input", "output"),
    repeats: int = 1,
    zero_output: bool = False,
) -> Tensor:
    """Run a micro kernel; what was not given is a small input."""
    tensors = [torch.zeros(1024) if tensor is None else tensor for tensor in (a, b, output)]
    buffers = [memory(tensor, kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    module.run(name, grid, block, shared_bytes, *buffers, option, repeats, zero_output)
    return output


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


# --- primitives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_multiply_accumulate(module: ModuleType, schedule: dict[str, Any], dtype: str) -> None:
    """Small integers: the product is exact in whatever order it is summed."""
    module.set_options(**schedule)
    a = torch.randint(-9, 10, (16, 16)).to(HALF_DTYPES[dtype])
    b = torch.randint(-9, 10, (16, 8)).to(HALF_DTYPES[dtype])
    output = run(module, f"multiply_accumulate_{dtype}", torch.empty(16, 8), a, b)
    assert torch.equal(output, 1 + a.float() @ b.float())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_multiply_accumulate_carries_nonfinite_and_subnormal(module: ModuleType, dtype: str) -> None:
    half = HALF_DTYPES[dtype]
    a, b = torch.zeros(16, 16, dtype=half), torch.zeros(16, 8, dtype=half)
    b[0] = 1
    a[3, 0], a[4, 0], a[5, 0] = float("inf"), float("nan"), torch.finfo(half).smallest_normal / 4
    output = run(module, f"multiply_accumulate_{dtype}", torch.empty(16, 8), a, b)
    assert torch.isinf(output[3]).all()
    assert torch.isnan(output[4]).all()
    assert torch.equal(output[5], (1 + a[5, 0].float()).expand(8))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_load_matrix(module: ModuleType, schedule: dict[str, Any], is_transposed: bool) -> None:
    module.set_options(**schedule)
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).reshape(4, 8, 8) * 3
    output = run(module, "load_matrix", torch.empty(32, 4, 2, dtype=torch.int16), matrices, option=int(is_transposed))
    if is_transposed:
        matrices = matrices.transpose(1, 2)
    # Lane l holds elements 2 * (l % 4) and the next of row l / 4 of each matrix.
    assert torch.equal(output, matrices.reshape(4, 32, 2).transpose(0, 1))


def test_load_matrix_counts_bank_conflicts(module: ModuleType) -> None:
    module.reset_stats()
    run(module, "load_matrix", integers(32, 4), torch.zeros(32, 8, dtype=torch.int16))
    assert module.stats()["matrix_loads"] == 1
    assert module.stats()["bank_conflicts"] == 0  # rows of 16 bytes side by side


@pytest.mark.parametrize("num_copied", [192, 100, 0])
def test_copy_async(module: ModuleType, schedule: dict[str, Any], num_copied: int) -> None:
    """Three groups waited for one by one; what lies beyond num_copied becomes zeros and is not read."""
    module.set_options(**schedule)
    source = torch.arange(4 * num_copied, dtype=torch.int32)
    output = run(module, "copy_async", integers(3, 64, 4), source, block=TWO_WARPS, option=num_copied)
    expected = torch.zeros(3 * 64 * 4, dtype=torch.int32)
    expected[: source.numel()] = source
    assert torch.equal(output, expected.reshape(3, 64, 4).flip(1))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_conversions_round_to_nearest_even(module: ModuleType, dtype: str) -> None:
    """Every neighbour pair's midpoint, just below and above it, subnormals, overflow, infinities."""
    half = HALF_DTYPES[dtype]
    grid = torch.arange(0, 0x7C00, 37, dtype=torch.int16).view(half).float()
    above = (torch.arange(0, 0x7C00, 37, dtype=torch.int16) + 1).view(half).float()
    middle = (grid.double() / 2 + above.double() / 2).float()
    values = torch.cat(
        [
            middle,
            middle.nextafter(torch.tensor(torch.inf)),
            middle.nextafter(torch.tensor(-torch.inf)),
            torch.tensor([0.0, 1e-30, 6e-8, 2.9e-8, 3e-8, 65519.0, 65520.0, 1e38, 3.4e38, torch.inf]),
        ]
    )
    values = torch.cat([values, -values])
    count = values.numel()
    output = run(module, f"convert_{dtype}", torch.empty(count // 2 + 2 * count), values, option=count)
    expected = values.to(half)
    assert torch.equal(output[: count // 2].view(torch.int16), expected.view(torch.int16))
    assert torch.equal(output[count // 2 :].reshape(2, count), expected.float().expand(2, count))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_conversions_keep_nan(module: ModuleType, dtype: str) -> None:
    values = torch.tensor([torch.nan, -torch.nan])
    output = run(module, f"convert_{dtype}", torch.empty(5), values, option=2)
    assert output[:1].view(torch.int16).tolist() == [0x7FFF, 0x7FFF]
    assert torch.isnan(output[1:]).all()


def test_exp2_max_or_nan_and_reciprocal(module: ModuleType) -> None:
    nan, inf = torch.nan, torch.inf
    a = torch.tensor([0.0, 1.0, -1.0, 10.0, -126.0, -126.5, -150.0, 1e-40, 200.0, inf, -inf, nan, 0.37, -5.9])
    b = torch.tensor([1.0, nan, -2.0, 9.0, inf, -inf, nan, 0.0, 1.0, nan, -inf, 0.0, 0.38, -6.0])
    output = run(module, "arithmetic", torch.empty(3, a.numel()), a, b, option=a.numel())
    exact = torch.exp2(a.double())
    exact[exact < torch.finfo(torch.float32).smallest_normal] = 0  # results and arguments below it are flushed
    # ex2.approx is good to 2^-22 in the PTX manual.
    torch.testing.assert_close(output[0].double(), exact.float().double(), rtol=2.0**-22, atol=0, equal_nan=True)
    torch.testing.assert_close(output[1], torch.maximum(a, b), rtol=0, atol=0, equal_nan=True)
    inverse = 1 / torch.where(a.abs() < torch.finfo(torch.float32).smallest_normal, torch.zeros(()), a)
    torch.testing.assert_close(output[2], inverse, rtol=2.0**-23, atol=0, equal_nan=True)


def test_warp_intrinsics(module: ModuleType, schedule: dict[str, Any]) -> None:
    module.set_options(**schedule)
    lane = torch.arange(32)
    square = lane * lane
    output = run(module, "warp_intrinsics", integers(10, 32))
    segment = lane // 16 * 16
    expected = [
        square[5].expand(32),
        square[lane // 8 * 8 + (lane + 1) % 8],
        square[lane ^ 3],
        square[torch.where(lane >= 2, lane - 2, lane)],
        square[torch.where(lane + 3 < segment + 16, lane + 3, lane)],
        torch.tensor(sum(1 << i for i in range(0, 32, 3))).expand(32),
        torch.tensor(1).expand(32),
        torch.tensor(0).expand(32),
        square[torch.where(lane < 16, lane ^ 1, lane ^ 2)],
        torch.tensor(8 + 100 * 4 + 10000 * 11 + 1000000 * 5).expand(32),
    ]
    assert torch.equal(output, torch.stack(expected).to(torch.int32))


def test_barriers(module: ModuleType, schedule: dict[str, Any]) -> None:
    """As many rounds as one thread asks for through __syncthreads_or."""
    module.set_options(**schedule)
    rounds = 5
    output = run(module, "barriers", integers(3, 256), grid=(3, 1, 1), block=(256, 1, 1), option=rounds)
    neighbour = (torch.arange(256) + 1) % 256
    assert torch.equal(output, (rounds * neighbour + sum(range(rounds))).to(torch.int32).expand(3, 256))


def test_exited_warps_are_not_waited_for(module: ModuleType, schedule: dict[str, Any]) -> None:
    module.set_options(**schedule)
    output = run(module, "exit_before_barrier", integers(128), block=(128, 1, 1))
    assert output[:64].eq(1).all()
    assert output[64:].eq(-1).all()  # untouched: the poison


def test_atomics(module: ModuleType, schedule: dict[str, Any]) -> None:
    module.set_options(**schedule)
    output = run(module, "atomics", integers(48), grid=(3, 1, 1), block=(128, 1, 1), zero_output=True)
    floats = output[:16].view(torch.float32)
    expected = torch.zeros(16)
    expected[[0, 2, 3, 4, 5, 6, 7]] = 384 * torch.tensor([1.0, 1.0, 2.0, 1.0, 2.0, 3.0, 4.0])
    expected[9] = 384 * 2.0**-126  # and nothing in 8, to which subnormal numbers are added
    assert torch.equal(floats, expected)
    assert output[16:32].eq(-2 * 24).all()
    assert output[32].item() == 383


def test_indices(module: ModuleType, schedule: dict[str, Any]) -> None:
    module.set_options(**schedule)
    grid, block = (3, 2, 2), (8, 4, 2)
    output = run(module, "indices", integers(12, 64, 6), grid=grid, block=block)
    for i, extent in enumerate([*grid, *block]):
        assert output[..., i].unique().tolist() == list(range(extent))
    assert output.reshape(-1, 6).unique(dim=0).shape[0] == 12 * 64
    assert output[1, 9].tolist() == [1, 0, 0, 1, 1, 0]


# --- planted faults ---------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A kernel, the option that breaks it, what must be said of it, and what it runs on."""

    kernel: str
    option: int
    message: str
    threads: int = 64
    blocks: int = 1
    kinds: tuple[str, str, str] = ("input", "input", "output")


RACE = "RACE: "
IN_FLIGHT = "destination of an asynchronous copy before its wait"
FAULTS = [
    Fault("read_without_barrier", 1, "UNINITIALIZED read of shared memory|RACE: read after write"),
    Fault("overwrite_without_barrier", 1, "RACE: (write after read|read after write) by thread"),
    Fault("read_without_sync_warp", 1, RACE, threads=32),
    Fault("overwrite_without_sync_warp", 1, "RACE: (write after read|read after write) by thread", threads=32),
    Fault("copy_without_wait", 1, IN_FLIGHT),
    Fault("copy_without_wait", 2, IN_FLIGHT),
    Fault("copy_without_wait", 3, "exits with asynchronous copies it did not wait for"),
    Fault("copy_without_wait", 4, RACE + "|" + IN_FLIGHT),
    Fault("copy_with_short_wait", 1, IN_FLIGHT, threads=32),
    Fault("divergent_barrier", 1, "DIVERGENT warp"),
    Fault("divergent_product", 1, "DIVERGENT warp", threads=32),
    Fault("deadlock", 1, "DIVERGENT warp: lane . is in (__syncthreads|a shuffle) while others wait in .* another mask"),
    Fault("deadlock", 2, "DEADLOCK: .* wait in __sync"),
    Fault("shared_out_of_bounds", 1, "OUT OF BOUNDS shared access at byte 4096 of 4096", threads=1024),
    Fault("global_out_of_bounds", 1, "OUT OF BOUNDS global access, a read of .* of 1024 declared bytes"),
    Fault("global_out_of_bounds", 2, "OUT OF BOUNDS global access, a read of 16 bytes: at byte 1024 of 1024"),
    Fault("global_out_of_bounds", 3, "OUT OF BOUNDS global access, a write of 4 bytes: at byte 256 of 256"),
    Fault("uninitialized_shared", 1, "UNINITIALIZED read of shared memory at byte 36 "),
    Fault("uninitialized_workspace", 1, "UNINITIALIZED read of global", kinds=("input", "workspace", "output")),
    Fault("uninitialized_workspace", 2, "UNINITIALIZED read of global", kinds=("input", "workspace", "output")),
    Fault("write_to_input", 1, "WRITE TO AN INPUT"),
    Fault("race_between_blocks", 1, "RACE: write after write by another block", blocks=2),
    Fault("race_between_blocks", 2, "by another block|UNINITIALIZED read of global", blocks=2),
    Fault("race_between_blocks", 3, RACE, threads=1, blocks=2, kinds=("input", "in_out", "output")),
    Fault("lost_addition", 1, RACE),
    Fault("lost_addition", 2, RACE),
    Fault("lost_addition", 3, RACE),
    Fault("partial_barriers", 1, "RACE: |UNINITIALIZED", threads=32),
    Fault("atomics_between_barriers", 1, RACE),
    Fault("misaligned", 1, "MISALIGNED"),
]


def run_fault(module: ModuleType, fault: Fault, option: int) -> Tensor:
    count = fault.threads
    # The input's size is exact, to the row. Kernels that copy 16 bytes a thread also write as many.
    width = 4 if fault.kernel.startswith("copy") else 1
    adds = fault.kernel in ("lost_addition", "atomics_between_barriers")
    shared_bytes = {"shared_out_of_bounds": 4 * count}.get(fault.kernel, 8192)
    return run(
        module,
        fault.kernel,
        torch.empty(2 if adds else fault.blocks * count * width),
        torch.ones(count, 4),
        option=option,
        grid=(fault.blocks, 1, 1),
        block=(count, 1, 1),
        shared_bytes=shared_bytes,
        kinds=fault.kinds,
        zero_output=adds,
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}-{fault.option}")
def test_planted_fault_is_reported(checked: ModuleType, schedule: dict[str, Any], fault: Fault) -> None:
    """With the thread and the line; the same kernel without the fault passes, before and after."""
    checked.set_options(**schedule)
    run_fault(checked, fault, option=0)
    with pytest.raises(RuntimeError, match=fault.message) as report:
        run_fault(checked, fault, option=fault.option)
    assert re.search(r"\[block \(\d+, 0, 0\) thread \(\d+, 0, 0\)\]", str(report.value))
    if "MISALIGNED" not in fault.message:
        assert "faults.cu:" in str(report.value)
    run_fault(checked, fault, option=0)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}-{fault.option}")
@pytest.mark.parametrize("seed", range(5))
def test_faults_are_reported_whatever_the_schedule(checked: ModuleType, fault: Fault, seed: int) -> None:
    checked.set_options(order="random", cp_async="mixed", seed=seed)
    with pytest.raises(RuntimeError, match=fault.message):
        run_fault(checked, fault, option=fault.option)


def test_checks_can_be_switched_off(checked: ModuleType) -> None:
    race = Fault("lost_addition", 1, "")
    checked.set_options(check_races=False)
    run_fault(checked, race, option=1)
    unset = Fault("uninitialized_shared", 1, "")
    checked.set_options(check_uninitialized=False)
    assert run_fault(checked, unset, option=1).isnan().sum() == 1
    checked.set_options(poison=False)
    run_fault(checked, unset, option=1)


def test_legal_orders_give_their_results(module: ModuleType, schedule: dict[str, Any]) -> None:
    """Barriers of part of a warp order in a chain; atomics and plain accesses alternate between block barriers."""
    module.set_options(**schedule)
    output = run(module, "partial_barriers", torch.empty(32))
    assert (output[1].item(), output[31].item(), output.sum().item()) == (1.0, 2.0, 3.0)
    total = run(module, "atomics_between_barriers", torch.empty(2), block=TWO_WARPS, zero_output=True, repeats=2)
    assert total[0].item() == ((64 * 2 + 64) + 64) * 2 + 64


def test_crash_becomes_an_error(module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"CRASH at address 0x40|OUT OF BOUNDS global access"):
        run(module, "crash", torch.empty(32), option=0x40)
    assert run(module, "crash", torch.empty(32)).eq(0).all()


def test_plain_build_runs_into_what_the_landing_mode_exposes(plain: ModuleType) -> None:
    """A missing wait shows where copies land at the wait, a missing barrier before a copy where they land at once."""
    ones = torch.ones(64, 4)

    def outcome(option: int, landing: str) -> bool:
        plain.set_options(cp_async=landing)
        output = run(plain, "copy_without_wait", torch.empty(64, 4), ones, option=option, block=TWO_WARPS)
        return torch.equal(output, ones)

    assert outcome(0, "at_wait")
    assert outcome(0, "at_issue")
    assert not outcome(1, "at_wait")
    assert outcome(1, "at_issue")


# --- declared memory --------------------------------------------------------------------------------------------------


def test_outputs_are_poisoned_and_inputs_are_not(module: ModuleType) -> None:
    a, b, output = torch.ones(64, 4), torch.ones(64), torch.zeros(128)
    run(module, "global_out_of_bounds", output, a, b, block=TWO_WARPS, kinds=("input", "workspace", "output"))
    assert a.eq(1).all()
    assert torch.isnan(b).all()
    assert output[:64].eq(1).all()
    assert torch.isnan(output[64:]).all()


def test_in_out_keeps_its_contents(module: ModuleType) -> None:
    number = torch.full((2,), 3.0)
    run(module, "lost_addition", number, block=TWO_WARPS, kinds=("input", "input", "in_out"))
    assert number.tolist() == [67.0, 3.0]


def test_views_of_one_tensor_may_overlap(checked: ModuleType) -> None:
    """Input and output interleaved in one buffer: the input's bytes are neither poisoned nor called uninitialised."""
    buffer = torch.ones(64, 4)
    run(checked, "global_out_of_bounds", buffer.view(-1)[200:232], buffer)
    assert buffer.eq(1).all()


def test_written_bytes_are_remembered_across_launches(checked: ModuleType) -> None:
    """The second launch of one call reads what the first one wrote; a new call starts with nothing written."""
    output = torch.empty(64)
    options = {"block": TWO_WARPS, "kinds": ("input", "workspace", "output")}
    run(checked, "uninitialized_workspace", output, repeats=3, **options)
    with pytest.raises(RuntimeError, match="UNINITIALIZED"):
        run(checked, "uninitialized_workspace", output, option=1, **options)


def test_memory_is_bounded_by_this_call_alone(checked: ModuleType) -> None:
    rows = torch.ones(65, 4)
    run(checked, "global_out_of_bounds", torch.empty(64), rows, option=1, block=TWO_WARPS)
    with pytest.raises(RuntimeError, match="OUT OF BOUNDS"):
        run(checked, "global_out_of_bounds", torch.empty(64), rows[:64], option=1, block=TWO_WARPS)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_shared_memory_limit(module: ModuleType) -> None:
    module.set_options(shared_limit=99 * 1024)
    assert module.device_attribute(97) == 99 * 1024
    run(module, "many_barriers", integers(128), block=(128, 1, 1), shared_bytes=99 * 1024)
    with pytest.raises(RuntimeError, match="opting in to more than 48 KB"):
        run(module, "many_barriers", integers(128), block=(128, 1, 1), shared_bytes=99 * 1024 + 16)
    module.set_options(shared_limit=227 * 1024)
    run(module, "many_barriers", integers(128), block=(128, 1, 1), shared_bytes=227 * 1024)
    # A kernel that was allowed as much before is launched without asking the device.
    module.reset_stats()
    run(module, "many_barriers", integers(128), block=(128, 1, 1), shared_bytes=100 * 1024)
    assert module.stats()["attributes_read"] == 0


@pytest.mark.parametrize(
    ("driver_version", "words"),
    [
        (12040, r"insufficient.*CUDA runtime 13\.0, the driver supports CUDA up to 12\.4"),
        (0, "no CUDA driver was found"),
    ],
)
def test_driver_that_is_too_old(driver_version: int, words: str) -> None:
    """The message names both versions and says what to do."""
    key = torch.ones(1, 1, 8, 4)
    with emulated_cuda(driver_version=driver_version), pytest.raises(RuntimeError, match=words):
        torch.ops.topgather.block_centroids(key, 4)
    with emulated_cuda():
        assert torch.equal(torch.ops.topgather.block_centroids(key, 4), torch.ones(1, 1, 2, 4))


def test_device_attributes(module: ModuleType) -> None:
    module.set_options(compute_capability=90, num_multiprocessors=11)
    assert [module.device_attribute(attribute) for attribute in (16, 75, 76)] == [11, 9, 0]


@pytest.mark.parametrize(
    ("grid", "block"), [((0, 1, 1), WARP), ((1, 65536, 1), WARP), ((1, 1, 1), (1025, 1, 1)), ((1, 1, 1), (0, 1, 1))]
)
def test_invalid_launches(module: ModuleType, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="invalid launch"):
        run(module, "many_barriers", integers(128), grid=grid, block=block)


def test_unknown_options_are_refused(module: ModuleType) -> None:
    with pytest.raises(TypeError, match="no option speed"):
        module.set_options(speed=3)
    with pytest.raises(ValueError, match="order is ascending, descending or random, not sorted"):
        module.set_options(order="sorted")


def test_recording(module: ModuleType) -> None:
    number = torch.full((2,), 3.0)
    module.start_recording()
    run(module, "lost_addition", number, block=TWO_WARPS, repeats=2, kinds=("input", "input", "in_out"))
    launches = module.take_recording()
    assert len(launches) == 2
    first, second = launches
    assert "lost_addition" in first["name"]
    assert first["name"].startswith("_Z")
    assert (first["grid"], first["block"], first["shared_bytes"]) == ((1, 1, 1), TWO_WARPS, 4096)
    assert int.from_bytes(first["arguments"][16:24], "little") == number.data_ptr()
    before, after = dict(first["before"]), dict(first["after"])
    assert torch.frombuffer(bytearray(before[number.data_ptr()]), dtype=torch.float32).tolist() == [3.0, 3.0]
    assert torch.frombuffer(bytearray(after[number.data_ptr()]), dtype=torch.float32).tolist() == [67.0, 3.0]
    assert dict(second["before"])[number.data_ptr()] == after[number.data_ptr()]
    run(module, "lost_addition", number, block=TWO_WARPS, kinds=("input", "input", "in_out"))
    assert module.take_recording() == []  # taking it also ends it


def test_callers_on_several_threads(module: ModuleType) -> None:
    """Launches take turns, whatever threads they come from; a failing one leaves the others alone."""

    def call(i: int) -> bool:
        if i % 5 == 4 and module.is_checked:
            with pytest.raises(RuntimeError, match="WRITE TO AN INPUT"):
                run(module, "write_to_input", torch.empty(32), option=1)
            return True
        output = run(module, "barriers", integers(2, 256), grid=(2, 1, 1), block=(256, 1, 1), option=3)
        return torch.equal(output[0], (3 * ((torch.arange(256) + 1) % 256) + 3).to(torch.int32))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(40)))


def test_results_do_not_depend_on_the_schedule(module: ModuleType) -> None:
    """Atomics on integers and kernels without faults give the same bits in any order."""
    results = []
    for seed in range(4):
        module.set_options(order="random", seed=seed)
        results.append(run(module, "barriers", integers(2, 256), grid=(2, 1, 1), block=(256, 1, 1), option=2))
    assert all(torch.equal(result, results[0]) for result in results)

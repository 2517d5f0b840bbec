"""The same bits from run to run, for any number of threads, from several Python threads, and after a fork.

Numbers of threads and forks concern the CPU alone; ``test_cuda_contract.py`` has what CUDA promises.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_gradients, make_inputs, run_attention
from tests.common.runs import assert_all_equal, assert_concurrent_calls_agree, run_in_fork

CPU = torch.device("cpu")
NUM_THREADS = [1, 2, 3, 5]
CASES = [
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=700, head_dim=64, block_size=32, top_k=4),
    AttentionCase(num_heads=1, query_len=1500, head_dim=40, block_size=64, top_k=5),
    AttentionCase(num_heads=2, query_len=3, key_len=900, head_dim=33, block_size=17, top_k=9),
]


def everything(case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every result of every dense op on one problem."""
    inputs = make_inputs(case, dtype, device, seed)
    result = run_attention(*inputs, *make_gradients(case, dtype, device, seed), case)
    query, key, _ = (tensor.detach() for tensor in inputs)
    return result.tensors() | {
        "block_indices": tg.moba_route(query, key, case.block_size, case.top_k).block_indices,
        "centroids": tg.block_centroids(key, case.block_size),
    }


def everything_varlen(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    query, key, value = (torch.ones(0),) * 3
    query = make_inputs(AttentionCase(query_len=900, num_heads=4), dtype, device)[0][0].transpose(0, 1).contiguous()
    key, value = (t[0].transpose(0, 1) for t in make_inputs(AttentionCase(query_len=900), dtype, device)[1:])
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    cu_seqlens = torch.tensor([0, 7, 7, 500, 501, 900], dtype=torch.int32, device=device)
    out, lse = tg.moba_attention_varlen(
        *inputs, cu_seqlens, cu_seqlens, 493, 493, block_size=32, top_k=3, return_lse=True
    )
    gradients = torch.autograd.grad((out * lse.T[..., None].to(out.dtype)).sum(), inputs)
    return dict(zip(("out", "lse", "d_query", "d_key", "d_value"), (out, lse, *gradients), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case: AttentionCase, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = everything(case, dtype, CPU)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        for run_idx in range(3):
            assert_all_equal(everything(case, dtype, CPU), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = everything_varlen(dtype, CPU)
    for num_threads in NUM_THREADS:
        torch.set_num_threads(num_threads)
        for run_idx in range(2):
            assert_all_equal(everything_varlen(dtype, CPU), expected, f"{num_threads} threads, run {run_idx}")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_concurrent_calls_give_the_same_bits(num_threads: int, device: torch.device) -> None:
    """Six Python threads at once, each on another problem, each several times."""
    torch.set_num_threads(num_threads)
    case = AttentionCase(num_heads=4, num_kv_heads=2, query_len=400, head_dim=32, block_size=32, top_k=3)
    assert_concurrent_calls_agree(lambda seed: everything(case, torch.float32, device, seed), num_threads, num_runs=5)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_a_forked_child_can_call(num_threads: int) -> None:
    """The parent used its threads; the child, which inherits none of them, gets the same bits and does not
    hang.

    The child itself calls no parallel op of torch, whose own threads do not survive a fork.
    """
    torch.set_num_threads(num_threads)
    case = AttentionCase(num_heads=4, query_len=500, head_dim=32, block_size=32, top_k=3)
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.float32, CPU))
    expected = tg.moba_attention(query, key, value, block_size=32, top_k=3).numpy()

    def work() -> bool:
        out = tg.moba_attention(query, key, value, block_size=32, top_k=3)
        return bool((out.numpy() == expected).all())

    assert work()
    assert run_in_fork(work) == 0
    assert work()


def test_fork_helper_reports_failures() -> None:
    assert run_in_fork(lambda: False) == 1
    assert run_in_fork(lambda: time.sleep(60) is None, timeout_s=0.2) == -signal.SIGKILL

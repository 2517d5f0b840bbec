"""The waves that the CUDA kernels cut large problems into, and the workspace that this bounds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    AttentionCase,
    AttentionResult,
    Packed,
    assert_attention_close,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.block_attention.test_cuda_contract import (
    FAULT_CASE,
    everything,
    everything_packed,
    faulty_routing,
)
from tests.common.native import described, workspace_bytes
from tests.common.schedules import CUDA_DTYPES
from tests.common.tensors import assert_bitwise_equal
from topgather import reference

WAVE_CASE = AttentionCase(batch=3, num_heads=4, num_kv_heads=2, query_len=40, head_dim=24, block_size=8, top_k=4)
TINY_CASE = AttentionCase(num_heads=2, num_kv_heads=1, query_len=9, head_dim=8, block_size=2, top_k=2)
WAVES = pytest.mark.parametrize(
    ("case", "budget"),
    [(WAVE_CASE, 200_000), (WAVE_CASE, 6_000), (TINY_CASE, 1)],
    ids=["units", "queries", "one_query"],
)


def count_waves(native: Any, run: Callable[[], Any]) -> int:
    """How many times block lists were built."""
    native.start_recording()
    run()
    return sum("moba_fill_lists" in launch["name"] for launch in native.take_recording())


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@WAVES
def test_waves_do_not_change_results(
    case: AttentionCase, budget: int, dtype: torch.dtype, native: Any, cuda_device: torch.device
) -> None:
    """Forward and routing bit for bit; gradients of keys add up wave by wave, so up to rounding."""
    inputs, gradients = make_inputs(case, dtype, cuda_device), make_gradients(case, dtype, cuda_device, 0)
    expected = everything(case, dtype, cuda_device)
    native.moba_cuda_set_budget(budget)
    for deterministic in (True, False):
        results = everything(case, dtype, cuda_device, deterministic)
        for name in ("out", "lse", "block_indices", "centroids", *(["d_query"] if deterministic else [])):
            assert_bitwise_equal(name, results[name], expected[name])
        result = AttentionResult(*(results[name] for name in ("out", "lse", "d_query", "d_key", "d_value")))
        assert_attention_close(result, inputs, gradients, results["block_indices"], case)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("budget", [30_000, 6_000])
def test_waves_of_packed_sequences(budget: int, dtype: torch.dtype, native: Any, cuda_device: torch.device) -> None:
    """A wave's boundary falls inside sequences."""
    packed = Packed(([0, 45, 3, 60], [7, 45, 9, 60]), dtype, cuda_device)
    expected = everything_packed(dtype, cuda_device)
    native.moba_cuda_set_budget(budget)
    for deterministic in (True, False):
        results = everything_packed(dtype, cuda_device, deterministic)
        for name in ("out", "lse", "block_indices", *(["d_query"] if deterministic else [])):
            assert_bitwise_equal(name, results[name], expected[name])
        result = AttentionResult(*(results[name] for name in ("out", "lse", "d_query", "d_key", "d_value")))
        packed.check(result, results["block_indices"], 8, 3, True)


def test_faults_in_several_waves(native: Any, cuda_device: torch.device) -> None:
    routing, _, is_faulty = faulty_routing(cuda_device, (3, 3), 4, True)
    inputs, gradients = (
        make_inputs(FAULT_CASE, torch.float32, cuda_device),
        make_gradients(FAULT_CASE, torch.float32, cuda_device, 0),
    )
    expected = run_attention(*inputs, *gradients, FAULT_CASE, tg.BlockRouting(routing, 4), True)
    native.moba_cuda_set_budget(3_000)
    result = run_attention(*inputs, *gradients, FAULT_CASE, tg.BlockRouting(routing, 4), True)
    for name in ("out", "lse", "d_query"):
        assert torch.equal(
            result.tensors()[name].isnan().flatten(3).any(-1) if name != "lse" else result.lse.isnan(), is_faulty
        )
        assert_bitwise_equal(name, result.tensors()[name], expected.tensors()[name])
    torch.testing.assert_close(result.d_key, expected.d_key)


@pytest.mark.emulator
@WAVES
def test_budgets_split_units_and_queries(
    case: AttentionCase, budget: int, native: Any, cuda_device: torch.device
) -> None:
    """The budgets above do cut as they say: one wave without them, then some units, then some queries of one."""
    query, key, value = make_inputs(case, torch.float32, cuda_device)
    num_units = case.batch * case.kv_heads

    def waves_forward_and_backward() -> tuple[int, int]:
        outs: list[Tensor] = []
        routing = tg.moba_route(query, key, case.block_size, case.top_k)

        def forward() -> None:
            outs.append(tg.moba_attention(query, key, value, case.block_size, routing=routing, deterministic=True))

        forward_waves = count_waves(native, forward)
        return forward_waves, count_waves(native, lambda: torch.autograd.grad(outs[0].sum(), (query, key)))

    assert waves_forward_and_backward() == (1, 1)
    native.moba_cuda_set_budget(budget)
    waves = waves_forward_and_backward()
    if budget == 200_000:
        assert all(1 < count <= num_units / 2 for count in waves), waves
    elif budget == 6_000:
        assert all(2 * num_units <= count for count in waves), waves
    else:
        assert waves == (num_units * case.query_len, num_units * case.query_len)


# Entry points with a workspace, and whether gradients are deterministic.
WITH_WORKSPACE = pytest.mark.parametrize(
    ("entry", "is_deterministic"),
    [
        ("moba_route", False),
        ("moba_attention", False),
        ("moba_attention_backward", False),
        ("moba_attention_backward", True),
    ],
)


def asked_for(
    native: Any,
    entry: str,
    is_deterministic: bool,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    length: int,
    top_k: int,
) -> int:
    """Workspace of an entry point. Its tensors are described alone: no memory is behind them."""
    batch, num_heads, num_kv_heads = heads
    queries, keys = (described(batch, count, length, 128, dtype=dtype) for count in (num_heads, num_kv_heads))
    sums = described(batch, num_heads, length, dtype=torch.float32)
    options = {"block_size": 128, "is_causal": True, "scale": 0.1, "deterministic": is_deterministic}
    options |= {"force_first": 0, "force_last": 1}
    return workspace_bytes(
        native,
        entry,
        **options,
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "softcap", "sinks", "window")),
        block_indices=described(batch, num_heads, length, top_k, dtype=torch.int32),
        **dict.fromkeys(("query", "out", "grad_out", "grad_query"), queries),
        **dict.fromkeys(("key", "value", "grad_key", "grad_value"), keys),
        **dict.fromkeys(("lse", "grad_lse"), sums),
        softmax_terms=described(batch, num_heads, length, 2, dtype=torch.float32),
    )


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@WITH_WORKSPACE
def test_workspace_is_bounded(
    entry: str, is_deterministic: bool, dtype: torch.dtype, native: Any, cuda_device: torch.device
) -> None:
    """However long the problem: the budget, and in the backward one key head's float32 gradients and 128 MiB."""
    lengths = (2**14, 2**17, 2**20)

    def size_of(length: int) -> int:
        return asked_for(native, entry, is_deterministic, dtype, (4, 32, 8), length, 16)

    sizes = [size_of(length) for length in lengths]
    for length, size in zip(lengths, sizes, strict=True):
        of_one_unit = length * (128 + 128) * 4
        assert 0 < size <= (2**30 if entry.endswith("backward") else 2**29) + of_one_unit + 2**28, (length, size)
    native.moba_cuda_set_budget(2**24)
    for length, size in zip(lengths, sizes, strict=True):
        small = size_of(length)
        assert small <= 2**24 + length * (128 + 128) * 4 + 2**22, (length, small)
        assert small <= size


@pytest.mark.parametrize("budget", [0, 100_000, 1])
@WITH_WORKSPACE
def test_workspace_is_the_same_each_time_it_is_asked_for(
    entry: str, is_deterministic: bool, budget: int, native: Any, cuda_device: torch.device
) -> None:
    native.moba_cuda_set_budget(budget)
    first, second = (asked_for(native, entry, is_deterministic, torch.bfloat16, (2, 4, 2), 300, 3) for _ in range(2))
    assert first == second > 0


@WITH_WORKSPACE
def test_a_workspace_one_byte_smaller_is_refused(
    entry: str, is_deterministic: bool, native: Any, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = AttentionCase(query_len=100, top_k=3)
    inputs = make_inputs(case, torch.bfloat16, cuda_device)
    gradients = make_gradients(case, torch.bfloat16, cuda_device, 0)
    whole = getattr(native, f"{entry}_workspace_bytes")
    sizes: list[int] = []

    def smaller(*arguments: Any) -> int:
        sizes.append(whole(*arguments) - 1)
        return sizes[-1]

    monkeypatch.setattr(native, f"{entry}_workspace_bytes", smaller)
    with pytest.raises(ValueError, match="workspace is smaller"):
        run_attention(*inputs, *gradients, case, deterministic=is_deterministic)
    assert len(sizes) == 1


@pytest.mark.parametrize("num_blocks", [4200, 16500])
def test_lists_of_many_blocks(num_blocks: int, cuda_device: torch.device) -> None:
    """So many that the cursors of fewer warps fit shared memory, or not even those of one."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 600, 4, generator=generator)
    key, value = (torch.randn(1, 1, num_blocks, 4, generator=generator) for _ in range(2))
    # Three chunks of rows, that all add to few lists.
    block_indices = torch.randint(20, (1, 1, 600, 2), generator=generator, dtype=torch.int32)
    block_indices[..., 1] += num_blocks - 20
    inputs = (tensor.to(cuda_device) for tensor in (query, key, value))
    routing = tg.BlockRouting(block_indices.to(cuda_device), 1)
    out = tg.moba_attention(*inputs, 1, routing=routing, is_causal=False)
    expected = reference.moba_attention(query, key, value, block_indices, 1, is_causal=False)[0]
    assert torch.allclose(out.cpu().double(), expected.double(), atol=1e-5), "out: not the reference's"

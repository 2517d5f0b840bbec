"""What only a GPU has: queues that must not be waited for, graphs, streams, a second device, real memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, Packed, check_attention, make_gradients, make_inputs
from tests.common.tensors import assert_bitwise_equal

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WAYS = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
CASE = AttentionCase(batch=2, num_heads=8, num_kv_heads=2, query_len=700, head_dim=64, block_size=64, top_k=4)
CUDA = torch.device("cuda")
Attend = Callable[[], dict[str, Tensor]]


def dense_problem(dtype: torch.dtype, device: torch.device, deterministic: bool) -> tuple[list[Tensor], Attend]:
    """The tensors a problem reads, to be changed in place, and every op on them, forward and backward."""
    query, key, value = make_inputs(CASE, dtype, device)
    grad_out, grad_lse = make_gradients(CASE, dtype, device, 0)

    def attend() -> dict[str, Tensor]:
        centroids = tg.block_centroids(key, CASE.block_size)
        routing = tg.moba_route(query, key, CASE.block_size, CASE.top_k)
        out, lse = tg.moba_attention(
            query, key, value, CASE.block_size, CASE.top_k, return_lse=True, deterministic=deterministic
        )
        gradients = torch.autograd.grad((out, lse), (query, key, value), (grad_out, grad_lse))
        names = ("centroids", "block_indices", "out", "lse", "d_query", "d_key", "d_value")
        tensors = (centroids, routing.block_indices, out, lse, *gradients)
        return {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}

    return [query, key, value, grad_out, grad_lse], attend


def packed_problem(dtype: torch.dtype, device: torch.device, deterministic: bool) -> tuple[list[Tensor], Attend]:
    lengths = [0, 300, 17, 400, 1]
    packed = Packed((lengths, lengths), dtype, device, num_heads=8, head_dim=64, value_dim=64)

    def attend() -> dict[str, Tensor]:
        routing = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 64, 3)
        result = packed.run(64, 3, True, deterministic=deterministic)
        return result.tensors() | {"block_indices": routing.block_indices}

    tensors = [packed.query, packed.key, packed.value, packed.grad_out, packed.grad_lse, *packed.cu_seqlens[:2]]
    return tensors, attend


PROBLEMS = pytest.mark.parametrize("problem", [dense_problem, packed_problem], ids=["dense", "packed"])


@contextmanager
def waits_forbidden() -> Iterator[None]:
    """Every wait of torch's for the device raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], deterministic: bool) -> None:
    """Bit for bit; gradients summed by atomic additions up to rounding."""
    for name, tensor in actual.items():
        if deterministic or not name.startswith("d_"):
            assert_bitwise_equal(name, tensor, expected[name])
        else:
            scale = float(expected[name].abs().max())
            precision = torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor, expected[name], rtol=4 * precision, atol=4 * precision * scale)


@WAYS
@DTYPES
@PROBLEMS
def test_nothing_is_waited_for(
    problem: Callable[..., tuple[list[Tensor], Attend]], dtype: torch.dtype, deterministic: bool
) -> None:
    _, attend = problem(dtype, CUDA, deterministic)
    expected = attend()
    with waits_forbidden():
        actual = attend()
    assert_same(actual, expected, deterministic)


def test_the_check_for_waits_finds_them() -> None:
    flag = torch.ones(1, device=CUDA)
    with waits_forbidden(), pytest.raises(RuntimeError, match="synchroniz"):
        flag.item()


def test_a_call_returns_before_the_device_is_done() -> None:
    """Queued behind a long sleep of the device, forward and backward return while it still sleeps."""
    _, attend = dense_problem(torch.bfloat16, CUDA, False)
    expected = attend()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    actual = attend()
    done.record()
    assert not done.query(), "the call waited for the device"
    torch.cuda.synchronize()
    assert_same(actual, expected, False)


@WAYS
@DTYPES
@PROBLEMS
def test_graph_replay_with_changed_inputs(
    problem: Callable[..., tuple[list[Tensor], Attend]], dtype: torch.dtype, deterministic: bool
) -> None:
    """A captured forward and backward recomputes everything: choices, lists, results, and sequences' boundaries."""
    tensors, attend = problem(dtype, CUDA, deterministic)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for seed in (1, 2):
        generator = torch.Generator(device=CUDA).manual_seed(seed)
        with torch.no_grad():
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, device=CUDA, generator=generator))
                else:
                    tensor[1:-1] = torch.tensor([100 * seed, 100 * seed, 350, 400], device=CUDA)
        graph.replay()
        torch.cuda.synchronize()
        actual = {name: tensor.clone() for name, tensor in captured.items()}
        assert_same(actual, attend(), deterministic)


@DTYPES
@PROBLEMS
def test_another_stream(problem: Callable[..., tuple[list[Tensor], Attend]], dtype: torch.dtype) -> None:
    """Work goes to the caller's stream: behind what that stream still has to write, and not behind other streams."""
    tensors, attend = problem(dtype, CUDA, True)
    expected = attend()
    originals = [tensor.detach().clone() for tensor in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for tensor in tensors[:5]:
            tensor.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for tensor, original in zip(tensors[:5], originals, strict=False):
                tensor.copy_(original)
        actual = attend()
    stream.synchronize()
    assert_same(actual, expected, True)


def test_two_streams_at_once() -> None:
    """Each has its own workspace: neither disturbs the other."""
    problems = [dense_problem(dtype, CUDA, True) for dtype in (torch.float32, torch.bfloat16)]
    expected = [attend() for _, attend in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(10):
        for stream, (_, attend), kept in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(attend())
    torch.cuda.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        for result in kept:
            assert_same(result, wanted, True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@DTYPES
def test_a_second_device(dtype: torch.dtype) -> None:
    """Tensors on a device that is not the current one; the current one stays current."""
    _, attend = dense_problem(dtype, CUDA, True)
    expected = attend()
    _, attend = dense_problem(dtype, torch.device("cuda:1"), True)
    assert torch.cuda.current_device() == 0
    actual = attend()
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in actual.values())
    check_attention(CASE, dtype, torch.device("cuda:1"))
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same({name: tensor.to(CUDA) for name, tensor in actual.items()}, expected, True)


def test_tensors_of_two_devices_are_refused() -> None:
    query, key, value = (tensor.detach() for tensor in make_inputs(CASE, torch.float32, CUDA))
    for arguments in ((query.cpu(), key, value), (query, key.cpu(), value), (query, key, value.cpu())):
        with pytest.raises(ValueError, match="device"):
            tg.moba_attention(*arguments, block_size=64, top_k=4)


@DTYPES
def test_memory_stays_within_the_workspace(dtype: torch.dtype) -> None:
    """A long problem takes its inputs, results and a bounded workspace: nothing as large as queries times keys."""
    case = AttentionCase(num_heads=8, num_kv_heads=2, query_len=65_536, head_dim=64, block_size=128, top_k=8)
    inputs = make_inputs(case, dtype, CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = tg.moba_attention(*inputs, block_size=128, top_k=8)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    taken = torch.cuda.max_memory_allocated() - before
    # Three results the size of query, the routing, and a gibibyte and a half of waves.
    assert taken < 4 * out.numel() * 4 + 8 * 65_536 * 8 * 4 + (3 << 29), f"{taken / 2**20:.0f} MiB"

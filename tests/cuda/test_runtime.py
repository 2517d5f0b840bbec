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


def random_leaves(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def gradients_of(results: Tensor | tuple[Tensor, ...], leaves: list[Tensor], grads: Tensor) -> dict[str, Tensor]:
    """Results and gradients by name; the op's first result is the one with a gradient."""
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results[0], leaves, grads)
    named = {f"result {i}": tensor for i, tensor in enumerate(results)} | {f"d_{i}": d for i, d in enumerate(gradients)}
    return {name: tensor.detach() for name, tensor in named.items()}


def memory_problem(dtype: torch.dtype, device: torch.device, deterministic: bool) -> tuple[list[Tensor], Attend]:
    """Top-k within the kernel's sizes and beyond them, and lookup with gradients of values and weights, padded too."""
    query, keys, wide_query, wide_keys, values, weights, grad_scores, grad_out = random_leaves(
        dtype, device, (300, 2, 64), (2, 2, 40, 32), (20, 2, 600), (2, 2, 40, 300), (1600, 48), (300, 24), (300, 2, 12),
        (300, 48),
    )  # fmt: skip
    indices = torch.randint(0, 1600, (300, 24), generator=torch.Generator().manual_seed(1)).to(device)

    def attend() -> dict[str, Tensor]:
        found = tg.product_key_topk(query, keys, 12)
        wide = tg.product_key_topk(wide_query, wide_keys, 5)
        out = tg.memory_lookup(values, indices, weights.float())
        results = {
            f"top {name}": d for name, d in gradients_of(tuple(found), [query, keys], grad_scores.float()).items()
        }
        results |= {f"wide {i}": tensor.detach() for i, tensor in enumerate(wide)}
        of_lookup = gradients_of(out, [values, weights], grad_out)
        (padded,) = torch.autograd.grad(tg.memory_lookup(values, indices, weights.float(), "padded"), values, grad_out)
        results |= {"padded rows": padded._indices(), "padded values": padded._values()}
        return results | {f"lookup {name}": tensor for name, tensor in of_lookup.items()}

    return [query, keys, wide_query, wide_keys, values, weights, grad_scores, grad_out, indices], attend


def grid_problem(dtype: torch.dtype, device: torch.device, deterministic: bool) -> tuple[list[Tensor], Attend]:
    """Groups of one tile and of several, with a bias and without."""
    shape = (2, 3, 36, 40, 32)
    query, key, value, grad_out = random_leaves(dtype, device, *[shape] * 4)
    (bias,) = random_leaves(torch.float32, device, (3, 60, 60))

    def attend() -> dict[str, Tensor]:
        small = gradients_of(
            tg.window_attention(query, key, value, (6, 10), bias=bias), [query, key, value, bias], grad_out
        )
        large = gradients_of(tg.grid_attention(query, key, value, (18, 10)), [query, key, value], grad_out)
        return {f"small {k}": v for k, v in small.items()} | {f"large {k}": v for k, v in large.items()}

    return [query, key, value, grad_out, bias], attend


def key_conv_problem(dtype: torch.dtype, device: torch.device, deterministic: bool) -> tuple[list[Tensor], Attend]:
    """Dense, where rows are whole vectors, and packed."""
    key, grad_out = random_leaves(dtype, device, (2, 3, 718, 64), (2, 3, 718, 64))
    (weight,) = random_leaves(torch.float32, device, (3, 64, 3))
    packed, packed_grad = random_leaves(dtype, device, (718, 3, 64), (718, 3, 64))
    cu_seqlens = torch.tensor([0, 0, 300, 317, 717, 718], dtype=torch.int32, device=device)

    def attend() -> dict[str, Tensor]:
        dense = gradients_of(tg.key_conv(key, weight), [key, weight], grad_out)
        of_pack = gradients_of(tg.key_conv(packed, weight, cu_seqlens=cu_seqlens), [packed, weight], packed_grad)
        return {f"dense {k}": v for k, v in dense.items()} | {f"packed {k}": v for k, v in of_pack.items()}

    return [key, grad_out, weight, packed, packed_grad, cu_seqlens], attend


ALL_PROBLEMS = {
    "dense": dense_problem,
    "packed": packed_problem,
    "memory": memory_problem,
    "grid": grid_problem,
    "key_conv": key_conv_problem,
}
PROBLEMS = pytest.mark.parametrize("problem", list(ALL_PROBLEMS.values()), ids=list(ALL_PROBLEMS))


def change(tensor: Tensor, seed: int) -> None:
    """Other numbers, in place: of a floating-point tensor, of indices, or of packed sequences' boundaries."""
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, device=tensor.device, generator=generator))
        elif tensor.ndim == 2:
            tensor.copy_(torch.randint(0, 1600, tensor.shape, device=tensor.device, generator=generator))
        else:
            tensor[1:-1] = torch.tensor([100 * seed, 100 * seed, 350, 400], device=tensor.device)


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
        for tensor in tensors:
            change(tensor, seed)
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
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    originals = [tensor.detach().clone() for tensor in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.copy_(original)
        actual = attend()
    stream.synchronize()
    assert_same(actual, expected, True)


@PROBLEMS
def test_two_streams_at_once(problem: Callable[..., tuple[list[Tensor], Attend]]) -> None:
    """Each has its own workspace: neither disturbs the other."""
    problems = [problem(dtype, CUDA, True) for dtype in (torch.float32, torch.bfloat16)]
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
@PROBLEMS
def test_a_second_device(problem: Callable[..., tuple[list[Tensor], Attend]], dtype: torch.dtype) -> None:
    """Tensors on a device that is not the current one; the current one stays current."""
    _, attend = problem(dtype, CUDA, True)
    expected = attend()
    _, attend = problem(dtype, torch.device("cuda:1"), True)
    assert torch.cuda.current_device() == 0
    actual = attend()
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in actual.values())
    if problem is dense_problem:
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

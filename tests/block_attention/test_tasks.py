"""Calls are cut into tasks enough for many threads, by shapes alone, and tasks write no cache line of each other's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import Packed
from tests.common.tensors import assert_bitwise_equal
from topgather import _native

NUM_HEADS, NUM_TOKENS, HEAD_DIM, BLOCK_SIZE, TOP_K = 4, 8192, 64, 128, 8
LINE_BYTES = 64


def tasks_of(call: Callable[[], object]) -> list[int]:
    """Tasks of each loop of a call, one after the other."""
    _native.count_tasks(True)
    try:
        call()
    finally:
        counts = _native.count_tasks(False)
    return counts


def make_leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, NUM_HEADS, NUM_TOKENS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    """Tasks of a problem that is long enough to want many threads, and has one sequence and few heads, by op."""
    torch.set_num_threads(2)
    query, key, value = make_leaves()
    found = {"route": tasks_of(lambda: tg.moba_route(query, key, BLOCK_SIZE, TOP_K))}
    routing = tg.moba_route(query, key, BLOCK_SIZE, TOP_K)
    outs: list[Tensor] = []
    found["forward"] = tasks_of(lambda: outs.append(tg.moba_attention(query, key, value, BLOCK_SIZE, routing=routing)))
    found["backward"] = tasks_of(lambda: torch.autograd.grad(outs[0].sum(), [query, key, value]))
    return found


@pytest.mark.parametrize("op", ["route", "forward", "backward"])
def test_every_loop_has_work_for_64_threads(counts: dict[str, list[int]], op: str) -> None:
    assert counts[op]
    assert min(counts[op]) >= 64, counts[op]


def test_every_loop_of_the_16_bit_backward_has_work_for_64_threads() -> None:
    """Which sums in a workspace that is cleared first and converted last, of heads enough for the threads."""
    torch.set_num_threads(16)
    leaves = [tensor.detach().bfloat16().requires_grad_() for tensor in make_leaves()]
    out = tg.moba_attention(*leaves, BLOCK_SIZE, TOP_K)
    counts = tasks_of(lambda: torch.autograd.grad(out.sum(), leaves))
    assert len(counts) > 3  # lists, clearing, rounds, converting
    assert min(counts) >= 64, counts


@pytest.mark.parametrize(("num_heads", "num_tokens"), [(8, 8192), (1, 8320)], ids=["many_heads", "long"])
def test_a_second_sum_of_the_gradient_only_where_tasks_would_be_few(num_heads: int, num_tokens: int) -> None:
    """Else nothing is cleared before the first round, or added up after the last."""
    leaves = [torch.randn(1, num_heads, num_tokens, 8).requires_grad_() for _ in range(3)]
    out = tg.moba_attention(*leaves, BLOCK_SIZE, TOP_K)
    counts = tasks_of(lambda: torch.autograd.grad(out.sum(), leaves))
    assert counts == [2 * 8 * num_heads] + 8 * [8 * num_heads], counts


def test_the_cut_does_not_depend_on_threads_or_on_the_batch() -> None:
    """Of a sequence: results hang on it."""
    query, key, value = (tensor.detach()[:, :, :1500] for tensor in make_leaves())

    def counts_of(batch_size: int) -> list[int]:
        q, k, v = (tensor.expand(batch_size, -1, -1, -1) for tensor in (query, key, value))
        return tasks_of(lambda: tg.moba_attention(q, k, v, BLOCK_SIZE, TOP_K))

    torch.set_num_threads(1)
    alone = counts_of(1)
    torch.set_num_threads(3)
    assert counts_of(1) == alone
    assert counts_of(5) == [5 * count for count in alone]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sequence_has_sums_by_its_own_shape(dtype: torch.dtype) -> None:
    """A long one with two of its queries' gradient beside a short one with one: as each alone, bit for bit."""
    lengths = ([1100, 70, 600], [1100, 70, 600])
    packed = Packed(lengths, dtype, torch.device("cpu"))
    result = packed.run(64, 8, True)
    routing = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 64, 8)
    packed.check(result, routing.block_indices, 64, 8, True)
    for seq_idx in range(3):
        inputs = [
            packed.tokens(tensor, seq_idx).detach().requires_grad_()
            for tensor in (packed.query, packed.key, packed.value)
        ]
        out, lse = tg.moba_attention(*inputs, 64, 8, return_lse=True)
        gradients = (packed.tokens(packed.grad_out, seq_idx), packed.columns(packed.grad_lse, seq_idx))
        alone = torch.autograd.grad((out, lse), inputs, gradients)
        for name, tensor in zip(("d_query", "d_key", "d_value"), alone, strict=True):
            assert_bitwise_equal(name, packed.tokens(getattr(result, name), seq_idx), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_two_sums_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Nor on how many heads the threads take at once."""
    leaves = [tensor.detach()[:, :, :1100].to(dtype).requires_grad_() for tensor in make_leaves()]

    def gradients(num_threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(num_threads)
        out = tg.moba_attention(*leaves, 64, TOP_K)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    expected = gradients(1)
    for num_threads in (2, 7):
        for name, tensor, alone in zip(("query", "key", "value"), gradients(num_threads), expected, strict=True):
            assert_bitwise_equal(name, tensor, alone)


def test_tasks_write_cache_lines_of_their_own(counts: dict[str, list[int]]) -> None:
    """Rows of a task times bytes of a row are whole lines, of every result."""
    query, key, value = make_leaves()
    routing = tg.moba_route(query, key, BLOCK_SIZE, TOP_K)
    out, lse = tg.moba_attention(query, key, value, BLOCK_SIZE, routing=routing, return_lse=True)
    grads = torch.autograd.grad(out.sum(), [query, key, value])
    num_rows, num_blocks = NUM_HEADS * NUM_TOKENS, NUM_HEADS * NUM_TOKENS // BLOCK_SIZE
    # The first loop of routing makes centroids; the last of the backward its gradients, of a chunk of blocks each.
    rows_of_task = {
        "choices": (routing.block_indices, num_rows / counts["route"][-1]),
        "out": (out, num_rows / counts["forward"][0]),
        "lse": (lse, num_rows / counts["forward"][0]),
        "query's gradient": (grads[0], num_rows / counts["backward"][-1]),
        "key's gradient": (grads[1], num_blocks / counts["backward"][-1] * BLOCK_SIZE),
        "value's gradient": (grads[2], num_blocks / counts["backward"][-1] * BLOCK_SIZE),
    }
    for name, (result, rows) in rows_of_task.items():
        bytes_of_row = result.nbytes // num_rows
        assert result.is_contiguous(), name
        assert result.data_ptr() % LINE_BYTES == 0, name
        assert rows == int(rows) > 0, name
        assert int(rows) * bytes_of_row % LINE_BYTES == 0, name

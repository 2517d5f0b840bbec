"""Tables in host memory against tables on the device: here both are the CPU, and a GPU where there is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import topgather as tg
from topgather import optim
from topgather.nn.offloaded import MAX_PENDING

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
KEYS, WIDTH = 6, 10


def batches(device: str) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        indices = torch.randint(0, KEYS**2 if number % 2 else 7, (5, 8), generator=generator)
        yield indices, torch.randn(5, 8, generator=generator).to(device)


@pytest.mark.parametrize("cache_rows", [0, 4, 100])
@pytest.mark.parametrize("compute_device", DEVICES)
def test_trains_as_a_table_on_the_device(compute_device: str, cache_rows: int) -> None:
    """Two layers share it, one's rows are sent ahead; then a row optimizer takes the sparse gradients."""
    for make in (lambda p: torch.optim.SparseAdam(p, lr=0.1), lambda p: optim.RowAdam(p, lr=0.1)):
        torch.manual_seed(0)
        plain = tg.nn.MemoryPool(KEYS, WIDTH, sparse_grad=True).to(compute_device)
        pool = tg.nn.OffloadedMemoryPool.from_pool(copy.deepcopy(plain), compute_device, cache_rows)
        optimizers = [make([table.values]) for table in (plain, pool)]
        for indices, weights in batches(compute_device):
            found = []
            for table, optimizer in zip((plain, pool), optimizers, strict=True):
                optimizer.zero_grad()
                indices_of = indices if table is pool else indices.to(compute_device)
                second = indices_of.flip(0)
                if table is pool:
                    pool.prefetch(second)
                weights_of = weights.clone().requires_grad_()
                out = table(indices_of, weights_of) + table(second, weights_of).sin()
                out.square().sum().backward()
                optimizer.step()
                found.append((out.detach(), weights_of.grad))
            torch.testing.assert_close(found[1], found[0])
        assert pool.values.device.type == "cpu"
        torch.testing.assert_close(pool.values, plain.values.cpu())


def test_rows_travel_once_and_hot_ones_stay() -> None:
    pool = tg.nn.OffloadedMemoryPool(KEYS, WIDTH, "cpu", cache_rows=3)
    hot, cold = torch.tensor([[5, 9, 5, 30]]), torch.tensor([[1, 2, 3, 4]])
    weights = torch.ones(1, 4)
    for _ in range(3):
        pool(hot, weights)
    assert pool.usage() == tg.nn.CacheUsage(6, 3, 3 * WIDTH * 4, 6 / 9)
    pool(cold, weights)  # does not drive out what is hot
    pool(hot, weights)
    assert (pool.usage().hits, pool.usage().misses) == (9, 7)
    with torch.no_grad():
        pool.values[5] = 7.0
    expected = tg.memory_lookup(pool.values, hot, weights)
    torch.testing.assert_close(pool(hot, weights), expected)
    assert (pool.usage().hits, pool.usage().misses) == (9, 10)  # a changed table empties the cache
    pool.prefetch(hot)
    with torch.no_grad():
        pool.values[9] = 8.0
    torch.testing.assert_close(pool(hot, weights), tg.memory_lookup(pool.values, hot, weights))


def test_rows_sent_ahead_are_those_of_the_indices_that_the_lookup_has() -> None:
    """Memory that numpy or another tensor refills changes no version; tables made in inference mode have none."""
    pool = tg.nn.OffloadedMemoryPool(KEYS, WIDTH, "cpu", cache_rows=3)
    indices = torch.tensor([[5, 9, 5, 30]])
    pool.prefetch(indices)
    indices.numpy()[:] = [[1, 2, 3, 4]]
    weights = torch.ones(1, 4)
    torch.testing.assert_close(pool(indices, weights), tg.memory_lookup(pool.values, indices, weights))
    for _ in range(100):
        pool.prefetch(indices.clone())
    assert len(pool._pending) == MAX_PENDING
    with torch.inference_mode():
        pool = tg.nn.OffloadedMemoryPool(KEYS, WIDTH, "cpu", cache_rows=3)
        for _ in range(2):
            pool.prefetch(indices)
            pool.values[2] += 1.0
            torch.testing.assert_close(pool(indices, weights), tg.memory_lookup(pool.values, indices, weights))


def test_as_a_module() -> None:
    """In a layer; bags with padding; copies; wrong indices."""
    pool = tg.nn.OffloadedMemoryPool(4, 8, "cpu", cache_rows=5, mode="mean", padding_idx=3)
    plain = tg.nn.MemoryPool(4, 8, mode="mean", padding_idx=3)
    plain.load_state_dict(pool.state_dict())
    tokens, offsets = torch.tensor([3, 7, 0, 3, 9, 9]), torch.tensor([0, 2, 2])
    torch.testing.assert_close(pool(tokens, offsets=offsets), plain(tokens, offsets=offsets))
    torch.testing.assert_close(pool(tokens[1:3], offsets=offsets[:1]), plain(tokens[1:3], offsets=offsets[:1]))
    assert copy.deepcopy(pool).usage() == pool.usage()
    assert pool.to(torch.bfloat16).values.dtype == torch.float32
    for wrong in (-1, 16):
        with pytest.raises(IndexError, match=f"indices must be between 0 and 15, got {wrong}"):
            pool(torch.tensor([[0, wrong]]))
    layer = tg.nn.ProductKeyMemory(8, tg.nn.OffloadedMemoryPool(4, 8, "cpu"), num_heads=2, top_k=3, key_dim=8)
    layer(torch.randn(2, 3, 8)).sum().backward()
    grad = layer.pool.values.grad
    assert grad is not None and grad.is_sparse and grad._nnz() <= 16
    with pytest.raises(ValueError, match="cache_rows must be between 0 and"):
        tg.nn.OffloadedMemoryPool(4, 8, "cpu", cache_rows=-1)

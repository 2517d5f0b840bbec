"""Decoding inside a compiled model, on fake tensors, under autocast; without gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import topgather as tg
from tests.common.tensors import assert_bitwise_equal, random_tensor
from tests.decoding.helpers import Cache, DecodeCase, assert_same_contents, filled_cache

ops = torch.ops.topgather
OPS = ["moba_cache_append", "moba_decode_route", "moba_decode"]
CASE = DecodeCase(((21, 9), (3, 3)), head_dim=8, value_dim=6)


def cache_of(pages: int, dtype: torch.dtype, device: torch.device) -> Cache:
    return filled_cache(DecodeCase(**{**CASE.__dict__, "pages": pages}), dtype, device, spare=8)[0]


def arguments_of(name: str, cache: Cache, query_len: int = 3, ragged: bool = True) -> tuple[Any, ...]:
    """Arguments of each op on a filled cache."""
    dtype, device = cache.dtype, cache.device
    counts = torch.tensor([query_len, query_len - 1], dtype=torch.int32, device=device) if ragged else None
    tail = (cache.seq_lens, cache.page_table, counts, cache.block_size)
    query = random_tensor((2, 4, query_len, 8), dtype, device, 3)
    if name == "moba_cache_append":
        key, value = (random_tensor((2, 2, query_len, dim), dtype, device, dim) for dim in (8, 6))
        return (key, value, cache.key_pages, cache.value_pages, cache.centroids, *tail)
    if name == "moba_decode_route":
        return (query, cache.centroids, *tail, cache.page_size, 2)
    choice = ops.moba_decode_route(query, cache.centroids, *tail, cache.page_size, 2)
    return (query, cache.key_pages, cache.value_pages, choice, *tail, 0.3)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_without_counts(name: str, device: torch.device) -> None:
    cache = tg.MobaCache(2, 2, 8, block_size=8, max_seq_len=40, value_dim=6, device=device)
    for tensor in (cache.key_pages, cache.value_pages, cache.centroids):
        tensor.zero_()
    cache.append(torch.randn(2, 2, 12, 8, device=device), torch.randn(2, 2, 12, 6, device=device))
    torch.library.opcheck(getattr(ops, name).default, arguments_of(name, cache, ragged=False))


def step(key: Tensor, value: Tensor, query: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """One step as a compiled model takes it, on the ops themselves."""
    rows = (cache.key_pages, cache.value_pages, cache.centroids)
    ops.moba_cache_append(key * 2, value, *rows, cache.seq_lens, cache.page_table, None, cache.block_size)
    lengths = cache.seq_lens + key.size(2)
    tail = (lengths, cache.page_table, None, cache.block_size)
    choice = ops.moba_decode_route(query, cache.centroids, *tail, cache.page_size, 2)
    out, lse = ops.moba_decode(query, cache.key_pages, cache.value_pages, choice, *tail, 0.3)
    return out.sin(), lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pages", [0, 1])
def test_compile_without_graph_break(pages: int, backend: str, device: torch.device) -> None:
    """Appending, choosing and attending are one graph; the cache is written to in place."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    cache, other = cache_of(pages, torch.float32, device), cache_of(pages, torch.float32, device)
    for caches in (cache, other):
        if isinstance(caches, tg.PagedMobaCache):
            caches.reserve(8)
    for query_len in (1, 1, 2):
        new = [random_tensor((2, heads, query_len, dim), torch.float32, device, query_len + dim)
               for heads, dim in ((2, 8), (2, 6), (4, 8))]  # fmt: skip
        for actual, expected in zip(compiled(*new, cache), step(*new, other), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        for caches in (cache, other):
            caches.seq_lens.add_(query_len)
            caches._is_exact = False
    for sequence in range(2):
        assert_same_contents(cache, sequence, other, sequence)
    assert counter.frame_count <= 2


def test_compile_by_inductor() -> None:
    cache = tg.MobaCache(2, 2, 8, block_size=8, max_seq_len=40)
    cache.append(torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8))
    query = torch.randn(2, 4, 3, 8)
    tail = (cache.seq_lens, None, None, 8)

    def attend(query: Tensor) -> Tensor:
        choice = ops.moba_decode_route(query * 1.0, cache.centroids, *tail, cache.page_size, 2)
        return ops.moba_decode(query, cache.key_pages, cache.value_pages, choice, *tail, 0.3)[0].sin()

    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(compiled(query), attend(query), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_tensors_agree_with_real_ones(layout: str, device: torch.device) -> None:
    """Shapes, dtypes and strides: out is laid out as query is."""
    cache = cache_of(0, torch.bfloat16, device)
    arguments = list(arguments_of("moba_decode", cache))
    if layout == "transposed":
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    real = ops.moba_decode(*arguments)
    with FakeTensorMode() as mode:
        fake = ops.moba_decode(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for left, right in zip(real, fake, strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
    assert real[0].is_contiguous() == (layout == "contiguous")


def test_fake_tensors_are_checked() -> None:
    cache = cache_of(0, torch.float32, torch.device("cpu"))
    arguments = list(arguments_of("moba_decode", cache))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(TypeError, match=r"key_pages must have dtype torch\.float64"):
            ops.moba_decode(fakes[0].double(), *fakes[1:])


@pytest.mark.parametrize("query_len", [1, 70])
def test_autocast_leaves_a_cache_alone(query_len: int, device: torch.device) -> None:
    """A cache keeps its dtype, and so do those who ask it, whichever kernel answers."""
    cache = tg.MobaCache(1, 2, 8, block_size=8, max_seq_len=100, device=device)
    cache.append(torch.randn(1, 2, 80, 8, device=device), torch.randn(1, 2, 80, 8, device=device))
    query = torch.randn(1, 4, query_len, 8, device=device)
    expected = tg.moba_decode(query, cache, top_k=2)
    with torch.autocast(device.type, torch.bfloat16):
        out = tg.moba_decode(query, cache, top_k=2)
    assert_bitwise_equal("out", out, expected)


@pytest.mark.parametrize("query_len", [1, 70])
def test_a_model_that_trains_may_ask_without_gradients(query_len: int, device: torch.device) -> None:
    cache = tg.MobaCache(1, 2, 8, block_size=8, max_seq_len=100, device=device)
    weight = torch.ones((), device=device, requires_grad=True)
    with torch.no_grad():
        key = torch.randn(1, 2, 80, 8, device=device) * weight
        cache.append(key, key)
        out = tg.moba_decode(torch.randn(1, 4, query_len, 8, device=device) * weight, cache, top_k=2)
    assert not out.requires_grad
    with pytest.raises(ValueError, match="query must not require grad: moba_decode has no gradient"):
        tg.moba_decode(torch.randn(1, 4, query_len, 8, device=device) * weight, cache, top_k=2)

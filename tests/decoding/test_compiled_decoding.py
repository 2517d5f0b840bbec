"""A compiled step of decoding with a cache object: one graph for all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import topgather as tg

NUM_TOKENS = 20  # more than torch's limit of recompilations, 8


def make(paged: bool, conv: bool, device: torch.device, max_seq_len: int = 64, page_size: int | None = None) -> Any:
    weight = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).to(device) if conv else None
    cls = tg.PagedMobaCache if paged else tg.MobaCache
    options = {"page_size": page_size} if paged else {}
    cache = cls(2, 2, 8, block_size=4, max_seq_len=max_seq_len, device=device, conv_weight=weight, **options)
    prompt = torch.randn(2, 2, 13, 8, generator=torch.Generator().manual_seed(2)).to(device)
    cache.append(prompt, prompt, num_tokens=[13, 6])
    if isinstance(cache, tg.PagedMobaCache):
        cache.reserve([min(NUM_TOKENS + 5, max_seq_len - length) for length in cache.lengths])
    return cache


def step(cache: Any, key: Tensor, query: Tensor, num_tokens: Tensor | None, top_k: int | None) -> Tensor:
    cache.append(key * 2, key, num_tokens)
    return tg.moba_decode(query, cache, top_k) + 1


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_one_graph_for_all_tokens(
    paged: bool, conv: bool, ragged: bool, top_k: int | None, device: torch.device
) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend=CompileCounterWithBackend("aot_eager"), fullgraph=True)
    cache, other = make(paged, conv, device), make(paged, conv, device)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for token in range(NUM_TOKENS):
            key, query = (torch.randn(2, 2, 1, 8, generator=draw).to(device) for _ in range(2))
            counts = torch.tensor([1, token % 2], dtype=torch.int32, device=device) if ragged else None
            actual = compiled(cache, key, query, counts, top_k)
            torch.testing.assert_close(actual, step(other, key, query, counts, top_k), rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert cache.lengths == other.lengths == [13 + NUM_TOKENS, 6 + (NUM_TOKENS // 2 if ragged else NUM_TOKENS)]

    # What follows without a compiler knows what there is.
    key = torch.randn(2, 2, 3, 8, generator=draw).to(device)
    for each in (cache, other):
        each.append(key, key)
        each.truncate([length - 2 for length in each.lengths])
    out, expected = (tg.moba_decode(key, each, top_k, num_tokens=[1, 1]) for each in (cache, other))
    assert torch.equal(out, expected)


def test_host_and_compiled_steps_take_turns(device: torch.device) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    cache, other = make(True, False, device), make(True, False, device)
    for token in range(12):
        key = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(token)).to(device)
        run = (step, compiled)[token % 3 > 0]
        torch.testing.assert_close(run(cache, key, key, None, 2), step(other, key, key, None, 2), rtol=1e-6, atol=1e-6)
    assert cache.lengths == other.lengths
    assert counters["stats"]["unique_graphs"] == 1


def test_appending_and_attending_compiled_apart(device: torch.device) -> None:
    """As layers of a model do that is compiled layer by layer."""
    torch._dynamo.reset()
    counters.clear()
    append = torch.compile(lambda cache, key: cache.append(key, key), backend="aot_eager", fullgraph=True)
    decode = torch.compile(lambda cache, query: tg.moba_decode(query, cache, 2), backend="aot_eager", fullgraph=True)
    cache, other = make(False, False, device), make(False, False, device)
    for token in range(NUM_TOKENS):
        key = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(token)).to(device)
        append(cache, key)
        other.append(key, key)
        torch.testing.assert_close(decode(cache, key), tg.moba_decode(key, other, 2), rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("counts", [None, [1, 0]], ids=["all", "ragged"])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "large pages"])
def test_a_compiled_append_without_room_is_refused(kind: str, counts: list[int] | None) -> None:
    """Before it writes, as without a compiler: places are missing, or ``max_seq_len`` is reached."""
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    cpu = torch.device("cpu")
    cache = make(kind != "contiguous", True, cpu, max_seq_len=14, page_size=16 if kind == "large pages" else None)
    key = torch.randn(2, 2, 1, 8)
    num_tokens = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    compiled(cache, key, key, num_tokens, 2)
    before = cache.copy()
    for run in (compiled, step):
        with pytest.raises((ValueError, IndexError, RuntimeError), match=r"max_seq_len|has room for"):
            run(cache, key, key, num_tokens, None)
        assert cache.lengths == before.lengths == [14, 7 if counts is None else 6]
        assert torch.equal(tg.moba_decode(key, cache, None), tg.moba_decode(key, before, None))


def test_a_sequence_that_outgrew_its_limit_gives_nan() -> None:
    """As on CUDA, where nobody waits to see it: the last page has rows for it, which no list of blocks counts."""
    cache = make(True, False, torch.device("cpu"), max_seq_len=14, page_size=16)
    for pages in (cache.key_pages, cache.value_pages, cache.centroids):
        pages.zero_()  # nothing was appended: whatever memory held may be NaN
    key = torch.randn(2, 2, 1, 8)
    cache.seq_lens.copy_(torch.tensor([15, 7]))
    cache._is_exact = False
    out, lse = tg.moba_decode(key, cache, None, num_tokens=[1, 1], return_lse=True)
    for each in (out, lse):
        assert each[0].isnan().all() and each[1].isfinite().all()


def test_a_model_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True)
    device = torch.device("cpu")
    cache, other = make(False, True, device), make(False, True, device)
    with torch.no_grad():
        for token in range(NUM_TOKENS):
            key = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(token))
            actual = compiled(cache, key, key, None, 2)
            torch.testing.assert_close(actual, step(other, key, key, None, 2), rtol=1e-6, atol=1e-6)
    assert cache.lengths == other.lengths
    assert counters["stats"]["unique_graphs"] == 1

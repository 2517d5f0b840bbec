"""What holds of decoding's CUDA kernels alone: any content of lengths, tables and choices, cuts, schedules, memory."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import assert_routing_contract
from tests.common.native import described, workspace_bytes
from tests.common.schedules import CUDA_DTYPES, over_schedules
from tests.common.tensors import assert_bitwise_equal, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES
from topgather import reference
from topgather._common import cuda as _cuda

OPS = torch.ops.topgather


@dataclass(frozen=True)
class CacheCase:
    """Sequences of ``lengths`` cached tokens, the last ``query_len`` of each with queries (as many as there are)."""

    lengths: tuple[int, ...] = (37, 80)
    query_len: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    block_size: int = 8
    top_k: int = 3
    page_size: int = 0  # 0: contiguous
    max_seq_len: int = 90

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        """Test id."""
        lengths = "-".join(map(str, self.lengths))
        parts = [lengths, f"m{self.query_len}", f"h{self.num_heads}x{self.num_kv_heads}"]
        parts += [f"d{self.head_dim}x{self.value_dim}", f"block{self.block_size}", f"top{self.top_k}"]
        return "-".join(parts + [f"page{self.page_size}"] * (self.page_size > 0))


class Cache:
    """The tensors of a cache, filled from ``key`` and ``value`` [batch, kv head, longest, dim]."""

    def __init__(self, case: CacheCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.case = case
        longest = max(case.lengths)
        self.key = random_tensor((case.batch, case.num_kv_heads, longest, case.head_dim), dtype, device, seed)
        self.value = random_tensor((case.batch, case.num_kv_heads, longest, case.value_dim), dtype, device, seed + 1)
        shape = (case.batch, case.num_heads, case.query_len, case.head_dim)
        self.query = random_tensor(shape, dtype, device, seed + 2)
        page_size = case.page_size or case.max_seq_len
        self.page_table = None
        num_pages = case.batch
        if case.page_size:
            columns = -(-case.max_seq_len // page_size)
            num_pages = case.batch * columns + 1
            order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))[: case.batch * columns]
            self.page_table = order.to(torch.int32).view(case.batch, columns).to(device)
        blocks = -(-page_size // case.block_size)

        def pages(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
            return torch.full((num_pages, case.num_kv_heads, rows, dim), torch.nan, dtype=dtype, device=device)

        self.key_pages = pages(page_size, case.head_dim, dtype)
        self.value_pages = pages(page_size, case.value_dim, dtype)
        self.centroids = pages(blocks, case.head_dim, torch.float32)
        self.page_size = page_size
        self.seq_lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.append(self.key, self.value, torch.zeros_like(self.seq_lens), self.seq_lens)
        counts = self.seq_lens.clamp(max=case.query_len)
        self.num_tokens = None if bool((counts == case.query_len).all()) else counts

    def append(self, key: Tensor, value: Tensor, seq_lens: Tensor, num_tokens: Tensor | None) -> None:
        OPS.moba_cache_append(
            key, value, self.key_pages, self.value_pages, self.centroids, seq_lens, self.page_table, num_tokens,
            self.case.block_size,
        )  # fmt: skip

    def route(self) -> Tensor:
        return OPS.moba_decode_route(
            self.query, self.centroids, self.seq_lens, self.page_table, self.num_tokens, self.case.block_size,
            self.page_size, self.case.top_k,
        )  # fmt: skip

    def decode(self, block_indices: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.moba_decode(
            self.query, self.key_pages, self.value_pages, block_indices, self.seq_lens, self.page_table,
            self.num_tokens, self.case.block_size, self.case.head_dim**-0.5,
        )  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        block_indices = self.route()
        out, lse = self.decode(block_indices)
        return {"block_indices": block_indices, "out": out, "lse": lse}


def check_results(cache: Cache, results: dict[str, Tensor]) -> None:
    """Every sequence gives what the reference gives for the whole of it; rows without a token give 0 and -inf."""
    case, dtype = cache.case, cache.query.dtype
    cpu = {name: tensor.cpu() for name, tensor in results.items()}
    for s, length in enumerate(case.lengths):
        count = min(length, case.query_len)
        query = cache.query[s : s + 1, :, :count].cpu()
        key, value = (tensor[s : s + 1, :, :length].cpu() for tensor in (cache.key, cache.value))
        block_indices = cpu["block_indices"][s : s + 1, :, :count]
        assert_routing_contract(block_indices, query, key, case.block_size, case.top_k, is_causal=True)
        inputs = (query.double(), key.double(), value.double())
        expected = reference.moba_attention(*inputs, block_indices, case.block_size)
        magnitude, _ = reference.moba_attention(*inputs[:2], inputs[2].abs(), block_indices, case.block_size)
        for name, of_case, size in zip(("out", "lse"), expected, (magnitude, expected[1].abs()), strict=True):
            tolerance = TOLERANCES["moba_attention", name]
            # Scores of normal numbers are a few units large, and their rounding grows with head_dim.
            assert_close(
                name, cpu[name][s : s + 1, :, :count], of_case, size + (name == "lse"), tolerance, dtype,
                case.top_k * case.block_size, score_factor=case.head_dim**0.5 + 4,
            )  # fmt: skip
        assert (cpu["block_indices"][s, :, count:] == -1).all()
        assert (cpu["out"][s, :, count:] == 0).all() and (cpu["lse"][s, :, count:] == -torch.inf).all()


CASES = [
    CacheCase(),
    CacheCase(page_size=16),
    # Slots cut into splits, and splits of several slots, at the edges of both.
    *(CacheCase((300,), 1, 2, 1, block_size=block_size, top_k=3, max_seq_len=301) for block_size in (63, 64, 65, 129)),
    *(CacheCase((200, 3), 3, 2, 2, block_size=block_size, top_k=9, max_seq_len=200) for block_size in (1, 5, 22)),
    # More choices than blocks, the own block alone, an empty sequence.
    CacheCase((37, 0, 80), 4, top_k=20),
    CacheCase((1, 64, 65), 1, top_k=1),
    # Queries of a group that fill more than one tile; a query head a key head; many heads.
    CacheCase((70,), 7, 12, 2, page_size=8),
    CacheCase((70, 33), 5, 3, 3, page_size=24),
    CacheCase((50,), 1, 34, 1),
    # Rows that no copy of 16 bytes can read, wide rows, narrow values.
    CacheCase(head_dim=5, value_dim=9, page_size=8),
    CacheCase(head_dim=68, value_dim=3),
    CacheCase(head_dim=264, value_dim=272, query_len=1),
    CacheCase(head_dim=40, value_dim=136, page_size=16),
    CacheCase(head_dim=67, value_dim=131, query_len=1),
]


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_cut(case: CacheCase, dtype: torch.dtype, cuda_device: torch.device) -> None:
    cache = Cache(case, dtype, cuda_device)
    check_results(cache, cache.run())


@pytest.mark.parametrize("top_k", [2, 9, 40, 300, 2200])
def test_more_blocks_than_a_warp_holds(top_k: int, cuda_device: torch.device) -> None:
    """Blocks of one key, on both sides of what the selection keeps in registers; ties by the dozen."""
    case = CacheCase((2300,), 1, 1, 1, head_dim=4, value_dim=4, block_size=1, top_k=top_k, max_seq_len=2300)
    cache = Cache(case, torch.float32, cuda_device)
    check_results(cache, cache.run())
    whole = cache.key.mul(2).round().clamp(-1, 1)
    cache.append(whole, cache.value, torch.zeros_like(cache.seq_lens), None)
    cache.query = cache.query.mul(2).round().clamp(-1, 1)
    expected = reference.moba_route(cache.query.cpu(), whole.cpu(), 1, top_k)
    assert torch.equal(cache.route().cpu(), expected)


def test_scores_that_are_not_finite_rank_as_they_must(cuda_device: torch.device) -> None:
    case = CacheCase((76,), 2, 2, 2, head_dim=4, value_dim=4, block_size=4, max_seq_len=76)
    for top_k in (2, 4, 5, 7, 18):
        cache = Cache(replace(case, top_k=top_k), torch.float32, cuda_device)
        key = cache.key.clone()
        key[:, :, 9] = torch.inf
        key[:, :, 21] = -torch.inf
        key[:, :, 30, 0] = torch.nan
        key[:, :, 50] = torch.nan
        key[:, :, 56:64] = 0.0
        cache.append(key, cache.value, torch.zeros_like(cache.seq_lens), None)
        expected = reference.moba_route(cache.query.cpu(), key.cpu(), case.block_size, top_k)
        assert torch.equal(cache.route().cpu(), expected)


def test_zeros_of_either_sign_tie(cuda_device: torch.device) -> None:
    """Products that underflow leave a zero of their sign."""
    case = CacheCase((40,), 1, 1, 1, head_dim=32, value_dim=4, block_size=4, max_seq_len=40)
    cache = Cache(case, torch.float32, cuda_device)
    sign = torch.tensor([-1.0, 1.0], device=cuda_device).repeat_interleave(4).repeat(5)[:, None]
    key = (sign * 1e-30).expand(1, 1, 40, 32).contiguous()
    cache.append(key, cache.value, torch.zeros_like(cache.seq_lens), None)
    cache.query.fill_(1e-30)
    assert cache.route().flatten().tolist() == [0, 1, 9]


def check_centroids(cache: Cache) -> None:
    """Whole blocks have the mean of their keys, begun ones the sum so far."""
    case = cache.case
    blocks_per_page = cache.centroids.size(2)
    for s, length in enumerate(case.lengths):
        key = cache.key[s : s + 1, :, :length].cpu()
        means = reference.block_centroids(key, case.block_size)[0]
        sizes = reference.block_centroids(key.abs(), case.block_size)[0]
        for block in range(means.size(1)):
            page = s if cache.page_table is None else int(cache.page_table[s, block // blocks_per_page])
            actual = cache.centroids[page, :, block % blocks_per_page].cpu()
            count = min(case.block_size, length - block * case.block_size)
            factor = 1 if count == case.block_size else count
            assert_close(
                "centroids", actual, means[:, block] * factor, sizes[:, block] * factor,
                TOLERANCES["block_centroids", "forward"], torch.float32, case.block_size,
            )  # fmt: skip


def test_appends_sum_in_order(cuda_device: torch.device) -> None:
    """Centroids have the same bits however a sequence was split, and nothing else of a page is touched."""
    for case in (CacheCase((61, 77), page_size=16), CacheCase((61, 77), head_dim=7, value_dim=5)):
        for dtype in (torch.float32, torch.bfloat16):
            whole = Cache(case, dtype, cuda_device)
            split = Cache(case, dtype, cuda_device)
            for tensor in (split.key_pages, split.value_pages, split.centroids):
                tensor.fill_(torch.nan)
            cached = torch.zeros_like(split.seq_lens)
            for step in (1, 2, 13, 0, 30, 8, 7, 1, 40):
                count = (split.seq_lens - cached).clamp(max=step)
                rows = [[min(int(c) + i, 76) for i in range(step)] for c in cached]
                index = torch.tensor(rows, dtype=torch.int64, device=cuda_device).view(2, 1, step, 1)
                heads = case.num_kv_heads
                key = split.key.gather(2, index.expand(2, heads, step, case.head_dim).clamp(max=76))
                value = split.value.gather(2, index.expand(2, heads, step, case.value_dim).clamp(max=76))
                split.append(key, value, cached, count)
                cached = cached + count
            for name in ("key_pages", "value_pages", "centroids"):
                assert_bitwise_equal(name, getattr(split, name), getattr(whole, name))
            check_centroids(split)


INTEGERS = [-(2**31), -7, -2, -1, 0, 1, 5, 36, 37, 80, 90, 91, 96, 97, 10**6, 2**31 - 1]


@pytest.mark.parametrize("page_size", [0, 16], ids=["contiguous", "paged"])
def test_lengths_of_any_content(page_size: int, cuda_device: torch.device) -> None:
    """Faulty lengths give NaN to their own sequence, and the other's bits stay; nothing is read out of bounds."""
    cache = Cache(CacheCase(page_size=page_size), torch.float32, cuda_device)
    capacity = 96 if page_size else 90
    expected = cache.run()
    for tensor in (cache.key_pages, cache.value_pages, cache.centroids):
        tensor.nan_to_num_(0.0)
    choices = expected["block_indices"]
    for number in INTEGERS:
        for name in ("seq_lens", "num_tokens"):
            cache.seq_lens = torch.tensor([37, 80], dtype=torch.int32, device=cuda_device)
            cache.num_tokens = torch.tensor([2, 2], dtype=torch.int32, device=cuda_device)
            getattr(cache, name)[0] = number
            is_faulty = not (0 <= number <= (capacity if name == "seq_lens" else 2))
            own = cache.route()
            for block_indices in (own, choices):
                out, lse = cache.decode(block_indices)
                if is_faulty:
                    assert out[0].isnan().all() and lse[0].isnan().all()
                    assert (own[0] == -1).all()
                assert_bitwise_equal("out", out[1], expected["out"][1])
                assert_bitwise_equal("lse", lse[1], expected["lse"][1])
            assert torch.equal(own[1], choices[1])


def test_appends_of_any_content(cuda_device: torch.device) -> None:
    """Tokens without a place are dropped, and the other sequence is stored as ever."""
    for page_size in (0, 16):
        case = CacheCase((0, 80), page_size=page_size)
        new = random_tensor((2, 2, 9, 16), torch.float32, cuda_device, 5)
        for number in INTEGERS:
            for name in ("seq_lens", "num_tokens", "page_table"):
                cache = Cache(case, torch.float32, cuda_device)
                tensors = {"seq_lens": cache.seq_lens.clone(), "num_tokens": torch.full_like(cache.seq_lens, 9)}
                if name == "page_table":
                    if cache.page_table is None or 0 <= number < cache.key_pages.size(0):
                        continue
                    cache.page_table[0] = number
                else:
                    tensors[name][0] = number
                expected = {name: getattr(cache, name).clone() for name in ("key_pages", "value_pages")}
                cache.append(new, new, tensors["seq_lens"], tensors["num_tokens"])
                for s in range(2):
                    first, count = int(tensors["seq_lens"][s]), int(tensors["num_tokens"][s])
                    for i in range(min(count, 9) if first >= 0 else 0):
                        column, row = divmod(first + i, cache.page_size)
                        columns = 1 if cache.page_table is None else cache.page_table.size(1)
                        if column >= columns:
                            continue
                        page = s if cache.page_table is None else int(cache.page_table[s, column])
                        if 0 <= page < cache.key_pages.size(0):
                            for pages in expected.values():
                                pages[page, :, row] = new[s, :, i]
                for pages_name, pages in expected.items():
                    assert_bitwise_equal(pages_name, getattr(cache, pages_name), pages)


@pytest.mark.parametrize("number", [-(2**31), -5, -1, 13, 2**31 - 1])
def test_pages_that_do_not_exist(number: int, cuda_device: torch.device) -> None:
    """Every query that chooses among blocks on such a page, or attends to one, is NaN; others keep their bits."""
    case = CacheCase((37, 80), query_len=1, page_size=16)
    for column in range(6):
        cache = Cache(case, torch.bfloat16, cuda_device)
        assert cache.page_table is not None and cache.key_pages.size(0) == 13
        expected = cache.run()
        cache.page_table[1, column] = number
        results = cache.run()
        assert results["out"][1].isnan().all() == (column < 5)
        assert results["lse"][1].isnan().all() == (column < 5)
        for name in results:
            assert_bitwise_equal(name, results[name][0], expected[name][0])


@pytest.mark.parametrize("fault", [-2, -(2**31), 10, 11, 2**31 - 1, "twice", "twice apart"])
def test_choices_that_cannot_be(fault: int | str, cuda_device: torch.device) -> None:
    cache = Cache(CacheCase((37, 80), query_len=1, top_k=4), torch.float32, cuda_device)
    block_indices = torch.tensor([7, 0, -1, 3], dtype=torch.int32, device=cuda_device).expand(2, 4, 1, 4).clone()
    block_indices[0] %= 5
    expected = cache.decode(block_indices)
    assert not expected[0].isnan().any()
    faulty = block_indices.clone()
    if isinstance(fault, int):
        faulty[1, 2, 0, 1] = fault
    else:
        faulty[1, 2, 0, 1 if fault == "twice" else 3] = 7
    out, lse = cache.decode(faulty)
    assert out[1, 2].isnan().all() and lse[1, 2].isnan().all()
    out[1, 2], lse[1, 2] = expected[0][1, 2], expected[1][1, 2]
    assert_bitwise_equal("out", out, expected[0])
    assert_bitwise_equal("lse", lse, expected[1])


def test_later_blocks_add_nothing(cuda_device: torch.device) -> None:
    """A choice after a query's own block, as of an earlier one of several tokens."""
    cache = Cache(CacheCase((17, 33), query_len=3, num_heads=2, top_k=3), torch.float32, cuda_device)
    choices = torch.tensor([[0, 1, 2], [2, 3, 4]], dtype=torch.int32, device=cuda_device)
    block_indices = choices.view(2, 1, 1, 3).expand(2, 2, 3, 3).contiguous()
    out, lse = cache.decode(block_indices)
    for s, length in enumerate((17, 33)):
        rows = (cache.query, cache.key[:, :, :length], cache.value[:, :, :length])
        query, key, value = (tensor[s : s + 1].cpu().double() for tensor in rows)
        expected = reference.moba_attention(query, key, value, block_indices[s : s + 1].cpu(), 8)
        torch.testing.assert_close(out[s : s + 1].cpu().double(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[s : s + 1].cpu().double(), expected[1], atol=1e-5, rtol=1e-5)


def test_values_that_are_not_seen_have_no_influence(cuda_device: torch.device) -> None:
    """Keys past a query's position and blocks not chosen may hold anything; keys at -inf alone give NaN."""
    cache = Cache(CacheCase((37, 75), query_len=3, page_size=16), torch.bfloat16, cuda_device)
    expected = cache.run()
    choices = expected["block_indices"]
    seen = {(int(b), int(h) // 2, int(choices[b, h, i, k])) for b, h, i, k in (choices >= 0).nonzero()}
    assert cache.page_table is not None
    for b in range(2):
        for h in range(2):
            for block in range(12):
                if (b, h, block) not in seen:
                    page = int(cache.page_table[b, block // 2])
                    cache.value_pages[page, h, block % 2 * 8 : block % 2 * 8 + 8] = torch.inf
                    cache.key_pages[page, h, block % 2 * 8 : block % 2 * 8 + 8] = torch.nan
    for actual, name in zip(cache.decode(choices), ("out", "lse"), strict=True):
        assert_bitwise_equal(name, actual, expected[name])
    cache.key_pages.fill_(-torch.inf)
    cache.query.fill_(1.0)
    out, lse = cache.decode(choices)
    assert out.isnan().all() and (lse == -torch.inf).all()


def test_one_split_at_minus_infinity(cuda_device: torch.device) -> None:
    """Its keys weigh 0 beside those of other splits; its infinite values are 0 times inf, as in dense attention."""
    case = CacheCase((200,), 1, 1, 1, block_size=100, top_k=2, max_seq_len=200)
    for value in (1.0, torch.inf):
        cache = Cache(case, torch.float32, cuda_device)
        cache.query.fill_(1.0)
        cache.key_pages[:, :, :100] = -torch.inf
        cache.value_pages[:, :, 3, 2] = value
        out, lse = cache.decode(torch.tensor([0, 1], dtype=torch.int32, device=cuda_device).view(1, 1, 1, 2))
        assert lse.isfinite().all()
        assert out.isfinite().sum() == case.value_dim - (value == torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule(dtype: torch.dtype, cuda_kind: str, cuda_device: torch.device) -> None:
    for case in (CacheCase((37, 80), 3, page_size=16), CacheCase((300,), 1, 2, 1, block_size=65, max_seq_len=300)):
        expected: dict[str, Tensor] = {}
        for schedule in over_schedules(cuda_kind):
            cache = Cache(case, dtype, cuda_device)
            results = cache.run() | {"centroids": cache.centroids, "key_pages": cache.key_pages}
            expected = expected or results
            for name, tensor in results.items():
                assert_bitwise_equal(f"{name} with {schedule}", tensor, expected[name])


def test_bits_do_not_depend_on_the_other_queries(cuda_device: torch.device) -> None:
    """A sequence alone, or a token alone, gives what it gives in a batch."""
    case = CacheCase((37, 80, 61), 5, page_size=16)
    cache = Cache(case, torch.bfloat16, cuda_device)
    together = cache.run()
    assert cache.page_table is not None
    query, table, seq_lens = cache.query, cache.page_table, cache.seq_lens
    for s in range(3):
        for token in range(5):
            cache.query = query[s : s + 1, :, token : token + 1].contiguous()
            cache.page_table, cache.seq_lens = table[s : s + 1], seq_lens[s : s + 1] - (4 - token)
            for name, tensor in cache.run().items():
                assert_bitwise_equal(name, tensor[0, :, 0], together[name][s, :, token])


@pytest.mark.parametrize("budget", [1, 300, 3000])
def test_many_small_waves(budget: int, cuda_device: torch.device) -> None:
    """The same bits where the workspace holds little at a time."""
    cache = Cache(CacheCase((37, 80), 5, page_size=8), torch.float32, cuda_device)
    expected = cache.run()
    native = _cuda.native_module()
    native.moba_cuda_set_budget(budget)
    try:
        results = cache.run()
    finally:
        native.moba_cuda_set_budget(0)
    for name, tensor in results.items():
        assert_bitwise_equal(name, tensor, expected[name])


def problem(entry: str, batch: int, heads: int, tokens: int, length: int, top_k: int) -> int:
    """Workspace of a problem without memory behind it."""
    fields = {
        "query": described(batch, heads, tokens, 128, dtype=torch.bfloat16),
        "key_pages": described(batch, 8, length, 128, dtype=torch.bfloat16),
        "value_pages": described(batch, 8, length, 128, dtype=torch.bfloat16),
        "centroids": described(batch, 8, length // 128, 128, dtype=torch.float32),
        "block_indices": described(batch, heads, tokens, top_k, dtype=torch.int32),
        "seq_lens": described(batch, dtype=torch.int32),
        "out": described(batch, heads, tokens, 128, dtype=torch.bfloat16),
        "lse": described(batch, heads, tokens, dtype=torch.float32),
    }
    options: dict[str, object] = {
        "num_tokens": None,
        "page_table": None,
        "block_size": 128,
        "page_size": length,
        "scale": 0.1,
    }
    options |= {"force_first": 0, "force_last": 1, "softcap": None, "sinks": None, "window": None}
    return workspace_bytes(_cuda.native_module(), entry, **fields, **options)


def test_workspace_is_bounded(cuda_device: torch.device) -> None:
    """Shapes alone say how much: 4 bytes a score, and a row and two numbers a split, within what waves may take."""
    route, decode = "moba_decode_route", "moba_decode"
    assert problem(route, 8, 32, 1, 131072, 8) == 8 * 32 * 1024 * 4
    splits = 8 * 32 * 8 * 2
    assert problem(decode, 8, 32, 1, 131072, 8) == splits * (128 * 4 + 8)
    for tokens in (1, 4096):
        for top_k in (1, 8, 1024):
            assert problem(decode, 64, 64, tokens, 131072, top_k) <= (256 << 20) + 512
            assert problem(route, 64, 64, tokens, 131072, top_k) <= (256 << 20) + 256
    # Where every block is chosen nothing is scored.
    assert problem(route, 8, 32, 1, 131072, 1024) == 0


def test_a_workspace_too_small_is_refused(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python asks how large it must be; a wrong answer does not write past its end."""
    cache = Cache(CacheCase(), torch.float32, cuda_device)
    block_indices = cache.route()
    native = _cuda.native_module()

    class OneByteLess:
        def __getattr__(self, name: str) -> object:
            found = getattr(native, name)
            return (lambda *args: found(*args) - 1) if name.endswith("_workspace_bytes") else found

    monkeypatch.setattr(_cuda, "native_module", OneByteLess)
    with pytest.raises(ValueError, match="workspace"):
        cache.route()
    with pytest.raises(ValueError, match="workspace"):
        cache.decode(block_indices)


def test_float64_is_for_the_cpu(cuda_device: torch.device) -> None:
    pages = torch.zeros(1, 1, 16, 4, dtype=torch.float64, device=cuda_device)
    centroids = torch.zeros(1, 1, 2, 4, dtype=torch.float64, device=cuda_device)
    new = torch.zeros(1, 1, 1, 4, dtype=torch.float64, device=cuda_device)
    lengths = torch.ones(1, dtype=torch.int32, device=cuda_device)
    choices = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=cuda_device)
    with pytest.raises(TypeError, match="key must have one of the dtypes"):
        OPS.moba_cache_append(new, new, pages, pages.clone(), centroids, lengths, None, None, 8)
    with pytest.raises(TypeError, match="query must have one of the dtypes"):
        OPS.moba_decode_route(new, centroids, lengths, None, None, 8, 16, 2)
    with pytest.raises(TypeError, match="query must have one of the dtypes"):
        OPS.moba_decode(new, pages, pages, choices, lengths, None, None, 8, 1.0)


def test_rows_anywhere(cuda_device: torch.device) -> None:
    """Pages that start and step off 16-byte boundaries are read and written where they lie."""
    case = CacheCase((37, 80), 2)
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache(case, dtype, cuda_device)
        expected = cache.run()
        for name in ("key_pages", "value_pages", "centroids"):
            pages = getattr(cache, name)
            wide = torch.zeros((*pages.shape[:3], pages.size(3) + 3), dtype=pages.dtype, device=cuda_device)
            wide[..., 1:-2] = pages
            setattr(cache, name, wide[..., 1:-2])
        cache.append(cache.key, cache.value, torch.zeros_like(cache.seq_lens), cache.seq_lens)
        results = cache.run()
        assert torch.equal(results["block_indices"], expected["block_indices"])
        check_results(cache, results)


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths(cuda_device: torch.device) -> None:
    """One graph of append, route and attention, replayed as sequences grow."""
    if cuda_device.type != "cuda":
        pytest.skip("graphs are captured on a GPU alone")
    cache = tg.PagedMobaCache(2, 2, 64, block_size=16, max_seq_len=128, device=cuda_device)
    eager = tg.PagedMobaCache(2, 2, 64, block_size=16, max_seq_len=128, device=cuda_device)
    for each in (cache, eager):
        each.reserve(128)
    key = torch.randn(2, 2, 60, 64, device=cuda_device)
    query = torch.randn(2, 4, 60, 64, device=cuda_device)
    new_key, new_query = key[:, :, :1].clone(), query[:, :, :1].clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.append(new_key, new_key)
        tg.moba_decode(new_query, cache, top_k=3)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    cache.reset()
    cache.reserve(128)
    with torch.cuda.graph(graph):
        cache.append(new_key, new_key)
        out = tg.moba_decode(new_query, cache, top_k=3)
    cache.seq_lens.zero_()
    for token in range(60):
        new_key.copy_(key[:, :, token : token + 1])
        new_query.copy_(query[:, :, token : token + 1])
        graph.replay()
        eager.append(new_key, new_key)
        assert_bitwise_equal("out", out, tg.moba_decode(new_query, eager, top_k=3))

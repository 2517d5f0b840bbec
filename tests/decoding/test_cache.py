"""What a cache can do beside being appended to: truncated, copied, reordered, moved, filled up."""

import random

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.decoding.helpers import (
    DecodeCase,
    assert_same_contents,
    contents_of,
    filled_cache,
    in_steps,
    make_cache,
    make_tokens,
    padded,
)

pytestmark = pytest.mark.sanitize

PAGES = [0, 1, 3]
CASE = DecodeCase(((30, 13, 0), (7, 7, 7), (1, 0, 1)), head_dim=12, value_dim=5)


def with_pages(pages: int, case: DecodeCase = CASE) -> DecodeCase:
    return DecodeCase(**{**case.__dict__, "pages": pages})


def continued(cache: "tg.MobaCache | tg.PagedMobaCache", steps: int = 10, seed: int = 7) -> list[Tensor]:
    """Outputs of more tokens, the same for every cache of a size."""
    outs = []
    for step in range(steps):
        shape = (cache.batch_size, cache.num_kv_heads, 1)
        new = [random_tensor((*shape, dim), cache.dtype, cache.device, seed + 3 * step + i)
               for i, dim in enumerate((cache.head_dim, cache.value_dim))]  # fmt: skip
        cache.append(*new)
        query = random_tensor((cache.batch_size, 4, 1, cache.head_dim), cache.dtype, cache.device, seed + 3 * step + 2)
        outs.append(tg.moba_decode(query, cache, top_k=2))
    return outs


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_centroids_are_those_of_whole_sequences(dtype: torch.dtype, pages: int, device: torch.device) -> None:
    """Of whole blocks the mean, of an unfinished one the sum; where sums go in order, the same bits."""
    cache, tokens = filled_cache(with_pages(pages), dtype, device)
    for sequence, length in enumerate(CASE.lengths):
        other = make_cache(with_pages(pages, DecodeCase(in_steps(length), head_dim=12, value_dim=5)), dtype, device)
        other.append(tokens.key[sequence], tokens.value[sequence])
        assert_same_contents(cache, sequence, other, 0)


@pytest.mark.parametrize("pages", [0, 1])
def test_a_long_append_begins_within_a_block(pages: int, device: torch.device) -> None:
    """As many tokens as several workers take, and a few more."""
    case = DecodeCase(in_steps(5, 2048, 1), head_dim=4, value_dim=2, pages=pages)
    cache, tokens = filled_cache(case, torch.float32, device)
    key, value, centroids = contents_of(cache, 0)
    assert_bitwise_equal("keys", key, tokens.key[0][0])
    assert_bitwise_equal("values", value, tokens.value[0][0])
    expected = tg.block_centroids(tokens.key[0], 8)[0, :, :256]
    torch.testing.assert_close(centroids[:, :256], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pages", PAGES)
def test_centroids_are_block_centroids(pages: int) -> None:
    """On the CPU bit for bit."""
    cache, tokens = filled_cache(with_pages(pages), torch.float32, torch.device("cpu"))
    expected = tg.block_centroids(tokens.key[0], 8)[:, :, :4]
    page_of = torch.tensor([0]) if cache.page_table is None else cache.page_table[0, : -(-38 // cache.page_size)].long()
    found = cache.centroids[page_of].transpose(0, 1).flatten(1, 2)[:, :4]
    assert_bitwise_equal("centroids", found, expected[0])


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("after", [[38, 20, 8], [33, 16, 0], [32, 15, 5], [0, 0, 0], [3, 20, 8], [24, 1, 7]])
def test_truncated_is_as_if_never_appended(after: list[int], pages: int, device: torch.device) -> None:
    """Contents, unfinished sums included, and all that comes later."""
    cache, tokens = filled_cache(with_pages(pages), torch.float32, device, spare=12)
    cache.truncate(after)
    expected = make_cache(with_pages(pages), torch.float32, device, spare=12)
    expected.append(padded(tokens.key, [0] * 3, after), padded(tokens.value, [0] * 3, after), after)
    assert cache.lengths == after == cache.seq_lens.tolist()
    for sequence in range(3):
        assert_same_contents(cache, sequence, expected, sequence)
    for left, right in zip(continued(cache), continued(expected), strict=True):
        assert_bitwise_equal("out", left, right)


def test_truncate_to_one_number(device: torch.device) -> None:
    cache, _ = filled_cache(DecodeCase(in_steps(20, batch=2)), torch.float32, device)
    cache.truncate(9)
    assert cache.lengths == [9, 9]
    cache.reset()
    assert cache.lengths == [0, 0] == cache.seq_lens.tolist()


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 1, 0], [0, 0, 0], [1, 1, 2], [0, 0, 1, 1, 0], [1], []])
def test_reordered_goes_on_from_what_was_chosen(indices: list[int], pages: int, device: torch.device) -> None:
    """And sequences that shared pages do not share what comes later."""
    case = DecodeCase(((30, 13, 0), (7, 7, 7), (1, 0, 1), (0, 0, 5)), head_dim=12, value_dim=5, pages=pages)
    tokens = make_tokens(case, torch.float32, device)
    if pages:
        cache: tg.MobaCache | tg.PagedMobaCache = tg.PagedMobaCache(
            3, 2, 12, block_size=8, max_seq_len=60, value_dim=5, device=device, page_size=8 * pages, num_pages=50
        )
    else:
        cache = tg.MobaCache(3, 2, 12, block_size=8, max_seq_len=60, value_dim=5, device=device)
    cache.append(padded(tokens.key, [0] * 3, case.lengths), padded(tokens.value, [0] * 3, case.lengths), case.lengths)
    before = cache.copy()
    cache.reorder(torch.tensor(indices, dtype=torch.int64, device=device))
    assert cache.batch_size == len(indices) and cache.lengths == [case.lengths[i] for i in indices]
    assert cache.seq_lens.tolist() == cache.lengths
    for sequence, index in enumerate(indices):
        assert_same_contents(cache, sequence, before, index)
    outs = continued(cache)
    for sequence, index in enumerate(indices):
        alone = before.copy()
        alone.reorder([index] * len(indices))
        for out, expected in zip(outs, continued(alone), strict=True):
            assert_bitwise_equal("out", out[sequence], expected[sequence])


def test_beam_search_shares_pages(device: torch.device) -> None:
    cache = tg.PagedMobaCache(4, 1, 8, block_size=4, max_seq_len=40, device=device)
    cache.append(*[torch.randn(4, 1, 22, 8, device=device) for _ in range(2)])
    assert cache.num_free_pages == 40 - 4 * 6
    cache.reorder([0, 0, 0, 0])
    assert cache.num_free_pages == 40 - 5 - 4, "five whole pages once, and four of the unfinished one"
    cache.reorder([3, 1, 2, 0])
    assert cache.num_free_pages == 40 - 5 - 4
    cache.truncate([22, 21, 18, 0])
    assert cache.num_free_pages == 40 - 5 - 2 - 1
    cache.reset()
    assert cache.num_free_pages == 40


def test_pages_are_never_given_to_two_sequences_by_chance(device: torch.device) -> None:
    """Random appends, truncations and reorderings: every page has as many users as sequences name it."""
    draw = random.Random(3)
    cache = tg.PagedMobaCache(3, 1, 4, block_size=2, max_seq_len=30, device=device, page_size=4, num_pages=30)
    model: list[list[float]] = [[], [], []]
    for step in range(120):
        action = draw.choice(["append", "append", "truncate", "reorder"])
        if action == "append":
            counts = [draw.randrange(0, min(4, 31 - len(tokens))) for tokens in model]
            most = max(counts)
            key = (
                torch.full((3, 1, most, 4), float(step), device=device)
                + torch.arange(3, device=device)[:, None, None, None] / 4
            )
            cache.append(key, key, counts)
            for b, count in enumerate(counts):
                model[b] += [step + b / 4] * count
        elif action == "truncate":
            lengths = [draw.randrange(max(0, len(tokens) - 5), len(tokens) + 1) for tokens in model]
            cache.truncate(lengths)
            model = [tokens[:length] for tokens, length in zip(model, lengths, strict=True)]
        else:
            indices = [draw.randrange(3) for _ in range(3)]
            cache.reorder(indices)
            model = [list(model[i]) for i in indices]
        table = cache.page_table.tolist()
        held = [[page for page in row if page >= 0] for row in table]
        assert held == cache._pages
        users = [sum(row.count(page) for row in held) for page in range(30)]
        assert users == cache._num_users and cache.num_free_pages == users.count(0)
        assert sorted(cache._free) == [page for page, count in enumerate(users) if count == 0]
        for row, tokens in zip(held, model, strict=True):
            keys = cache.key_pages[row, 0, :, 0].flatten()[: len(tokens)].tolist() if row else []
            assert keys == tokens
            if len(tokens) % 4:
                assert users[row[-1]] == 1, "a page with room left is one sequence's alone"


@pytest.mark.parametrize("pages", PAGES)
def test_copies_are_their_own(pages: int, device: torch.device) -> None:
    cache, _ = filled_cache(with_pages(pages), torch.float32, device, spare=12)
    other = cache.copy()
    third = cache.copy()
    outs = continued(cache)
    assert other.lengths == CASE.lengths
    for left, right in zip(continued(other), outs, strict=True):
        assert_bitwise_equal("out", left, right)
    third.truncate([1, 1, 1])
    for sequence in range(3):
        assert_same_contents(cache, sequence, other, sequence)


def test_to_the_same_device_is_itself(device: torch.device) -> None:
    cache = tg.MobaCache(1, 1, 4, max_seq_len=8, device=device)
    assert cache.to(cache.device) is cache


@pytest.mark.gpu
@pytest.mark.parametrize("pages", PAGES)
def test_moved_there_and_back(pages: int) -> None:
    cache, _ = filled_cache(with_pages(pages), torch.float32, torch.device("cpu"), spare=12)
    moved = cache.to("cuda")
    assert moved.key_pages.is_cuda and moved.seq_lens.is_cuda and moved.lengths == cache.lengths
    back = moved.to("cpu")
    for sequence in range(3):
        assert_same_contents(cache, sequence, back, sequence)
    for left, right in zip(continued(moved), continued(cache), strict=True):
        torch.testing.assert_close(left.cpu(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pages", [1, 3])
def test_reserved_pages_are_used(pages: int, device: torch.device) -> None:
    cache = tg.PagedMobaCache(2, 1, 8, block_size=4, max_seq_len=60, device=device, page_size=4 * pages)
    cache.append(*[torch.randn(2, 1, 5, 8, device=device) for _ in range(2)])
    cache.reserve([20, 7])
    table, free = cache.page_table.clone(), cache.num_free_pages
    assert (table >= 0).sum(dim=1).tolist() == [-(-25 // (4 * pages)), -(-12 // (4 * pages))]
    for _ in range(7):
        cache.append(*[torch.randn(2, 1, 1, 8, device=device) for _ in range(2)])
    assert torch.equal(cache.page_table, table) and cache.num_free_pages == free
    cache.truncate([12, 12])
    cache.reorder([0, 1])
    assert cache.num_free_pages == cache.num_pages - 2 * -(-12 // (4 * pages))


def test_reserved_pages_go_back(device: torch.device) -> None:
    """Where nothing is cut off too; what stays is what it was."""
    cache = tg.PagedMobaCache(3, 1, 8, block_size=4, max_seq_len=60, device=device)
    tokens = [torch.randn(3, 1, 8, 8, device=device) for _ in range(2)]
    cache.append(*tokens)
    free = cache.num_free_pages
    cache.reserve([8, 0, 1])
    assert cache.num_free_pages == free - 3
    cache.truncate(cache.lengths)
    assert cache.num_free_pages == free and cache.lengths == [8, 8, 8] and cache.last_query_len == 8
    out = tg.moba_decode(torch.randn(3, 1, 1, 8, device=device), cache)
    cache.append(*tokens)
    assert out.isfinite().all() and cache.num_free_pages == free - 6


def test_views_of_keys_and_values(device: torch.device) -> None:
    cache, tokens = filled_cache(CASE, torch.float32, device)
    assert isinstance(cache, tg.MobaCache)
    assert cache.key.shape == (3, 2, 38, 12) and cache.value.shape == (3, 2, 38, 5)
    assert_bitwise_equal("key", cache.key[1, :, :20], tokens.key[1][0])
    assert cache.key.data_ptr() == cache.key_pages.data_ptr()


# --- out of space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", PAGES)
def test_past_max_seq_len(pages: int, device: torch.device) -> None:
    """Nothing is written, and what fits still does."""
    cache, _ = filled_cache(with_pages(pages), torch.float32, device)
    new = [torch.randn(3, 2, 1, dim, device=device) for dim in (12, 5)]
    before = cache.copy()
    with pytest.raises(ValueError, match=r"1 new tokens for sequence 0, which holds 38.*max_seq_len, 38"):
        cache.append(*new)
    assert cache.lengths == CASE.lengths == cache.seq_lens.tolist()
    for sequence in range(3):
        assert_same_contents(cache, sequence, before, sequence)
    cache.append(*new, num_tokens=[0, 1, 1])
    assert cache.lengths == [38, 21, 9]


def test_out_of_pages(device: torch.device) -> None:
    cache = tg.PagedMobaCache(2, 1, 4, block_size=4, max_seq_len=40, device=device, num_pages=5)
    cache.append(*[torch.randn(2, 1, 8, 4, device=device) for _ in range(2)])
    with pytest.raises(ValueError, match=r"2 more pages of 4 tokens are needed, but only 1 of num_pages, 5, are free"):
        cache.append(*[torch.randn(2, 1, 1, 4, device=device) for _ in range(2)])
    assert cache.lengths == [8, 8] and cache.num_free_pages == 1
    with pytest.raises(ValueError, match="pages of 4 tokens are needed"):
        cache.reserve(5)
    cache.append(*[torch.randn(2, 1, 1, 4, device=device) for _ in range(2)], num_tokens=[1, 0])
    with pytest.raises(ValueError, match="a page that sequences share is to be copied"):
        cache.copy().reorder([0, 0, 0, 0, 0, 0])
    cache.truncate([4, 4])
    cache.append(*[torch.randn(2, 1, 6, 4, device=device) for _ in range(2)], num_tokens=[2, 6])


# --- convolution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolved_keys_are_those_of_whole_sequences(
    dtype: torch.dtype, pages: int, width: int, device: torch.device
) -> None:
    """Ragged appends, some shorter than the convolution, then a truncation, a reordering, and more."""
    weight = random_tensor((2, 12, width), dtype, device, 5)
    case = DecodeCase(((9, 0, 31), (1, 1, 1), (0, 17, 2), (1, 0, 1), (5, 5, 0)), head_dim=12, pages=pages)
    tokens = make_tokens(case, dtype, device)
    kwargs = {"block_size": 8, "max_seq_len": 60, "dtype": dtype, "device": device, "conv_weight": weight}
    cache = tg.PagedMobaCache(3, 2, 12, **kwargs) if pages else tg.MobaCache(3, 2, 12, **kwargs)  # type: ignore[arg-type]
    starts = [0, 0, 0]
    for counts in case.steps:
        cache.append(padded(tokens.key, starts, counts), padded(tokens.value, starts, counts), list(counts))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]

    def expected(raw: list[Tensor], value: list[Tensor]) -> "tg.MobaCache":
        lengths = [key.size(2) for key in raw]
        whole = tg.MobaCache(3, 2, 12, block_size=8, max_seq_len=60, dtype=dtype, device=device)
        keys = [tg.key_conv(key, weight) for key in raw]
        whole.append(padded(keys, [0] * 3, lengths), padded(value, [0] * 3, lengths), lengths)
        return whole

    def check(raw: list[Tensor], value: list[Tensor]) -> None:
        whole = expected(raw, value)
        for sequence in range(3):
            assert_same_contents(cache, sequence, whole, sequence)

    raw, value = tokens.key, tokens.value
    check(raw, value)
    after = [length - cut for length, cut in zip(case.lengths, (1, 8, 0), strict=True)]
    cache.truncate(after)
    raw, value = ([t[:, :, :n] for t, n in zip(ts, after, strict=True)] for ts in (raw, value))
    check(raw, value)
    cache.reorder([1, 1, 2])
    raw, value = ([ts[1], ts[1], ts[2]] for ts in (raw, value))
    new = [random_tensor((3, 2, 3, 12), dtype, device, 11 + i) for i in range(2)]
    cache.append(*new)
    raw = [torch.cat([t, new[0][b : b + 1]], dim=2) for b, t in enumerate(raw)]
    value = [torch.cat([t, new[1][b : b + 1]], dim=2) for b, t in enumerate(value)]
    check(raw, value)
    cache.truncate([0, 17, 30])
    cache.append(*new)
    raw = [
        torch.cat([t[:, :, :n], new[0][b : b + 1]], dim=2)
        for (b, t), n in zip(enumerate(raw), (0, 17, 30), strict=True)
    ]
    value = [
        torch.cat([t[:, :, :n], new[1][b : b + 1]], dim=2)
        for (b, t), n in zip(enumerate(value), (0, 17, 30), strict=True)
    ]
    check(raw, value)


def test_a_convolution_is_cut_off_by_a_block_at_most(device: torch.device) -> None:
    weight = torch.randn(1, 4, 3, device=device)
    cache = tg.MobaCache(1, 1, 4, block_size=8, max_seq_len=60, device=device, conv_weight=weight)
    cache.append(*[torch.randn(1, 1, 40, 4, device=device) for _ in range(2)])
    with pytest.raises(ValueError, match="remembers enough to cut off 8, or everything"):
        cache.truncate(31)
    cache.truncate(35)
    with pytest.raises(ValueError, match="remembers enough to cut off 3, or everything"):
        cache.truncate(31)
    cache.truncate(0)
    assert cache.lengths == [0]

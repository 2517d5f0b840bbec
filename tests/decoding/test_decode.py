"""Decoding with a cache: rows of attention over whole sequences, however the sequences came."""

import pytest
import torch

import topgather as tg
from tests.block_attention.helpers import LAYOUTS
from tests.common.tensors import DTYPES, assert_bitwise_equal, assert_same_nonfinite, integer_tensor, random_tensor
from tests.common.tolerances import UNIT_ROUNDOFF, accumulation_dtype
from tests.decoding.helpers import (
    Cache,
    DecodeCase,
    assert_rows,
    check_decode,
    choice_of,
    filled_cache,
    in_steps,
    make_cache,
    make_tokens,
    padded,
    run_steps,
)
from topgather import reference

pytestmark = pytest.mark.sanitize

CASES = [
    # Splits of one sequence: token by token, prefill and tokens, chunks that end anywhere.
    DecodeCase(in_steps(*[1] * 19), block_size=4),
    DecodeCase(in_steps(33, 1, 1, 7, 8, 1, 15, 16, 1)),
    DecodeCase(in_steps(33, 1, 1, 7, 8, 1, 15, 16, 1), pages=1),
    DecodeCase(in_steps(40, 5, 1), pages=2, num_kv_heads=1, top_k=3),
    # A prefill that goes the way of moba_attention.
    DecodeCase(in_steps(70, 1, 66, 1, batch=2), top_k=3),
    # As many new tokens, but not as many before them.
    DecodeCase(((5, 0), (66, 66)), head_dim=8),
    # Ragged, sequences that start late or stand still.
    DecodeCase(((9, 0, 31), (1, 1, 1), (0, 17, 2), (1, 0, 1), (5, 5, 0)), top_k=3),
    DecodeCase(((9, 0, 31), (1, 1, 1), (0, 17, 2), (1, 0, 1), (5, 5, 0)), top_k=3, pages=1),
    # All blocks.
    DecodeCase(((50, 50), (1, 1), (3, 2)), top_k=None, pages=1),
    DecodeCase(in_steps(66, 1, batch=2), top_k=None),
    # Heads and dimensions.
    DecodeCase(in_steps(30, 2), num_heads=6, num_kv_heads=1, head_dim=5, value_dim=3, pages=3),
    DecodeCase(in_steps(30, 2), num_heads=3, num_kv_heads=3, head_dim=1, value_dim=40),
    DecodeCase(in_steps(25, 1), num_heads=2, num_kv_heads=2, head_dim=72, value_dim=64, scale=-0.3),
    # Block sizes: one key, more than all keys, more keys than a tile.
    DecodeCase(in_steps(21, 1, 2), block_size=1, top_k=5, pages=7),
    DecodeCase(in_steps(21, 1), block_size=64, top_k=4),
    DecodeCase(in_steps(300, 1, 1), block_size=136, top_k=2, num_heads=1, num_kv_heads=1, head_dim=8, pages=1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_attention_over_whole_sequences(case: DecodeCase, dtype: torch.dtype, device: torch.device) -> None:
    check_decode(case, dtype, device)


@pytest.mark.parametrize("pages", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_blocks_that_moba_route_chooses(dtype: torch.dtype, pages: int, device: torch.device) -> None:
    """Scores of small integers are exact, and full of ties: the choice must be the same to the last block."""
    case = DecodeCase(in_steps(37, 1, 1, 20, 1), top_k=3, pages=pages, block_size=4)
    tokens = make_tokens(case, dtype, device)
    tokens.query = [integer_tensor((1, 4, 60, 16), dtype, device, 0)]
    tokens.key = [integer_tensor((1, 2, 60, 16), dtype, device, 1)]
    (rows,) = run_steps(case, tokens, make_cache(case, dtype, device))
    assert torch.equal(rows.block_indices, tg.moba_route(tokens.query[0], tokens.key[0], 4, 3).block_indices)


@pytest.mark.parametrize("pages", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_cpu_scores_are_the_same_bits(dtype: torch.dtype, pages: int) -> None:
    """Of any numbers: centroids and scores are summed in the order in which moba_route sums them."""
    case = DecodeCase(in_steps(301, 1, 1, 20, 1), top_k=6, pages=pages, head_dim=24)
    tokens = make_tokens(case, dtype, torch.device("cpu"))
    (rows,) = run_steps(case, tokens, make_cache(case, dtype, torch.device("cpu")))
    assert torch.equal(rows.block_indices, tg.moba_route(tokens.query[0], tokens.key[0], 8, 6).block_indices)


@pytest.mark.parametrize("pages", [0, 2])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("fused_qkv", "expanded_batch")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_new_tokens(dtype: torch.dtype, layout: str, pages: int, device: torch.device) -> None:
    case = DecodeCase(((21, 18), (1, 1), (3, 2)), head_dim=20, pages=pages)
    tokens = make_tokens(case, dtype, device)
    found = run_steps(case, tokens, make_cache(case, dtype, device), layout)
    expected = run_steps(case, tokens, make_cache(case, dtype, device))
    for sequence, (rows, others) in enumerate(zip(found, expected, strict=True)):
        assert_rows(rows, tokens, sequence, case)
        assert_bitwise_equal("out", rows.out, others.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    """The same bits from any kind of cache."""
    results = []
    for pages in (0, 1, 3):
        case = DecodeCase(((21, 9), (1, 1), (3, 2), (1, 1)), pages=pages)
        tokens = make_tokens(case, dtype, device)
        results.append(run_steps(case, tokens, make_cache(case, dtype, device)))
    for others in results[1:]:
        for rows, expected in zip(others, results[0], strict=True):
            assert torch.equal(rows.block_indices, expected.block_indices)
            assert_bitwise_equal("out", rows.out, expected.out)
            assert_bitwise_equal("lse", rows.lse, expected.lse)


def test_counts_in_tensors(device: torch.device) -> None:
    case = DecodeCase(((9, 0, 31), (1, 1, 1), (0, 17, 2)), pages=1)
    tokens = make_tokens(case, torch.float32, device)
    found = run_steps(case, tokens, make_cache(case, torch.float32, device), on_device=True)
    for sequence, rows in enumerate(found):
        assert_rows(rows, tokens, sequence, case)


@pytest.mark.parametrize("pages", [0, 1])
def test_fewer_queries_than_were_appended(pages: int, device: torch.device) -> None:
    """The last tokens alone may ask; with counts, so many of them."""
    case = DecodeCase(in_steps(40, batch=2), pages=pages)
    cache, tokens = filled_cache(case, torch.float32, device)
    whole = tg.moba_decode(padded(tokens.query, [0, 0], [40, 40]), cache, top_k=2)
    cache.last_num_tokens = None
    last = tg.moba_decode(padded(tokens.query, [37, 37], [3, 3]), cache, top_k=2)
    torch.testing.assert_close(last, whole[:, :, 37:], rtol=1e-5, atol=1e-5)
    ragged = tg.moba_decode(padded(tokens.query, [39, 37], [1, 3]), cache, top_k=2, num_tokens=[1, 3])
    torch.testing.assert_close(ragged[0, :, :1], whole[0, :, 39:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ragged[1], whole[1, :, 37:], rtol=1e-5, atol=1e-5)
    assert (ragged[0, :, 1:] == 0).all()


@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_before_the_first_token(dtype: torch.dtype, pages: int, device: torch.device) -> None:
    """More queries than tokens: those at negative positions see nothing."""
    case = DecodeCase(((3, 20),), pages=pages)
    cache, tokens = filled_cache(case, dtype, device)
    query = random_tensor((2, 4, 7, 16), dtype, device, 9)
    out, lse = tg.moba_decode(query, cache, top_k=2, return_lse=True, num_tokens=[7, 6])
    assert (out[0, :, :4] == 0).all() and (lse[0, :, :4] == -torch.inf).all()
    assert (out[1, :, 6] == 0).all() and (lse[1, :, 6] == -torch.inf).all()
    whole = [torch.nn.functional.pad(t, (0, 0, 0, 20 - t.size(2))) for t in (*tokens.key, *tokens.value)]
    key, value = torch.cat(whole[:2]), torch.cat(whole[2:])
    lengths, counts = torch.tensor([3, 20]), torch.tensor([7, 6])
    chosen = reference.moba_decode_route(query, key, lengths, 8, 2, counts)
    assert torch.equal(choice_of(cache, query, 2, counts.int().to(device)).cpu(), chosen.cpu())
    expected, expected_lse = reference.moba_decode(query, key, value, chosen, lengths, 8, counts)
    tolerance = 64 * UNIT_ROUNDOFF[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize(("batch", "query_len", "length"), [(0, 1, 0), (2, 0, 0), (2, 0, 9), (2, 1, 0), (2, 3, 0)])
def test_empty(batch: int, query_len: int, length: int, pages: int, device: torch.device) -> None:
    kwargs = {"block_size": 4, "max_seq_len": 16, "device": device, "value_dim": 6}
    cache: Cache = (
        tg.MobaCache(batch, 2, 8, **kwargs) if pages == 0 else tg.PagedMobaCache(batch, 2, 8, **kwargs)  # type: ignore[arg-type]
    )
    cache.append(torch.randn(batch, 2, length, 8, device=device), torch.randn(batch, 2, length, 6, device=device))
    query = torch.randn(batch, 4, query_len, 8, device=device)
    out, lse = tg.moba_decode(query, cache, return_lse=True)
    assert out.shape == (batch, 4, query_len, 6) and lse.shape == (batch, 4, query_len)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert tg.moba_decode(query, cache, top_k=None).shape == out.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_dim_of_zero(dtype: torch.dtype, device: torch.device) -> None:
    cache = tg.MobaCache(1, 1, 8, block_size=4, max_seq_len=16, value_dim=0, dtype=dtype, device=device)
    cache.append(torch.ones(1, 1, 9, 8, dtype=dtype, device=device), torch.ones(1, 1, 9, 0, dtype=dtype, device=device))
    out, lse = tg.moba_decode(torch.zeros(1, 1, 1, 8, dtype=dtype, device=device), cache, return_lse=True)
    assert out.shape == (1, 1, 1, 0)
    torch.testing.assert_close(lse.double().cpu(), torch.full((1, 1, 1), 9.0).log().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pages", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_chosen_is_not_read(dtype: torch.dtype, pages: int, device: torch.device) -> None:
    """A token costs its blocks and the centroids: keys and values of all other blocks may be NaN."""
    case = DecodeCase(in_steps(90, 1, batch=2), top_k=3, pages=pages)
    cache, _ = filled_cache(case, dtype, device, spare=8)
    query = random_tensor((2, 4, 1, 16), dtype, device, 5)
    cache.last_num_tokens = None
    expected, expected_lse = tg.moba_decode(query, cache, top_k=3, return_lse=True)
    chosen = choice_of(cache, query, 3, None)
    for sequence in range(2):
        for kv_head in range(2):
            kept = set(chosen[sequence, 2 * kv_head : 2 * kv_head + 2].flatten().tolist())
            for block in set(range(13)) - kept:
                token = block * 8
                page, row = sequence, token
                if cache.page_table is not None:
                    page = int(cache.page_table[sequence, token // cache.page_size])
                    row = token % cache.page_size
                if page < 0:
                    continue
                cache.key_pages[page, kv_head, row : row + 8] = torch.nan
                cache.value_pages[page, kv_head, row : row + 8] = torch.nan
    out, lse = tg.moba_decode(query, cache, top_k=3, return_lse=True)
    assert_bitwise_equal("out", out, expected)
    assert_bitwise_equal("lse", lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["key", "value", "query"])
def test_numbers_that_are_not_finite(name: str, number: float, dtype: torch.dtype, device: torch.device) -> None:
    """They reach exactly the queries that see them, and rank as moba_route ranks them."""
    case = DecodeCase(in_steps(20, 6, 1, 1), top_k=2, pages=1, num_heads=2, num_kv_heads=1, head_dim=4)
    tokens = make_tokens(case, dtype, device)
    getattr(tokens, name)[0][0, 0, 11, 2] = number
    getattr(tokens, name)[0][0, 0, 22] = number
    (rows,) = run_steps(case, tokens, make_cache(case, dtype, device))
    chosen = reference.moba_route(tokens.query[0], tokens.key[0], 8, 2)
    assert torch.equal(rows.block_indices.cpu(), chosen.cpu())
    expected, lse = reference.moba_attention(tokens.query[0], tokens.key[0], tokens.value[0], chosen, 8)
    assert_same_nonfinite("out", rows.out, expected)
    assert_same_nonfinite("lse", rows.lse, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_minus_infinity_alone(dtype: torch.dtype, device: torch.device) -> None:
    """NaN, as plain softmax, and an lse of -inf."""
    cache = tg.MobaCache(1, 1, 4, block_size=4, max_seq_len=16, dtype=dtype, device=device)
    key = torch.full((1, 1, 6, 4), -torch.inf, dtype=dtype, device=device)
    cache.append(key, torch.ones_like(key))
    out, lse = tg.moba_decode(torch.ones(1, 1, 1, 4, dtype=dtype, device=device), cache, return_lse=True)
    assert out.isnan().all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_scores_of_minus_infinity_weighs_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """Seen before any other, it leaves no NaN behind."""
    cache = tg.MobaCache(1, 1, 4, block_size=4, max_seq_len=16, dtype=dtype, device=device)
    key = torch.zeros(1, 1, 6, 4, dtype=dtype, device=device)
    key[:, :, :4] = -torch.inf
    cache.append(key, torch.ones_like(key))
    out, lse = tg.moba_decode(torch.ones(1, 1, 1, 4, dtype=dtype, device=device), cache, return_lse=True)
    assert (out == 1).all()
    torch.testing.assert_close(lse.double().cpu(), torch.full((1, 1, 1), 2.0).log().double(), rtol=1e-6, atol=0)


def test_a_users_choice_for_rows_of_no_token(device: torch.device) -> None:
    """Whatever it names there, such a row is 0 and -inf."""
    case = DecodeCase(((20, 9),), num_heads=2, num_kv_heads=1)
    cache, tokens = filled_cache(case, torch.float32, device)
    query = padded(tokens.query, [17, 6], [3, 3])
    choice = torch.zeros(2, 2, 3, 1, dtype=torch.int32, device=device)
    choice[1, :, 1:] = 99
    out, lse = tg.moba_decode(
        query, cache, num_tokens=[3, 1], return_lse=True, routing=tg.BlockRouting(choice, case.block_size)
    )
    assert (out[1, :, 1:] == 0).all() and (lse[1, :, 1:] == -torch.inf).all()
    assert lse[0].isfinite().all() and lse[1, :, 0].isfinite().all()


@pytest.mark.parametrize("pages", [0, 1])
def test_a_users_choice_in_any_order(pages: int, device: torch.device) -> None:
    """Slots may stand in any order, with gaps; a block after the own one adds nothing."""
    case = DecodeCase(in_steps(38), pages=pages, num_heads=2, num_kv_heads=1)
    cache, tokens = filled_cache(case, torch.float32, device)
    cache.last_num_tokens = None
    query = tokens.query[0][:, :, 30:36]
    cache.truncate(36)
    choice = torch.tensor([3, -1, 0, 4], dtype=torch.int32, device=device).expand(1, 2, 6, 4)
    out, lse = tg.moba_decode(query, cache, return_lse=True, routing=tg.BlockRouting(choice, 8))
    key, value = tokens.key[0][:, :, :36], tokens.value[0][:, :, :36]
    expected, expected_lse = reference.moba_decode(query, key, value, choice, torch.tensor([36]), 8)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "case",
    [
        # So many keys a query that its blocks are shared out among several workers.
        DecodeCase(in_steps(4300, 1), num_heads=2, num_kv_heads=1, head_dim=8, block_size=128, top_k=None),
        DecodeCase(in_steps(4300, 1), num_heads=2, num_kv_heads=1, head_dim=8, block_size=64, top_k=66, pages=4),
    ],
    ids=str,
)
def test_many_keys(case: DecodeCase, dtype: torch.dtype, device: torch.device) -> None:
    cache, tokens = filled_cache(DecodeCase(**{**case.__dict__, "steps": in_steps(4301)}), dtype, device)
    cache.last_num_tokens = None
    query = tokens.query[0][:, :, -1:]
    out, lse = tg.moba_decode(query, cache, case.top_k, return_lse=True)
    chosen = choice_of(cache, query, case.top_k, None)
    length = torch.tensor([4301])
    expected, expected_lse = reference.moba_decode(
        query, tokens.key[0], tokens.value[0], chosen, length, case.block_size
    )
    # The largest of a sum of a few thousand weighted values, each rounded in float32; rounded once at the end.
    tolerance = 4 * UNIT_ROUNDOFF[dtype] + 64 * UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)


def test_many_rows_share_keys(device: torch.device) -> None:
    """More rows than a task takes, of tokens and of a group's heads; lengths differ, so keys are read by decode."""
    check_decode(
        DecodeCase(((25, 40), (37, 36)), num_heads=6, num_kv_heads=1, head_dim=8, top_k=3), torch.float32, device
    )
    check_decode(
        DecodeCase(((9, 7),), num_heads=70, num_kv_heads=1, head_dim=4, top_k=2, pages=1), torch.float32, device
    )

"""Every instruction set this machine has runs the same compact set of decoding's cases."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES
from tests.decoding.helpers import (
    Cache,
    DecodeCase,
    assert_rows,
    check_decode,
    in_steps,
    make_cache,
    make_tokens,
    run_steps,
)

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target")]
CPU = torch.device("cpu")

CASES = [
    DecodeCase(),
    DecodeCase(((9, 0, 31), (1, 1, 1), (0, 17, 2), (5, 5, 0)), top_k=3, pages=1),
    DecodeCase(in_steps(200, 1, 3), num_heads=6, num_kv_heads=2, head_dim=33, value_dim=70, top_k=4, pages=2),
    DecodeCase(in_steps(260, 1), num_heads=2, num_kv_heads=1, head_dim=64, block_size=130, top_k=2),
    DecodeCase(((45, 40), (35, 39)), num_heads=6, num_kv_heads=1, head_dim=16, top_k=3),
    DecodeCase(in_steps(4400, 1), num_heads=1, num_kv_heads=1, head_dim=8, block_size=64, top_k=None),
    # Keys, and values, that fill any number of vectors, and one less and one more.
    *(
        DecodeCase(in_steps(n + 3, 1), num_heads=2, num_kv_heads=1, head_dim=n, value_dim=n, block_size=n)
        for n in (1, 2, 3, 4, 7, 9, 15, 16, 17, 31, 63, 65)
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: DecodeCase, dtype: torch.dtype) -> None:
    check_decode(case, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    for layout in ("offset", "padded_rows", "transposed"):
        tokens = make_tokens(CASES[1], dtype, CPU)
        found = run_steps(CASES[1], tokens, make_cache(CASES[1], dtype, CPU), layout)
        for sequence, rows in enumerate(found):
            assert_rows(rows, tokens, sequence, CASES[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_blocks_that_moba_route_chooses(dtype: torch.dtype) -> None:
    """On every instruction set scores are summed as moba_route sums them."""
    case = DecodeCase(in_steps(301, 1, 1, 20, 1), top_k=6, pages=2, head_dim=24)
    tokens = make_tokens(case, dtype, CPU)
    (rows,) = run_steps(case, tokens, make_cache(case, dtype, CPU))
    expected = tg.moba_route(tokens.query[0], tokens.key[0], 8, 6).block_indices
    assert torch.equal(rows.block_indices, expected)


def long_cache(head_dim: int, num_blocks: int, dtype: torch.dtype, pages: int) -> Cache:
    """Blocks of one key each, so that centroids are keys: two sequences, the second one shorter, two key heads."""
    case = DecodeCase(((num_blocks, num_blocks // 2 + 3),), num_heads=2, head_dim=head_dim, block_size=1, pages=pages)
    cache = make_cache(case, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(2, 2, num_blocks, head_dim, generator=generator)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    cache.append(keys.to(dtype), keys.to(dtype), num_tokens=lengths)
    return cache


@pytest.mark.parametrize("top_k", [1, 7, 300])
@pytest.mark.parametrize(("query_len", "pages"), [(1, 0), (4, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "equal", "ascending", "last bits", "huge", "subnormal", "not finite"])
def test_blocks_left_out_by_bounds_change_no_choice(
    kind: str, dtype: torch.dtype, query_len: int, top_k: int, pages: int
) -> None:
    """Few rows among many blocks, where most blocks are not scored: the choice is that of rows that score all."""
    num_blocks, head_dim = 1700, 64
    cache = long_cache(head_dim, num_blocks, dtype, pages)
    centroids, limits = cache.centroids, torch.finfo(dtype)
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 2, query_len, head_dim, generator=generator, dtype=dtype)
    steps = torch.arange(centroids.numel() // head_dim, dtype=dtype).reshape(*centroids.shape[:-1], 1)
    if kind == "equal":
        centroids.copy_(centroids.flatten()[:head_dim].expand_as(centroids))
    elif kind == "ascending":
        centroids.copy_(steps * query[0, 0, 0])
    elif kind == "last bits":
        centroids.copy_(centroids.flatten()[:head_dim] * (1 + steps % 5 * limits.eps))
    elif kind == "huge":
        centroids.mul_(limits.max / 8)
    elif kind == "subnormal":
        centroids.mul_(limits.tiny / 4)
    elif kind == "not finite":
        for i, number in enumerate((torch.nan, torch.inf, -torch.inf)):
            centroids.view(-1)[i :: 4001 + 2 * i] = number

    def choose(rows: Tensor) -> Tensor:
        route = torch.ops.topgather.moba_decode_route.default
        places = (cache.centroids, cache.seq_lens, cache.page_table, None, cache.block_size, cache.page_size)
        chosen: Tensor = route(rows, *places, top_k, min(1, top_k - 1), 1)
        return chosen

    # The newest of more rows than are bounded are the same rows.
    many = torch.cat([torch.zeros(2, 2, 5, head_dim, dtype=dtype), query], dim=2)
    assert torch.equal(choose(query), choose(many)[:, :, 5:])

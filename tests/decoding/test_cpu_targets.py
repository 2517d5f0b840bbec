"""Every instruction set this machine has runs the same compact set of decoding's cases."""

import pytest
import torch

import topgather as tg
from tests.common.tensors import DTYPES
from tests.decoding.helpers import DecodeCase, assert_rows, check_decode, in_steps, make_cache, make_tokens, run_steps

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

"""Decoding gives the same bits from run to run, for any number of threads, whatever else is in the batch."""

import pytest
import torch

from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.decoding.helpers import DecodeCase, Rows, in_steps, make_cache, make_tokens, run_steps

pytestmark = pytest.mark.sanitize

CPU = torch.device("cpu")
CASES = [
    DecodeCase(((300, 211, 7), (1, 1, 1), (9, 3, 70)), num_heads=6, num_kv_heads=3, head_dim=24, top_k=6, pages=2),
    # Blocks of a query are shared out.
    DecodeCase(in_steps(5000, 1), num_heads=2, num_kv_heads=1, head_dim=8, block_size=64, top_k=None),
]


def assert_rows_equal(actual: list[Rows], expected: list[Rows], what: str) -> None:
    for rows, others in zip(actual, expected, strict=True):
        for name in ("out", "lse", "block_indices"):
            assert_bitwise_equal(f"{name}, {what}", getattr(rows, name), getattr(others, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case: DecodeCase, dtype: torch.dtype) -> None:
    tokens = make_tokens(case, dtype, CPU)
    torch.set_num_threads(1)
    expected = run_steps(case, tokens, make_cache(case, dtype, CPU))
    for num_threads in (2, 3, 5):
        torch.set_num_threads(num_threads)
        actual = run_steps(case, tokens, make_cache(case, dtype, CPU))
        assert_rows_equal(actual, expected, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [0, 1])
def test_a_sequence_does_not_depend_on_the_others(dtype: torch.dtype, pages: int, device: torch.device) -> None:
    """Alone, or among others: the same bits."""
    case = DecodeCase(((30, 13, 2), (1, 1, 1), (9, 3, 2)), pages=pages)
    tokens = make_tokens(case, dtype, device)
    expected = run_steps(case, tokens, make_cache(case, dtype, device))
    for b in range(3):
        alone = DecodeCase(tuple((counts[b],) for counts in case.steps), pages=pages)
        own = type(tokens)(tokens.query[b : b + 1], tokens.key[b : b + 1], tokens.value[b : b + 1])
        actual = run_steps(alone, own, make_cache(alone, dtype, device))
        assert_rows_equal(actual, expected[b : b + 1], f"sequence {b} alone")
